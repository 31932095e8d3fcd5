/* Search: latents by the words of their labels and tokens, or by the meaning of their labels. */
const WAIT_MS = {words: 150, meaning: 400};  // after the last key

hooks.tabs.push({id: "search", name: "Search", make: once(() => panel("Search", "search", searchPanel))});

function searchPanel() {
  const out = el("div", {}), work = worker(() => out), ways = {words: "words", meaning: "meaning"};
  const query = el("input", {type: "search", id: "search", autocomplete: "off", spellcheck: "false", oninput: () => soon()});
  const radios = Object.entries(ways).map(([by, name]) => el("label", {}, el("input", {type: "radio", name: "by", value: by, checked: by === "words", disabled: lacking(by), onchange: () => soon(0)}), " " + name));
  const hint = el("p", {class: "faint"}), by = () => form.elements.by.value;
  const form = el("form", {class: "ask", role: "search", onsubmit: (event) => { event.preventDefault(); soon(0); }},
    el("label", {for: "search"}, "Latents about"), query, el("div", {class: "row"}, el("button", {class: "primary"}, "Search"), el("fieldset", {}, el("legend", {}, "by"), radios)), hint);
  let timer = null;
  function soon(wait = WAIT_MS[by()]) {
    clearTimeout(timer);
    hint.textContent = by() === "words" ? 'All words, also as beginnings of longer ones; "..." is a phrase; a number finds its latent.' : `The labels nearest in meaning, by ${live.about.encoder}${live.about.encoder === "tfidf" ? " (words and parts of words; no encoder is set)" : ""}.`;
    draft("search", [query.value, by()]);
    timer = setTimeout(find, wait);
  }
  async function find() {
    const asked = {query: query.value, by: by()};
    if (!asked.query.trim()) { out.replaceChildren(); return; }
    await work.run("Searching", async (signal) => {
      const {found} = await askJson("api/search", asked, signal);
      out.replaceChildren(foundList(found, asked));
      return found.length === 1 ? "1 latent" : number(found.length) + " latents";
    });
  }
  const [text, way] = place().q !== undefined ? [place().q, place().by] : draft("search") || ["", "words"];
  query.value = text;
  for (const radio of form.elements.by) radio.checked = radio.value === (way === "meaning" && !lacking("meaning") ? "meaning" : "words");
  soon(0);
  return el("div", {}, form, work.line, out);
}

function foundList(found, {by}) {
  if (!found.length) return el("p", {}, by === "words" ? "Fewer words, or a search by meaning, find more." : "No label is near it.");
  const strongest = Math.max(...found.map((one) => one.score));
  return el("ol", {class: "hits"}, found.map((one) => el("li", {},
      el("span", {class: "score", title: "score " + number(one.score, 3)}, el("meter", {min: 0, max: strongest, value: one.score, "aria-label": "score " + number(one.score, 3)})),
      el("span", {}, latentLink(one.run || 0, one.latent, "Latent " + one.latent), " ", one.label,
        by === "meaning" && one.where !== one.label && el("span", {class: "faint"}, " near: " + one.where), by === "words" && one.where !== "label" && el("span", {class: "badge"}, one.where)))));
}
