/* Colours of cells, fit for colour-blind readers, light and dark; what is no number has a colour and a texture of its own. */

const STOPS = {
  diverging: {
    light: "#053061 #2166ac #4393c3 #92c5de #d1e5f0 #f7f7f7 #fddbc7 #f4a582 #d6604d #b2182b #67001f",
    dark: "#9eb0ff #5aa3da #2d7597 #1a4256 #15232b #16181c #2a150d #501803 #8a3f2a #c4756a #ffacac",
  },
  sequential: {
    light: "#fdfdf5 #e8eed2 #c9e0be #a1d2b7 #70bdb7 #48a3b2 #2d86aa #26699d #284b87 #262d6a #1d1147",
    dark: "#141821 #242f5f #284b87 #26699d #2d86aa #48a3b2 #70bdb7 #a1d2b7 #c9e0be #e8eed2 #fdfdf5",
  },
};
export const TOP = 250, ZERO = 252, MISSING = 253, INF = 254, NAN = 255;
export const SPECIAL = {
  [ZERO]: { title: "zero", colour: { light: "#8f959e", dark: "#6b717b" } },
  [MISSING]: { title: "not measured", colour: { light: "#eef0f2", dark: "#24272d" } },
  [INF]: { title: "Inf", colour: { light: "#1fbf3a", dark: "#1fbf3a" } },
  [NAN]: { title: "NaN", colour: { light: "#d6006e", dark: "#d6006e" } },
};
export const LINES = {
  light: { blue: "#0072b2", orange: "#d55e00", green: "#008060", purple: "#a0558a", grey: "#7a828e", gate: "#e69f0030", skipped: "#d6006e" },
  dark: { blue: "#56b4e9", orange: "#f5915a", green: "#3dc9a0", purple: "#d39ac2", grey: "#98a2b0", gate: "#e69f0038", skipped: "#ff5aa5" },
};
export const SEVERITY = {
  light: { info: "#4c8bd6", warning: "#d98c00", critical: "#c8322a" },
  dark: { info: "#6aa5e8", warning: "#efb04a", critical: "#ff7a70" },
};

const channels = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
const packed = ([r, g, b]) => (0xff000000 | (b << 16) | (g << 8) | r) >>> 0;
const hexOf = (rgb) => "#" + rgb.map((c) => c.toString(16).padStart(2, "0")).join("");
const shades = (dark) => (dark ? "dark" : "light");

function blend(stops, share) {
  const at = Math.max(0, Math.min(1, share)) * (stops.length - 1), i = Math.min(stops.length - 2, Math.floor(at));
  return stops[i].map((c, k) => Math.round(c + (stops[i + 1][k] - c) * (at - i)));
}

const stopsOf = (palette, dark) => (STOPS[palette] ?? STOPS.sequential)[shades(dark)].split(" ").map(channels);

/**
 * The 256 colours of a picture's codes as pixels, and those of the texture of codes that are no numbers.
 * `shareOf`: where on the palette (0 to 1) a code stands, for pictures that are shown on the scale of another.
 */
export function table(palette, dark, shareOf = (code) => code / TOP) {
  const stops = stopsOf(palette, dark), plain = new Uint32Array(256);
  for (let code = 0; code < 256; code += 1) plain[code] = packed(blend(stops, shareOf(code)));
  const texture = plain.slice();
  for (const [code, { colour }] of Object.entries(SPECIAL)) {
    const rgb = channels(colour[shades(dark)]);
    plain[code] = packed(rgb);
    texture[code] = packed(rgb.map((c) => Math.round(+code === MISSING ? (dark ? c + 22 : c - 26) : c * 0.72)));
  }
  return { plain, texture };
}

/** The colour at a share (0 to 1) of a palette. */
export const colourAt = (palette, dark, share) => hexOf(blend(stopsOf(palette, dark), share));

/** Where a code that is no number shows the second colour of its texture: NaN and Inf are hatched, each its own way. */
export const textured = {
  from: MISSING,
  at: (code, x, y) => (code === INF ? (x - y + 8000) % 8 < 1.5 : code === NAN ? (x + y) % 8 < 1.5 : (x + y) % 7 < 1),
};
