/* TensorBoard's entry: it calls render() once in the tab's frame. The server sends all modules within this one. */
import { App } from "./app.js";
import { Server } from "./source.js";

export async function render() {
  const source = new Server();
  source.begin();
  document.documentElement.lang = "en";
  document.title = "Grad Health";
  const sheet = Object.assign(document.createElement("link"), { rel: "stylesheet", href: "style.css" });
  const styled = new Promise((done) => { sheet.onload = sheet.onerror = done; });
  document.head.append(sheet);
  await styled;
  await new App(document.body, source).start();
}
