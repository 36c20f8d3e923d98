/* What a click shows: one layer over the steps, one step over the depth. */
import { Panel, Range } from "./chart.js";
import { LINES, SPECIAL, table, textured } from "./colours.js";
import { clean, count, el, figure, named, plural, words } from "./dom.js";
import { Cells, Line, Upright } from "./marks.js";

const BAD = { nan: SPECIAL[255].colour.light, inf: SPECIAL[254].colour.light };
const small = { left: 52, right: 10, top: 6, bottom: 20, height: 118 };

/** A layer's quantities over the steps, a small plot each, and the histogram of its outputs where it was taken. */
export class LayerView {
  constructor(app, host) {
    Object.assign(this, { app, host, plots: new Map() });
    this.title = el("h3", {}, "One layer");
    this.grid = el("div", { className: "grid" });
    host.append(this.title, this.grid);
  }

  close() {
    for (const { panel } of this.plots.values()) panel.close();
    this.plots.clear();
  }

  plot(key, title, options) {
    const kept = this.plots.get(key);
    if (kept) return kept;
    const box = el("div"), figureNode = el("figure", { "aria-label": title }, el("figcaption", {}, el("b", { textContent: title }), el("span", { className: "about" })), box);
    this.grid.append(figureNode);
    const entry = { node: figureNode, panel: new Panel(box, { ...small, x: this.app.x, ...options }) };
    this.plots.set(key, entry);
    return entry;
  }

  /** answers: of each run that is shown, its run and what is known of the layer. */
  show(answers, step) {
    const { app } = this, tone = LINES[app.dark ? "dark" : "light"], main = answers[0].answer;
    this.title.replaceChildren("Layer ", named(main.name), el("span", { className: "about", textContent: [main.kind, main.numel ? plural(main.numel, "parameter") : ""].filter(Boolean).map((t) => clean(t)).join(", ") }));
    const wanted = new Set();
    for (const { metric, title, scale } of main.lines) {
      wanted.add(metric);
      const { panel } = this.plot(metric, clean(title), { log: scale !== "linear" });
      panel.marks = [];
      panel.shown = answers.map(({ run, answer }, i) => {
        const line = answer.lines.find((entry) => entry.metric === metric) ?? { step: [], values: [] };
        return { run, mark: panel.add(new Line({ x: line.step, y: line.values, colour: i ? tone.orange : tone.blue, dash: i ? [4, 3] : [], bad: BAD })) };
      });
      panel.add(new Upright({ colour: "--accent", at: step }));
      panel.onhover = (x, y, cx, cy) => {
        const lines = panel.shown.map(({ run, mark }) => [mark, mark.nearest(x), run]).filter(([, i]) => i >= 0);
        if (lines.length) app.tip.show([`step ${count(lines[0][0].x[lines[0][1]])}`, ...lines.map(([mark, i, run]) => [answers.length > 1 ? run : title, figure(mark.y[i])])], cx, cy);
      };
      panel.onleave = () => app.tip.hide();
      panel.ontap = (x) => app.pick(app.chosen.layer, Math.round(x));
    }
    if (main.histogram) wanted.add(this.histogram(main.histogram, step));
    for (const [key, { node, panel }] of this.plots) {
      if (wanted.has(key)) continue;
      panel.close();
      node.remove();
      this.plots.delete(key);
    }
    this.peers();
  }

  /** The share of values of each magnitude, over the steps. */
  histogram({ what, step, edges, shares }, at) {
    const { app } = this, n = edges.length - 1;
    const label = (row) => ({ text: row === n - 1 ? `≥ ${figure(edges[n - 1])}` : row === 0 ? `< ${figure(edges[1])}` : figure(edges[row]) });
    const { panel } = this.plot("histogram", "Histogram", { y: new Range(-0.5, n - 0.5), names: (row) => (row >= 0 && row < n ? label(row) : null), left: 66, height: 180 });
    panel.host.previousSibling.lastChild.textContent = clean(what);
    const filled = edges.slice(1).map((_, bin) => bin).filter((bin) => shares.some((column) => column[bin] > 0));
    panel.y.grow(Math.max(0, (filled[0] ?? 0) - 1) - 0.5, Math.min(n - 1, (filled.at(-1) ?? n - 1) + 1) + 0.5);
    const codes = new Uint8Array(n * step.length);
    shares.forEach((column, c) => column.forEach((share, bin) => { codes[bin * step.length + c] = Math.round(250 * Math.sqrt(Math.min(1, Math.max(0, share ?? 0)))); }));
    const gap = step.length > 1 ? step.at(-1) - step.at(-2) : 1;
    const cells = new Cells();
    cells.data = { codes, columns: step, end: step.at(-1) + gap, rowAt: (row) => (row >= 0 && row < n ? row : -1), colours: table("sequential", app.dark), textured };
    panel.marks = [cells, new Upright({ colour: "--accent", at })];
    panel.onhover = (x, y, cx, cy) => {
      const c = Math.max(0, step.findLastIndex((s) => s <= x)), bin = Math.round(y);
      if (bin >= 0 && bin < n) app.tip.show([`step ${count(step[c])}`, [`${figure(edges[bin])} to ${figure(edges[bin + 1])}`, `${figure(100 * (shares[c]?.[bin] ?? 0))} %`]], cx, cy);
    };
    panel.onleave = () => app.tip.hide();
    panel.schedule();
    return "histogram";
  }

