// A map of points: pan, zoom, lasso; thumbnails once there is room. WebGL2 on a graphics card, else a 2-D canvas, whose
// pixels are written one by one: 100,000 points take a few milliseconds without any graphics card.
import { debounced, h, thumb } from "./dom.js";

export const PALETTE = [
  [66, 133, 244], [244, 150, 54], [52, 168, 103], [219, 83, 80], [153, 108, 220], [158, 110, 84],
  [226, 121, 183], [122, 132, 145], [181, 178, 44], [39, 178, 196], [96, 96, 200], [166, 205, 96], [140, 146, 154],
];
const RAMP = [[68, 60, 150], [46, 124, 170], [44, 172, 142], [148, 208, 80], [250, 220, 60]];
const THUMB = 46; // px
const ENOUGH = 10_000; // points among which thumbnails are chosen
const [FEW, CLOSE, SPARSE] = [800, THUMB + 5, 130]; // points in view that are few; px between thumbnails of few, of many

/** A colour between dark blue and yellow, for 0 … 1. */
export function ramp(t) {
  const at = Math.max(0, Math.min(0.9999, t)) * (RAMP.length - 1);
  const [a, b, f] = [RAMP[Math.floor(at)], RAMP[Math.floor(at) + 1], at % 1];
  return a.map((v, i) => Math.round(v + (b[i] - v) * f));
}

const packed = ([r, g, b]) => (255 << 24) | (b << 16) | (g << 8) | r; // as pixels lie in memory

// ---- the two ways to draw: draw(xy, colours, order, big, {sx, sy, ox, oy, radius}) --------------------------------------
// `order` says in which order points are drawn; the last `big` of them are larger.

class CanvasPoints {
  constructor(canvas) {
    this.canvas = canvas;
    this.context = canvas.getContext("2d", { alpha: true });
    this.name = "canvas";
  }
  draw(xy, colours, order, big, { sx, sy, ox, oy, radius }) {
    const { width, height } = this.canvas;
    if (this.image?.width !== width || this.image?.height !== height) {
      this.image = this.context.createImageData(width, height);
      this.pixels = new Uint32Array(this.image.data.buffer);
    }
    const pixels = this.pixels.fill(0);
    const paint = (from, to, r) => {
      const disc = []; // rows of a disc: [first pixel from its middle, length]
      for (let y = -Math.ceil(r); y <= r; y++) {
        if (Math.abs(y) > r) continue;
        const half = Math.round(Math.sqrt(r * r - y * y));
        disc.push([y * width - half, 2 * half + 1]);
      }
      const edge = Math.ceil(r) + 1;
      for (let i = from; i < to; i++) {
        const point = order[i];
        const x = (xy[2 * point] * sx + ox) | 0;
        const y = (xy[2 * point + 1] * sy + oy) | 0;
        if (x < edge || y < edge || x >= width - edge || y >= height - edge) continue;
        const middle = y * width + x;
        const colour = colours[point];
        for (let k = 0; k < disc.length; k++) {
          const start = middle + disc[k][0];
          for (let end = start + disc[k][1], at = start; at < end; at++) pixels[at] = colour;
        }
      }
    };
    paint(0, order.length - big, radius);
    paint(order.length - big, order.length, radius * 1.5 + 1);
    this.context.putImageData(this.image, 0, 0);
  }
}

