/* Panels with axes that can be shared, zoomed and panned. Knows nothing of what is shown in them. */
import { evenTicks, logTicks } from "./ticks.js";
import { follow } from "./gestures.js";

const sorted = (a, b) => (a < b ? [a, b] : [b, a]);

/** What an axis shows of what there is; an axis may run downwards (a > b). Those who look on are told of changes. */
export class Range {
  constructor(a, b, least = 0) {
    Object.assign(this, { home: [a, b], a, b, least, listeners: new Set() });
  }

  get whole() {
    return this.a === this.home[0] && this.b === this.home[1];
  }

  /** Show from a to b, within what there is and no less than `least`. */
  set(a, b) {
    const [low, high] = sorted(...this.home), [from, to] = sorted(a, b);
    const width = Math.max(to - from, this.least);
    if (!(width < high - low)) [this.a, this.b] = this.home;
    else {
      const start = Math.max(low, Math.min(high - width, (from + to - width) / 2));
      [this.a, this.b] = this.home[0] > this.home[1] ? [start + width, start] : [start, start + width];
    }
    this.tell();
  }

  zoom(factor, centre = (this.a + this.b) / 2) {
    this.set(centre + (this.a - centre) * factor, centre + (this.b - centre) * factor);
  }

  pan(shift) {
    const [low, high] = sorted(...this.home), [a, b] = sorted(this.a, this.b);
    const s = Math.max(low - a, Math.min(high - b, shift));
    this.set(this.a + s, this.b + s);
  }

  reset() {
    this.set(...this.home);
  }

  /** There is more, or less, to show now: what shows all goes on showing all, else the cut is kept. */
  grow(a, b) {
    const whole = this.whole;
    this.home = [a, b];
    if (whole) [this.a, this.b] = this.home;
    else this.set(this.a, this.b);
    this.tell();
  }

  tell() {
    for (const listener of this.listeners) listener();
  }
}

const colours = new Map();

/** A colour of the style sheet, by its custom property. */
export function css(name) {
  if (!colours.has(name)) colours.set(name, getComputedStyle(document.documentElement).getPropertyValue(name).trim());
  return colours.get(name);
}
export const forgetColours = () => colours.clear();

const FONT = "11px system-ui, 'Segoe UI', Roboto, sans-serif";
const BOLD = "600 " + FONT;

/** A text cut in its middle to a width in pixels. */
export function fit(g, text, width) {
  if (g.measureText(text).width <= width) return text;
  const letters = Array.from(text);
  let low = 0, high = letters.length;
  const cut = (n) => letters.slice(0, Math.floor(n * 0.4)).join("") + "…" + letters.slice(letters.length - Math.ceil(n * 0.6)).join("");
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (g.measureText(cut(middle)).width <= width) low = middle;
    else high = middle;
  }
  return cut(low);
}

/**
 * One plot: two canvases (what is shown; crosshair and selection above it), marks, axes.
 * A mark has draw(g, panel), and extent(x0, x1) -> [low, high] where it takes part in the y axis.
 * Options: height, x (Range), y (Range; without: fitted to the marks), log, left, right, bottom, xTitle, yTitle,
 * names (row -> {text, strong}: the y axis has rows in place of numbers), zoomRows, onhover, onleave, ontap, onlabel.
 */
export class Panel {
  constructor(host, options) {
    Object.assign(this, { log: false, left: 60, right: 14, top: 8, bottom: 8, height: 120, marks: [], peers: [this], drawn: 0, w: 0 }, options);
    this.host = host;
    this.fitted = !options.y;
    this.y = options.y ?? { a: 0, b: 1 };
    this.canvas = document.createElement("canvas");
    this.over = document.createElement("canvas");
    host.classList.add("panel");
    host.replaceChildren(this.canvas, this.over);
    this.again = () => this.schedule();
    this.x.listeners.add(this.again);
    if (!this.fitted) this.y.listeners.add(this.again);
    this.seen = new ResizeObserver(() => this.resize());
    this.seen.observe(host);
    this.resize();
    follow(this);
  }

