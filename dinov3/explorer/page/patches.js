// The image view: one image, and a strip of the others.
import { h, thumb } from "./dom.js";

export async function mount(element, app) {
  const large = h("img", { class: "large", alt: "" });
  const name = h("p", { class: "muted" });
  const strip = h("div", { class: "strip", role: "group", "aria-label": "Images" });
  element.append(strip, h("figure", { class: "figure" }, large, name));
  const rows = await (await app.api("api/images?limit=60")).json();
  for (const row of rows) {
    const image = h("img", { src: thumb(row.id), alt: "", loading: "lazy" });
    strip.append(h("button", { type: "button", "aria-label": row.name, onclick: () => app.state.set("image", row.id) }, image));
  }
  function show(id) {
    const chosen = Number(id ?? 0);
    large.src = `api/image/${chosen}`;
    large.alt = name.textContent = app.info.names[chosen] ?? `image ${chosen}`;
  }
  app.state.on("image", show);
  show(app.state.get("image"));
}
