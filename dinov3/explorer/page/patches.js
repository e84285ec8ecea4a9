// The image view: what patches of up to twelve images have in common. Features come once from the server, as float16; cosine
// maps, the foreground and the PCA's colours are computed here from them, so that they follow the pointer. `modes.js` has what is shown.
//
// State in the URL (KEYS): the chosen images, mode, layer, size, debias; q the query, fg the clicks, first the PCA's component; how
// maps are drawn. Places are fractions of an image's sides, so they stay when the size of the grid changes.

import { check, slider } from "./controls.js";
import { h, thumb } from "./dom.js";
import { Find } from "./find.js";
import { unpack } from "./maths.js";
import { Foreground, Matches, Pca, Similarity } from "./modes.js";
import { cellsOf, parsePoints, parseQuery, writePoints, writeQuery } from "./places.js";
import { Tile, drawn } from "./tile.js";

const MOST = 12;
const MODES = { similarity: Similarity, foreground: Foreground, pca: Pca, matches: Matches, find: Find };
const KEYS = ["images", "mode", "layer", "size", "debias", "q", "fg", "first", "opacity", "sharp", "only"];
const SIZES = [256, 384, 512, 640, 768, 1024], SIZE = 512, OPACITY = 0.8;
const KEPT = 256 << 20; // bytes of features in the browser
const GAP = 12, CAPTION = 30, EDGE = 4; // px between tiles, below each, around all
const NARROW = "(max-width: 760px)"; // as in patches.css

export function mount(element, app) {
  document.head.append(h("link", { rel: "stylesheet", href: new URL("patches.css", import.meta.url).href }));
  new View(element, app);
}

class View {
  constructor(element, app) {
    this.app = app;
    this.tiles = new Map(); // id → Tile
    this.names = new Map(); // id → name
    this.loaded = new Map(); // key → {h, w, D, data, aspect}, the last used last
    this.loading = new Map(); // key → {promise, control}
    this.modes = Object.fromEntries(Object.entries(MODES).map(([key, Mode]) => [key, new Mode(this)]));
    this.tool = "point";
    this.radius = 1; // of the brush, in patches
    this.hovered = null; // the query under the pointer
    this.under = null; // {tile, cell}
    this.build(element);
    this.read();
    for (const key of KEYS) app.state.on(key, () => this.again());
    new ResizeObserver(() => this.layout()).observe(this.board);
    this.list();
  }

  // ---- state --------------------------------------------------------------------------------------------------------

  read() {
    const { count, layers } = this.app.info, get = (key) => this.app.state.get(key);
    const whole = (key, low, high, otherwise) => {
      const value = Number(get(key) ?? NaN);
      return Number.isInteger(value) && value >= low && value <= high ? value : otherwise;
    };
    const listed = get("images"), opacity = Number(get("opacity") ?? NaN), mode = get("mode");
    this.images = listed === null ? Array.from({ length: Math.min(count, 4) }, (_, i) => i)
      : [...new Set((listed.match(/\d+/g) ?? []).map(Number))].filter((id) => id < count).slice(0, MOST);
    this.layer = whole("layer", 0, layers - 1, layers - 1);
    const size = whole("size", 1, 4096, SIZE);
    this.size = SIZES.includes(size) ? size : SIZE;
    this.debias = whole("debias", 0, this.app.info.debias ?? 0, 0);
    this.first = whole("first", 0, 9, 0);
    this.query = parseQuery(get("q"));
    this.points = parsePoints(get("fg"));
    this.opacity = opacity >= 0 && opacity <= 1 ? opacity : OPACITY;
    this.sharp = get("sharp") === "1";
    this.only = get("only") === "1";
    this.applied = this.signature();
    this.enter(mode in this.modes ? mode : "similarity");
  }

  signature() {
    return KEYS.map((key) => this.app.state.get(key) ?? "").join("|");
  }

  // The URL has changed: by us (nothing is to do), or by "back", a link, the other view.
  again() {
    clearTimeout(this.soon);
    this.soon = setTimeout(() => { if (this.signature() !== this.applied) this.read(); }, 0);
  }

