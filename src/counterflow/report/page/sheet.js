// The tabs, and under them the chosen table: sorted, and so many rows at a time that the page stays light.

const ROWS = 25;
const sorting = {}; // of each table, the heading and the direction
const collator = new Intl.Collator("en", { numeric: true }); // 0F2 before 0F10
let table = "kernels";
let firstRow = 0;

function showTabs() {
  const there = Object.keys(TABLES).filter((id) => TABLES[id].rows().length);
  if (!there.includes(table)) table = there.includes("kernels") ? "kernels" : there[0];
  find("tabs").replaceChildren(
    ...there.map((id) => {
      const on = id === table;
      const tab = {
        type: "button",
        role: "tab",
        id: `tab-${id}`,
        "aria-selected": on,
        "aria-controls": "table",
        tabindex: on ? 0 : -1,
      };
      return element(
        "button",
        { ...tab, click: () => showTab(id) },
        TABLES[id].title,
        element("small", {}, grouped((TABLES[id].size || (() => TABLES[id].rows().length))(shown.gpu), 0)),
      );
    }),
  );
  showTable();
}

function showTab(id, focus = true) {
  table = id;
  firstRow = 0;
  showTabs();
  if (focus) find(`tab-${id}`).focus();
}

function showTable() {
  const { rows, note } = TABLES[table],
    columns = columnsOf(table),
    [column, direction] = sortedBy(columns);
  const value = columns[column][1];
  const compare = (a, b) => (typeof a === "string" ? collator.compare(a, b) : a - b);
  const all = [...rows()].sort((a, b) => direction * compare(value(a), value(b)));
  firstRow = Math.max(0, Math.min(firstRow, Math.floor((all.length - 1) / ROWS) * ROWS));
  const heads = columns.map(([heading], place) => {
    const on = place === column;
    const sorted = on ? (direction > 0 ? "ascending" : "descending") : "none";
    const arrow = element("span", { "aria-hidden": "true" }, on ? (direction > 0 ? " ↑" : " ↓") : "");
    return element(
      "th",
      { scope: "col", "aria-sort": sorted, class: LEFT.has(heading) ? "left" : "" },
      element(
        "button",
        { type: "button", click: () => sortBy(place) },
        element("span", { class: "name", title: heading }, heading),
        arrow,
      ),
    );
  });
  const body = all
    .slice(firstRow, firstRow + ROWS)
    .map((row) =>
      element(
        "tr",
        {},
        ...columns.map(([heading, , cell]) => element("td", { class: LEFT.has(heading) ? "left" : "" }, ...cell(row))),
      ),
    );
  const panel = find("table");
  panel.setAttribute("aria-labelledby", `tab-${table}`);
  panel.replaceChildren(
    element(
      "div",
      { class: "wide" },
      element("table", {}, element("thead", {}, element("tr", {}, ...heads)), element("tbody", {}, ...body)),
    ),
    pager(all.length, note ? note(shown.gpu) : ""),
  );
}

// Grids and exposed kernels are not told of every GPU: such a column without a word is left out.
function columnsOf(id) {
  const { rows } = TABLES[id],
    columns = TABLES[id].columns instanceof Function ? TABLES[id].columns() : TABLES[id].columns;
  const told = (column) => rows().some((row) => column[2](row).some((part) => part !== ""));
  return id === "kernels" ? columns.filter((column, place) => place < 5 || told(column)) : columns;
}

// The column and the direction; another GPU may not have the column that was chosen.
function sortedBy(columns) {
  const [chosen, direction] = sorting[table] || [];
  const column = columns.findIndex(([heading]) => heading === chosen);
  return column < 0 ? [TABLES[table].first, -1] : [column, direction];
}

function sortBy(column) {
  const columns = columnsOf(table),
    [heading] = columns[column],
    [known, direction] = sortedBy(columns);
  sorting[table] = [heading, known === column ? -direction : LEFT.has(heading) ? 1 : -1];
  firstRow = 0;
  showTable();
  find("table").querySelectorAll("th button")[column].focus();
}

function pager(total, note) {
  const last = Math.min(total, firstRow + ROWS);
  const turn = (rows, label, text) => {
    const button = element(
      "button",
      { type: "button", "aria-label": label, click: () => ((firstRow += rows), showTable()) },
      text,
    );
    button.disabled = rows < 0 ? firstRow === 0 : last >= total;
    return button;
  };
  const said = [total > ROWS ? `rows ${firstRow + 1} to ${last} of ${grouped(total, 0)}` : "", note]
    .filter(Boolean)
    .join(", ");
  return element(
    "p",
    { class: "pager" },
    said,
    ...(total > ROWS ? [turn(-ROWS, "Rows before", "‹"), turn(ROWS, "Rows after", "›")] : []),
  );
}

// --- from a table to the timeline ------------------------------------------------------------------------------------

function seek(text) {
  find("search").value = text;
  searchFor(text);
  canvas.scrollIntoView({ block: "nearest", behavior: stillness.matches ? "auto" : "smooth" });
  nextMatch(1);
}

function showPiece(piece) {
  const lane = shown.gpu.exposed,
    start = shown.gpu.start_ns + piece[0] * 1000;
  const place = firstAfter(lane, start + 0.5);
  canvas.scrollIntoView({ block: "nearest", behavior: stillness.matches ? "auto" : "smooth" });
  if (place < lane.size && Math.abs(lane.start[place] - start) < 1) choose(lane, place);
  const length = piece[1] * 1000;
  go(start - 2 * length, start + 3 * length);
}
