/* The list of all latents that were asked for; how it is sorted, searched and filtered stands in the address. */
const lists = new Map();

const listAddress = (where) => address({...where, latent: null, view: null});
const listState = () => JSON.stringify(Object.entries(place()).filter(([name]) => name.startsWith("list.")).sort());

/** A cell, with what it is called where a screen is too narrow for columns. */
const named = (name, inner) => [el("span", {class: "phone faint"}, name + " "), inner];

/** The list of a run by the explainer of the address; it is made once, and again where the address asks for another. */
function listOf(run) {
  const explainer = explainerNow(run), key = run.number + " " + (explainer ? explainer.name : ""), there = lists.get(key);
  if (there && there.state === listState()) return there.made;
  const kept = {state: "", made: null};
  lists.set(key, kept);
  kept.made = table({
    label: "Latents of " + run.name, rows: run.latents.length, columns: columnsOf(run, explainer), noun: "latents", key: "list",
    href: (i) => pageOf(run.number, run.latents[i], place()) || "#", onchange: () => { kept.state = listState(); },
  });
  kept.state = listState();
  return kept.made;
}

/** The latents of the list in its order; of two runs side by side those of their common list. */
const latentsInList = (run) => { if (explained.partners && place().alone === undefined) return comparedList().latents(run); const one = explained.runs[run]; return listOf(one).rows().map((i) => one.latents[i]); };

function columnsOf(run, explainer) {
  const status = explainer ? explainer.status : run.status, {tokens} = run, scorers = [...(explainer ? explainer.scorers : []), ...run.scorers];
  const found = [{name: "latent", title: "Latent", numeric: true, values: run.latents, show: (latent) => String(latent)}];
  if (explainer) found.push({name: "label", title: "Label", wide: true, values: run.latents.map((latent, i) => labelOf(run.number, latent, explainer) || textAt(run, explainer.reason[i]) || statusAt(run, status[i])), show: (text, i) => labelCell(run, explainer, i)});
  const ends = new Map(scorers.map((scorer) => [scorer, endsOf(scorer.headline, [scorer.value])])), nulls = new Map(run.summary.map((one) => [one.explainer + " " + one.scorer, one.null[0]]));
  for (const scorer of scorers) {
    const none = nulls.get((run.scorers.includes(scorer) ? "" : explainer.name) + " " + scorer.name) ?? null;
    found.push({name: scorer.name, title: scorer.name, hint: words(scorer.headline), numeric: true, filter: "range", values: scorer.value,
      show: (value, i) => named(scorer.name, value === null ? el("span", {class: "faint", title: textAt(run, scorer.reason[i])}, scorer.status[i] === null ? "" : statusAt(run, scorer.status[i]))
        : el("span", {class: "scorecell", title: interval([value, scorer.low[i], scorer.high[i]])}, scoreBar([value, scorer.low[i], scorer.high[i]], none, ends.get(scorer), 72), " " + short(value)))});
  }
  const coverage = scorers.length ? run.latents.map((_, i) => scorers.reduce((least, one) => one.coverage[i] === null ? least : Math.min(least ?? 1, one.coverage[i]), null)) : [];
  if (coverage.some((share) => share !== null)) found.push({name: "coverage", title: "Coverage", hint: "share of the answers that there is, of the scorer that has fewest", numeric: true, filter: "range", values: coverage, show: (share) => named("coverage", el("span", {class: share !== null && share < 0.9 ? "warn" : null}, percent(share)))});
  if (tokens) found.push({name: "density", title: "Density", hint: "share of the tokens on which it fires; bars are logarithmic", numeric: true, filter: "range", values: run.fired.map((fired) => fired === null ? null : fired / tokens), show: (share) => named("density", densityCell(share))});
  found.push({name: "status", title: "Status", filter: "choice", values: status.map((one) => statusAt(run, one)), show: (text) => el("span", {class: "badge " + (text === "ok" ? "right" : /failed|partial/.test(text) ? "wrong" : "")}, text)});
  return found;
}

function labelCell(run, explainer, i) {
  const latent = run.latents[i], edited = hooks.note({run: run.number, latent}), text = edited && edited.label || textAt(run, explainer.text[i]), why = textAt(run, explainer.reason[i]);
  return el("span", {class: "clamped", title: (text || why || "").slice(0, 400) || null}, edited && edited.bookmark && el("span", {title: "bookmarked"}, "\u2605 "), text || el("i", {class: "faint"}, why || statusAt(run, explainer.status[i])), editedMark(run.number, latent));
}

/** What says that the label shown is an edited one. */
function editedMark(run, latent) {
  const edited = latent !== null && hooks.note({run, latent});
  return edited && edited.label ? [" ", el("span", {class: "badge"}, "edited")] : null;
}

function densityCell(share) {
  if (share === null) return "";
  const wide = share > 0 ? Math.max(1, Math.min(40, 40 * (1 + Math.log10(share) / 6))) : 0;
  return el("span", {class: "scorecell"}, el("svg", {class: "density", width: 40, height: 8, "aria-hidden": "true"}, el("rect", {class: "bar", width: wide.toFixed(1), height: 8, rx: 1})), " " + (share ? percent(share, 2) : "0 %"));
}