  close() {
    this.seen.disconnect();
    this.x.listeners.delete(this.again);
    if (!this.fitted) this.y.listeners.delete(this.again);
    cancelAnimationFrame(this.due);
  }

  resize(height = this.height) {
    const w = this.host.clientWidth, scale = devicePixelRatio || 1;
    if (w === this.w && height === this.height && scale === this.scale) return;
    Object.assign(this, { w, height, scale });
    this.host.style.height = height + "px";
    for (const canvas of [this.canvas, this.over]) {
      canvas.width = Math.max(1, Math.round(w * scale));
      canvas.height = Math.max(1, Math.round(height * scale));
    }
    if (w) this.draw();
    this.onresize?.();
  }

  get innerWidth() { return Math.max(1, this.w - this.left - this.right); }
  get innerHeight() { return Math.max(1, this.height - this.top - this.bottom); }
  px(v) { return this.left + ((v - this.x.a) / (this.x.b - this.x.a || 1)) * this.innerWidth; }
  vx(p) { return this.x.a + ((p - this.left) / this.innerWidth) * (this.x.b - this.x.a); }
  py(v) {
    const [a, b, t] = this.log ? [Math.log(this.y.a), Math.log(this.y.b), Math.log(v)] : [this.y.a, this.y.b, v];
    return this.top + (1 - (t - a) / (b - a || 1)) * this.innerHeight;
  }
  vy(p) {
    const share = 1 - (p - this.top) / this.innerHeight;
    return this.log ? Math.exp(Math.log(this.y.a) + share * (Math.log(this.y.b) - Math.log(this.y.a))) : this.y.a + share * (this.y.b - this.y.a);
  }
  inside(px, py) { return px >= this.left && px <= this.w - this.right && py >= this.top && py <= this.height - this.bottom; }

  add(...marks) {
    this.marks.push(...marks);
    this.schedule();
    return marks[0];
  }

  schedule() {
    this.due ??= requestAnimationFrame(() => this.draw());
  }

  /** A context in CSS pixels. */
  context(canvas) {
    const g = canvas.getContext("2d");
    g.setTransform(this.scale, 0, 0, this.scale, 0, 0);
    return g;
  }

  draw() {
    cancelAnimationFrame(this.due);
    this.due = null;
    if (!this.w) return;
    const g = this.context(this.canvas);
    g.clearRect(0, 0, this.w, this.height);
    if (this.fitted) this.fitY();
    Object.assign(g, { font: FONT, fillStyle: css("--dim"), strokeStyle: css("--line"), lineWidth: 1, textBaseline: "middle" });
    if (this.names) this.drawNames(g);
    else this.drawNumbers(g);
    g.save();
    g.beginPath();
    g.rect(this.left, this.top, this.innerWidth, this.innerHeight);
    g.clip();
    for (const mark of this.marks) mark.draw(g, this);
    g.restore();
    this.drawAxes(g);
    this.after?.(g, this);
    this.drawn += 1;
  }

  drawNumbers(g) {
    g.textAlign = "right";
    let last = Infinity;
    for (const [value, text] of this.log ? logTicks(this.y.a, this.y.b, this.innerHeight / 24) : evenTicks(this.y.a, this.y.b, this.innerHeight / 30)) {
      const p = this.py(value);
      if (Math.abs(p - last) < 13 || !(p >= this.top - 1 && p <= this.height - this.bottom + 1)) continue;
      last = p;
      g.fillText(text, this.left - 8, p);
      line(g, this.left, Math.round(p) + 0.5, this.w - this.right, Math.round(p) + 0.5);
    }
    if (this.yTitle) {
      g.save();
      g.translate(Math.max(9, this.left - 52), this.top + this.innerHeight / 2);
      g.rotate(-Math.PI / 2);
      g.textAlign = "center";
      g.fillText(fit(g, this.yTitle, this.innerHeight + 10), 0, 0);
      g.restore();
    }
  }

