// The figures of a study. Everything the data says reaches the page as text; Plotly's own labels go through `label`.
(async () => {
  const scheme = matchMedia("(prefers-color-scheme: dark)");
  let printing = false;
  const dark = () => scheme.matches && !printing;
  const narrow = () => innerWidth < 640;
  const percent = (value) => `${(100 * value).toFixed(1)} %`;

  const written = (chart, value) => chart.unit === "share" ? percent(value) : value.toFixed(3);

  function traces(chart) {
    const named = (control) => [...new Set(chart.series.filter((s) => s.control === control).map((s) => s.name))], seen = new Set();
    const palette = COLOURS[dark() ? "dark" : "light"], greys = dark() ? ["#8d96a1", "#5c6570"] : ["#8a8a8a", "#c4c4c4"];
    return chart.series.flatMap((s) => {
      const i = named(s.control).indexOf(s.name), shades = s.control ? greys : palette, colour = shades[i % shades.length];
      const said = s.y.map((y, k) => y === null ? "" : written(chart, y) + (s.low.length ? ` [${written(chart, s.low[k])}, ${written(chart, s.high[k])}]` : ""));
      const shared = { name: label(s.name), legendgroup: s.name, showlegend: !seen.has(s.name), x: s.x.map((x) => (typeof x === "number" ? x : label(x))),
        y: s.y, customdata: said, hovertemplate: `${label(s.name)}, %{x}: %{customdata}<extra></extra>` };
      seen.add(s.name);
      const drawnAs = { bars: { type: "bar" }, points: { type: "scatter", mode: "markers", offsetgroup: s.name } }[chart.kind];
      if (drawnAs) return [{ ...shared, ...drawnAs, marker: { color: colour },
        error_y: { type: "data", symmetric: false, array: s.high.map((h, k) => h - s.y[k]), arrayminus: s.low.map((l, k) => s.y[k] - l), thickness: 1.2, width: 3 } }];
      const line = { ...shared, mode: s.control ? "lines" : "lines+markers", marker: { symbol: SYMBOLS[i % SYMBOLS.length], size: 6 },
        line: { color: colour, width: s.control ? 1 : 2, dash: s.control ? "dot" : "solid" } };
      if (!s.low.length || s.control) return [line];
      const band = { x: [...s.x, ...[...s.x].reverse()], y: [...s.low, ...[...s.high].reverse()], mode: "lines", fill: "toself",
        line: { width: 0, color: colour }, opacity: 0.18, hoverinfo: "skip", showlegend: false, legendgroup: s.name };
      return [band, line];
    });
  }

  function layout(chart) {
    const css = getComputedStyle(document.documentElement);
    const ink = css.getPropertyValue("--ink").trim(), grid = css.getPropertyValue("--line").trim();
    const axis = { gridcolor: grid, linecolor: grid, zerolinecolor: grid, automargin: true };
    return {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: ink, size: narrow() ? 11 : 13 },
      hovermode: "closest", barmode: "group", scattermode: "group", margin: { l: 56, r: 12, t: 8, b: 48 }, dragmode: narrow() ? false : "zoom", hoverlabel: { namelength: -1 },
      legend: { orientation: "h", y: -0.22, yanchor: "top" }, showlegend: true,
      xaxis: { ...axis, title: { text: label(chart.x), standoff: 8 }, ...(chart.kind === "lines" ? { tickformat: ".0%" } : {}),
        ...(chart.log ? { type: "log", tickvals: [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1] } : {}) },
      yaxis: { ...axis, title: { text: label(chart.y), standoff: 8 }, tickformat: chart.unit === "share" ? ".0%" : ".2f", range: chart.range },
      shapes: chart.level === null ? [] : [{ type: "line", xref: "paper", x0: 0, x1: 1, y0: chart.level, y1: chart.level, line: { color: "#8a8a8a", dash: "dash", width: 1 } }],
      ...(printing ? { width: 680 } : { autosize: true }),
    };
  }

  const charts = JSON.parse(await unpack("data-charts"));
  function draw() {
    for (const chart of charts) {
      const place = document.getElementById(`chart-${chart.name}`);
      place.setAttribute("role", "img");
      place.setAttribute("aria-label", chart.title);
      Plotly.react(place, traces(chart), layout(chart), { displayModeBar: false, responsive: true });
    }
  }
  await startPlotly();
  draw();
  scheme.addEventListener("change", draw);
  addEventListener("beforeprint", () => { printing = true; draw(); });
  addEventListener("afterprint", () => { printing = false; draw(); });
  document.documentElement.dataset.ready = "true";
})().catch(undrawn);
