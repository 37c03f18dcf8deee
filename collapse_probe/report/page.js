"use strict";
// Draws the charts of a report with Plotly and connects them: a click on a pair of layers shows it by head and by token.
// All data stands in the page. Whatever names come from outside are text, never markup.
(() => {
  const data = JSON.parse(document.getElementById("page-data").textContent);
  const find = (id) => document.getElementById(id);
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const LINES = ["--line-0", "--line-1", "--line-2", "--line-3"];
  const DASHES = ["solid", "dash", "dot", "dashdot"];
  const SYMBOLS = ["circle", "square-open", "triangle-up-open", "diamond-open"];
  const CONFIG = {
    displaylogo: false,
    responsive: true,
    modeBarButtonsToRemove: ["select2d", "lasso2d", "zoomIn2d", "zoomOut2d", "autoScale2d"],
  };

  // Plotly reads a few tags in its texts; names from outside must not be taken for them.
  const escaped = (text) =>
    String(text).replace(/[&<>]/g, (sign) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;" })[sign]);

  function decimal(value) {
    if (value === null || value === undefined || Number.isNaN(value)) return "–";
    const size = Math.abs(value);
    return value.toFixed(size < 10 ? 3 : size < 100 ? 2 : 1).replace(/^-(0\.0+)$/, "$1");
  }

  function withError(value, error, low, high) {
    if (low !== null && low !== undefined) return `${decimal(value)} [${decimal(low)}, ${decimal(high)}]`;
    if (value === null || !error) return decimal(value);
    return `${decimal(value)} ± ${error < 0.0005 ? "<0.001" : decimal(error)}`;
  }

  function layout(own) {
    const axis = { gridcolor: colour("--grid"), zeroline: false, linecolor: colour("--line"), automargin: true };
    const { xaxis, yaxis, ...rest } = own;
    return {
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: colour("--ink"), family: "system-ui, sans-serif", size: 12 },
      margin: { l: 50, r: 10, t: 8, b: 40 },
      hoverlabel: { bgcolor: colour("--card"), bordercolor: colour("--line"), font: { color: colour("--ink") }, align: "left" },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: colour("--soft"), activecolor: colour("--ink") },
      dragmode: false,
      showlegend: false,
      ...rest,
      xaxis: { ...axis, ...xaxis },
      yaxis: { ...axis, ...yaxis },
    };
  }

  const draw = (element, traces, own, width) =>
    Plotly.react(element, traces, layout(width ? { ...own, width, autosize: false } : own), CONFIG);

  // -- readings by depth ----------------------------------------------------------------------------------------------

  // Stretches of a lane in which a line is defined: bands end where it does.
  function stretches(lane, values) {
    const found = [];
    let open = null;
    for (const at of lane) {
      if (values[at] === null) open = null;
      else if (open) open.push(at);
      else found.push((open = [at]));
    }
    return found;
  }

  function thinned(count, most) {
    const step = [1, 2, 4, 5, 10, 20, 50].find((size) => count <= most * size) || 100;
    return Array.from({ length: Math.ceil(count / step) }, (_, at) => at * step);
  }

  function depthTraces(chart) {
    const bands = [];
    const lines = [];
    for (const line of chart.lines) {
      const shade = colour(LINES[line.look]);
      let named = false;
      for (const stretch of chart.lanes.flatMap((lane) => stretches(lane, line.values))) {
        bands.push({
          x: [...stretch, ...stretch.slice().reverse()],
          y: [...stretch.map((at) => line.low[at]), ...stretch.slice().reverse().map((at) => line.high[at])],
          mode: "lines", fill: "toself", fillcolor: shade, opacity: 0.2, line: { width: 0 },
          hoverinfo: "skip", showlegend: false,
        });
        const words = (at) => {
          const error = line.interval ? null : line.high[at] - line.values[at];
          return withError(line.values[at], error, line.interval ? line.low[at] : null, line.high[at]);
        };
        lines.push({
          x: stretch,
          y: stretch.map((at) => line.values[at]),
          mode: "lines+markers", name: escaped(line.label), legendgroup: line.label, showlegend: !named,
          line: { color: shade, dash: DASHES[line.look], width: 1.8 },
          marker: { color: shade, symbol: SYMBOLS[line.look], size: chart.layers.length > 20 ? 5 : 7 },
          text: stretch.map((at) => `${escaped(chart.layers[at])}<br>${escaped(line.label)} ${words(at)}`),
          hovertemplate: "%{text}<extra></extra>",
        });
        named = true;
      }
    }
    return [...bands, ...lines];
  }

  function brackets(groups) {
    const shapes = [];
    const annotations = [];
    for (const [start, stop, name] of groups) {
      shapes.push({
        type: "line", xref: "x", yref: "paper", x0: start - 0.4, x1: stop - 0.6, y0: 1.02, y1: 1.02,
        line: { color: colour("--soft"), width: 2 },
      });
      annotations.push({
        text: `<b>${escaped(name)}</b>`, x: (start + stop - 1) / 2, y: 1.02, xref: "x", yref: "paper",
        yanchor: "bottom", showarrow: false, font: { size: 11 },
      });
    }
    return { shapes, annotations };
  }

  function onsets(chart) {
    return chart.onset.flatMap(({ at, between }) => [
      ...(between
        ? [{ x: between, y: [0.5, 0.5], mode: "lines", line: { color: colour("--soft"), width: 3 }, hoverinfo: "skip", showlegend: false }]
        : []),
      {
        x: [at], y: [0.5], mode: "markers", marker: { color: colour("--soft"), symbol: "diamond", size: 10 }, showlegend: false,
        text: [`onset of similar blocks: ${chart.numbers[at]}` +
          (between ? ` [${chart.numbers[between[0]]}, ${chart.numbers[between[1]]}], 95 %` : "")],
        hovertemplate: "%{text}<extra></extra>",
      },
    ]);
  }

  function byDepth(element, chart, width) {
    const count = chart.layers.length;
    const ticks = thinned(count, 12);
    const several = chart.lines.length > 1;
    const above = (chart.brackets.length ? 18 : 8) + (several ? 20 : 0);
    draw(element, [...depthTraces(chart), ...onsets(chart)], {
      ...brackets(chart.brackets),
      margin: { l: 50, r: 10, t: above, b: 40 },
      showlegend: several,
      legend: { orientation: "h", x: 0, y: 1, yanchor: "bottom", yref: "paper", font: { size: 11 },
        ...(chart.brackets.length ? { y: 1.12 } : {}) },
      hovermode: "closest",
      xaxis: { title: { text: escaped(chart.xlabel), standoff: 6 }, range: [-0.5, count - 0.5], tickvals: ticks,
        ticktext: ticks.map((at) => chart.numbers[at]), showgrid: false },
      yaxis: { title: { text: escaped(chart.ylabel), standoff: 6 },
        ...(chart.log ? { type: "log", dtick: "D1", tickformat: "~g" } : { range: chart.ends }) },
    }, width);
  }

  function spectrum(element, chart, width) {
    const scale = data.explorer ? data.explorer.scales.sequential : "Viridis";
    const last = Math.max(chart.curves.length - 1, 1);
    const shade = (block) => (Array.isArray(scale) ? scale[Math.round((block / (last * 1.1)) * (scale.length - 1))][1] : undefined);
    const traces = chart.curves.map((curve, block) => ({
      x: chart.at, y: curve, mode: "lines", line: { color: shade(block), width: 1.5 },
      text: curve.map((value) => `block ${block}: ${decimal(value)}`), hovertemplate: "%{text}<extra></extra>",
    }));
    draw(element, traces, {
      xaxis: { title: { text: "Frequency (π per patch)", standoff: 6 } },
      yaxis: { title: { text: "Δ log amplitude", standoff: 6 } },
      hovermode: "closest",
    }, width);
  }

  // -- between layers -------------------------------------------------------------------------------------------------

  const explorer = data.explorer;
  const chosen = explorer
    ? { reading: explorer.views[0].reading, part: explorer.views[0].part, pair: explorer.start.slice() }
    : null;

  const viewOf = (reading, part) => explorer.views.find((view) => view.reading === reading && view.part === part);
  // Features and rows have no parts: they are the same whatever key tokens are chosen.
  const shownView = () => viewOf(chosen.reading, chosen.part) || viewOf(chosen.reading, "all");

  function places(view) {
    return chosen.pair.map((at) => view.layers.indexOf(explorer.layers[at]));
  }

  function inWords(view, row, column) {
    if (row < 0 || column < 0) return "–";
    const of = (name) => (view[name] ? view[name][row][column] : null);
    return withError(view.values[row][column], of("se"), of("low"), of("high"));
  }

  function heatmap(width) {
    const element = find("explorer-heatmap");
    const view = shownView();
    const count = view.layers.length;
    const ticks = thinned(count, 16);
    const text = view.values.map((line, row) => line.map((value, column) => value === null
      ? `${escaped(view.layers[row])}<br>${escaped(view.layers[column])}<br>not comparable, or not defined`
      : `${escaped(view.layers[row])}<br>${escaped(view.layers[column])}<br><b>${inWords(view, row, column)}</b>`));
    const [row, column] = places(view);
    const frames = view.groups.length > 1 ? view.groups.map(([start, stop]) => square(start, stop - 1, colour("--soft"), 1)) : [];
    const marked = row < 0 || column < 0 ? []
      : [[row, column], [column, row]].map(([y, x]) => ({
        type: "rect", x0: x - 0.5, x1: x + 0.5, y0: y - 0.5, y1: y + 0.5, line: { color: colour("--mark"), width: 3 } }));
    const wide = (width || element.clientWidth || 480) - 110; // beside labels and the colour bar
    const numbers = count > 14 || wide / count < 26 ? [] : view.values.flatMap((line, y) => line.map((value, x) => ({ value, x, y })))
      .filter(({ value }) => value !== null)
      .map(({ value, x, y }) => ({ x, y, text: value.toFixed(2).replace("-0.00", "0.00"), showarrow: false,
        font: { size: count > 9 ? 9 : 11, color: legible(shadeAt(view, value)) } }));
    const axis = { title: { text: escaped(view.label), standoff: 6 }, tickvals: ticks, ticktext: ticks.map((at) => view.numbers[at]),
      showgrid: false, range: [-0.5, count - 0.5], constrain: "domain" };
    draw(element, [{
      type: "heatmap", z: view.values, text, hovertemplate: "%{text}<extra></extra>", hoverongaps: true, xgap: count > 24 ? 0 : 1, ygap: count > 24 ? 0 : 1,
      colorscale: explorer.scales[view.scale], zmin: view.ends[0], zmax: view.ends[1],
      colorbar: { title: { text: escaped(view.unit), side: "right" }, thickness: 12, outlinewidth: 0 },
    }], {
      height: Math.min(560, Math.max(340, (width || element.clientWidth || 480) - 30)),
      margin: { l: 50, r: 6, t: view.groups.length > 1 ? 22 : 8, b: 44 },
      plot_bgcolor: colour("--gap"),
      shapes: [...frames, ...marked],
      annotations: [...numbers, ...(view.groups.length > 1 ? brackets(view.groups).annotations : [])],
      xaxis: axis,
      yaxis: { ...axis, range: [count - 0.5, -0.5], scaleanchor: "x" },
    }, width);
    find("explorer-meaning").textContent = data.meanings[view.reading];
    find("explorer-note").textContent = view.part === chosen.part ? "" : "This reading is of rows or features: it has no part by key token.";
  }

  function square(first, last, shade, width) {
    return { type: "rect", x0: first - 0.5, x1: last + 0.5, y0: first - 0.5, y1: last + 0.5, line: { color: shade, width } };
  }

  function shadeAt(view, value) {
    const scale = explorer.scales[view.scale];
    const share = Math.min(1, Math.max(0, (value - view.ends[0]) / (view.ends[1] - view.ends[0])));
    return scale[Math.round(share * (scale.length - 1))][1];
  }

  // Black or white, whichever contrasts with a colour (relative luminance, WCAG 2).
  function legible(hex) {
    const [red, green, blue] = [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16) / 255)
      .map((part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4));
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.18 ? "black" : "white";
  }

  // One pair of a quantised array: a byte a value, 255 where nothing is defined.
  function unpacked(packed, pair) {
    const bytes = atob(packed.bytes);
    return Array.from({ length: packed.count }, (_, at) => {
      const level = bytes.charCodeAt(pair * packed.count + at);
      return level === 255 ? null : packed.low + (level * (packed.high - packed.low)) / 254;
    });
  }

  function pairNumber(count, first, second) {
    const [low, high] = first < second ? [first, second] : [second, first];
    return low * count - (low * (low + 1)) / 2 + (high - low - 1);
  }

  function detail(width) {
    const names = chosen.pair.map((at) => explorer.layers[at]);
    find("explorer-pair").textContent = `${names[0]} and ${names[1]}`;
    table();
    const group = explorer.groups.find((item) => names.every((name) => item.layers.includes(name)));
    const alone = names[0] === names[1];
    const why = alone ? "A layer is identical with itself: choose two." : group ? "" : "These layers have maps that cannot be compared.";
    find("explorer-why").textContent = why;
    for (const [id, has] of [["explorer-heads", "by_head"], ["explorer-tokens", "by_token"]]) {
      find(id).parentElement.hidden = !(group && !alone && group[has]);
    }
    if (!group || alone) return;
    const pair = pairNumber(group.layers.length, ...names.map((name) => group.layers.indexOf(name)));
    if (group.by_head) heads(unpacked(group.by_head, pair), width);
    if (group.by_token) tokens(group.by_token, pair, width);
  }

  function table() {
    const body = find("explorer-readings");
    const rows = data.order.map((reading) => {
      const row = document.createElement("tr");
      const head = document.createElement("th");
      head.scope = "row";
      head.textContent = explorer.views.find((view) => view.reading === reading).title;
      row.append(head);
      for (const part of data.parts) {
        const cell = document.createElement("td");
        const view = viewOf(reading, part);
        cell.textContent = view ? inWords(view, ...places(view)) : "";
        row.append(cell);
      }
      return row;
    });
    body.replaceChildren(...rows);
  }

  function heads(values, width) {
    draw(find("explorer-heads"), [{
      type: "bar", x: values.map((_, at) => at), y: values, marker: { color: colour("--line-1") },
      text: values.map((value, at) => `head ${at}: M ${decimal(value)}`), textposition: "none", hovertemplate: "%{text}<extra></extra>",
    }], {
      height: 190,
      xaxis: { title: { text: "Head", standoff: 6 }, dtick: Math.max(1, Math.ceil(values.length / 16)), showgrid: false },
      yaxis: { title: { text: "M", standoff: 6 }, range: [Math.min(0, ...values.filter((value) => value !== null)), 1] },
    }, width);
  }

  function tokens(packed, pair, width) {
    const prefix = unpacked(packed.prefix, pair).map(decimal);
    const patches = unpacked(packed.patches, pair);
    find("explorer-prefix").textContent = (prefix.length ? `Prefix ${prefix.length > 1 ? "tokens" : "token"}: ${prefix.join(", ")}. ` : "")
      + (packed.pooled > 1 ? `Each square is the mean over ${packed.pooled} × ${packed.pooled} patches.` : "");
    if (!packed.grid) {
      draw(find("explorer-tokens"), [{ x: patches.map((_, at) => at), y: patches, mode: "lines", line: { color: colour("--line-1") } }], {
        height: 220, xaxis: { title: { text: "Key token", standoff: 6 } }, yaxis: { title: { text: "M", standoff: 6 } } }, width);
      return;
    }
    const [rows, columns] = packed.grid;
    const z = Array.from({ length: rows }, (_, row) => patches.slice(row * columns, (row + 1) * columns));
    const known = patches.filter((value) => value !== null);
    // Never zoomed into noise: at least a tenth from end to end.
    const high = Math.max(...known);
    const low = Math.min(Math.min(...known), high - 0.1);
    draw(find("explorer-tokens"), [{
      type: "heatmap", z, zmin: low, zmax: high, colorscale: explorer.scales.sequential,
      text: z.map((line, row) => line.map((value, column) => `patch ${row}, ${column}: M ${decimal(value)}`)), hovertemplate: "%{text}<extra></extra>",
      colorbar: { title: { text: "M", side: "right" }, thickness: 12, outlinewidth: 0 },
    }], {
      height: 260, margin: { l: 10, r: 6, t: 6, b: 10 }, plot_bgcolor: colour("--gap"),
      xaxis: { showticklabels: false, ticks: "", showgrid: false, constrain: "domain" },
      yaxis: { showticklabels: false, ticks: "", showgrid: false, autorange: "reversed", scaleanchor: "x" },
    }, width);
  }

  function spoken() {
    const view = shownView();
    return `${view.title}, ${chosen.pair.map((at) => explorer.layers[at]).join(" and ")}: ${inWords(view, ...places(view))}`;
  }

  function choose(pair) {
    chosen.pair = pair;
    [find("explorer-first").value, find("explorer-second").value] = pair.map(String);
    heatmap();
    detail();
    find("explorer-said").textContent = spoken();
  }

  function connect() {
    const element = find("explorer-heatmap");
    for (const input of document.querySelectorAll("input[name=reading], input[name=part]")) {
      input.addEventListener("change", () => {
        chosen[input.name] = input.value;
        heatmap();
        find("explorer-said").textContent = spoken();
      });
    }
    for (const [place, id] of ["explorer-first", "explorer-second"].entries()) {
      find(id).addEventListener("change", (event) => {
        const pair = chosen.pair.slice();
        pair[place] = Number(event.target.value);
        choose(pair);
      });
    }
    element.on("plotly_click", ({ points }) => {
      const view = shownView();
      choose([points[0].y, points[0].x].map((at) => explorer.layers.indexOf(view.layers[at])));
    });
    element.addEventListener("keydown", (event) => {
      const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
      if (!step) return;
      event.preventDefault();
      choose(chosen.pair.map((at, place) => Math.min(explorer.layers.length - 1, Math.max(0, at + step[place]))));
    });
  }

  // -- the page -------------------------------------------------------------------------------------------------------

  const KINDS = { depth: byDepth, spectrum };

  function drawAll(width) {
    for (const element of document.querySelectorAll("[data-chart]")) {
      const chart = data.charts[Number(element.dataset.chart)];
      KINDS[chart.kind](element, chart, width);
    }
    if (explorer) {
      heatmap(width);
      detail(width);
    }
  }

  drawAll();
  if (explorer) {
    connect();
    choose(chosen.pair);
    find("explorer-said").textContent = "";
  }
  document.documentElement.classList.add("drawn");
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawAll());
  // Paper is white and narrower than most screens: charts do not follow by themselves.
  addEventListener("beforeprint", () => {
    document.documentElement.classList.add("printing");
    drawAll(320);
  });
  addEventListener("afterprint", () => {
    document.documentElement.classList.remove("printing");
    drawAll();
  });
})();
