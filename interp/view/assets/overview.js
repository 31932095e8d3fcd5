/* What a run amounts to: scores by explainer and scorer over their null, and how many latents ended how. */

function overview(run) {
  const {facts, seen, latents, d_sae: many, spent, explanations, failures: failed} = run;
  const told = [facts.coder && ["coder", facts.coder], facts.baseline && ["baseline", facts.baseline], facts.model && ["model", facts.model], facts.site && ["site", facts.site], facts.text && ["text", facts.text],
    run.tokens && ["looked at", `${number(run.tokens)} tokens` + (seen.documents ? ` of ${number(seen.documents)} documents` : "")],
    ["latents", `${number(latents.length)}` + (explained.main.parts.length ? " here" : " asked for") + (many ? ` of ${number(many)}` : "") + (seen.alive !== undefined ? `, ${number(seen.alive)} alive` : "")]];
  return el("section", {class: "overview", "aria-label": "The run " + run.name},
    el("dl", {class: "run"}, told.filter(Boolean).map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value)))),
    Object.entries(explanations).map(([name, counts]) => statusLine(name, counts, failed[name])),
    run.summary.length > 0 && el("details", {open: matchMedia("(min-width: 40rem)").matches}, el("summary", {}, "Scores and their null"), el("div", {class: "cards"}, run.summary.map((one) => scoreCard(run, one)))), spending(spent),
    el("details", {}, el("summary", {}, "Environment"), el("p", {class: "faint"}, Object.entries(run.packages).map(([name, version]) => name + " " + version).join(", ") || "not told")));
}

/** How many latents of an explainer ended how; each leads to them. */
const statusLine = (name, counts, failed) => el("div", {class: "statuses"}, el("b", {}, name), Object.entries(counts).map(([status, n]) =>
  el("button", {type: "button", class: "chip " + (status === "ok" ? "right" : /failed|partial/.test(status) ? "wrong" : ""), title: `Show the latents that are ${status}`, onclick: () => go({"list.f.status": status, "list.page": null, explainer: name, latent: null})}, `${number(n)} ${status}`)),
  failed && el("span", {class: "warn"}, failed.map(([kind, n, first], i) => [i > 0 && ", ", `${number(n)} ${kind}`, first && [" (", brief(first), ")"]])));

function scoreCard(run, one) {
  const above = one.lift[1] !== null && one.lift[1] > 0, of = Object.values(one.statuses).reduce((sum, n) => sum + n, 0);
  return el("div", {class: "card"},
    el("h3", {}, one.scorer, el("span", {class: "faint"}, one.explainer ? " of " + one.explainer : " (no label needed)")),
    el("p", {class: "large"}, el("b", {}, short(one.mean[0])), " ", el("span", {class: "faint"}, words(one.headline) + (one.mean[1] === null ? "" : `, ${short(one.mean[1])} to ${short(one.mean[2])}`))),
    el("p", {}, "null " + interval(one.null)),
    el("p", {}, "lift ", el("b", {class: above ? "good" : null}, interval(one.lift)), one.null[0] === null && el("span", {class: "faint"}, " (too few latents for a null)")),
    spread(run, one),
    el("p", {class: "faint"}, `${number(one.latents)} of ${number(of)} latents, coverage ${one.coverage === null ? "n/a" : percent(one.coverage)}`),
    Object.entries(one.invalid).map(([kind, {answers, first}]) => el("p", {class: "warn"}, `${number(answers)} answers missing: ${kind}`, first && [" (", brief(first), ")"])));
}

const BINS = 24;

