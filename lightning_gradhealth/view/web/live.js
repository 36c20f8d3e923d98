/* A run that goes on: the page looks whether there is more, and shows it; the zoom is kept. */

const POLL = 2000; // milliseconds between two looks

/** Look again and again while the page is seen. */
export function keepLooking(app) {
  let busy = false, lost = false;

  const look = async () => {
    if (busy || document.hidden) return;
    busy = true;
    try {
      await show(app, await app.source.runs(), lost);
      lost = false;
    } catch {
      lost = true;
      app.note("the server does not answer; trying again");
    }
    busy = false;
  };
  setInterval(look, POLL);
  document.addEventListener("visibilitychange", look);
}

async function show(app, runs, lost) {
  const { run, versus } = app.state, before = app.runs;
  if (JSON.stringify(runs) === JSON.stringify(before)) {
    if (lost && app.columns.length) app.showStatus();
    return;
  }
  if (!before.length || !runs.some((entry) => entry.run === run)) {
    await app.busy(app.begin());
    return;
  }
  const stamp = (list, name) => list.find((entry) => entry.run === name)?.stamp;
  app.runs = runs;
  if ([run, versus].some((name) => stamp(runs, name) !== stamp(before, name))) await refresh(app);
  app.toolbar.update();
  app.showStatus();
}

async function refresh(app) {
  const layout = await app.source.layout({ run: app.state.run }), { layer, step } = app.chosen;
  if (layout.schema !== app.layout.schema || layout.layers.length !== app.names.length) {
    await app.busy(app.open({ layer: app.names[layer], step }));
    return;
  }
  app.layout = layout;
  await Promise.all(app.columns.map((column) => column.loadSeries()));
  app.measure();
  clearTimeout(app.resting);
  await app.draw();
  await app.pick(layer, step);
  app.host.dataset.grown = String(Number(app.host.dataset.grown ?? 0) + 1);
}
