/* The page: what is shown, and what happens when something else is asked for. */
import { readAddress, writeAddress } from "./address.js";
import { Range, forgetColours } from "./chart.js";
import { Column } from "./column.js";
import { LayerView, ProfileView } from "./details.js";
import { clean, count, el, named } from "./dom.js";
import { emptyPage, findingCards, runList, severityOf, statusText } from "./findings.js";
import { onKey } from "./keys.js";
import { keepLooking } from "./live.js";
import { compose, save } from "./png.js";
import { makeRows, patternOf } from "./rows.js";
import { Server } from "./source.js";
import { watchTheme } from "./theme.js";
import { Tip } from "./tip.js";
import { Toolbar } from "./toolbar.js";

const SETTLE = 120; // milliseconds that a zoom rests before a finer picture is asked for

export class App {
  constructor(host, source = new Server()) {
    Object.assign(this, { host, source, columns: [], runs: [], rows: [], names: [], linked: [], waiting: 0, opened: new Set(), closed: new Set(), chosen: { layer: 0, step: 0 } });
    this.state = { run: null, versus: null, mode: "ratio", metric: null, filter: "", level: 0 };
    host.gradhealth = this;
  }

  async start() {
    this.tip = new Tip(this.host);
    this.dark = watchTheme(this.source.live, (dark) => this.retint(dark));
    this.main = el("div", { className: "page" });
    this.host.prepend(this.main);
    await this.busy(this.begin());
    if (this.source.live) keepLooking(this);
  }

  /** While something is under way the page is not "ready"; a failure is told in the bar. */
  async busy(work) {
    const root = document.documentElement.dataset;
    this.waiting += 1;
    delete root.ready;
    try {
      return await work;
    } catch (error) {
      this.note(error.message);
      return undefined;
    } finally {
      this.waiting -= 1;
      if (!this.waiting) {
        await new Promise((done) => setTimeout(done));
        if (!this.waiting) Object.assign(root, { ready: "yes", run: this.state.run ?? "", metric: this.state.metric ?? "", versus: this.state.versus ?? "" });
      }
    }
  }

  note(text) {
    if (this.toolbar) this.toolbar.note.textContent = clean(text, 120);
  }

  async begin() {
    this.runs = await this.source.runs();
    if (!this.runs.length) {
      this.main.replaceChildren(emptyPage(this.source.live));
      return;
    }
    const asked = readAddress(), has = (run) => this.runs.some((entry) => entry.run === run);
    const sickest = ["critical", "warning"].map((severity) => this.runs.find(({ status }) => status?.severity === severity)).find(Boolean) ?? this.runs[0];
    Object.assign(this.state, {
      run: has(asked.run) ? asked.run : sickest.run, metric: asked.metric ?? null, filter: valid(asked.filter), level: Math.min(8, Number(asked.fold) || 0),
      versus: has(asked.versus) && asked.versus !== asked.run ? asked.versus : null, mode: asked.mode === "beside" ? "beside" : "ratio",
    });
    await this.open(asked);
  }

  get metric() { return this.layout.metrics.find(({ name }) => name === this.state.metric) ?? this.layout.metrics[0]; }
  get folded() { return this.rows.length !== this.names.length || this.rows.some(({ first }, row) => first !== row); }
  get status() { return this.runs.find(({ run }) => run === this.state.run)?.status; }

  // --- opening a run ---

