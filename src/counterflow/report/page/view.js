// What is looked at: a stretch of time, rows of lanes one below the other, one chosen slice, one GPU.

const view = { from: 0, to: wholeEnd, top: 0 };
const shown = { gpu: page.gpus[0], lane: null, slice: -1, byPhase: page.is_timeline, folded: false, open: new Set() };
const SHORTEST = 20; // ns; below it there is nothing to see
const SIZES = { axis: 26, head: 30, phase: 17, stream: 24, between: 10 };
const size = { width: 0, height: 0, gutter: 0 };
let rows = [];
let rowsHeight = 0;

// Rows of all GPUs, from the top: the head of each, with its unions, and the lanes below it unless they are folded.
function layRows() {
  rows = [];
  let y = 0;
  const add = (row, height) => {
    rows.push({ ...row, y, height });
    y += height;
  };
  for (const gpu of page.gpus) {
    const lanes = gpu.lanes.filter((lane) => SIZES[lane.kind]);
    const lone = lanes.length === 1 && !gpu.communication_us ? lanes[0] : undefined; // it needs no row of its own
    add({ kind: "head", gpu, lane: lone }, SIZES.head);
    if (!lone && isOpen(gpu)) for (const lane of lanes) add({ kind: lane.kind, gpu, lane }, SIZES[lane.kind]);
    y += SIZES.between;
  }
  rowsHeight = y;
}

const rowOf = (lane) =>
  rows.find((row) => row.lane === lane || (!row.lane && row.gpu === lane.gpu && !SIZES[lane.kind]));
const isOpen = (gpu) => shown.folded === shown.open.has(gpu);

function fold(gpu) {
  if (gpu === undefined) {
    shown.folded = !shown.folded;
    shown.open.clear();
  } else if (!shown.open.delete(gpu)) shown.open.add(gpu);
  layRows();
  fit();
  find("fold").textContent = shown.folded ? "unfold lanes" : "fold lanes";
}

const scale = () => (size.width - size.gutter) / (view.to - view.from);
const xOf = (ns) => size.gutter + (ns - view.from) * scale();
const timeAt = (x) => view.from + (x - size.gutter) / scale();

function look(from, to) {
  const length = Math.min(wholeEnd, Math.max(SHORTEST, to - from));
  // A stretch that is made longer or shorter keeps its middle.
  from = Math.max(0, Math.min(wholeEnd - length, (from + to - length) / 2));
  const changed = from !== view.from || from + length !== view.to;
  view.from = from;
  view.to = from + length;
  if (changed) moved();
  return changed;
}

// What the pointer was told of is no longer under it.
function moved() {
  find("tip").hidden = true;
  redrawSoon();
}

function zoom(factor, about = (view.from + view.to) / 2) {
  const length = Math.min(wholeEnd, Math.max(SHORTEST, (view.to - view.from) * factor));
  const left = ((about - view.from) / (view.to - view.from)) * length;
  return look(about - left, about - left + length);
}

const move = (part) => look(view.from + part * (view.to - view.from), view.to + part * (view.to - view.from));

function scroll(pixels) {
  const most = Math.max(0, rowsHeight - (size.height - SIZES.axis));
  const top = Math.max(0, Math.min(most, view.top + pixels));
  const changed = top !== view.top;
  view.top = top;
  if (changed) moved();
  return changed;
}

// --- going somewhere, in a few steps so that the eye can follow ----------------------------------------------------

const stillness = matchMedia("(prefers-reduced-motion: reduce)");
let travel = 0;

function go(from, to) {
  cancelAnimationFrame(travel);
  if (stillness.matches) return void look(from, to);
  const start = { ...view },
    began = performance.now();
  const step = () => {
    const part = Math.min(1, (performance.now() - began) / 180),
      eased = 1 - (1 - part) ** 3;
    look(start.from + (from - start.from) * eased, start.to + (to - start.to) * eased);
    if (part < 1) travel = requestAnimationFrame(step);
  };
  step();
}

// Show an interval: where it is on screen and wide enough already, nothing moves.
function reveal(from, to) {
  const length = to - from,
    wide = length * scale() >= 6;
  if (wide && from >= view.from && to <= view.to) return;
  const span = wide ? Math.max(view.to - view.from, 1.2 * length) : Math.max(20 * length, 200);
  go((from + to - span) / 2, (from + to + span) / 2);
}

function choose(lane, slice, moving = false) {
  shown.lane = lane;
  shown.slice = slice;
  if (lane && lane.gpu !== shown.gpu) chooseGpu(lane.gpu);
  if (lane && moving) {
    reveal(lane.start[slice], lane.end[slice]);
    if (!rowOf(lane)) fold(lane.gpu);
    const row = rowOf(lane);
    if (row.y < view.top) scroll(row.y - view.top);
    const below = row.y + row.height - (view.top + size.height - SIZES.axis);
    if (below > 0) scroll(below);
  }
  showChosen();
  redrawSoon();
}
