// What the tables of the chosen GPU hold.

function kernelCell(name) {
  const label = page.functions[name],
    whole = page.names[name];
  const button = element(
    "button",
    { type: "button", class: "link name kernel", title: whole, click: () => seek(whole) },
    label || "(no name)",
  );
  return whole === label ? [button] : [button, element("small", { class: "name signature" }, whole.slice(0, 400))];
}

const phaseCell = (place) => {
  const chip = element("i", { class: "key" });
  chip.style.background = page.hues[place][0];
  return [
    chip,
    element(
      "button",
      { type: "button", class: "link name", title: page.phases[place], click: () => seek(page.phases[place]) },
      page.phases[place] || "(no name)",
    ),
  ];
};

const us = (value) => [microseconds(value)];
const exposedCell = (value) => (value ? [element("span", { class: "red" }, microseconds(value))] : ["0"]);
const nameCell = (text) => [element("span", { class: "name", title: text }, text)];
const count = (value) => [grouped(value, 0)];
const named = (name) => (name === 0 ? "" : page.functions[name]);

// Of each table: what it is called, its rows, and its columns: heading, value to sort by, cell.
const TABLES = {
  gpus: {
    title: page.is_timeline ? "Ranks" : "GPUs",
    rows: () => (page.gpus.length > 1 ? page.gpus : []),
    first: 4,
    columns: [
      [
        page.is_timeline ? "rank" : "GPU",
        (g) => page.gpus.indexOf(g),
        (g) => [element("button", { type: "button", class: "link name", click: () => chooseGpu(g) }, g.title)],
      ],
      ["window µs", (g) => g.window_us, (g) => us(g.window_us)],
      ["compute µs", (g) => g.compute_us, (g) => us(g.compute_us)],
      ["communication µs", (g) => g.communication_us, (g) => us(g.communication_us)],
      ["exposed µs", (g) => g.exposed_us, (g) => exposedCell(g.exposed_us)],
      ["of the window", (g) => g.exposed_us / g.window_us || 0, (g) => [share(g.exposed_us, g.window_us)]],
      ["idle µs", (g) => g.idle_us, (g) => us(g.idle_us)],
    ],
  },
  kernels: {
    title: page.is_timeline ? "Actions" : "Kernels",
    rows: () => shown.gpu.kernels,
    first: 3,
    columns: [
      [page.is_timeline ? "action" : "kernel", (k) => page.functions[k[0]], (k) => kernelCell(k[0])],
      ["class", (k) => page.classes[k[1]], (k) => [key(k[1]), page.classes[k[1]]]],
      ["runs", (k) => k[2], (k) => count(k[2])],
      ["total µs", (k) => k[3], (k) => us(k[3])],
      ["mean µs", (k) => k[3] / k[2], (k) => us(k[3] / k[2])],
      ["exposed µs", (k) => k[4], (k) => (isTalk(k[1]) ? exposedCell(k[4]) : [""])],
      ["grid × block", (k) => k[5] * 1e6 + k[6], (k) => [k[5] ? `${grouped(k[5], 0)} × ${grouped(k[6], 0)}` : ""]],
    ],
  },
  pieces: {
    title: "Exposed stretches",
    rows: () => shown.gpu.pieces,
    first: 1,
    size: (gpu) => gpu.num_pieces,
    note: (gpu) =>
      gpu.num_pieces > gpu.pieces.length
        ? `the longest ${grouped(gpu.pieces.length, 0)} of ${grouped(gpu.num_pieces, 0)}`
        : "",
    columns: [
      [
        "at µs",
        (p) => p[0],
        (p) => [element("button", { type: "button", class: "link", click: () => showPiece(p) }, microseconds(p[0]))],
      ],
      ["length µs", (p) => p[1], (p) => exposedCell(p[1])],
      ["what ran", (p) => p[2].map(named).join(), (p) => nameCell(p[2].map(named).join(", "))],
      ["phase", (p) => p[3].join(), (p) => nameCell(p[3].join(", "))],
      ["compute that follows", (p) => named(p[4]), (p) => nameCell(named(p[4]) || "none")],
      ["its phase", (p) => p[5], (p) => nameCell(p[5])],
      ["outcome", (p) => p[6], (p) => [p[6]]],
    ],
  },
  hiding: {
    title: "What hides what",
    rows: () => shown.gpu.hiding,
    first: 1,
    columns: hidingColumns,
    note: () => "µs; under several kernels at once it counts for the one that started first",
  },
  phases: {
    title: "Phases",
    rows: () => shown.gpu.phases,
    first: 4,
    note: (gpu) => `by ${gpu.phase_source}`,
    columns: [
      ["phase", (p) => page.phases[p[0]], (p) => phaseCell(p[0])],
      ["ranges", (p) => p[1], (p) => count(p[1])],
      ["compute µs", (p) => p[2], (p) => us(p[2])],
      ["communication µs", (p) => p[3], (p) => us(p[3])],
      ["exposed µs", (p) => p[4], (p) => exposedCell(p[4])],
      ["other µs", (p) => p[5], (p) => us(p[5])],
    ],
  },
  streams: {
    title: "Streams",
    rows: () => shown.gpu.streams,
    first: 2,
    columns: [
      ["stream", (s) => s[0], (s) => [String(s[0])]],
      ["pieces of work", (s) => s[1], (s) => count(s[1])],
      ["busy µs", (s) => s[2], (s) => us(s[2])],
      ["of the window", (s) => s[2], (s) => [share(s[2], shown.gpu.window_us)]],
      ["compute µs", (s) => s[3], (s) => us(s[3])],
      ["communication µs", (s) => s[4], (s) => us(s[4])],
    ],
  },
  flights: {
    title: "Transfers in flight",
    rows: () => shown.gpu.flights,
    first: 2,
    note: () => "between the kernel that sends and the one that receives",
    columns: [
      ["kind", (f) => f[0], (f) => nameCell(f[0])],
      ["flights", (f) => f[1], (f) => count(f[1])],
      ["µs", (f) => f[2], (f) => us(f[2])],
      ["under compute µs", (f) => f[3], (f) => us(f[3])],
      ["exposed µs", (f) => f[4], (f) => exposedCell(f[4])],
    ],
  },
};

