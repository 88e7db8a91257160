// What a hand does: pointer, wheel, keys, buttons; and the start.

const tip = find("tip");
const searchBox = find("search");
let held = null; // where the pointer went down, and what it has moved

// --- what is under the pointer ---------------------------------------------------------------------------------------

function rowAt(y) {
  const at = y - SIZES.axis + view.top;
  return y < SIZES.axis ? undefined : rows.find((row) => at >= row.y && at < row.y + row.height);
}

// The longest of the intervals that a pixel shows, for they may be many.
function sliceAt(lane, x) {
  const from = timeAt(x - 2),
    to = timeAt(x + 2);
  let best = -1,
    longest = -1;
  for (let i = firstAfter(lane, from); i < lane.size && lane.start[i] <= to; i++) {
    const length = lane.end[i] - lane.start[i];
    const inside = timeAt(x) >= lane.start[i] && timeAt(x) <= lane.end[i] && length * scale() > 2;
    if (inside) return i;
    if (length > longest) [best, longest] = [i, length];
  }
  return best;
}

function hitAt(x, y) {
  const row = rowAt(y);
  if (!row || x < size.gutter) return null;
  const low = row.kind === "head" && y - SIZES.axis + view.top - row.y >= 15;
  const lanes = row.lane ? [row.lane] : low ? [row.gpu.exposed, row.gpu.hidden] : [row.gpu.compute];
  for (const lane of lanes) {
    const i = sliceAt(lane, x);
    if (i >= 0) return [lane, i];
  }
  return null;
}

function hover(event) {
  const hit = hitAt(event.offsetX, event.offsetY),
    row = event.offsetX < size.gutter && rowAt(event.offsetY);
  canvas.style.cursor = hit || row ? "pointer" : "grab";
  tip.hidden = !hit && !row;
  if (tip.hidden) return;
  tip.replaceChildren(...(hit ? described(...hit) : [element("p", { class: "name" }, row.gpu.title)]));
  const { width, height } = tip.getBoundingClientRect();
  const x = event.clientX + 16 + width > innerWidth ? event.clientX - width - 12 : event.clientX + 16;
  const y = event.clientY + 16 + height > innerHeight ? event.clientY - height - 12 : event.clientY + 16;
  tip.style.left = `${Math.max(4, x)}px`;
  tip.style.top = `${Math.max(4, y)}px`;
}

function click(x, y) {
  const row = rowAt(y);
  if (row && x < size.gutter) {
    chooseGpu(row.gpu);
    if (row.kind === "head" && !row.lane) fold(row.gpu);
    return;
  }
  const hit = hitAt(x, y);
  if (hit) choose(...hit);
  else choose(null, -1);
}

canvas.addEventListener("pointerdown", (event) => {
  if (event.button) return;
  canvas.setPointerCapture(event.pointerId);
  cancelAnimationFrame(travel);
  held = { x: event.offsetX, y: event.offsetY, moved: 0 };
  tip.hidden = true;
});
canvas.addEventListener("pointermove", (event) => {
  if (!held) return hover(event);
  const x = event.offsetX - held.x,
    y = event.offsetY - held.y;
  held.moved += Math.abs(x) + Math.abs(y);
  if (held.moved < 4) return;
  canvas.style.cursor = "grabbing";
  look(view.from - x / scale(), view.to - x / scale());
  scroll(-y);
  Object.assign(held, { x: event.offsetX, y: event.offsetY });
});
canvas.addEventListener("pointerup", (event) => {
  if (held && held.moved < 4) click(event.offsetX, event.offsetY);
  held = null;
});
canvas.addEventListener("pointercancel", () => (held = null));
canvas.addEventListener("pointerleave", () => (tip.hidden = true));
canvas.addEventListener("dblclick", (event) => {
  const hit = hitAt(event.offsetX, event.offsetY);
  if (hit) zoomTo(...hit);
});
canvas.addEventListener(
  "wheel",
  (event) => {
    const unit = event.deltaMode === 1 ? 20 : 1;
    const sideways = event.shiftKey
      ? event.deltaX || event.deltaY
      : Math.abs(event.deltaX) > Math.abs(event.deltaY)
        ? event.deltaX
        : 0;
    cancelAnimationFrame(travel);
    const changed = sideways
      ? move((sideways * unit) / (size.width - size.gutter))
      : zoom(
          Math.exp(Math.max(-120, Math.min(120, event.deltaY * unit)) * 0.0035),
          timeAt(Math.max(size.gutter, event.offsetX)),
        );
    if (changed) event.preventDefault(); // where nothing is left to zoom, the page scrolls
  },
  { passive: false },
);

