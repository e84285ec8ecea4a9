// Queries and clicks of the image view: as text in the URL, and as cells of a patch grid. A place is a fraction of the image's sides;
// a cell is row·w + column of a grid {h, w}.

// Consecutive cells as runs, "4-9.36", and back (null where it is no such text).
function runs(cells) {
  const found = [];
  for (const cell of cells) {
    const last = found[found.length - 1];
    if (last && last[1] === cell - 1) last[1] = cell; else found.push([cell, cell]);
  }
  return found.map(([a, b]) => (a === b ? a : `${a}-${b}`)).join(".");
}

function cellsOfRuns(text, count) {
  const cells = [];
  for (const run of text.split(".")) {
    const [a, b = a] = run.split("-").map(Number);
    if (!Number.isInteger(a) || !Number.isInteger(b)) return null;
    for (let cell = a; cell <= Math.min(b, count - 1); cell++) cells.push(cell);
  }
  return cells.length ? cells : null;
}

const short = (value) => Number(value.toFixed(4));

// "3_0.5_0.31" a point, "3_b_x_y_x1_y1" a box, "3_m_21x32_4-9.36" a mask by the cells of a grid.
export function writeQuery(query) {
  if (!query) return null;
  if (query.kind === "point") return [query.image, short(query.x), short(query.y)].join("_");
  if (query.kind === "box") return [query.image, "b", ...[query.x, query.y, query.x1, query.y1].map(short)].join("_");
  return [query.image, "m", `${query.h}x${query.w}`, runs(query.cells)].join("_");
}

export function parseQuery(text) {
  const [id, ...rest] = (text ?? "").split("_"), image = Number(id), numbers = rest.slice(rest[0] === "b" ? 1 : 0).map(Number);
  const inside = (values) => values.length && values.every((v) => v >= 0 && v <= 1);
  if (!/^\d+$/.test(id)) return null;
  if (rest[0] === "b") return numbers.length === 4 && inside(numbers) ? { image, kind: "box", x: numbers[0], y: numbers[1], x1: numbers[2], y1: numbers[3] } : null;
  if (rest[0] === "m") {
    const [h, w] = (rest[1] ?? "").split("x").map(Number);
    const cells = h > 0 && w > 0 && h * w <= 65536 ? cellsOfRuns(rest[2] ?? "", h * w) : null;
    return cells && { image, kind: "mask", h, w, cells };
  }
  return numbers.length === 2 && inside(numbers) ? { image, kind: "point", x: numbers[0], y: numbers[1] } : null;
}

export function writePoints(points) {
  return points.length ? points.map((p) => `${p.image}${p.label ? "p" : "n"}${short(p.x)}_${short(p.y)}`).join("*") : null;
}

export function parsePoints(text) {
  return [...(text ?? "").matchAll(/(\d+)([pn])([\d.]+)_([\d.]+)/g)].map(([, image, sign, x, y]) => (
    { image: Number(image), kind: "point", label: sign === "p" ? 1 : 0, x: Number(x), y: Number(y) })).filter((p) => p.x < 1 && p.y < 1);
}

// The cells of a query on a grid.
export function cellsOf(query, { h, w }) {
  const at = (x, y) => Math.min(h - 1, Math.floor(y * h)) * w + Math.min(w - 1, Math.floor(x * w)), cells = [];
  if (query.kind === "point") return [at(query.x, query.y)];
  if (query.kind === "mask" && query.h === h && query.w === w) return query.cells;
  const set = query.kind === "mask" ? new Set(query.cells) : null;
  for (let cell = 0; cell < h * w; cell++) {
    const x = ((cell % w) + 0.5) / w, y = (Math.floor(cell / w) + 0.5) / h;
    const inside = set ? set.has(Math.floor(y * query.h) * query.w + Math.floor(x * query.w))
      : x > query.x && x < query.x1 && y > query.y && y < query.y1;
    if (inside) cells.push(cell);
  }
  return cells.length || set ? cells : [at((query.x + query.x1) / 2, (query.y + query.y1) / 2)];
}