  /** Build the page of the run, and of the one that it is compared with. */
  async open(asked = {}) {
    const ticket = (this.opening = Symbol("opening")), { run, versus } = this.state, w = Math.min(2000, Math.round(innerWidth * devicePixelRatio));
    const series = new Map([run, versus].filter(Boolean).map((each) => [each, this.source.series({ run: each, w })]));
    for (const each of series.values()) each.catch(() => {}); // it is told where it is awaited
    const layout = await this.source.layout({ run });
    if (ticket !== this.opening) return;
    this.close();
    this.layout = layout;
    if (!layout.metrics.some(({ name }) => name === this.state.metric)) this.state.metric = layout.metrics[0]?.name ?? null;
    this.names = layout.layers.map(({ name }) => name);
    this.makeRows();
    this.x = new Range(layout.x0, Math.max(layout.x1, layout.x0 + 1), 1);
    this.y = new Range(this.rows.length - 0.5, -0.5, 2);
    this.build();
    const [a, b] = (asked.x ?? "").split("-").map(Number), [c, d] = (asked.rows ?? "").split("-").map(Number);
    if (b > a) this.x.set(a, b);
    if (d > c) this.y.set(d + 0.5, c - 0.5);
    await Promise.all([...this.columns.map((column) => column.loadSeries(series)), ...this.columns.map((column) => column.loadPicture())]);
    if (ticket !== this.opening) return;
    this.measure();
    this.showStatus();
    this.paint();
    performance.mark("gradhealth-painted");
    this.x.listeners.add(() => this.later());
    this.y.listeners.add(() => this.later());
    await this.pick(...this.startingPoint(asked));
  }

  build() {
    const { run, versus, mode } = this.state, beside = versus && mode === "beside";
    this.toolbar = new Toolbar(this);
    const pictures = el("div", { className: beside ? "columns" : "column" });
    const areas = beside ? [el("section"), el("section")] : [el("section")];
    pictures.append(...areas);
    this.cards = el("section", { className: "findings", "aria-label": "findings", id: "findings" });
    const depth = el("section", { className: "depth" }), layer = el("section", { className: "layer" });
    this.list = el("nav", {});
    this.main.replaceChildren(this.list, this.toolbar.node, el("main", {}, pictures, el("div", { className: "two" }, this.cards, depth), layer));
    this.toolbar.update();
    this.columns = [];
    this.columns.push(new Column(this, areas[0], { run, versus: beside ? null : versus }));
    if (beside) this.columns.push(new Column(this, areas[1], { run: versus }));
    for (const { heat } of this.columns) {
      Object.assign(heat.figure, { tabIndex: 0 });
      heat.figure.setAttribute("role", "application");
      heat.figure.setAttribute("aria-roledescription", "heat map of layers over steps; arrow keys move, Enter opens, plus and minus zoom, Escape shows the whole run");
      heat.figure.addEventListener("keydown", (event) => onKey(this, event, this.columns.find((column) => column.heat === heat)));
    }
    this.profileView = new ProfileView(this, depth);
    this.layerView = new LayerView(this, layer);
    this.link([]);
    this.showStatus();
  }

  close() {
    clearTimeout(this.resting);
    for (const part of [...this.columns, this.profileView, this.layerView]) part?.close();
    this.columns = [];
  }

  /** The step axis: all steps of all runs that are shown, the last one's cell included. */
  measure() {
    const ends = this.columns.flatMap(({ series, theirs }) => [series, theirs]).filter((answer) => answer?.step.length).map(({ step }) => [step[0], step.at(-1)]);
    const gap = Math.max(...this.columns.map((column) => column.gap));
    this.x.grow(Math.min(this.layout.x0, ...ends.map(([a]) => a)), Math.max(this.layout.x1, ...ends.map(([, b]) => b)) + gap);
    this.x.least = Math.min(2 * gap, (this.x.home[1] - this.x.home[0]) / 2);
  }

  startingPoint(asked) {
    const findings = this.columns[0].series.findings, worst = findings.find((f) => f.severity !== "info") ?? findings[0], placed = worst?.layers?.length ? worst : findings.find((f) => f.layers?.length);
    const by = (name) => Math.max(0, this.names.indexOf(name));
    const layer = asked.layer !== undefined ? by(asked.layer) : placed ? by(placed.layers[0]) : 0;
    return [layer, asked.step !== undefined && Number.isFinite(Number(asked.step)) ? Number(asked.step) : worst ? worst.first_step : this.layout.x1];
  }

  // --- what is shown changes ---

