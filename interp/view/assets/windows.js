/* Windows of text: tokens are the darker the more the latent fires, and say their values to pointers and keys. */
const CUT = "\x7f", NEAR = 12;  // tokens on either side of the peak that are shown at first
const tip = el("div", {class: "tip", "aria-hidden": "true", hidden: true}), aloud = el("div", {class: "unseen", role: "status"});

/** The tokens of a window of a record: [[text, value], ...]. */
const tokensOf = ([text, values]) => text.split(CUT).map((piece, place) => [piece, values[place] || 0]);
const largestOf = ([, values]) => Object.values(values).reduce((most, value) => Math.abs(value) > Math.abs(most) ? value : most, 0);

/**
 * Tokens [[text, value], ...] with values by hover and focus: arrows go from token to token, Enter shows all of them.
 * options: label (its name), peak (about which it is shown at first), marks (places that a judge was shown marked),
 * levels (what was predicted for each token, 0 to 9), first (its place in the corpus), context (tokens of a row),
 * tokens (which token of the window stands at a place; by default that of the same number).
 */
function windowOf(tokens, strongest, {label = "text", peak = null, marks = [], levels = null, first = null, context = null, tokens: numbers = null} = {}) {
  const marked = new Set(marks), far = (place) => peak !== null && Math.abs(place - peak) > NEAR;
  const pieces = tokens.map(([text, value], place) => {
    const level = !value ? 0 : strongest > 0 ? Math.min(9, Math.max(1, Math.round(Math.abs(value) / strongest * 9))) : 9;
    const classes = [value && (value > 0 ? "up" : "down") + level, far(place) && "far", marked.has(place) && "asked", levels && "level" + Math.round(levels[place])];
    return el(value ? "mark" : "span", {"data-place": place, class: classes.filter(Boolean).join(" ") || null}, text);
  });
  const cut = tokens.some((_, place) => far(place)), box = el("span", {class: "window" + (cut ? " near" : ""), tabindex: 0, role: "group", "aria-label": label + "; arrow keys read its tokens"}, pieces);
  const more = cut && el("button", {type: "button", class: "quiet more", "aria-expanded": "false", "aria-label": "Full context of " + label, onclick: () => opened(box.classList.contains("near"))}, "more");
  let now = peak ?? Math.max(0, tokens.findIndex(([, value]) => value)), lit = null;
  function opened(full) {
    box.classList.toggle("near", !full);
    more.textContent = full ? "less" : "more";
    more.setAttribute("aria-expanded", full);
  }
  function told(place) {
    const [text, value] = tokens[place], share = value && strongest ? ` (${percent(Math.abs(value) / strongest, 2)} of its largest)` : "";
    const parts = ['"' + text + '"', (value ? number(value, 6) : "0") + share];
    if (levels) parts.push("predicted " + number(levels[place], 2) + " of 9");
    if (marked.has(place)) parts.push("marked for the judge");
    if (first !== null && context) parts.push("token " + ((first % context) + (numbers ? numbers[place] : place)) + " of its row");
    return parts;
  }
  function tell(place, keys) {
    if (lit) lit.classList.remove("lit");
    lit = pieces[place];
    lit.classList.add("lit");
    showTip(lit, told(place));
    if (keys) aloud.textContent = told(place).join(", ");
  }
  function quiet() { if (lit) lit.classList.remove("lit"); lit = null; tip.hidden = true; }
  const shown = (place) => !(box.classList.contains("near") && far(place));
  box.addEventListener("pointerover", (event) => { const piece = event.target.closest("[data-place]"); if (piece) tell(Number(piece.dataset.place), false); });
  box.addEventListener("pointerleave", quiet);
  box.addEventListener("blur", quiet);
  box.addEventListener("focus", () => { if (box.matches(":focus-visible")) tell(now, true); });
  box.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && more) { event.preventDefault(); opened(box.classList.contains("near")); return; }
    if (event.key === "Escape") { quiet(); return; }
    const goal = {ArrowRight: now + 1, ArrowLeft: now - 1, Home: 0, End: tokens.length - 1}[event.key];
    if (goal === undefined || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    event.stopPropagation();
    if (goal < 0 || goal >= tokens.length) return;
    if (!shown(goal)) opened(true);
    now = goal;
    tell(now, true);
  });
  return el("span", {class: "excerpt"}, box, more && [" ", more]);
}

function showTip(piece, parts) {
  if (!tip.isConnected) document.body.append(tip, aloud);
  tip.replaceChildren(...parts.map((part, i) => el(i === 1 ? "b" : "span", {}, part)));
  tip.hidden = false;
  const box = piece.getClientRects()[0] || piece.getBoundingClientRect(), wide = tip.offsetWidth, tall = tip.offsetHeight;
  tip.style.left = Math.max(4, Math.min(document.documentElement.clientWidth - wide - 4, box.left)) + scrollX + "px";
  tip.style.top = (box.top > tall + 8 ? box.top - tall - 5 : box.bottom + 5) + scrollY + "px";
}

/** A window of a record, with its largest value before it. */
function recordWindow(record, i, strongest, options = {}) {
  const window = record.windows[i], [, , , first, peak, numbers] = window, context = options.context;
  return windowOf(tokensOf(window), strongest, {peak, first, context, tokens: numbers, ...options});
}
