/* The page of one latent: what is said of it, where that fails, where it fires, what it does. */

async function latentPage(run, latent) {
  const about = explained.runs[run];
  if (!about.rows.has(latent) || pageOf(run, latent)[0] !== "#") return absentPage(run, latent);
  const record = await recordOf(run, latent), partner = explained.partners && explained.partners[run](latent);
  if (explained.partners && place().alone === undefined) return sideBySide(run, record, partner);
  return el("div", {class: "latent"}, latentHead(run, latent), latentBody(run, record));
}

function latentHead(run, latent) {
  const about = explained.runs[run], shown = latentsInList(run), at = shown.indexOf(latent), where = place();
  const step = (by, name) => {
    const next = at < 0 ? undefined : shown[at + by], there = next === undefined ? null : pageOf(run, next, where);
    return there ? el("a", {href: there, rel: by > 0 ? "next" : "prev", id: by > 0 ? "next" : "previous"}, name) : el("span", {class: "faint"}, name);
  };
  const {folder} = about, here = location.href.replace(/#.*/, "") + address({latent, run: run || null});
  return el("div", {class: "latenthead"},
    el("nav", {"aria-label": "Latents"}, el("a", {href: listAddress(where)}, "All latents"), step(-1, "\u2190 Previous"), at >= 0 && el("span", {class: "faint"}, `${number(at + 1)} of ${number(shown.length)}`), step(1, "Next \u2192")),
    el("h2", {tabindex: -1, id: "latent"}, "Latent " + latent, explained.runs.length > 1 && el("span", {class: "faint"}, " of " + about.name)),
    hooks.beside.length > 0 && el("div", {class: "beside"}, hooks.beside.map((make) => make({run, latent}))),
    el("div", {class: "copies"}, copyButton("Copy link", here), copyButton("Copy sae-explain show", command(["sae-explain", "show", folder, latent])),
      copyButton("Copy sae-steer", command(["sae-steer", folder, "--latent", latent, "--strength", "2x"]) + ' "PROMPT"')));
}

function latentBody(run, record) {
  const about = explained.runs[run], strongest = strengthOf(record), context = about.seen.context_length;
  return [
    el("section", {class: "labels"}, record.labels.map((label) => labelCard(run, record, label)), record.scores.length > 0 && el("div", {class: "card"}, el("p", {class: "faint"}, "Scores that need no label"), record.scores.map(scoreLine)),
      !record.labels.length && !record.scores.length && el("p", {}, "Nothing was asked of it yet. ", editedBadge(run, record.latent)), record.missing && el("p", {class: "warning"}, record.missing)),
    hooks.latent.map(({name, make}) => el("section", {class: "panel", "aria-label": name}, el("h3", {}, name), make({run, latent: record.latent}))),
    el("div", {class: "columns"},
      el("div", {class: "texts"}, judgedSections(record, strongest, context), examplesOf(record, strongest, context), askedSection(run, record)),
      factsOf(run, record)),
  ];
}

function editedBadge(run, latent) {
  const edited = hooks.note({run, latent});
  return edited && edited.label && el("span", {class: "badge"}, "edited: " + edited.label);
}

function labelCard(run, record, label) {
  return el("div", {class: "card"},
    el("p", {class: "label"}, label.text === null ? el("span", {class: "warn"}, brief(label.reason.startsWith(label.status) ? label.reason : label.status + (label.reason && ": " + label.reason))) : brief(label.text),
      " ", el("span", {class: "faint"}, label.explainer + (label.by ? ` (${label.by})` : "")), " ", editedBadge(run, record.latent)),
    label.scores.map(scoreLine));
}

const strengthOf = (record) => Math.max(0, ...record.windows.map((window) => Math.abs(largestOf(window))));

function judgedSections(record, strongest, context) {
  const found = [...record.labels.map((label) => [label.explainer, label.scores]), ["without a label", record.scores]]
    .map(([name, scores]) => [name, judgedOf(record, scores, strongest, context)]).filter(([, made]) => made);
  return found.map(([name, made]) => el("section", {}, el("h3", {}, "Where the label fails" + (found.length > 1 ? ": " + name : "")), made));
}

function examplesOf(record, strongest, context) {
  const kinds = [["Strongest", record.strongest], ["By decile", record.sampled]].filter(([, some]) => some.length);
  if (!kinds.length) return el("section", {}, el("h3", {}, "Examples"), el("p", {class: "faint"}, "No examples are kept of it."));
  return el("section", {}, el("h3", {}, "Examples"), tabs("Examples", kinds.map(([name, some]) => [name, () => excerpts(record, some, strongest, context, name)])));
}

function excerpts(record, some, strongest, context, kind) {
  let before = null;
  return el("ol", {class: "windows"}, some.map(([window, decile, split], i) => {
    const told = decile >= 0 && decile !== before ? (kind === "By decile" ? `decile ${decile + 1}` : "") : "";
    before = decile;
    return el("li", {}, el("span", {class: "side"}, el("b", {}, number(largestOf(record.windows[window]), 4)), told && el("span", {class: "faint"}, told), split && el("span", {class: "faint"}, split)),
      el("span", {class: "texts"}, recordWindow(record, window, strongest, {label: `${kind} example ${i + 1}`, context})));
  }));
}

function askedSection(run, record) {
  if (Number.isInteger(record.asked_of)) return el("p", {class: "faint"}, "What models were asked is kept for some latents of a report of so many: see ", latentLink(run, record.asked_of, "latent " + record.asked_of), ".");
  const found = record.labels.flatMap((label) => [askedOf(label.asked, label.explainer), ...label.scores.map((score) => askedOf(score.asked, `${score.scorer} of ${label.explainer}`))]);
  const all = [...found, ...record.scores.map((score) => askedOf(score.asked, score.scorer))].filter(Boolean);
  return all.length > 0 && el("section", {}, el("h3", {}, "What the models were asked"), all);
}

/** What is said of a latent that is not in the page. */
function absentPage(run, latent) {
  const about = explained.runs[run], elsewhere = Number.isInteger(latent) && pageOf(run, latent), {folder, d_sae: many} = about;
  const back = el("p", {}, el("a", {href: listAddress(place())}, "All latents"));
  if (elsewhere && elsewhere[0] !== "#") return el("div", {}, back, el("p", {role: "alert"}, `Latent ${latent} is on `, link(elsewhere, "another page"), " of this report."));
  if (!Number.isInteger(latent) || latent < 0 || (many && latent >= many)) return el("div", {}, back, el("p", {role: "alert"}, `There is no latent ${place().latent}` + (many ? `: the coder has 0 to ${number(many - 1)}.` : ".")));
  const words = command(["sae-explain", "--config", folder + "/config.yaml", "--latents", latent]);
  return el("div", {}, back, el("p", {role: "alert"}, `Latent ${latent} is not in this report: nobody asked for it. To explain it: `, el("code", {}, words), " ", copyButton("Copy", words)));
}
