"use strict";
(() => {
  const state = JSON.parse(document.getElementById("state").textContent);
  const message = document.getElementById("message");
  const dashes = ["solid", "dash", "dot", "dashdot"];
  const symbols = { skipped: "x", restart: "triangle-up", rollback: "triangle-left" };
  const colors = 8;
  const view = { axis: "tokens", smoothing: state.smoothing, log: false, hidden: new Set() };

  // ------------------------------------------------------------------------------------------------ data
  const types = { f8: Float64Array, f4: Float32Array, i4: Int32Array };
  const isPacked = value => value !== null && typeof value === "object" && typeof value.b === "string";

  function unpack(value) {
    if (isPacked(value)) {
      const bytes = Uint8Array.from(atob(value.b), character => character.charCodeAt(0));
      return new types[value.t](bytes.buffer);
    }
    if (Array.isArray(value)) return value.map(unpack);
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, unpack(item)]));
  }

  // Convert steps to the selected axis: between two entries of the clock, tokens and hours grow evenly.
  function position(clock, steps) {
    if (view.axis === "step") return Array.from(steps);
    const known = clock.steps, values = clock[view.axis], last = known.length - 1;
    return Array.from(steps, step => {
      let low = 0, high = last;
      while (low < high) {
        const middle = (low + high) >> 1;
        if (known[middle] < step) low = middle + 1; else high = middle;
      }
      if (low === 0 || step >= known[low]) return values[low];
      const share = (step - known[low - 1]) / (known[low] - known[low - 1]);
      return values[low - 1] + share * (values[low] - values[low - 1]);
    });
  }

  // Exponential moving average without a bias towards zero at its start; gaps stay gaps.
  function smoothed(values) {
    let sum = 0, weight = 0;
    return Array.from(values, value => {
      if (!Number.isFinite(value)) return value;
      sum = view.smoothing * sum + (1 - view.smoothing) * value;
      weight = view.smoothing * weight + (1 - view.smoothing);
      return sum / weight;
    });
  }

  // ------------------------------------------------------------------------------------------------ drawing
  const style = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const isShown = series => series.clock === undefined || !view.hidden.has(series.clock);

  function traces(figure) {
    const format = figure.percent ? ".2%" : ".5~g";
    const drawn = [];
    for (const series of figure.series.filter(isShown)) {
      const color = style(`--c${series.color % colors}`);
      const dash = series.dash ?? dashes[Math.floor(series.color / colors) % dashes.length];
      const hasClock = series.clock !== undefined;
      const x = hasClock ? position(state.clocks[series.clock], series.steps) : series.x;
      const y = Array.from(series.y);
      const line = { color, dash, width: 1.75 };
      const hover = series.labels ? "%{text}<extra>%{fullData.name}</extra>" : undefined;
      const base = {
        type: "scatter", name: series.name, mode: series.mode, x, y, line, yhoverformat: format, text: series.labels,
        hovertemplate: hover, marker: { color, size: 7, symbol: series.color % 24 }, legendgroup: series.name,
      };
      if (series.low) {
        base.error_y = {
          type: "data", symmetric: false, thickness: 1, width: 3, color,
          array: y.map((value, i) => series.high[i] - value), arrayminus: y.map((value, i) => value - series.low[i]),
        };
      }
      if (series.smooth && view.smoothing > 0) {
        const means = series.means ?? series.y;
        const meanX = series.means ? position(state.clocks[series.clock], series.mean_steps) : x;
        drawn.push({ ...base, opacity: 0.28, line: { ...line, width: 1, dash: "solid" }, hoverinfo: "skip", showlegend: false });
        drawn.push({ ...base, x: meanX, y: smoothed(means), text: undefined, hovertemplate: undefined });
      } else {
        drawn.push(base);
      }
    }
    return figure.events ? [...drawn, ...events()] : drawn;
  }

  // Events are marked on a second y axis from 0 to 1, so that they do not change the range of the values.
  function events() {
    return state.clocks.flatMap((clock, index) => {
      if (view.hidden.has(index) || !clock.events.length) return [];
      const kinds = [...new Set(clock.events.map(event => event.kind))];
      return kinds.map(kind => {
        const some = clock.events.filter(event => event.kind === kind);
        return {
          type: "scatter", mode: "markers", yaxis: "y2", showlegend: false, name: state.clocks.length > 1 ? clock.name : kind,
          x: position(clock, some.map(event => event.step)), y: some.map(() => 0.03),
          text: some.map(event => event.text), hovertemplate: "%{text}<extra>%{fullData.name}</extra>",
          marker: { symbol: symbols[kind], size: 9, color: style(kind === "skipped" ? "--error" : "--text"), line: { width: 0 } },
        };
      });
    });
  }

  function layout(figure) {
    const axisLabels = { tokens: "tokens", step: "step", hours: "hours since the start" };
    const hasClock = figure.series.some(series => series.clock !== undefined);
    const names = new Set(figure.series.filter(isShown).map(series => series.name));
    const text = style("--text"), grid = style("--grid"), muted = style("--muted");
    const axis = {
      gridcolor: grid, zeroline: false, linecolor: style("--line"), tickfont: { color: muted, size: 11 }, automargin: true,
      title: { font: { size: 11, color: muted }, standoff: 6 }, exponentformat: "B", separatethousands: true,
    };
    const isLog = figure.y_log || (view.log && hasClock && !figure.percent);
    const marks = figure.events
      ? state.clocks.flatMap((clock, index) => view.hidden.has(index) ? [] : clock.events.filter(event => event.kind !== "skipped")
        .map(event => position(clock, [event.step])[0])
        .map(x => ({ type: "line", x0: x, x1: x, y0: 0, y1: 1, yref: "paper", line: { color: muted, width: 1, dash: "dot" } })))
      : [];
    return {
      autosize: true, margin: { l: 8, r: 12, t: 10, b: 8 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: getComputedStyle(document.body).fontFamily, color: text, size: 12 },
      hovermode: hasClock ? "x unified" : "closest", hoverlabel: { bgcolor: style("--surface"), bordercolor: style("--line"), font: { color: text, size: 12 } },
      showlegend: names.size > 1, legend: { orientation: "h", x: 0, y: -0.24, yanchor: "top", font: { size: 11 } },
      uirevision: hasClock ? view.axis : "figure", modebar: { bgcolor: "rgba(0,0,0,0)", color: muted, activecolor: text },
      xaxis: { ...axis, range: hasClock ? commonRange() : undefined, type: figure.x_log ? "log" : undefined, title: { ...axis.title, text: hasClock ? axisLabels[view.axis] : figure.x_label }, hoverformat: hasClock ? ".5~s" : undefined },
      yaxis: { ...axis, type: isLog ? "log" : undefined, tickformat: figure.percent ? ".0%" : undefined, rangemode: figure.from_zero && !isLog ? "tozero" : "normal" },
      yaxis2: { overlaying: "y", range: [0, 1], visible: false, fixedrange: true }, shapes: marks,
    };
  }

  // Only buttons that work without a network; plotly has one that uploads the figure.
  const options = {
    displaylogo: false, responsive: true, modeBarButtons: [["zoom2d", "pan2d", "resetScale2d", "toImage"]],
  };

  // All figures of curves have the same x axis, from zero to the end of the longest run.
  function commonRange() {
    const ends = state.clocks.filter((_, index) => !view.hidden.has(index)).map(clock => {
      const values = view.axis === "step" ? clock.steps : clock[view.axis];
      return values.length ? values[values.length - 1] : 0;
    });
    const end = Math.max(0, ...ends.filter(Number.isFinite));
    return end > 0 ? [-0.015 * end, 1.015 * end] : undefined;
  }

  function draw(key) {
    const figure = state.figures[key];
    const target = document.querySelector(`[data-figure="${key}"] .plot`);
    return Plotly.react(target, traces(figure), layout(figure), options);
  }

  const drawn = new Set();
  const drawAll = () => Promise.all([...drawn].map(draw));
  const isVisible = key => document.querySelector(`[data-figure="${key}"]`).offsetParent !== null;

  async function drawVisible() {
    for (const key of Object.keys(state.figures)) {
      if (drawn.has(key) || !isVisible(key)) continue;
      drawn.add(key);
      await draw(key);
      await new Promise(done => setTimeout(done));  // keep the page responsive
    }
  }

  // ------------------------------------------------------------------------------------------------ controls
  function onChange(id, change) {
    const element = document.getElementById(id);
    if (element) element.addEventListener("input", event => { change(event.target); drawAll(); });
  }

  function connectControls() {
    onChange("axis", target => { view.axis = target.value; });
    onChange("log", target => { view.log = target.checked; });
    onChange("runs", target => view.hidden[target.checked ? "delete" : "add"](Number(target.value)));
    onChange("smoothing", target => {
      view.smoothing = Number(target.value);
      document.getElementById("smoothing-value").value = view.smoothing.toFixed(2);
    });
    const axis = document.querySelector("#axis input:checked");
    if (axis) view.axis = axis.value;
    document.addEventListener("toggle", drawVisible, true);
  }

  const prefersDark = matchMedia("(prefers-color-scheme: dark)");
  const button = document.getElementById("theme");

  function setTheme(isDark) {
    document.documentElement.dataset.theme = isDark ? "dark" : "light";
    button.setAttribute("aria-pressed", String(isDark));
  }

  setTheme(prefersDark.matches);
  prefersDark.addEventListener("change", () => { setTheme(prefersDark.matches); drawAll(); });
  button.addEventListener("click", () => { setTheme(button.getAttribute("aria-pressed") === "false"); drawAll(); });
  let wasDark = false;
  addEventListener("beforeprint", () => {
    wasDark = document.documentElement.dataset.theme === "dark";
    setTheme(false);
    drawAll();
  });
  addEventListener("afterprint", () => { setTheme(wasDark); drawAll(); });

  // ------------------------------------------------------------------------------------------------ start
  async function loadPlotly() {
    const packed = document.getElementById("plotly").textContent;
    const bytes = Uint8Array.from(atob(packed), character => character.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = document.createElement("script");
    script.textContent = await new Response(stream).text();
    document.head.append(script);
  }

  async function start() {
    message.hidden = true;
    if (!Object.keys(state.figures).length) return;
    if (typeof DecompressionStream === "undefined") throw new Error("it cannot decompress the plotting library");
    state.figures = unpack(state.figures);
    state.clocks = unpack(state.clocks);
    connectControls();
    await loadPlotly();
    await drawVisible();
  }

  start().catch(error => {
    message.hidden = false;
    message.textContent = `This browser shows no figures (${error.message}). The tables below them have their values.`;
    for (const plot of document.querySelectorAll(".plot")) plot.hidden = true;
  }).finally(() => { document.documentElement.dataset.ready = "true"; });
})();
