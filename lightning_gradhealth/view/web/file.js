/* The data that a file carries: base64 of gzip. It answers what a server is asked, from pooled pictures. */
import { INF, MISSING, NAN, TOP, ZERO } from "./colours.js";
import { lastNotAbove } from "./marks.js";
import { readSeries, unpack } from "./source.js";

/** The value of a code of a picture; null: not measured. */
export function valueOf(picture, code) {
  if (code === NAN) return NaN;
  if (code === INF) return Infinity;
  if (code === ZERO) return 0;
  if (code === MISSING) return null;
  const value = picture.lo + (code / TOP) * (picture.hi - picture.lo);
  return picture.scale === "log2" ? 2 ** value : value;
}

const rank = (code) => (code === NAN ? 300 : code === INF ? 299 : code === MISSING ? -2 : code === ZERO ? -1 : code);
const worse = (a, b) => (rank(b) > rank(a) ? b : a);

export class Embedded {
  live = false;

  static async read(text) {
    const packed = Uint8Array.from(atob(text.trim()), (c) => c.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Embedded(unpack(await new Response(stream).arrayBuffer()));
  }

  constructor({ head, codes }) {
    this.head = head;
    this.codes = codes;
    for (const series of head.series) readSeries(series);
  }

  of(list, run) {
    const found = list.find((answer) => answer.run === run);
    if (!found) throw Object.assign(new Error("there is no such run in this file"), { status: 404 });
    return found;
  }

  async runs() { return this.head.runs; }
  async layout({ run }) { return this.of(this.head.layouts, run); }
  async series({ run }) { return this.of(this.head.series, run); }

  whole(run, metric) {
    const found = this.head.pictures.find((picture) => picture.run === run && picture.metric === metric);
    if (!found) throw Object.assign(new Error("there is no such run or quantity in this file"), { status: 404 });
    return { ...found, codes: this.codes.subarray(found.offset, found.offset + found.size) };
  }

  async picture({ run, metric, rows, versus }) {
    const picture = this.whole(run, metric);
    return cut(versus ? this.ratio(picture, run, versus, metric) : picture, rows);
  }

  /** The ratio to another run (the difference where the scale is linear), layers by name, steps by the last at or before. */
  ratio(picture, run, versus, metric) {
    const other = this.whole(versus, metric), width = picture.columns.length, log = picture.scale === "log2";
    const names = this.of(this.head.layouts, run).layers, place = new Map(this.of(this.head.layouts, versus).layers.map((layer, i) => [layer.name, i]));
    const raw = new Float64Array(picture.rows.length * width).fill(NaN), codes = new Uint8Array(raw.length);
    let far = log ? 3.4 : 1e-3;
    picture.rows.forEach(([first], row) => {
      const layer = place.get(names[first]?.name), theirs = layer === undefined ? -1 : other.rows.findIndex(([a, b]) => a <= layer && layer <= b);
      for (let c = 0; c < width; c += 1) {
        const i = row * width + c, k = lastNotAbove(other.columns, picture.columns[c]);
        const a = valueOf(picture, picture.codes[i]), b = theirs < 0 || k < 0 ? null : valueOf(other, other.codes[theirs * other.columns.length + k]);
        if (a === null || b === null) codes[i] = MISSING;
        else if (Number.isNaN(a) || Number.isNaN(b)) codes[i] = NAN;
        else if (!log) raw[i] = a - b;
        else if (a === 0) codes[i] = b === 0 ? NAN : ZERO;
        else if (b === 0 || a === Infinity) codes[i] = b === Infinity ? NAN : INF;
        else if (b === Infinity) codes[i] = ZERO;
        else raw[i] = Math.log2(a / b);
        if (Number.isFinite(raw[i])) far = Math.max(far, Math.abs(raw[i]));
      }
    });
    if (log) far = Math.min(far, 24);
    for (let i = 0; i < raw.length; i += 1) if (Number.isFinite(raw[i])) codes[i] = Math.round(Math.max(0, Math.min(1, (raw[i] / far + 1) / 2)) * TOP);
    return { ...picture, codes, lo: -far, hi: far, palette: "diverging", versus };
  }

  /** Values of one layer over the columns of a picture. */
  line(run, metric, layer) {
    const picture = this.whole(run, metric), width = picture.columns.length, row = picture.rows.findIndex(([a, b]) => a <= layer && layer <= b);
    return { step: picture.columns, values: row < 0 ? [] : picture.columns.map((_, c) => valueOf(picture, picture.codes[row * width + c])) };
  }

  async layer({ run, layer }) {
    const layout = await this.layout({ run }), about = layout.layers[layer];
    const lines = layout.metrics
      .map(({ name, title, scale }) => ({ metric: name, title, scale, ...this.line(run, name, layer) }))
      .filter((line) => line.values.some((value) => value !== null));
    const kept = (this.head.layers ?? []).find((answer) => answer.run === run && answer.layer === layer);
    return { layer, ...about, lines, histogram: kept?.histogram ?? null };
  }

  async profile({ run, metric, step }) {
    const picture = this.whole(run, metric), width = picture.columns.length, c = Math.max(0, lastNotAbove(picture.columns, step));
    const values = new Array(picture.n).fill(null);
    picture.rows.forEach(([a, b], row) => values.fill(valueOf(picture, picture.codes[row * width + c]), a, b + 1));
    const series = await this.series({ run }), at = Math.max(0, lastNotAbove(series.step, step));
    const fits = series.columns.filter(({ name }) => name.endsWith("_gain")).map(({ name, title, values: all }) => ({ name, title, value: all[at] ?? null }));
    return { metric, step: picture.columns[c], values, fits: fits.filter((fit) => fit.value !== null) };
  }

  async value({ run, metric, layer, step }) {
    const { step: steps, values } = this.line(run, metric, layer), c = Math.max(0, lastNotAbove(steps, step));
    return { layer, metric, step: steps[c], value: values[c] ?? null };
  }
}

/** A picture of chosen rows, "0-3,4": the gravest code of each. */
function cut(picture, rows) {
  if (!rows) return picture;
  const width = picture.columns.length, ranges = rows.split(",").map((part) => part.split("-").map(Number)).map(([a, b]) => [a, b ?? a]);
  const codes = new Uint8Array(ranges.length * width).fill(MISSING);
  const at = new Int32Array(picture.n).fill(-1);
  picture.rows.forEach(([a, b], row) => at.fill(row, a, b + 1));
  ranges.forEach(([first, last], to) => {
    for (const row of new Set(at.subarray(first, last + 1))) {
      for (let c = 0; row >= 0 && c < width; c += 1) codes[to * width + c] = worse(codes[to * width + c], picture.codes[row * width + c]);
    }
  });
  return { ...picture, shape: [ranges.length, width], rows: ranges, codes };
}
