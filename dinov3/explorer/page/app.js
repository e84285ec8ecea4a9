// The shell: tabs, state in the URL, requests, messages, theme, keyboard. Each view is a module with mount(element, app).
import { h, number } from "./dom.js";

const TABS = [
  { key: "images", label: "Images", module: "./patches.js", letter: "i" },
  { key: "store", label: "Store", module: "./table.js", letter: "s" },
];

// ---- state: what the address after # says, so that a link or a reload shows the same -------------------------------

function makeState() {
  const listeners = new Map();
  const parse = () => new Map(new URLSearchParams(location.hash.slice(1)));
  let values = parse();

  function notify(key, value) {
    for (const fn of listeners.get(key) ?? []) fn(value);
  }

  window.addEventListener("popstate", () => {
    const before = values;
    values = parse();
    for (const key of new Set([...before.keys(), ...values.keys()])) {
      if (before.get(key) !== values.get(key)) notify(key, values.get(key) ?? null);
    }
  });

  return {
    get: (key) => values.get(key) ?? null,
    /** Sets a value (null or "" removes it). push: Back returns to what was before. Returns whether it changed. */
    set(key, value, { push = false } = {}) {
      const text = value === null || value === undefined || value === "" ? null : String(value);
      if ((values.get(key) ?? null) === text) return false;
      if (text === null) values.delete(key);
      else values.set(key, text);
      const hash = `#${new URLSearchParams([...values])}`;
      history[push ? "pushState" : "replaceState"](null, "", hash);
      notify(key, text);
      return true;
    },
    on(key, fn) {
      if (!listeners.has(key)) listeners.set(key, []);
      listeners.get(key).push(fn);
    },
  };
}

// ---- requests and messages -----------------------------------------------------------------------------------------

async function api(path, options = {}) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The service does not respond: is `dinov3 explore` still running?");
  }
  if (response.ok) return response;
  let sentence = `The service returned ${response.status}.`;
  try {
    sentence = (await response.json()).error ?? sentence;
  } catch { /* no JSON: the status is all there is */ }
  throw new Error(sentence);
}

function toast(text, kind = "") {
  const close = h("button", { class: "icon", type: "button", "aria-label": "Dismiss", onclick: () => box.remove() }, "✕");
  const box = h("div", { class: `toast ${kind}`, role: kind === "error" ? "alert" : "status" }, h("p", {}, text), close);
  const list = document.getElementById("toasts");
  while (list.children.length > 2) list.firstChild.remove();
  list.append(box);
  setTimeout(() => box.remove(), kind === "error" ? 12_000 : 5_000);
}

const fail = (error) => {
  if (error?.name !== "AbortError") toast(error?.message ?? String(error), "error");
};
window.addEventListener("unhandledrejection", (event) => {
  fail(event.reason);
  event.preventDefault();
});

// ---- theme -----------------------------------------------------------------------------------------------------------

const THEMES = { auto: ["◐", "as the system"], light: ["☀", "light"], dark: ["☾", "dark"] };

function themes() {
  const button = document.getElementById("theme");
  const listeners = [];
  let current = localStorage.getItem("dinov3-theme");
  function apply(name) {
    current = name in THEMES ? name : "auto";
    document.documentElement.dataset.theme = current;
    localStorage.setItem("dinov3-theme", current);
    const [sign, words] = THEMES[current];
    button.textContent = sign;
    button.title = `Theme: ${words} (t)`;
    button.setAttribute("aria-label", `Theme: ${words}`);
    for (const fn of listeners) fn();
  }
  const next = () => apply({ auto: "light", light: "dark", dark: "auto" }[current]);
  button.addEventListener("click", next);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => listeners.forEach((fn) => fn()));
  apply(current);
  return { next, on: (fn) => listeners.push(fn) };
}

// ---- keyboard --------------------------------------------------------------------------------------------------------

