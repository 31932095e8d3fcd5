/* Notes: bookmarks and edited labels, kept by the server; what is typed and not saved yet stays in this browser. */
hooks.beside.push((one) => noteBar(one));
hooks.tabs.push({id: "notes", name: "Notes", make: () => notesNow = panel("Notes", "notes", notesPanel)});

let notesNow = null;
hooks.changed.push(() => { if (notesNow && notesNow.isConnected) notesNow.replaceChildren(notesPanel()); });

const draftOf = (one, value) => draft("label " + noteKey(one), value);
const noteBars = [], NOTE_BARS = 8;  // what draws the latest ones anew
hooks.changed.push(() => noteBars.forEach((draw) => draw()));
const unsaved = new Map();  // by latent, what the editor shows beside the text: why it is not saved

/** The star, the edited label and its editor, and the way to steering, of one latent. */
function noteBar(one) {
  const bar = el("span", {class: "notebar"});
  const draw = (focus = null) => {
    bar.replaceChildren(...barParts(one, draw));
    const held = focus && bar.querySelector(focus);
    if (held) held.focus();
    if (held && held.value) held.setSelectionRange(held.value.length, held.value.length);
  };
  if (noteBars.push(() => { if (live.about) begin(); }) > NOTE_BARS) noteBars.shift();
  const begin = () => { if (!lacking("notes")) draw(); else if (!lacking("steer")) bar.replaceChildren(steerLink(one)); };
  if (live.about) begin(); else live.ready.then(begin, () => {});
  return bar;
}

function barParts(one, draw) {
  const note = noteOf(one) || {}, kept = draftOf(one);
  const star = el("button", {type: "button", class: "star", "aria-pressed": String(Boolean(note.bookmark)), "aria-label": "Bookmark latent " + one.latent, title: "Bookmark", onclick: async () => {
    try { await keepNote(one, {bookmark: !note.bookmark}); unsaved.delete(noteKey(one)); } catch (error) { if (!(error instanceof Refusal)) throw error; unsaved.set(noteKey(one), "Not saved: " + error.message); }
    drawnAnew(draw);
  }}, note.bookmark ? "\u2605" : "\u2606");
  const why = unsaved.get(noteKey(one));
  const edit = kept ? labelEditor(one, kept, draw) : [note.label && el("span", {class: "edited"}, note.label, el("span", {class: "badge"}, "edited")),
    el("button", {type: "button", class: "editlabel", onclick: () => { draftOf(one, {text: note.typed || labelOf(one.run, one.latent) || "", was: note.typed || null}); draw("input"); }}, "Edit label"),
    note.label && el("button", {type: "button", class: "quiet", onclick: () => saveLabel(one, null, note.typed, draw)}, "Remove my label"), why && el("span", {role: "alert"}, sentence(why))];
  return [star, ...[edit, !lacking("steer") && steerLink(one)].flat().filter(Boolean)];
}

const steerLink = ({run, latent}) => link(address({view: "steer", with: latent, ...(run ? {run} : {})}), "Steer with it");

/** The field in which a label is edited: Enter saves, Escape leaves it as it was. */
function labelEditor(one, kept, draw) {
  const why = unsaved.get(noteKey(one)), note = noteOf(one) || {}, other = (note.typed || null) !== kept.was;
  const field = el("input", {"aria-label": "Label of latent " + one.latent, value: kept.text, maxlength: (live.about.limits || {}).label, autocomplete: "off", oninput: () => draftOf(one, {...kept, text: field.value}), onkeydown: (event) => {
    if (event.key === "Escape") { event.preventDefault(); leave(); }
  }});
  const leave = () => { draftOf(one, null); unsaved.delete(noteKey(one)); draw(".editlabel"); };
  const save = (was) => saveLabel(one, field.value.trim() || null, was, draw, kept);
  const conflict = other && el("span", {role: "alert", class: "conflict"}, note.label ? "Meanwhile another label was saved: " : "Meanwhile the label was removed. ", note.label && el("q", {}, note.label), " ",
    el("button", {type: "button", onclick: () => save(note.typed || null)}, "Save mine in its place"), " ", el("button", {type: "button", onclick: leave}, note.label ? "Take theirs" : "Leave it so"));
  return [el("form", {class: "labelform", onsubmit: (event) => { event.preventDefault(); save(kept.was); }}, field, el("button", {class: "primary"}, "Save"), el("button", {type: "button", onclick: leave}, "Cancel")),
    conflict || el("span", {role: why ? "alert" : "status", class: why ? "" : "faint"}, why ? sentence(why) : "Not saved yet.")];
}