  async change(changes) {
    const whole = ["run", "versus", "mode"].some((key) => key in changes), x = this.x.whole ? null : [this.x.a, this.x.b];
    Object.assign(this.state, changes);
    if (this.state.versus === this.state.run) this.state.versus = null;
    const { layer, step } = this.chosen, keep = { layer: this.names[layer], step };
    if (whole) await this.busy(this.open("run" in changes ? {} : { ...keep, x: x ? x.join("-") : "" }));
    else await this.busy((async () => { this.toolbar.update(); await this.draw(); await this.pick(layer, step); })());
    this.remember();
  }

  makeRows() {
    const { filter, level } = this.state;
    this.rows = makeRows(this.names, { pattern: patternOf(filter), level, opened: this.opened, closed: this.closed });
  }

  async reshape() {
    this.makeRows();
    this.y.home = [this.rows.length - 0.5, -0.5];
    [this.y.a, this.y.b] = this.y.home;
    this.toolbar.update();
    this.tip.hide();
    await this.busy(this.draw());
    this.markAll();
    this.remember();
  }

  refilter(text) {
    this.state.filter = text;
    return this.reshape();
  }

  refold(level) {
    this.state.level = level;
    this.opened.clear();
    this.closed.clear();
    return this.reshape();
  }

  /** Fold the layers that begin like the one in a row, or unfold the row. */
  toggleFold(index) {
    const row = this.rows[index];
    if (!row) return undefined;
    if (row.prefix !== null) {
      this.closed.delete(row.prefix);
      this.opened.add(row.prefix);
    } else {
      const prefix = row.label.split(".").slice(0, -1).join(".");
      if (!prefix) return undefined;
      this.opened.delete(prefix);
      this.closed.add(prefix);
    }
    return this.reshape();
  }

  /** Ask for the pictures of what is in view, and show them on one scale. */
  async draw() {
    await Promise.all(this.columns.map((column) => column.loadPicture()));
    this.paint();
  }

  paint() {
    const pictures = this.columns.map(({ picture }) => picture).filter(Boolean);
    const low = Math.min(...pictures.map(({ lo }) => lo)), high = Math.max(...pictures.map(({ hi }) => hi));
    for (const column of this.columns) column.show(low, high);
    this.toolbar.reset.disabled = this.x.whole && this.y.whole;
    this.host.dataset.painted ??= String(Math.round(performance.now()));
  }

  /** A finer picture once the zoom rests. */
  later() {
    if (!this.columns[0]?.picture) return;
    clearTimeout(this.resting);
    this.resting = setTimeout(() => {
      this.busy(this.draw());
      this.remember();
    }, SETTLE);
  }

  retint(dark) {
    this.dark = dark;
    forgetColours();
    if (!this.columns[0]?.series) return;
    for (const column of this.columns) {
      column.heat.caption.lastChild.replaceChildren(...column.cellKey());
      column.showSeries();
    }
    this.paint();
    if (this.shown) this.showDetails();
  }

  // --- a layer, a step, a finding ---

  async pick(layer, step) {
    this.chosen = { layer: Math.max(0, Math.min(this.names.length - 1, layer)), step: Math.round(step) };
    this.markAll();
    const ticket = (this.picking = Symbol("picking")), { run, versus, metric } = this.state, name = this.names[this.chosen.layer];
    const runs = versus ? [run, versus] : [run];
    const answers = await this.busy(Promise.all(runs.map(async (each) => {
      const place = each === run ? this.chosen.layer : (await this.source.layout({ run: each })).layers.findIndex((entry) => entry.name === name);
      const [line, profile] = await Promise.all([place < 0 ? { lines: [], histogram: null, name } : this.source.layer({ run: each, layer: place }), this.source.profile({ run: each, metric, step: this.chosen.step }).catch(() => null)]);
      return { run: each, line, profile };
    })));
    if (!answers || ticket !== this.picking) return;
    this.shown = answers;
    this.showDetails();
    this.remember();
  }

  showDetails() {
    this.layerView.show(this.shown.map(({ run, line }) => ({ run, answer: line })), this.chosen.step);
    const profiles = this.shown.filter(({ profile }) => profile).map(({ run, profile }) => ({ run, answer: profile }));
    if (profiles.length) this.profileView.show(profiles, this.layout.layers);
    this.host.dataset.layer = this.names[this.chosen.layer] ?? "";
    this.host.dataset.step = String(this.chosen.step);
  }