/** The scores of all latents, upwards, and those by the labels of others, downwards; each bin leads to its latents. */
function spread(run, one) {
  const explainer = run.explainers.find(({name}) => name === one.explainer), scorer = (explainer ? explainer.scorers : run.scorers).find(({name}) => name === one.scorer);
  const values = scorer ? scorer.value.filter((value) => value !== null) : [];
  if (values.length < 2) return null;
  const least = Math.min(...values, ...one.nulls), most = Math.max(...values, ...one.nulls), width = (most - least) / BINS || 1;
  const binOf = (value) => Math.min(BINS - 1, Math.floor((value - least) / width));
  const binned = (some) => some.reduce((counts, value) => { counts[binOf(value)]++; return counts; }, Array(BINS).fill(0));
  const chosen = (i) => { const some = values.filter((value) => binOf(value) === i); go({["list.f." + one.scorer]: `${Math.min(...some)}..${Math.max(...some)}`, "list.page": null, explainer: one.explainer || null, latent: null}); };
  const [own, others] = [binned(values), binned(one.nulls)].map((counts, i) => counts.map((n) => n / Math.max(1, [values, one.nulls][i].length)));
  const counts = binned(values), tallest = Math.max(...own, ...others), wide = 300, up = 56, down = one.nulls.length ? 36 : 0, step = wide / BINS;
  const height = (share, room) => share ? Math.max(1.5, share / tallest * room) : 0, round = (value) => Math.round(value * 10) / 10;
  const ends = counts.map((_, i) => [least + i * width, least + (i + 1) * width].map((end) => short(end)).join(" to "));
  const told = (i) => `${ends[i]}: ${number(counts[i])} latents` + (one.nulls.length ? `; ${percent(others[i], 2)} of the null` : "");
  const at = (value) => round((value - least) / (most - least || 1) * wide), mark = (value, name) => value !== null && el("line", {class: name, x1: at(value), x2: at(value), y1: 0, y2: up + down});
  const leads = (i) => ({class: "bin leads", role: "button", "aria-label": told(i), onclick: () => chosen(i), onkeydown: (event) => {
    const next = full[full.indexOf(i) + {ArrowRight: 1, ArrowLeft: -1}[event.key]];
    if (event.key === "Enter" || event.key === " ") { event.preventDefault(); chosen(i); }
    if (next === undefined) return;
    event.preventDefault();
    for (const [at, tab] of [[i, -1], [next, 0]]) bins[at].setAttribute("tabindex", tab);
    bins[next].focus();
  }});
  const full = counts.flatMap((n, i) => n ? [i] : []), bins = own.map((share, i) => el("g", counts[i] ? {...leads(i), tabindex: i === full[0] ? 0 : -1} : {class: "bin"},
    el("title", {}, told(i)),
    el("rect", {class: "room", x: round(i * step), y: 0, width: round(step), height: up + down}),
    el("rect", {class: "bar", x: round(i * step + 0.5), y: round(up - height(share, up)), width: round(step - 1), height: round(height(share, up))}),
    el("rect", {class: "others", x: round(i * step + 0.5), y: up, width: round(step - 1), height: round(height(others[i], down))})));
  return el("svg", {class: "spread", role: "group", viewBox: `0 0 ${wide} ${up + down + 14}`, "aria-label": `Scores of ${values.length} latents, from ${short(least)} to ${short(most)}` + (one.nulls.length ? `, above ${one.nulls.length} scores by other latents' labels` : "")},
    bins,
    el("line", {class: "axis", x1: 0, x2: wide, y1: up, y2: up}), mark(one.mean[0], "mean"), mark(one.null[0], "nullmean"),
    el("text", {x: 0, y: up + down + 12}, short(least)), el("text", {x: wide, y: up + down + 12, class: "end"}, short(most)), down > 0 && el("text", {x: wide / 2, y: up + down + 12, class: "middle"}, "own labels above, others' below"));
}

function spending(spent) {
  const roles = Object.entries(spent || {}).filter(([, account]) => account.calls || account.cached);
  if (!roles.length) return null;
  const usd = roles.map(([, {usd: cost}]) => cost), known = usd.every((cost) => cost !== null);
  return el("p", {class: "faint"}, "Asked: ", roles.map(([role, account]) => `${role} ${number(account.calls)} calls` + (account.tokens_in || account.tokens_out ? `, ${number(account.tokens_in)} tokens in, ${number(account.tokens_out)} out` : "") + (account.cached ? `, ${number(account.cached)} from cache` : "")).join("; "),
    known ? (usd.some(Boolean) ? `; ${usd.reduce((sum, cost) => sum + cost, 0).toFixed(2)} USD` : "; no cost") : "; cost unknown, no prices were given");
}
