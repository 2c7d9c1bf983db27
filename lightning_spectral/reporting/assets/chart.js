// One chart: lines with bands and marks in an SVG as wide as its figure. No arithmetic but that of axes.
"use strict";

const NS = "http://www.w3.org/2000/svg";
const isKnown = (value) => typeof value === "number" && Number.isFinite(value);

function element(name, attributes, parent, text) {
  const made = document.createElementNS(NS, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  if (parent) parent.append(made);
  return made;
}

function html(name, attributes, parent, text) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  if (parent) parent.append(made);
  return made;
}

// Three significant digits, large numbers with a unit: as in the cards.
function short(value, digits = 3) {
  if (value === "inf" || value === Infinity) return "unbounded";
  if (!isKnown(value)) return "-";
  for (const [unit, by, name] of [[1e12, 1e12, " T"], [1e9, 1e9, " G"], [1e6, 1e6, " M"], [1e4, 1e3, " k"]])
    if (Math.abs(value) >= unit) return `${+(value / by).toPrecision(digits)}${name}`;
  if (Math.abs(value) >= 10 ** digits) return Math.round(value).toLocaleString("en");
  if (value !== 0 && Math.abs(value) < 1e-4) return Number(value.toPrecision(digits)).toExponential();
  return `${+value.toPrecision(digits)}`;
}

// Where the ticks of an axis stand, and where on it a value does.
function makeAxis(low, high, isLog, start, end) {
  if (isLog) {
    const [a, b] = [Math.log10(low), Math.log10(high)];
    const span = b - a || 1;
    const ticks = [];
    const factors = span < 0.8 ? [1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9] : span < 2.2 ? [1, 2, 5] : [1];
    const every = Math.max(1, Math.ceil(span / 7));
    for (let power = Math.floor(a); power <= Math.ceil(b); power++)
      for (const factor of factors) {
        const tick = factor * 10 ** power;
        if (tick >= low * 0.999 && tick <= high * 1.001 && (span < 2.2 || power % every === 0)) ticks.push(tick);
      }
    return { ticks, at: (value) => start + ((Math.log10(value) - a) / span) * (end - start), holds: (value) => value > 0 };
  }
  const span = high - low || 1;
  const rough = span / 5;
  const power = 10 ** Math.floor(Math.log10(rough));
  const size = [1, 2, 2.5, 5, 10].map((one) => one * power).find((one) => one >= rough * 0.999);
  const ticks = [];
  for (let i = Math.ceil(low / size - 1e-9); i * size <= high + size * 1e-9; i++) ticks.push(+(i * size).toPrecision(12));
  return { ticks, at: (value) => start + ((value - low) / span) * (end - start), holds: () => true };
}

function range(values, isLog, pad) {
  const known = values.filter((value) => isKnown(value) && (!isLog || value > 0));
  if (!known.length) return null;
  let low = known.reduce((a, b) => Math.min(a, b)), high = known.reduce((a, b) => Math.max(a, b));
  if (isLog) return low === high ? [low / 1.5, high * 1.5] : [low / (high / low) ** pad, high * (high / low) ** pad];
  if (low === high) [low, high] = [low - (Math.abs(low) * 0.1 || 1), high + (Math.abs(high) * 0.1 || 1)];
  return [low - (high - low) * pad, high + (high - low) * pad];
}

