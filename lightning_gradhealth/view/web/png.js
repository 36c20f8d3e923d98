/* The page's panels as one picture to save. */
import { css, fit } from "./chart.js";
import { clean, el } from "./dom.js";

/** Draw figures (caption and panel) of a page, as they stand, below a title. */
export function compose(figures, title, host) {
  const box = host.getBoundingClientRect(), scale = devicePixelRatio || 1, top = 34;
  const bottom = Math.max(...figures.map((figure) => figure.getBoundingClientRect().bottom)) - box.top;
  const canvas = el("canvas", { width: Math.round(box.width * scale), height: Math.round((bottom + top + 8) * scale) });
  const g = canvas.getContext("2d");
  g.scale(scale, scale);
  g.fillStyle = css("--bg");
  g.fillRect(0, 0, box.width, bottom + top + 8);
  Object.assign(g, { fillStyle: css("--fg"), font: "600 15px system-ui, sans-serif", textBaseline: "middle" });
  g.fillText(fit(g, clean(title), box.width - 24), 12, 18);
  g.font = "600 12px system-ui, sans-serif";
  for (const figure of figures) {
    const caption = figure.querySelector("figcaption"), place = (caption ?? figure).getBoundingClientRect();
    g.fillStyle = css("--fg");
    g.fillText(fit(g, caption?.textContent ?? figure.ariaLabel, place.width - 8), place.left - box.left + 4, place.top - box.top + top + (caption ? 9 : -4));
    for (const panel of figure.querySelectorAll(".panel")) {
      const at = panel.getBoundingClientRect();
      g.drawImage(panel.firstElementChild, at.left - box.left, at.top - box.top + top, at.width, at.height);
    }
  }
  return canvas;
}

/** Save a canvas under a name. */
export function save(canvas, name) {
  return new Promise((done) => {
    canvas.toBlob((blob) => {
      const url = URL.createObjectURL(blob), link = el("a", { href: url, download: name });
      document.body.append(link);
      link.click();
      link.remove();
      setTimeout(() => URL.revokeObjectURL(url), 10_000);
      done(blob.size);
    }, "image/png");
  });
}
