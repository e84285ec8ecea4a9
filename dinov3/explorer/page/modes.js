// What the image view can show, a class a mode. The view has the images, their features, the query and the clicks; a mode draws over
// the images, fills the panel, and takes hovers, clicks and strokes on cells (row·w + column of a tile's grid).

import { button, check, choice, note, row, slider } from "./controls.js";
import { h } from "./dom.js";
import { along, heat, largest, meanDirection, quantile, rainbow, spread, veil } from "./maths.js";
import { cellsOf } from "./places.js";
import { drawn } from "./tile.js";

// The defaults; also a mode without any map.
export class Mode {
  get tools() { return []; } // [[tool, title], …] of tile.js; the first is the default
  constructor(view) { this.view = view; }
  shown(images) { return images; }
  draw(tiles) { // → how many maps were computed
    for (const tile of tiles) {
      tile.draw(null);
      tile.value.textContent = "";
    }
    return 0;
  }
  marks() { return {}; }
  hover() {}
  click() {}
  clear() {}
  leave() {}
  layout() {}
  spoken() { return []; }
}

export class Similarity extends Mode {
  title = "Similarity";
  about = "Where do patches resemble this one?";
  get tools() { return [["point", "Patch"], ["box", "Box"], ["brush", "Brush"]]; }

  hint(touch) {
    const { query, tool } = this.view;
    if (tool !== "point") return query ? "Drag again to change it, Esc clears." : `Drag a ${tool === "box" ? "box" : "stroke"} over something.`;
    if (query) return touch ? "Pinned. Touch another patch." : "Pinned. Esc follows the pointer again.";
    return touch ? "Touch a patch." : "Move over an image. A click pins the patch.";
  }

  panel() {
    const { view } = this, cells = view.queryCells().length;
    return [choice("Tool", this.tools, view.tool, (tool) => view.useTool(tool)), view.tool === "brush" ? view.brushField() : null,
      h("div", { class: "legend", "aria-hidden": "true" }, h("span", {}, "unlike"), h("span", { class: "ramp" }), h("span", {}, "alike")),
      view.query ? row(`Query: ${cells === 1 ? "one patch" : `${cells} patches`} `, button("Clear", () => view.clear(), { "data-name": "clear" })) : null];
  }

  get query() { return this.view.hovered ?? this.view.query; }

  hover(tile, cell, how) {
    const { view } = this, live = view.tool === "point" && (!view.query || how === "touch");
    if (live) view.hovered = view.placeOf(tile, cell);
  }

  click(tile, cell) {
    this.view.setQuery(this.view.placeOf(tile, cell));
    this.view.say(`Pinned: ${this.view.where(tile, cell)}`);
  }

  clear() { this.view.setQuery(null); }

  draw(tiles) {
    const { view, query } = this, source = query && view.of(query.image), cells = source ? cellsOf(query, source) : [];
    this.maps = new Map();
    if (!cells.length) return super.draw(tiles);
    const vector = meanDirection(source, cells);
    for (const tile of tiles) this.maps.set(tile.id, along(view.of(tile.id), vector));
    // one scale for all images, so that their brightness compares
    const values = [...this.maps.values()], low = quantile(values, 0.4), high = Math.max(low + 0.05, quantile(values, 0.998));
    for (const tile of tiles) {
      const map = this.maps.get(tile.id), under = view.under?.tile === tile ? view.under.cell : null;
      tile.draw(heat(map, low, high), view.opacity, !view.sharp);
      tile.value.textContent = view.query && !view.hovered && under !== null ? map[under].toFixed(2)
        : tile.id === query.image ? "query" : `best ${map[largest(map)].toFixed(2)}`;
    }
    return tiles.length;
  }

  marks(tile) {
    const { query } = this, map = this.maps?.get(tile.id);
    if (query?.image === tile.id) return { query: cellsOf(query, tile.grid) };
    return { best: map ? largest(map) : null };
  }

  spoken(tile, cell) {
    const { view, maps } = this;
    if (view.query && !view.hovered && maps?.has(tile.id)) return [`cosine ${maps.get(tile.id)[cell].toFixed(2)}`];
    return [...(maps ?? [])].filter(([id]) => id !== tile.id).slice(0, 3).map(
      ([id, map]) => `${view.nameOf(id)} best ${map[largest(map)].toFixed(2)}`);
  }
}

export class Foreground extends Mode {
  title = "Foreground";
  about = "Object or background, by a few clicks.";
  label = 1;

  hint() {
    return this.view.points.some((p) => p.label) ? "More clicks make it better; a click on a mark removes it." : "Click on the object.";
  }

