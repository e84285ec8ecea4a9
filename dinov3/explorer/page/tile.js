// One image of the image view: the image, a map over it, marks, zoom; pointer, touch and keys become events on patches.
// A cell is row·w + column of the patch grid. Events (functions of `on`): hover(tile, cell, how), leave(tile),
// click(tile, cell, event), draw(tile, cells, first), drawn(tile), cancel(tile), moved(tile), remove(tile).

import { h } from "./dom.js";

const SVG = "http://www.w3.org/2000/svg";
const MOST_ZOOM = 16;
const SIDES = [384, 768, 1536, 4096]; // px of images from the server

export function drawn(tag, attributes) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}

// The outline of a set of cells, as a path in units of patches.
export function outline(cells, { h, w }) {
  const set = new Set(cells);
  let path = "";
  for (const cell of set) {
    const r = Math.floor(cell / w), c = cell % w;
    if (r === 0 || !set.has(cell - w)) path += `M${c} ${r}h1`;
    if (r === h - 1 || !set.has(cell + w)) path += `M${c} ${r + 1}h1`;
    if (c === 0 || !set.has(cell - 1)) path += `M${c} ${r}v1`;
    if (c === w - 1 || !set.has(cell + 1)) path += `M${c + 1} ${r}v1`;
  }
  return path;
}

export function area(cells, { w }) {
  return cells.map((cell) => `M${cell % w} ${Math.floor(cell / w)}h1v1h-1z`).join("");
}

export class Tile {
  constructor(id, name, on) {
    this.id = id;
    this.on = on;
    this.grid = null; // {h, w}
    this.aspect = 4 / 3;
    this.tool = "point"; // or "brush", "erase", "box"
    this.radius = 1;
    this.side = 0;
    this.cursor = null;
    this.k = 1; this.x = 0; this.y = 0; // zoom, and where the content's corner lies
    this.width = this.height = 0;
    this.pointers = new Map();

    this.image = h("img", { alt: "", draggable: "false", onload: () => this.#loaded() });
    this.image.addEventListener("error", () => { this.image.hidden = true; });
    this.map = h("canvas", { class: "shot-map", "aria-hidden": "true" });
    this.marks = drawn("svg", { class: "shot-marks", preserveAspectRatio: "none", "aria-hidden": "true" });
    this.content = h("div", { class: "shot-content" }, this.image, this.map, this.marks);
    this.note = h("div", { class: "shot-note", hidden: true });
    this.view = h("div", { class: "shot-view", tabindex: 0, role: "application",
      "aria-roledescription": "image with a patch cursor" }, this.content, this.note);
    this.caption = h("span", { class: "shot-name" });
    this.value = h("span", { class: "shot-value" });
    const button = (text, label, action) => h("button", { type: "button", class: "shot-button",
      title: label, "aria-label": label, onclick: action }, text);
    this.buttons = h("span", { class: "shot-buttons" },
      button("−", "Zoom out", () => this.zoom(this.k / 1.6)), button("+", "Zoom in", () => this.zoom(this.k * 1.6)),
      button("×", `Remove ${name} from the view`, () => this.on.remove(this)));
    this.element = h("figure", { class: "shot" }, this.view,
      h("figcaption", {}, this.caption, this.value, this.buttons));
    this.rename(name);
    this.#listen();
  }

  rename(name) {
    this.name = name;
    this.caption.textContent = name;
    this.caption.title = name;
    this.#label();
  }

  #label() {
    const grid = this.grid ? `, ${this.grid.h} rows by ${this.grid.w} columns of patches` : "";
    this.view.setAttribute("aria-label", `${this.name}${grid}. Arrow keys move the patch cursor, Enter chooses, plus and minus zoom.`);
  }

  #loaded() {
    const aspect = this.image.naturalWidth / this.image.naturalHeight || 4 / 3;
    if (Math.abs(aspect - this.aspect) > 0.01 && !this.fixed) {
      this.aspect = aspect;
      this.on.moved(this, true);
    }
  }

  // ---- what it shows ---------------------------------------------------------------------------------------------

  place(width, height) {
    this.width = width;
    this.height = height;
    this.element.style.width = `${width}px`;
    this.view.style.width = `${width}px`;
    this.view.style.height = `${height}px`;
    this.#move(this.k, this.x, this.y);
  }

