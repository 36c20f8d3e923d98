/* What is shown, in the address: a link opens the same view. In TensorBoard the address is that of the page around. */

const ADDRESSED = ["run", "versus", "mode", "metric", "layer", "step", "x", "rows", "filter", "fold"];
const MARK = "health=";

/** The window whose address counts: TensorBoard's, or our own. */
function outer() {
  try {
    if (parent !== window && parent.location.origin === location.origin && parent.location.hash !== undefined) return parent;
  } catch { /* a frame of another origin: our own address it is */ }
  return window;
}

/** What the address asks for, as an object of strings. */
export function readAddress() {
  let text = "";
  try {
    const target = outer(), parts = target.location.hash.slice(1).split("&");
    text = target === window ? parts.join("&") : decodeURIComponent(parts.find((part) => part.startsWith(MARK))?.slice(MARK.length) ?? "");
  } catch { /* an address that cannot be read, or decoded, asks for nothing */ }
  const asked = new URLSearchParams(text);
  return Object.fromEntries(ADDRESSED.filter((key) => asked.has(key)).map((key) => [key, asked.get(key).slice(0, 20000)]));
}

/** Put what is shown into the address; empty parts are left out. */
export function writeAddress(state) {
  const text = new URLSearchParams(ADDRESSED.filter((key) => state[key] !== undefined && state[key] !== null && state[key] !== "").map((key) => [key, String(state[key])])).toString();
  try {
    const target = outer();
    if (target === window) history.replaceState(null, "", `#${text}`);
    else {
      const others = target.location.hash.slice(1).split("&").filter((part) => part && !part.startsWith(MARK));
      target.history.replaceState(target.history.state, "", `#${[...others, MARK + encodeURIComponent(text)].join("&")}`);
    }
  } catch { /* a document of a frame or a blob has no address of its own */ }
}
