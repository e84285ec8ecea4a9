// The store view: search, filter, what is odd, as a grid or as a map; a selection that can be saved.
import { debounced, h, number, save, thumb } from "./dom.js";
import { openDetail } from "./detail.js";
import { Grid, Rows, Selection } from "./grid.js";
import { PALETTE, PointMap, ramp } from "./map.js";

const KEYS = ["view", "where", "sort", "near", "box", "text", "find", "threshold", "k", "group", "colour", "projection", "thumbs"];
const TOP = 200; // results of a search

export async function mount(element, app) {
  if (app.info.kind === "store") await new StoreView(element, app).start();
  else element.append(noStore(app.info));
}

function noStore({ kind, uri }) {
  const what = kind === "image" ? "This page shows one image." : "This page shows a folder, which has no store yet.";
  const commands = `dinov3 embed ${uri} --out store\ndinov3 explore store`;
  return h("div", { class: "empty" },
    h("h2", {}, what),
    h("p", {}, "Search, the map, clusters and near-duplicates need the images' vectors. These two commands compute them and open them here:"),
    h("pre", { tabindex: 0, "aria-label": "Commands" }, h("code", {}, commands)));
}

class StoreView {
  constructor(element, app) {
    Object.assign(this, { element, app, state: app.state, info: app.info });
    this.selection = new Selection(app.info.count);
    this.rows = new Rows(app);
    this.list = { ids: new Uint32Array(0), scores: null, groups: null, words: "" };
    this.upload = null; // a file of the user's own that is searched with
    this.maps = new Map();
    this.columns = new Map();
  }

  async start() {
    this.build();
    this.grid = new Grid(this.parts.grid, { rows: this.rows, selection: this.selection, open: (id) => this.detail(id) });
    this.map = new PointMap(this.parts.map, {
      selection: this.selection, rows: this.rows, theme: this.app.theme, renderer: this.state.get("renderer"),
      open: (id) => this.detail(id), moved: (view) => this.keepPlace(view),
    });
    this.restorePlace();
    for (const key of KEYS) {
      this.state.on(key, () => {
        if (!["view", "colour", "projection", "thumbs"].includes(key)) this.chosenOnly = false;
        this.later();
      });
    }
    this.later = debounced(() => this.update().catch((error) => this.failed(error)), 0);
    this.selection.on(() => this.showSelection());
    document.addEventListener("tab", () => { this.grid.draw(); this.map.resize(); });
    this.shortcuts();
    await this.update().catch((error) => this.failed(error));
  }

  // ---- the parts of the page