  useGrid(grid, imageAspect) {
    this.grid = grid;
    this.aspect = imageAspect;
    this.fixed = true;
    this.map.width = grid.w;
    this.map.height = grid.h;
    this.marks.setAttribute("viewBox", `0 0 ${grid.w} ${grid.h}`);
    if (this.cursor !== null) this.cursor = Math.min(this.cursor, grid.h * grid.w - 1);
    this.#label();
    this.ready();
  }

  wait(text) {
    this.element.setAttribute("aria-busy", "true");
    this.note.replaceChildren(h("span", { class: "spinner", "aria-hidden": "true" }), text);
    this.note.className = "shot-note";
    this.note.hidden = false;
  }

  fail(text, again) {
    this.element.removeAttribute("aria-busy");
    this.failed = true;
    this.note.replaceChildren(h("p", {}, text), h("button", { type: "button", class: "button small", onclick: again }, "Try again"));
    this.note.className = "shot-note failed";
    this.note.hidden = false;
  }

  ready() {
    this.failed = false;
    this.element.removeAttribute("aria-busy");
    this.note.hidden = true;
  }

  draw(colours, opacity = 1, smooth = true) {
    this.map.hidden = colours === null;
    if (colours === null) return;
    this.map.style.opacity = opacity;
    this.map.classList.toggle("sharp", !smooth);
    this.map.getContext("2d").putImageData(new ImageData(colours, this.grid.w, this.grid.h), 0, 0);
  }

  // query: cells; best: a cell; points: [[cell, label]]
  mark({ query = [], best = null, points = [] }) {
    if (!this.grid) return;
    const { w } = this.grid, parts = [];
    const cell = (at, name) => parts.push(drawn("rect", { class: name, x: at % w, y: Math.floor(at / w), width: 1, height: 1 }));
    if (best !== null) cell(best, "mark-best");
    if (query.length) {
      const path = outline(query, this.grid);
      if (query.length > 1) parts.push(drawn("path", { class: "mark-area", d: area(query, this.grid) }));
      parts.push(drawn("path", { class: "mark-halo", d: path }), drawn("path", { class: "mark-query", d: path }));
    }
    const side = Math.max(1, (14 * w) / (this.width * this.k)); // of a click's mark: at least 14 pixels
    for (const [at, label] of points) {
      const x = (at % w) + 0.5, y = Math.floor(at / w) + 0.5, reach = 0.3 * side;
      parts.push(drawn("rect", { class: label ? "mark-in" : "mark-out", x: x - side / 2, y: y - side / 2, width: side, height: side }),
        drawn("path", { class: "mark-sign", d: `M${x - reach} ${y}h${2 * reach}${label ? `M${x} ${y - reach}v${2 * reach}` : ""}` }));
    }
    if (this.cursor !== null) {
      cell(this.cursor, "mark-halo");
      cell(this.cursor, "mark-cursor");
    }
    this.marks.replaceChildren(...parts);
  }

  // ---- positions ---------------------------------------------------------------------------------------------------

  // (x, y) in [0, 1) of the image at a pointer, or null outside.
  fractionAt(event) {
    const box = this.view.getBoundingClientRect();
    const x = (event.clientX - box.left - this.x) / (this.k * this.width);
    const y = (event.clientY - box.top - this.y) / (this.k * this.height);
    return x >= 0 && y >= 0 && x < 1 && y < 1 ? { x, y } : null;
  }

  cellAt(event) {
    const at = this.grid && this.fractionAt(event);
    return at ? Math.floor(at.y * this.grid.h) * this.grid.w + Math.floor(at.x * this.grid.w) : null;
  }

  // The client position of a cell's centre, and whether it is in sight.
  clientOf(row, column) {
    const box = this.view.getBoundingClientRect();
    const x = this.x + ((column + 0.5) / this.grid.w) * this.width * this.k;
    const y = this.y + ((row + 0.5) / this.grid.h) * this.height * this.k;
    return { x: box.left + x, y: box.top + y, visible: x >= 0 && y >= 0 && x <= this.width && y <= this.height };
  }

  zoom(k, clientX = null, clientY = null) {
    const box = this.view.getBoundingClientRect();
    const px = clientX === null ? this.width / 2 : clientX - box.left, py = clientY === null ? this.height / 2 : clientY - box.top;
    const next = Math.max(1, Math.min(MOST_ZOOM, k)), ratio = next / this.k;
    this.#move(next, px - (px - this.x) * ratio, py - (py - this.y) * ratio);
  }

