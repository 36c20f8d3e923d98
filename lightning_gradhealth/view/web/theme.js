/* Light or dark: TensorBoard's choice where we are its tab, else that of the system. */

/** Follow the theme; returns whether it is dark now, and calls `changed` where it changes. */
export function watchTheme(inside, changed) {
  const system = matchMedia("(prefers-color-scheme: dark)");
  const body = inside ? outerBody() : null;
  const isDark = () => (body ? body.classList.contains("dark-mode") : system.matches);
  let dark = null;
  const look = () => {
    if (isDark() === dark) return;
    const first = dark === null;
    dark = isDark();
    document.documentElement.classList.toggle("dark", dark);
    if (!first) changed(dark);
  };
  system.addEventListener("change", look);
  if (body) new MutationObserver(look).observe(body, { attributeFilter: ["class"] });
  look();
  return dark;
}

/** TensorBoard's body; null where the page around is not ours to look at, or is no TensorBoard. */
function outerBody() {
  try {
    return parent !== window && parent.document.querySelector("tb-webapp") ? parent.document.body : null;
  } catch {
    return null; // a frame of another origin
  }
}
