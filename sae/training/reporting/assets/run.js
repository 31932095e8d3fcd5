/* The page of a training run, or of several beside each other. */
const DRAWN = [["loss", "Loss"], ["fvu", "Fraction of variance unexplained"], ["l0", "L0"], ["dead_share", "Dead share"], ["ce_recovered", "Cross-entropy recovered"]];
const SHORT = {fvu: "FVU", l0: "L0", dead_share: "dead share", ce_recovered: "CE recovered", loss: "loss"};
const PLAIN = {"FVU": 1, "L0": 1, "CE recovered": 1, "dead share": 1, "KL score": 1};  // columns of the table of coders

begin(async (main) => {
  const drawn = await block("curves"), where = el("div");
  const unit = main.tokens ? "tokens" : "steps";
  let seen;
  const show = () => {
    const chosen = main.coders[place().coder];
    if (seen === chosen && where.firstChild) return;
    seen = chosen;
    where.replaceChildren(...(chosen ? ofCoder(main, drawn, main.coders.indexOf(chosen), unit) : overview(main, drawn, unit)).flat(Infinity).filter(Boolean));
    scrollTo(0, 0);
  };
  addEventListener("hashchange", show);
  show();
  return where;
});

function overview(main, drawn, unit) {
  const several = main.runs.length > 1, one = main.coders.length === 1;
  const figures = main.pairs.length > 0 && [el("h2", {}, "Held-out figures, side by side"), beside(main)];
  return [
    main.runs.map((run) => [several && el("h2", {}, run.label), about(main, run, unit)]),
    main.runs.flatMap((run) => run.said.map((text) => el("p", {class: "warning"}, several ? run.label + ": " + text : text))),
    main.doubts.map((text) => el("p", {class: "warning"}, text)),
    explained(main.runs),
    several && [el("h2", {}, "What differs in the settings"), main.differences.length ? differences(main) : el("p", {}, "Nothing.")],
    main.pairs.length === 1 && figures,
    one ? sections(main, drawn, 0, unit) : [
      el("h2", {}, several ? "All coders" : `${main.coders.length} coders`),
      el("div", {class: "plots"}, pareto(main)), coders(main),
      el("h2", {}, "While training"), overlaid(main, drawn, unit)],
    main.pairs.length > 1 && figures,
    settings(main, unit),
  ];
}

function about(main, run, unit) {
  const so_far = unit === "tokens" && run.wanted && !run.finished ? `${number(run.tokens)} of ${number(run.wanted)} tokens` : unit === "tokens" ? `${number(run.tokens)} tokens` : "";
  const told = [...run.about, ["coders", main.coders.filter((coder) => main.runs[coder.run] === run).length],
    ["trained on", [so_far, `${number(run.steps)} steps`].filter(Boolean).join(", ")], run.seconds !== null && ["for", number(Math.round(run.seconds)) + " s"], ["state", run.finished ? "finished" : "not finished"]];
  return el("dl", {class: "run"}, told.filter(Boolean).map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value))));
}

function explained(runs) {
  const all = runs.flatMap((run) => run.explained.map((one) => [run, one]));
  return all.length > 0 && el("p", {}, "Explained latents: ", all.map(([run, one], i) => [i ? ", " : "", one.href ? link(one.href, name(run, one)) : `${name(run, one)} (its report is written by sae-view)`]));
  function name(run, one) { return runs.length > 1 ? run.label + "/" + one.name : one.name; }
}

/** What is known of one coder: its held-out figures, its curves, its densities. */
function sections(main, drawn, i, unit) {
  const coder = main.coders[i], {training, held_out} = drawn[i], rest = Object.keys(training).filter((name) => !SHORT[name]);
  const note = main.thinned && coder.lines > main.thinned ? thinned(main, coder.lines) : null;
  const both = DRAWN.map(([name, title]) => {
    const series = [training[name] && {name: "training batches", ...training[name]}, held_out[name] && {name: "held out", ...held_out[name]}].filter(Boolean);
    if (!series.length || (!training[name] && held_out[name].x.length < 2)) return null;
    return lines(series, {title, x: unit, ...axis(SHORT[name], series), note: name === "dead_share" && series.length > 1 ? "In training, dead is silent for dead_after_tokens; held out, silent on all tokens measured." : null});
  });
  return [
    el("h2", {}, coder.step === null ? "Held-out figures" : `Held-out figures, step ${number(coder.step)}`),
    coder.rows.length ? el("div", {class: "plots"}, facts(coder.rows), coder.density && density(coder)) : el("p", {}, "None yet: they are measured at the end, and every eval.every_steps."),
    el("h2", {}, "While training"), note && el("p", {class: "note"}, note),
    el("div", {class: "plots"}, both),
    rest.length > 0 && later("Other logged figures", () => el("div", {class: "plots"}, rest.map((name) => lines([{name, ...training[name]}], {title: name, x: unit, y: name})))),
  ];
}