  build() {
    const { info, state } = this;
    const set = (key) => (event) => state.set(key, event.target.value);
    const file = h("input", { type: "file", accept: "image/*", hidden: true, "aria-label": "Image to search with", onchange: () => this.searchFile(file.files[0]) });
    const words = info.has_text && h("input", {
      type: "search", id: "text", placeholder: "a dog on a beach", "aria-label": "Search with words",
      oninput: debounced((event) => this.ask({ text: event.target.value.trim() }), 350),
    });
    const options = (pairs) => pairs.map(([value, text]) => h("option", { value }, text));
    const columns = Object.keys(info.columns);
    const p = this.parts = {
      file, words,
      query: h("div", { class: "query" }),
      where: h("input", {
        type: "search", id: "where", placeholder: "width > 500", spellcheck: "false", autocomplete: "off", "aria-describedby": "where-error",
        oninput: debounced(() => state.set("where", p.where.value.trim()), 350),
      }),
      error: h("p", { class: "error", id: "where-error", role: "alert", hidden: true }),
      sort: h("select", { id: "sort", onchange: set("sort") }, ...options([["", "as stored"], ...columns.flatMap((c) => [[c, `${c}, rising`], [`-${c}`, `${c}, falling`]])])),
      find: h("div", { class: "stack" }),
      projection: h("select", { id: "projection", onchange: set("projection") }, ...options([["", "PCA"], ["umap", info.has_umap ? "UMAP" : "UMAP (not installed)"]])),
      colour: h("select", { id: "colour", onchange: set("colour") }, ...options([["", "result"], ...columns.filter((c) => c !== "path").map((c) => [c, c])])),
      thumbs: h("input", { type: "checkbox", onchange: () => state.set("thumbs", p.thumbs.checked ? null : "0") }),
      legend: h("ul", { class: "legend", "aria-label": "Colours" }),
      count: h("p", { class: "count", role: "status" }),
      grid: h("div", { class: "fill" }), map: h("div", { class: "fill", hidden: true }), groups: h("div", { class: "groups", hidden: true, tabindex: 0, role: "region", "aria-label": "Groups" }),
      nothing: h("div", { class: "empty", hidden: true }),
      busy: h("div", { class: "busy", role: "status", hidden: true }),
      chosen: h("div", { class: "chosen", role: "region", "aria-label": "Selection", hidden: true }),
      lasso: h("button", { class: "button", type: "button", "aria-pressed": "false", title: "Draw around points (l); or hold Shift", onclick: () => this.setLasso(!this.map.lassoing) }, "Lasso"),
      fit: h("button", { class: "button", type: "button", title: "Show all (0)", onclick: () => this.map.fit() }, "Fit"),
      all: h("button", { class: "button", type: "button", title: "Select all that is shown (a)", onclick: () => this.selection.add(this.list.ids) }, "Select all"),
      tools: h("button", { class: "button tools-switch", type: "button", "aria-expanded": "false", "aria-controls": "tools", onclick: () => this.tools() }, "Search & filter"),
    };
    if (!info.has_umap) p.projection.lastChild.disabled = true;
    p.views = ["grid", "map"].map((view) => h("button", {
      type: "button", "aria-pressed": "false", onclick: () => state.set("view", view === "grid" ? null : view, { push: true }),
    }, view === "grid" ? "Grid" : "Map"));
    p.finds = [["duplicates", "Near-duplicates"], ["outliers", "Outliers"], ["clusters", "Clusters"]].map(([key, text]) => h("button", {
      class: "button", type: "button", "aria-pressed": "false", "data-find": key,
      onclick: () => this.ask({ find: state.get("find") === key ? null : key }),
    }, text));
    const columnNames = columns.map((c) => h("button", {
      type: "button", class: "chip", title: `${c}: ${info.columns[c]}`, onclick: () => this.insertColumn(c),
    }, c));
    p.mapTools = h("section", { class: "tool" },
      h("h2", {}, "Map"),
      h("label", { for: "projection" }, "Layout"), p.projection,
      h("label", { for: "colour" }, "Colour by"), p.colour,
      h("label", { class: "checkbox" }, p.thumbs, "Thumbnails among many points"), p.legend);
    p.side = h("aside", { class: "tools", id: "tools", "aria-label": "Search and filter" },
      h("section", { class: "tool" }, h("h2", {}, "Search"), words || null,
        h("button", { class: "button wide", type: "button", onclick: () => file.click() }, "With an image …"), file,
        h("p", { class: "muted" }, "Or drop or paste one anywhere, or open any image here and take it, or a part of it."), p.query),
      h("section", { class: "tool" }, h("h2", {}, h("label", { for: "where" }, "Filter")), p.where, p.error,
        h("div", { class: "chips" }, ...columnNames), h("label", { for: "sort" }, "Order"), p.sort),
      h("section", { class: "tool" }, h("h2", {}, "Find"), h("div", { class: "stack" }, ...p.finds), p.find),
      p.mapTools);
    p.stage = h("div", { class: "stage" }, p.grid, p.map, p.groups, p.nothing, p.busy);
    this.element.append(p.side, h("div", { class: "store" },
      h("div", { class: "toolbar" }, p.tools, h("div", { class: "segmented", role: "group", "aria-label": "View" }, ...p.views), p.count,
        h("div", { class: "row end" }, p.lasso, p.fit, p.all)),
      p.stage, p.chosen));
    this.dropping();
  }