  write() {
    const last = this.app.info.layers - 1, key = Object.keys(this.modes).find((name) => this.modes[name] === this.mode);
    const values = { images: this.images.join(".") || "-", mode: key === "similarity" ? null : key, layer: this.layer === last ? null : this.layer,
      size: this.size === SIZE ? null : this.size, debias: this.debias || null, q: writeQuery(this.query), fg: writePoints(this.points),
      first: this.first || null, opacity: this.opacity === OPACITY ? null : this.opacity, sharp: this.sharp ? 1 : null, only: this.only ? 1 : null };
    for (const [name, value] of Object.entries(values)) this.app.state.set(name, value);
    this.applied = this.signature();
  }

  // How maps are drawn: opacity, sharp, first, only.
  set(changes) {
    Object.assign(this, changes);
    this.write();
    this.refresh();
  }

  // Which features: layer, size, debias. The slider may be moving still.
  setFeatures(changes) {
    Object.assign(this, changes);
    this.write();
    clearTimeout(this.later);
    this.later = setTimeout(() => this.update(), 150);
  }

  setQuery(query) {
    this.query = query;
    this.hovered = null;
    this.write();
    this.buildPanel();
    this.refresh();
  }

  setPoints(points) {
    this.points = points;
    this.write();
    this.buildPanel();
    this.refresh();
  }

  choose(images) {
    this.images = images;
    this.write();
    this.update();
  }

  toggle(id) {
    if (this.images.includes(id)) this.choose(this.images.filter((other) => other !== id));
    else if (this.images.length < MOST) this.choose([...this.images, id]);
    else this.app.toast(`Up to ${MOST} images at a time: remove one first.`);
  }

  enter(name) {
    if (this.mode && this.mode !== this.modes[name]) this.mode.leave();
    this.mode = this.modes[name];
    this.write();
    this.update();
  }

  clear() { this.mode.clear(); }

  // ---- the page's parts ---------------------------------------------------------------------------------------------

  build(element) {
    const { layers, debias = 0 } = this.app.info;
    this.tabs = h("div", { class: "segmented", role: "group", "aria-label": "Mode" }, ...Object.entries(this.modes).map(
      ([name, mode]) => h("button", { type: "button", title: mode.about, value: name, onclick: () => this.enter(name) }, mode.title)));
    this.hint = h("p", { class: "muted" });
    this.board = h("div", { class: "board" });
    this.results = h("section", { class: "results", "aria-label": "Where it was found", hidden: true });
    this.lines = drawn("svg", { class: "lines", "aria-hidden": "true" });
    this.picks = h("div", { class: "picks", role: "group", "aria-label": "Images to choose from" });
    this.count = h("span", { class: "muted" });
    this.panel = h("section", { class: "side-part" });
    this.live = h("p", { class: "unseen", role: "status" });
    this.timing = h("p", { class: "timing muted" });
    this.fields = {
      layer: slider("Layer", { min: 0, max: layers - 1 }, (layer) => this.setFeatures({ layer }), (value) => `${value}${value === layers - 1 ? " (last)" : ""}`),
      size: slider("Size", { min: 0, max: SIZES.length - 1 }, (value) => this.setFeatures({ size: SIZES[value] }), (value) => `${SIZES[value]} px`),
      debias: slider("Debias", { min: 0, max: debias }, (value) => this.setFeatures({ debias: value }), (value) => (value ? `−${value} ${value === 1 ? "direction" : "directions"}` : "off")),
      opacity: slider("Overlay", { min: 0, max: 1, step: 0.05 }, (opacity) => this.set({ opacity }), (value) => `${Math.round(100 * value)} %`),
      sharp: check("Show patches, not smoothed", (sharp) => this.set({ sharp })),
    };
    this.fields.debias.element.hidden = !debias;
    const { fields } = this;
    element.classList.add("patches");
    element.replaceChildren(
      h("div", { class: "patches-main" }, h("div", { class: "modes" }, this.tabs, this.hint), h("div", { class: "middle" }, this.board, this.results),
        h("section", { class: "picker", "aria-label": "Choose images" }, h("div", { class: "picker-head" }, h("h2", {}, "Images"), this.count), this.picks)),
      h("aside", { class: "side", "aria-label": "Settings of the image view" }, this.panel,
        h("section", { class: "side-part" }, h("h2", {}, "Features"), fields.layer.element, fields.size.element, fields.debias.element,
          h("h2", {}, "Display"), fields.opacity.element, fields.sharp.element, this.timing)),
      this.live);
    for (const [keys, words] of [["Arrows", "move the patch cursor, with Shift by five"], ["Enter", "choose the patch, paint, set a corner"],
      ["Esc", "clear"], ["+ − 0", "zoom"]]) this.app.keys.note(keys, words, { tab: "images" });
  }

