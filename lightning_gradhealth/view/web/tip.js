/* The box beside the pointer, and what a screen reader hears. */
import { clean, el } from "./dom.js";

export class Tip {
  constructor(host) {
    this.box = el("div", { id: "tip", className: "tip", hidden: true });
    this.heard = el("div", { className: "unseen", "aria-live": "polite", id: "heard" });
    host.append(this.box, this.heard);
  }

  /** lines: [text or [text, value]...], the first in bold. */
  show(lines, x, y, aloud = false) {
    const [first, ...rest] = lines;
    this.box.replaceChildren(
      el("b", {}, el("bdi", { textContent: clean(first) })),
      ...rest.map((line) => (Array.isArray(line) ? el("div", {}, el("span", { textContent: clean(line[0], 300) + " " }), el("strong", { textContent: clean(line[1], 300) })) : el("div", { textContent: clean(line, 400) }))),
    );
    this.box.hidden = false;
    const { width, height } = this.box.getBoundingClientRect();
    const left = x + 16 + width > innerWidth - 8 ? Math.max(8, x - width - 16) : x + 16;
    const top = y + 16 + height > innerHeight - 8 ? Math.max(8, y - height - 14) : y + 16;
    Object.assign(this.box.style, { left: `${left}px`, top: `${top}px` });
    if (aloud) this.heard.textContent = lines.flat().map((part) => clean(part, 300)).join(", ");
  }

  say(text) {
    this.heard.textContent = text;
  }

  hide() {
    this.box.hidden = true;
  }
}
