/* Mouse, wheel, pen and touch on a panel: hover, tap, drag to zoom, pan, pinch. */

const CLICK = 5; // pixels that a pointer may move in a click
const TALL = 14; // pixels from which a selection is one of rows, too

/** Let a panel follow the pointers above it. */
export function follow(panel) {
  const { over, x } = panel, pointers = new Map();
  const rows = panel.zoomRows ? panel.y : null;
  let start = null, mode = null;
  over.style.touchAction = "pan-y";

  const at = (event) => {
    const box = over.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  };
  const perPixel = () => (x.b - x.a) / panel.innerWidth;

  over.addEventListener("pointerdown", (event) => {
    if (event.button > 1) return;
    over.setPointerCapture(event.pointerId);
    pointers.set(event.pointerId, at(event));
    start = at(event);
    if (pointers.size === 2) mode = "pinch";
    else mode = event.pointerType === "touch" || event.shiftKey || event.button === 1 ? "pan" : "select";
    if (event.button === 1) event.preventDefault();
  });

  over.addEventListener("pointermove", (event) => {
    const here = at(event), before = pointers.get(event.pointerId);
    if (!before) {
      hover(here, event);
      return;
    }
    if (mode === "pinch" && pointers.size === 2) {
      const other = [...pointers].find(([id]) => id !== event.pointerId)[1];
      const was = Math.max(12, Math.hypot(before[0] - other[0], before[1] - other[1])), is = Math.max(12, Math.hypot(here[0] - other[0], here[1] - other[1]));
      x.zoom(was / is, panel.vx((here[0] + other[0]) / 2));
    } else if (mode === "pan") {
      if (start && Math.hypot(here[0] - start[0], here[1] - start[1]) > CLICK) start = null;
      x.pan((before[0] - here[0]) * perPixel());
    } else if (mode === "select" && start) {
      const tall = rows && Math.abs(here[1] - start[1]) > TALL;
      panel.showBox(start[0], tall ? start[1] : panel.top, here[0], tall ? here[1] : panel.height - panel.bottom);
    }
    pointers.set(event.pointerId, here);
  });

  const hover = ([px, py], event) => {
    const inside = panel.inside(px, py);
    over.style.cursor = inside ? "crosshair" : panel.onlabel && px < panel.left ? "pointer" : "default";
    panel.cross(inside ? panel.vx(px) : null, panel.vy(py));
    if (inside) panel.onhover?.(panel.vx(px), panel.vy(py), event.clientX, event.clientY);
    else panel.onleave?.();
  };

  const leave = () => {
    panel.cross(null);
    panel.onleave?.();
  };

  const end = (event) => {
    if (!pointers.delete(event.pointerId)) return;
    const here = at(event), from = start, was = mode;
    if (pointers.size) {
      mode = "pan";
      start = null;
      return;
    }
    start = mode = null;
    if (event.type === "pointercancel" || !from) {
      panel.cross(null);
      return;
    }
    const [dx, dy] = [Math.abs(here[0] - from[0]), Math.abs(here[1] - from[1])];
    if (Math.hypot(dx, dy) <= CLICK) {
      if (from[0] < panel.left) panel.onlabel?.(panel.vy(from[1]));
      else if (panel.inside(...from)) panel.ontap?.(panel.vx(from[0]), panel.vy(from[1]));
      if (event.pointerType === "touch" && panel.inside(...from)) hover(from, event);
    } else if (was === "select") {
      leave();
      if (rows && dy > TALL) rows.set(panel.vy(from[1]), panel.vy(here[1]));
      if (dx > CLICK) x.set(panel.vx(from[0]), panel.vx(here[0]));
    }
  };
  over.addEventListener("pointerup", end);
  over.addEventListener("pointercancel", end);
  over.addEventListener("pointerleave", () => pointers.size || leave());
  over.addEventListener("dblclick", () => {
    x.reset();
    rows?.reset();
  });
  over.addEventListener(
    "wheel",
    (event) => {
      const sideways = event.shiftKey ? event.deltaX || event.deltaY : Math.abs(event.deltaX) > Math.abs(event.deltaY) ? event.deltaX : 0;
      if (event.ctrlKey || event.metaKey) x.zoom(Math.exp(Math.max(-60, Math.min(60, event.deltaY)) / 120), panel.vx(at(event)[0]));
      else if (sideways && !x.whole) x.pan(sideways * perPixel());
      else return; // the page scrolls
      event.preventDefault();
    },
    { passive: false },
  );
}
