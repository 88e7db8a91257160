// Search: kernels by their names, phases by theirs. A match is a slice; each is found again from where one stands, so
// that nothing has to be kept of a million of them.

const search = {
  query: "",
  flags: new Map(), // of each lane, one byte for each slice: whether it matches
  count: 0,
  matches: (lane) => search.flags.get(lane) || null,
};

const lowered = page.names.map((name, i) => `${name}\n${page.functions[i]}`.toLowerCase());
const loweredPhases = page.phases.map((name) => name.toLowerCase());

function searchFor(query) {
  search.query = query;
  search.flags.clear();
  search.count = 0;
  if (query) flagMatches(query.toLowerCase());
  tellFound();
  redrawSoon();
}

function flagMatches(query) {
  const names = lowered.map((name) => name.includes(query));
  const byRun = Uint8Array.from(runs.name, (name) => (names[name] ? 1 : 0));
  const byPhase = loweredPhases.map((name) => name.includes(query));
  for (const lane of searched()) {
    const flags = new Uint8Array(lane.size);
    for (let i = 0; i < lane.size; i++) {
      flags[i] = lane.run ? byRun[lane.run[i]] : byPhase[lane.phase[i]] ? 1 : 0;
      search.count += flags[i];
    }
    search.flags.set(lane, flags);
  }
}

const searched = () => page.gpus.flatMap((gpu) => gpu.lanes.filter((lane) => SIZES[lane.kind]));

// The nearest match in the order of time, forward (1) or back (-1), from the chosen slice; round at the ends.
function nextMatch(direction) {
  if (!search.count) return;
  const lanes = searched(),
    chosen = search.flags.has(shown.lane);
  const here = chosen ? [shown.lane.start[shown.slice], lanes.indexOf(shown.lane), shown.slice] : [view.from, -1, 0];
  let best = null,
    round = null;
  lanes.forEach((lane, place) => {
    const flags = search.flags.get(lane);
    for (let i = 0; i < lane.size; i++) {
      if (!flags[i]) continue;
      const key = [lane.start[i], place, i];
      if (direction * order(key, here) > 0 && (!best || direction * order(key, best) < 0)) best = key;
      if (!round || direction * order(key, round) < 0) round = key;
    }
  });
  const [, place, i] = best || round;
  choose(lanes[place], i, true);
  tellFound([lanes[place].start[i], place, i]);
}

const order = (one, other) => one[0] - other[0] || one[1] - other[1] || one[2] - other[2];

function tellFound(at = null) {
  const text = find("found");
  for (const id of ["find-before", "find-next"]) find(id).disabled = !search.count;
  if (!search.query) return void (text.textContent = "");
  if (!at) return void (text.textContent = search.count ? `${grouped(search.count, 0)} found` : "none found");
  let place = 0;
  searched().forEach((lane, number) => {
    const flags = search.flags.get(lane);
    for (let i = 0; i < lane.size; i++) if (flags[i] && order([lane.start[i], number, i], at) <= 0) place++;
  });
  text.textContent = `${grouped(place, 0)} of ${grouped(search.count, 0)}`;
}

// The exposed stretches of the chosen GPU, one after another.
function nextExposed(direction) {
  const lane = shown.gpu.exposed;
  if (!lane.size) return;
  const inside = shown.lane === lane,
    middle = (view.from + view.to) / 2;
  const from = shown.lane && shown.lane.gpu === shown.gpu ? shown.lane.start[shown.slice] : view.from > 0 ? middle : -1;
  let place = inside ? shown.slice + direction : firstAfter(lane, from);
  if (!inside && direction < 0) place -= 1;
  choose(lane, (place + lane.size) % lane.size, true);
}