  tools(open = this.parts.tools.getAttribute("aria-expanded") !== "true") {
    this.parts.tools.setAttribute("aria-expanded", String(open));
    this.parts.side.classList.toggle("open", open);
  }

  insertColumn(name) {
    const { where } = this.parts;
    const quoted = /^\w+$/.test(name) ? name : `\`${name}\``;
    where.value = where.value.trim() ? `${where.value.trim()} AND ${quoted} ` : `${quoted} `;
    where.focus();
  }

  shortcuts() {
    const { keys } = this.app;
    const tab = { tab: "store" };
    keys.add("/", "write a filter", () => { this.tools(true); this.parts.where.focus(); }, tab);
    keys.add("g", "grid", () => this.state.set("view", null, { push: true }), tab);
    keys.add("m", "map", () => this.state.set("view", "map", { push: true }), tab);
    keys.add("l", "lasso on the map, on or off", () => this.setLasso(!this.map.lassoing), tab);
    keys.add("a", "select all that is shown", () => this.selection.add(this.list.ids), tab);
    keys.add("Escape", "clear the selection, then the search", () => {
      if (this.selection.count) this.selection.clear();
      else this.ask({});
    }, { ...tab, label: "Esc" });
    keys.note("arrows", "move in the grid, or pan the map", tab);
    keys.note("Space", "select the image; with Shift and arrows: several", tab);
    keys.note("Enter", "open the image", tab);
    keys.note("+ − 0", "zoom the map; show all", tab);
    keys.note("v", "select what is in view on the map", tab);
  }

  // ---- searching

  /** One question at a time: an image (near, box), words (text), or something to find. */
  ask({ near = null, box = null, text = null, find = null, file = null, group = null }) {
    this.upload = file;
    this.chosenOnly = false;
    const changed = Object.entries({ near, box, text, find, group }).map(([key, value], i) => this.state.set(key, value, { push: i === 0 }));
    if (this.parts.words && !text) this.parts.words.value = "";
    if (file || !changed.some(Boolean)) this.later();
  }

  searchFile(file) {
    this.parts.file.value = "";
    if (!file) return;
    if (!file.type.startsWith("image/")) this.app.toast(`${file.name} is no image.`, "error");
    else this.ask({ file: { blob: file, name: file.name || "pasted image", url: URL.createObjectURL(file), box: null } });
  }

  dropping() {
    const { element } = this;
    const here = () => this.app.tab === "store";
    document.addEventListener("paste", (event) => {
      const file = [...(event.clipboardData?.files ?? [])][0];
      if (file && here()) this.searchFile(file);
    });
    element.addEventListener("dragover", (event) => {
      if (!event.dataTransfer?.types.includes("Files")) return;
      event.preventDefault();
      element.classList.add("dropping");
    });
    element.addEventListener("dragleave", (event) => { if (!element.contains(event.relatedTarget)) element.classList.remove("dropping"); });
    element.addEventListener("drop", (event) => {
      event.preventDefault();
      element.classList.remove("dropping");
      this.searchFile(event.dataTransfer.files[0]);
    });
  }

  detail(id, upload = null) {
    openDetail(this.app, {
      id, upload, rows: this.rows, ids: this.list.ids, selection: this.selection,
      similar: (near, box) => this.ask({ near, box }),
      similarUpload: (box) => this.ask({ file: { ...upload, box } }),
    });
  }

  // ---- what is shown

  async update() {
    const { state, parts } = this;
    const turn = this.turn = (this.turn ?? 0) + 1;
    this.controls();
    try {
      const list = await this.fetchList(() => turn !== this.turn);
      if (turn !== this.turn) return;
      this.list = list;
      parts.error.hidden = true;
      parts.where.removeAttribute("aria-invalid");
    } catch (error) {
      if (turn !== this.turn) return;
      this.busy(null);
      if (!state.get("where") || !/filter|column/.test(error.message)) throw error;
      parts.error.textContent = error.message;
      parts.error.hidden = false;
      parts.where.setAttribute("aria-invalid", "true");
      this.tools(true); // on a small screen the sentence stands in the panel
      return;
    }
    this.busy(null);
    this.render();
    if (state.get("view") === "map") await this.renderMap(turn);
  }