function keyboard() {
  const keys = [];
  const dialog = document.getElementById("keys");
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented) return;
    if (event.target.closest?.("input:not([type=range],[type=checkbox],[type=radio]), textarea, select, dialog[open]")) return;
    const found = keys.find((k) => k.key === event.key && (k.tab === null || k.tab === app.tab));
    if (!found) return;
    event.preventDefault();
    found.fn(event);
  });
  function show() {
    const shown = keys.filter((k) => k.tab === null || k.tab === app.tab);
    const sections = shown.flatMap((k) => [h("dt", {}, h("kbd", {}, k.label)), h("dd", {}, k.words)]);
    document.getElementById("keys-list").replaceChildren(...sections);
    dialog.showModal();
  }
  document.getElementById("help").addEventListener("click", show);
  /** A shortcut: its key, what it does in words, the function; `tab`: only there. `label`: how the key is written. */
  const add = (key, words, fn, { tab = null, label = key } = {}) => keys.push({ key, words, fn, tab, label });
  /** A line of the list of shortcuts for keys that an element handles itself. */
  const note = (label, words, { tab = null } = {}) => keys.push({ key: null, words, fn: null, tab, label });
  return { add, note, show };
}

// ---- tabs ------------------------------------------------------------------------------------------------------------

function makeTabs() {
  const list = document.getElementById("tabs");
  const main = document.getElementById("main");
  const buttons = new Map();
  const panels = new Map();
  for (const tab of TABS) {
    const panel = h("section", { id: `panel-${tab.key}`, class: "panel", role: "tabpanel", "aria-labelledby": `tab-${tab.key}`, hidden: true });
    const button = h("button", {
      id: `tab-${tab.key}`, type: "button", role: "tab", "aria-controls": panel.id, "aria-selected": "false", tabindex: -1,
      onclick: () => app.state.set("tab", tab.key, { push: true }),
    }, tab.label);
    buttons.set(tab.key, button);
    panels.set(tab.key, panel);
    list.append(button);
    main.append(panel);
  }
  list.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const at = TABS.findIndex((tab) => tab.key === app.tab);
    const next = TABS[(at + step + TABS.length) % TABS.length].key;
    app.state.set("tab", next, { push: true });
    buttons.get(next).focus();
    event.preventDefault();
  });
  const mounted = new Set();
  async function show(key) {
    app.tab = buttons.has(key) ? key : app.info.kind === "store" ? "store" : "images";
    for (const tab of TABS) {
      const here = tab.key === app.tab;
      buttons.get(tab.key).setAttribute("aria-selected", String(here));
      buttons.get(tab.key).tabIndex = here ? 0 : -1;
      panels.get(tab.key).hidden = !here;
    }
    if (!mounted.has(app.tab)) {
      mounted.add(app.tab);
      const module = await import(TABS.find((tab) => tab.key === app.tab).module);
      await module.mount(panels.get(app.tab), app);
    }
    document.dispatchEvent(new CustomEvent("tab", { detail: app.tab })); // a hidden panel has no size: measure now
  }
  app.state.on("tab", (key) => show(key).catch(fail));
  return show;
}

// ---- start -----------------------------------------------------------------------------------------------------------

const app = { state: makeState(), api, toast, fail, info: null, tab: null, theme: themes(), keys: keyboard() };

async function start() {
  document.getElementById("skip").addEventListener("click", () => document.getElementById("main").focus());
  app.info = await (await api("api/info")).json();
  document.getElementById("loading").remove();
  const { info } = app;
  const about = document.getElementById("about");
  about.textContent = `${number(info.count)} ${info.count === 1 ? "image" : "images"} · ${info.model.split("@")[0]}`;
  about.title = `${info.uri}\n${info.model}\n${info.preprocessing}`;
  document.title = `${info.uri.split("/").filter(Boolean).pop() ?? ""} · dinov3 explorer`;
  app.keys.add("?", "show this list", app.keys.show);
  app.keys.add("t", "change the theme", app.theme.next);
  for (const tab of TABS) app.keys.add(tab.letter, `go to ${tab.label}`, () => app.state.set("tab", tab.key, { push: true }));
  if (info.random) toast("The weights are random: neighbours share colours and layout, not meaning.");
  await makeTabs()(app.state.get("tab"));
}

start().catch((error) => {
  document.getElementById("loading").textContent = error.message;
});
