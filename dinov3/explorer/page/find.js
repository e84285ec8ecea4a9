// A mode of the image view: something painted in one image, found in all of them. Results come one by one and can be stopped.

import { button, choice, note, row, slider } from "./controls.js";
import { h, number, thumb } from "./dom.js";
import { Mode } from "./modes.js";
import { cellsOf } from "./places.js";
import { area, drawn, outline } from "./tile.js";

export class Find extends Mode {
  title = "Find";
  about = "Paint something once and find it in all images.";
  least = null; // the chosen likeness
  search = null; // {image, found, done, …}

  get tools() { return this.search ? [] : [["brush", "Brush"], ["erase", "Eraser"], ["box", "Box"]]; }

  shown(images) { return this.search ? [this.search.image] : images; }

  hint() {
    return this.search ? "" : this.view.query && this.view.query.kind !== "point" ? "Shift-drag moves a zoomed image." : "Paint all of something in one of the images: the rest counts as its surroundings.";
  }

  marks(tile) {
    const { query } = this.view;
    return { query: query?.image === tile.id && query.kind !== "point" ? cellsOf(query, tile.grid) : [] };
  }

  panel() {
    const { view, search } = this, cells = view.query?.kind === "point" ? 0 : view.queryCells().length, all = view.app.info.count;
    if (!search) {
      return [choice("Tool", this.tools, view.toolOf(this), (tool) => view.useTool(tool)), view.brushField(),
        row(button(all === 1 ? "Find in this image" : `Find in all ${number(all)} images`, () => this.start(),
          { class: "button primary", "data-name": "find", disabled: !cells }),
        cells ? button("Clear", () => view.clear(), { class: "button", "data-name": "clear" }) : null)];
    }
    this.status = h("p", { role: "status" });
    this.bar = h("progress", { max: all, "aria-label": "Images searched" });
    this.score = slider("Likeness", { min: 0, max: 1, step: 0.01 }, (value) => { this.least = value; this.filter(); }, (value) => `at least ${value.toFixed(2)}`);
    const parts = [this.status, search.running ? this.bar : null, this.score.element, note("A click on a result adds it to the images of the view."),
      row(search.running ? button("Stop", () => search.control.abort(), { class: "button", "data-name": "stop" }) : null,
        button("Change the example", () => this.end(), { class: "button", "data-name": "change" }))];
    this.filter();
    return parts;
  }

  clear() {
    if (this.search) this.end();
    else this.view.setQuery(null);
  }

  leave() {
    this.search?.control.abort();
    this.search = null;
    this.view.results.hidden = true;
    this.view.results.replaceChildren();
  }

  end() {
    this.leave();
    this.view.update();
  }

  async start() {
    const { view } = this, cells = view.queryCells(), { image } = view.query, control = new AbortController();
    const search = { image, control, done: 0, failed: 0, found: [], running: true };
    this.search = search;
    this.least = null;
    view.results.hidden = false;
    view.update();
    try {
      const response = await view.send("api/example", { image, cells }, control.signal);
      const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
      for (let rest = ""; ;) {
        const { done, value } = await reader.read();
        if (done || this.search !== search) break;
        const rows = (rest + value).split("\n");
        rest = rows.pop();
        for (const one of rows) this.add(search, JSON.parse(one));
        this.filter();
      }
    } catch (error) {
      if (error.name !== "AbortError") view.app.toast(error.message, "error");
    }
    search.running = false;
    if (this.search === search) view.buildPanel();
  }

  // Results from the least score on are shown; unless it was chosen it is four fifths of the example's own.
  filter() {
    const { search } = this, own = search.found.find(({ image }) => image === search.image)?.score ?? 0, least = this.least ?? 0.8 * own;
    const shown = search.found.filter(({ score }) => score >= least).length;
    [...this.view.results.children].forEach((card, at) => { card.hidden = at >= shown; }); // they stand in the order of their scores
    this.score.set(least);
    this.bar.value = search.done;
    this.status.textContent = `${search.running ? "Searching: found" : "Found"} in ${number(shown)} of ${number(search.done)} images${
      search.failed ? `, ${number(search.failed)} unreadable` : ""}.`;
  }

  // One image's result: {image, name, grid, cells, score} or {image, error}; the best stand first.
  add(search, result) {
    const { view } = this;
    search.done++;
    if (result.error) search.failed++;
    if (!result.cells?.length) return;
    const [rows, w] = result.grid, grid = { h: rows, w }, share = Math.round((100 * result.cells.length) / (rows * w));
    const mask = drawn("svg", { class: "found", viewBox: `0 0 ${w} ${rows}`, preserveAspectRatio: "none", "aria-hidden": "true" });
    mask.append(drawn("path", { class: "found-area", d: area(result.cells, grid) }), drawn("path", { d: outline(result.cells, grid) }));
    const chosen = () => String(view.images.includes(result.image));
    const card = h("button", { type: "button", class: "result", title: result.name, "aria-pressed": chosen(), onclick: () => {
      view.toggle(result.image);
      card.setAttribute("aria-pressed", chosen());
    } }, h("span", { class: "result-image" }, h("img", { alt: "", loading: "lazy", src: thumb(result.image, 320) }), mask),
    h("span", { class: "result-name" }, result.name.split("/").pop()), h("span", { class: "muted" }, `${result.score.toFixed(2)} · ${share} %`));
    const at = search.found.findIndex((other) => other.score < result.score);
    search.found.splice(at < 0 ? search.found.length : at, 0, result);
    view.results.insertBefore(card, at < 0 ? null : view.results.children[at]);
  }
}
