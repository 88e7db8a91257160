// The lanes on a canvas. However many slices there are, a row is drawn in at most a few rectangles for each pixel:
// those narrower than one and a half are gathered, and the longest of them gives its colour.

const canvas = find("lanes"),
  map = find("map");
const brush = canvas.getContext("2d", { alpha: false }),
  mapBrush = map.getContext("2d", { alpha: false });
const FONT = "system-ui, 'Segoe UI', Helvetica, Arial, 'Liberation Sans', sans-serif";
const colour = {};
const redraws = [];
const MAP = 18;
let waiting = 0;

function readColours() {
  const style = getComputedStyle(document.documentElement);
  for (const key of ["ground", "panel", "ink", "soft", "line", "faint", "exposed", "hidden", "accent", "found"]) {
    colour[key] = style.getPropertyValue(`--${key}`).trim();
  }
  colour.classes = page.classes.map((name) => style.getPropertyValue(`--${name}`).trim());
  colour.classInks = page.classes.map((name) => style.getPropertyValue(`--on-${name}`).trim());
}

function redrawSoon() {
  if (!waiting) waiting = requestAnimationFrame(redraw);
}

function redraw() {
  cancelAnimationFrame(waiting);
  waiting = 0;
  const began = performance.now();
  draw();
  const took = performance.now() - began;
  redraws.push(took);
  if (redraws.length > 1000) redraws.shift();
  return took;
}

function fit() {
  const room = canvas.parentElement.clientWidth;
  if (!room) return; // in a frame that is hidden, or a window that closes
  const tall = Math.min(rowsHeight + SIZES.axis, Math.max(260, Math.round(innerHeight * 0.72)));
  Object.assign(size, { width: room, height: tall, gutter: room < 620 ? 84 : 150 });
  scroll(0);
  for (const [one, height] of [
    [canvas, tall],
    [map, MAP],
  ]) {
    const [across, down] = [room, height].map((pixels) => Math.round(pixels * devicePixelRatio));
    if (one.width === across && one.height === down) continue; // to set them wipes the canvas
    one.width = across;
    one.height = down;
    one.style.height = `${height}px`;
  }
  redraw(); // at once, or a wiped canvas would be seen
}

function draw() {
  brush.setTransform(devicePixelRatio, 0, 0, devicePixelRatio, 0, 0);
  brush.fillStyle = colour.ground;
  brush.fillRect(0, 0, size.width, size.height);
  brush.textBaseline = "middle";
  brush.save();
  brush.beginPath();
  brush.rect(0, SIZES.axis, size.width, size.height - SIZES.axis);
  brush.clip();
  drawTicks(true);
  for (const row of rows) {
    const y = SIZES.axis + row.y - view.top;
    if (y > size.height || y + row.height < SIZES.axis) continue;
    if (row.kind === "head") drawHead(row, y);
    if (row.lane) drawLane(row, y);
  }
  drawChosen();
  brush.restore();
  drawTicks(false);
  drawScrollbar();
  drawMap();
}

// --- time ------------------------------------------------------------------------------------------------------------

function tickStep() {
  const rough = (view.to - view.from) / Math.max(2, (size.width - size.gutter) / 110);
  const power = 10 ** Math.floor(Math.log10(rough));
  return [1, 2, 5, 10].map((n) => n * power).find((step) => step >= rough);
}

function drawTicks(lines) {
  const step = tickStep();
  const [unitSize, unit] = UNITS.find(([size]) => Math.max(step, view.to / 2000) >= size) || UNITS[3];
  const digits = Math.max(0, Math.ceil(-Math.log10(step / unitSize) - 1e-9));
  brush.font = `11px ${FONT}`;
  brush.textAlign = "left";
  for (let n = Math.ceil(view.from / step); n * step <= view.to; n++) {
    const x = Math.round(xOf(n * step)) + 0.5;
    brush.fillStyle = lines ? colour.faint : colour.line;
    brush.fillRect(x, lines ? SIZES.axis : SIZES.axis - 6, 1, lines ? size.height : 6);
    if (lines) continue;
    brush.fillStyle = colour.soft;
    const label = ((n * step) / unitSize).toLocaleString("en-US", {
      minimumFractionDigits: digits,
      maximumFractionDigits: digits,
    });
    if (x + 70 < size.width || n === 0) brush.fillText(`${label} ${unit}`, x + 4, 11);
  }
}

// --- rows ------------------------------------------------------------------------------------------------------------

function drawHead({ gpu, lane }, y) {
  const mark = lane ? "" : isOpen(gpu) ? "▾ " : "▸ ",
    indent = lane ? 0 : 13;
  brush.fillStyle = colour.ink;
  brush.textAlign = "left";
  brush.font = `600 12px ${FONT}`;
  brush.fillText(fitted(mark + gpu.title, size.gutter - 8), 0, y + 9);
  brush.font = `11px ${FONT}`;
  brush.fillStyle = gpu.exposed_us ? colour.exposed : colour.soft;
  const [part, what] = gpu.communication_us ? [gpu.exposed_us, "exposed"] : [gpu.idle_us, "idle"];
  const room = size.gutter - 20,
    told = share(part, gpu.window_us);
  if (told) brush.fillText(widthOf(`${told} ${what}`) > room ? told : `${told} ${what}`, indent, y + 22);
  brush.fillStyle = colour.panel;
  const from = Math.max(size.gutter, xOf(gpu.start_ns)),
    to = Math.min(size.width, xOf(gpu.start_ns + gpu.window_us * 1000));
  if (to > from) brush.fillRect(from, y + 3, to - from, 24);
  if (!lane) bands(gpu, y + 3, 12, onLanes());
}