  #move(k, x, y) {
    this.k = k;
    this.x = Math.min(0, Math.max(this.width * (1 - k), x));
    this.y = Math.min(0, Math.max(this.height * (1 - k), y));
    const { style } = this.content; // sizes, not a transform: what is inside stays sharp
    style.left = `${this.x}px`;
    style.top = `${this.y}px`;
    style.width = `${this.width * k}px`;
    style.height = `${this.height * k}px`;
    this.view.classList.toggle("zoomed", k > 1);
    this.#show(Math.max(this.width, this.height) * k * (window.devicePixelRatio || 1));
    this.on.moved(this, false);
  }

  // The image in the smallest of a few sizes that has as many pixels as the screen shows; the old one stays until it is there.
  #show(pixels) {
    const side = SIDES.find((one) => one >= 0.9 * pixels) ?? SIDES.at(-1);
    if (side <= this.side) return;
    const first = !this.side, address = `api/image/${this.id}?side=${side}`;
    this.side = side;
    if (first) this.image.src = address;
    else {
      const sharper = new Image();
      sharper.onload = () => { if (this.side === side) this.image.src = address; };
      sharper.src = address;
    }
  }

  // ---- pointer, touch, keys ----------------------------------------------------------------------------------------

  #listen() {
    const view = this.view;
    view.addEventListener("pointerdown", (event) => this.#down(event));
    view.addEventListener("pointermove", (event) => this.#moveTo(event));
    view.addEventListener("pointerup", (event) => this.#up(event));
    view.addEventListener("pointercancel", (event) => this.#up(event, true));
    view.addEventListener("pointerleave", (event) => {
      if (!this.pointers.size && event.pointerType === "mouse") this.#leave();
    });
    view.addEventListener("contextmenu", (event) => event.preventDefault());
    view.addEventListener("wheel", (event) => {
      if (!event.ctrlKey && !event.metaKey && matchMedia("(max-width: 760px)").matches) return; // the page scrolls
      event.preventDefault();
      this.zoom(this.k * Math.exp(-event.deltaY * (event.ctrlKey ? 0.01 : 0.002)), event.clientX, event.clientY);
    }, { passive: false });
    view.addEventListener("keydown", (event) => this.#key(event));
    view.addEventListener("blur", () => { if (this.byKey) this.#leave(); });
  }

  #leave() {
    this.cursor = null;
    this.byKey = false;
    this.on.leave(this);
  }

  get drawing() {
    return this.tool !== "point";
  }

  #down(event) {
    if (event.button === 1) event.preventDefault();
    view_capture(this.view, event);
    this.pointers.set(event.pointerId, { x: event.clientX, y: event.clientY });
    if (this.pointers.size === 2) { // two fingers: zoom, nothing is drawn
      this.gesture = { kind: "pinch", k: this.k, apart: this.#apart() };
      return;
    }
    const cell = this.cellAt(event), draws = this.drawing && event.button === 0 && !event.shiftKey;
    this.gesture = { kind: draws && cell !== null ? "draw" : "press", x: event.clientX, y: event.clientY, cell, moved: false };
    if (this.gesture.kind === "draw") this.#stroke(cell, cell, true);
    else if (event.pointerType !== "mouse" && cell !== null) this.#hover(cell, "touch");
  }

  #apart() {
    const [a, b] = [...this.pointers.values()];
    return Math.hypot(a.x - b.x, a.y - b.y) || 1;
  }

  #moveTo(event) {
    const before = this.pointers.get(event.pointerId), cell = this.cellAt(event);
    if (!before) { // a mouse above the image
      if (cell === null) this.#leave(); else this.#hover(cell, "mouse");
      return;
    }
    const dx = event.clientX - before.x, dy = event.clientY - before.y, gesture = this.gesture;
    this.pointers.set(event.pointerId, { x: event.clientX, y: event.clientY });
    if (!gesture) return;
    if (gesture.kind === "pinch" && this.pointers.size === 2) {
      const [a, b] = [...this.pointers.values()];
      this.#move(this.k, this.x + dx / 2, this.y + dy / 2);
      this.zoom((gesture.k * this.#apart()) / gesture.apart, (a.x + b.x) / 2, (a.y + b.y) / 2);
    } else if (gesture.kind === "draw") {
      if (cell !== null && cell !== gesture.last) this.#stroke(gesture.last ?? cell, cell, false);
      if (cell !== null) this.#hover(cell, "draw");
    } else if (gesture.kind === "press") {
      gesture.moved ||= Math.hypot(event.clientX - gesture.x, event.clientY - gesture.y) > 5;
      if (!gesture.moved) return;
      if (this.k > 1 && event.pointerType === "mouse") this.#move(this.k, this.x + dx, this.y + dy);
      else if (cell !== null) this.#hover(cell, "touch");
    }
  }

  #up(event, cancelled = false) {
    const gesture = this.gesture;
    this.pointers.delete(event.pointerId);
    if (this.pointers.size) { // one finger of two is still down
      this.gesture = { kind: "rest" };
      return;
    }
    this.gesture = null;
    if (!gesture || cancelled) return;
    if (gesture.kind === "draw") this.on.drawn(this);
    else if (gesture.kind === "press" && (!gesture.moved || event.pointerType !== "mouse")) {
      const cell = this.cellAt(event);
      if (cell !== null) this.on.click(this, cell, event);
    }
  }

  #hover(cell, how) {
    if (cell === this.cursor && how === "mouse") return;
    this.cursor = cell;
    this.byKey = how === "key";
    this.on.hover(this, cell, how);
  }

  // Cells under a stroke of the brush from one cell to another, or of the box between its first corner and a cell.
  #stroke(from, to, first) {
    const { h, w } = this.grid, gesture = this.gesture ?? {}, cells = new Set();
    const r0 = Math.floor(from / w), c0 = from % w, r1 = Math.floor(to / w), c1 = to % w;
    gesture.last = to;
    if (this.tool === "box") {
      const corner = gesture.cell ?? from, ra = Math.floor(corner / w), ca = corner % w;
      for (let r = Math.min(ra, r1); r <= Math.max(ra, r1); r++) {
        for (let c = Math.min(ca, c1); c <= Math.max(ca, c1); c++) cells.add(r * w + c);
      }
    } else {
      const steps = Math.max(Math.abs(r1 - r0), Math.abs(c1 - c0), 1), reach = this.radius;
      for (let s = 0; s <= steps; s++) {
        const r = Math.round(r0 + ((r1 - r0) * s) / steps), c = Math.round(c0 + ((c1 - c0) * s) / steps);
        for (let y = Math.max(0, r - reach); y <= Math.min(h - 1, r + reach); y++) {
          for (let x = Math.max(0, c - reach); x <= Math.min(w - 1, c + reach); x++) {
            if ((y - r) ** 2 + (x - c) ** 2 <= (reach + 0.4) ** 2) cells.add(y * w + x);
          }
        }
      }
    }
    this.on.draw(this, [...cells], first);
  }

  #key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (steps && this.grid) {
      const { h, w } = this.grid, far = event.shiftKey ? 5 : 1;
      const at = this.cursor ?? Math.floor(h / 2) * w + Math.floor(w / 2);
      const r = Math.max(0, Math.min(h - 1, Math.floor(at / w) + (this.cursor === null ? 0 : steps[0] * far)));
      const c = Math.max(0, Math.min(w - 1, (at % w) + (this.cursor === null ? 0 : steps[1] * far)));
      this.#hover(r * w + c, "key");
      this.#reveal(r, c);
    } else if ((event.key === "Enter" || event.key === " ") && this.cursor !== null) {
      if (this.tool === "box") {
        if (this.corner === undefined) {
          this.corner = this.cursor;
          this.on.say("First corner. Move to the opposite one and press Enter.");
        } else {
          this.gesture = { cell: this.corner };
          this.#stroke(this.corner, this.cursor, true);
          this.gesture = null;
          this.corner = undefined;
          this.on.drawn(this);
        }
      } else if (this.drawing) {
        this.#stroke(this.cursor, this.cursor, false);
        this.on.drawn(this);
      } else this.on.click(this, this.cursor, event);
    } else if (event.key === "Escape") {
      this.corner = undefined;
      this.on.cancel(this);
    } else if (event.key === "+" || event.key === "=") this.zoom(this.k * 1.6);
    else if (event.key === "-") this.zoom(this.k / 1.6);
    else if (event.key === "0") this.zoom(1);
    else return;
    event.preventDefault();
  }

  // Keeps the keyboard's cursor in sight of a zoomed image.
  #reveal(row, column) {
    const x = ((column + 0.5) / this.grid.w) * this.width * this.k + this.x, y = ((row + 0.5) / this.grid.h) * this.height * this.k + this.y;
    const dx = x < 0 || x > this.width ? this.width / 2 - x : 0, dy = y < 0 || y > this.height ? this.height / 2 - y : 0;
    if (dx || dy) this.#move(this.k, this.x + dx, this.y + dy);
  }
}

function view_capture(view, event) {
  try { view.setPointerCapture(event.pointerId); } catch { /* a pointer that has gone */ }
}
