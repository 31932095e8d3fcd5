"use strict";
/* What all pages share: elements whose text is text, blocks of data, tabs, the theme, the place in the address. */

/** el("a", {href: "#x", class: "y", onclick: f, "aria-label": "z"}, "text", node, [more]) -> an element. */
function el(tag, attributes, ...children) {
  const made = /^(svg|g|path|rect|line|circle|text|title|desc|polyline)$/.test(tag)
    ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return made;
}

/** A link; only the schemes that pages use. */
const link = (href, ...children) => el("a", {href: /^(#|\.{0,2}\/|https?:|[\w-]+\.html)/.test(href) ? href : "#"}, ...children);

const unpacked = new Map();  // a few blocks, the latest last
const BLOCKS_KEPT = 16;

/** The value of a block: of the page itself, or of the server that it came from. */
function block(name) {
  if (!unpacked.has(name)) {
    unpacked.set(name, read(name));
    if (unpacked.size > BLOCKS_KEPT) unpacked.delete([...unpacked.keys()].find((key) => key !== "main"));
  }
  return unpacked.get(name);
}

async function read(name) {
  const tag = [...document.querySelectorAll("script[data-block]")].find((one) => one.dataset.block === name);
  if (!tag) return (await fetch("block/" + encodeURIComponent(name))).json();
  const bytes = Uint8Array.from(atob(tag.textContent), (character) => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).json();
}

/** The place in the page, as the address has it: #latent=508&run=0. */
const place = () => Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
const address = (where) => "#" + new URLSearchParams(Object.entries(where).filter(([, value]) => value !== null && value !== undefined));
const go = (where) => { location.hash = address({...place(), ...where}); };
/** Notes a place in the address without a step back to the one before. */
const note = (where) => history.replaceState(history.state, "", address({...place(), ...where}));

/** Tabs: [[name, make], ...] where make() returns what the tab shows; arrows change them. */
function tabs(label, some, chosen = 0, onchange = () => {}) {
  const bar = el("div", {role: "tablist", class: "tabs", "aria-label": label}), panel = el("div", {role: "tabpanel", tabindex: 0});
  const buttons = some.map(([name], i) => el("button", {role: "tab", type: "button", onclick: () => show(i), onkeydown: move}, name));
  function show(i) {
    buttons.forEach((button, j) => { button.setAttribute("aria-selected", i === j); button.tabIndex = i === j ? 0 : -1; });
    panel.setAttribute("aria-label", some[i][0]);
    panel.replaceChildren(some[i][1]());
    onchange(i);
  }
  function move(event) {
    const step = {ArrowRight: 1, ArrowLeft: -1}[event.key];
    if (!step) return;
    const next = (buttons.indexOf(event.target) + step + buttons.length) % buttons.length;
    buttons[next].focus();
    show(next);
  }
  bar.append(...buttons);
  show(chosen);
  return el("div", {}, bar, panel);
}

/** The button that changes between the system's colors, light and dark; the choice is kept where that is allowed. */
function themeButton() {
  const kept = (value) => { try { if (value) localStorage.setItem("theme", value); return localStorage.getItem("theme"); } catch { return value; } };
  const themes = ["auto", "light", "dark"];
  const set = (theme) => { document.documentElement.dataset.theme = theme; button.textContent = "Theme: " + theme; };
  const button = el("button", {type: "button", onclick: () => {
    const next = themes[(themes.indexOf(document.documentElement.dataset.theme) + 1) % themes.length];
    set(next); kept(next);
  }});
  const before = kept();
  set(themes.includes(before) ? before : "auto");
  return button;
}

/** Runs [[text, value], ...] of tokens: what fires is the darker the nearer its value is to the strongest. */
function marked(runs, strongest) {
  return el("span", {class: "window"}, runs.map(([text, value]) => {
    if (!value) return text;
    const level = strongest > 0 ? Math.min(9, Math.max(1, Math.round(Math.abs(value) / strongest * 9))) : 9;
    const told = number(value);
    return el("mark", {class: (value > 0 ? "up" : "down") + level, title: told, "data-value": value}, text);
  }));
}

/** A number as people read it. */
function number(value, digits = 4) {
  if (value === null || value === undefined) return "";
  if (Number.isInteger(value)) return value.toLocaleString("en-US");
  return Math.abs(value) >= 1e-4 && Math.abs(value) < 1e6 ? String(Number(value.toPrecision(digits))) : value.toExponential(digits - 2);
}
const percent = (share, digits = 3) => share === null || share === undefined ? "" : number(100 * share, digits) + " %";

/** Begins a page: what `make(main block)` returns takes the place of "Reading ...". */
async function begin(make) {
  document.getElementById("tools").append(themeButton());
  const main = document.getElementById("main");
  try {
    main.replaceChildren(await make(await block("main")));
  } catch (error) {
    main.replaceChildren(el("p", {role: "alert"}, "This page cannot be shown: " + error.message));
    throw error;
  }
}