  /** The crosshair is that of all panels over the steps. */
  peers() {
    const mine = [...this.plots.values()].map(({ panel }) => panel);
    this.app.link(mine);
  }
}

/** A quantity of all layers at one step, and the gain per layer that fits it. */
export class ProfileView {
  constructor(app, host) {
    Object.assign(this, { app, host });
    this.title = el("h3", {}, "Over depth");
    this.about = el("p", { className: "about" });
    const box = el("div");
    this.node = el("figure", { className: "profile", "aria-label": "profile over depth" }, box);
    host.append(this.title, this.about, this.node);
    this.panel = new Panel(box, { left: 60, right: 14, top: 8, bottom: 34, height: 210, x: new Range(-0.5, 0.5, 2), log: true, xTitle: "depth: layer number, input to output" });
  }

  close() {
    this.panel.close();
  }

  show(answers, names) {
    const { app, panel } = this, { metric } = app, tone = LINES[app.dark ? "dark" : "light"], main = answers[0].answer;
    panel.log = metric.scale !== "linear";
    panel.yTitle = clean(metric.title);
    const n = Math.max(1, main.values.length);
    if (panel.x.home[1] !== n - 0.5) Object.assign(panel.x, new Range(-0.5, n - 0.5, 2), { listeners: panel.x.listeners });
    panel.marks = [];
    const places = main.values.map((_, i) => i);
    if (metric.neutral !== null && metric.neutral !== undefined) panel.add(new Line({ x: [-0.5, n - 0.5], y: [metric.neutral, metric.neutral], colour: tone.grey, dash: [2, 3], width: 1 }));
    answers.forEach(({ answer }, i) => panel.add(new Line({ x: answer.values.map((_, k) => k), y: answer.values, colour: i ? tone.orange : tone.blue, dash: i ? [4, 3] : [], bad: BAD, width: 1.6 })));
    const fitted = panel.log ? fitLine(main.values) : null;
    if (fitted) panel.add(new Line({ x: places, y: places.map((i) => Math.exp(fitted.start + fitted.slope * i)), colour: tone.green, dash: [6, 4], width: 1.3 }));
    panel.add(new Upright({ colour: "--accent", at: app.chosen.layer }));
    this.title.replaceChildren(`${words(metric.title)[0].toUpperCase()}${words(metric.title).slice(1)} over depth`, el("span", { className: "about", textContent: ` at step ${count(main.step)}` }));
    this.about.textContent = [
      ...main.fits.map(({ title, value }) => `${clean(title)}: ${figure(value)}`),
      fitted ? `dashed: the values' own trend, × ${figure(Math.exp(fitted.slope))} a layer` : "",
    ].filter(Boolean).join(" · ");
    panel.onhover = (x, y, cx, cy) => {
      const i = Math.round(x);
      if (i >= 0 && i < n) app.tip.show([names[i]?.name ?? `layer ${i}`, ...answers.map(({ run, answer }) => [answers.length > 1 ? run : metric.title, figure(answer.values[i] ?? null)])], cx, cy);
    };
    panel.onleave = () => app.tip.hide();
    panel.ontap = (x) => app.pick(Math.max(0, Math.min(n - 1, Math.round(x))), app.chosen.step);
    panel.schedule();
  }
}

/** The line through the logarithms of positive values; null where there are fewer than three. */
function fitLine(values) {
  const points = values.map((v, i) => [i, v]).filter(([, v]) => v !== null && v > 0 && Number.isFinite(v)).map(([i, v]) => [i, Math.log(v)]);
  if (points.length < 3) return null;
  const mx = points.reduce((s, [i]) => s + i, 0) / points.length, my = points.reduce((s, [, v]) => s + v, 0) / points.length;
  const slope = points.reduce((s, [i, v]) => s + (i - mx) * (v - my), 0) / points.reduce((s, [i]) => s + (i - mx) ** 2, 0);
  return { slope, start: my - slope * mx };
}
