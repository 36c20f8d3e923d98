/* Elements and words. Names come from event files: they only ever become text. */

/** An element with properties, attributes, listeners ("onclick") and children. */
export function el(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(properties)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (key === "style") Object.assign(node.style, value);
    else if (key in node) node[key] = value;
    else node.setAttribute(key, value);
  }
  node.append(...children);
  return node;
}

/** Text from outside in one line: control and formatting characters are shown as escapes, its middle may be cut. */
export function clean(text, limit = 160) {
  const line = String(text).replace(/[\p{Cc}\p{Cf}\p{Cs}\p{Zl}\p{Zp}]/gu, (c) => "\\u" + c.codePointAt(0).toString(16).padStart(4, "0"));
  const letters = Array.from(line);
  if (letters.length <= limit) return line;
  const half = (limit - 1) >> 1;
  return letters.slice(0, limit - 1 - half).join("") + "…" + letters.slice(letters.length - half).join("");
}

/** A name from outside, kept apart from the direction of the text around it. */
export const named = (text, limit) => el("bdi", { className: "name", textContent: clean(text, limit), title: clean(text, 1000) });

export const words = (name) => clean(name).replaceAll("_", " ");
export const count = (n) => n.toLocaleString("en");
export const plural = (n, one) => `${count(n)} ${one}${n === 1 ? "" : "s"}`;

/** A number for reading: three digits, or NaN, Inf, "not measured". */
export function figure(value) {
  if (value === null || value === undefined) return "not measured";
  if (Number.isNaN(value)) return "NaN";
  if (!Number.isFinite(value)) return value > 0 ? "Inf" : "-Inf";
  if (value === 0) return "0";
  const size = Math.abs(value);
  return size >= 1e5 || size < 1e-3 ? value.toExponential(2) : String(+value.toPrecision(3));
}

/** A number of JSON: null stays null, "NaN" and "Infinity" become what they say. */
export const number = (value) => (value === null || value === undefined ? null : Number(value));

export const mean = (values) => values.reduce((sum, v) => sum + v, 0) / values.length;
