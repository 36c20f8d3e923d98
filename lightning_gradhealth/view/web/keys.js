/* The heat map by keyboard: a cell is walked to, heard, and opened. */

const MOVES = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1], PageUp: [-10, 0], PageDown: [10, 0] };

export function onKey(app, event, column) {
  if (event.altKey || event.ctrlKey || event.metaKey) return;
  const { x, y } = app, { key } = event;
  if (key === "+" || key === "=") x.zoom(0.7, app.cursor?.step);
  else if (key === "-") x.zoom(1 / 0.7, app.cursor?.step);
  else if (key === "Escape") app.whole();
  else if (event.shiftKey && (key === "ArrowLeft" || key === "ArrowRight")) x.pan((x.b - x.a) * (key === "ArrowLeft" ? -0.2 : 0.2));
  else if (key === "Enter" || key === " ") {
    const cell = cursorCell(app, column);
    if (cell) app.pick(cell.layer, cell.step, column);
  } else if (key === "f" || key === "F") app.toggleFold(app.cursor?.row ?? 0);
  else if (key in MOVES || key === "Home" || key === "End") move(app, column, key);
  else return;
  event.preventDefault();

  function move() {
    const cell = cursorCell(app, column), columns = column.picture?.columns ?? [];
    if (!cell) return;
    const [rows, sideways] = MOVES[key] ?? [0, 0];
    const at = columns.indexOf(cell.step), inView = columns.map((step, i) => [step, i]).filter(([step]) => step >= x.a - column.gap && step <= x.b);
    const [first, last] = [inView[0]?.[1] ?? 0, inView.at(-1)?.[1] ?? columns.length - 1];
    const to = key === "Home" ? first : key === "End" ? last : Math.max(first, Math.min(last, at + sideways * Math.max(1, Math.round(inView.length / 200))));
    app.cursor = { row: Math.max(0, Math.min(app.rows.length - 1, cell.row + rows)), step: columns[to] };
    const { row, step } = app.cursor, [low, high] = [Math.min(y.a, y.b), Math.max(y.a, y.b)];
    if (row < low || row > high) y.pan(row < low ? row - low - 0.5 : row - high + 0.5);
    const next = cursorCell(app, column), box = column.heat.host.getBoundingClientRect();
    column.heat.cross(step, row);
    if (next) column.tell(next, box.left + column.heat.px(step), box.top + column.heat.py(row), true);
  }
}

/** The cell that the keyboard is at: where it was left, or the one that was chosen. */
function cursorCell(app, column) {
  const chosen = app.rows.findIndex(({ first, last }) => first <= app.chosen.layer && app.chosen.layer <= last);
  const { row, step } = app.cursor ?? { row: Math.max(0, chosen), step: app.chosen.step };
  const columns = column.picture?.columns ?? [];
  return column.cell(Math.max(columns[0] ?? 0, Math.min(step, columns.at(-1) ?? step)), Math.min(row, app.rows.length - 1));
}