class WebGLPoints {
  constructor(canvas, gl) {
    this.canvas = canvas;
    this.gl = gl;
    this.name = "webgl2";
    const compile = (kind, text) => {
      const shader = gl.createShader(kind);
      gl.shaderSource(shader, text);
      gl.compileShader(shader);
      return shader;
    };
    const program = gl.createProgram();
    gl.attachShader(program, compile(gl.VERTEX_SHADER, `#version 300 es
      in vec2 point; in vec4 colour; uniform vec4 place; uniform vec2 size; uniform float radius; out vec4 shade;
      void main() {
        vec2 pixel = point * place.xy + place.zw;
        gl_Position = vec4(pixel / size * 2.0 - 1.0, 0.0, 1.0) * vec4(1.0, -1.0, 1.0, 1.0);
        gl_PointSize = 2.0 * radius + 1.0;
        shade = colour;
      }`));
    gl.attachShader(program, compile(gl.FRAGMENT_SHADER, `#version 300 es
      precision mediump float; in vec4 shade; out vec4 result;
      void main() { if (length(gl_PointCoord - 0.5) > 0.5) discard; result = shade; }`));
    gl.linkProgram(program);
    gl.useProgram(program);
    const uniform = (name) => gl.getUniformLocation(program, name);
    this.uniforms = { place: uniform("place"), size: uniform("size"), radius: uniform("radius") };
    this.buffers = {};
    for (const [name, size, kind, normalised] of [["point", 2, gl.FLOAT, false], ["colour", 4, gl.UNSIGNED_BYTE, true]]) {
      this.buffers[name] = gl.createBuffer();
      gl.bindBuffer(gl.ARRAY_BUFFER, this.buffers[name]);
      const where = gl.getAttribLocation(program, name);
      gl.enableVertexAttribArray(where);
      gl.vertexAttribPointer(where, size, kind, normalised, 0, 0);
    }
    this.buffers.order = gl.createBuffer();
    gl.bindBuffer(gl.ELEMENT_ARRAY_BUFFER, this.buffers.order);
    this.sent = {};
  }
  send(name, target, data) {
    if (this.sent[name] === data) return;
    this.gl.bindBuffer(target, this.buffers[name]);
    this.gl.bufferData(target, data, this.gl.DYNAMIC_DRAW);
    this.sent[name] = data;
  }
  draw(xy, colours, order, big, { sx, sy, ox, oy, radius }) {
    const { gl, canvas, uniforms } = this;
    gl.viewport(0, 0, canvas.width, canvas.height);
    this.send("point", gl.ARRAY_BUFFER, xy);
    this.send("colour", gl.ARRAY_BUFFER, colours);
    this.send("order", gl.ELEMENT_ARRAY_BUFFER, order);
    gl.clearColor(0, 0, 0, 0);
    gl.clear(gl.COLOR_BUFFER_BIT);
    gl.uniform4f(uniforms.place, sx, sy, ox, oy);
    gl.uniform2f(uniforms.size, canvas.width, canvas.height);
    gl.uniform1f(uniforms.radius, radius);
    gl.drawElements(gl.POINTS, order.length - big, gl.UNSIGNED_INT, 0);
    gl.uniform1f(uniforms.radius, radius * 1.5 + 1);
    gl.drawElements(gl.POINTS, big, gl.UNSIGNED_INT, 4 * (order.length - big));
  }
}

/** Whether this browser draws WebGL2 on a graphics card; where the processor imitates one, writing the pixels is faster. */
function hasCard() {
  const gl = document.createElement("canvas").getContext("webgl2", { failIfMajorPerformanceCaveat: true });
  if (!gl) return false;
  const info = gl.getExtension("WEBGL_debug_renderer_info");
  const name = gl.getParameter(info ? info.UNMASKED_RENDERER_WEBGL : gl.RENDERER);
  gl.getExtension("WEBGL_lose_context")?.loseContext();
  return !/swiftshader|llvmpipe|softpipe|software|basic render/i.test(name);
}

/** The renderer of this browser; `wanted` ("webgl2" or "canvas") insists on one. */
function rendererOf(canvas, wanted) {
  const gl = wanted === "webgl2" || (wanted !== "canvas" && hasCard()) ? canvas.getContext("webgl2", { antialias: false }) : null;
  return gl ? new WebGLPoints(canvas, gl) : new CanvasPoints(canvas);
}

// ---- the map ------------------------------------------------------------------------------------------------------------

export class PointMap {
  /** open(id): a click on a point; moved(view): after a pan or zoom; rows: names for the label of a point. */
  constructor(element, { selection, rows, open, moved, renderer, theme }) {
    Object.assign(this, { selection, rows, open, moved });
    this.xy = new Float32Array(0);
    this.view = null; // {x, y, scale}: the middle, in the map's units, and CSS pixels a unit
    this.lassoing = false;
    this.thumbs = true; // also where many points are in view
    this.images = new Map();
    this.points = h("canvas", { class: "map-points", "aria-hidden": "true" });
    this.over = h("canvas", { class: "map-over", "aria-hidden": "true" });
    this.label = h("div", { class: "map-label", hidden: true, "aria-hidden": "true" });
    this.box = h("div", {
      class: "map", tabindex: 0, role: "application", "aria-label": "Map of images", "aria-describedby": "map-keys",
      onkeydown: (event) => this.key(event), onpointerdown: (event) => this.down(event), onpointermove: (event) => this.drag(event),
      onpointerup: (event) => this.up(event), onpointercancel: (event) => this.up(event), onpointerleave: () => this.hover(null),
      ondblclick: (event) => this.zoom(2, event.offsetX, event.offsetY),
    }, this.points, this.over, this.label, h("p", { id: "map-keys", class: "sr-only" },
      "Arrow keys pan, plus and minus zoom, 0 shows all, v selects what is in view, l draws a lasso with the pointer, Escape clears."));
    this.box.addEventListener("wheel", (event) => this.wheel(event), { passive: false });
    element.append(this.box);
    this.renderer = rendererOf(this.points, renderer);
    this.box.dataset.renderer = this.renderer.name;
    this.reportMove = debounced(() => this.moved(this.view), 250);
    new ResizeObserver(() => this.resize()).observe(this.box);
    selection.on(() => this.restyle());
    theme.on(() => this.restyle());
  }

