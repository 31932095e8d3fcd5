/* What the panels of a live page share: asking the server, what is noted, drafts that outlive a reload, work that shows. */
const live = {about: null, notes: new Map(), away: false};
const AGAIN_MS = 2000;  // between looks for a server that is away

class Refusal extends Error {
  constructor(message, status = 0, data = {}) { super(message); this.status = status; this.data = data; }
}

/** Asks the server: its answer, or a Refusal that says in one line why there is none. */
async function ask(path, body, signal) {
  const sent = body === undefined ? {signal} : {method: "POST", headers: {"content-type": "application/json"}, body: JSON.stringify(body), signal};
  const answer = await reached(fetch(path, sent));
  if (!answer.ok) throw await refusalOf(answer);
  return answer;
}
const askJson = async (path, body, signal) => reached((await ask(path, body, signal)).json());

/** What a promise gives; where the connection is lost, a Refusal, and the page says so until the server is back. */
async function reached(promise) {
  try { return await promise; } catch (error) {
    if (error.name === "AbortError") throw error;
    serverAway();
    throw new Refusal("the server does not answer; what you typed is kept");
  }
}

async function refusalOf(answer) {
  let data = {};
  try { data = await answer.json(); } catch { /* it says nothing of its own */ }
  if (answer.status === 401) return new Refusal("the server asks for its token: reload the page and give it", 401);
  const wait = Number(answer.headers.get("retry-after")), when = answer.status === 429 && wait ? `; try again in ${wait} s` : "";
  return new Refusal((typeof data.error === "string" && data.error || `the server refuses (${answer.status})`) + when, answer.status, data);
}

const awayLine = el("p", {class: "away", role: "alert", hidden: true});

/** Says that the server does not answer, and looks for it until it does. */
function serverAway() {
  if (live.away) return;
  live.away = true;
  awayLine.replaceChildren("The server does not answer. What is saved is safe and what you typed is kept here; start ", el("code", {}, "sae-view RUN --serve"), " again.");
  awayLine.hidden = false;
  setTimeout(look, AGAIN_MS);
}

async function look() {
  let about = null;
  try { about = await (await fetch("api/about")).json(); } catch { setTimeout(look, AGAIN_MS); return; }
  const other = live.about && live.about.run !== about.run;
  live.away = false;
  awayLine.replaceChildren(other ? "Another run is served here now: reload the page." : "The server is back.");
  if (!other) { setTimeout(() => { awayLine.hidden = !live.away; }, 4000); loadNotes(); }
}

/** What the server says of itself and of notes, when the page begins. */
live.ready = (async () => {
  document.getElementById("main").before(awayLine);
  live.about = await askJson("api/about");
  live.adopt();
  await loadNotes();
  return live.about;
})();
live.ready.catch(() => {});  // the panels say it

/** Why a panel cannot work here, or null. */
const lacking = (name) => live.about && live.about.can && live.about.can[name] === false ? (live.about.why || {})[name] || "this server cannot do it" : null;

const noteKey = ({run, latent}) => `${run || 0}/${latent}`;
const noteOf = (one) => live.notes.get(noteKey(one)) || null;
hooks.note = noteOf;

async function loadNotes() { tookNotes((await askJson("api/notes")).notes); }

/** Text that somebody has typed, with codes for what cannot be seen or turns the line around, as sae.base.visible has them. */
const visible = (text) => text && text.replace(/[\p{Cc}\p{Cf}\p{Cs}\p{Co}\p{Cn}\p{Zl}\p{Zp}]/gu, (one) => `\\u{${one.codePointAt(0).toString(16)}}`);

/** Takes in what is noted; the page is drawn anew where that is something else than before. */
function tookNotes(notes) {
  const before = JSON.stringify([...live.notes]);
  live.notes = new Map(notes.map((note) => [noteKey(note), {...note, label: visible(note.label), typed: note.label || null}]));
  if (JSON.stringify([...live.notes]) !== before) drawnAnew(() => hooks.changed.forEach((redraw) => redraw()));
}

/** Draws, and gives the keys back to the field that had them, which may be another node by now. */
function drawnAnew(draw) {
  const held = document.activeElement, name = held && held.getAttribute("aria-label"), from = held && held.selectionStart;
  draw();
  if (!name || held.isConnected) return;
  const again = [...document.querySelectorAll("[aria-label]")].find((one) => one.getAttribute("aria-label") === name);
  if (again) again.focus();
  if (again && typeof from === "number") again.setSelectionRange(from, held.selectionEnd);
}

