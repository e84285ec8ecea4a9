// Numbers of the image view: float16 to float32, cosine maps, colours. Legend: h×w patch grid, D width; a cell is row·w + column.

// every float16 as float32: 256 kB, and a features' response is unpacked in a few milliseconds in any browser
const HALF = (() => {
  const table = new Float32Array(65536);
  for (let bits = 0; bits < 65536; bits++) {
    const sign = bits & 0x8000 ? -1 : 1, exponent = (bits >> 10) & 31, fraction = bits & 1023;
    table[bits] = sign * (exponent === 0 ? fraction * 2 ** -24
      : exponent === 31 ? (fraction ? NaN : Infinity) : (1 + fraction / 1024) * 2 ** (exponent - 15));
  }
  return table;
})();

export function unpack(buffer) {
  const bytes = new DataView(buffer), values = new Float32Array(buffer.byteLength / 2);
  for (let i = 0; i < values.length; i++) values[i] = HALF[bytes.getUint16(2 * i, true)];
  return values;
}

// The unit vector in the mean direction of some cells.
export function meanDirection(features, cells) {
  const { data, D } = features, mean = new Float32Array(D);
  for (const cell of cells) for (let d = 0, at = cell * D; d < D; d++, at++) mean[d] += data[at];
  let length = 0;
  for (const value of mean) length += value * value;
  length = Math.sqrt(length) || 1;
  for (let d = 0; d < D; d++) mean[d] /= length;
  return mean;
}

// The dot product of every patch with a vector [D]: [h·w].
export function along(features, vector) {
  const { data, D, h, w } = features, out = new Float32Array(h * w);
  for (let cell = 0, at = 0; cell < out.length; cell++) {
    let a = 0, b = 0, c = 0, e = 0, d = 0;
    for (; d + 3 < D; d += 4, at += 4) {
      a += data[at] * vector[d];
      b += data[at + 1] * vector[d + 1];
      c += data[at + 2] * vector[d + 2];
      e += data[at + 3] * vector[d + 3];
    }
    for (; d < D; d++, at++) a += data[at] * vector[d];
    out[cell] = a + b + c + e;
  }
  return out;
}

export function largest(values) {
  let best = 0;
  for (let i = 1; i < values.length; i++) if (values[i] > values[best]) best = i;
  return best;
}

// The value below which a share of all values in several arrays lies (to a 512th of their range).
export function quantile(arrays, share) {
  let low = Infinity, high = -Infinity, count = 0;
  for (const values of arrays) {
    for (const value of values) {
      if (value < low) low = value;
      if (value > high) high = value;
    }
    count += values.length;
  }
  if (!(high > low)) return low;
  const bins = new Uint32Array(512), scale = 511.999 / (high - low);
  for (const values of arrays) for (const value of values) bins[((value - low) * scale) | 0]++;
  let below = 0, bin = 0;
  while (bin < 511 && below + bins[bin] < share * count) below += bins[bin++];
  return low + bin / scale;
}

// dinov3.drawing's ramp: dark violet over rose to pale yellow, lightness rises evenly
const STOPS = [[10, 7, 34], [58, 15, 109], [110, 27, 129], [163, 44, 125], [213, 67, 106], [246, 112, 92],
  [254, 166, 115], [253, 212, 157], [252, 250, 214]];
const RAMP = new Uint8Array(256 * 3);
for (let i = 0; i < 256; i++) {
  const at = (i / 255) * (STOPS.length - 1), k = Math.min(Math.floor(at), STOPS.length - 2);
  for (let c = 0; c < 3; c++) RAMP[3 * i + c] = Math.round(STOPS[k][c] + (STOPS[k + 1][c] - STOPS[k][c]) * (at - k));
}

// Cosines as colours [h·w·4]; where they are low the image shows through.
export function heat(values, low, high) {
  const out = new Uint8ClampedArray(values.length * 4), scale = 255 / Math.max(high - low, 1e-6);
  for (let i = 0; i < values.length; i++) {
    const level = Math.max(0, Math.min(255, Math.round((values[i] - low) * scale)));
    out[4 * i] = RAMP[3 * level];
    out[4 * i + 1] = RAMP[3 * level + 1];
    out[4 * i + 2] = RAMP[3 * level + 2];
    out[4 * i + 3] = 150 + 0.41 * level;
  }
  return out;
}

// A veil over what is not the object: σ(x · weight + bias) clear, the rest dark [h·w·4].
export function veil(values, bias) {
  const out = new Uint8ClampedArray(values.length * 4);
  let inside = 0;
  for (let i = 0; i < values.length; i++) {
    const share = 1 / (1 + Math.exp(-(values[i] + bias)));
    if (share > 0.5) inside++;
    out[4 * i] = 10; out[4 * i + 1] = 7; out[4 * i + 2] = 34;
    out[4 * i + 3] = Math.round(255 * (1 - share));
  }
  return { colours: out, share: inside / values.length };
}

// Three components as red, green and blue, ±2 standard deviations; `inside` (or null): where there is colour.
export function rainbow(features, pca, first, inside) {
  const { h, w } = features, out = new Uint8ClampedArray(h * w * 4);
  for (let c = 0; c < 3; c++) {
    const k = first + c, values = along(features, pca.directions[k]), reach = 2 * Math.max(pca.deviation[k], 1e-9);
    for (let i = 0; i < values.length; i++) {
      const shown = !inside || inside[i] > 0;
      out[4 * i + c] = shown ? 127.5 * (1 + (values[i] - pca.offset[k]) / reach) : 0;
      out[4 * i + 3] = 255;
    }
  }
  return out;
}

// Some of the lines [row, column, row, column, cosine, …]: the best of every part of the left image first, then the best.
export function spread(lines, count, grid) {
  if (lines.length <= count) return lines;
  const side = Math.max(1, Math.ceil(Math.sqrt(count))), cells = new Map(), rest = [];
  for (const line of lines) { // best first
    const key = Math.floor((line[0] / grid.h) * side) * side + Math.floor((line[1] / grid.w) * side);
    if (cells.has(key)) rest.push(line); else cells.set(key, line);
  }
  return [...cells.values(), ...rest].slice(0, count);
}