  // The strip of thumbnails, a page of it at a time.
  async list() {
    const offset = this.picks.querySelectorAll(".pick").length;
    this.more?.remove();
    const ask = (text, title) => {
      this.more = h("button", { type: "button", class: "pick-more", title, onclick: () => this.list() }, text);
      this.picks.append(this.more);
    };
    try {
      const response = await this.app.api(`api/images?offset=${offset}&limit=60`), rows = await response.json();
      for (const { id, name } of rows) {
        this.names.set(id, name);
        this.tiles.get(id)?.rename(this.nameOf(id));
        this.picks.append(h("button", { type: "button", class: "pick", title: name, "aria-label": name, value: id, onclick: () => this.toggle(id) },
          h("img", { alt: "", loading: "lazy", src: thumb(id), onerror: (event) => event.target.replaceWith("unreadable") })));
      }
      if (rows.length && offset + rows.length < this.app.info.count) ask("More", "");
    } catch (error) {
      ask("Try again", error.message);
    }
    this.markChosen();
  }

  markChosen() {
    for (const pick of this.picks.querySelectorAll(".pick")) pick.setAttribute("aria-pressed", String(this.images.includes(Number(pick.value))));
    this.count.textContent = `${this.images.length} of ${Math.min(MOST, this.app.info.count)} chosen`;
  }

  buildPanel() {
    const focused = this.panel.contains(document.activeElement) ? document.activeElement.dataset.name : null;
    this.panel.replaceChildren(h("h2", {}, this.mode.title), h("p", { class: "muted" }, this.mode.about), ...this.mode.panel().filter(Boolean));
    if (focused) this.panel.querySelector(`[data-name="${focused}"]`)?.focus();
    this.hint.textContent = this.images.length ? this.mode.hint(matchMedia("(hover: none)").matches) : "";
  }

  useTool(tool) {
    this.tool = tool;
    this.buildPanel();
    this.refresh();
  }

  toolOf(mode) {
    return mode.tools.some(([tool]) => tool === this.tool) ? this.tool : mode.tools[0]?.[0] ?? "point";
  }

  brushField() {
    const field = slider("Brush", { min: 0, max: 4 }, (radius) => { this.radius = radius; this.refresh(); }, (value) => `${2 * value + 1} wide`);
    field.set(this.radius);
    return field.element;
  }

  say(text) {
    this.live.textContent = text;
  }

  nameOf(id) {
    return (this.names.get(id) ?? `image ${id}`).split("/").pop();
  }

  // ---- features -----------------------------------------------------------------------------------------------------

  features() {
    return { layer: this.layer, size: this.size, debias: this.debias };
  }

  keyOf(id) {
    return `${id}?${new URLSearchParams(this.features())}`;
  }

  of(id) {
    return this.loaded.get(this.keyOf(id));
  }

  load(key) {
    if (!this.loading.has(key)) {
      const control = new AbortController(), promise = this.fetch(key, control.signal).finally(() => this.loading.delete(key));
      this.loading.set(key, { promise, control });
    }
    return this.loading.get(key).promise;
  }

  async fetch(key, signal) {
    const start = performance.now(), response = await this.app.api(`api/features/${key}`, { signal });
    const [rows, w, D] = response.headers.get("X-Grid").split(",").map(Number);
    const [width, height] = response.headers.get("X-Image").split(",").map(Number);
    const found = { h: rows, w, D, aspect: width / height, data: unpack(await response.arrayBuffer()) };
    performance.measure("features", { start });
    this.loaded.set(key, found);
    const shown = new Set(this.images.map((id) => this.keyOf(id)));
    let bytes = [...this.loaded.values()].reduce((sum, { data }) => sum + data.byteLength, 0);
    for (const [old, { data }] of this.loaded) { // the oldest first
      if (bytes <= KEPT) break;
      if (shown.has(old)) continue;
      this.loaded.delete(old);
      bytes -= data.byteLength;
    }
    return found;
  }

