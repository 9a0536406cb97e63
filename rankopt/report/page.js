// The report's behaviour: draws the figures in the colours of the page, and shows the layers of the plan that is chosen.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const drawn = new Map(); // key of a chart → its element, once it is drawn
  let shown = null;

  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const escaped = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const isRing = (trace) => trace.meta === "shown";

  function themed() {
    const axis = { gridcolor: css("--line"), linecolor: css("--line"), zerolinecolor: css("--line"), tickcolor: css("--line") };
    const layout = { "font.color": css("--text"), "font.family": "system-ui, sans-serif" };
    for (const name of ["xaxis", "yaxis"]) for (const [key, value] of Object.entries(axis)) layout[`${name}.${key}`] = value;
    layout["hoverlabel.bgcolor"] = css("--panel");
    layout["hoverlabel.bordercolor"] = css("--line");
    layout["hoverlabel.font.color"] = css("--text");
    return layout;
  }

  function draw(element) {
    const figure = data.figures[element.dataset.chart];
    const traces = [...figure.data];
    if (element.dataset.chart.startsWith("front ")) {
      traces.push({ type: "scatter", mode: "markers", meta: "shown", x: [], y: [], hoverinfo: "skip", showlegend: false,
        cliponaxis: false, marker: { symbol: "circle-open", size: 22, color: css("--text"), line: { width: 2 } } });
    }
    const touch = matchMedia("(hover: none)").matches; // there the buttons would always be in the way
    const config = { responsive: true, displaylogo: false, displayModeBar: touch ? false : "hover", modeBarButtons: [["zoom2d", "resetScale2d", "toImage"]] };
    Plotly.newPlot(element, traces, figure.layout, config);
    Plotly.relayout(element, themed());
    element.on("plotly_click", (event) => {
      const trial = event.points[0].customdata;
      if (trial !== undefined && trial !== null && data.plans[trial]) show(trial);
    });
    drawn.set(element.dataset.chart, element);
  }

  function drawVisible() {
    for (const element of document.querySelectorAll(".figure")) {
      if (element.offsetParent === null) continue;
      if (drawn.has(element.dataset.chart)) Plotly.Plots.resize(element);
      else draw(element);
    }
    if (shown !== null) mark(shown);
  }

  function mark(trial) {
    for (const [id, element] of drawn) {
      if (!id.startsWith("front ")) continue;
      let place = null;
      for (const trace of element.data) {
        const at = isRing(trace) ? -1 : (trace.customdata || []).indexOf(trial);
        if (at >= 0) place = [trace.x[at], trace.y[at]];
      }
      const ring = element.data.findIndex(isRing);
      Plotly.restyle(element, { x: [place ? [place[0]] : []], y: [place ? [place[1]] : []], "marker.color": css("--text") }, [ring]);
    }
  }

  const choiceOf = (layer, plan, index) => layer.choices[plan.layers[index]];
  const number = (value) => (value === undefined || value === null ? "not known" : value >= 1000 ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(4))));

  function redraw(plan) {
    for (const [id, element] of drawn) {
      if (!id.startsWith("layers ")) continue;
      const quantity = id.slice("layers ".length);
      element.data.forEach((trace, index) => {
        if (trace.meta === "back") return;
        const method = data.methods[index - (element.data[0].meta === "back" ? 1 : 0)];
        const own = data.layers.map((layer, n) => (choiceOf(layer, plan, n).method === method ? choiceOf(layer, plan, n) : null));
        const x = own.map((choice) => (choice === null || choice[quantity] === undefined ? null : choice[quantity]));
        const unit = quantity === "rank" ? " %" : "";
        const texts = data.layers.map((layer, n) => `${escaped(layer.name)}<br>${escaped(plan.layers[n])}: ${number(x[n])}${unit}`);
        const change = { x: [x], hovertext: [texts], showlegend: x.some((value) => value !== null) };
        if (quantity === "rank") change["marker.size"] = [own.map((choice) => (choice === null ? 0 : choice.size))];
        Plotly.restyle(element, change, [index]);
      });
    }
  }

  function cell(row, text, kind, className) {
    const made = document.createElement(kind || "td");
    made.textContent = text;
    if (className) made.className = className;
    if (kind === "th") made.scope = className === "head" || className === "head number" ? "col" : "row";
    row.append(made);
    return made;
  }

  function table(trial, plan) {
    const place = document.getElementById("layertable");
    place.replaceChildren();
    const costed = data.layers.length > 0 && Object.keys(data.layers[0].choices).length > 0;
    const times = data.times;
    place.createCaption().textContent = `Layers of trial ${trial}`;
    const head = place.createTHead().insertRow();
    cell(head, "layer", "th", "head");
    if (costed) cell(head, "weight", "th", "head");
    cell(head, "method and ranks", "th", "head");
    if (costed) {
      for (const name of ["parameters", "of dense", "MACs", "of dense"]) cell(head, name, "th", "head number");
      for (const label of times) for (const name of [`ms on ${label}`, "of dense"]) cell(head, name, "th", "head number");
    }
    const body = place.createTBody();
    data.layers.forEach((layer, n) => {
      const row = body.insertRow();
      const text = plan.layers[n];
      if (text === "dense") row.className = "dense";
      cell(row, layer.name, "th");
      if (costed) cell(row, layer.shape);
      const choice = cell(row, "");
      if (costed) {
        const swatch = document.createElement("span");
        swatch.className = "swatch";
        swatch.style.background = data.colours[choiceOf(layer, plan, n).method];
        choice.append(swatch);
      }
      choice.append(text === "dense" && layer.skip ? `dense (${layer.skip})` : text);
      if (!costed) return;
      const quantities = ["params", "macs", ...times.map((label) => `latency@${label}`)];
      for (const quantity of quantities) {
        const [now, before] = [choiceOf(layer, plan, n)[quantity], layer.choices.dense[quantity]];
        cell(row, now === undefined ? "–" : number(now), "td", "number");
        cell(row, now === undefined || !before ? "–" : `${((100 * now) / before).toFixed(1)}%`, "td", "number");
      }
    });
  }

  function show(trial) {
    const plan = data.plans[trial];
    shown = trial;
    document.getElementById("trial").value = String(trial);
    document.getElementById("values").textContent = `${plan.values}${plan.kept ? "" : " (outside of the limits)"}`;
    document.getElementById("export").replaceChildren(command(plan.command));
    for (const button of document.querySelectorAll("button.show")) {
      button.setAttribute("aria-pressed", String(Number(button.dataset.trial) === trial));
    }
    redraw(plan);
    table(trial, plan);
    mark(trial);
  }

  function command(text) {
    const made = document.createElement("span");
    made.className = "command";
    made.append(Object.assign(document.createElement("code"), { textContent: text }));
    const button = Object.assign(document.createElement("button"), { type: "button", className: "copy", textContent: "copy" });
    button.dataset.text = text;
    button.setAttribute("aria-label", `copy: ${text}`);
    made.append(button);
    return made;
  }

  async function copy(button) {
    try {
      await navigator.clipboard.writeText(button.dataset.text);
    } catch { // a page that was opened from a file may not reach the clipboard that way
      const area = Object.assign(document.createElement("textarea"), { value: button.dataset.text });
      document.body.append(area);
      area.select();
      document.execCommand("copy");
      area.remove();
    }
    button.textContent = "copied";
    setTimeout(() => { button.textContent = "copy"; }, 1500);
  }

  function printed(now) {
    for (const element of drawn.values()) {
      if (element.offsetParent === null) continue;
      const alone = element.closest(".charts").querySelectorAll("figure").length === 1;
      const size = now ? { width: alone ? 660 : 320, autosize: false } : { width: null, autosize: true };
      Plotly.relayout(element, { ...themed(), ...size });
      if (now) Plotly.relayout(element, { "legend.y": 1 }); // once more: the legend may take fewer rows than before
    }
    if (!now) drawVisible();
  }

  const select = document.getElementById("trial");
  for (const trial of Object.keys(data.plans).map(Number).sort((a, b) => a - b)) {
    select.append(Object.assign(document.createElement("option"), { value: String(trial), textContent: `trial ${trial}` }));
  }
  select.addEventListener("change", () => show(Number(select.value)));
  document.addEventListener("click", (event) => {
    const target = event.target instanceof Element ? event.target : null;
    if (target && target.matches("button.copy")) copy(target);
    if (target && target.matches("button.show")) {
      show(Number(target.dataset.trial));
      document.getElementById("layers").scrollIntoView();
    }
  });
  for (const radio of document.querySelectorAll("input[name=quality]")) {
    radio.addEventListener("change", () => {
      for (const group of document.querySelectorAll("[data-quality]")) group.hidden = group.dataset.quality !== radio.value;
      drawVisible();
    });
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    for (const element of drawn.values()) Plotly.relayout(element, themed());
    if (shown !== null) mark(shown);
  });
  matchMedia("print").addEventListener("change", (event) => printed(event.matches));

  drawVisible();
  if (data.shown !== null) show(data.shown);
  document.documentElement.dataset.ready = "true";
})();
