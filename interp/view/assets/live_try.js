/* Try a text: which latents fire at which token, with labels and values, and what they do to the token that follows. */
const ORDERS = {value: "largest value", fires: "tokens on which it fires", effect: "effect on the next token"};
const SHOWN = 20;

hooks.tabs.push({id: "try", name: "Try a text", make: once(() => panel("Try a text", "prompt", tryPanel))});

function tryPanel() {
  const out = el("div", {class: "found"}), work = worker(() => out);
  const form = textForm("try", {label: "Text", action: "Show what fires", submit: () => {
    if (!form.text()) return form.area.focus();
    work.run("Asking the model", async (signal) => {
      const found = await askJson("api/prompt", {text: form.text(), ...(form.chat() ? {chat: true} : {})}, signal);
      out.replaceChildren(fired(found));
    });
  }});
  return el("div", {}, form.node, work.line, out);
}

/** What fires in a text: its tokens on the left, what is pointed at beside them, and the latents below. */
function fired(found) {
  const silent = el("p", {class: "faint"}, "No latent fires here.");
  const side = el("div", {class: "side", "aria-live": "polite"});
  const most = Math.max(0, ...found.latents.map((one) => Math.abs(one.value)));
  const overall = found.at.map((some) => some.length ? some[0][1] : 0);
  const strip = tokenStrip(found.tokens, {label: "Tokens; arrow keys go through them", name: (place) => `token ${place}: "${found.tokens[place]}", ${firing(found, place)}`, point: (place) => side.replaceChildren(place === null ? whole() : tokenCard(found, place))});
  const rest = () => strip.shade(overall, most);
  const whole = () => el("div", {}, el("p", {}, `${number(found.tokens.length)} tokens, ${number(found.latents.length)} latents fire.`),
    el("p", {class: "faint"}, "Tokens are shaded by the strongest latent there. Point at a token, or choose it, to see what fires on it; point at a latent to see where it fires."),
    found.no_effects && el("p", {class: "faint"}, "No effects on the next token: " + found.no_effects));
  side.append(whole());
  rest();
  const table = found.latents.length ? latentTable(found, {
    light: (one) => one ? strip.shade(shownValues(one, found.tokens.length, found.shown_with), Math.abs(one.value), new Set(one.positions.map((place) => found.shown_with[place]))) : rest(),
    go: (place) => { if (strip.chosen() !== place) strip.choose(place); },
  }) : silent;
  return el("div", {class: "tried"}, strip.node, side, table);
}

const firing = (found, place) => found.mask[place] ? `${found.at[place].length} latents fire` : "left out, as in training";

/** The values of a latent by token; a part of a character counts where the character is shown. */
function shownValues(one, size, shownWith) {
  const values = new Array(size).fill(0);
  one.positions.forEach((place, i) => { const there = shownWith[place]; if (Math.abs(one.values[i]) > Math.abs(values[there])) values[there] = one.values[i]; });
  return values;
}

/** What fires at one token, strongest first. */
function tokenCard(found, place) {
  const parts = found.shown_with.flatMap((there, one) => there === place ? [one] : []), follows = found.follows[place];
  const rows = parts.flatMap((one) => found.at[one]).sort((a, b) => Math.abs(b[1]) - Math.abs(a[1]));
  return el("div", {}, el("h3", {}, el("code", {}, found.tokens[place]), el("span", {class: "faint"}, ` token ${place}`)),
    follows !== null && el("p", {class: "faint"}, place + 1 < found.tokens.length ? "then " : "the model goes on with ", el("code", {}, follows), found.logits[place] !== null && `, logit ${number(found.logits[place], 3)} above the average`),
    rows.length ? el("table", {}, el("thead", {}, el("tr", {}, ["latent", "value", found.no_effects ? null : "effect"].filter(Boolean).map((name) => el("th", {scope: "col"}, name)), el("th", {scope: "col"}, "label"))),
      el("tbody", {}, rows.slice(0, SHOWN).map(([latent, value, effect]) => el("tr", {}, el("td", {}, latentLink(0, latent)), el("td", {}, number(value, 4)), found.no_effects ? null : el("td", {class: effect < 0 ? "lowers" : ""}, withSign(effect)), el("td", {class: "wide"}, shownLabel(found, latent))))))
      : el("p", {class: "faint"}, firing(found, place) + "."),
    rows.length > SHOWN && el("p", {class: "faint"}, `and ${number(rows.length - SHOWN)} more`));
}

const withSign = (value) => value === null || value === undefined ? "" : (value > 0 ? "+" : "") + number(value, 3);
const shownLabel = (found, latent) => labelOf(0, latent) || found.labels[latent] || el("span", {class: "faint"}, "not explained");

/** The latents of a text, sorted as is chosen; one that is pointed at is shown in the text. */
function latentTable(found, {light, go}) {
  const body = el("tbody", {}), more = el("button", {type: "button", class: "quiet", onclick: () => { all = !all; draw(); }});
  let by = "value", all = false;
  const size = {value: (one) => Math.abs(one.value), fires: (one) => one.fires, effect: (one) => Math.abs(one.effect || 0)};
  const orders = Object.entries(ORDERS).filter(([name]) => name !== "effect" || !found.no_effects);
  const choice = el("select", {id: "try-order", onchange: () => { by = choice.value; draw(); }}, orders.map(([name, text]) => el("option", {value: name}, text)));
  function draw() {
    const sorted = [...found.latents].sort((a, b) => size[by](b) - size[by](a));
    body.replaceChildren(...(all ? sorted : sorted.slice(0, SHOWN)).map(row));
    more.hidden = found.latents.length <= SHOWN;
    more.textContent = all ? "fewer" : `all ${number(found.latents.length)}`;
  }
  function row(one) {
    const raised = one.raised && one.raised.length > 0 && el("div", {class: "faint raises"}, "raises ", one.raised.slice(0, 4).map(([text]) => [el("code", {}, text), " "]));
    const at = found.shown_with[one.position];
    return el("tr", {tabindex: null, onpointerenter: () => light(one), onpointerleave: () => light(null), onfocusin: () => light(one), onfocusout: () => light(null)},
      el("td", {}, latentLink(0, one.latent)), el("td", {class: "wide"}, shownLabel(found, one.latent), raised), el("td", {}, number(one.value, 4)),
      el("td", {}, el("button", {type: "button", class: "quiet", "aria-label": `token ${at}: "${found.tokens[at]}"`, onclick: () => go(at)}, el("code", {}, found.tokens[at]))),
      el("td", {}, number(one.fires)), found.no_effects ? null : el("td", {class: one.effect < 0 ? "lowers" : ""}, withSign(one.effect)));
  }
  draw();
  const heads = ["latent", "label", "largest", "at", "tokens", ...(found.no_effects ? [] : ["effect"])];
  return el("div", {}, el("p", {class: "row"}, el("label", {for: "try-order"}, "Latents by "), choice, more),
    el("div", {class: "scroll", tabindex: 0, role: "region", "aria-label": "Latents that fire"}, el("table", {class: "fired"}, el("thead", {}, el("tr", {}, heads.map((name) => el("th", {scope: "col"}, name)))), body)));
}
