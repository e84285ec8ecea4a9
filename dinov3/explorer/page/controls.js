// Controls of the image view's panel.
import { h } from "./dom.js";

export function button(text, action, properties = {}) {
  return h("button", { type: "button", class: "button small", onclick: action, ...properties }, text);
}

// {element, input, set}: a slider with its name and its value in words (`shown`).
export function slider(title, limits, changed, shown) {
  const value = h("span", { class: "value", "aria-hidden": "true" });
  const input = h("input", { type: "range", step: 1, ...limits, "aria-label": title, "data-name": title, oninput: () => {
    show();
    changed(Number(input.value));
  } });
  const show = () => {
    value.textContent = shown(Number(input.value));
    input.setAttribute("aria-valuetext", value.textContent);
  };
  const set = (number) => { input.value = number; show(); };
  set(limits.min);
  return { element: h("label", { class: "field slider" }, h("span", {}, title), value, input), input, set };
}

export function check(title, changed, on = false) {
  const input = h("input", { type: "checkbox", "data-name": title, onchange: () => changed(input.checked) });
  input.checked = on;
  return { element: h("label", { class: "field tick" }, input, h("span", {}, title)), input };
}

// A row of buttons of which one is chosen: [[value, text], …].
export function choice(title, options, chosen, choose) {
  return h("div", { class: "segmented", role: "group", "aria-label": title }, ...options.map(([value, text]) => h("button", {
    type: "button", "data-name": `${title}-${value}`, "aria-pressed": String(value === chosen), onclick: () => choose(value) }, text)));
}

export const note = (text) => h("p", { class: "muted" }, text);

export const row = (...children) => h("p", { class: "row" }, ...children);