// spec: title, xLabel, yLabel, logX, logY, height, domainY, cursor, lines, rules (y), zones (x from to), label.
// A line: label, colour, points [[x, y, low, high]], dash, width, dots, ghost, floor [[x, from, to]].
function drawChart(figure, spec) {
  figure.replaceChildren();
  figure.moveCursor = null;
  if (spec.title) html("h3", {}, figure, spec.title);
  const width = Math.max(figure.clientWidth - 20, 200), height = spec.height || 260;
  const every = spec.lines.flatMap((line) => line.points);
  const visible = every.filter((point) => isKnown(point[0]) && (!spec.logX || point[0] > 0));
  const rangeX = range(visible.map((point) => point[0]), spec.logX, 0.01);
  const ends = visible.flatMap((point) => [point[1], point[2], point[3]]).concat(spec.lines.flatMap((line) => (line.floor || []).flatMap((one) => [one[1], one[2]])));
  const rangeY = spec.domainY || range(ends.concat((spec.rules || []).map((rule) => rule.y)), spec.logY, 0.06);
  if (rangeY && spec.fromZero) rangeY[0] = 0;
  if (!rangeX || !rangeY) {
    html("p", { class: "note" }, figure, spec.empty || "nothing is known here");
    return;
  }
  const svg = element("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": spec.label || spec.title || "" }, figure);
  const [left, right, top, bottom] = [52, width - 10, 8, height - 34];
  const x = makeAxis(...rangeX, spec.logX, left, right), y = makeAxis(...rangeY, spec.logY, bottom, top);
  const clampY = (value) => Math.min(Math.max(value === Infinity ? top : y.holds(value) ? y.at(value) : bottom, top), bottom);
  for (const tick of y.ticks) {
    element("line", { class: "tick", x1: left, x2: right, y1: y.at(tick), y2: y.at(tick) }, svg);
    element("text", { x: left - 6, y: y.at(tick) + 4, "text-anchor": "end" }, svg, short(tick));
  }
  let free = -Infinity;
  for (const tick of x.ticks) {
    element("line", { class: "tick", x1: x.at(tick), x2: x.at(tick), y1: top, y2: bottom }, svg);
    const text = short(tick), half = text.length * 3.3;
    if (x.at(tick) - half > free && x.at(tick) + half < right + 10) {
      element("text", { x: x.at(tick), y: bottom + 15, "text-anchor": "middle" }, svg, text);
      free = x.at(tick) + half + 6;
    }
  }
  element("line", { class: "axis", x1: left, x2: right, y1: bottom, y2: bottom }, svg);
  element("text", { x: (left + right) / 2, y: height - 4, "text-anchor": "middle" }, svg, spec.xLabel);
  if (spec.yLabel) element("text", { x: -(top + bottom) / 2, y: 10, transform: "rotate(-90)", "text-anchor": "middle" }, svg, spec.yLabel);
  for (const zone of spec.zones || []) {
    const [from, to] = [x.at(zone.from), x.at(zone.to)];
    element("rect", { x: from, y: top, width: Math.max(to - from, 1), height: bottom - top, fill: "var(--shade)" }, svg);
    element("text", { class: "strong", x: Math.min(from + 4, right - 120), y: zone.row ? bottom - 8 : top + 13 }, svg, zone.label);
  }
  const plot = element("g", {}, svg);
  const clip = `clip-${figure.id || Math.random().toString(36).slice(2)}`;
  const path = element("clipPath", { id: clip }, svg);
  element("rect", { x: left, y: top - 3, width: right - left + 3, height: bottom - top + 6 }, path);
  plot.setAttribute("clip-path", `url(#${clip})`);
  for (const line of spec.lines) drawLine(plot, line, { x, y, clampY, bottom, logX: spec.logX });
  for (const rule of spec.rules || []) {
    if (!isKnown(rule.y) || !y.holds(rule.y)) continue;
    element("line", { x1: left, x2: right, y1: clampY(rule.y), y2: clampY(rule.y), stroke: rule.colour || "var(--ink)", "stroke-dasharray": "6 4" }, svg);
    element("text", { class: "strong", x: left + 6, y: clampY(rule.y) - 5 }, svg, rule.label);
  }
  const cursor = element("line", { class: "cursor", y1: top, y2: bottom }, svg);
  figure.moveCursor = (value) => {
    const isThere = "cursor" in spec && isKnown(value) && value >= rangeX[0] && value <= rangeX[1];
    cursor.style.display = isThere ? "" : "none";
    if (isThere) for (const end of ["x1", "x2"]) cursor.setAttribute(end, x.at(value));
  };
  figure.moveCursor(spec.cursor);
  if (!spec.bare) drawLegend(figure, spec.lines);
  addTip(figure, svg, spec, x, { width, top, bottom });
}