// A matrix: each kind of communication, and the phases of compute under which it lies; the largest have a column.
const MOST_COLUMNS = 10;

function hidingColumns() {
  const totals = new Map();
  for (const [, , , under] of shown.gpu.hiding)
    for (const [phase, us] of under) totals.set(phase, (totals.get(phase) || 0) + us);
  const largest = new Set([...totals.keys()].sort((a, b) => totals.get(b) - totals.get(a)).slice(0, MOST_COLUMNS));
  const sum = (row, chosen) => row[3].reduce((total, [phase, us]) => total + (chosen(phase) ? us : 0), 0);
  const shaded = (kind, value, whole) => {
    const cell = element("span", { class: `shade ${kind}` }, value ? microseconds(value) : "");
    cell.style.setProperty("--part", value / whole);
    return [cell];
  };
  const column = (heading, chosen) => [
    heading,
    (row) => sum(row, chosen),
    (row) => shaded("compute", sum(row, chosen), row[1]),
  ];
  return [
    ["communication", (row) => row[0], (row) => nameCell(row[0])],
    ["total µs", (row) => row[1], (row) => us(row[1])],
    ["exposed", (row) => row[2], (row) => shaded("exposed", row[2], row[1])],
    ...[...totals.keys()]
      .filter((phase) => largest.has(phase))
      .map((phase) =>
        column(
          `under ${phase || (shown.gpu.phases.length ? "compute of no phase" : "compute")}`,
          (one) => one === phase,
        ),
      ),
    ...(totals.size > largest.size
      ? [column(`under ${totals.size - largest.size} others`, (one) => !largest.has(one))]
      : []),
  ];
}
const LEFT = new Set([
  "kernel",
  "action",
  "class",
  "what ran",
  "phase",
  "compute that follows",
  "its phase",
  "outcome",
  "GPU",
  "rank",
  "communication",
  "kind",
]);