  failed(error) {
    this.busy(null);
    if (error?.name !== "AbortError") this.app.fail(error);
  }

  async fetchList(stale) {
    const { state, info } = this;
    const where = state.get("where") ?? "";
    const find = state.get("find");
    if (this.chosenOnly) {
      return { ids: Uint32Array.from(this.selection.ids()), scores: null, groups: null, words: `${number(this.selection.count)} selected images` };
    }
    const filtered = where ? " that pass the filter" : "";
    if (this.upload || state.get("near") || state.get("text")) {
      const found = await this.search(where);
      return { ids: Uint32Array.from(found.ids), scores: found.scores, groups: null, words: `${number(found.ids.length)} most similar${filtered}` };
    }
    if (find === "outliers") {
      const found = await this.waitFor(`api/find/outliers?${new URLSearchParams({ where })}`, "Comparing every image with every other", stale);
      return { ids: Uint32Array.from(found.ids), scores: found.scores, groups: null, words: `${number(found.ids.length)} least like any other, with the mean similarity of their 5 nearest` };
    }
    if (find === "duplicates" || find === "clusters") {
      const option = find === "duplicates" ? { threshold: state.get("threshold") ?? "0.97" } : { k: state.get("k") ?? "12" };
      const words = find === "duplicates" ? "Comparing every image with every other" : "Clustering";
      const { groups } = await this.waitFor(`api/find/${find}?${new URLSearchParams({ where, ...option })}`, words, stale);
      const group = state.get("group");
      const ids = group === null ? groups.flat() : groups[Number(group)] ?? [];
      const kind = find === "clusters" ? "cluster" : "group";
      const text = group === null ? `${number(groups.length)} ${kind}${groups.length === 1 ? "" : "s"} · ${number(ids.length)} images` : `${kind} ${Number(group) + 1} · ${number(ids.length)} images`;
      return { ids: Uint32Array.from(ids), scores: null, groups, words: text };
    }
    const query = new URLSearchParams({ where, sort: state.get("sort") ?? "" });
    const ids = new Uint32Array(await (await this.app.api(`api/numbers?${query}`)).arrayBuffer());
    return { ids, scores: null, groups: null, words: where ? `${number(ids.length)} of ${number(info.count)} images` : `${number(ids.length)} images` };
  }

  async search(where) {
    const { state, upload } = this;
    const query = new URLSearchParams({ top: TOP, where });
    const box = upload ? upload.box : state.get("box");
    if (box) query.set("box", box);
    if (!upload && state.get("near") !== null) query.set("near", state.get("near"));
    else if (!upload) query.set("text", state.get("text"));
    return (await this.app.api(`api/search?${query}`, { method: "POST", body: upload?.blob ?? null })).json();
  }

  /** A long computation: asked for again until it is there; its progress is shown. */
  async waitFor(path, words, stale, parse = (response) => response.json()) {
    for (let wait = 150; ; wait = Math.min(1000, wait * 1.5)) {
      const response = await this.app.api(path);
      if (response.status !== 202) return parse(response);
      const { done, total, seconds } = await response.json();
      if (stale()) throw new DOMException("replaced", "AbortError");
      this.busy(`${words} … ${done ? `${Math.round((100 * done) / total)} %` : `${Math.round(seconds)} s`}`);
      await new Promise((resolve) => setTimeout(resolve, wait));
    }
  }

  busy(words) {
    this.parts.busy.hidden = words === null;
    this.parts.busy.textContent = words ?? "";
  }

