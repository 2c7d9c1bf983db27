// What is chosen, and the charts and numbers that go with it, as Python measured them.
const data = JSON.parse(document.getElementById("data").textContent);
const find = (id) => document.getElementById(id);
const AXES = { tokens: "training tokens", step: "optimizer steps", seconds: "seconds of training" };
const QUANTITIES = { alpha_tail: "tail exponent", alpha_head: "head exponent", rankme: "RankMe" };
const state = { key: null, name: null, position: 0, axis: "tokens", isLog: true };
const isOne = data.runs.length === 1;
const hasSides = data.comparison !== null;
// So many legends would fill small charts: the table of runs and the large charts have the same colours.
const isCrowded = !hasSides && data.runs.length > 4;

function colourOf(index) {
  return `var(--c${(hasSides ? data.runs[index].side : index) % 6})`;
}
const dashOf = (index) => (hasSides || index < 6 ? "" : index < 12 ? "7 3" : "2 3");
const labelOf = (index) => (hasSides ? ["base", "variant"][data.runs[index].side] : data.runs[index].label);
const depthOf = (index, count) => `var(--d${count < 2 ? 6 : Math.round((index * 11) / (count - 1))})`;

const choice = () => data.choices.find((one) => one.key === state.key);
const namesOf = (run) => (run.series[state.key] ? run.series[state.key].names : []);
const seriesOf = (run) => run.series[state.key];
const heldBy = (run, name) => namesOf(run).find((one) => one.name === name);
const axisOf = (columns) => columns[state.axis];
const base = () => ({ xLabel: AXES[state.axis], logX: state.isLog, cursor: cursor() });

function cursor() {
  const positions = choice() ? choice().positions : [];
  return positions.length ? positions[state.position][state.axis] : null;
}

// A quantity of a layer over training, with the interval that its standard error gives.
function pointsOf(series, held, quantity) {
  const values = held[quantity] || [], errors = held[`${quantity}_stderr`] || [];
  return axisOf(series).map((at, i) => {
    const [value, reach] = [values[i] ?? null, isKnown(errors[i]) ? held.reach * errors[i] : null];
    return value === null || reach === null ? [at, value, null, null] : [at, value, value - reach, value + reach];
  });
}

function drawLoss() {
  const lines = [];
  data.runs.forEach((run, i) => {
    const { history } = run, at = axisOf(history);
    const other = run.loss_name === "val_loss" ? "train_loss" : null;
    const pick = (name) => at.map((x, k) => [x, history[name][k]]).filter((point) => point[1] !== null);
    if (isOne && other && pick(other).length)
      lines.push({ label: "train_loss, mean since the entry before", colour: "var(--ghost)", width: 1.3, points: pick(other) });
    const isFew = pick(run.loss_name).length <= 60;
    lines.push({ label: isOne ? run.loss_name : labelOf(i), always: isOne, colour: colourOf(i), dash: dashOf(i), width: 2, dots: isOne && isFew, points: pick(run.loss_name) });
  });
  const matched = hasSides && isKnown(data.comparison.loss);
  const rules = matched ? [{ y: data.comparison.loss, label: `compared at ${data.comparison.loss_text}` }] : [];
  drawChart(find("loss"), { ...base(), lines, rules, height: 300, yLabel: "loss", label: "Loss over training", empty: `no losses over ${AXES[state.axis]} were recorded` });
  const missing = data.runs.filter((run) => !axisOf(run.history).some(isKnown)).map((run) => run.label);
  if (missing.length && missing.length < data.runs.length) html("p", { class: "note" }, find("loss"), `not known over ${AXES[state.axis]}, and not drawn: ${missing.join(", ")}`);
}

// The range of all reports, so that the axes stand still while the slider moves.
function domainOf(name) {
  let low = Infinity, high = -Infinity;
  for (const run of data.runs) {
    const held = heldBy(run, name);
    for (const values of held ? held.log_values : [])
      for (const value of values) if (value !== null) [low, high] = [Math.min(low, value), Math.max(high, value)];
  }
  return low < high ? [10 ** (low - 0.1), 10 ** (high + 0.1)] : null;
}

