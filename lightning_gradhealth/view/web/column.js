/* One run: its heat map, and below on the same step axis its gradient norm, loss and findings. */
import { Panel, Range, css } from "./chart.js";
import { LINES, SEVERITY, SPECIAL, TOP, colourAt, table, textured } from "./colours.js";
import { clean, count, el, figure, named, words } from "./dom.js";
import { valueOf } from "./file.js";
import { Bars, Cells, Level, Line, Spans, Upright, lastNotAbove } from "./marks.js";
import { asked, placesIn } from "./rows.js";
import { evenTicks, logTicks } from "./ticks.js";

const HEIGHTS = { row: 18, least: 150, most: 430, norm: 140, loss: 110, finding: 20 };

export class Column {
  constructor(app, host, { run, versus = null }) {
    Object.assign(this, { app, host, run, versus, picture: null, series: null, gap: 1 });
    const narrow = host.clientWidth < 620, sides = { left: narrow ? 104 : 172, right: narrow ? 46 : 64 };
    const make = (name, title, options, key) => {
      const box = el("div"), caption = el("figcaption", {}, el("b", { textContent: title }), el("span", { className: "about" }), el("span", { className: "key" }, ...key));
      const node = el("figure", { className: name, "aria-label": title }, caption, box);
      host.append(node);
      return Object.assign(new Panel(box, { ...sides, x: app.x, ...options }), { figure: node, caption });
    };
    if (app.columns.length || versus || app.state.mode === "beside") host.prepend(el("h2", {}, named(run), ...(versus ? [" / ", named(versus)] : [])));
    this.heat = make("heat", "", { y: app.y, height: HEIGHTS.least, names: (row) => this.label(row), zoomRows: true }, this.cellKey());
    this.norm = make("norm", "Total gradient norm", { height: HEIGHTS.norm, log: true }, []);
    this.loss = make("loss", "Loss", { height: HEIGHTS.loss }, []);
    this.found = make("found", "Findings", { height: 64, bottom: 34, xTitle: "step", y: new Range(0.5, -0.5), names: (row) => this.findingLabel(row) }, []);
    this.panels = [this.heat, this.norm, this.loss, this.found];
    this.cells = this.heat.add(new Cells());
    this.marker = this.heat.add(new Level({ colour: "--accent" }));
    this.uprights = this.panels.map((panel) => panel.add(new Upright({ colour: "--accent" })));
    this.heat.after = (g, panel) => this.colourBar(g, panel);
    this.heat.onresize = () => app.later();
    this.bars = this.found.add(new Bars());
    this.listen();
  }

  close() {
    for (const panel of this.panels) panel.close();
    this.request?.abort();
  }

  // --- data ---

  /** under way: the answers that have been asked for already, by run. */
  async loadSeries(underWay = new Map()) {
    const w = Math.round(this.norm.innerWidth * this.norm.scale);
    const [mine, theirs] = await Promise.all([this.run, this.versus].map((run) => (run ? underWay.get(run) ?? this.app.source.series({ run, w }) : null)));
    Object.assign(this, { series: mine, theirs, asked: null });
    const { step } = mine, n = step.length;
    this.gap = n > 1 ? Math.max(1, Math.min(step[n - 1] - step[n - 2], (step[n - 1] - step[0]) / 4)) : 1;
    this.showSeries();
  }

  /** The rows of the page as layers of this run: of one that stands beside another, by their names; null: it has none. */
  async ownRows() {
    const { app } = this;
    if (this.run === app.state.run) return app.rows;
    this.names ??= (await app.source.layout({ run: this.run })).layers.map(({ name }) => name);
    const place = new Map(this.names.map((name, index) => [name, index]));
    return app.rows.map(({ first, last }) => {
      const [a, b] = [place.get(app.names[first]), place.get(app.names[last])];
      return a === undefined || !(b >= a) ? null : { first: a, last: b };
    });
  }

