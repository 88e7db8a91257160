// The chosen GPU in figures, and what the colours mean.

function chooseGpu(gpu) {
  shown.gpu = gpu;
  firstRow = 0;
  find("gpu").value = String(page.gpus.indexOf(gpu));
  showSummary();
  showTabs();
  redrawSoon();
}

function showSummary() {
  const gpu = shown.gpu,
    us = (value) => time(value * 1000);
  find("gpu-choice").hidden = page.gpus.length < 2;
  const talk = gpu.communication_us;
  const [part, what] = talk ? [gpu.exposed_us, "exposed communication"] : [gpu.idle_us, "idle"];
  find("summary-head").replaceChildren(
    element("em", { class: gpu.exposed_us ? "red" : "" }, share(part, gpu.window_us) || "Nothing"),
    ` of the time is ${what}`,
  );
  const sms = gpu.sms ? `${gpu.sms} SMs` : "",
    took = gpu.communication_sms ? `communication on up to ${gpu.communication_sms} of them` : "";
  find("about").textContent = [gpu.title, sms, took, `window ${us(gpu.window_us)}`, talk ? "" : "no communication"]
    .filter(Boolean)
    .join(" · ");
  const parts = [
    ["compute", "compute alone", gpu.compute_us - gpu.overlapped_us],
    ["both", "compute with communication hidden under it", gpu.overlapped_us],
    ["exposed", "exposed communication", gpu.exposed_us],
    ["memory", "other", gpu.other_us],
    ["idle", "idle", gpu.idle_us],
  ].filter(([, , value]) => value > 0);
  const bar = find("bar");
  bar.setAttribute("aria-label", parts.map(([, name, value]) => `${name} ${share(value, gpu.window_us)}`).join(", "));
  bar.replaceChildren(
    ...parts.map(([kind, name, value]) => {
      const part = element("span", {
        class: `part ${kind}`,
        title: `${name}: ${us(value)}, ${share(value, gpu.window_us)}`,
      });
      part.style.flexGrow = value / gpu.window_us;
      return part;
    }),
  );
  const told = gpu.blocking_us + gpu.not_blocking_us; // the rest of the exposed time the trace does not tell of
  const ofTalk = (value) => `${share(value, talk)} of communication`;
  const ofWindow = (value) => gpu.window_us && `${share(value, gpu.window_us)} of the window`;
  const gaps = `${grouped(gpu.idle_gaps, 0)} gap${gpu.idle_gaps === 1 ? "" : "s"}`;
  const tiles = [
    ["compute", "compute", gpu.compute_us, ofWindow(gpu.compute_us)],
    talk && ["transfer", "communication", talk, ofWindow(talk)],
    talk && ["both", "hidden under compute", gpu.overlapped_us, ofTalk(gpu.overlapped_us)],
    talk && [
      "exposed",
      "exposed",
      gpu.exposed_us,
      ofTalk(gpu.exposed_us),
      told && `${us(gpu.blocking_us)} blocked compute`,
    ],
    gpu.waiting_us && ["waiting", "waiting for peers", gpu.waiting_us, ofTalk(gpu.waiting_us)],
    gpu.other_us && ["memory", "other", gpu.other_us, "copies, fills, unknown"],
    ["idle", "idle", gpu.idle_us, [share(gpu.idle_us, gpu.window_us), gaps].filter(Boolean).join(", ")],
  ].filter(Boolean);
  find("tiles").replaceChildren(
    ...tiles.map(([kind, name, value, ...notes]) =>
      element(
        "div",
        { class: `tile ${kind}` },
        element("dt", {}, element("i", { class: `key ${kind}` }), name),
        element(
          "dd",
          { title: `${microseconds(value)} µs`, class: kind === "exposed" && value ? "red" : "" },
          us(value),
          ...notes.filter(Boolean).map((note) => element("small", {}, note)),
        ),
      ),
    ),
  );
}

const key = (kind) => element("i", { class: `key ${page.classes[kind]}` });

function showLegend() {
  const chips = [];
  if (shown.byPhase) {
    const present = [
      ...new Set(page.gpus.flatMap((gpu) => gpu.lanes.filter((l) => l.phase).flatMap((l) => [...new Set(l.phase)]))),
    ];
    for (const place of present.sort((a, b) => a - b).slice(0, 14)) {
      const chip = element("i", { class: "key" }),
        pair = page.hues[place];
      chip.style.background = pair.length > 1 ? `linear-gradient(90deg, ${pair[0]} 50%, ${pair[1]} 50%)` : pair[0];
      chips.push(element("span", {}, chip, element("span", { class: "name" }, page.phases[place] || "no phase")));
    }
    if (present.length > 14) chips.push(`and ${present.length - 14} more`);
  } else {
    const present = [...new Set(runs.class)].sort();
    for (const kind of present) chips.push(element("span", {}, key(kind), page.classes[kind]));
  }
  if (page.gpus.some((gpu) => gpu.exposed_us))
    chips.push(element("span", {}, element("i", { class: "key exposed" }), "exposed"));
  find("legend").replaceChildren(...chips);
}
