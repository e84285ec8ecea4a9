// One image in a dialog: large, what the store knows of it, and a part of it to search with.
import { h } from "./dom.js";

/** id: an image of the store, or `upload`: {url, name}. similar(id, box), similarUpload(box): search with it. */
export function openDetail(app, { id, upload, rows, ids, selection, similar, similarUpload }) {
  const image = h("img", { alt: "", draggable: "false" });
  const frame = h("div", { class: "crop-frame", hidden: true, "aria-hidden": "true" });
  const holder = h("div", { class: "crop" }, image, frame);
  const title = h("h2", { id: "detail-title" });
  const facts = h("dl", { class: "facts" });
  const button = (text, fn, kind = "") => h("button", { class: `button ${kind}`, type: "button", onclick: fn }, text);
  let current = id;
  let box = null;

  const search = button("Find similar", () => {
    dialog.close();
    if (upload) similarUpload(box);
    else similar(current, box);
  }, "primary");
  const select = upload ? null : button("Select", () => { selection.toggle(current); show(); });
  const patches = upload ? null : button("Look at patches", () => {
    dialog.close();
    app.state.set("images", current);
    app.state.set("tab", "images", { push: true });
  });
  const hint = h("p", { class: "muted" }, "Drag on the image to search with a part of it.");
  const close = h("button", { class: "icon", "aria-label": "Close", type: "button", onclick: () => dialog.close() }, "✕");
  const dialog = h("dialog", { class: "detail", "aria-labelledby": "detail-title" },
    h("div", { class: "dialog-head" }, title, close),
    h("div", { class: "detail-body" }, holder, h("div", { class: "detail-side" }, h("div", { class: "row" }, search, select, patches), hint, facts)));

  function setBox(next) {
    box = next === null ? null : next.map((v) => v.toFixed(4)).join(",");
    frame.hidden = box === null;
    search.textContent = box ? "Find similar to this part" : "Find similar";
    if (next) {
      const [x0, y0, x1, y1] = next.map((v) => `${100 * v}%`);
      Object.assign(frame.style, { left: x0, top: y0, width: `calc(${x1} - ${x0})`, height: `calc(${y1} - ${y0})` });
    }
  }

  let start = null;
  const place = (event) => {
    const area = holder.getBoundingClientRect();
    const inside = (v) => Math.max(0, Math.min(1, v));
    return [inside((event.clientX - area.left) / area.width), inside((event.clientY - area.top) / area.height)];
  };
  holder.addEventListener("pointerdown", (event) => {
    start = place(event);
    holder.setPointerCapture(event.pointerId);
    event.preventDefault();
  });
  holder.addEventListener("pointermove", (event) => {
    if (!start) return;
    const [x, y] = place(event);
    const next = [Math.min(start[0], x), Math.min(start[1], y), Math.max(start[0], x), Math.max(start[1], y)];
    setBox(next[2] - next[0] > 0.02 && next[3] - next[1] > 0.02 ? next : null);
  });
  holder.addEventListener("pointerup", () => { start = null; });

  async function show() {
    if (upload) {
      image.src = upload.url;
      title.textContent = upload.name;
      return;
    }
    await rows.want([current]);
    const row = rows.get(current);
    title.textContent = row?.name ?? `image ${current}`;
    image.src = `api/image/${current}?side=1024`;
    image.alt = title.textContent;
    select.textContent = selection.has(current) ? "Selected ✓" : "Select";
    select.setAttribute("aria-pressed", String(selection.has(current)));
    const shown = Object.entries(row ?? {}).filter(([key]) => !["id", "name"].includes(key));
    facts.replaceChildren(...shown.flatMap(([key, value]) => [h("dt", {}, key), h("dd", {}, value === null ? "–" : String(value))]));
  }
  image.addEventListener("error", () => {
    hint.textContent = "This image cannot be read: its file was moved, changed or is not below the store's folders.";
    hint.className = "error";
  });

  dialog.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step || upload) return;
    const at = ids.indexOf(current);
    if (at < 0 || !(at + step in ids)) return;
    current = ids[at + step];
    setBox(null);
    show().catch(app.fail);
    event.preventDefault();
  });
  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
  dialog.addEventListener("close", () => dialog.remove());
  document.body.append(dialog);
  dialog.showModal();
  search.focus();
  show().catch(app.fail);
}