function ofCoder(main, drawn, i, unit) {
  const to = (j, text) => main.coders[j] && link(address({...place(), coder: j}), text);
  return [
    el("nav", {"aria-label": "Coders", class: "between"}, link(address({...place(), coder: null}), "All coders"), to(i - 1, "Previous"), to(i + 1, "Next")),
    el("h2", {}, (main.runs.length > 1 ? main.runs[main.coders[i].run].label + ": " : "") + main.coders[i].name), sections(main, drawn, i, unit)];
}

function density(coder) {
  return bars(coder.density.counts, coder.density.labels, {title: "Firing density", x: "share of tokens a latent fires on, at least", y: "latents", apart: [0],
    note: `Of ${number(coder.size)} latents on ${number(coder.density.tokens)} held-out tokens; dead ones fired on none.`});
}

const facts = (rows) => el("div", {class: "scroll", role: "region", tabindex: 0, "aria-label": "Held-out figures"}, el("table", {}, el("tbody", {}, rows.map(([name, text]) => el("tr", {}, el("th", {scope: "row"}, name), el("td", {class: "numeric"}, text))))));
const thinned = (main, count) => `Of ${number(count)} logged lines, ${number(main.thinned)} points or fewer are drawn: the least and greatest of each stretch.`;

/** The axis of values: logarithmic where all are positive and they span much. */
function axis(name, series) {
  let least = Infinity, most = -Infinity;
  for (const one of series) for (const value of one.y) if (value !== null) { least = Math.min(least, value); most = Math.max(most, value); }
  const log = name !== "dead share" && name !== "CE recovered" && least > 0 && most > 2 * least;
  return {y: log ? name + " (log scale)" : name, log: log ? "y" : ""};
}

/** Curves of all coders in one plot for each figure. */
function overlaid(main, drawn, unit) {
  const most = Math.max(...main.coders.map((coder) => coder.lines));
  const plots = DRAWN.map(([name, title]) => {
    const kind = drawn.some((one) => one.training[name]) ? "training" : "held_out";
    const series = main.coders.map((coder, i) => drawn[i][kind][name] && {name: coder.label, ...drawn[i][kind][name]}).filter(Boolean);
    if (!series.length || (kind === "held_out" && series.every((one) => one.x.length < 2))) return null;
    return lines(series, {title: title + (kind === "training" ? ", training batches" : ", held out"), x: unit, ...axis(SHORT[name], series)});
  });
  return [main.thinned > 0 && el("p", {class: "note"}, thinned(main, most)), el("div", {class: "plots"}, plots)];
}

/** What a coder loses against how many latents it takes: held out, or of the last training batches before anything was measured. */
function pareto(main) {
  const held = main.coders.some((coder) => coder.figures.FVU !== null), note = "Dashed: those of which no other is both sparser and better.";
  const plot = (what, front, of, title) => {
    const points = main.coders.map((coder, i) => ({name: coder.label, group: main.runs.length > 1 ? main.runs[coder.run].label : undefined, x: of(coder)[0], y: of(coder)[1], href: address({...place(), coder: i})}))
      .filter((one) => Number.isFinite(one.x) && Number.isFinite(one.y));
    const missing = main.coders.length - points.length;
    return points.length > 0 && scatter(points, {title, x: "L0", ...axis(what, [{y: points.map((one) => one.y)}]), front, note: missing ? `${note} ${missing} coders have no such figures yet.` : note});
  };
  if (!held) return plot("FVU", "low", (coder) => [coder.training.l0, coder.training.fvu], "FVU against L0, last training batch");
  return [plot("FVU", "low", (coder) => [coder.figures.L0, coder.figures.FVU], "FVU against L0, held out"),
    plot("CE recovered", "high", (coder) => [coder.figures.L0, coder.figures["CE recovered"]], "Cross-entropy recovered against L0, held out")];
}

