/* Plots in SVG. Each has a name, reads its values aloud or to a pointer, has its data as a table, and saves itself.

   lines([{name, x: [...], y: [...]}], {title, x, y, log, low, high, note})   curves; a null in y is a gap
   bars(counts, labels, {title, x, y, apart, small, note})                    a histogram; `apart`: bars off its scale
   scatter([{name, x, y, href, group}], {title, x, y, log, front, note})      named points; `front`: the edge of the best, "low" or "high" ones

   x and y name the axes with their units; `log` names the logarithmic ones: "", "x", "y" or "xy". */
const {lines, bars, scatter} = (() => {
const EDGE = {left: 58, right: 16, top: 26, bottom: 40}, TALL = 270, COLORS = 6;
const DASHES = ["", "7 3", "2 3", "9 3 2 3"];
const SHAPES = ["M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0", "M-3.5-3.5h7v7h-7z", "M0-4.8l4.6 8h-9.2z", "M0-5l5 5l-5 5l-5-5z", "M-4-4l8 8m0-8l-8 8", "M-5 0h10m-5-5v10"];
const colorOf = (i) => "c" + i % COLORS, dashOf = (i) => DASHES[(i + Math.floor(i / COLORS)) % DASHES.length];
const shapeOf = (i) => SHAPES[(i + Math.floor(i / COLORS)) % SHAPES.length];
const round = (value) => Math.round(value * 10) / 10;

function lines(series, options = {}) {
  const log = options.log || "";
  const draw = (wide, shown) => {
    const some = shown.map((i) => series[i]);
    const x = scale(some.map((one) => one.x), log.includes("x"), {}, EDGE.left, wide - EDGE.right);
    const y = scale(some.map((one) => one.y), log.includes("y"), options, TALL - EDGE.bottom, EDGE.top);
    const all = [...new Set(some.flatMap((one) => [...one.x]))].sort((a, b) => a - b);
    const drawn = shown.map((i) => {
      const one = series[i], few = one.y.length <= 24;
      return el("g", {class: colorOf(i)},
        el("path", {class: "curve", "stroke-dasharray": dashOf(i), d: pathOf(one, x, y)}),
        few && [...one.x].map((at, j) => fits(one.y[j], y) && mark(i, x.at(at), y.at(one.y[j]))));
    });
    const at = (value) => {
      const near = (all[all.length - 1] - all[0]) / 50;  // what was measured further away is not told here; what was nearby, with its own x
      const lit = shown.map((i) => [i, nearestTo(series[i].x, value)]).filter(([i, j]) => fits(series[i].y[j], y) && Math.abs(series[i].x[j] - value) <= near);
      return {
        text: [(options.x || "x") + " " + number(value), ...lit.map(([i, j]) => told(series, i) + number(series[i].y[j]) + (series[i].x[j] === value ? "" : ` at ${number(series[i].x[j])}`))],
        mark: [el("line", {class: "cursor", x1: x.at(value), x2: x.at(value), y1: EDGE.top, y2: TALL - EDGE.bottom}),
          lit.map(([i, j]) => el("g", {class: colorOf(i)}, el("circle", {class: "lit", r: 4, cx: x.at(series[i].x[j]), cy: y.at(series[i].y[j])})))],
      };
    };
    return {shapes: [axes(x, y, wide, options), drawn], stops: all.length, read: (k) => at(all[k]), near: (px) => nearestTo(all, x.back(px))};
  };
  const data = () => {
    const all = [...new Set(series.flatMap((one) => [...one.x]))].sort((a, b) => a - b);
    const maps = series.map((one) => new Map([...one.x].map((at, j) => [at, one.y[j]])));
    return {rows: all.length, columns: [{name: "x", title: options.x || "x", numeric: true, values: all},
      ...series.map((one, i) => ({name: "y" + i, title: one.name || options.y || "y", numeric: true, values: all.map((at) => maps[i].get(at) ?? null)}))]};
  };
  return plot(options, series.map((one) => one.name), draw, data, (i) => el("path", {class: "curve", d: "M1 7h22", "stroke-dasharray": dashOf(i)}));
}

function bars(counts, labels, options = {}) {
  const apart = new Set(options.apart || []), tallest = counts.reduce((most, count) => Math.max(most, count), 0);
  if (options.small) return sparkBars(counts, labels, options, apart, tallest);
  const draw = (wide) => {
    const y = scale([counts], false, {low: 0, high: tallest * 1.08 || 1}, TALL - EDGE.bottom, EDGE.top);
    const width = (wide - EDGE.left - EDGE.right) / Math.max(1, counts.length), left = (i) => EDGE.left + i * width;
    const every = Math.ceil(labels.reduce((most, label) => Math.max(most, String(label).length), 1) * 6.6 / width);
    const x = {ticks: labels.map((label, i) => [left(i) + width / 2, label]).filter((_, i) => i % every === 0), rules: false};
    const rects = counts.map((count, i) => el("rect", {class: apart.has(i) ? "bar apart" : "bar", x: round(left(i) + Math.min(2, width / 8)),
      width: round(Math.max(0.5, width - 2 * Math.min(2, width / 8))), y: round(y.at(count)), height: round(y.at(0) - y.at(count))}));
    return {
      shapes: [axes(x, y, wide, options), rects], stops: counts.length, near: (px) => Math.floor((px - EDGE.left) / width),
      read: (i) => ({text: [labels[i] + ": " + number(counts[i])],
        mark: [el("rect", {class: "cursor over", x: left(i), width, y: EDGE.top, height: TALL - EDGE.top - EDGE.bottom})]}),
    };
  };
  const data = () => ({rows: counts.length, columns: [{name: "x", title: options.x || "", values: labels},
    {name: "y", title: options.y || "count", numeric: true, values: counts}]});
  return plot(options, [], draw, data);
}

/** A histogram as small as a word, for a cell of a table or beside a text. */
function sparkBars(counts, labels, options, apart, tallest) {
  const wide = options.width || 120, tall = options.height || 36, width = wide / Math.max(1, counts.length);
  const told = counts.map((count, i) => labels[i] + ": " + number(count)).join(", ");
  return el("svg", {class: "spark", role: "img", "aria-label": (options.title ? options.title + "; " : "") + told, viewBox: `0 0 ${wide} ${tall}`, width: wide, height: tall},
    el("title", {}, told),
    counts.map((count, i) => el("rect", {class: apart.has(i) ? "bar apart" : "bar", x: round(i * width), width: round(Math.max(0.5, width - 0.8)),
      height: count ? Math.max(1, round(count / tallest * (tall - 1))) : 0, y: count ? Math.min(tall - 1, round(tall - count / tallest * (tall - 1))) : tall})),
    el("line", {class: "axis", x1: 0, x2: wide, y1: tall, y2: tall}));
}

function scatter(points, options = {}) {
  const log = options.log || "", order = points.map((_, i) => i).sort((a, b) => points[a].x - points[b].x || (points[a].y - points[b].y) * (options.front === "high" ? -1 : 1));
  const groups = [...new Set(points.map((one) => one.group ?? ""))], groupOf = (i) => groups.indexOf(points[i].group ?? "");
  const draw = (wide, shown) => {
    const seen = new Set(shown), some = order.filter((i) => seen.has(groupOf(i)));
    const x = scale([some.map((i) => points[i].x)], log.includes("x"), {pad: 0.08}, EDGE.left, wide - EDGE.right);
    const y = scale([some.map((i) => points[i].y)], log.includes("y"), {pad: 0.08, ...options}, TALL - EDGE.bottom, EDGE.top);
    const at = (i) => [x.at(points[i].x), y.at(points[i].y)], front = options.front ? best(some, points, options.front === "high") : [];
    const steps = front.map(at).map(([px, py], j) => (j ? `H${round(px)}V` : `M${round(px)} `) + round(py)).join("");
    const far = some.map(at);
    return {
      shapes: [axes(x, y, wide, options), front.length > 1 && el("path", {class: "front", d: steps}),
        some.map((i) => el("g", {class: colorOf(groupOf(i))}, mark(groupOf(i), ...at(i)))), names(some.map((i) => [points[i].name, ...at(i)]), wide)],
      stops: some.length,
      near: (px, py) => far.reduce((best, [ax, ay], k) => Math.hypot(ax - px, ay - py) < Math.hypot(far[best][0] - px, far[best][1] - py) ? k : best, 0),
      read: (k) => {
        const one = points[some[k]], [cx, cy] = at(some[k]), edge = front.includes(some[k]) ? "on the front" : null;
        return {text: [one.group, one.name, (options.x || "x") + " " + number(one.x), (options.y || "y") + " " + number(one.y), edge], href: one.href, mark: [el("circle", {class: "ring", r: 8, cx, cy})]};
      },
    };
  };
  const data = () => ({rows: points.length, columns: [
    {name: "name", title: "name", values: points.map((one) => one.name), show: (name, i) => points[i].href ? link(points[i].href, name) : name},
    groups.length > 1 && {name: "group", title: "of", values: points.map((one) => one.group)},
    {name: "x", title: options.x || "x", numeric: true, values: points.map((one) => one.x)},
    {name: "y", title: options.y || "y", numeric: true, values: points.map((one) => one.y)}].filter(Boolean)});
  return plot(options, groups, draw, data, (i) => el("g", {transform: "translate(12 7)"}, el("path", {class: "shape", d: shapeOf(i)})));
}

/** The points of which no other is both further left and better, from left to right. */
function best(order, points, high) {
  let last = null;
  return order.filter((i) => (last === null || (high ? points[i].y > last : points[i].y < last)) && ((last = points[i].y), true));
}

/** Names beside points [[name, x, y], ...], where they do not lie on each other. */
function names(some, wide) {
  const taken = some.map(([, px, py]) => [px - 5, py - 5, 10, 10]);
  return some.map(([name, px, py]) => {
    const text = cut(name, 28), width = text.length * 6.2;
    const fit = [[px + 6, py - 16], [px - 8 - width, py - 6], [px + 9, py - 6], [px - width / 2, py + 8]].find(([left, top]) => left > EDGE.left && left + width < wide
      && top > EDGE.top - 14 && top < TALL - EDGE.bottom - 10 && !taken.some(([l, t, w, h]) => left < l + w && l < left + width && top < t + h && t < top + 12));
    if (!fit) return null;
    taken.push([fit[0], fit[1], width, 12]);
    return el("text", {class: "name", x: round(fit[0]), y: round(fit[1] + 10)}, text);
  });
}

const cut = (text, most) => text.length > most ? text.slice(0, most - 1) + "\u2026" : text;
const fits = (value, on) => Number.isFinite(value) && (!on.log || value > 0);
const mark = (i, px, py) => el("path", {class: "shape", d: shapeOf(i), transform: `translate(${round(px)} ${round(py)})`});
const told = (series, i) => series.length > 1 ? series[i].name + " " : "";

function pathOf(one, x, y) {
  let path = "", open = false;
  for (let j = 0; j < one.y.length; j++) {
    const there = fits(one.y[j], y) && fits(one.x[j], x);
    if (there) path += (open ? "L" : "M") + round(x.at(one.x[j])) + " " + round(y.at(one.y[j])) + (open ? "" : "h0");
    open = there;
  }
  return path;
}

/** The place in sorted numbers that is nearest to a value. */
function nearestTo(sorted, value) {
  let low = 0, high = sorted.length - 1;
  while (low < high) { const middle = (low + high) >> 1; if (sorted[middle] < value) low = middle + 1; else high = middle; }
  return low > 0 && value - sorted[low - 1] <= sorted[low] - value ? low - 1 : low;
}

/** Maps values to pixels, and back: {at, back, ticks: [[pixel, text], ...], log}. */
function scale(columns, log, {low, high, pad = 0.03}, from, to) {
  let least = Infinity, most = -Infinity;
  for (const column of columns) for (const value of column) if (Number.isFinite(value) && (!log || value > 0)) { least = Math.min(least, value); most = Math.max(most, value); }
  if (least > most) [least, most] = log ? [0.1, 1] : [0, 1];
  const inner = log ? Math.log10 : (value) => value, outer = log ? (value) => 10 ** value : (value) => value;
  let first = inner(low ?? least), last = inner(high ?? most);
  if (!(first < last)) { const room = log ? 0.3 : Math.abs(first) * 0.1 || 0.5; [first, last] = [first - room, last + room]; }
  const room = (last - first) * pad;
  if (low === undefined) first = !log && least >= 0 && first - room < 0 ? 0 : first - room;
  if (high === undefined) last += room;
  const at = (value) => from + (inner(value) - first) / (last - first) * (to - from);
  const ticks = ticksOf(first, last, Math.max(2, Math.floor(Math.abs(to - from) / (from < to ? 65 : 45))), log);
  return {at, back: (pixel) => outer(first + (pixel - from) / (to - from) * (last - first)), ticks: ticks.map((value) => [at(value), short(value)]), log};
}

function ticksOf(first, last, count, log) {
  if (log && last - first >= 0.7) {
    const some = last - first < 2.5 ? (last - first < 1 ? [1, 2, 3, 5] : last - first < 1.3 ? [1, 2, 5] : [1, 3]) : [1], every = Math.ceil((last - first) / (2 * count)), found = [];
    for (let power = Math.floor(first); power <= last; power += every) for (const part of some) if (Math.log10(part) + power >= first && Math.log10(part) + power <= last) found.push(part * 10 ** power);
    return found.map((value) => Number(value.toPrecision(3)));
  }
  const [low, high] = log ? [10 ** first, 10 ** last] : [first, last], rough = (high - low) / count, unit = 10 ** Math.floor(Math.log10(rough));
  const step = unit * [1, 2, 2.5, 5, 10].find((part) => part * unit >= rough * 0.999), found = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k++) found.push(Number((k * step).toPrecision(12)));
  return found;
}

const compact = new Intl.NumberFormat("en-US", {notation: "compact", maximumFractionDigits: 2});
const short = (value) => Math.abs(value) >= 1000 ? compact.format(value) : number(value);

/** Axes: rules across at the ticks of y, ticks below, what they are called. */
function axes(x, y, wide, options) {
  const bottom = TALL - EDGE.bottom;
  return [
    y.ticks.map(([at, text]) => [el("line", {class: "rule", x1: EDGE.left, x2: wide - EDGE.right, y1: round(at), y2: round(at)}), el("text", {class: "tick end", x: EDGE.left - 7, y: round(at + 4)}, text)]),
    x.ticks.map(([at, text]) => [x.rules !== false && el("line", {class: "axis", x1: round(at), x2: round(at), y1: bottom, y2: bottom + 4}), el("text", {class: "tick middle", x: round(at), y: bottom + 17}, text)]),
    el("line", {class: "axis", x1: EDGE.left, x2: wide - EDGE.right, y1: bottom, y2: bottom}),
    options.y && el("text", {class: "label", x: 4, y: 13}, options.y),
    options.x && el("text", {class: "label end", x: wide - EDGE.right, y: TALL - 5}, options.x)];
}

/** What all plots are in: title, legend, the drawing, what is read from it, its data, the button that saves it. */
function plot(options, named, draw, data, sample) {
  const hidden = new Set(), legend = named.length > 1 && sample;
  const svg = el("svg", {role: "img", tabindex: 0, class: "drawing"}), reading = el("p", {class: "reading", "aria-live": "polite"});
  svg.setAttribute("aria-label", [options.title, named.length > 1 ? named.slice(0, 8).join(", ") : null, "arrow keys read values"].filter(Boolean).join("; "));
  let wide = 640, drawn, stop = -1;
  const again = () => {
    drawn = draw(wide, named.map((_, i) => i).filter((i) => !hidden.has(i)));
    svg.setAttribute("viewBox", `0 0 ${wide} ${TALL}`);
    svg.replaceChildren(...[drawn.shapes, el("g", {class: "over"})].flat(Infinity).filter(Boolean));
    stop = -1;
  };
  const tell = (k) => {
    if (!drawn.stops || k === stop) return;
    stop = Math.max(0, Math.min(drawn.stops - 1, k));
    const found = drawn.read(stop), most = 12;
    reading.replaceChildren(...found.text.filter(Boolean).slice(0, most).map((part) => el("span", {}, part)), found.text.length > most ? el("span", {}, `and ${found.text.length - most} more`) : "");
    svg.lastChild.replaceChildren(...found.mark.flat(Infinity));
  };
  const quiet = () => { if (document.activeElement !== svg) { stop = -1; reading.replaceChildren(); svg.lastChild.replaceChildren(); } };
  const follow = () => { const href = stop >= 0 && drawn.read(stop).href; if (href) location.href = href; };
  const keys = {ArrowRight: () => stop + 1, ArrowLeft: () => stop - 1, ArrowUp: () => stop + 10, ArrowDown: () => stop - 10, Home: () => 0, End: () => Infinity};
  for (const [name, act] of Object.entries({
    pointermove: (event) => { const box = svg.getBoundingClientRect(), by = wide / box.width; tell(drawn.near((event.clientX - box.left) * by, (event.clientY - box.top) * by)); },
    pointerleave: quiet, blur: quiet, focus: () => tell(stop < 0 ? 0 : stop), click: follow,
    keydown: (event) => { if (event.key === "Enter") follow(); else if (keys[event.key]) { event.preventDefault(); tell(keys[event.key]()); } },
  })) svg.addEventListener(name, act);
  const toggle = (i) => (event) => { if (!hidden.delete(i)) hidden.add(i); event.currentTarget.setAttribute("aria-pressed", !hidden.has(i)); again(); };
  const more = el("details", {class: "data", ontoggle: () => { if (more.open && more.children.length < 2) more.append(table({label: "Data of " + (options.title || "the plot"), ...data()})); }}, el("summary", {}, "Data"));
  const made = el("figure", {class: "plot"},
    options.title && el("figcaption", {}, options.title),
    legend && el("div", {class: "legend", role: "group", "aria-label": "Shown"}, named.map((name, i) => el("button", {type: "button", "aria-pressed": "true", onclick: toggle(i)},
      el("svg", {class: colorOf(i), width: 24, height: 14, viewBox: "0 0 24 14", "aria-hidden": "true"}, sample(i)), name))),
    svg, reading, options.note && el("p", {class: "note"}, options.note),
    el("div", {class: "under"}, el("button", {type: "button", class: "quiet", onclick: () => save(svg, options.title || "plot", legend ? named.filter((_, i) => !hidden.has(i)) : [], (name) => sample(named.indexOf(name)), (name) => colorOf(named.indexOf(name)))}, "Save as SVG"), more));
  again();
  new ResizeObserver(() => { const now = Math.round(svg.clientWidth); if (now > 100 && now !== wide) { wide = now; again(); } }).observe(svg);
  return made;
}

/** Saves a drawing as a file of its own: its colors and letters in it, its legend below. */
function save(svg, title, shown, sample, color) {
  const [, , wide, tall] = svg.getAttribute("viewBox").split(" ").map(Number);
  const whole = el("svg", {class: "drawing", viewBox: `0 0 ${wide} ${tall + 18 * shown.length}`, width: wide, height: tall + 18 * shown.length},
    el("title", {}, title), [...svg.children].filter((one) => !one.classList.contains("over")).map((one) => one.cloneNode(true)),
    shown.map((name, i) => el("g", {transform: `translate(${EDGE.left} ${tall + 18 * i})`}, el("g", {class: color(name)}, sample(name)), el("text", {class: "tick", x: 32, y: 11}, name))));
  svg.parentNode.append(whole);  // so that its style is known
  for (const one of whole.querySelectorAll("*")) {
    const style = getComputedStyle(one);
    for (const name of ["fill", "stroke", "stroke-width", "stroke-dasharray", "stroke-linecap", "fill-opacity", "text-anchor", "font-size", "font-family"]) one.setAttribute(name, style.getPropertyValue(name));
  }
  for (const one of whole.querySelectorAll("*")) one.removeAttribute("class");
  whole.prepend(el("rect", {width: "100%", height: "100%", fill: getComputedStyle(document.body).backgroundColor}));
  whole.removeAttribute("class");
  whole.remove();
  const address = URL.createObjectURL(new Blob([new XMLSerializer().serializeToString(whole)], {type: "image/svg+xml"}));
  el("a", {href: address, download: title.replace(/[^\w.-]+/g, "-") + ".svg"}).click();
  setTimeout(() => URL.revokeObjectURL(address), 1000);
}
return {lines, bars, scatter};
})();