  async loadPicture() {
    const { app } = this, { x, y } = app, query = { run: this.run, metric: app.state.metric, versus: this.versus };
    this.heat.resize(Math.max(HEIGHTS.least, Math.min(HEIGHTS.most, app.rows.length * HEIGHTS.row)) + this.heat.top + this.heat.bottom);
    this.rows = await this.ownRows();
    let rows = this.rows.filter(Boolean);
    query.h = Math.min(2000, Math.round(this.heat.innerHeight * this.heat.scale));
    query.w = Math.min(2000, Math.round(this.heat.innerWidth * this.heat.scale * (x.whole ? 1 : 1.2)));
    if (!x.whole) {
      const margin = (x.b - x.a) * 0.1;
      Object.assign(query, { x0: Math.max(0, Math.floor(x.a - margin - this.gap)), x1: Math.ceil(x.b + margin) });
    }
    const cut = rows.length > query.h && !y.whole;
    if (cut) rows = rows.slice(Math.max(0, Math.floor(y.a < y.b ? y.a : y.b)), Math.ceil(Math.max(y.a, y.b)) + 1);
    if (cut || app.folded || rows.length !== this.rows.length) query.rows = asked(rows);
    const key = JSON.stringify(query);
    if (key === this.asked && this.picture) return;
    this.request?.abort();
    const request = (this.request = new AbortController());
    try {
      const picture = await app.source.picture(query, request.signal);
      if (request !== this.request) return;
      this.picture = picture;
      this.asked = key;
    } catch (error) {
      if (error.name !== "AbortError") throw error;
    }
  }

  // --- showing ---

  /** Show the picture, on the scale of all columns. */
  show(low, high) {
    const { app, picture } = this, metric = app.metric;
    if (!picture) return;
    const palette = picture.palette ?? metric.palette;
    this.scale = { low, high, palette, log: picture.scale === "log2" };
    const share = (code) => (picture.lo + (code / TOP) * (picture.hi - picture.lo) - low) / (high - low || 1);
    const place = placesIn(this.rows, picture.rows);
    this.cells.data = { codes: picture.codes, columns: picture.columns, end: picture.last + this.gap, rowAt: (row) => place[row] ?? -1, colours: table(palette, app.dark, share), textured };
    this.place = place;
    const title = this.versus ? `${metric.title}: ${picture.scale === "log2" ? "ratio" : "difference"} of the runs` : metric.title;
    this.heat.caption.firstChild.textContent = title[0].toUpperCase() + title.slice(1);
    this.heat.caption.children[1].textContent = clean(metric.about ?? "", 300);
    this.heat.figure.setAttribute("aria-label", `${title}: ${app.rows.length} rows of layers over steps ${count(picture.columns[0] ?? 0)} to ${count(picture.last)}`);
    this.heat.schedule();
  }

  showSeries() {
    const { app, series, theirs } = this, tone = LINES[app.dark ? "dark" : "light"], bad = { nan: SPECIAL[255].colour.light, inf: SPECIAL[254].colour.light };
    const column = (answer, name) => answer?.columns.find((entry) => entry.name === name);
    const lines = (panel, wanted) => {
      panel.marks = [];
      panel.shown = [];
      for (const [answer, name, title, colour, dash, width] of wanted) {
        const found = column(answer, name);
        if (found) panel.shown.push({ title, colour, mark: panel.add(new Line({ x: answer.step, y: found.values, colour, dash, width, bad })) });
      }
      return panel.shown.length > 0;
    };
    const other = this.versus ? clean(this.versus, 40) : "", own = this.versus ? `${clean(this.run, 40)}, ` : "";
    lines(this.norm, [
      [theirs, "total_norm", `${other}, before clipping`, tone.grey, [4, 3], 1.2],
      [series, "total_norm", `${own}before clipping`, tone.orange, [], 1.3],
      [series, "applied_norm", `${own}after: what the optimizer got`, tone.blue, [], 1.5],
    ]);
    const clips = column(series, "armed") || column(series, "clipped_fraction") || series.spans.some(({ name }) => name === "armed" || name === "clipped");
    if (!clips) this.norm.shown.forEach((line) => { line.title = line.title.replace("before clipping", "gradient norm").replace("after: what the optimizer got", "what the optimizer got"); });
    const spans = (name) => series.spans.find((span) => span.name === name)?.steps ?? [];
    const bands = [["armed", "gate open", tone.gate, 0], ["clipped", "clipped", tone.blue, 4], ["skipped", "skipped step", tone.skipped, 8], ["non_finite", "NaN or Inf", bad.nan, 8]].filter(([name]) => spans(name).length);
    this.norm.marks.unshift(...bands.filter((band) => !band[3]).map(([name, , colour]) => new Spans({ spans: spans(name), colour })));
    this.norm.marks.push(...bands.filter((band) => band[3]).map(([name, , colour, rail]) => new Spans({ spans: spans(name), colour, rail })));
    this.bands = bands.map(([name, title]) => ({ title, steps: spans(name) }));
    keyInto(this.norm, [...this.norm.shown.map(({ title, colour }) => [colour, title]), ...bands.map(([, title, colour]) => [colour, title])]);
    const has = lines(this.loss, [
      [theirs, "loss", other, tone.grey, [4, 3], 1.2],
      [series, "loss_max", `${own}largest`, tone.purple + "70", [], 1.1],
      [series, "loss", `${own}mean`, tone.purple, [], 1.5],
    ]);
    this.loss.figure.hidden = !has;
    this.loss.log = has && far(column(series, "loss")?.values ?? []);
    this.loss.caption.firstChild.textContent = this.loss.log ? "Loss (log scale)" : "Loss";
    keyInto(this.loss, this.loss.shown.map(({ title, colour }) => [colour, title]));
    this.norm.marks.push(this.uprights[1]);
    this.loss.marks.push(this.uprights[2]);
    this.showFindings();
    for (const panel of this.panels) panel.schedule();
  }

