// The few lines that all views build their elements with.

/** An element: h("button", {class: "x", onclick: fn, "aria-label": "…"}, "text", child). Properties that are null or false are left out. */
export function h(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

/** Calls fn once, `wait` ms after the last call. */
export function debounced(fn, wait) {
  let timer = 0;
  return (...given) => {
    clearTimeout(timer);
    timer = setTimeout(() => fn(...given), wait);
  };
}

export const thumb = (id, side = 128) => `api/thumb/${id}?side=${side}`;

export const number = (n) => n.toLocaleString("en");

/** Saves bytes under a name, as a link with `download` does. */
export function save(blob, name) {
  const url = URL.createObjectURL(blob);
  h("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}
