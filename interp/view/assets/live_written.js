/* Two continuations side by side, as they are written; then by how much the edits changed what the model expects. */

/** Asks for both, and shows their pieces as they come; ends with what was measured. */
async function written(asked, out, signal) {
  const texts = {plain: el("div", {class: "window"}), steered: el("div", {class: "window"})}, facts = el("div", {class: "facts"});
  out.replaceChildren(el("section", {"aria-label": "Plain"}, el("h3", {}, "Plain"), texts.plain), el("section", {"aria-label": "Steered"}, el("h3", {}, "Steered"), texts.steered), facts);
  let done = null;
  const answer = await ask("api/steer", asked, signal);
  for await (const line of linesOf(answer)) {
    if (line.error) throw new Refusal(line.error);
    if (line.done) done = line.done;
    else if (texts[line.side]) texts[line.side].append(...lined(line.text));
  }
  if (!done) throw new Refusal("the connection was lost before the end; what came stands here");
  measured(done, texts, facts);
}

/** The objects of a stream, one a line. */
async function* linesOf(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const {value, done} = await reached(reader.read());
    const lines = (rest + (value || "")).split("\n");
    rest = lines.pop();
    for (const line of lines) if (line.trim()) yield JSON.parse(line);
    if (done) return;
  }
}

function measured(done, texts, facts) {
  const {kl, tokens, pieces, perplexity} = done, greedy = JSON.stringify(pieces.plain) === JSON.stringify(tokens);
  const most = Math.max(0, ...kl), shaded = klStrip(tokens, kl, most), figure = (value) => value === null ? "n/a" : number(value, 4);
  if (greedy && tokens.length) texts.plain.replaceChildren(shaded);
  for (const side of ["plain", "steered"]) if (!pieces[side].length) texts[side].replaceChildren(el("span", {class: "faint"}, "(it ends at once)"));
  facts.replaceChildren(...[
    !greedy && tokens.length > 0 && el("section", {}, el("h3", {}, "Plain, greedy"), el("div", {class: "window"}, shaded)),
    el("p", {}, `KL ${number(done.mean_kl, 4)} nats, the mean over ${number(kl.length)} tokens of the plain greedy continuation, shaded by token (largest ${number(most, 3)}).`),
    done.note && el("p", {class: "warning"}, sentence(done.note)),
    el("p", {}, `Perplexity under the plain model: ${figure(perplexity.plain)} plain, ${figure(perplexity.steered)} steered.`),
    el("ul", {}, done.strengths.map((one) => el("li", {}, latentLink(0, one.latent, "Latent " + one.latent), " ", inWords(one)))),
    !done.strengths.length && el("p", {}, "No edit was given: both are what the plain model writes."),
    el("p", {class: "faint"}, `Changed at ${number(done.read.changed)} of ${number(done.read.tokens)} tokens` + (done.read.masked ? `, ${number(done.read.masked)} masked as in training and left alone.` : ".")),
  ].filter(Boolean));
}

/** The tokens of the plain greedy continuation, the darker the more the edits change what the model expects there. */
function klStrip(tokens, kl, most) {
  const said = el("p", {class: "reading faint", "aria-live": "polite"}), name = (place) => `"${tokens[place]}", KL ${number(kl[place], 4)} nats`;
  const strip = tokenStrip(tokens, {label: "Plain continuation, shaded by KL; arrow keys go through its tokens", name, point: (place) => { said.textContent = place === null ? "" : name(place); }});
  strip.shade(kl, most);
  return el("div", {}, strip.node, said);
}

/** What was done to a latent, with the strength that was used and what it is a multiple of. */
function inWords({how, value, unit, largest, largest_from: from, where, when}) {
  const done = {clamp: `is clamped to ${number(value, 4)}`, add: `has ${number(value, 4)} added`, scale: `is multiplied by ${number(value, 4)}`, ablate: "is ablated"}[how];
  const times = unit === "largest" && largest ? ` (${number(value / largest, 3)} \u00d7 ${number(largest, 4)}, its largest activation${from ? ", " + from : ""})` : "";
  return done + times + (where === "both" ? "" : ` in the ${where}`) + (when ? ` where ${when}` : "") + ".";
}