  showFindings() {
    const findings = this.series.findings, tone = SEVERITY[this.app.dark ? "dark" : "light"];
    const n = Math.max(1, findings.length);
    this.found.y.grow(n - 0.5, -0.5);
    this.bars.bars = findings.map((finding, row) => ({ row, spans: finding.spans?.length ? finding.spans : [[finding.first_step, finding.last_step]], colour: tone[finding.severity] ?? tone.info, strong: finding.active }));
    this.found.resize(HEIGHTS.finding * n + this.found.top + this.found.bottom);
    keyInto(this.found, ["critical", "warning", "info"].filter((s) => findings.some((f) => f.severity === s)).map((s) => [tone[s], s]));
  }

  /** The row and step that are looked at. */
  mark(layer, step) {
    const row = this.app.rows.findIndex((entry) => entry.first <= layer && layer <= entry.last);
    this.marker.at = row < 0 ? null : row;
    for (const upright of this.uprights) upright.at = step;
    for (const panel of this.panels) panel.schedule();
  }

  label(row) {
    const entry = this.app.rows[row];
    if (entry) entry.text ??= clean(entry.label, 120);
    return entry && { text: entry.text, strong: row === this.marker?.at };
  }

  findingLabel(row) {
    const finding = this.series?.findings[row];
    return finding ? { text: words(finding.condition), strong: finding.active && finding.severity !== "info" } : row === 0 ? { text: this.series ? "no findings" : "" } : null;
  }

  cellKey() {
    const shade = this.app.dark ? "dark" : "light";
    return Object.entries(SPECIAL).reverse().map(([, { title, colour }]) => swatch(colour[shade], title));
  }

  colourBar(g, panel) {
    if (!this.scale) return;
    const { low, high, palette, log } = this.scale, left = panel.w - panel.right + 10, h = panel.innerHeight;
    const bar = g.createLinearGradient(0, panel.top + h, 0, panel.top);
    for (let i = 0; i <= 20; i += 1) bar.addColorStop(i / 20, colourAt(palette, this.app.dark, i / 20));
    g.fillStyle = bar;
    g.fillRect(left, panel.top, 9, h);
    Object.assign(g, { fillStyle: css("--dim"), textAlign: "left", textBaseline: "middle" });
    const ticks = log ? logTicks(2 ** low, 2 ** high, h / 28) : evenTicks(low, high, h / 40);
    for (const [value, text] of ticks) {
      const share = ((log ? Math.log2(value) : value) - low) / (high - low || 1), p = panel.top + (1 - share) * h;
      if (share >= -0.01 && share <= 1.01) g.fillText(text, left + 13, Math.max(panel.top + 5, Math.min(panel.top + h - 5, p)));
    }
  }

  // --- what is pointed at ---