function toMap(event) {
  const at = ((event.offsetX - size.gutter) / (size.width - size.gutter)) * wholeEnd,
    half = (view.to - view.from) / 2;
  look(at - half, at + half);
}
map.addEventListener("pointerdown", (event) => {
  map.setPointerCapture(event.pointerId);
  toMap(event);
});
map.addEventListener("pointermove", (event) => {
  if (event.buttons) toMap(event);
});

// --- keys and buttons ------------------------------------------------------------------------------------------------

function zoomTo(lane, i) {
  const start = lane.start[i],
    length = Math.max(SHORTEST, lane.end[i] - start);
  go(start - length / 2, start + 1.5 * length);
}

function besides(direction) {
  const { lane, slice } = shown;
  if (!lane) {
    const row = rows.find((row) => row.lane && row.lane.kind === "stream");
    if (row) choose(row.lane, Math.min(row.lane.size - 1, firstAfter(row.lane, view.from)), true);
  } else if (slice + direction >= 0 && slice + direction < lane.size) choose(lane, slice + direction, true);
}

// The same time in the lane below or above.
function across(direction) {
  const lanes = rows.filter((row) => row.lane && row.lane.size).map((row) => row.lane);
  const lane = lanes[lanes.indexOf(shown.lane) + direction];
  const at = shown.lane ? shown.lane.start[shown.slice] : view.from;
  if (lane) choose(lane, Math.min(lane.size - 1, firstAfter(lane, at)), true);
}

function colourBy(phase) {
  shown.byPhase = phase;
  find("by-class").setAttribute("aria-pressed", !phase);
  find("by-phase").setAttribute("aria-pressed", phase);
  showLegend();
  redrawSoon();
}

const root = document.documentElement,
  darkness = matchMedia("(prefers-color-scheme: dark)");
let toldDark; // undefined: as the viewer prefers
const isDark = () => toldDark ?? darkness.matches;

function setTheme(dark) {
  toldDark = dark ?? toldDark;
  find("theme-button").textContent = isDark() ? "Light" : "Dark";
  wear(isDark());
}

function wear(dark) {
  root.dataset.theme = dark ? "dark" : "light";
  readColours();
  redrawSoon();
}

function forget() {
  searchBox.value = "";
  searchFor("");
  choose(null, -1);
}

const KEYS = {
  "+": () => zoom(1 / 1.5),
  "=": () => zoom(1 / 1.5),
  "-": () => zoom(1.5),
  _: () => zoom(1.5),
  0: () => go(0, wholeEnd),
  Home: () => go(0, wholeEnd),
  ArrowLeft: () => move(-0.15),
  ArrowRight: () => move(0.15),
  ArrowUp: () => scroll(-60),
  ArrowDown: () => scroll(60),
  "/": () => searchBox.select(),
  n: () => nextMatch(1),
  N: () => nextMatch(-1),
  e: () => nextExposed(1),
  E: () => nextExposed(-1),
  ".": () => besides(1),
  ",": () => besides(-1),
  j: () => across(1),
  k: () => across(-1),
  f: () => shown.lane && zoomTo(shown.lane, shown.slice),
  Enter: () => shown.lane && zoomTo(shown.lane, shown.slice),
  c: () => colourBy(!shown.byPhase),
  g: () => fold(),
  G: () => fold(shown.gpu),
  t: () => setTheme(!isDark()),
  "?": () => find("help").showModal(),
  Escape: forget,
};
const OF_THE_LANES = new Set(["ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown", "Home", "Enter"]);

addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || find("help").open) return;
  const from = event.target;
  if (from === searchBox) {
    if (event.key === "Enter") nextMatch(event.shiftKey ? -1 : 1);
    if (event.key === "Escape") {
      forget();
      canvas.focus();
    }
    return;
  }
  // Elsewhere these keys have their own meaning: in a list, on a button, in a table that scrolls.
  if (OF_THE_LANES.has(event.key) && from !== canvas && from !== document.body) return;
  if (!Object.hasOwn(KEYS, event.key) || from instanceof HTMLSelectElement) return;
  const scrolls = event.key === "ArrowUp" || event.key === "ArrowDown";
  const done = KEYS[event.key]();
  if (!scrolls || done) event.preventDefault(); // where the lanes scroll no further, the page does
});

find("tabs").addEventListener("keydown", (event) => {
  const tabs = [...find("tabs").children],
    at = tabs.indexOf(event.target);
  const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: tabs.length - 1 }[event.key];
  if (to === undefined || at < 0) return;
  event.preventDefault();
  event.stopPropagation();
  showTab(tabs[(to + tabs.length) % tabs.length].id.slice("tab-".length));
});

const BUTTONS = {
  "help-button": "?",
  "theme-button": "t",
  "zoom-in": "+",
  "zoom-out": "-",
  "zoom-all": "0",
  fold: "g",
  "exposed-next": "e",
  "exposed-before": "E",
  "find-next": "n",
  "find-before": "N",
};
for (const [id, pressed] of Object.entries(BUTTONS)) find(id).addEventListener("click", KEYS[pressed]);
find("by-class").addEventListener("click", () => colourBy(false));
find("by-phase").addEventListener("click", () => colourBy(true));
searchBox.addEventListener("input", () => searchFor(searchBox.value));
find("gpu").addEventListener("change", (event) => chooseGpu(page.gpus[event.target.value]));
darkness.addEventListener("change", () => setTheme());
addEventListener("beforeprint", () => {
  wear(false); // paper is white
  redraw(); // and no frame comes before it is printed
});
addEventListener("afterprint", () => wear(isDark()));
new ResizeObserver(fit).observe(find("plot"));
addEventListener("resize", fit);

// --- the start -------------------------------------------------------------------------------------------------------

find("gpu").append(...page.gpus.slice(0, 1024).map((gpu, place) => element("option", { value: place }, gpu.title)));
const slices = searched().reduce((total, lane) => total + lane.size, 0);
const several = (number, what) => `${grouped(number, 0)} ${what}${number === 1 ? "" : "s"}`;
canvas.setAttribute(
  "aria-label",
  `Timeline of ${several(page.gpus.length, page.is_timeline ? "rank" : "GPU")} and ${several(slices, "slice")}`,
);
find("exposed-next").parentElement.hidden = !page.gpus.some((gpu) => gpu.exposed.size);
find("by-phase").disabled = page.phases.length < 2;
if (page.is_timeline) searchBox.placeholder = "Search actions  /";
setTheme();
layRows();
find("fold").hidden = rows.every((row) => row.lane);
if (rowsHeight > 1500) fold(); // with many GPUs the heads tell more
fit();
chooseGpu(shown.gpu);
colourBy(shown.byPhase);
searchFor("");
redraw();

// For tests and the curious: how long each redraw took, in milliseconds, and where things are.
window.counterflow = {
  redraws,
  redraw,
  view: () => ({ ...view, whole: wholeEnd }),
  chosen: () =>
    shown.lane ? { name: nameOf(shown.lane, shown.slice), kind: shown.lane.kind, slice: shown.slice } : null,
  whereIs(label, slice) {
    const box = canvas.getBoundingClientRect(),
      row = rows.find((row) => row.lane && row.lane.label === label);
    const x = (xOf(row.lane.start[slice]) + xOf(row.lane.end[slice])) / 2;
    return { x: box.left + x, y: box.top + SIZES.axis + row.y - view.top + row.height / 2 };
  },
};