  panel() {
    const { view } = this, { points } = view, inside = points.filter((p) => p.label).length, outside = points.length - inside;
    return [choice("What a click marks", [[1, "+ Object"], [0, "− Background"]], this.label, (label) => { this.label = label; view.buildPanel(); }),
      matchMedia("(hover: none)").matches ? null : note("Right-click or Shift-click marks the other one."),
      h("p", {}, points.length ? `${inside} object, ${outside} background` : "No click yet."),
      inside && !outside ? note("Until a patch of the background is marked, the patches least like yours count as background.") : null,
      points.length ? row(button("Undo", () => view.setPoints(points.slice(0, -1)), { "data-name": "undo" }),
        button("Clear", () => this.clear(), { "data-name": "clear" })) : null];
  }

  click(tile, cell, event) {
    const { view } = this, label = event.button === 2 || event.shiftKey ? 1 - this.label : this.label;
    const there = view.points.findIndex((p) => p.image === tile.id && cellsOf(p, tile.grid)[0] === cell);
    if (there >= 0) view.setPoints(view.points.filter((_, i) => i !== there)); // a second click takes it away
    else view.setPoints([...view.points, { ...view.placeOf(tile, cell), label }]);
    view.say(there >= 0 ? "Click removed" : `${label ? "Object" : "Background"}: ${view.where(tile, cell)}`);
  }

  clear() { this.view.setPoints([]); }

  draw(tiles) {
    const { view } = this, points = view.cellsOfPoints(), wanted = JSON.stringify([points, view.features()]);
    if (!points.some((p) => p[3])) {
      this.found = null;
      return super.draw(tiles);
    }
    if (this.wanted !== wanted) this.fit(points, wanted);
    if (this.found?.features !== JSON.stringify(view.features())) return 0;
    for (const tile of tiles) {
      const { colours, share } = veil(along(view.of(tile.id), this.found.weight), this.found.bias);
      tile.draw(colours, view.opacity, !view.sharp);
      tile.value.textContent = `${Math.round(100 * share)} % object`;
    }
    return tiles.length;
  }

  async fit(points, wanted) {
    this.wanted = wanted;
    const features = JSON.stringify(this.view.features());
    try {
      const { weight, bias } = await this.view.post("api/foreground", { points });
      if (this.wanted !== wanted) return; // another click meanwhile
      this.found = { weight: Float32Array.from(weight), bias, features };
    } catch (error) {
      this.found = null;
      this.view.app.toast(error.message, "error");
    }
    this.view.refresh();
  }

  marks(tile) {
    return { points: this.view.points.filter((p) => p.image === tile.id).map((p) => [cellsOf(p, tile.grid)[0], p.label]) };
  }
}

export class Pca extends Mode {
  title = "PCA";
  about = "The strongest directions of the features as colours.";

  hint() { return this.view.images.length > 1 ? "One colour means the same in all images." : ""; }

  get last() { return Math.max(0, (this.found?.directions.length ?? 12) - 3); }

  get first() { return Math.min(this.view.first, this.last); }

  panel() {
    const { view } = this, field = slider("Components", { min: 0, max: this.last }, (value) => {
      view.set({ first: value });
      bars.replaceChildren(...this.bars());
    }, (value) => `${value + 1} to ${value + 3}`);
    field.set(this.first);
    const bars = h("ul", { class: "bars" }, ...this.bars()), inside = view.points.some((p) => p.label);
    const only = check("Only the object of Foreground", (on) => view.set({ only: on }), view.only && inside);
    only.input.disabled = !inside;
    return [field.element, bars, only.element, inside ? null : note("Mark an object in Foreground to colour it alone.")];
  }

  bars() {
    return ["red", "green", "blue"].filter(() => this.found).map((colour, i) => {
      const share = this.found.share[this.first + i], fill = h("span", { class: `bar-fill ${colour}` });
      fill.style.width = `${Math.max(2, 100 * (share / this.found.share[0]))}%`;
      return h("li", {}, h("span", {}, `${this.first + i + 1} ${colour}`), h("span", { class: "bar-track" }, fill),
        h("span", { class: "bar-value" }, `${(100 * share).toFixed(1)} %`));
    });
  }

  draw(tiles) {
    const { view } = this, wanted = JSON.stringify([view.images, view.features(), view.only && view.cellsOfPoints()]);
    if (tiles.length === view.images.length && tiles.length && this.wanted !== wanted) this.fit(wanted);
    if (!tiles.length || this.found?.features !== JSON.stringify(view.features())) return super.draw(tiles);
    const { inside } = this.found;
    for (const tile of tiles) {
      const features = view.of(tile.id), mask = inside && along(features, inside.weight).map((value) => value + inside.bias);
      tile.draw(rainbow(features, this.found, this.first, mask), view.opacity, !view.sharp);
      tile.value.textContent = "";
    }
    return tiles.length;
  }

  async fit(wanted) {
    const { view } = this, features = JSON.stringify(view.features()), points = view.only ? view.cellsOfPoints() : [];
    this.wanted = wanted;
    try {
      const found = await view.post("api/pca", { images: view.images, components: 12, points });
      if (this.wanted !== wanted) return;
      found.directions = found.directions.map((d) => Float32Array.from(d));
      if (found.inside) found.inside.weight = Float32Array.from(found.inside.weight);
      this.found = { ...found, features };
      view.buildPanel();
    } catch (error) {
      this.found = null;
      view.app.toast(error.message, "error");
    }
    view.refresh();
  }
}