// Some reports between the first and the last, behind the one at the slider.
function between(count, most = 8) {
  const picks = Array.from({ length: most }, (_, k) => Math.round(((k + 1) * (count - 1)) / (most + 1)));
  return [...new Set(picks)].filter((pick) => pick > 0);
}

function drawSpectrum() {
  const { picks } = choice().positions[state.position], lines = [], zones = [];
  const few = data.runs.length <= 4;
  data.runs.forEach((run, i) => {
    const held = heldBy(run, state.name);
    if (!held || picks[i] < 0) return;
    const curve = (pick) => (held.log_values[pick] || []).map((value, k) => [held.ranks[k], value === null ? null : 10 ** value]);
    const fitted = held.lines[picks[i]] || [];
    if (isOne) {
      for (const pick of between(held.log_values.length)) lines.push({ ghost: true, colour: "var(--ghost)", opacity: 0.45, width: 1, points: curve(pick) });
      lines.push({ label: "first report", ghost: true, colour: "var(--ghost)", width: 1.8, points: curve(0) });
    }
    const label = isOne ? "at the slider" : labelOf(i);
    lines.push({ label, colour: colourOf(i), dash: dashOf(i), width: isOne ? 2.4 : 1.8, points: curve(picks[i]) });
    for (const line of few ? fitted : [])
      if (line.length) lines.push({ colour: isOne ? "var(--ink)" : colourOf(i), dash: "5 4", width: 1.5, points: [[line[0], 10 ** line[2]], [line[1], 10 ** line[3]]], label: isOne ? "fitted power law" : "" });
    if (!zones.length) {
      const parts = Object.keys(seriesOf(run).bands);
      parts.forEach((part, k) => fitted[k] && fitted[k].length && zones.push({ from: fitted[k][0], to: fitted[k][1], row: part === "tail" ? 0 : 1, label: `${part}, ${fitted[k][0]} to ${fitted[k][1]}` }));
    }
  });
  const size = window.innerWidth < 600 ? 300 : 420;
  drawChart(find("spectrum"), { xLabel: "rank", yLabel: choice().value, logX: true, logY: true, lines, zones, height: size, domainY: domainOf(state.name), label: `Spectrum of ${state.name} at the slider, on logarithmic axes`, empty: "no spectrum was measured here; the reason stands below" });
}

const withError = (value, error, digits) => (value === null ? "-" : `${value.toFixed(digits)}${isKnown(error) ? ` ± ${error.toFixed(digits)}` : ""}`);

