// The store view: a filter, and the grid of what passes it.
import { debounced, h, number } from "./dom.js";
import { Grid, Rows, Selection } from "./grid.js";

export async function mount(element, app) {
  const { info, state } = app;
  if (info.kind !== "store") {
    const words = `This is a ${info.kind}, not a store. Make one, then explore it:`;
    const commands = `dinov3 embed ${info.uri} --out store\ndinov3 explore store`;
    element.append(h("div", { class: "empty" }, h("h2", {}, "No store yet"), h("p", {}, words), h("pre", {}, h("code", {}, commands))));
    return;
  }
  const selection = new Selection(info.count);
  const where = h("input", { type: "search", id: "where", placeholder: "width > 500", value: state.get("where") ?? "" });
  const count = h("p", { class: "muted", role: "status" });
  const stage = h("div", { class: "stage" });
  element.append(h("div", { class: "store" }, h("div", { class: "toolbar" }, h("label", { for: "where" }, "Filter"), where, count), stage));
  const grid = new Grid(stage, { rows: new Rows(app), selection, open: (id) => state.set("near", id) });
  async function load() {
    const query = new URLSearchParams({ where: state.get("where") ?? "", sort: state.get("sort") ?? "" });
    const ids = new Uint32Array(await (await app.api(`api/numbers?${query}`)).arrayBuffer());
    grid.show(ids);
    count.textContent = `${number(ids.length)} of ${number(info.count)} images`;
  }
  where.addEventListener("input", debounced(() => state.set("where", where.value.trim()), 300));
  state.on("where", () => load().catch(app.fail));
  document.addEventListener("tab", () => grid.draw());
  await load();
}