  /** Controls say what the state is. */
  controls() {
    const { state, parts } = this;
    const value = (key, fallback = "") => state.get(key) ?? fallback;
    if (document.activeElement !== parts.where) parts.where.value = value("where");
    if (parts.words && document.activeElement !== parts.words) parts.words.value = value("text");
    for (const key of ["sort", "projection", "colour"]) parts[key].value = value(key);
    const map = value("view") === "map";
    parts.thumbs.checked = value("thumbs") !== "0";
    parts.views[0].setAttribute("aria-pressed", String(!map));
    parts.views[1].setAttribute("aria-pressed", String(map));
    for (const part of [parts.mapTools, parts.lasso, parts.fit]) part.hidden = !map;
    for (const button of parts.finds) button.setAttribute("aria-pressed", String(button.dataset.find === state.get("find")));
    parts.sort.disabled = Boolean(this.upload || state.get("near") || state.get("text") || state.get("find"));
    this.showQuery();
    this.showFind();
  }

  showQuery() {
    const { state, parts, upload } = this;
    const near = state.get("near");
    const text = state.get("text");
    if (!upload && near === null && !text) return parts.query.replaceChildren();
    const box = upload ? upload.box : state.get("box");
    const words = upload ? upload.name : near !== null ? this.rows.get(Number(near))?.name ?? `image ${near}` : `“${text}”`;
    const open = () => this.detail(upload ? null : Number(near), upload);
    const image = text ? null : h("button", { type: "button", class: "thumb", "aria-label": `Open ${words}`, onclick: open },
      h("img", { src: upload ? upload.url : thumb(near, 96), alt: "" }));
    const name = h("span", {}, words);
    const clear = h("button", { class: "icon", type: "button", "aria-label": "Clear the search", onclick: () => this.ask({}) }, "✕");
    parts.query.replaceChildren(h("div", { class: "query-chip" }, image, h("div", {}, name, box ? h("span", { class: "muted" }, "a part of it") : ""), clear));
    if (near !== null) this.rows.want([Number(near)]).then(() => { name.textContent = this.rows.get(Number(near))?.name ?? words; });
  }

  showFind() {
    const { state, parts } = this;
    const find = state.get("find");
    if (parts.find.dataset.shown === `${find}`) return;
    parts.find.dataset.shown = `${find}`;
    const slider = (key, words, properties, fallback, format) => {
      const shown = h("output", { for: key }, format(state.get(key) ?? fallback));
      const input = h("input", {
        type: "range", id: key, ...properties, value: state.get(key) ?? fallback,
        oninput: () => { shown.textContent = format(input.value); },
        onchange: () => { state.set("group", null); state.set(key, input.value); },
      });
      return h("div", { class: "slider" }, h("label", { for: key }, words, " ", shown), input);
    };
    const children = [];
    if (find === "duplicates") children.push(slider("threshold", "Similarity from", { min: 0.8, max: 1, step: 0.005 }, "0.97", (v) => Number(v).toFixed(3)));
    if (find === "clusters") children.push(slider("k", "Clusters", { min: 2, max: 60, step: 1 }, "12", String));
    parts.find.replaceChildren(...children);
  }

  render() {
    const { state, parts, list } = this;
    const map = state.get("view") === "map";
    const grouped = !map && list.groups !== null && state.get("group") === null;
    parts.count.textContent = list.words;
    const nothing = list.ids.length === 0;
    parts.nothing.hidden = !nothing;
    parts.grid.hidden = nothing || map || grouped;
    parts.groups.hidden = nothing || !grouped;
    parts.map.hidden = nothing || !map;
    parts.all.hidden = nothing;
    if (nothing) this.showNothing();
    else if (grouped) this.showGroups();
    else if (!map) this.grid.show(list.ids, list.scores);
  }

  showNothing() {
    const { state, parts } = this;
    const find = state.get("find");
    const [title, words, way, undo] = find === "duplicates"
      ? ["No near-duplicates", `No two images have a similarity of ${Number(state.get("threshold") ?? 0.97)} or more. Lower the threshold to find pairs that are less alike.`, "Try 0.90", () => state.set("threshold", "0.9")]
      : ["Nothing passes the filter", `No image has ${state.get("where") ?? "that"}. Change the filter, or take it away.`, "Clear the filter", () => state.set("where", null)];
    parts.nothing.replaceChildren(h("h2", {}, title), h("p", {}, words), h("button", { class: "button", type: "button", onclick: undo }, way));
    parts.find.dataset.shown = "";
    this.showFind();
  }

