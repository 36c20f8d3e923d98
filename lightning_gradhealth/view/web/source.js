/* Where the data come from: a server. The page in a file has the same questions answered by file.js. */
import { number } from "./dom.js";

/** The head and the codes of a picture. */
export function unpack(buffer) {
  const n = new DataView(buffer).getUint32(0, true);
  const head = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, n)));
  return { head, codes: new Uint8Array(buffer, 4 + n) };
}

/** Numbers of a series answer, in place. */
export function readSeries(answer) {
  for (const column of answer.columns) column.values = column.values.map(number);
  for (const finding of answer.findings) finding.evidence = (finding.evidence ?? []).map(({ name, value }) => ({ name, value: readEvidence(value) }));
  return answer;
}
const readEvidence = (value) => (["NaN", "Infinity", "-Infinity"].includes(value) ? Number(value) : value);

export class Server {
  live = true;

  async ask(path, query = {}, signal = undefined) {
    const known = Object.entries(query).filter(([, value]) => value !== null && value !== undefined && value !== "");
    const response = await fetch(known.length ? `${path}?${new URLSearchParams(known)}` : path, { signal });
    if (response.ok) return response;
    const body = await response.json().catch(() => ({}));
    throw Object.assign(new Error(body.error ?? `the server answered ${response.status}`), { status: response.status });
  }

  /** Ask for the runs now, before the page is there to be drawn. */
  begin() {
    this.first = this.runs();
    this.first.catch(() => {}); // it is told where it is awaited
  }

  async runs() {
    const { first } = this;
    this.first = null;
    if (first) return first;
    return (await (await this.ask("runs")).json()).runs;
  }

  async layout(query) { return (await this.ask("layout", query)).json(); }
  async series(query) { return readSeries(await (await this.ask("series", query)).json()); }

  async picture(query, signal) {
    const { head, codes } = unpack(await (await this.ask("picture", query, signal)).arrayBuffer());
    return { ...head, codes };
  }

  async layer(query) {
    const answer = await (await this.ask("layer", query)).json();
    for (const line of answer.lines) line.values = line.values.map(number);
    return answer;
  }

  async profile(query) {
    const answer = await (await this.ask("profile", query)).json();
    answer.values = answer.values.map(number);
    answer.fits = answer.fits.map((fit) => ({ ...fit, value: number(fit.value) }));
    return answer;
  }

  async value(query) {
    const answer = await (await this.ask("value", query)).json();
    return { ...answer, value: number(answer.value) };
  }
}
