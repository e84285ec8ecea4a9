// A grid of thumbnails over any number of images: only the tiles in sight exist. A listbox for the keyboard and screen readers.
import { debounced, h, thumb } from "./dom.js";

const GAP = 8;
const MARGIN = 2; // rows above and below that are kept ready

/** Which images are chosen: a byte for each. `on(fn)` is called after every change. */
export class Selection {
  constructor(size) {
    this.mask = new Uint8Array(size);
    this.count = 0;
    this.listeners = [];
  }
  has(id) { return this.mask[id] === 1; }
  ids() {
    const found = [];
    for (let i = 0; i < this.mask.length; i++) if (this.mask[i]) found.push(i);
    return found;
  }
  on(fn) { this.listeners.push(fn); }
  change(ids, value) {
    for (const id of ids) {
      if (this.mask[id] !== value) {
        this.mask[id] = value;
        this.count += value ? 1 : -1;
      }
    }
    for (const fn of this.listeners) fn();
  }
  add(ids) { this.change(ids, 1); }
  remove(ids) { this.change(ids, 0); }
  toggle(id) { this.change([id], this.has(id) ? 0 : 1); }
  replace(ids) {
    this.mask.fill(0);
    this.count = 0;
    this.change(ids, 1);
  }
  clear() { this.replace([]); }
}

export class Grid {
  /** rows: an object with get(id) → row or null, and want(ids) → Promise; open(id): what Enter and a click do. */
  constructor(element, { rows, selection, open }) {
    Object.assign(this, { rows, selection, open });
    this.ids = new Uint32Array(0);
    this.scores = null;
    this.active = 0;
    this.tiles = new Map();
    this.space = h("div", { class: "grid-space", role: "presentation" });
    this.box = h("div", {
      class: "grid", role: "listbox", tabindex: 0, "aria-multiselectable": "true", "aria-label": "Images",
      onkeydown: (event) => this.key(event), onscroll: () => this.draw(),
    }, this.space);
    element.append(this.box);
    this.name = debounced(() => this.fetchNames(), 60);
    new ResizeObserver(() => this.draw()).observe(this.box);
    selection.on(() => this.mark());
  }

  /** Shows these images, in this order; scores, if given, one for each. */
  show(ids, scores = null) {
    this.ids = ids;
    this.scores = scores;
    this.active = 0;
    for (const tile of this.tiles.values()) tile.remove();
    this.tiles.clear();
    this.box.scrollTop = 0;
    this.box.removeAttribute("aria-activedescendant");
    this.draw();
  }

  measure() {
    const width = this.box.clientWidth - 2 * GAP;
    this.columns = Math.max(2, Math.floor((width + GAP) / (150 + GAP)));
    if (width < 420) this.columns = 3;
    this.side = Math.floor((width - GAP * (this.columns - 1)) / this.columns);
    this.lines = Math.ceil(this.ids.length / this.columns);
  }

  draw() {
    if (!this.box.clientWidth) return;
    this.measure();
    const step = this.side + GAP;
    this.space.style.height = `${this.lines * step + GAP}px`;
    const first = Math.max(0, Math.floor(this.box.scrollTop / step) - MARGIN) * this.columns;
    const rowsSeen = Math.ceil(this.box.clientHeight / step) + 2 * MARGIN + 1;
    const last = Math.min(this.ids.length, first + rowsSeen * this.columns);
    for (const [place, tile] of this.tiles) {
      if (place < first || place >= last) {
        tile.remove();
        this.tiles.delete(place);
      }
    }
    for (let place = first; place < last; place++) {
      let tile = this.tiles.get(place);
      if (!tile) {
        tile = this.tile(place);
        this.tiles.set(place, tile);
        this.space.append(tile);
      }
      const [line, column] = [Math.floor(place / this.columns), place % this.columns];
      tile.style.cssText = `width:${this.side}px;height:${this.side}px;transform:translate(${GAP + column * step}px,${GAP + line * step}px)`;
    }
    this.name();
  }