export class Matches extends Mode {
  title = "Matches";
  about = "What of one image is in another.";
  count = 60;
  plane = false;

  shown(images) { return images.slice(0, 2); }

  hint(touch) {
    return this.view.images.length < 2 ? "Choose a second image below." : `${touch ? "Touch" : "Move over"} a patch to see its lines.`;
  }

  panel() {
    const { view } = this, { images } = view;
    if (images.length < 2) return [h("p", {}, "Lines join two images: choose a second one below.")];
    const side = (title, at) => {
      const select = h("select", { "aria-label": title, "data-name": title, onchange: () => {
        const order = [...images], other = order.indexOf(Number(select.value));
        [order[at], order[other]] = [order[other], order[at]];
        view.choose(order);
      } }, ...images.map((id) => h("option", { value: id, selected: id === images[at] }, view.nameOf(id))));
      return h("label", { class: "field" }, h("span", {}, title), select);
    };
    const count = slider("Lines", { min: 5, max: 200, step: 5 }, (value) => { this.count = value; this.layout(); }, String);
    count.set(this.count);
    const found = this.current, plane = check("Only lines that agree with one plane", (on) => { this.plane = on; this.layout(); }, this.plane);
    const sentence = this.failed ? "" : !found ? "Matching…" : !found.lines.length ? "No patch of one image is the best match of one in the other."
      : `${found.total} patches are each other's best match.${found.agree ? ` ${found.agree} agree with one plane.` : ""}`;
    return [side("Left", 0), side("Right", 1), count.element, found?.agree ? plane.element : null, note(sentence)];
  }

  get key() { return JSON.stringify([this.shown(this.view.images), this.view.features()]); }

  get current() { return this.found?.key === this.key ? this.found : null; }

  draw(tiles) {
    super.draw(tiles);
    this.layout();
    return 0;
  }

  async fit() {
    const { key } = this, [left, right] = this.view.images;
    if (this.wanted === key) return;
    this.wanted = key;
    this.failed = false;
    try {
      const found = await this.view.post("api/match", { left, right });
      if (this.wanted !== key) return;
      this.found = { ...found, key };
    } catch (error) {
      this.failed = true;
      this.view.app.toast(error.message, "error");
    }
    if (this.view.mode === this) {
      this.view.buildPanel();
      this.layout();
    }
  }

  // The lines lie over both tiles, so they are drawn again when those move.
  layout() {
    const { view } = this, [a, b] = view.order(), parts = [];
    if (a?.grid && b?.grid && view.of(a.id) && view.of(b.id)) {
      this.fit();
      const lines = this.current ? spread(this.plane ? this.current.lines.filter((line) => line[5]) : this.current.lines, this.count, a.grid) : [];
      const box = view.board.getBoundingClientRect(), near = this.nearUnder(a), some = lines.some(near);
      for (const line of lines) {
        const p = a.clientOf(line[0], line[1]), q = b.clientOf(line[2], line[3]);
        if (!p.visible || !q.visible) continue;
        const hue = Math.round(330 * (0.35 * (line[0] / a.grid.h) + 0.65 * (line[1] / a.grid.w)));
        const group = drawn("g", { class: some ? (near(line) ? "line near" : "line far") : "line", stroke: `hsl(${hue} 85% 62%)` });
        const [x1, y1, x2, y2] = [p.x - box.left, p.y - box.top, q.x - box.left, q.y - box.top];
        group.append(drawn("line", { x1, y1, x2, y2 }), drawn("circle", { cx: x1, cy: y1, r: 3 }), drawn("circle", { cx: x2, cy: y2, r: 3 }));
        parts.push(group);
      }
      a.value.textContent = lines.length ? `${lines.length} lines` : "";
    }
    view.lines.replaceChildren(...parts);
  }

  // Whether a line begins or ends next to the pointer.
  nearUnder(left) {
    const { under } = this.view;
    if (!under?.tile.grid) return () => false;
    const { w } = under.tile.grid, r = Math.floor(under.cell / w), c = under.cell % w, at = under.tile === left ? 0 : 2;
    return (line) => Math.abs(line[at] - r) <= 1 && Math.abs(line[at + 1] - c) <= 1;
  }

  leave() { this.view.lines.replaceChildren(); }

  spoken() {
    const [left] = this.view.order(), near = this.nearUnder(left), name = this.view.under.tile === left ? 2 : 0;
    const line = this.current?.lines.find(near);
    return [line ? `its match: row ${line[name] + 1}, column ${line[name + 1] + 1}, cosine ${line[4].toFixed(2)}` : "no match here"];
  }
}
