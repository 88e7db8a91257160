"use strict";

// What the page was given. Names in it are untrusted: they reach the page as textContent, as attributes' values or as
// text on a canvas, and never as markup.

const page = JSON.parse(document.getElementById("data").textContent);
const NUMBERS = { u8: Uint8Array, u16: Uint16Array, u32: Uint32Array, f64: Float64Array };

function unpacked(column) {
  const text = atob(column.base64);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = text.charCodeAt(i);
  return new NUMBERS[column.type](bytes.buffer);
}

function unpackedLane(packed, gpu) {
  const after = unpacked(packed.after),
    length = unpacked(packed.length);
  const start = new Float64Array(after.length),
    end = new Float64Array(after.length);
  let at = 0;
  for (let i = 0; i < after.length; i++) {
    at += after[i];
    start[i] = at;
    end[i] = at + length[i];
  }
  return {
    gpu,
    kind: packed.kind,
    label: packed.label,
    whole: packed.whole,
    start,
    end,
    size: start.length,
    run: packed.run && unpacked(packed.run),
    phase: packed.phase && unpacked(packed.phase),
  };
}

const runs = {};
for (const key of Object.keys(page.runs)) runs[key] = unpacked(page.runs[key]);
for (const gpu of page.gpus) {
  gpu.lanes = gpu.lanes.map((lane) => unpackedLane(lane, gpu));
  for (const kind of ["compute", "hidden", "exposed"]) gpu[kind] = gpu.lanes.find((lane) => lane.kind === kind);
}
const wholeEnd = Math.max(1, ...page.gpus.map((gpu) => gpu.start_ns + gpu.window_us * 1000));

// The first interval of a lane that ends after a time: intervals of a lane do not overlap.
function firstAfter(lane, time) {
  let low = 0,
    high = lane.size;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (lane.end[middle] <= time) low = middle + 1;
    else high = middle;
  }
  return low;
}

function covered(lane, from, to) {
  let total = 0;
  for (let i = firstAfter(lane, from); i < lane.size && lane.start[i] < to; i++) {
    total += Math.min(lane.end[i], to) - Math.max(lane.start[i], from);
  }
  return total;
}

const nameOf = (lane, i) =>
  lane.run
    ? page.names[runs.name[lane.run[i]]]
    : lane.phase
      ? page.phases[lane.phase[i]]
      : { compute: "compute", hidden: "communication under compute", exposed: "exposed communication" }[lane.kind];
const labelOf = (lane, i) => (lane.run ? page.functions[runs.name[lane.run[i]]] : nameOf(lane, i));

// --- numbers as people read them ---------------------------------------------------------------------------------

const grouped = (value, digits) => value.toLocaleString("en-US", { maximumFractionDigits: digits });
const UNITS = [
  [1e9, "s"],
  [1e6, "ms"],
  [1e3, "µs"],
  [1, "ns"],
];

// To four digits, in the unit that suits.
function time(ns) {
  if (ns === 0) return "0";
  const [size, unit] = UNITS.find(([size]) => ns >= size) || UNITS[3];
  const value = ns / size;
  return `${grouped(value, value >= 1000 ? 0 : value >= 100 ? 1 : value >= 10 ? 2 : 3)} ${unit}`;
}

const microseconds = (us) => grouped(us, 3);
const share = (part, whole) => (whole ? `${((100 * part) / whole).toFixed(2)} %` : "");

// --- elements ------------------------------------------------------------------------------------------------------

const find = (id) => document.getElementById(id);

function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [key, value] of Object.entries(properties)) {
    if (key === "class") made.className = value;
    else if (key === "click") made.addEventListener("click", value);
    else made.setAttribute(key, value);
  }
  made.append(...children.map(nodeOf));
  return made;
}

function nodeOf(child) {
  return child instanceof Node ? child : document.createTextNode(child);
}
