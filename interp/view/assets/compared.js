/* Two runs side by side: latents of one coder by their ids, those of two coders as they are matched. */

/** What there is of both runs: [latent of the first or null, of the second or null, how alike]. */
function pairRows() {
  const [a, b] = explained.runs, {by, pairs} = explained.main.pairs;
  if (by === "id") return [...new Set([...a.latents, ...b.latents])].sort((x, y) => x - y).map((latent) => [a.rows.has(latent) ? latent : null, b.rows.has(latent) ? latent : null, null]);
  const some = pairs.filter(([x, y]) => a.rows.has(x) || b.rows.has(y)), [left, right] = [0, 1].map((i) => new Set(some.map((pair) => pair[i])));
  return [...some, ...a.latents.filter((latent) => !left.has(latent)).map((latent) => [latent, null, null]), ...b.latents.filter((latent) => !right.has(latent)).map((latent) => [null, latent, null])];
}

/** What both runs amount to, by explainer and scorer. */
function comparedSummary() {
  const [a, b] = explained.runs, pairs = a.summary.map((one) => [one, b.summary.find((other) => other.explainer === one.explainer && other.scorer === one.scorer)]);
  const told = (one) => one ? [el("b", {}, short(one.mean[0])), ` lift ${interval(one.lift)}, ${number(one.latents)} latents`] : "none";
  return el("div", {class: "scroll", tabindex: 0, role: "region", "aria-label": "Scores of both runs"}, el("table", {}, el("thead", {}, el("tr", {}, ["Score", a.name, b.name, "Difference"].map((name) => el("th", {scope: "col"}, name)))),
    el("tbody", {}, pairs.map(([one, other]) => el("tr", {}, el("th", {scope: "row"}, `${one.scorer} of ${one.explainer || "no label"}, ${words(one.headline)}`), el("td", {}, told(one)), el("td", {}, told(other)), el("td", {}, other ? signed(other.mean[0] === null || one.mean[0] === null ? null : other.mean[0] - one.mean[0]) : ""))))));
}

const signed = (value) => value === null ? "" : el("span", {class: value > 0 ? "good" : value < 0 ? "warn" : null}, (value > 0 ? "+" : "") + short(value));
const comparedState = () => JSON.stringify(Object.entries(place()).filter(([name]) => /^(both\.|explainer$)/.test(name)).sort());
let comparedNow = null;

/** The list of both runs, and what became better or worse; it is made again where the address asks for another. */
function comparedList() {
  if (comparedNow && comparedNow.state === comparedState()) return comparedNow;
  const rows = pairRows();
  const made = comparedTable(rows, () => { if (comparedNow && comparedNow.rows === rows) comparedNow.state = comparedState(); });
  comparedNow = {rows, made, state: comparedState(), latents: (run) => made.rows().map((i) => rows[i][run]).filter((latent) => latent !== null)};
  return comparedNow;
}

function comparedTable(rows, onchange) {
  const {runs} = explained, {by} = explained.main.pairs, explainers = runs.map((run) => explainerNow(run)), places = runs.map((run, i) => rows.map((row) => run.rows.get(row[i])));
  const columns = by === "id" ? [{name: "latent", title: "Latent", numeric: true, values: rows.map(([a, b]) => a ?? b), show: (latent) => String(latent)}]
    : [...runs.map((run, i) => ({name: "latent" + i, title: "Latent of " + run.name, numeric: true, values: rows.map((row) => row[i]), show: (latent) => i ? named(run.name, latent === null ? "none" : String(latent)) : latent === null ? "none" : String(latent)})),
      {name: "alike", title: by === "decoder" ? "Cosine" : by, numeric: true, filter: "range", values: rows.map((row) => row[2]), show: (value) => value === null ? "" : named(by === "decoder" ? "cosine" : by, short(value, 2))}];
  const of = (i, j, from) => places[i][j] === undefined || !from ? null : from[places[i][j]];
  runs.forEach((run, i) => columns.push({name: "label" + i, title: run.name, wide: true, values: rows.map((row, j) => row[i] === null ? "" : labelOf(i, row[i], explainers[i]) || textAt(run, of(i, j, explainers[i] && explainers[i].reason)) || ""), show: (text, j) => el("span", {class: "clamped", title: text}, i && text && text === columns.find(({name}) => name === "label0").values[j] ? el("span", {class: "faint"}, "the same") : text, editedMark(i, rows[j][i]))}));
  const scorers = runs.map((run, i) => [...(explainers[i] ? explainers[i].scorers : []), ...run.scorers]);
  for (const first of scorers[0]) {
    const second = scorers[1].find(({name, headline}) => name === first.name && headline === first.headline);
    if (!second) continue;
    const pair = [first, second].map(({value}, i) => rows.map((_, j) => of(i, j, value)));
    pair.forEach((values, i) => columns.push({name: first.name + i, title: `${first.name}, ${runs[i].name}`, numeric: true, filter: "range", values, show: (value) => value === null ? "" : named(`${first.name}, ${runs[i].name}`, short(value))}));
    columns.push({name: first.name + "-d", title: "difference", hint: `${runs[1].name} less ${runs[0].name}`, numeric: true, filter: "range", values: rows.map((_, j) => pair[0][j] === null || pair[1][j] === null ? null : Number((pair[1][j] - pair[0][j]).toFixed(6))),
      show: (value) => value === null ? "" : named("difference", signed(value))});
  }
  runs.forEach((run, i) => columns.push({name: "status" + i, title: "Status, " + run.name, filter: "choice", values: rows.map((row, j) => row[i] === null ? "" : statusAt(run, of(i, j, explainers[i] ? explainers[i].status : run.status))), show: (text) => text && named("status, " + run.name, text)}));
  return table({label: "Latents of both runs", rows: rows.length, columns, noun: "latents", key: "both", sort: by === "id" ? "" : "-alike", href: (j) => (rows[j][0] === null ? pageOf(1, rows[j][1], place()) : pageOf(0, rows[j][0], place())) || "#", onchange});
}

/** The same latent of two runs, or two that are matched. */
async function sideBySide(run, record, partner) {
  const sides = [[run, record]], other = 1 - run;
  if (partner && explained.runs[other].rows.has(partner[0]) && pageOf(other, partner[0])[0] === "#") sides.push([other, await recordOf(other, partner[0])]);
  else sides.push([other, null]);
  if (run === 1) sides.reverse();
  const told = partner && partner[1] !== null ? `${explained.main.pairs.by} ${short(partner[1], 2)}` : "";
  return el("div", {class: "latent"}, latentHead(run, record.latent), told && el("p", {class: "faint"}, `Matched by ${told}.`),
    el("div", {class: "sides"}, sides.map(([number, one]) => el("section", {class: "side-of", "aria-label": explained.runs[number].name},
      el("h3", {class: "run"}, explained.runs[number].name + (one ? `: latent ${one.latent}` : "")), one ? latentBody(number, one)
        : partner ? el("p", {class: "faint"}, "Its latent ", latentLink(number, partner[0]), " is not on this page.") : el("p", {class: "faint"}, "No latent of this run belongs to it.")))));
}