  // A request about the features in view.
  send(path, body, signal) {
    return this.app.api(path, { method: "POST", headers: { "Content-Type": "application/json" }, signal,
      body: JSON.stringify({ ...this.features(), ...body }) });
  }

  async post(path, body) {
    return (await this.send(path, body)).json();
  }

  // ---- tiles --------------------------------------------------------------------------------------------------------

  order() {
    return this.mode.shown(this.images).map((id) => this.tiles.get(id)).filter(Boolean);
  }

  // Everything after a change of the state: tiles come and go, features are fetched, maps are drawn.
  update() {
    const { fields } = this, shown = this.mode.shown(this.images), wanted = new Set(shown.map((id) => this.keyOf(id)));
    this.hovered = this.under = null;
    for (const tab of this.tabs.children) tab.setAttribute("aria-pressed", String(this.modes[tab.value] === this.mode));
    fields.layer.set(this.layer);
    fields.size.set(SIZES.indexOf(this.size));
    fields.debias.set(this.debias);
    fields.opacity.set(this.opacity);
    fields.sharp.input.checked = this.sharp;
    this.markChosen();
    for (const [id] of this.tiles) if (!shown.includes(id)) this.tiles.delete(id);
    for (const [key, { control }] of this.loading) if (!wanted.has(key)) control.abort();
    for (const id of shown) if (!this.tiles.has(id)) this.tiles.set(id, new Tile(id, this.nameOf(id), this.events()));
    this.board.replaceChildren(...this.order().map((tile) => tile.element), this.lines);
    if (!shown.length) {
      this.board.append(h("div", { class: "empty" }, h("h2", {}, "No image is chosen"), h("p", {}, "Choose up to twelve from the row of images below.")));
    }
    for (const tile of this.order()) this.provide(tile);
    this.buildPanel();
    this.layout();
    this.refresh();
  }

  async provide(tile) {
    const key = this.keyOf(tile.id), known = this.loaded.get(key);
    tile.key = key;
    if (!known) tile.wait("Computing features");
    try {
      const found = known ?? (await this.load(key));
      if (tile.key !== key) return; // another layer or size meanwhile
      tile.useGrid({ h: found.h, w: found.w }, found.aspect);
      if (known) return;
      this.layout();
      if (this.query?.image === tile.id) this.buildPanel();
      this.refresh();
    } catch (error) {
      if (error.name !== "AbortError" && tile.key === key) tile.fail(error.message, () => this.provide(tile));
    }
  }

  // Sizes of the tiles: the number of columns that shows most of the images.
  layout() {
    const tiles = this.order(), narrow = matchMedia(NARROW).matches, width = this.board.clientWidth - 2 * EDGE;
    const height = narrow ? 0.54 * window.innerHeight : this.board.clientHeight - 2 * EDGE; // a narrow page scrolls: its height follows the tiles
    if (!tiles.length || width <= 0 || height <= 0) return;
    let best = { area: -1 };
    for (let columns = 1; columns <= tiles.length; columns++) {
      const rows = Math.ceil(tiles.length / columns);
      const w = (width - GAP * (columns - 1)) / columns, high = Math.max(40, (height - GAP * (rows - 1)) / rows - CAPTION);
      const area = tiles.reduce((sum, { aspect }) => sum + Math.min(w, high * aspect) ** 2 / aspect, 0);
      if (area > best.area) best = { area, columns, w, high };
    }
    this.board.style.gridTemplateColumns = `repeat(${best.columns}, minmax(0, 1fr))`;
    this.board.classList.toggle("small", best.w < 260);
    for (const tile of tiles) {
      const w = Math.floor(Math.min(best.w, best.high * tile.aspect));
      tile.place(w, Math.max(24, Math.floor(w / tile.aspect)));
    }
    let total = -GAP;
    for (let i = 0; i < tiles.length; i += best.columns) total += GAP + CAPTION + Math.max(...tiles.slice(i, i + best.columns).map((tile) => tile.height));
    this.board.style.height = narrow ? `${total + 2 * EDGE}px` : "";
    this.mode.layout();
  }

