// The controls of the page, and what each of them draws anew.
function drawChosen() {
  if (!choice()) return;
  const position = choice().positions[state.position];
  const where = isKnown(position.tokens) ? `${short(position.tokens)} tokens` : `step ${position.step}`;
  const text = isOne ? `step ${position.step.toLocaleString("en")}${isKnown(position.tokens) ? `, ${where}` : ""}` : where;
  find("at").textContent = text;
  find("step").setAttribute("aria-valuetext", text);
  find("step").value = state.position;
  drawSpectrum();
  fillReadout();
}

function drawCharts() {
  drawLoss();
  drawForecasts();
  if (!choice()) return;
  drawNumbers();
  drawDrift();
  drawNoise();
}

function drawAll() {
  drawChosen();
  drawCharts();
}

function options(select, values, chosen) {
  select.replaceChildren(...values.map(([value, text]) => html("option", { value }, null, text)));
  select.value = chosen;
}

function chooseSeries(key) {
  state.key = key;
  const chosen = choice();
  if (!chosen.names.includes(state.name)) state.name = chosen.names[chosen.names.length - 1];
  state.position = chosen.positions.length - 1;
  options(find("name"), chosen.names.map((name) => [name, name]), state.name);
  find("noun").textContent = chosen.noun;
  find("step").max = chosen.positions.length - 1;
}

function start() {
  const first = data.choices[0];
  find("spectral").hidden = !first;
  const hasTokens = data.runs.some((run) => run.history.tokens.some(isKnown));
  if (!hasTokens) state.axis = "step";
  find("axis").value = state.axis;
  if (first) {
    options(find("series"), data.choices.map((one) => [one.key, one.label]), first.key);
    chooseSeries(first.key);
  }
  find("series").addEventListener("change", (event) => (chooseSeries(event.target.value), drawAll()));
  find("name").addEventListener("change", (event) => ((state.name = event.target.value), drawAll()));
  find("axis").addEventListener("change", (event) => ((state.axis = event.target.value), drawCharts()));
  find("log").addEventListener("change", (event) => ((state.isLog = event.target.checked), drawCharts()));
  find("step").addEventListener("input", (event) => {
    state.position = Number(event.target.value);
    drawChosen();
    for (const figure of document.querySelectorAll("figure")) if (figure.moveCursor) figure.moveCursor(cursor());
  });
  const themed = window.matchMedia("(prefers-color-scheme: dark)");
  const setTheme = (isDark) => {
    document.documentElement.dataset.theme = isDark ? "dark" : "light";
    find("theme").setAttribute("aria-pressed", String(isDark));
    find("theme").textContent = isDark ? "light" : "dark";
  };
  setTheme(themed.matches);
  themed.addEventListener("change", (event) => setTheme(event.matches));
  find("theme").addEventListener("click", () => setTheme(document.documentElement.dataset.theme !== "dark"));
  let width = window.innerWidth;
  window.addEventListener("resize", () => {
    if (window.innerWidth !== width) drawAll();
    width = window.innerWidth;
  });
  drawAll();
  document.documentElement.dataset.ready = "yes";
}

start();
