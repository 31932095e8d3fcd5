/* What was judged: the windows of the test split with the answers, worst misses first. */

/** How an answer ended: [kind, what it is called]. */
function outcome(seen, scorer) {
  if (seen.value === null) return ["missing", "no answer"];
  if (seen.miss === null || seen.miss === undefined) return ["right", ""];
  if (seen.miss <= 0.5) return ["right", "right"];
  if (/intruder|simulation|intervention/.test(scorer)) return ["wrong", "wrong"];
  return ["wrong", seen.tier === "active" ? "overlooked" : "false alarm"];
}

/** The judged windows of a label's scores, a tab for each scorer. */
function judgedOf(record, scores, strongest, context) {
  const some = scores.filter((score) => score.judged.length || failures(score).length > 1);
  if (!some.length) return null;
  return tabs("Scorers", some.map((score) => [score.scorer, () => el("div", {}, failuresOf(score), listOfJudged(record, score, strongest, context), measuresOf(score))]));
}

function listOfJudged(record, score, strongest, context) {
  if (!score.judged.length) return el("p", {class: "faint"}, "This run keeps no judged windows: it is of an older version, or nothing was judged.");
  const all = score.judged.map((seen) => [seen, ...outcome(seen, score.scorer)]), list = el("ol", {class: "windows"}), told = el("span", {class: "faint", role: "status"});
  const counted = (values) => [...new Set(values)].map((value) => [value, values.filter((one) => one === value).length]);
  const choose = (name, values, called) => el("label", {}, name + " ", el("select", {onchange: show}, el("option", {value: ""}, "any"), counted(values).map(([value, n]) => el("option", {value}, `${called(value)} (${n})`))));
  const tier = choose("Window", all.map(([seen]) => seen.tier), (value) => TIERS[value] || words(value)), ended = choose("Answer", all.map(([, kind]) => kind), (value) => value);
  function show() {
    const wanted = [tier, ended].map((one) => one.querySelector("select").value);
    const left = all.filter(([seen, kind]) => (!wanted[0] || seen.tier === wanted[0]) && (!wanted[1] || kind === wanted[1]));
    list.replaceChildren(...left.map((one, i) => judgedWindow(record, one, i, score, strongest, context)));
    told.textContent = `${left.length} of ${all.length} kept, worst misses first` + (score.n ? `; ${number(score.n)} were judged` : "");
  }
  show();
  return el("div", {}, el("div", {class: "choices"}, tier, ended, told), list);
}

function judgedWindow(record, [seen, kind, name], i, score, strongest, context) {
  const truth = /intruder/.test(score.scorer) ? `window ${seen.truth + 1} does not belong` : seen.tier === "active" ? (seen.decile >= 0 ? `fires, decile ${seen.decile + 1}` : "fires") : "silent: " + (TIERS[seen.tier] || words(seen.tier));
  const said = seen.value === null ? brief(seen.reason) || "no answer" : /intruder/.test(score.scorer) ? `said window ${seen.value + 1}` : "said " + number(seen.value, 3);
  return el("li", {}, el("span", {class: "side"}, name && el("span", {class: "badge " + kind}, name), el("span", {}, truth), el("span", {class: seen.value === null ? "warn" : null}, said)),
    el("span", {class: "texts"},
      seen.windows.map((window, j) => el("span", {class: seen.windows.length > 1 && j === seen.truth ? "odd" : null}, seen.windows.length > 1 && el("span", {class: "faint"}, j + 1 + " "),
        recordWindow(record, window, strongest, {label: `judged window ${i + 1}`, marks: seen.marks || [], levels: seen.levels || null, context}))),
      seen.text !== undefined && el("span", {class: "window"}, el("b", {}, "amplified "), brief(seen.text)), seen.clean !== undefined && el("span", {class: "window faint"}, el("b", {}, "without "), brief(seen.clean))));
}