  showGroups() {
    const { parts, list, state } = this;
    const clusters = state.get("find") === "clusters";
    const MOST = 200;
    const cards = list.groups.slice(0, MOST).map((ids, index) => {
      const name = `${clusters ? "Cluster" : "Group"} ${index + 1}`;
      const [r, g, b] = PALETTE[index % 12];
      const images = ids.slice(0, clusters ? 14 : 10).map((id) => h("button", { type: "button", class: "thumb", "aria-label": `Open image ${id}`, onclick: () => this.detail(id) },
        h("img", { src: thumb(id, 128), alt: "", loading: "lazy" })));
      const swatch = h("span", { class: "swatch", "aria-hidden": "true" });
      swatch.style.background = `rgb(${r} ${g} ${b})`;
      return h("section", { class: "group", "aria-label": name },
        h("div", { class: "group-head" }, clusters ? swatch : null, h("h3", {}, name), h("span", { class: "muted" }, `${number(ids.length)} images`),
          h("div", { class: "row end" },
            h("button", { class: "button small", type: "button", onclick: () => state.set("group", index, { push: true }) }, "Show all"),
            h("button", { class: "button small", type: "button", onclick: () => this.selection.add(ids) }, "Select"),
            clusters ? null : h("button", { class: "button small", type: "button", title: "All but the first image, to remove them", onclick: () => this.selection.add(ids.slice(1)) }, "Select the copies"))),
        h("div", { class: "thumbs" }, ...images));
    });
    if (list.groups.length > MOST) cards.push(h("p", { class: "muted" }, `… and ${number(list.groups.length - MOST)} smaller groups; “Select all” takes them too.`));
    parts.groups.replaceChildren(...cards);
    parts.groups.scrollTop = 0;
  }

  // ---- the map

  async renderMap(turn) {
    const { state, list, map } = this;
    const stale = () => turn !== this.turn;
    const method = state.get("projection") === "umap" ? "umap" : "pca";
    if (!this.maps.has(method)) {
      if (method === "umap" && this.maps.has("pca") && map.xy.length === 0) map.show(this.maps.get("pca"));
      const words = method === "umap" ? "Computing the map by UMAP (the first time is the longest)" : "Computing the map";
      this.maps.set(method, await this.waitFor(`api/map?method=${method}`, words, stale, async (response) => new Float32Array(await response.arrayBuffer())));
    }
    if (stale()) return;
    this.busy(null);
    const { colourOf, legend } = await this.colouring();
    if (stale()) return;
    map.resize();
    const visible = new Uint8Array(this.info.count);
    const whole = Boolean(list.scores || list.groups);
    if (whole) visible.fill(1);
    else for (const id of list.ids) visible[id] = 1;
    map.thumbs = state.get("thumbs") !== "0";
    map.style(colourOf, visible);
    if (map.xy !== this.maps.get(method)) map.show(this.maps.get(method));
    this.showLegend(legend);
  }

