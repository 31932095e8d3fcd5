/* Two runs side by side: latents of one coder by their ids, those of two coders as they are matched. */

/** What there is of both runs: [latent of the first or null, of the second or null, how alike]. */
function pairRows() {
  const [a, b] = explained.runs, {by, pairs} = explained.main.pairs;
  if (by === "id") return [...new Set([...a.latents, ...b.latents])].sort((x, y) => x - y).map((latent) => [a.rows.has(latent) ? latent : null, b.rows.has(latent) ? latent : null, null]);
  const some = pairs.filter(([x, y]) => a.rows.has(x) || b.rows.has(y)), [left, right] = [0, 1].map((i) => new Set(some.map((pair) => pair[i])));
  return [...some, ...a.latents.filter((latent) => !left.has(latent)).map((latent) => [latent, null, null]), ...b.latents.filter((latent) => !right.has(latent)).map((latent) => [null, latent, null])];
}

/** The list of both runs, and what became better or worse. */
function comparedList() {
  const rows = pairRows(), {runs} = explained, {by} = explained.main.pairs, explainers = runs.map((run) => explainerNow(run)), places = runs.map((run, i) => rows.map((row) => run.rows.get(row[i])));
  const columns = by === "id" ? [{name: "latent", title: "Latent", numeric: true, values: rows.map(([a, b]) => a ?? b), show: (latent) => String(latent)}]
    : [...runs.map((run, i) => ({name: "latent" + i, title: "Latent of " + run.name, numeric: true, values: rows.map((row) => row[i]), show: (latent) => latent === null ? (i ? "" : "none") : String(latent)})),
      {name: "alike", title: by === "decoder" ? "Cosine" : by, numeric: true, filter: "range", values: rows.map((row) => row[2]), show: (value) => value === null ? "" : short(value, 2)}];
  const of = (i, j, from) => places[i][j] === undefined || !from ? null : from[places[i][j]];
  runs.forEach((run, i) => columns.push({name: "label" + i, title: run.name, wide: true, values: rows.map((row, j) => row[i] === null ? "" : labelOf(i, row[i], explainers[i]) || textAt(run, of(i, j, explainers[i] && explainers[i].reason)) || ""), show: (text) => el("span", {class: "clamped", title: text}, text)}));
  const scorers = runs.map((run, i) => [...(explainers[i] ? explainers[i].scorers : []), ...run.scorers]);
  for (const first of scorers[0]) {
    const second = scorers[1].find(({name, headline}) => name === first.name && headline === first.headline);
    if (!second) continue;
    const pair = [first, second].map(({value}, i) => rows.map((_, j) => of(i, j, value)));
    pair.forEach((values, i) => columns.push({name: first.name + i, title: `${first.name}, ${runs[i].name}`, numeric: true, filter: "range", values, show: (value) => value === null ? "" : short(value)}));
    columns.push({name: first.name + "-d", title: "difference", hint: `${runs[1].name} less ${runs[0].name}`, numeric: true, filter: "range", values: rows.map((_, j) => pair[0][j] === null || pair[1][j] === null ? null : Number((pair[1][j] - pair[0][j]).toFixed(6))),
      show: (value) => value === null ? "" : el("span", {class: value > 0 ? "good" : value < 0 ? "warn" : null}, (value > 0 ? "+" : "") + short(value))});
  }
  runs.forEach((run, i) => columns.push({name: "status" + i, title: "Status, " + run.name, filter: "choice", values: rows.map((row, j) => row[i] === null ? "" : statusAt(run, of(i, j, explainers[i] ? explainers[i].status : run.status)))}));
  return table({label: "Latents of both runs", rows: rows.length, columns, noun: "latents", key: "both", sort: by === "id" ? "" : "-alike", href: (j) => (rows[j][0] === null ? pageOf(1, rows[j][1], place()) : pageOf(0, rows[j][0], place())) || "#"});
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
