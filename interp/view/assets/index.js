/* The index of the page: which latents there are, what is said of them, and where their records lie. */
const explained = {main: null, runs: []};

/** Takes the main block in. */
function indexed(main) {
  explained.main = main;
  explained.runs = main.runs.map((run, number) => ({...run, number, rows: new Map(run.latents.map((latent, row) => [latent, row]))}));
  if (main.pairs && main.pairs.by) explained.partners = partnersOf(main.pairs, explained.runs);
}

/** The run and explainer that the address names. */
const runNow = (where = place()) => explained.runs[Number(where.run) || 0] || explained.runs[0];
const explainerNow = (run, where = place()) => run.explainers.find((one) => one.name === where.explainer) || run.explainers[0] || null;
const textAt = (run, number) => number === null || number === undefined ? null : run.texts[number];
const statusAt = (run, number) => run.statuses[number] || "unasked";
const command = (words) => words.map((word) => /^[\w./:=,@%+-]+$/.test(word) ? word : "'" + String(word).replaceAll("'", "'\\''") + "'").join(" ");

/** The label of a latent: as it was edited, or what the explainer says; null if there is none. */
function labelOf(run, latent, explainer = explainerNow(explained.runs[run])) {
  const edited = hooks.note({run, latent});
  if (edited && edited.label) return edited.label;
  const one = explained.runs[run], row = one.rows.get(latent);
  return row === undefined || !explainer ? null : textAt(one, explainer.text[row]);
}

/** The address of a latent's page: here, on another page of the folder, or null if it is on none. */
function pageOf(run, latent, kept = {}) {
  const {parts, first, last} = explained.main, where = address({...kept, view: null, latent, run: run || null});
  if (explained.runs[run].rows.has(latent) && latent >= first && latent <= last) return where;
  const part = parts.find(([from, to]) => latent >= from && latent <= to);
  return part && !(latent >= first && latent <= last) ? part[2] + where : null;
}

/** A link to a latent's page; text alone where it has none. */
function latentLink(run, latent, text = String(latent)) {
  const there = pageOf(run, latent);
  return there ? link(there, text) : el("span", {}, text);
}

/** The record of a latent: its block is read when it is looked at. */
async function recordOf(run, latent) {
  const row = explained.runs[run].rows.get(latent), part = Math.floor(row / explained.main.part);
  const {latents} = await block(run + "/" + part);
  return latents.find((one) => one.latent === latent);
}

/** By run, which latent of the other one belongs to each: [latent, how alike]. */
function partnersOf({by, pairs}, runs) {
  if (by === "id") return runs.map((_, i) => (latent) => runs[1 - i].rows.has(latent) ? [latent, null] : null);
  const maps = [0, 1].map((i) => new Map((pairs || []).map((pair) => [pair[i], [pair[1 - i], pair[2]]])));
  return maps.map((map) => (latent) => map.get(latent) || null);
}

/** A button that copies text, and says that it has. */
function copyButton(name, text) {
  const button = el("button", {type: "button", title: text, onclick: async () => {
    let done = true;
    try { await navigator.clipboard.writeText(text); } catch { done = copiedByHand(text); }
    button.textContent = done ? "Copied" : text;
    if (done) setTimeout(() => { button.textContent = name; }, 1500);
  }}, name);
  return button;
}

function copiedByHand(text) {
  const area = el("textarea", {"aria-hidden": "true", class: "unseen"});
  area.value = text;
  document.body.append(area);
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  return done;
}
