/* The tokens of a text, each of which can be pointed at: hover, click, arrow keys. */

/** Text with a new line behind each code of one. */
const lined = (text) => text.split(/(?<=\\n)/).flatMap((part) => part.endsWith("\\n") ? [part, el("br")] : [part]);

/**
 * Tokens as buttons that flow as text: {node, shade(values, strongest, mark), choose(place)}.
 * texts: by token, "" for one that is told with another; name(place): what a screen reader hears; point(place or null, kept)
 * is called when one is pointed at, and with `kept` when it is chosen.
 */
function tokenStrip(texts, {label, name, point}) {
  const box = el("div", {class: "tokens", role: "group", "aria-label": label}), buttons = new Map();
  let now = null, chosen = null;
  texts.forEach((text, place) => {
    if (!text) return;
    const button = el("span", {role: "button", class: "token", tabindex: -1, "data-place": place, "aria-pressed": "false", "aria-label": name(place)}, el("mark", {}, lined(text)));
    buttons.set(place, button);
    box.append(button);
  });
  const places = [...buttons.keys()];
  function reach(place) {
    if (now !== null) buttons.get(now).tabIndex = -1;
    now = place;
    buttons.get(place).tabIndex = 0;
  }
  function choose(place) {
    if (chosen !== null) buttons.get(chosen).setAttribute("aria-pressed", "false");
    chosen = place === chosen || !buttons.has(place) ? null : place;
    if (chosen !== null) { buttons.get(chosen).setAttribute("aria-pressed", "true"); reach(chosen); }
    point(chosen, true);
  }
  const placeOf = (event) => { const button = event.target.closest("[data-place]"); return button ? Number(button.dataset.place) : null; };
  box.addEventListener("pointerover", (event) => { if (placeOf(event) !== null) point(placeOf(event), false); });
  box.addEventListener("pointerleave", () => point(chosen, false));
  box.addEventListener("click", (event) => { if (placeOf(event) !== null) choose(placeOf(event)); });
  box.addEventListener("focusin", (event) => { if (placeOf(event) !== null && event.target.matches(":focus-visible")) { reach(placeOf(event)); point(now, false); } });
  box.addEventListener("focusout", (event) => { if (!box.contains(event.relatedTarget)) point(chosen, false); });
  box.addEventListener("keydown", (event) => {
    if (event.key === "Enter" || event.key === " ") { event.preventDefault(); choose(placeOf(event)); return; }
    const at = places.indexOf(placeOf(event)), goal = {ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: places.length - 1}[event.key];
    if (goal === undefined || goal < 0 || goal >= places.length || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    event.stopPropagation();
    reach(places[goal]);
    buttons.get(now).focus();
  });
  if (places.length) reach(places[0]);
  /** Colors the tokens by their values; those at `mark` (a set of places) are outlined. */
  function shade(values, strongest, mark = new Set()) {
    for (const [place, button] of buttons) {
      const value = values[place] || 0, level = !value ? 0 : strongest > 0 ? Math.min(9, Math.max(1, Math.round(Math.abs(value) / strongest * 9))) : 9;
      button.firstChild.setAttribute("class", level ? (value > 0 ? "up" : "down") + level : "");
      button.classList.toggle("lit", mark.has(place));
    }
  }
  return {node: box, shade, choose, chosen: () => chosen};
}