function coders(main) {
  const figure = (name) => main.coders.map((coder) => coder.figures[name]);
  return table({label: "Coders", noun: "coders", rows: main.coders.length, key: "t", href: (i) => address({...place(), coder: i}), columns: [
    {name: "coder", title: "coder", wide: true, values: main.coders.map((coder) => coder.label)},
    {name: "latents", title: "latents", numeric: true, values: main.coders.map((coder) => coder.size)},
    ...Object.keys(main.coders[0].figures).filter((name) => PLAIN[name]).map((name) => ({name, title: name, numeric: true, filter: "range", values: figure(name)})),
    {name: "step", title: "measured at step", numeric: true, values: main.coders.map((coder) => coder.step)}]});
}

/** Figures of the coders that correspond, and by how much the later ones differ from the first. */
function beside(main) {
  const rows = main.pairs.flatMap((places) => Object.keys(main.coders[0].figures).map((name) => ({places, name, values: places.map((i) => i === null ? null : main.coders[i].figures[name])})))
    .filter((row) => row.values.some((value) => value !== null));
  const known = (row) => row.places.find((i) => i !== null), signed = (value) => value === null ? "" : (value > 0 ? "+" : "") + number(value);
  return table({label: "Held-out figures", noun: "figures", rows, key: "f", columns: [
    {name: "figure", title: "figure", filter: "choice", value: (row) => row.name},
    main.pairs.length > 1 && {name: "coder", title: "coder", filter: "choice", value: (row) => main.coders[known(row)].name},
    ...main.runs.map((run, j) => ({name: "v" + j, title: run.label, numeric: true, value: (row) => row.values[j]})),
    ...main.runs.slice(1).map((run, j) => ({name: "d" + (j + 1), title: main.runs.length > 2 ? `${run.label}, difference` : "difference", numeric: true, show: signed,
      value: (row) => row.values[0] === null || row.values[j + 1] === null ? null : row.values[j + 1] - row.values[0]}))].filter(Boolean)});
}

function differences(main) {
  return table({label: "Settings that differ", noun: "settings", rows: main.differences, key: "s", columns: [
    {name: "field", title: "field", value: (row) => row[0]},
    ...main.runs.map((run, j) => ({name: "v" + j, title: run.label, wide: true, value: (row) => row[j + 1], show: (value) => value === null ? el("span", {class: "faint"}, "not there") : value}))]});
}

/** Config, environment and speed; of several runs one after the other. */
function settings(main, unit) {
  const titled = (run, ...more) => [main.runs.length > 1 && el("h3", {}, run.label), more];
  const each = (make) => () => el("div", {}, main.runs.map((run) => titled(run, make(run))).flat(Infinity).filter(Boolean));
  const speeds = main.runs.filter((run) => run.speed && run.speed.x.length > 1);
  return [el("h2", {}, "How it was made"), tabs("How it was made", [
    ["Config", each((run) => run.config ? el("pre", {tabindex: 0, "aria-label": "Config of " + run.label, role: "region"}, run.config) : el("p", {}, "There is no config.yaml."))],
    ["Environment", each((run) => run.environment.length ? facts(run.environment) : el("p", {}, "There is no env.json."))],
    speeds.length > 0 && ["Speed", () => el("div", {class: "plots"}, lines(speeds.map((run) => ({name: run.label, ...run.speed})), {title: "Mean speed since the start or the resume", x: unit, y: "tokens/s", low: 0,
      note: speeds.map((run) => `${speeds.length > 1 ? run.label + ": " : ""}${number(run.seconds)} s from the first step on, start-up aside`).join("; ") + "."}))],
  ].filter(Boolean))];
}

/** What is made when it is opened. */
function later(title, make) {
  const more = el("details", {ontoggle: () => { if (more.open && more.children.length < 2) more.append(make()); }}, el("summary", {}, title));
  return more;
}