  /** The colour of each image (null: dim), and the lines of the legend. */
  async colouring() {
    const { state, list, info } = this;
    const column = state.get("colour");
    if (column) {
      if (!this.columns.has(column)) this.columns.set(column, await (await this.app.api(`api/column/${encodeURIComponent(column)}`)).json());
      const found = this.columns.get(column);
      if (found.kind === "category") {
        const ids = (code) => found.codes.flatMap((c, id) => (c === code ? [id] : []));
        return { colourOf: (id) => PALETTE[found.codes[id]], legend: found.names.map(({ name, count }, code) => ({ name, count, colour: PALETTE[code], ids: () => ids(code) })) };
      }
      const known = found.values.filter((v) => v !== null);
      const [low, high] = [known.reduce((a, b) => Math.min(a, b), Infinity), known.reduce((a, b) => Math.max(a, b), -Infinity)];
      const at = (v) => (v - low) / (high - low || 1);
      return { colourOf: (id) => (found.values[id] === null ? null : ramp(at(found.values[id]))), legend: [0, 0.5, 1].map((t) => ({ name: number(Math.round((low + t * (high - low)) * 100) / 100), colour: ramp(t) })) };
    }
    if (list.groups && state.get("find") === "clusters" && state.get("group") === null) {
      const code = new Int32Array(info.count).fill(-1);
      list.groups.forEach((ids, index) => { for (const id of ids) code[id] = index; });
      return { colourOf: (id) => (code[id] < 0 ? null : PALETTE[code[id] % 12]), legend: list.groups.map((ids, i) => ({ name: `cluster ${i + 1}`, count: ids.length, colour: PALETTE[i % 12], ids: () => ids })) };
    }
    if (list.scores && !state.get("find")) {
      const score = new Map([...list.ids].map((id, i) => [id, list.scores[i]]));
      const [low, high] = [list.scores.at(-1) ?? 0, list.scores[0] ?? 1];
      return { colourOf: (id) => (score.has(id) ? ramp((score.get(id) - low) / (high - low || 1)) : null), legend: [1, 0].map((t) => ({ name: `similarity ${(low + t * (high - low)).toFixed(2)}`, colour: ramp(t) })) };
    }
    if (list.scores || list.groups) {
      const found = new Set(list.ids);
      return { colourOf: (id) => (found.has(id) ? PALETTE[1] : null), legend: [{ name: list.words, colour: PALETTE[1], ids: () => list.ids }] };
    }
    return { colourOf: () => PALETTE[0], legend: [] };
  }

  showLegend(lines) {
    this.parts.legend.replaceChildren(...lines.map(({ name, count, colour, ids }) => {
      const swatch = h("span", { class: "swatch", "aria-hidden": "true" });
      swatch.style.background = `rgb(${colour.join(" ")})`;
      const words = [swatch, h("span", { class: "name" }, name), count === undefined ? null : h("span", { class: "muted" }, number(count))];
      return h("li", {}, ids ? h("button", { type: "button", title: "Select these", onclick: () => this.selection.replace(ids()) }, ...words) : h("span", {}, ...words));
    }));
  }

  setLasso(on) {
    if (this.state.get("view") !== "map") return;
    this.map.lassoing = on;
    this.parts.lasso.setAttribute("aria-pressed", String(on));
    this.map.box.classList.toggle("lassoing", on);
  }

  keepPlace(view) {
    const { x, y, scale } = view;
    this.state.set("at", [x.toFixed(4), y.toFixed(4), scale.toPrecision(5)].join(","));
  }
  restorePlace() {
    const found = (this.state.get("at") ?? "").split(",").map(Number);
    if (found.length === 3 && found.every(Number.isFinite) && found[2] > 0) this.map.view = { x: found[0], y: found[1], scale: found[2] };
  }

  // ---- the selection

  showSelection() {
    const { selection, parts } = this;
    parts.chosen.hidden = selection.count === 0;
    if (!selection.count) return;
    const button = (text, fn, kind = "") => h("button", { class: `button ${kind}`, type: "button", onclick: fn }, text);
    if (!parts.chosenCount) {
      parts.chosenCount = h("p", { role: "status" });
      parts.chosen.append(parts.chosenCount,
        button("Show", () => this.showChosen()),
        h("div", { class: "row end" }, h("span", { class: "muted wide-only" }, "Save as"),
          ...["csv", "json", "parquet"].map((form) => button(form === "parquet" ? "Parquet" : form.toUpperCase(), () => this.export(form).catch(this.app.fail))),
          button("Clear", () => selection.clear())));
    }
    parts.chosenCount.textContent = `${number(selection.count)} selected`;
  }

  showChosen() {
    this.chosenOnly = true;
    this.state.set("view", null, { push: true });
    this.later();
  }

  async export(format) {
    const method = this.state.get("projection") === "umap" ? "umap" : "pca";
    const response = await this.app.api("api/export", {
      method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify({ ids: this.selection.ids(), format, method }),
    });
    save(await response.blob(), `selection.${format}`);
    this.app.toast(`${number(this.selection.count)} images saved as selection.${format}`);
  }
}