  /** The cell of the picture at a step and row; null outside. */
  cell(x, y) {
    const row = Math.round(y), entry = this.app.rows[row], { picture } = this;
    const at = picture ? lastNotAbove(picture.columns, x) : -1, place = this.place?.[row] ?? -1;
    if (!entry || at < 0 || place < 0 || x > picture.last + this.gap) return null;
    const value = valueOf(picture, picture.codes[place * picture.columns.length + at]);
    const next = picture.columns[at + 1] ?? picture.last + 1;
    return { row, ...entry, layer: entry.first, step: picture.columns[at], until: next - 1, value, pooled: picture.rows[place][0] !== picture.rows[place][1] };
  }

  /** Say what a cell holds; the exact value follows where a server knows it. */
  tell(cell, cx, cy, aloud = false) {
    const { app } = this, name = app.metric.title;
    const steps = cell.until - cell.step >= 2 * this.gap ? `steps ${count(cell.step)} to ${count(cell.until)}` : `step ${count(cell.step)}`;
    const text = cell.value !== null && Number.isFinite(cell.value) && cell.value !== 0 ? `≈ ${figure(cell.value)}` : figure(cell.value);
    const lines = (value) => [cell.label, [steps, ""], [this.versus ? `${name}, ${this.picture.scale === "log2" ? "ratio" : "difference"}` : name, value]];
    app.tip.show(lines(text), cx, cy, aloud);
    clearTimeout(this.asking);
    const own = this.rows[cell.row];
    if (!app.source.live || own.first !== own.last || this.versus || cell.value === null) return;
    const key = (this.exactly = `${cell.layer}/${cell.step}/${app.state.metric}`);
    this.asking = setTimeout(async () => {
      const answer = await app.source.value({ run: this.run, metric: app.state.metric, layer: own.first, step: cell.step }).catch(() => null);
      if (answer && key === this.exactly && !app.tip.box.hidden) app.tip.show([cell.label, [`step ${count(answer.step)}`, ""], [name, figure(answer.value)]], cx, cy, aloud);
    }, 90);
  }

  listen() {
    const { app } = this;
    const hide = () => { this.exactly = null; app.tip.hide(); };
    this.heat.onhover = (x, y, cx, cy) => { const cell = this.cell(x, y); if (cell) this.tell(cell, cx, cy); else hide(); };
    this.heat.ontap = (x, y) => { const cell = this.cell(x, y); if (cell) app.pick(cell.layer, cell.step, this); };
    this.heat.onlabel = (y) => app.toggleFold(Math.round(y), this);
    for (const panel of [this.norm, this.loss]) {
      panel.onhover = (x, y, cx, cy) => this.tellSeries(panel, x, cx, cy);
      panel.ontap = (x) => app.pick(app.chosen.layer, Math.round(x), this);
    }
    this.found.onhover = (x, y, cx, cy) => {
      const finding = this.series?.findings[Math.round(y)];
      if (finding) app.tip.show([words(finding.condition), finding.where ?? "", finding.summary ?? "", `${finding.active ? "since" : "from"} step ${count(finding.first_step)}${finding.active ? "" : ` to ${count(finding.last_step)}`}`], cx, cy);
    };
    this.found.ontap = this.found.onlabel = (a, b) => app.showFinding(this.series?.findings[Math.round(b ?? a)], this);
    for (const panel of this.panels) panel.onleave = hide;
  }

  tellSeries(panel, x, cx, cy) {
    const lines = [];
    let step = null;
    for (const { title, mark } of panel.shown ?? []) {
      const i = mark.nearest(x);
      if (i < 0) continue;
      step ??= mark.x[i];
      lines.push([title, figure(mark.y[i])]);
    }
    if (step === null) return;
    const within = panel === this.norm ? this.bands.filter(({ steps }) => steps.some(([a, b]) => a <= step && step <= b)).map(({ title }) => title) : [];
    this.app.tip.show([`step ${count(step)}`, ...lines, ...within], cx, cy);
  }
}

const swatch = (colour, title) => el("span", { className: "swatch" }, el("i", { style: { background: colour } }), title);
const keyInto = (panel, entries) => panel.caption.lastChild.replaceChildren(...entries.map(([colour, title]) => swatch(colour, title)));

/** Whether positive values span so much that a linear axis would hide most of them. */
function far(values) {
  const finite = values.filter((v) => v !== null && Number.isFinite(v));
  const low = finite.reduce((a, v) => Math.min(a, v), Infinity), high = finite.reduce((a, v) => Math.max(a, v), -Infinity);
  return low > 0 && high / low > 100;
}
