/* A table that is searched, filtered, sorted and paged; ten thousand rows are arrays, not objects.

   table({
     label,       what it is called, for those who hear it
     rows,        how many there are, or an array of them
     columns: [{
       name,      in the address
       title,     above it
       values,    an array with a value for each row; or value(row, i)
       show,      show(value, i) -> what stands in the cell; else the number or text itself
       numeric,   to the right, the largest first; without it, text
       filter,    "choice": one of its values; "range": from and to; else none
       wide,      it holds text of some length
       hint,      what it means
     }],
     href,        href(i) -> where a row leads, from its first cell, by a click anywhere in it, or by Enter
     key,         what its sort, search, filters and page are called in the address; none: they are not kept
     sort,        the column it is sorted by at first, "-name": downwards; none: as given
     page,        rows a page
     noun,        of its rows: "latents"
     onchange,    onchange(rows) is told the places of the rows that are left, in order
   })             An element, with `.rows()` -> those places. j and k or arrows go from row to row, / to the search. */
const table = (() => {
const collator = new Intl.Collator("en", {numeric: true, sensitivity: "base"});
const missing = (value) => value === null || value === undefined || value === "" || Number.isNaN(value);

function table({label, rows, columns, href, key, sort = "", page = 100, noun = "rows", onchange = () => {}}) {
  const count = Array.isArray(rows) ? rows.length : rows;
  const valueOf = (column, i) => column.values ? column.values[i] : column.value(Array.isArray(rows) ? rows[i] : i, i);
  const byName = new Map(columns.map((column) => [column.name, column])), orders = new Map();
  const large = count > 12, filtered = columns.filter((column) => column.filter && large);
  let state = restored(), left = [], texts;

  function restored() {
    const where = key ? place() : {}, found = {sort, q: "", page: 0, filters: {}};
    for (const [name, value] of Object.entries(where)) {
      if (name === key + ".sort") found.sort = value;
      else if (name === key + ".q") found.q = value;
      else if (name === key + ".page") found.page = Math.max(0, Number(value) - 1 || 0);
      else if (name.startsWith(key + ".f.") && byName.has(name.slice(key.length + 3))) found.filters[name.slice(key.length + 3)] = value;
    }
    return found;
  }

  function kept() {
    if (!key) return;
    const where = {[key + ".sort"]: state.sort === sort ? null : state.sort, [key + ".q"]: state.q || null, [key + ".page"]: state.page ? state.page + 1 : null};
    for (const column of filtered) where[key + ".f." + column.name] = state.filters[column.name] || null;
    note(where);
  }

  /** The places of all rows from the least value of a column up; those that have none stand last, either way. */
  function order(name) {
    if (!orders.has(name)) {
      const column = byName.get(name), values = Array.from({length: count}, (_, i) => valueOf(column, i));
      const known = [...values.keys()].filter((i) => !missing(values[i])), none = [...values.keys()].filter((i) => missing(values[i]));
      known.sort(column.numeric ? (a, b) => values[a] - values[b] || a - b : (a, b) => collator.compare(String(values[a]), String(values[b])) || a - b);
      orders.set(name, [known, none]);
    }
    return orders.get(name);
  }

  function passes() {
    const tests = Object.entries(state.filters).filter(([, wanted]) => wanted).map(([name, wanted]) => {
      const column = byName.get(name);
      if (column.filter === "choice") return (i) => String(valueOf(column, i)) === wanted;
      const [from, to] = wanted.split("..").map((end) => end === "" || end === undefined ? null : Number(end));
      return (i) => { const value = valueOf(column, i); return !missing(value) && (from === null || value >= from) && (to === null || value <= to); };
    });
    const words = state.q.toLowerCase().split(/\s+/).filter(Boolean);
    if (words.length) {
      texts = texts || Array.from({length: count}, (_, i) => columns.map((column) => String(valueOf(column, i) ?? "")).join("\n").toLowerCase());
      tests.push((i) => words.every((word) => texts[i].includes(word)));
    }
    return (i) => tests.every((test) => test(i));
  }

  function change(parts = {}) {
    state = {...state, page: 0, ...parts};
    kept();
    show();
  }

  function show() {
    const down = state.sort.startsWith("-"), name = down ? state.sort.slice(1) : state.sort;
    const [known, none] = byName.has(name) ? order(name) : [[...Array(count).keys()], []], test = passes();
    left = [...(down ? [...known].reverse() : known), ...none].filter(test);
    const pages = Math.max(1, Math.ceil(left.length / page));
    state.page = Math.min(state.page, pages - 1);
    const first = state.page * page, some = left.slice(first, first + page);
    body.replaceChildren(...some.map(rowOf));
    for (const [i, head] of heads.entries()) {
      const on = columns[i].name === name;
      if (on) head.setAttribute("aria-sort", down ? "descending" : "ascending"); else head.removeAttribute("aria-sort");
      head.querySelector(".arrow").textContent = on ? (down ? "\u2193" : "\u2191") : "";
    }
    const told = left.length === count ? `${number(count)} ${noun}` : `${number(left.length)} of ${number(count)} ${noun}`;
    status.textContent = pages > 1 ? `${number(first + 1)} to ${number(first + some.length)} of ${told}` : left.length ? told : `no ${noun} left: ${told}`;
    pager.hidden = pages < 2;
    [before.disabled, after.disabled] = [state.page === 0, state.page === pages - 1];
    at.textContent = `page ${state.page + 1} of ${pages}`;
    onchange(left);
  }

  function rowOf(i) {
    const cells = columns.map((column, j) => {
      const value = valueOf(column, i);
      const shown = column.show ? column.show(value, i) : column.numeric ? number(value) : String(value ?? "");
      const inside = j === 0 && href ? el("a", {href: href(i)}, shown) : shown;
      const classes = [column.numeric && "numeric", column.wide && "wide"].filter(Boolean).join(" ") || null;
      return j === 0 ? el("th", {scope: "row", class: classes}, inside) : el("td", {class: classes}, inside);
    });
    return el("tr", {"data-row": i, tabindex: href ? null : -1, class: href ? "leads" : null}, cells);
  }

  const arrow = () => el("span", {class: "arrow", "aria-hidden": "true"});
  const head = (column) => el("th", {scope: "col", class: column.numeric ? "numeric" : null, title: column.hint},
    el("button", {type: "button", onclick: () => {
      const up = column.name, down = "-" + column.name, [one, other] = column.numeric ? [down, up] : [up, down];
      change({sort: state.sort === one ? other : one});
    }}, column.numeric && arrow(), column.title, !column.numeric && arrow()));
  const heads = columns.map(head), body = el("tbody");
  const status = el("p", {role: "status", class: "faint"}), at = el("span", {class: "faint"});
  const before = el("button", {type: "button", onclick: () => change({page: state.page - 1})}, "Previous");
  const after = el("button", {type: "button", onclick: () => change({page: state.page + 1})}, "Next");
  const pager = el("div", {class: "pager", role: "group", "aria-label": "Pages of " + label}, before, at, after);
  const search = el("input", {type: "search", "aria-label": "Search " + label, placeholder: "Search", value: state.q, oninput: () => change({q: search.value})});
  const filters = filtered.map((column) => [column, filterOf(column)]);

  function filterOf(column) {
    const set = (value) => change({filters: {...state.filters, [column.name]: value}}), wanted = state.filters[column.name] || "";
    if (column.filter === "choice") {
      const counts = new Map();
      for (let i = 0; i < count; i++) { const value = String(valueOf(column, i)); counts.set(value, (counts.get(value) || 0) + 1); }
      const choices = [...counts.keys()].sort(collator.compare);
      const chosen = el("select", {onchange: () => set(chosen.value)}, el("option", {value: ""}, "any"),
        choices.map((value) => el("option", {value, selected: value === wanted}, `${value || "none"} (${number(counts.get(value))})`)));
      return el("label", {}, column.title + " ", chosen);
    }
    const [from, to] = wanted.split("..");
    const ends = [["least", from], ["most", to]].map(([end, value]) => el("input", {type: "number", step: "any", placeholder: end, "aria-label": `${column.title}, ${end}`, value: value ?? "",
      oninput: () => set(ends.some((one) => one.value !== "") ? ends.map((one) => one.value).join("..") : "")}));
    return el("fieldset", {}, el("legend", {}, column.title), ends);
  }

  function move(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const typing = event.target.closest("input, select, textarea"), row = event.target.closest("tr[data-row]");
    if (event.key === "/" && !typing && large) { event.preventDefault(); search.focus(); }
    if (event.key === "ArrowDown" && event.target === search) { event.preventDefault(); focus(body.firstElementChild); }
    const step = {j: 1, ArrowDown: 1, k: -1, ArrowUp: -1}[event.key];
    if (!step || typing || !row) return;
    event.preventDefault();
    const next = step > 0 ? row.nextElementSibling : row.previousElementSibling, turned = state.page + step;
    if (next) focus(next);
    else if (turned >= 0 && turned * page < left.length) { change({page: turned}); focus(step > 0 ? body.firstElementChild : body.lastElementChild); }
  }
  const focus = (row) => row && (row.querySelector("a") || row).focus();
  const follow = (event) => {
    const row = event.target.closest("tr.leads");
    if (row && !event.target.closest("a, button, input, summary") && !String(getSelection())) row.querySelector("a").click();
  };

  const made = el("div", {class: "table", onkeydown: move},
    large && el("div", {class: "find"}, search, filters.length > 0 && el("details", {open: Object.keys(state.filters).length > 0}, el("summary", {}, "Filters"), el("div", {class: "filters"}, filters.map(([, control]) => control)))),
    status,
    el("div", {class: "scroll", role: "region", tabindex: 0, "aria-label": label},
      el("table", {onclick: follow}, el("caption", {class: "unseen"}, label), el("thead", {}, el("tr", {}, heads)), body)),
    pager);
  made.rows = () => left;
  show();
  return made;
}
return table;
})();
