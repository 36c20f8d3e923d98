/* TensorBoard's entry: it calls render() once in the tab's frame. */
import { App } from "./app.js";

export async function render() {
  document.documentElement.lang = "en";
  document.title = "Grad Health";
  const sheet = Object.assign(document.createElement("link"), { rel: "stylesheet", href: "style.css" });
  const styled = new Promise((done) => { sheet.onload = sheet.onerror = done; });
  document.head.append(sheet);
  await styled;
  await new App(document.body).start();
}