/** Saves a label, or takes it away (null); what cannot be saved stays typed, and the page says why. */
async function saveLabel(one, label, was, draw, kept = null) {
  try {
    await keepNote(one, {label, was});
    draftOf(one, null);
    unsaved.delete(noteKey(one));
    draw(".editlabel");
  } catch (error) {
    if (!(error instanceof Refusal)) throw error;
    if (kept) draftOf(one, {...kept, text: label || ""});
    if (error.status === 409 && error.data.notes) { unsaved.delete(noteKey(one)); tookNotes(error.data.notes); }
    else unsaved.set(noteKey(one), `Not saved: ${error.message}`);
    draw(kept ? "input" : ".star");
  }
}

/** All that is noted, and what is typed and not saved. */
function notesPanel() {
  const box = el("div", {}), notes = [...live.notes.values()].filter((note) => note.bookmark || note.label), open = drafts();
  if (open.length) box.append(el("p", {role: "note", class: "warning"}, open.length === 1 ? "One label is typed and not saved yet: " : "Labels that are typed and not saved yet: ", open.map((one) => [latentLink(one.run, one.latent, "latent " + one.latent), " "])));
  if (!notes.length) box.append(el("p", {class: "faint"}, "Nothing is noted yet: the star on a latent's page bookmarks it, and its label can be edited there."));
  else box.append(noteTable(notes), copyButton("Copy labels as JSON lines", notes.filter((note) => note.label).map((note) => JSON.stringify({latent: note.latent, text: note.typed})).join("\n")),
    el("p", {class: "faint"}, "All of it is kept in a file in the folder of the run; such lines are what ", el("code", {}, "sae-explain --explanations FILE"), " scores."));
  return box;
}

/** The latents whose labels are typed in this tab and not saved. */
const drafts = () => draftKeys("sessionStorage").map((key) => key.slice(draftName("label ").length).split("/").map(Number)).map(([run, latent]) => ({run, latent}));
function draftKeys(store) {
  try { return Object.keys(window[store]).filter((key) => key.startsWith(draftName("label "))); } catch { return []; }
}

/** A tab that is closed leaves its drafts to the browser, and the next one to open takes them over. */
const moved = (from, to) => draftKeys(from).forEach((key) => { if (window[to].getItem(key) === null) window[to].setItem(key, window[from].getItem(key)); });
addEventListener("pagehide", () => moved("sessionStorage", "localStorage"));
live.adopt = () => { moved("localStorage", "sessionStorage"); draftKeys("localStorage").forEach((key) => localStorage.removeItem(key)); };

function noteTable(notes) {
  const rows = notes.sort((a, b) => String(b.changed).localeCompare(String(a.changed))).map((note) => el("tr", {},
    el("td", {}, note.bookmark ? el("span", {role: "img", "aria-label": "bookmarked"}, "\u2605") : ""), el("td", {}, latentLink(note.run || 0, note.latent)),
    el("td", {class: "wide"}, note.label ? [note.label, el("span", {class: "badge"}, "edited")] : labelOf(note.run || 0, note.latent) || ""), el("td", {class: "faint"}, when(note.changed))));
  return el("div", {class: "scroll", tabindex: 0, role: "region", "aria-label": "Notes"}, el("table", {}, el("thead", {}, el("tr", {}, ["", "latent", "label", "changed"].map((name) => el("th", {scope: "col"}, name || el("span", {class: "unseen"}, "bookmark"))))), el("tbody", {}, rows)));
}
const when = (time) => { const at = new Date(time); return Number.isNaN(at.getTime()) ? "" : at.toLocaleString(); };