  markAll() {
    for (const column of this.columns) column.mark(this.chosen.layer, this.chosen.step);
  }

  /** Panels over the steps share one crosshair. */
  link(more) {
    this.linked = more;
    const all = [...this.columns.flatMap((column) => column.panels), ...more];
    for (const panel of all) panel.peers = all;
  }

  /** Zoom to a finding, choose its first layer, and bring its card into view. */
  async showFinding(finding, column = this.columns[0]) {
    if (!finding) return;
    const width = Math.max(finding.last_step - finding.first_step, 20 * column.gap);
    this.x.set(finding.first_step - width * 0.25, finding.last_step + width * 0.25);
    const layer = finding.layers?.length ? this.names.indexOf(finding.layers[0]) : -1;
    await this.pick(layer < 0 ? this.chosen.layer : layer, finding.first_step);
    const card = [...this.cards.children].find((node) => node.dataset.finding === (finding.id ?? finding.condition));
    card?.classList.add("lit");
    setTimeout(() => card?.classList.remove("lit"), 1500);
    this.tip.say(`${clean(finding.condition)} ${clean(finding.summary ?? "")}`);
  }

  toFindings() {
    this.cards.scrollIntoView({ behavior: "smooth", block: "start" });
    this.cards.querySelector("article")?.focus({ preventScroll: true });
  }

  showStatus() {
    const { run } = this.state, status = this.columns[0].series?.status ?? this.status;
    this.toolbar.verdict.className = `status ${severityOf(status)}`;
    this.toolbar.verdict.replaceChildren(el("i", { className: "dot", "aria-hidden": "true" }), this.runs.length > 1 ? named(run, 36) : el("span", { textContent: statusText(status) }));
    this.toolbar.verdict.setAttribute("aria-label", `${clean(run)}: ${statusText(status)}`);
    this.toolbar.verdict.title = statusText(status);
    this.list.replaceChildren(...(this.runs.length > 1 ? [runList(this.runs, run, (chosen) => this.change({ run: chosen, versus: this.state.versus === chosen ? null : this.state.versus }))] : []));
    const findings = this.columns[0].series?.findings;
    if (findings) this.cards.replaceChildren(el("h3", {}, "Findings", el("span", { className: "about" }, this.columns.length > 1 || this.state.versus ? named(run, 60) : "")), ...findingCards(findings, (finding) => this.showFinding(finding)));
    const last = this.columns[0].series?.last_step;
    if (last !== undefined) {
      this.note(this.source.live ? `step ${count(last)}` : `${count(last)} steps, recorded`);
      this.host.dataset.last = String(last);
    }
  }

  whole() {
    this.x.reset();
    this.y.reset();
  }

  remember() {
    const { run, versus, mode, metric, filter, level } = this.state, { x, y } = this;
    writeAddress({
      run, versus, metric, filter, mode: versus ? mode : "", fold: level || "", layer: this.names[this.chosen.layer], step: this.chosen.step,
      x: x.whole ? "" : `${Math.max(0, Math.round(x.a))}-${Math.round(x.b)}`, rows: y.whole ? "" : `${Math.max(0, Math.round(y.b))}-${Math.round(y.a)}`,
    });
  }

  savePicture() {
    const { run, versus, metric } = this.state, title = `${run}${versus ? ` / ${versus}` : ""}: ${statusText(this.columns[0].series?.status)}`;
    const canvas = compose([...this.main.querySelectorAll("main figure")].filter((node) => !node.hidden && node.offsetParent), title, this.main.querySelector("main"));
    return save(canvas, `gradhealth-${`${run}-${metric}`.replace(/[^A-Za-z0-9._-]+/g, "_").slice(0, 80)}.png`);
  }
}

/** A filter from outside, if it is one. */
function valid(text = "") {
  try {
    patternOf(text);
    return text;
  } catch {
    return "";
  }
}