// Compute above; below it communication, in red where nothing hides it.
function bands(gpu, y, height, on) {
  strokes(gpu.compute, y, height, { ...on, fills: [colour.classes[0]] });
  strokes(gpu.hidden, y + height, height, { ...on, fills: [colour.hidden] });
  strokes(gpu.exposed, y + height, height, { ...on, fills: [colour.exposed], rising: true, least: 0.17 });
}

const onLanes = () => ({ brush, from: view.from, to: view.to, perNs: scale() });

function drawLane(row, y) {
  const { lane } = row,
    inset = { phase: 1, stream: 2, head: 3 }[row.kind];
  brush.textAlign = "left";
  brush.font = `11px ${FONT}`;
  brush.fillStyle = colour.soft;
  if (row.kind !== "head") brush.fillText(fitted(lane.label, size.gutter - 20), 13, y + row.height / 2);
  if (row.kind === "stream") {
    brush.fillStyle = colour.faint;
    brush.fillRect(size.gutter, y + row.height - 0.5, size.width - size.gutter, 1);
    brush.globalAlpha = 0.13;
    strokes(lane.gpu.exposed, y, row.height, { ...onLanes(), fills: [colour.exposed], least: 0 });
    brush.globalAlpha = 1;
  }
  const byPhase = row.kind === "phase" || shown.byPhase;
  const fills = byPhase ? page.hues.map((pair) => pair[0]) : colour.classes;
  const pairs = byPhase ? page.hues : null,
    texts = byPhase ? page.inks : colour.classInks;
  const keyOf = byPhase ? (i) => lane.phase[i] : (i) => runs.class[lane.run[i]];
  const found = search.matches(lane);
  strokes(lane, y + inset, row.height - 2 * inset, { ...onLanes(), keyOf, fills, texts, pairs, found });
}

const MATCH = 1e6,
  DIM = 0.15;
const only = () => 0;

// Rectangles for the intervals of a lane that are in view; ``keyOf`` tells which of ``fills`` one has. Those narrower
// than a pixel are paler, or with ``rising`` lower, the less of it they fill, so that the picture does not overstate
// them, but never less than ``least``. Those with ``texts`` carry their names.
function strokes(
  lane,
  y,
  height,
  { brush, from, to, perNs, fills, keyOf = only, texts, pairs, found, rising, least = 0.4 },
) {
  const left = size.gutter,
    right = size.width - left,
    alpha = brush.globalAlpha;
  let pixel = -1,
    key = -1,
    longest = -1,
    filled = 0; // the pixel being gathered
  let runStart = 0,
    runEnd = -1,
    runKey = -1,
    runStrength = 0; // equal pixels side by side, not yet drawn
  const finishRun = () => {
    if (runKey < 0) return;
    const tall = rising ? height * runStrength : height;
    brush.globalAlpha = rising ? alpha : alpha * runStrength;
    brush.fillStyle = fills[runKey];
    brush.fillRect(left + runStart, y + height - tall, runEnd - runStart, tall);
    runKey = -1;
  };
  const finishPixel = () => {
    if (pixel < 0) return;
    let strength = Math.max(least, Math.min(1, Math.ceil(filled * 8 - 0.1) / 8)); // in steps, so that equal pixels join
    if (found) strength = longest >= MATCH ? 1 : DIM * strength;
    if (runKey === key && runEnd === pixel && runStrength === strength) runEnd = pixel + 1;
    else {
      finishRun();
      [runStart, runEnd, runKey, runStrength] = [pixel, pixel + 1, key, strength];
    }
    pixel = -1;
  };
  for (let i = firstAfter(lane, from - 1 / perNs); i < lane.size && lane.start[i] <= to; i++) {
    const x = (lane.start[i] - from) * perNs,
      width = (lane.end[i] - lane.start[i]) * perNs;
    const hit = found ? found[i] : 0;
    if (width < 1.5) {
      const at = Math.max(0, Math.floor(x));
      if (at !== pixel) {
        finishPixel();
        [pixel, key, longest, filled] = [at, -1, -1, 0];
      }
      const weight = hit ? width + MATCH : width; // a match shows, however short it is
      filled += width;
      if (weight > longest) [key, longest] = [keyOf(i), weight];
      continue;
    }
    finishPixel();
    finishRun();
    const begin = Math.max(0, x),
      wide = Math.min(right, x + width) - begin;
    const inner = wide > 4 && texts ? wide - 1 : wide;
    const k = keyOf(i);
    brush.globalAlpha = alpha * (found && !hit ? DIM : 1);
    brush.fillStyle = fills[k];
    brush.fillRect(left + begin, y, inner, height);
    if (texts) decorate(lane, i, k, left + begin, y, inner, height, { texts, pairs }, hit);
  }
  finishPixel();
  finishRun();
  brush.globalAlpha = alpha;
}

function drawChosen() {
  const { lane, slice } = shown;
  const row = lane && rowOf(lane);
  if (!row) return;
  const y = SIZES.axis + row.y - view.top;
  const [top, height] = row.lane ? [1, row.height - 2] : [lane.kind === "compute" ? 3 : 15, 12];
  const from = Math.max(size.gutter - 2, xOf(lane.start[slice])),
    to = Math.min(size.width + 2, xOf(lane.end[slice]));
  if (to < from) return;
  brush.strokeStyle = colour.ink;
  brush.lineWidth = 2;
  brush.strokeRect(from - 1, y + top, Math.max(3, to - from + 1), height);
}

function drawScrollbar() {
  const room = size.height - SIZES.axis;
  if (rowsHeight <= room) return;
  brush.fillStyle = colour.line;
  brush.fillRect(size.width - 5, SIZES.axis + (view.top / rowsHeight) * room, 4, (room / rowsHeight) * room);
}