  // ---- what is shown

  /** xy: float32 [N, 2] from −1 to 1. */
  show(xy) {
    this.xy = xy;
    this.count = xy.length / 2;
    this.restyle();
  }

  /** colourOf(id) → [r, g, b] or null (dim); visible: a byte for each image, or null for all. */
  style(colourOf, visible) {
    this.colourOf = colourOf;
    this.visible = visible;
    this.restyle();
  }

  restyle() {
    if (!this.count) return;
    const style = getComputedStyle(this.box);
    const rgb = (text) => text.match(/[\d.]+/g).slice(0, 3).map(Number);
    const [ground, ink] = [rgb(style.backgroundColor), rgb(style.color)];
    const dim = packed(ground.map((v, i) => Math.round(v + (ink[i] - v) * 0.16)));
    const someSelected = this.selection.count > 0;
    const colours = new Uint32Array(this.count);
    const [back, middle, front] = [[], [], []];
    for (let i = 0; i < this.count; i++) {
      if (this.visible && !this.visible[i]) continue;
      const chosen = this.selection.mask[i];
      const colour = this.colourOf?.(i) ?? null;
      colours[i] = chosen || (colour && !someSelected) ? packed(colour ?? PALETTE[0])
        : colour ? packed(colour.map((v, k) => Math.round(v + (ground[k] - v) * 0.72))) : dim;
      (chosen ? front : colour ? middle : back).push(i);
    }
    this.colours = colours;
    this.bytes = this.renderer.name === "webgl2" ? new Uint8Array(colours.buffer) : colours;
    this.order = new Uint32Array(back.length + middle.length + front.length);
    this.order.set(back);
    this.order.set(middle, back.length);
    this.order.set(front, back.length + middle.length);
    this.big = front.length;
    this.redraw();
  }

  // ---- geometry

  resize() {
    const { clientWidth: w, clientHeight: ht } = this.box;
    if (!w || !ht) return;
    this.ratio = Math.min(window.devicePixelRatio || 1, 2);
    for (const canvas of [this.points, this.over]) {
      canvas.width = Math.round(w * this.ratio);
      canvas.height = Math.round(ht * this.ratio);
    }
    this.w = w;
    this.h = ht;
    if (!this.view) this.fit();
    this.redraw();
  }
  fit() {
    this.view = { x: 0, y: 0, scale: Math.min(this.w, this.h) / 2.16 };
    this.whole = true;
    this.changed();
  }
  changed() {
    this.redraw();
    this.reportMove();
  }
  toScreen(i) {
    const { x, y, scale } = this.view;
    return [(this.xy[2 * i] - x) * scale + this.w / 2, (y - this.xy[2 * i + 1]) * scale + this.h / 2];
  }
  zoom(factor, px = this.w / 2, py = this.h / 2) {
    const { view } = this;
    const scale = Math.max(20, Math.min(2e6, view.scale * factor));
    const [dx, dy] = [px - this.w / 2, py - this.h / 2];
    view.x += dx / view.scale - dx / scale;
    view.y -= dy / view.scale - dy / scale;
    view.scale = scale;
    this.changed();
  }
  pan(dx, dy) {
    this.view.x -= dx / this.view.scale;
    this.view.y += dy / this.view.scale;
    this.changed();
  }
  /** The images in view, in the order of drawing; valid until the next call. */
  inView() {
    const { xy, order, view: { x, y, scale } } = this;
    const [left, right] = [x - this.w / 2 / scale, x + this.w / 2 / scale];
    const [low, high] = [y - this.h / 2 / scale, y + this.h / 2 / scale];
    if (this.seen?.length !== this.count) this.seen = new Uint32Array(this.count);
    const { seen } = this;
    let found = 0;
    for (let k = 0; k < order.length; k++) {
      const i = order[k];
      const px = xy[2 * i];
      const py = xy[2 * i + 1];
      if (px >= left && px <= right && py >= low && py <= high) seen[found++] = i;
    }
    return seen.subarray(0, found);
  }
  /** The point within 10 px of a place, the nearest; null if there is none. */
  at(px, py) {
    if (!this.order) return null;
    for (const [id, x, y] of this.placed ?? []) {
      if (Math.abs(px - x) <= THUMB / 2 && Math.abs(py - y) <= THUMB / 2) return id;
    }
    const { x, y, scale } = this.view;
    const [mx, my] = [(px - this.w / 2) / scale + x, y - (py - this.h / 2) / scale];
    let [best, found] = [(10 / scale) ** 2, null];
    for (const i of this.order) {
      const d = (this.xy[2 * i] - mx) ** 2 + (this.xy[2 * i + 1] - my) ** 2;
      if (d < best) [best, found] = [d, i];
    }
    return found;
  }

