/* What is known of a latent beside its labels: tokens, neighbors, what fires with it, and how its values lie. */

const chips = (tokens) => el("ul", {class: "chips"}, tokens.map((token) => Array.isArray(token)
  ? el("li", {}, el("code", {}, token[0]), " ", el("span", {class: "faint"}, percent(token[1], 2))) : el("li", {}, el("code", {}, token))));

function factsOf(run, record) {
  const {facts} = record, about = explained.runs[run], part = (title, ...inner) => el("section", {}, el("h3", {}, title), inner);
  const rate = record.fired !== null && record.tokens ? el("p", {}, el("b", {}, number(record.fired)), ` of ${number(record.tokens)} tokens, ${percent(record.fired / record.tokens)}`) : el("p", {class: "faint"}, "The folder holds no evidence of it.");
  if (!facts) return el("div", {class: "facts"}, part("How often it fires", rate), el("p", {class: "faint"}, "Nothing more is kept of it: the run is of an older version, or was imported."));
  const lists = [["Promotes", facts.promoted, "The tokens whose logits its direction raises most"], ["Suppresses", facts.suppressed, "and lowers most"]];
  return el("div", {class: "facts"},
    part("How often it fires", rate, facts.fired !== 0 && el("p", {}, "Largest activation ", el("b", {}, number(facts.largest, 6)))),
    facts.top_tokens.length > 0 && part("Fires on", chips(facts.top_tokens)),
    lists.filter(([, tokens]) => tokens.length).map(([title, tokens, hint]) => el("section", {title: hint}, el("h3", {}, title), chips(tokens))),
    part("Neighbors by decoder", facts.neighbors.length ? nearLatents(run, facts.neighbors.map(([latent, cosine]) => [latent, "cosine " + short(cosine, 2)])) : el("p", {class: "faint"}, "none")),
    part("Fires together with", facts.together === null ? el("p", {class: "faint"}, "not counted in this run") : facts.together.length
      ? nearLatents(run, facts.together.map(([latent, share, lift, peaks]) => [latent, `at ${percent(share, 2)} of ${number(peaks)} peaks, ${number(lift, 2)} times chance`])) : el("p", {class: "faint"}, "nothing")),
    (facts.histogram || []).some(Boolean) && valuesPlot(facts, about.edges), (facts.positions || []).some(Boolean) && placesPlot(facts, about.seen.context_length));
}

const nearLatents = (run, some) => el("ul", {class: "near"}, some.map(([latent, told]) => el("li", {}, latentLink(run, latent), " ", el("span", {class: "faint"}, told),
  labelOf(run, latent) && el("span", {class: "clamped"}, labelOf(run, latent)))));

function valuesPlot({histogram, largest}, edges) {
  const first = histogram.findIndex(Boolean), last = histogram.length - 1 - [...histogram].reverse().findIndex(Boolean);
  const labels = edges.slice(first, last + 1).map((edge) => number(edge, 3));
  return bars(histogram.slice(first, last + 1), labels, {title: "Activations", x: "from this value on (half octaves)", y: "tokens", note: `${number(histogram.reduce((sum, count) => sum + count, 0))} tokens, largest ${number(largest)}`});
}

function placesPlot({positions}, context) {
  const step = context ? context / positions.length : null;
  return bars(positions, positions.map((_, i) => step ? number(Math.round(i * step)) : i + "/16"), {title: "Positions", x: "place in the row, from", y: "tokens"});
}
