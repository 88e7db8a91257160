// One slice in words, beside the pointer and below the lanes.

const isTalk = (kind) => page.communication.includes(kind);

function factsOf(lane, i) {
  const start = lane.start[i],
    length = lane.end[i] - start,
    facts = [];
  const kind = lane.run ? runs.class[lane.run[i]] : -1;
  if (kind >= 0) facts.push(["class", page.classes[kind]]);
  if (lane.phase && lane.run && lane.phase[i])
    facts.push([page.is_timeline ? "kind" : "phase", page.phases[lane.phase[i]]]);
  facts.push(
    ["start", `${microseconds((start - lane.gpu.start_ns) / 1000)} µs`],
    ["duration", `${microseconds(length / 1000)} µs`],
  );
  if (isTalk(kind) && lane.gpu.exposed.whole) {
    const bare = covered(lane.gpu.exposed, start, lane.end[i]);
    facts.push(["exposed", bare ? `${microseconds(bare / 1000)} µs, ${share(bare, length)}` : "none of it"]);
  }
  if (lane.run && runs.blocks[lane.run[i]])
    facts.push(["grid × block", `${grouped(runs.blocks[lane.run[i]], 0)} × ${grouped(runs.threads[lane.run[i]], 0)}`]);
  const piece =
    lane.kind === "exposed" && lane.gpu.pieces.find((one) => Math.abs(lane.gpu.start_ns + one[0] * 1000 - start) < 0.5);
  if (piece) {
    facts.push(["what ran", piece[2].map(named).join(", ")]);
    if (piece[3].length) facts.push(["phase", piece[3].join(", ")]);
    facts.push(["compute that follows", named(piece[4]) || "none"], ["outcome", piece[6]]);
  }
  const where = [page.gpus.length > 1 ? lane.gpu.title : "", lane.run ? streamOf(lane) : ""].filter(Boolean).join(", ");
  if (where) facts.push(["on", where]);
  return facts;
}

// Rows of a lane that overlap carry no label of their own.
function streamOf(lane) {
  const { lanes } = lane.gpu;
  let place = lanes.indexOf(lane);
  while (place > 0 && !lanes[place].label) place--;
  return lanes[place].label;
}

function described(lane, i) {
  const facts = factsOf(lane, i).map(([what, value]) =>
    element("div", {}, element("dt", {}, what), element("dd", { class: "name" }, value)),
  );
  return [element("p", { class: "name" }, nameOf(lane, i).slice(0, 2000) || "(no name)"), element("dl", {}, ...facts)];
}

function showChosen() {
  find("chosen").replaceChildren(...(shown.lane ? described(shown.lane, shown.slice) : []));
}