function drawLine(plot, line, { x, y, clampY, bottom, logX }) {
  const isThere = (point) => isKnown(point[0]) && (!logX || point[0] > 0);
  const points = line.points.filter(isThere);
  const floors = (line.floor || []).filter((one) => isThere(one) && isKnown(one[1]) && isKnown(one[2]));
  if (floors.length) areaOf(plot, floors.map((one) => [x.at(one[0]), clampY(one[1]), clampY(one[2])]), "var(--shade)", 1);
  let band = [];
  for (const point of [...points, null]) {
    const low = point && point[2], high = point && (point[3] === "inf" ? Infinity : point[3]);
    if (point && isKnown(low) && (isKnown(high) || high === Infinity)) band.push([x.at(point[0]), clampY(low), clampY(high)]);
    else {
      if (band.length) areaOf(plot, band, line.colour, 0.17);
      band = [];
    }
  }
  let run = "", isOpen = false, count = 0;
  const dots = [];
  for (const point of points) {
    if (isKnown(point[1]) && y.holds(point[1])) {
      run += `${isOpen ? "L" : "M"}${x.at(point[0]).toFixed(1)} ${y.at(point[1]).toFixed(1)}`;
      isOpen = true;
      count += 1;
      dots.push([x.at(point[0]), y.at(point[1])]);
    } else {
      isOpen = false;
      if (line.crosses && point[1] === null) cross(plot, x.at(point[0]), bottom - 5, line.colour);
    }
  }
  const style = { fill: "none", stroke: line.colour, "stroke-width": line.width || 1.8, "stroke-linejoin": "round", opacity: line.opacity || 1 };
  if (line.dash) style["stroke-dasharray"] = line.dash;
  element("path", { d: run, ...style }, plot);
  if (line.dots || count === 1)
    for (const [cx, cy] of dots) element("circle", { cx: cx.toFixed(1), cy: cy.toFixed(1), r: 2.4, fill: line.colour }, plot);
}

function areaOf(plot, rows, colour, opacity) {
  const wide = rows.length === 1 ? [[rows[0][0] - 3, rows[0][1], rows[0][2]], [rows[0][0] + 3, rows[0][1], rows[0][2]]] : rows;
  const there = wide.map(([x, low]) => `${x.toFixed(1)} ${low.toFixed(1)}`);
  const back = wide.map(([x, , high]) => `${x.toFixed(1)} ${high.toFixed(1)}`).reverse();
  element("path", { d: `M${there.join("L")}L${back.join("L")}Z`, fill: colour, opacity, stroke: "none" }, plot);
}

function cross(plot, x, y, colour) {
  element("path", { d: `M${x - 3} ${y - 3}l6 6m0 -6l-6 6`, stroke: colour, "stroke-width": 1.5 }, plot);
}

function swatch(colour, dash) {
  const svg = element("svg", { class: "swatch", viewBox: "0 0 22 10", "aria-hidden": "true" });
  const style = dash ? { "stroke-dasharray": dash } : {};
  element("line", { x1: 0, x2: 22, y1: 5, y2: 5, stroke: colour, "stroke-width": 3, ...style }, svg);
  return svg;
}

function drawLegend(figure, lines) {
  const seen = new Map();
  for (const line of lines) if (line.label && !seen.has(line.label)) seen.set(line.label, line);
  if (seen.size < 2 && ![...seen.values()].some((line) => line.always)) return;
  const list = html("ul", { class: "legend" }, figure);
  for (const [label, line] of seen) {
    const item = html("li", {}, list);
    item.append(swatch(line.colour, line.dash), label);
  }
}

// What lies under the pointer, in words; the tables have the same for whoever has none.
function addTip(figure, svg, spec, x, { width, top }) {
  const tip = html("div", { class: "tip", hidden: "" }, figure);
  const shown = spec.lines.filter((line) => line.label && !line.ghost).slice(0, 12);
  svg.addEventListener("pointerleave", () => (tip.hidden = true));
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect(), at = ((event.clientX - box.left) / box.width) * width;
    const rows = [];
    let where = null;
    for (const line of shown) {
      let best = null, distance = 30;
      for (const point of line.points) {
        if (!isKnown(point[0]) || (spec.logX && point[0] <= 0)) continue;
        const gap = Math.abs(x.at(point[0]) - at);
        if (gap < distance) [best, distance] = [point, gap];
      }
      if (!best) continue;
      where = where === null ? best[0] : where;
      const interval = isKnown(best[2]) ? ` (${short(best[2])} to ${short(best[3])})` : "";
      rows.push(`${line.label}: ${isKnown(best[1]) ? short(best[1], 4) : "not known"}${interval}`);
    }
    tip.hidden = !rows.length;
    tip.textContent = `${spec.xLabel} ${short(where, 4)}\n${rows.join("\n")}`;
    const left = ((event.clientX - box.left) / box.width) * box.width;
    tip.style.left = left > box.width / 2 ? "auto" : `${left + 24}px`;
    tip.style.right = left > box.width / 2 ? `${box.width - left + 14}px` : "auto";
    tip.style.top = `${top + 24}px`;
  });
}
