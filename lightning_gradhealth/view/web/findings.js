/* The findings of a run: what, where, since when, the evidence, and a remedy to copy. */
import { clean, count, el, figure, named, words } from "./dom.js";

const RANK = { healthy: 0, info: 1, warning: 2, critical: 3 };
const TITLES = { healthy: "healthy", info: "healthy" };

/** A run's status in a few words. */
export function statusText(status) {
  if (!status || status.severity === "healthy" || status.severity === "info" || !status.condition) return TITLES[status?.severity] ?? "no verdict";
  const since = status.since === null || status.since === undefined ? "" : status.active ? ` since step ${count(status.since)}` : `, over, first at step ${count(status.since)}`;
  const more = status.findings > 1 ? ` (+${status.findings - 1} more)` : "";
  return `${words(status.condition)}${since}${more}`;
}

export const severityOf = (status) => (status && status.severity in RANK && status.severity !== "info" ? status.severity : "healthy");

/** A line for each run; a click shows it. */
export function runList(runs, current, open) {
  return el("ul", { className: "runs", "aria-label": "runs" }, ...runs.map(({ run, status }) =>
    el("li", {}, el("button", { type: "button", className: `status ${severityOf(status)}`, "aria-current": run === current ? "true" : "false", "data-run": run, onclick: () => open(run) },
      el("i", { className: "dot", "aria-hidden": "true" }), named(run, 80), el("span", { className: "verdict", textContent: statusText(status) }))),
  ));
}

/** A card for each finding. `show` zooms to it. */
export function findingCards(findings, show) {
  if (!findings.length) return [el("p", { className: "about", textContent: "Nothing was found." })];
  return findings.map((finding) => card(finding, show));
}

function card(finding, show) {
  const { condition, severity, active, first_step: first, last_step: last } = finding;
  const when = active ? `since step ${count(first)}` : first === last ? `at step ${count(first)}` : `steps ${count(first)} to ${count(last)}, over`;
  const evidence = (finding.evidence ?? []).map(({ name, value }) => el("span", { className: "fact" }, el("span", { textContent: `${words(name)} ` }), el("b", { textContent: typeof value === "number" ? figure(value) : clean(value, 200) })));
  const node = el("article", { className: `finding ${["critical", "warning"].includes(severity) ? severity : "info"}`, "data-finding": finding.id ?? condition, tabIndex: -1 },
    el("header", {}, el("b", { textContent: words(condition) }), el("span", { className: "about", textContent: `${clean(severity)}, ${when}` }),
      el("button", { type: "button", className: "quiet", textContent: "show", "aria-label": `show ${words(condition)} in the picture`, onclick: () => show(finding) })),
    el("p", {}, finding.where ? el("span", { className: "where" }, named(finding.where, 200), ": ") : "", clean(finding.summary ?? "", 1000)),
  );
  if (evidence.length) node.append(el("p", { className: "facts" }, ...evidence));
  if (finding.remedy) node.append(el("p", { className: "remedy" }, el("span", { textContent: "Remedy: " }), clean(finding.remedy, 2000), finding.code ? "" : copyButton(finding.remedy)));
  if (finding.code) node.append(el("div", { className: "code" }, el("pre", {}, el("code", { textContent: finding.code.slice(0, 8000) })), copyButton(finding.code)));
  return node;
}

/** A button that puts a text on the clipboard. */
function copyButton(text) {
  const button = el("button", { type: "button", className: "quiet copy", textContent: "copy", "aria-label": "copy the remedy" });
  button.addEventListener("click", async () => {
    const done = await copied(text);
    button.textContent = done ? "copied" : "select and copy by hand";
    setTimeout(() => { button.textContent = "copy"; }, 1800);
  });
  return button;
}

/** Copy a text; in frames without the clipboard's permission by way of a selection. */
async function copied(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const area = el("textarea", { value: text, className: "unseen", readOnly: true });
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    return done;
  }
}

/** What is shown while there is nothing to show. */
export const emptyPage = (live) => el("main", { className: "empty" },
  el("h2", { textContent: "No training health recorded yet" }),
  el("p", { textContent: live ? "Add the callback to your Trainer; this page fills while you train:" : "This file holds no run." }),
  el("pre", {}, el("code", { textContent: "import lightning_gradhealth as gh\nfrom lightning.pytorch import Trainer\nfrom lightning.pytorch.loggers import TensorBoardLogger\n\ntrainer = Trainer(callbacks=[gh.GradHealth()], logger=TensorBoardLogger(\"logs\"))\ntrainer.fit(model)" })),
  el("p", { textContent: "In a plain loop or in Fabric, give gh.HealthSession a SummaryWriter. TensorBoard must read the folder that the run writes to: tensorboard --logdir logs" }),
);
