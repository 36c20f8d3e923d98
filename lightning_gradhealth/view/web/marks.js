/* What panels draw: lines, spans, bars, images of cells. Each mark holds its data and can be given other data. */
import { css, line } from "./chart.js";

/** The last place of a sorted array whose value is not above v; -1: there is none. */
export function lastNotAbove(values, v) {
  let low = -1, high = values.length;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (values[middle] <= v) low = middle;
    else high = middle;
  }
  return low;
}

/** A line through what was measured (null was not); NaN and Inf make a gap and a tick at the upper edge, 0 on a log axis one at the lower. */
export class Line {
  constructor({ x = [], y = [], colour, width = 1.4, dash = [], bad = {} }) {
    Object.assign(this, { x, y, colour, width, dash, bad });
  }

  extent(a, b, log) {
    let low = Infinity, high = -Infinity;
    const from = Math.max(0, lastNotAbove(this.x, a)), to = Math.min(this.x.length - 1, lastNotAbove(this.x, b) + 1);
    for (let i = from; i <= to; i += 1) {
      const v = this.y[i];
      if (v === null || !Number.isFinite(v) || (log && v <= 0)) continue;
      if (v < low) low = v;
      if (v > high) high = v;
    }
    return low <= high ? [low, high] : null;
  }

  draw(g, panel) {
    const from = Math.max(0, lastNotAbove(this.x, panel.x.a)), to = Math.min(this.x.length - 1, lastNotAbove(this.x, panel.x.b) + 1);
    const colour = typeof this.colour === "function" ? this.colour() : this.colour;
    Object.assign(g, { strokeStyle: colour, fillStyle: colour, lineWidth: this.width, lineJoin: "round" });
    g.setLineDash(this.dash);
    g.beginPath();
    let pen = false, alone = null;
    const dots = [], ticks = [];
    for (let i = from; i <= to; i += 1) {
      const v = this.y[i];
      if (v === null) continue;
      if (!Number.isFinite(v) || (panel.log && v <= 0)) {
        if (!Number.isFinite(v) || v === 0) ticks.push([panel.px(this.x[i]), v]);
        if (alone) dots.push(alone);
        pen = false;
        alone = null;
        continue;
      }
      const p = panel.px(this.x[i]), q = panel.py(v);
      if (pen) g.lineTo(p, q);
      else g.moveTo(p, q);
      alone = pen ? null : [p, q];
      pen = true;
    }
    g.stroke();
    g.setLineDash([]);
    if (alone) dots.push(alone);
    for (const [p, q] of dots) g.fillRect(p - 1.5, q - 1.5, 3, 3);
    let last = -Infinity;
    for (const [p, v] of ticks) {
      if (p - last < 1.5) continue;
      last = p;
      g.fillStyle = (v === 0 ? null : Number.isNaN(v) ? this.bad.nan : this.bad.inf) ?? colour;
      g.fillRect(p - 1, v === 0 ? panel.top + panel.innerHeight - 7 : panel.top, 2.5, 7);
    }
    g.lineWidth = 1;
  }

  /** Place of the measured point that is nearest to x; -1: there is none. */
  nearest(x) {
    const i = lastNotAbove(this.x, x);
    let before = i, after = i + 1;
    while (before >= 0 && this.y[before] === null) before -= 1;
    while (after < this.x.length && this.y[after] === null) after += 1;
    if (before < 0) return after < this.x.length ? after : -1;
    return after < this.x.length && this.x[after] - x < x - this.x[before] ? after : before;
  }
}

/** Bands over the whole height, or a rail of marks at the upper edge. */
export class Spans {
  constructor({ spans = [], colour, rail = 0 }) {
    Object.assign(this, { spans, colour, rail });
  }

  draw(g, panel) {
    g.fillStyle = typeof this.colour === "function" ? this.colour() : this.colour;
    for (const [a, b] of this.spans) {
      const p = panel.px(a), q = panel.px(b + 1);
      if (q < panel.left || p > panel.w) continue;
      if (this.rail) g.fillRect(p, panel.top, Math.max(2, q - p), this.rail);
      else g.fillRect(p, panel.top, Math.max(1.5, q - p), panel.innerHeight);
    }
  }
}

