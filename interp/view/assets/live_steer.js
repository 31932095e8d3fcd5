/* Steer: latents are edited while the model writes, beside what it writes without. */
const HOWS = {clamp: "clamp to", add: "add", scale: "multiply by", ablate: "ablate (0)"};
const UNITS = {largest: "\u00d7 its largest activation", value: "as an activation"};
const PLACES = {both: "prompt and answer", prompt: "prompt only", answer: "answer only"};
const NEW_EDIT = {latent: "", how: "clamp", strength: "2", unit: "largest", where: "both", when: ""};
const NEW_OPTIONS = {kl: "", new_tokens: "40", temperature: "0", seed: "0"};

const steering = once(() => {
  const box = {wanted: [], add: (latent) => box.wanted.push(latent)};  // until the panel is there
  box.node = panel("Steer", "steer", () => steerPanel(box));
  return box;
});
hooks.tabs.push({id: "steer", name: "Steer", make: () => {
  const {with: latent, ...where} = place();
  steering().add(latent);
  if (latent !== undefined) history.replaceState(null, "", address(where));
  return steering().node;
}});

function steerPanel(box) {
  const out = el("div", {class: "arms"}), work = worker(() => out);
  let edits = (draft("steer edits") || []).map((one) => ({...NEW_EDIT, ...one}));
  const options = {...NEW_OPTIONS, ...draft("steer options")}, list = el("div", {class: "edits"});
  const keep = () => { draft("steer edits", edits); draft("steer options", options); };
  const draw = (focus = -1) => {
    list.replaceChildren(...edits.map((one, i) => editRow(one, i, {keep, remove: () => { edits = edits.filter((other) => other !== one); keep(); draw(Math.min(i, edits.length - 1)); }})));
    const row = list.children[focus];
    if (row) row.querySelector("input").focus();
  };
  box.add = (latent) => {
    if (latent === undefined ? edits.length : edits.some((one) => String(one.latent) === String(latent))) return;
    edits = [...edits.filter((one) => one.latent !== ""), {...NEW_EDIT, latent: latent === undefined ? "" : String(latent)}];
    keep();
    draw();
  };
  const adds = el("button", {type: "button", onclick: () => { edits.push({...NEW_EDIT}); keep(); draw(edits.length - 1); }}, "Add an edit");
  const form = textForm("steer", {label: "Prompt", action: "Write both", rows: 3, submit: () => {
    const asked = {prompt: form.text(), edits: edits.filter((one) => one.latent !== "").map((one) => editAsked(one, options)), ...optionsAsked(options), ...(form.chat() ? {chat: true} : {})};
    if (!asked.prompt) { form.area.focus(); return; }
    work.run("Writing", (signal) => written(asked, out, signal));
  }});
  form.area.after(el("fieldset", {class: "row"}, el("legend", {}, "Edits"), list, adds), optionRow(options, keep));
  draw();
  box.wanted.forEach(box.add);
  return el("div", {}, form.node, work.line, out);
}

/** A field of an edit or an option: its label stands above it. */
function field(name, control, unit = null) {
  return el("label", {class: "field"}, el("span", {class: "faint"}, name), el("span", {class: "control"}, control, unit));
}
const choiceOf = (some, value, onchange) => el("select", {onchange: (event) => onchange(event.target.value)}, Object.entries(some).map(([key, text]) => el("option", {value: key, selected: key === value}, text)));

function editRow(one, i, {keep, remove}) {
  const set = (name) => (value) => { one[name] = value; keep(); shown(); };
  const typed = (name, attributes) => el("input", {value: one[name], autocomplete: "off", oninput: (event) => set(name)(event.target.value), ...attributes});
  const latent = typed("latent", {inputmode: "numeric", size: 6, pattern: "[0-9]+", title: "the number of a latent"}), named = el("span", {class: "faint name"});
  const strength = typed("strength", {inputmode: "decimal", size: 6, title: "a number; empty where a KL is the target"});
  const unit = choiceOf(UNITS, one.unit, set("unit")), strengths = field("strength", strength, unit);
  function shown() {
    const has = /^\d+$/.test(one.latent), label = has ? labelOf(0, Number(one.latent)) : null;
    named.replaceChildren(...(has ? [latentLink(0, Number(one.latent), label || "latent " + one.latent)] : []));
    strengths.hidden = one.how === "ablate";
    unit.hidden = one.how === "scale";
  }
  shown();
  hooks.changed.push(() => { if (named.isConnected) shown(); });
  return el("fieldset", {class: "edit"}, el("legend", {class: "unseen"}, "Edit " + (i + 1)),
    field("latent", latent), field("how", choiceOf(HOWS, one.how, set("how"))), strengths, field("where", choiceOf(PLACES, one.where, set("where"))),
    field("only if", typed("when", {size: 8, placeholder: "12>1", title: "another latent above or below a value at the same token"})),
    el("button", {type: "button", "aria-label": "Remove edit " + (i + 1), onclick: remove}, "Remove"), named);
}

function optionRow(options, keep) {
  const typed = (name, size, mode) => el("input", {value: options[name], size, inputmode: mode, autocomplete: "off", oninput: (event) => { options[name] = event.target.value; keep(); }});
  return el("div", {class: "row"}, field("target KL", typed("kl", 6, "decimal"), el("span", {class: "faint"}, "nats; strengths are scaled to reach it")), field("new tokens", typed("new_tokens", 5, "numeric")),
    field("temperature", typed("temperature", 4, "decimal")), field("seed", typed("seed", 5, "numeric")));
}

/** An edit as the server takes it; what is no number goes as it was typed, and the server says what is wrong. */
const numberOf = (text) => { const value = String(text).trim().replace(",", "."); return value !== "" && Number.isFinite(Number(value)) ? Number(value) : value; };
function editAsked(one, options) {
  const strength = one.how === "ablate" || (String(one.strength).trim() === "" && options.kl !== "") ? null : numberOf(one.strength);
  return {latent: numberOf(one.latent), how: one.how, strength, unit: one.how === "clamp" || one.how === "add" ? one.unit : "value", where: one.where, when: one.when.trim() || null};
}
const optionsAsked = (options) => Object.fromEntries(Object.entries(options).filter(([, value]) => String(value).trim() !== "").map(([name, value]) => [name, numberOf(value)]));