  tile(place) {
    const id = this.ids[place];
    const image = h("img", { src: thumb(id, 192), alt: "", draggable: "false", decoding: "async" });
    const tile = h("div", {
      class: "tile", role: "option", id: `tile-${place}`, "aria-setsize": this.ids.length, "aria-posinset": place + 1,
      "aria-selected": String(this.selection.has(id)), onclick: (event) => this.click(event, place),
    }, image, h("span", { class: "check", "aria-hidden": "true" }, "✓"));
    image.addEventListener("error", () => {
      tile.classList.add("broken");
      image.remove();
      tile.append(h("span", { class: "reason" }, "cannot be read"));
    });
    if (this.scores) tile.append(h("span", { class: "score" }, this.scores[place].toFixed(2)));
    this.label(tile, place);
    return tile;
  }

  label(tile, place) {
    const row = this.rows.get(this.ids[place]);
    const words = row ? row.name : `image ${this.ids[place]}`;
    const score = this.scores ? `, similarity ${this.scores[place].toFixed(2)}` : "";
    tile.setAttribute("aria-label", words + score);
    tile.title = words;
  }

  async fetchNames() {
    await this.rows.want([...this.tiles.keys()].map((place) => this.ids[place]));
    for (const [place, tile] of this.tiles) this.label(tile, place);
  }

  mark() {
    for (const [place, tile] of this.tiles) tile.setAttribute("aria-selected", String(this.selection.has(this.ids[place])));
  }

  click(event, place) {
    const before = this.active;
    this.move(place, false);
    if (event.shiftKey) {
      const [from, to] = [Math.min(before, place), Math.max(before, place)];
      this.selection.add(this.ids.subarray(from, to + 1));
    } else if (event.target.closest(".check") || event.ctrlKey || event.metaKey) this.selection.toggle(this.ids[place]);
    else this.open(this.ids[place]);
  }

  /** Makes a place the active one, in sight. */
  move(place, shown = true) {
    this.tiles.get(this.active)?.classList.remove("active");
    this.active = Math.max(0, Math.min(this.ids.length - 1, place));
    const step = this.side + GAP;
    const top = Math.floor(this.active / this.columns) * step;
    if (top < this.box.scrollTop) this.box.scrollTop = top;
    else if (top + step + GAP > this.box.scrollTop + this.box.clientHeight) this.box.scrollTop = top + step + GAP - this.box.clientHeight;
    this.draw();
    if (shown) this.tiles.get(this.active)?.classList.add("active");
    this.box.setAttribute("aria-activedescendant", `tile-${this.active}`);
  }

  key(event) {
    if (!this.ids.length || event.ctrlKey || event.metaKey || event.altKey) return;
    const page = Math.max(1, Math.floor(this.box.clientHeight / (this.side + GAP))) * this.columns;
    const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: this.columns, ArrowUp: -this.columns, PageDown: page, PageUp: -page };
    const before = this.active;
    if (event.key in steps) this.move(this.active + steps[event.key]);
    else if (event.key === "Home") this.move(0);
    else if (event.key === "End") this.move(this.ids.length - 1);
    else if (event.key === " ") this.selection.toggle(this.ids[this.active]);
    else if (event.key === "Enter") this.open(this.ids[this.active]);
    else return;
    if (event.shiftKey && event.key in steps) {
      this.selection.add(this.ids.subarray(Math.min(before, this.active), Math.max(before, this.active) + 1));
    }
    event.preventDefault();
  }
}

/** Rows of the store by number, fetched some at a time and cached. */
export class Rows {
  constructor(app) {
    this.app = app;
    this.found = new Map();
    this.asked = new Map(); // id → the promise of its row
  }
  get(id) { return this.found.get(id) ?? null; }
  async want(ids) {
    const wanted = [...new Set(ids)].filter((id) => !this.found.has(id));
    const missing = wanted.filter((id) => !this.asked.has(id)).slice(0, 1000);
    if (missing.length) {
      const fetched = this.fetch(missing).finally(() => { for (const id of missing) this.asked.delete(id); });
      for (const id of missing) this.asked.set(id, fetched);
    }
    await Promise.all(new Set(wanted.map((id) => this.asked.get(id))));
  }
  async fetch(ids) {
    const response = await this.app.api("api/rows", {
      method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify({ ids }),
    });
    for (const row of await response.json()) this.found.set(row.id, row);
  }
}