  drawNames(g) {
    const [from, to] = sorted(this.y.a, this.y.b), pitch = this.innerHeight / Math.max(1e-9, to - from);
    const stride = Math.max(1, Math.ceil(13 / pitch)), width = this.left - 14, written = [];
    const first = Math.ceil(from), last = Math.floor(to);
    const strong = [];
    for (let row = first; row <= last; row += 1) if (this.names(row)?.strong) strong.push(row);
    const free = (p) => written.every((q) => Math.abs(p - q) >= 12.5);
    for (const row of [...strong, ...Array.from({ length: last - first + 1 }, (_, i) => first + i).filter((r) => r % stride === 0)]) {
      const name = this.names(row), p = this.py(row);
      if (!name || !free(p)) continue;
      written.push(p);
      Object.assign(g, { textAlign: "right", font: name.strong ? BOLD : FONT, fillStyle: css(name.strong ? "--fg" : "--dim") });
      g.fillText(fit(g, name.text, width), this.left - 8, p);
    }
    g.font = FONT;
  }

  drawAxes(g) {
    g.strokeStyle = css("--axis");
    line(g, this.left + 0.5, this.top, this.left + 0.5, this.height - this.bottom + 0.5);
    line(g, this.left, this.height - this.bottom + 0.5, this.w - this.right, this.height - this.bottom + 0.5);
    if (this.bottom < 16) return;
    Object.assign(g, { fillStyle: css("--dim"), textAlign: "center", textBaseline: "top" });
    for (const [value, text] of evenTicks(this.x.a, this.x.b, Math.max(2, this.innerWidth / (this.innerWidth < 500 ? 62 : 100)), true)) {
      const p = this.px(value);
      line(g, Math.round(p) + 0.5, this.height - this.bottom, Math.round(p) + 0.5, this.height - this.bottom + 4);
      g.fillText(text, Math.min(this.w - g.measureText(text).width / 2, p), this.height - this.bottom + 6);
    }
    if (this.xTitle) g.fillText(this.xTitle, this.left + this.innerWidth / 2, this.height - 13);
  }

  /** The y axis that shows what is between the ends of the x axis. */
  fitY() {
    let low = Infinity, high = -Infinity;
    for (const mark of this.marks) {
      const extent = mark.extent?.(this.x.a, this.x.b, this.log);
      if (extent) [low, high] = [Math.min(low, extent[0]), Math.max(high, extent[1])];
    }
    if (!(low <= high)) [low, high] = this.log ? [0.1, 10] : [0, 1];
    if (this.log) this.y = { a: low / Math.max(1.15, (high / low) ** 0.06), b: high * Math.max(1.15, (high / low) ** 0.06) };
    else {
      const pad = (high - low) * 0.07 || Math.abs(high) * 0.1 || 1;
      this.y = { a: low >= 0 && low < pad ? 0 : low - pad, b: high + pad };
    }
  }

  /** A crosshair at a value of the x axis in all panels that share it; null: none. */
  cross(value, row = null) {
    for (const peer of this.peers) peer.showCross(value, peer === this || peer.zoomRows ? row : null);
  }

  showCross(value, row) {
    if (!this.w) return;
    const g = this.context(this.over);
    g.clearRect(0, 0, this.w, this.height);
    if (value === null || value < this.x.a || value > this.x.b) return;
    g.strokeStyle = css("--cross");
    g.setLineDash([3, 3]);
    const p = Math.round(this.px(value)) + 0.5;
    line(g, p, this.top, p, this.height - this.bottom);
    if (row !== null && this.names) {
      const q = Math.round(this.py(row)) + 0.5;
      line(g, this.left, q, this.w - this.right, q);
    }
    g.setLineDash([]);
  }

  /** The rectangle that is being selected. */
  showBox(x0, y0, x1, y1) {
    const g = this.context(this.over);
    g.clearRect(0, 0, this.w, this.height);
    g.fillStyle = css("--select");
    const [a, b] = sorted(x0, x1), [c, d] = sorted(y0, y1);
    g.fillRect(a, c, b - a, d - c);
  }
}

export function line(g, x0, y0, x1, y1) {
  g.beginPath();
  g.moveTo(x0, y0);
  g.lineTo(x1, y1);
  g.stroke();
}
