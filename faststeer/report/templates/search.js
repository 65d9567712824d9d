// The figures of a search: gain against each cost. Everything the data says goes through `label`.
(async () => {
  const scheme = matchMedia("(prefers-color-scheme: dark)");
  const narrow = () => innerWidth < 640;
  const { lines, costs } = JSON.parse(await unpack("data-search"));
  const ops = [...new Set(lines.map((line) => line.op))];
  const inPoints = (cost) => cost === "repetition" || cost === "over_refusal";  // differences of two shares

  function traces(cost) {
    const palette = COLOURS[scheme.matches ? "dark" : "light"], ink = getComputedStyle(document.documentElement).getPropertyValue("--ink").trim();
    const points = (own, more) => ({ x: own.map((line) => (inPoints(cost) ? 100 : 1) * line[cost]), y: own.map((line) => line.gain), mode: "markers", text: own.map((line) => label(line.text)),
      customdata: own.map((line) => line.answers), hovertemplate: "%{text}<br>gain %{y:+.3f}, cost %{x:.4g}, %{customdata} prompts<extra></extra>", ...more });
    const made = ops.map((op, i) => points(lines.filter((line) => line.op === op), { name: label(op),
      marker: { color: palette[i % palette.length], symbol: SYMBOLS[i % SYMBOLS.length], size: 8 } }));
    made.push(points(lines.filter((line) => line.front), { name: "on the front", marker: { symbol: "circle-open", size: 14, color: ink, line: { width: 1.5 } } }));
    made.push(points(lines.filter((line) => line.chosen), { name: "chosen", marker: { symbol: "star", size: 16, color: ink } }));
    return made;
  }

  function layout(cost, title) {
    const css = getComputedStyle(document.documentElement), ink = css.getPropertyValue("--ink").trim(), grid = css.getPropertyValue("--line").trim();
    const axis = { gridcolor: grid, linecolor: grid, zerolinecolor: grid, automargin: true };
    return { paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: ink, size: narrow() ? 11 : 13 }, hovermode: "closest",
      margin: { l: 56, r: 12, t: 8, b: 48 }, dragmode: narrow() ? false : "zoom", legend: { orientation: "h", y: -0.22, yanchor: "top" }, autosize: true,
      xaxis: { ...axis, title: { text: label(inPoints(cost) ? `${title}, points` : title), standoff: 8 }, ...(inPoints(cost) ? { tickformat: "+d" } : {}) },
      yaxis: { ...axis, title: { text: "gain, mean score", standoff: 8 } } };
  }

  function draw() {
    for (const [cost, title] of costs) {
      const place = document.getElementById(`chart-${cost}`);
      place.setAttribute("role", "img");
      place.setAttribute("aria-label", `Gain against ${title}`);
      Plotly.react(place, traces(cost), layout(cost, title), { displayModeBar: false, responsive: true });
    }
  }
  await startPlotly();
  draw();
  scheme.addEventListener("change", draw);
  document.documentElement.dataset.ready = "true";
})().catch(undrawn);
