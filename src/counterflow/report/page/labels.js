// Names on slices, where there is room for them.

function decorate(lane, i, key, x, y, width, height, { texts, pairs }, hit) {
  const pair = pairs && pairs[key];
  if (pair && pair.length > 1) {
    brush.fillStyle = pair[1];
    brush.fillRect(x + width / 2, y, width / 2, height);
  }
  if (hit && width > 3) {
    brush.strokeStyle = colour.found;
    brush.lineWidth = 2;
    brush.strokeRect(x + 1, y + 1, width - 2, height - 2);
  }
  if (width < 9 || height < 12) return;
  brush.font = `11px ${FONT}`;
  brush.fillStyle = texts[key];
  const numbers = page.is_timeline && microbatches(labelOf(lane, i));
  if (numbers) {
    brush.textAlign = "center";
    const part = width / numbers.length;
    numbers.forEach((number, place) => write(fitted(number, part - 1), x + (place + 0.5) * part, y, height));
  } else if (width >= 26) {
    brush.textAlign = "left";
    write(fitted(shortened(labelOf(lane, i)), width - 8), x + 4, y, height);
  }
}

const write = (text, x, y, height) => text && brush.fillText(text, x, y + height / 2 + 0.5);

// An action's micro-batches, as in the pictures of schedules: the colours tell the rest.
function microbatches(name) {
  const found = /^\(\d+F(\d+);\d+[BI](\d+)\)OVERLAP_F_B$|^\d+[FBIW](\d+)$/.exec(name);
  return found && found.slice(1).filter((number) => number !== undefined);
}

// The end of a qualified name tells most.
const lastParts = new Map();
function shortened(name) {
  let known = lastParts.get(name);
  if (known === undefined) {
    const parts = name.split("::");
    known = parts.length > 1 ? parts[parts.length - 1] || name : name;
    lastParts.set(name, known);
  }
  return known;
}

const widths = new Map();
function widthOf(text) {
  const key = brush.font + text;
  let width = widths.get(key);
  if (width === undefined) {
    if (widths.size > 20000) widths.clear();
    width = brush.measureText(text).width;
    widths.set(key, width);
  }
  return width;
}

// As much of a text as there is room for. Letters are unlike in width, so a cut is measured too.
function fitted(text, room) {
  if (text.length > 200) text = text.slice(0, 200);
  const width = widthOf(text);
  if (width <= room) return text;
  for (let letters = Math.floor((text.length * room) / width); letters > 2; letters--) {
    const cut = `${text.slice(0, letters).replace(/[\ud800-\udbff]$/, "")}…`; // no half of a pair
    if (widthOf(cut) <= room) return cut;
  }
  return "";
}