/** Bars in rows: {row, spans, colour, strong}. */
export class Bars {
  constructor(bars = []) {
    this.bars = bars;
  }

  draw(g, panel) {
    for (const { row, spans, colour, strong } of this.bars) {
      const y = panel.py(row);
      g.globalAlpha = strong ? 1 : 0.8;
      for (const [a, b] of spans) {
        const p = panel.px(a), q = Math.max(p + 4, panel.px(b + 1));
        g.fillStyle = colour;
        g.beginPath();
        g.roundRect(p, y - 6, q - p, 12, 3);
        g.fill();
      }
      g.globalAlpha = 1;
    }
  }
}

/** A horizontal line at a value or row. */
export class Level {
  constructor({ at = null, colour, dash = [2, 3] }) {
    Object.assign(this, { at, colour, dash });
  }

  draw(g, panel) {
    if (this.at === null) return;
    g.strokeStyle = css(this.colour);
    g.setLineDash(this.dash);
    const p = Math.round(panel.py(this.at)) + 0.5;
    line(g, panel.left, p, panel.w - panel.right, p);
    g.setLineDash([]);
  }
}

/** A vertical line at a value of the x axis. */
export class Upright extends Level {
  draw(g, panel) {
    if (this.at === null || this.at < panel.x.a || this.at > panel.x.b) return;
    g.strokeStyle = css(this.colour);
    g.setLineDash(this.dash);
    const p = Math.round(panel.px(this.at)) + 0.5;
    line(g, p, panel.top, p, panel.height - panel.bottom);
    g.setLineDash([]);
  }
}

/**
 * Cells as pixels, each pixel by itself: nothing is smoothed, and columns may be of any width.
 * codes: rows x columns; columns: where each begins; end: where the last ends; rowAt: row of the y axis -> row of codes, or -1;
 * colours: {plain, texture}; textured: {from, at(code, x, y)}: codes not below `from` show the texture where `at` says so.
 */
export class Cells {
  constructor() {
    this.data = null;
  }

  draw(g, panel) {
    if (!this.data?.columns.length) return;
    const { codes, columns, end, rowAt, colours, textured } = this.data, scale = panel.scale;
    const w = Math.round(panel.innerWidth * scale), h = Math.round(panel.innerHeight * scale), n = columns.length;
    if (this.image?.width !== w || this.image?.height !== h) this.image = new ImageData(w, h);
    const pixels = new Uint32Array(this.image.data.buffer), column = new Int32Array(w);
    for (let p = 0; p < w; p += 1) {
      const v = panel.x.a + ((p + 0.5) / w) * (panel.x.b - panel.x.a);
      column[p] = v > end ? -1 : lastNotAbove(columns, v);
    }
    let last = -2;
    for (let q = 0; q < h; q += 1) {
      const row = rowAt(Math.round(panel.vy(panel.top + (q + 0.5) / scale)));
      const to = q * w;
      if (row === last && !this.rough) {
        pixels.copyWithin(to, to - w, to);
        continue;
      }
      last = row;
      this.rough = false;
      if (row < 0) {
        pixels.fill(0, to, to + w);
        continue;
      }
      const { plain, texture } = colours, base = row * n;
      for (let p = 0; p < w; p += 1) {
        const code = column[p] < 0 ? -1 : codes[base + column[p]];
        if (code < textured.from) pixels[to + p] = code < 0 ? 0 : plain[code];
        else {
          this.rough = true; // a texture changes from line to line
          pixels[to + p] = textured.at(code, p / scale, q / scale) ? texture[code] : plain[code];
        }
      }
    }
    const canvas = (this.buffer ??= document.createElement("canvas"));
    if (canvas.width !== w || canvas.height !== h) Object.assign(canvas, { width: w, height: h });
    canvas.getContext("2d").putImageData(this.image, 0, 0);
    g.imageSmoothingEnabled = false;
    g.drawImage(canvas, panel.left, panel.top, panel.innerWidth, panel.innerHeight);
  }
}