function fillReadout() {
  const position = choice().positions[state.position];
  const rows = [], reasons = [], kind = choice().kind;
  const at = (column, index) => (column ? column[index] ?? null : null);
  data.runs.forEach((run, i) => {
    const series = seriesOf(run), held = heldBy(run, state.name);
    if (!series || !held || position.picks[i] < 0) return;
    const index = series.shown[position.picks[i]];
    const number = (name, digits) => withError(at(held[name], index), at(held[`${name}_stderr`], index), digits);
    const against = (name, digits) => `${withError(at(held[name], index), null, digits)} (${withError(at(held[`${name}_floor`], index), null, digits)})`;
    const cells = { step: series.step[index].toLocaleString("en"), tokens: short(series.tokens[index]), "tail exponent": number("alpha_tail", 3), "head exponent": number("alpha_head", 3), RankMe: number("rankme", 1) };
    if (held.overlap) cells["overlap (floor)"] = against("overlap", 3);
    if (held.js) cells["JS, nats (floor)"] = against("js", 5);
    if (held.count) cells[kind === "gradient" ? "samples" : "rows"] = held.count.toLocaleString("en");
    rows.push([isOne ? state.name : run.label, i, cells]);
    const isReported = held.rankme && held.rankme[index] !== null;
    if (!isReported && !held.why[index]) reasons.push(`${isOne ? state.name : run.label}: not reported at step ${series.step[index]}`);
    for (const [quantity, reason] of Object.entries(held.why[index] || {}))
      reasons.push(`${isOne ? "" : `${run.label}: `}no ${quantity === "all" ? "spectrum" : QUANTITIES[quantity] || quantity} at step ${series.step[index]}: ${reason}`);
  });
  const columns = [...new Set(rows.flatMap((row) => Object.keys(row[2])))];
  const table = find("readout");
  const head = html("tr", {});
  html("th", { scope: "col", class: "text" }, head, isOne ? choice().noun : "run");
  for (const column of columns) html("th", { scope: "col" }, head, column);
  table.tHead.replaceChildren(head);
  table.tBodies[0].replaceChildren(
    ...rows.map(([label, i, cells]) => {
      const row = html("tr", {});
      const name = html("th", { scope: "row" }, row);
      if (!isOne) name.append(swatch(colourOf(i), dashOf(i)));
      name.append(label);
      for (const column of columns) html("td", { "data-quantity": column }, row, cells[column] ?? "-");
      return row;
    }),
  );
  find("why").replaceChildren(...reasons.map((reason) => html("li", {}, null, reason)));
}

function drawNumbers() {
  for (const quantity of Object.keys(QUANTITIES)) figureIn("numbers", quantity); // all, before one is as wide as it will be
  for (const [quantity, title] of Object.entries(QUANTITIES)) {
    const lines = [];
    data.runs.forEach((run, i) => {
      const series = seriesOf(run);
      if (!series) return;
      const names = isOne ? series.names : series.names.filter((held) => held.name === state.name);
      names.forEach((held, k) => {
        const isChosen = held.name === state.name;
        const colour = isOne ? depthOf(k, names.length) : colourOf(i);
        lines.push({ label: isOne ? choice().short[held.name] : labelOf(i), always: true, crosses: true, colour, dash: isOne ? "" : dashOf(i), width: isOne && isChosen ? 2.8 : 1.6, points: pointsOf(series, held, quantity) });
      });
    });
    drawChart(figureIn("numbers", quantity), { ...base(), lines, title: isOne ? title : `${title}, ${choice().short[state.name]}`, height: 250, bare: isCrowded });
  }
}

function figureIn(grid, name) {
  const id = `${grid}-${name}`;
  return find(id) || html("figure", { id }, find(grid));
}

const MOST_PANELS = 12;

function drawDrift() {
  const names = choice().names.filter((name) => data.runs.some((run) => (heldBy(run, name) || {}).js));
  find("drift-section").hidden = !names.length;
  find("drift").replaceChildren();
  if (!names.length) return;
  const quantity = names.some((name) => data.runs.some((run) => (heldBy(run, name) || {}).overlap)) ? ["overlap", "js"] : ["js"];
  const every = names.length <= MOST_PANELS ? names : names.filter((_, k) => k % Math.ceil(names.length / MOST_PANELS) === 0);
  for (const one of quantity) every.forEach((_, k) => figureIn("drift", `${one}-${k}`));
  for (const one of quantity)
    every.forEach((name, k) => {
      const lines = [];
      data.runs.forEach((run, i) => {
        const series = seriesOf(run), held = heldBy(run, name);
        if (!held || !held[one]) return;
        const at = axisOf(series), limit = held[`${one}_floor`] || [];
        const shown = series.shown; // others have no drift; of these one that failed is a gap
        const floor = shown.map((index) => (one === "js" ? [at[index], 0, limit[index] ?? null] : [at[index], limit[index] ?? null, 1]));
        lines.push({ label: isOne ? "" : labelOf(i), colour: isOne ? depthOf(k, every.length) : colourOf(i), dash: isOne ? "" : dashOf(i), width: 2, points: shown.map((index) => [at[index], held[one][index]]), floor: isOne || i === 0 || hasSides ? floor : [] });
        if (isOne) lines[lines.length - 1].label = one === "js" ? "JS" : "overlap";
      });
      const title = `${one === "js" ? "JS divergence, nats" : "overlap of the head"}, ${choice().short[name]}`;
      drawChart(figureIn("drift", `${one}-${k}`), { ...base(), lines, title, height: 180, domainY: one === "overlap" ? [0, 1.02] : undefined, fromZero: one === "js", bare: isCrowded });
    });
}