  // ---- drawing

  redraw() {
    if (this.pending) return;
    this.pending = requestAnimationFrame(() => {
      this.pending = 0;
      this.draw();
    });
  }
  draw() {
    if (!this.w || !this.order || !this.view) return;
    const { x, y, scale } = this.view;
    const s = scale * this.ratio;
    const radius = Math.max(1.45, Math.min(4, 1.6 + Math.log10(scale / 300) * 1.5 + (this.count < 20_000 ? 0.9 : 0))) * this.ratio;
    this.renderer.draw(this.xy, this.bytes, this.order, this.big, {
      sx: s, sy: -s, ox: this.points.width / 2 - x * s, oy: this.points.height / 2 + y * s, radius,
    });
    this.drawOver();
    this.box.dataset.drawn = ""; // for tests and measurements
  }
  drawOver() {
    const c = this.over.getContext("2d");
    c.setTransform(this.ratio, 0, 0, this.ratio, 0, 0);
    c.clearRect(0, 0, this.w, this.h);
    this.placed = [];
    const seen = this.inView();
    if (this.thumbs || seen.length <= FEW) this.thumbnails(c, seen);
    if (this.lasso?.length) {
      c.beginPath();
      for (const [px, py] of this.lasso) c.lineTo(px, py);
      c.closePath();
      const accent = getComputedStyle(this.label).borderTopColor;
      c.strokeStyle = accent;
      c.lineWidth = 2;
      c.setLineDash([5, 4]);
      c.stroke();
      c.setLineDash([]);
      c.globalAlpha = 0.1;
      c.fillStyle = accent;
      c.fill();
      c.globalAlpha = 1;
    }
    if (this.hovered !== null && this.hovered !== undefined) {
      const [px, py] = this.toScreen(this.hovered);
      c.beginPath();
      c.arc(px, py, 8, 0, 7);
      c.strokeStyle = getComputedStyle(this.box).color;
      c.lineWidth = 2;
      c.stroke();
    }
  }
  /** A thumbnail for every cell of the map that has a point: that nearest to its middle. Cells stay where they are in a pan. */
  thumbnails(c, seen) {
    const unit = 2 ** Math.ceil(Math.log2((seen.length <= FEW ? CLOSE : SPARSE) / this.view.scale));
    const cells = new Map();
    const step = Math.ceil(seen.length / ENOUGH); // of very many points every 2nd, 3rd, … is a candidate
    for (let k = 0; k < seen.length; k += step) {
      const id = seen[k];
      const x = this.xy[2 * id] / unit;
      const y = this.xy[2 * id + 1] / unit;
      const column = Math.floor(x);
      const line = Math.floor(y);
      const key = column * 4_194_304 + line;
      const far = (x - column - 0.5) ** 2 + (y - line - 0.5) ** 2;
      const before = cells.get(key);
      if (!before) cells.set(key, [far, id]);
      else if (far < before[0]) {
        before[0] = far;
        before[1] = id;
      }
    }
    for (const [, id] of cells.values()) {
      const [px, py] = this.toScreen(id);
      if (this.placed.some(([, ox, oy]) => Math.abs(ox - px) < THUMB + 5 && Math.abs(oy - py) < THUMB + 5)) continue;
      this.placed.push([id, px, py]);
      const image = this.thumbnail(id);
      const colour = this.colours[id];
      c.fillStyle = `rgb(${colour & 255} ${(colour >> 8) & 255} ${(colour >> 16) & 255})`;
      c.beginPath();
      c.roundRect(px - THUMB / 2 - 2, py - THUMB / 2 - 2, THUMB + 4, THUMB + 4, 5);
      c.fill();
      if (!image) continue;
      const side = Math.min(image.naturalWidth, image.naturalHeight);
      const [left, top] = [(image.naturalWidth - side) / 2, (image.naturalHeight - side) / 2];
      c.drawImage(image, left, top, side, side, px - THUMB / 2, py - THUMB / 2, THUMB, THUMB);
    }
  }
  /** The thumbnail of an image once it is there. */
  thumbnail(id) {
    let image = this.images.get(id);
    if (!image) {
      if (this.images.size > 3000) this.images.delete(this.images.keys().next().value);
      image = new Image();
      image.onload = () => this.redraw();
      image.src = thumb(id, 96);
      this.images.set(id, image);
    }
    return image.complete && image.naturalWidth ? image : null;
  }

