/* Where an axis has its ticks, and what they say. */

const SUPERSCRIPTS = { "-": "⁻", 0: "⁰", 1: "¹", 2: "²", 3: "³", 4: "⁴", 5: "⁵", 6: "⁶", 7: "⁷", 8: "⁸", 9: "⁹" };
const power = (k) => "10" + Array.from(String(k), (c) => SUPERSCRIPTS[c]).join("");

/** About `n` round numbers between two ends, as pairs of value and text. */
export function evenTicks(a, b, n, whole = false) {
  const [low, high] = a < b ? [a, b] : [b, a];
  if (!(high > low)) return [[low, label(low, whole ? 1 : 0)]];
  const raw = (high - low) / Math.max(1, n);
  const unit = 10 ** Math.floor(Math.log10(raw));
  let step = [1, 2, 5, 10].find((k) => k * unit >= raw * 0.999) * unit;
  if (whole) step = Math.max(1, Math.round(step));
  const ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i += 1) ticks.push([i * step, label(i * step, step)]);
  return ticks;
}

function label(value, step = 0) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e6 || size < 1e-4) return value.toExponential(1).replace(".0e", "e").replace("e+", "e");
  if (!step) return value.toLocaleString("en", { maximumSignificantDigits: 3 });
  const digits = Math.max(0, Math.min(6, Math.ceil(-Math.log10(step) - 1e-9)));
  return value.toLocaleString("en", { maximumFractionDigits: digits });
}

/** Powers of ten between two positive ends; where there are fewer than two, round numbers. */
export function logTicks(a, b, n) {
  const low = Math.ceil(Math.log10(a) - 1e-9), high = Math.floor(Math.log10(b) + 1e-9);
  if (high - low < 1) {
    const between = [1, 2, 3, 5].flatMap((k) => [k * 10 ** (low - 1), k * 10 ** low, k * 10 ** high]).filter((v) => v >= a && v <= b);
    const ticks = [...new Set(between)].sort((p, q) => p - q).map((v) => [v, label(+v.toPrecision(3))]);
    return ticks.length > 1 ? ticks : evenTicks(a, b, n).filter(([v]) => v > 0);
  }
  const step = Math.max(1, Math.ceil((high - low + 1) / Math.max(1, n)));
  const ticks = [];
  for (let k = Math.ceil(low / step) * step; k <= high; k += step) ticks.push([10 ** k, Math.abs(k) > 3 ? power(k) : label(10 ** k)]);
  return ticks.length > 1 ? ticks : [[10 ** low, power(low)], [10 ** high, power(high)]];
}
