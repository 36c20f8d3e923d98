/* Which layers a picture shows: filtered by a pattern, folded by the beginnings of their names. */

const parts = (name) => name.split(".");

/** The beginnings of a name, the shortest first: "a.b.c" -> ["a", "a.b"]. */
const beginnings = (name) => parts(name).slice(0, -1).map((_, i, all) => all.slice(0, i + 1).join("."));

/**
 * Rows of a picture: {label, prefix, first, last}; prefix is null where the row is one layer.
 * `level`: names are folded to so many parts (0: not at all); `closed` and `opened`: prefixes folded and unfolded by hand.
 */
export function makeRows(names, { pattern = null, level = 0, opened = new Set(), closed = new Set() } = {}) {
  const rows = [];
  names.forEach((name, index) => {
    if (pattern && !pattern.test(name)) return;
    const prefix = foldOf(name, level, opened, closed), last = rows.at(-1);
    if (prefix !== null && last?.prefix === prefix && last.last === index - 1) last.last = index;
    else rows.push({ label: name, prefix, first: index, last: index });
  });
  for (const row of rows) {
    if (row.prefix === null) continue;
    const n = row.last - row.first + 1;
    if (n === 1 && !closed.has(row.prefix)) row.prefix = null;
    else row.label = `▸ ${row.prefix} (${n})`;
  }
  return rows;
}

function foldOf(name, level, opened, closed) {
  const all = beginnings(name);
  const byHand = all.find((prefix) => closed.has(prefix));
  if (byHand !== undefined) return byHand;
  if (!level || !all.length) return null;
  const prefix = all[Math.min(level, all.length) - 1];
  return opened.has(prefix) ? null : prefix;
}

/** The levels of folding that make a difference: pairs of level and number of rows. */
export function levelsOf(names) {
  const deepest = Math.min(8, names.reduce((most, name) => Math.max(most, parts(name).length), 1) - 1), levels = [];
  let before = 1;
  for (let level = 1; level <= deepest; level += 1) {
    const n = makeRows(names, { level }).length;
    if (n > before && n < names.length) levels.push([level, n]);
    before = Math.max(before, n);
  }
  return levels;
}

/** The pattern that a reader has written; throws where it is none. */
export const patternOf = (text) => (text ? new RegExp(text.slice(0, 300), "u") : null);

/** Rows as the server takes them. */
export const asked = (rows) => rows.map(({ first, last }) => (first === last ? `${first}` : `${first}-${last}`)).join(",");

/** For each row shown, the row of a picture that holds its first layer; -1: none (a row may be null). `ranges`: layers of each row of the picture. */
export function placesIn(rows, ranges) {
  const place = new Map();
  ranges.forEach(([first, last], index) => {
    for (let layer = first; layer <= last; layer += 1) if (!place.has(layer)) place.set(layer, index);
  });
  return rows.map((row) => (row ? place.get(row.first) ?? -1 : -1));
}
