/* Scores: a bar with the interval and the null, the same in words, and by what kind of window they fail. */

/** The least and most of what a headline can be; measured where it has no such ends. */
function endsOf(headline, values) {
  if (/accuracy|auroc|rate|f1|recall|precision/.test(headline || "")) return [0, 1];
  const known = values.flat().filter((value) => Number.isFinite(value));
  const low = Math.min(0, ...known), high = Math.max(headline === "correlation" ? 1 : 0, ...known);
  return low < high ? [low, high] : [low, low + 1];
}

/** A score as a bar: the line is its interval, the mark across is the null. */
function scoreBar([value, low, high], none, [least, most], wide = 110) {
  const at = (x) => Math.round(10 * (2 + (wide - 4) * Math.min(1, Math.max(0, (x - least) / (most - least))))) / 10;
  const known = (x) => x !== null && x !== undefined;
  const better = known(none) && known(value) ? (known(low) && low > none ? "above" : known(high) && high < none ? "below" : "") : "";
  return el("svg", {class: "score " + better, width: wide, height: 16, viewBox: `0 0 ${wide} 16`, "aria-hidden": "true"},
    el("rect", {class: "track", x: 2, y: 6, width: wide - 4, height: 4, rx: 2}),
    known(value) && el("rect", {class: "filled", x: at(Math.max(least, Math.min(0, most))), y: 6, width: Math.max(0, at(value) - at(Math.max(least, Math.min(0, most)))), height: 4, rx: 2}),
    known(low) && known(high) && el("line", {class: "interval", x1: at(low), x2: at(high), y1: 8, y2: 8}),
    known(none) && el("line", {class: "null", x1: at(none), x2: at(none), y1: 2, y2: 14}),
    known(value) && el("circle", {class: "value", cx: at(value), cy: 8, r: 3.5}));
}

const short = (value, digits = 3) => value === null || value === undefined ? "n/a" : value.toFixed(digits).replace(/^(-?)0\./, "$1.");
const interval = ([value, low, high]) => short(value) + (low === null || low === undefined || high === null || high === undefined ? "" : ` (${short(low)} to ${short(high)})`);
const words = (name) => String(name).replaceAll("_", " ");

/** A score of a latent as a line. */
function scoreLine(score) {
  const [value] = score.value, head = el("span", {class: "scorer"}, score.scorer);
  if (value === null) return el("div", {class: "scoreline"}, head, el("span", {class: "badge bad"}, score.status), el("span", {class: "faint"}, "no score", score.reason && [": ", brief(score.reason)]));
  const ends = endsOf(score.headline, [score.value, score.null]);
  return el("div", {class: "scoreline"}, head, scoreBar(score.value, score.null[0], ends),
    el("span", {}, el("b", {}, short(value)), " ", el("span", {class: "faint"}, words(score.headline) + (score.value[1] === null ? "" : `, ${short(score.value[1])} to ${short(score.value[2])}`))),
    el("span", {}, "null " + short(score.null[0])), el("span", {}, "lift ", el("b", {}, interval(score.lift))),
    el("span", {}, `n ${number(score.n)}`), score.coverage !== null && score.coverage !== undefined && el("span", {class: score.coverage < 0.9 ? "warn" : null}, "coverage " + percent(score.coverage)),
    score.status !== "ok" && el("span", {class: "badge"}, score.status), score.reason && el("span", {class: "warn"}, "missing: ", brief(score.reason)));
}

const TIERS = {random: "random text", same_token: "same token", neighbor: "a neighbor fires", active: "fires"};

