/* Which part of the page is shown, by the address: the list, a latent, or what a live page adds. */

function explainedPage(main) {
  indexed(main);
  const root = el("div", {class: "explained"});
  let turn = 0, before = null;
  async function show() {
    const mine = ++turn, where = place(), made = await viewOf(where);
    if (mine !== turn) return;
    root.replaceChildren(...[navigation(where), made].filter(Boolean));
    const now = where.latent === undefined ? where.view || "" : "latent " + where.latent;
    if (before !== null && now !== before) { scrollTo(0, 0); (root.querySelector("#latent") || document.getElementById("main")).focus({preventScroll: true}); }
    before = now;
  }
  addEventListener("hashchange", show);
  addEventListener("keydown", turned);
  hooks.changed.push(() => {
    lists.clear();
    comparedNow = null;
    const where = place(), labels = root.querySelector(".latent > .labels");
    if (where.latent === undefined && !where.view) show();
    else if (labels) recordOf(runNow(where).number, Number(where.latent)).then((record) => labels.replaceWith(latentBody(runNow(where).number, record)[0]));
  });
  return show().then(() => root);
}

/** n and p, or arrows, turn from latent to latent. */
function turned(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, select, textarea, [role='tab'], .window, svg, .scroll, pre")) return;
  const there = document.getElementById({n: "next", ArrowRight: "next", p: "previous", ArrowLeft: "previous"}[event.key]);
  if (there) { event.preventDefault(); there.click(); }
}

function viewOf(where) {
  const added = hooks.tabs.find(({id}) => id === where.view);
  if (added) return added.make();
  const run = runNow(where);
  if (where.latent !== undefined) return latentPage(run.number, Number(where.latent));
  if (explained.partners && where.alone === undefined) return el("div", {}, el("p", {}, explained.main.pairs.note), comparedSummary(), el("h2", {}, "Latents"), explainerTabs(explained.runs[0], where), el("div", {class: "compared"}, comparedList().made));
  const {index, parts, first, last} = explained.main;
  return el("div", {}, overview(run), el("h2", {}, "Latents"),
    index && el("p", {}, `This page has the latents ${number(first)} to ${last > 2 ** 52 ? "the last" : number(last)}. `, link(index, "The index lists all."), " "), parts.length > 0 && !index && el("p", {class: "faint"}, `${parts.length} pages hold these latents; every row leads to the one that has it.`),
    explainerTabs(run, where), listOf(run));
}

/** What leads to the parts of the page: latents, what a live page adds, runs. */
function navigation(where) {
  const chosen = (here, to, name) => el("a", {href: to, "aria-current": here ? "page" : null}, name), bars = [];
  if (hooks.tabs.length) bars.push(el("nav", {class: "tabs", "aria-label": "Parts"}, chosen(!where.view, address({...where, view: null}), "Latents"), hooks.tabs.map(({id, name}) => chosen(where.view === id, address({...where, view: id, latent: null}), name))));
  if (explained.runs.length > 1 && !where.view) {
    const alone = !explained.partners || where.alone !== undefined, of = runNow(where).number, to = (i) => address(explained.partners ? {alone: 1, run: i, latent: null} : {run: i || null});
    bars.push(el("nav", {class: "tabs", "aria-label": "Runs"}, explained.partners && chosen(!alone, address({latent: null}), "Side by side"), explained.runs.map((run, i) => chosen(alone && of === i, to(i), run.name))));
    if (explained.main.pairs && !explained.partners && where.latent === undefined) bars.push(el("p", {class: "warning"}, explained.main.pairs.note));
  }
  return bars.length > 0 && el("div", {}, bars);
}

const explainerTabs = (run, where) => run.explainers.length > 1 && el("nav", {class: "tabs", "aria-label": "Explainers"}, run.explainers.map((one) => {
  const kept = Object.fromEntries(Object.entries(where).filter(([name]) => !/^list\.(f\..*\[|page)/.test(name)));
  return el("a", {href: address({...kept, explainer: one.name}), "aria-current": one === explainerNow(run, where) ? "page" : null}, one.name);
}));