  // ---- pointer and keyboard

  wheel(event) {
    event.preventDefault();
    this.zoom(Math.exp(-event.deltaY * (event.deltaMode ? 0.05 : 0.0016)), event.offsetX, event.offsetY);
  }
  down(event) {
    if (event.button) return;
    this.box.setPointerCapture(event.pointerId);
    this.pointers ??= new Map();
    this.pointers.set(event.pointerId, [event.offsetX, event.offsetY]);
    this.start = [event.offsetX, event.offsetY];
    this.travelled = 0;
    if ((this.lassoing || event.shiftKey) && this.pointers.size === 1) this.lasso = [this.start];
  }
  drag(event) {
    const here = [event.offsetX, event.offsetY];
    const before = this.pointers?.get(event.pointerId);
    if (!before) {
      this.hover(this.at(...here), here);
      return;
    }
    this.pointers.set(event.pointerId, here);
    this.travelled += Math.abs(here[0] - before[0]) + Math.abs(here[1] - before[1]);
    if (this.pointers.size === 2) {
      const other = [...this.pointers].find(([id]) => id !== event.pointerId)[1];
      const apart = (p) => Math.hypot(p[0] - other[0], p[1] - other[1]) || 1;
      this.lasso = null;
      this.zoom(apart(here) / apart(before), (here[0] + other[0]) / 2, (here[1] + other[1]) / 2);
    } else if (this.lasso) {
      this.lasso.push(here);
      this.redraw();
    } else this.pan(here[0] - before[0], here[1] - before[1]);
  }
  up(event) {
    if (!this.pointers?.delete(event.pointerId)) return;
    if (this.lasso && this.lasso.length > 2) {
      const found = this.inside(this.lasso);
      if (event.ctrlKey || event.metaKey) this.selection.remove(found);
      else if (event.shiftKey && this.lassoing) this.selection.add(found);
      else this.selection.replace(found);
    } else if (this.travelled < 5 && event.type === "pointerup") {
      const id = this.at(event.offsetX, event.offsetY);
      if (id !== null) this.open(id);
    }
    this.lasso = null;
    this.redraw();
  }
  hover(id, place) {
    if (id === this.hovered) return;
    this.hovered = id;
    this.label.hidden = id === null;
    if (id !== null) {
      const words = () => this.rows.get(id)?.name ?? `image ${id}`;
      const text = h("span", {}, words());
      this.label.replaceChildren(h("img", { src: thumb(id, 128), alt: "" }), text);
      this.rows.want([id]).then(() => { text.textContent = words(); });
      const left = place[0] > this.w - 170 ? place[0] - 160 : place[0] + 16;
      const top = place[1] > this.h - 170 ? place[1] - 165 : place[1] + 16;
      this.label.style.transform = `translate(${left}px, ${top}px)`;
    }
    this.redraw();
  }
  /** The images whose points lie inside a polygon on the screen. */
  inside(polygon) {
    const { x, y, scale } = this.view;
    const corners = polygon.map(([px, py]) => [(px - this.w / 2) / scale + x, y - (py - this.h / 2) / scale]);
    const xs = corners.map((p) => p[0]);
    const [low, high] = [Math.min(...xs), Math.max(...xs)];
    return [...this.order].filter((i) => {
      const [px, py] = [this.xy[2 * i], this.xy[2 * i + 1]];
      if (px < low || px > high) return false;
      let inside = false;
      for (let a = 0, b = corners.length - 1; a < corners.length; b = a++) {
        const [[ax, ay], [bx, by]] = [corners[a], corners[b]];
        if ((ay > py) !== (by > py) && px < ((bx - ax) * (py - ay)) / (by - ay) + ax) inside = !inside;
      }
      return inside;
    });
  }
  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const pans = { ArrowLeft: [60, 0], ArrowRight: [-60, 0], ArrowUp: [0, 60], ArrowDown: [0, -60] };
    if (event.key in pans) this.pan(...pans[event.key]);
    else if (event.key === "+" || event.key === "=") this.zoom(1.5);
    else if (event.key === "-") this.zoom(1 / 1.5);
    else if (event.key === "0") this.fit();
    else if (event.key === "v") this.selection.replace(this.inView().slice());
    else return;
    event.preventDefault();
  }
}