  // ---- events of tiles ----------------------------------------------------------------------------------------------

  events() {
    return {
      hover: (tile, cell, how) => {
        this.under = { tile, cell };
        this.moved = performance.now();
        this.mode.hover(tile, cell, how);
        this.refresh(how === "key");
      },
      leave: () => { this.hovered = this.under = null; this.refresh(); },
      click: (tile, cell, event) => { this.mode.click(tile, cell, event); this.refresh(); },
      draw: (tile, cells) => this.draw(tile, cells),
      drawn: () => {
        this.setQuery(this.query);
        if (this.query) this.say(`${this.queryCells().length} patches`);
      },
      cancel: () => this.clear(),
      moved: (tile, resized) => (resized ? this.layout() : this.mode.layout()),
      remove: (tile) => this.toggle(tile.id),
      say: (text) => this.say(text),
    };
  }

  // A stroke of the brush, the eraser or the box.
  draw(tile, cells) {
    const { h: rows, w } = tile.grid;
    if (tile.tool === "box") {
      const r = cells.map((cell) => Math.floor(cell / w)), c = cells.map((cell) => cell % w);
      this.query = { image: tile.id, kind: "box", x: Math.min(...c) / w, y: Math.min(...r) / rows, x1: (Math.max(...c) + 1) / w, y1: (Math.max(...r) + 1) / rows };
    } else {
      const set = new Set(this.query?.image === tile.id && this.query.kind !== "point" ? cellsOf(this.query, tile.grid) : []);
      for (const cell of cells) if (tile.tool === "erase") set.delete(cell); else set.add(cell);
      this.query = set.size ? { image: tile.id, kind: "mask", h: rows, w, cells: [...set].sort((a, b) => a - b) } : null;
    }
    this.hovered = null;
    this.moved = performance.now();
    this.refresh();
  }

  placeOf(tile, cell) {
    const { h: rows, w } = tile.grid;
    return { image: tile.id, kind: "point", x: ((cell % w) + 0.5) / w, y: (Math.floor(cell / w) + 0.5) / rows };
  }

  queryCells() {
    const features = this.query && this.of(this.query.image);
    return features ? cellsOf(this.query, features) : [];
  }

  // [image, row, column, label] of the clicks on images in view.
  cellsOfPoints() {
    return this.points.filter((p) => this.images.includes(p.image) && this.of(p.image)).map((p) => {
      const grid = this.of(p.image), [cell] = cellsOf(p, grid);
      return [p.image, Math.floor(cell / grid.w), cell % grid.w, p.label];
    });
  }

  where(tile, cell) {
    const { h: rows, w } = tile.grid;
    return `${tile.name}, row ${Math.floor(cell / w) + 1} of ${rows}, column ${(cell % w) + 1} of ${w}`;
  }

  // Draws once before the next frame, however often it is asked for.
  refresh(byKey = false) {
    this.byKey ||= byKey;
    this.frame ||= requestAnimationFrame(() => {
      this.frame = 0;
      this.render();
      if (this.byKey && this.under) this.say([this.where(this.under.tile, this.under.cell), ...this.mode.spoken(this.under.tile, this.under.cell)].join(". "));
      this.byKey = false;
    });
  }

  render() {
    const tiles = this.order().filter((tile) => tile.grid && this.of(tile.id)), start = performance.now(), maps = this.mode.draw(tiles);
    for (const tile of tiles) {
      tile.tool = this.toolOf(this.mode);
      tile.radius = this.radius;
      tile.mark(this.mode.marks(tile));
    }
    if (maps) {
      const end = performance.now();
      if (performance.getEntriesByName("maps").length > 500) performance.clearMeasures("maps");
      performance.measure("maps", { start: Math.min(this.moved ?? start, start), end }); // from the pointer's event on
      this.timing.textContent = `${maps} ${maps === 1 ? "map" : "maps"} in ${(end - start).toFixed(1)} ms`;
    }
    this.moved = null;
  }
}