const otherTabs = "BroadcastChannel" in window ? new BroadcastChannel("sae-view notes") : null;  // to the other tabs of this page
const refresh = () => { if (live.about && !live.away) loadNotes().catch(() => {}); };
if (otherTabs) otherTabs.onmessage = refresh;
document.addEventListener("visibilitychange", () => { if (!document.hidden) refresh(); });

/** Keeps a bookmark or a label; `was` is the label that was looked at. */
async function keepNote(one, changes) {
  const {notes} = await askJson("api/notes", {latent: one.latent, ...(one.run ? {run: one.run} : {}), ...changes});
  tookNotes(notes);
  if (otherTabs) otherTabs.postMessage("changed");
}

/** Drafts: of this tab, or of the browser, where it allows them; a run's own, since many runs are served at one address. */
const draftName = (name) => `sae-view ${live.about ? live.about.coder + " " + live.about.run : ""} ${name}`;
function draft(name, value, store = "sessionStorage") {
  try {
    if (value === null) window[store].removeItem(draftName(name));
    else if (value !== undefined) window[store].setItem(draftName(name), JSON.stringify(value));
    return JSON.parse(window[store].getItem(draftName(name)));
  } catch { return null; }
}

/** Makes something at the first call, and gives the same from then on. */
const once = (make) => { let made = null; return () => made || (made = make()); };

/** Work that shows: a line that says since when it goes on, how it ended, and a button that ends it. */
function worker(region) {
  const said = el("span", {role: "status"}), elapsed = el("span", {class: "faint", "aria-hidden": "true"});
  const stop = el("button", {type: "button", hidden: true, onclick: () => control && control.abort()}, "Stop"), failed = el("span", {});
  let control = null, clock = null;
  const line = el("p", {class: "work"}, said, " ", elapsed, " ", stop, failed);
  function ended(text, error) {
    clearInterval(clock);
    control = null;
    stop.hidden = true;
    region().removeAttribute("aria-busy");
    said.textContent = text;
    failed.replaceChildren(...(error ? [el("span", {role: "alert"}, error)] : []));
  }
  /** Runs job(signal), which may say what it did; what was under way before is ended. */
  async function run(doing, job) {
    if (control) control.abort();
    const mine = control = new AbortController(), start = performance.now(), since = () => ((performance.now() - start) / 1000).toFixed(1) + " s";
    clearInterval(clock);
    clock = setInterval(() => { elapsed.textContent = since(); }, 100);
    said.textContent = doing + " ...";
    elapsed.textContent = "";
    failed.replaceChildren();
    stop.hidden = false;
    region().setAttribute("aria-busy", "true");
    try {
      const done = await job(mine.signal);
      if (control === mine) { ended(typeof done === "string" ? done : "Done"); elapsed.textContent = "in " + since(); }
    } catch (error) {
      if (control === mine) { elapsed.textContent = ""; ended(mine.signal.aborted ? "Stopped." : "", mine.signal.aborted ? null : sentence(error.message)); }
      if (!(error instanceof Refusal) && !mine.signal.aborted) throw error;
    }
  }
  return {line, run};
}
const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");

/** A form with a text: {node, text(), chat()}; Ctrl+Enter sends it, and a draft of it is kept. */
function textForm(name, {label, action, rows = 4, submit, extra = []}) {
  const area = el("textarea", {id: name, rows, spellcheck: "false", autocomplete: "off", oninput: () => draft(name, area.value), onkeydown: (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); form.requestSubmit(); }
  }});
  const chat = el("input", {type: "checkbox", id: name + "-chat", onchange: () => draft(name + " chat", chat.checked)});
  const asChat = el("label", {hidden: true}, chat, " as a message to the chat model");
  const button = el("button", {class: "primary"}, action);
  const form = el("form", {class: "ask", onsubmit: (event) => { event.preventDefault(); submit(); }},
    el("label", {for: name}, label), area, el("div", {class: "row"}, button, el("kbd", {class: "faint", "aria-hidden": "true"}, "Ctrl+Enter"), asChat, extra));
  live.ready.then(() => {
    area.value = area.value || draft(name) || "";
    asChat.hidden = !live.about.chat;
    chat.checked = live.about.chat && draft(name + " chat") === true;
  }, () => {});
  return {node: form, area, text: () => area.value, chat: () => chat.checked && !asChat.hidden};
}

/** A panel that says why it cannot work where it cannot. */
function panel(name, can, make) {
  const box = el("section", {class: "live", "aria-label": name});
  live.ready.then(() => box.replaceChildren(lacking(can) ? el("p", {role: "note"}, sentence(lacking(can))) : make()),
    (error) => box.replaceChildren(el("p", {role: "alert"}, sentence(error.message))));
  return box;
}