/** By kind of window, how much of it a label gets right: [[kind, [value, low, high]], ...]. */
function failures(score) {
  const found = [], of = (name) => score.measures[name];
  const kinds = of("tpr") ? ["tnr", "told apart, "] : ["auroc", "against "];
  for (let decile = 9; decile >= 0; decile--) if (of("recall_decile_" + decile)) found.push(["found, decile " + (decile + 1) + ({9: ", strongest", 0: ", weakest"}[decile] || ""), of("recall_decile_" + decile)]);
  for (const tier of ["random", "same_token", "neighbor"]) {
    const measure = of(tier === "random" ? kinds[0] : `${kinds[0]}[${tier}]`);
    if (measure) found.push([kinds[1] + TIERS[tier], measure]);
  }
  return found.filter(([, [value]]) => value !== null);
}

/** Where a label fails: bars by kind of window, and in a line which is the worst. */
function failuresOf(score) {
  const some = failures(score);
  if (some.length < 2) return null;
  const groups = [["Windows in which it fires", some.filter(([kind]) => kind.startsWith("found"))], ["Windows in which it is silent", some.filter(([kind]) => !kind.startsWith("found"))]];
  const [worst, [least, , most]] = groups.flatMap(([, group]) => group.length > 3 ? averaged(group) : group).reduce((a, b) => b[1][0] < a[1][0] ? b : a);
  return el("div", {class: "failures"},
    el("p", {}, "Weakest: ", el("b", {}, worst.replace(/^(told apart|against), /, "silent windows, ")), `, ${percent(least, 2)} ` + (worst.startsWith("against") ? "ranked below those in which it fires" : "right") + verdict(worst, least, most)),
    groups.filter(([, group]) => group.length).map(([title, group]) => el("div", {}, el("h4", {}, title), el("ul", {class: "bars"}, group.map(([kind, measure]) =>
      el("li", {}, el("span", {}, kind.replace("found, ", "")), scoreBar(measure, null, [0, 1], 90), el("span", {}, percent(measure[0], 2))))))));
}

/** What a weakness says of a label, where it is one by more than the chance of so few windows. */
function verdict(worst, least, most) {
  if (least > 0.7 || most > 0.8) return ".";
  if (worst.includes("fires strongly")) return ": the label misses what it fires on most.";
  if (worst.includes("fires weakly")) return ": the label is too narrow for what it fires on weakly.";
  if (worst.includes("same token")) return ": the label names a token, not when it fires on it.";
  return worst.includes("neighbor") ? ": the label is as true of neighbors." : ": the label is too broad.";
}

/** Deciles are of a few windows each: the weakest three and strongest three together say more. */
function averaged(group) {
  const mean = (part) => [part.reduce((sum, [, [value]]) => sum + value, 0) / part.length];
  return [["windows in which it fires strongly", mean(group.slice(0, 3))], ["windows in which it fires weakly", mean(group.slice(-3))]];
}

/** Text of strangers; of more than is read in a moment, the beginning and a button that shows the rest. */
function brief(text, most = 400) {
  if (!text || text.length <= most + 100) return text;
  const beginning = [...text.slice(0, most)].slice(0, -1).join(""), told = el("span", {}, beginning, "\u2026");
  const button = el("button", {type: "button", class: "quiet more", "aria-expanded": "false", onclick: () => {
    const all = button.getAttribute("aria-expanded") === "false";
    told.textContent = all ? text : beginning + "\u2026";
    button.textContent = all ? "less" : `all ${number(text.length)} characters`;
    button.setAttribute("aria-expanded", all);
  }}, `all ${number(text.length)} characters`);
  return el("span", {}, told, " ", button);
}

/** All figures of a score. */
const measuresOf = (score) => el("details", {}, el("summary", {}, "All figures"),
  el("ul", {class: "figures"}, Object.entries(score.measures).map(([name, measure]) => el("li", {}, words(name) + " ", el("b", {}, interval(measure))))));

/** One question as it went to a model. */
const askedOf = (asked, name) => asked && asked.length > 0 && el("details", {class: "asked"}, el("summary", {}, "A question as it went out: " + name),
  asked.map(([role, text]) => el("div", {}, el("b", {}, role), el("pre", {tabindex: 0}, text))));