function drawNoise() {
  const lines = [], rules = [];
  const measured = data.runs.map((run) => (choice().kind === "gradient" ? seriesOf(run) : Object.values(run.series).find((one) => one.noise)));
  find("noise-section").hidden = !measured.some((series) => series && series.noise);
  if (find("noise-section").hidden) return;
  const isTokens = data.runs.every((run, i) => !measured[i] || isKnown(run.tokens_per_sample));
  data.runs.forEach((run, i) => {
    if (!measured[i] || !measured[i].noise) return;
    const { noise } = measured[i], by = isTokens ? run.tokens_per_sample : 1;
    const scaled = (value) => (isKnown(value) ? value * by : value);
    const points = axisOf(measured[i]).map((at, k) => [at, isKnown(noise.value[k]) ? scaled(noise.value[k]) : null, scaled(noise.low[k]), scaled(noise.high[k])]);
    lines.push({ label: isOne ? "noise scale" : labelOf(i), always: isOne, crosses: true, colour: colourOf(i), dash: dashOf(i), width: 2, dots: true, points });
    const batch = isTokens ? run.batch_tokens : run.batch_tokens / run.tokens_per_sample;
    if (isKnown(batch) && !rules.some((rule) => rule.y === batch)) rules.push({ y: batch, label: isOne || !hasSides ? "the batch" : `the batch of ${labelOf(i)}`, colour: isOne ? "var(--ink)" : colourOf(i) });
  });
  find("noise-note").textContent =
    "Of all measured parameters together, with its 80% interval, open above where a gradient of zero is not excluded. " +
    (isTokens ? "Where the batch lies below it, larger batches cost few tokens; above, smaller ones save them." : "In samples: the record does not say how many tokens a sample has, so the batch in tokens is not drawn beside it.");
  drawChart(find("noise"), { ...base(), logY: true, lines, rules, height: 260, yLabel: isTokens ? "tokens" : "samples", label: "Gradient noise scale over training" });
}

function drawForecasts() {
  const every = data.runs.flatMap((run, i) => run.forecasts.map((one) => ({ run, i, one })));
  find("forecast-section").hidden = !every.length;
  every.forEach((_, k) => figureIn("forecast", k));
  every.forEach(({ run, i, one }, k) => {
    const at = one.tokens;
    const actual = one.actual.find(isKnown);
    // Once the target is reached there is nothing to forecast.
    const until = one.actual.findIndex(isKnown);
    const points = at.map((x, j) => [x, one.tokens_to_target[j], one.low[j], one.high[j]]).slice(0, until < 0 ? at.length : until);
    const taken = at.filter(isKnown);
    const lines = [
      { label: "forecast", always: true, crosses: true, colour: colourOf(i), width: 2, dots: points.length < 60, points },
      { label: "tokens taken so far", colour: "var(--ghost)", width: 1.5, ghost: true, points: taken.map((x) => [x, x]) },
    ];
    const rules = isKnown(actual) ? [{ y: actual, label: `reached at ${short(actual)}` }] : [];
    const title = `${isOne ? "" : `${run.label}: `}tokens to ${one.monitor || "loss"} ${one.target ?? ""}${one.prefix ? ` (${one.prefix})` : ""}`;
    drawChart(figureIn("forecast", k), { xLabel: AXES.tokens, logX: state.isLog, logY: true, lines, rules, title, yLabel: "tokens", height: 270, empty: "no forecast had references enough" });
  });
}
