/* The line of controls above the pictures. It says what was asked for; the app does it. */
import { clean, count, el } from "./dom.js";
import { levelsOf, patternOf } from "./rows.js";

export class Toolbar {
  constructor(app) {
    this.app = app;
    const select = (id, label, change) => el("select", { id, "aria-label": label, onchange: (event) => change(event.target.value) });
    this.metric = select("metric", "quantity", (metric) => app.change({ metric }));
    this.versus = select("versus", "compare with", (versus) => app.change({ versus: versus || null }));
    this.mode = select("mode", "how to compare", (mode) => app.change({ mode }));
    this.mode.append(el("option", { value: "ratio", textContent: "as a ratio" }), el("option", { value: "beside", textContent: "side by side" }));
    this.fold = select("fold", "fold layers", (level) => app.refold(Number(level)));
    this.filter = el("input", { id: "filter", type: "search", placeholder: "attn|norm", "aria-label": "filter layers by a regular expression", spellcheck: false, oninput: () => this.filtered() });
    this.filterNote = el("span", { className: "about", id: "filter-note" });
    this.verdict = el("button", { type: "button", className: "status", id: "verdict", role: "status", onclick: () => app.toFindings() });
    this.note = el("span", { className: "about", id: "note" });
    this.reset = el("button", { type: "button", id: "whole", textContent: "Whole run", title: "Escape or double click", onclick: () => app.whole() });
    this.node = el("header", { className: "bar" }, this.verdict,
      el("label", {}, "show", this.metric), this.compare = el("label", {}, "compare with", this.versus, this.mode),
      el("label", {}, "layers", this.filter), this.folding = el("label", {}, "fold", this.fold), this.filterNote,
      el("span", { className: "push" }), this.note, this.reset,
      el("button", { type: "button", id: "png", textContent: "Save PNG", onclick: () => app.savePicture() }),
      el("details", { className: "help" }, el("summary", { textContent: "?", "aria-label": "keys and gestures" }), help()),
    );
  }

  /** Show what the app shows. */
  update() {
    const { app } = this, { state } = app;
    options(this.metric, app.layout.metrics.map(({ name, title }) => [name, title]), state.metric);
    options(this.versus, [["", "no run"], ...app.runs.filter(({ run }) => run !== state.run).map(({ run }) => [run, run])], state.versus ?? "");
    this.compare.hidden = app.runs.length < 2;
    this.mode.hidden = !state.versus;
    this.mode.value = state.mode;
    const levels = levelsOf(app.names);
    options(this.fold, [["0", "every layer"], ...levels.map(([level, n]) => [String(level), `level ${level}: ${count(n)} rows`])], String(state.level));
    this.folding.hidden = !levels.length;
    if (document.activeElement !== this.filter) this.filter.value = state.filter;
    this.noteFilter();
  }

  noteFilter(problem = "") {
    const { app } = this, shown = app.rows.reduce((n, row) => n + row.last - row.first + 1, 0);
    this.filter.setAttribute("aria-invalid", problem ? "true" : "false");
    this.filterNote.textContent = problem || (app.state.filter ? `${count(shown)} of ${count(app.names.length)} layers` : "");
    this.filterNote.classList.toggle("problem", Boolean(problem));
  }

  filtered() {
    const text = this.filter.value;
    try {
      patternOf(text);
    } catch {
      this.noteFilter("no regular expression");
      return;
    }
    clearTimeout(this.typing);
    this.typing = setTimeout(() => this.app.refilter(text), 150);
  }
}

function options(select, pairs, value) {
  const before = [...select.options].map((option) => `${option.value}\n${option.textContent}`).join("\n\n");
  const texts = pairs.map(([key, text]) => [key, clean(text, 60)]);
  if (before !== texts.map((pair) => pair.join("\n")).join("\n\n")) select.replaceChildren(...texts.map(([key, text]) => el("option", { value: key, textContent: text })));
  select.value = value;
}

const GESTURES = [
  ["drag", "zoom to steps, and to layers where the drag is tall"],
  ["Ctrl + wheel, pinch", "zoom"],
  ["Shift + drag, Shift + wheel, one finger", "move along the steps"],
  ["click a cell", "that layer over the steps, that step over the depth"],
  ["click a name", "fold or unfold the layers that begin like it"],
  ["double click, Escape", "whole run"],
  ["arrows, Page up, Page down, Home, End", "move in the picture and hear its values"],
  ["+ and −, Shift + arrows", "zoom, move along the steps"],
  ["Enter, F", "look at the cell, fold its layer's neighbours"],
];
const help = () => el("dl", {}, ...GESTURES.flatMap(([key, what]) => [el("dt", { textContent: key }), el("dd", { textContent: what })]));
