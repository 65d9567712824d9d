// Everything the data says reaches the page as text nodes, never as markup; Plotly's own labels go through `label`.
(async () => {
  const $ = (id) => document.getElementById(id);
  const PAGE = { settings: 25, answers: 10 };

  function element(tag, properties = {}, ...children) {
    const made = Object.assign(document.createElement(tag), properties);
    made.append(...children);
    return made;
  }

  function number(value, digits = 3) {
    if (value === null || value === undefined) return "–";
    const short = Number(value.toPrecision(digits));
    return Math.abs(short) >= 1e6 || (short !== 0 && Math.abs(short) < 1e-4) ? short.toExponential() : String(short);
  }
  const percent = (value) => (value === null || value === undefined ? "–" : `${number(100 * value)} %`);
  const shown = (measure, value) => (measure.share ? percent(value) : number(value));
  const short = (text, n = 48) => (text.length > n ? text.slice(0, n - 1) + "…" : text);
  const unique = (values) => [...new Set(values)];

  // Data -------------------------------------------------------------------------------------------------------------

  const data = JSON.parse(await unpack("data-summary"));
  const { settings, measures } = data;
  const byKey = new Map(measures.map((m) => [m.key, m]));
  const vectors = unique(settings.filter((s) => s.kind === "vector").map((s) => s.vector));
  const layersOf = (setting) => setting.layers.join(",");
  const nameOf = (s) => (s.control === null ? s.vector : `${s.vector}~random${s.control}`);
  const prompts = new Map(data.prompts.map((p) => [p.prompt, p]));
  const state = { recommended: null, front: [], eligible: new Set(), order: { column: null, down: true } };

  function fill(select, options, chosen) {
    const groups = new Map();
    for (const { value, text, group } of options) {
      let parent = select;
      if (group) {
        if (!groups.has(group)) groups.set(group, element("optgroup", { label: group }));
        parent = groups.get(group);
      }
      parent.append(element("option", { value, textContent: text }));
    }
    select.append(...groups.values());
    if (chosen !== undefined && chosen !== null) select.value = chosen;
  }

  const tagGroup = (measure) => (measure.tag === null ? "All prompts" : `Prompts: ${measure.tag}`);
  const behaviour = () => byKey.get($("behaviour").value);
  const price = () => ($("price") ? byKey.get($("price").value) : null);

  function fillPrices(chosen) {
    if (!$("price")) return;
    const found = data.prices[behaviour().key].map((i) => measures[i]);
    $("price").replaceChildren();
    const options = found.map((m) => ({
      value: m.key, text: m.label, group: m.key.includes("/effect/") ? "Side effects" : tagGroup(m),
    }));
    fill($("price"), options, found.some((m) => m.key === chosen) ? chosen : found[0].key);
  }

  // Gain and cost, as faststeer.report.choice defines them.
  const change = (measure, setting) =>
    measure.value[setting] === null || measure.value[0] === null ? null : measure.value[setting] - measure.value[0];
  const gain = (setting) => {
    const found = change(behaviour(), setting);
    return found === null || $("goal").value === "more" ? found : -found;
  };
  const cost = (setting) => {
    if (!price()) return 0;
    const found = change(price(), setting);
    if (found === null || price().price === "increase") return found;
    return price().price === "drop" ? -found : Math.abs(found);
  };

  function choose() {
    const found = data.choices[`${behaviour().key} ${$("goal").value} ${price() ? price().key : ""}`];
    state.front = found.front;
    state.eligible = new Set(found.eligible);
    const limit = $("limit") && $("limit").value !== "" ? Number($("limit").value) : Infinity;
    const within = found.front.filter((n) => cost(n) <= limit);
    const enough = (Number($("share").value) / 100) * Math.max(0, ...within.map(gain));
    const first = within.find((n) => gain(n) >= enough);
    state.recommended = first === undefined ? null : first;
  }

  // The recommended setting ------------------------------------------------------------------------------------------

  function interval(measure, n) {
    const text = shown(measure, measure.value[n]);
    return measure.low[n] === null || measure.low[n] === undefined
      ? text : `${text} [${shown(measure, measure.low[n])}, ${shown(measure, measure.high[n])}]`;
  }

  function difference(measure, n) {
    const over = measure.over[n];
    if (!over) return "–";
    const sign = over[0] > 0 ? "+" : "";
    return over[1] === null ? sign + number(over[0]) : `${sign}${number(over[0])} [${number(over[1])}, ${number(over[2])}]`;
  }

  function drawRecommended() {
    const box = $("recommended"), n = state.recommended, b = behaviour(), p = price();
    box.replaceChildren();
    box.dataset.setting = n === null ? "" : n;
    if (n === null) {
      box.append(element("h3", { textContent: "None" }), element("p", {
        textContent: `No setting within the limit gives ${$("goal").value} of it than the ${data.versus} by more than chance.`,
      }));
      return;
    }
    const list = element("dl");
    const row = (term, text, name) => list.append(element("div", {},
      element("dt", { textContent: term }), element("dd", { textContent: text, id: `recommended-${name}` })));
    row(b.title, `${interval(b, n)}; unsteered ${shown(b, b.value[0])}`, "behaviour");
    row(`Difference of the mean score to the ${data.versus}`, difference(b, n), "over");
    if (p) row(p.title, `${interval(p, n)}; unsteered ${shown(p, p.value[0])}`, "price");
    const button = element("button", { type: "button", textContent: "Show its answers" });
    button.addEventListener("click", () => showAnswers(n));
    box.append(element("h3", { textContent: settings[n].name }), list, element("p", {}, button));
  }

  // Figures ----------------------------------------------------------------------------------------------------------

  let printing = false;
  const dark = () => !printing && matchMedia("(prefers-color-scheme: dark)").matches;
  const narrow = () => !printing && innerWidth < 640;
  const colour = (i, n) => {
    const list = COLOURS[dark() ? "dark" : "light"];
    return n <= list.length ? list[i % list.length] : `hsl(${Math.round(255 - (220 * i) / (n - 1))} 75% ${dark() ? 66 : 38}%)`;
  };
  const soft = () => (dark() ? "#8d96a1" : "#8a8a8a");
  const CONFIG = { displayModeBar: false, responsive: true };

  function layout(x, y, more = {}) {
    const css = getComputedStyle(document.documentElement);
    const ink = css.getPropertyValue("--ink").trim(), line = css.getPropertyValue("--line").trim();
    const axis = (text, rest = {}) => ({
      title: { text: label(text), standoff: 8 }, gridcolor: line, linecolor: line, zerolinecolor: line, automargin: true, ...rest,
    });
    return {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: ink, size: narrow() ? 11 : 13 },
      margin: { l: 56, r: 12, t: 12, b: 48 }, hovermode: "closest", dragmode: narrow() ? false : "zoom", hoverlabel: { namelength: -1 },
      legend: narrow() ? { orientation: "h", y: -0.24, yanchor: "top" } : { x: 1.02, y: 1 },
      xaxis: axis(x, more.xaxis), yaxis: axis(y, more.yaxis), showlegend: more.showlegend ?? true,
      title: more.title ? { text: label(more.title), font: { size: 14 }, y: 0.98, yanchor: "top", automargin: true } : undefined,
    };
  }

  const wrap = (text, n) => text.split(" ").reduce((lines, word) => {
    if (lines.length && (lines.at(-1) + word).length < n) lines[lines.length - 1] += ` ${word}`;
    else lines.push(word);
    return lines;
  }, []).map(label).join("<br>");

  const axisOf = (measure) => (measure.share ? { tickformat: ".0%", range: [-0.04, 1.04] } : {});
  const ending = (measure) => (measure.share ? ":.1%" : ":.3~g");

  function curve(vector, control, layers) {
    const found = settings.map((s, n) => [s.coefficient, n, s])
      .filter(([, , s]) => s.vector === vector && s.control === control && layersOf(s) === layers && s.coefficient !== null)
      .map(([x, n]) => [x, n]);
    if (data.intervention !== "clamp") found.push([0, 0]);
    return found.filter(([, n]) => behaviour().value[n] !== null).sort((a, b) => a[0] - b[0]);
  }

  const layersOfVector = (vector) =>
    unique(settings.filter((s) => s.kind === "vector" && s.vector === vector).sort((a, b) => {
      for (let i = 0; i < Math.max(a.layers.length, b.layers.length); i++)
        if (a.layers[i] !== b.layers[i]) return (a.layers[i] ?? -1) - (b.layers[i] ?? -1);
      return 0;
    }).map(layersOf));

  function drawDose() {
    const vector = $("vector").value, m = behaviour(), all = layersOfVector(vector), traces = [];
    const layers = all.filter((l) => $("dose-layers").value === "" || l === $("dose-layers").value);
    const controls = unique(settings.filter((s) => s.kind === "control" && s.vector === vector).map((s) => s.control));
    let first = true;
    for (const control of controls) for (const l of layers) {
      const points = curve(vector, control, l);
      traces.push({ x: points.map((p) => p[0]), y: points.map((p) => m.value[p[1]]), mode: "lines", legendgroup: "random",
        line: { color: soft(), width: 1, dash: "dot" }, name: "random vectors", showlegend: first,
        hovertemplate: `random ${control}, layer ${l}: %{y${ending(m)}}<extra></extra>` });
      first = false;
    }
    for (const l of layers) {
      const i = all.indexOf(l), c = colour(i, all.length), points = curve(vector, null, l);
      const band = points.filter(([, n]) => m.low[n] !== null);
      traces.push({ x: [...band.map((p) => p[0]), ...band.map((p) => p[0]).reverse()], legendgroup: l, showlegend: false,
        y: [...band.map((p) => m.low[p[1]]), ...band.map((p) => m.high[p[1]]).reverse()], mode: "lines", fill: "toself",
        line: { width: 0, color: c }, opacity: layers.length > 1 ? 0.16 : 0.5, hoverinfo: "skip" });
      traces.push({ x: points.map((p) => p[0]), y: points.map((p) => m.value[p[1]]), mode: "lines+markers", legendgroup: l,
        name: `layer ${l}`, line: { color: c }, marker: { symbol: SYMBOLS[i % SYMBOLS.length], size: 7 }, meta: l,
        customdata: points.map(([, n]) => interval(m, n)),
        hovertemplate: `layer ${l}, coefficient %{x}: %{customdata}<extra></extra>` });
    }
    const made = layout("coefficient", m.title, { yaxis: axisOf(m) });
    if (m.value[0] !== null) made.shapes = [{ type: "line", xref: "paper", x0: 0, x1: 1, y0: m.value[0], y1: m.value[0],
      line: { color: soft(), dash: "dash", width: 1 } }];
    draw($("dose"), traces, made, `${m.title} against the coefficient of ${vector}, a line per layer`);
  }

  function drawHeat(id, m) {
    const vector = $("vector").value, layers = layersOfVector(vector), place = new Map();
    for (const [n, s] of settings.entries())
      if (s.kind === "vector" && s.vector === vector) place.set(`${layersOf(s)} ${s.coefficient}`, n);
    const xs = unique(settings.filter((s) => s.kind === "vector" && s.vector === vector).map((s) => s.coefficient));
    if (data.intervention !== "clamp") xs.push(0);
    const coefficients = unique(xs).sort((a, b) => a - b);
    const cells = layers.map((l) => coefficients.map((c) => place.get(`${l} ${c}`) ?? (c === 0 && data.intervention !== "clamp" ? 0 : null)));
    const z = cells.map((row) => row.map((n) => (n === null ? null : m.value[n])));
    const text = z.map((row) => row.map((v) => (v === null ? "" : m.share ? String(Math.round(100 * v)) : number(v, 2))));
    const longest = Math.max(...text.flat().map((each) => each.length));
    const fits = cells.length <= 12 && coefficients.length * (longest + 1) <= (narrow() ? 46 : 66);  // characters in a row
    const traces = [{ type: "heatmap", x: coefficients.map(String), y: layers, z, colorscale: "Cividis", xgap: 1, ygap: 1,
      ...(m.share ? { zmin: 0, zmax: 1 } : {}), colorbar: { thickness: 12, tickformat: m.share ? ".0%" : "~g" }, customdata: cells.map((row) => row.map((n) => (n === null ? "" : interval(m, n)))),
      ...(fits ? { text, texttemplate: "%{text}", textfont: { size: narrow() ? 9 : 11 } } : {}),
      hovertemplate: "layer %{y}, coefficient %{x}: %{customdata}<extra></extra>" }];
    const best = state.recommended === null ? null : settings[state.recommended];
    const made = layout("coefficient", "layer", { xaxis: { type: "category" }, yaxis: { type: "category" }, showlegend: false });
    made.title = { text: wrap(m.title + (m.share ? " (%)" : ""), narrow() ? 40 : 56), font: { size: 14 }, x: 0.02, y: 0.98, yanchor: "top" };
    made.margin.t = 44;
    if (best && best.kind === "vector" && best.vector === vector) {
      const x = coefficients.indexOf(best.coefficient), y = layers.indexOf(layersOf(best));
      made.shapes = [{ type: "rect", x0: x - 0.5, x1: x + 0.5, y0: y - 0.5, y1: y + 0.5, line: { color: "#D81B60", width: 3 } }];
      made.annotations = [{ x: x + 0.5, y: y + 0.5, xanchor: "center", yanchor: "middle", text: "★", showarrow: false, font: { size: 20, color: "#D81B60" } }];
    }
    draw($(id), traces, made, `${m.title} of ${vector} by layer and coefficient`);
  }

  function drawPareto() {
    const b = behaviour(), p = price(), traces = [];
    const point = (n) => ({ x: cost(n), y: b.value[n] });
    const trace = (numbers, name, style) => {
      const found = numbers.filter((n) => cost(n) !== null && b.value[n] !== null);
      if (found.length) traces.push({ type: "scatter", x: found.map((n) => point(n).x), y: found.map((n) => point(n).y), mode: "markers", name: label(short(name)),
        customdata: found.map((n) => [n, label(short(settings[n].name, 80)), interval(b, n), interval(p, n)]),
        hovertemplate: "%{customdata[1]}<br>%{customdata[2]}<br>price: %{customdata[3]}<extra></extra>", ...style });
    };
    const numbers = settings.map((_, n) => n);
    trace(numbers.filter((n) => settings[n].kind === "control"), "random vectors", { marker: { symbol: "x-thin-open", color: soft(), size: 6 } });
    const names = unique(settings.filter((s) => s.kind === "vector" || s.kind === "plan").map((s) => s.vector));
    names.forEach((name, i) => {
      const c = colour(i, names.length), symbol = SYMBOLS[i % SYMBOLS.length];
      const own = numbers.filter((n) => settings[n].vector === name && settings[n].control === null);
      trace(own.filter((n) => state.eligible.has(n)), name, { marker: { symbol, color: c, size: 8 }, legendgroup: name });
      trace(own.filter((n) => !state.eligible.has(n)), name, { marker: { symbol: symbol + "-open", color: c, size: 7 }, legendgroup: name,
        opacity: 0.65, showlegend: !own.some((n) => state.eligible.has(n)) });
    });
    if (state.front.length) {
      const path = [0, ...state.front].map(point);
      traces.push({ x: path.map((q) => q.x), y: path.map((q) => q.y), mode: "lines", name: "front", hoverinfo: "skip",
        line: { shape: "hv", color: dark() ? "#e9ebee" : "#16191d", width: 1.5 } });
    }
    trace([0], "unsteered", { marker: { symbol: "pentagon", color: dark() ? "#e9ebee" : "#16191d", size: 10 } });
    if (state.recommended !== null)
      trace([state.recommended], `use ${settings[state.recommended].name}`, { marker: { symbol: "star", color: "#D81B60", size: 17, line: { color: dark() ? "#fff" : "#000", width: 1 } } });
    draw($("pareto"), traces, layout(p.costs, b.title, { yaxis: axisOf(b) }), `${b.title} against ${p.title}`);
  }

  const listening = new Set();
  function draw(place, traces, made, description, source = "The table of every setting has the numbers.") {
    place.setAttribute("role", "img");
    place.setAttribute("aria-label", `${description}. ${source}`);
    if (made.yaxis.title.text.length > 44 && made.yaxis.type !== "category") made.yaxis.title.text = made.yaxis.title.text.replace(/(.{20,40}?) /, "$1<br>");
    if (printing) made.width = 680;  // an A4 page between its margins
    made.autosize = !printing;
    Plotly.react(place, traces, made, CONFIG);
    if (place.id === "pareto" && !listening.has(place.id)) {
      listening.add(place.id);
      place.on("plotly_click", (event) => event.points[0].customdata && showAnswers(event.points[0].customdata[0]));
    }
  }

  function drawFigures() {
    if (!window.Plotly) return;
    for (const redraw of opened) redraw();
    if (price()) drawPareto();
    if (!vectors.length) return;
    drawDose();
    drawHeat("heat-behaviour", behaviour());
    if (price()) drawHeat("heat-price", price());
  }

  // Settings ---------------------------------------------------------------------------------------------------------

  function pager(nav, pages, page, go) {
    nav.replaceChildren();
    if (pages < 2) return;
    const button = (text, to) => {
      const made = element("button", { type: "button", textContent: text, disabled: to < 0 || to >= pages });
      made.addEventListener("click", () => go(to));
      return made;
    };
    const at = element("input", { type: "number", min: 1, max: pages, value: page + 1, ariaLabel: "Page" });
    at.addEventListener("change", () => go(Math.min(pages, Math.max(1, Math.round(Number(at.value)) || 1)) - 1));
    nav.append(button("Previous", page - 1), at, `of ${pages}`, button("Next", page + 1));
  }

  function columns() {
    const b = behaviour(), p = price(), over = (n) => b.over[n] && b.over[n][0];
    return [
      { title: "Setting", key: (n) => n, text: (n) => settings[n].name },
      { title: b.title, key: (n) => b.value[n], text: (n) => interval(b, n) },
      { title: `Difference of the mean score to the ${data.versus}`, key: over, text: (n) => difference(b, n) },
      ...(p ? [{ title: p.title, key: (n) => p.value[n], text: (n) => interval(p, n) }] : []),
      { title: "Judged", key: (n) => b.n[n], text: (n) => String(b.n[n] ?? 0) },
      { title: "Failed or unread", key: troubles, text: (n) => String(troubles(n)) },
    ];
  }
  const troubles = (n) => settings[n].errors + Object.values(settings[n].unread).reduce((a, b) => a + b, 0);

  function drawSettings(page = 0) {
    const made = columns(), kind = $("settings-kind").value, wanted = $("settings-search").value.trim().toLowerCase();
    const front = new Set(state.front);
    let rows = settings.map((_, n) => n).filter((n) => settings[n].name.toLowerCase().includes(wanted)
      && (kind === "" || (kind === "steered" ? settings[n].kind !== "control" : front.has(n))));
    const { column, down } = state.order;
    if (column !== null && made[column]) {
      const value = (n) => made[column].key(n) ?? null;
      rows.sort((a, b) => {
        const [x, y] = [value(a), value(b)];
        if (x === null || y === null) return (x === null) - (y === null);
        return down ? y - x : x - y;
      });
    }
    const head = element("tr");
    made.forEach(({ title }, i) => {
      const button = element("button", { type: "button", textContent: title + (i === column ? (down ? " ↓" : " ↑") : "") });
      button.addEventListener("click", () => { state.order = { column: i, down: i === column ? !down : i > 0 }; drawSettings(); });
      const cell = element("th", { scope: "col" }, button);
      if (i === column) cell.ariaSort = down ? "descending" : "ascending";
      head.append(cell);
    });
    $("settings").tHead.replaceChildren(head);
    const pages = Math.ceil(rows.length / PAGE.settings);
    const body = rows.slice(page * PAGE.settings, (page + 1) * PAGE.settings).map((n) => {
      const row = element("tr", { className: n === state.recommended ? "recommended" : "" });
      row.dataset.setting = n;
      made.forEach((c, i) => {
        const cell = element("td");
        if (i === 0 && n !== 0) {
          const button = element("button", { type: "button", textContent: (n === state.recommended ? "★ " : "") + c.text(n), title: "Show its answers" });
          button.addEventListener("click", () => showAnswers(n));
          cell.append(button);
        } else cell.textContent = c.text(n);
        row.append(cell);
      });
      return row;
    });
    $("settings").tBodies[0].replaceChildren(...body);
    pager($("settings-pager"), pages, page, drawSettings);
  }

  // Answers ----------------------------------------------------------------------------------------------------------

  let answers = null, matching = [];

  function loadAnswers(packed) {
    answers = packed;
    answers.base = new Map();
    answers.setting.forEach((s, row) => { if (s === 0) answers.base.set(answers.prompt[row], row); });
    answers.judged = answers.verdicts.map((v) => {
      const at = new Int32Array(answers.setting.length).fill(-1);
      v.row.forEach((row, i) => { at[row] = i; });
      return at;
    });
    answers.lower = new Array(answers.texts.length);
  }
  const lower = (text) => (answers.lower[text] ??= answers.texts[text].toLowerCase());
  const words = (content) => (typeof content === "string" ? content : content.map((m) => (typeof m.content === "string" ? m.content : JSON.stringify(m.content))).join("\n"));

  function verdict(judge, row) {
    const v = answers.verdicts[judge], i = row === undefined ? -1 : answers.judged[judge][row];
    if (i < 0) return null;
    const { shows, name } = data.judges[judge], score = v.score[i];
    return { name, score, label: v.labels[v.label[i]], unread: score === null, raw: v.raw[i], parts: v.parts[i],
      shown: score !== null && shows !== null && score >= shows };
  }

  const TESTS = {
    shown: (v) => v && v.shown,
    not: (v) => v && !v.unread && !v.shown,
    changed: (v, base) => v && base && !v.unread && !base.unread && v.shown !== base.shown,
    unread: (v) => v && v.unread,
  };

  function fillAnswers() {
    const steered = settings.filter((s) => s.kind !== "unsteered"), all = { value: "", text: "all" };
    const list = (values) => [all, ...unique(values).map((v) => ({ value: v, text: v }))];
    fill($("answers-vector"), list(steered.map(nameOf)));
    fill($("answers-layers"), list(steered.filter((s) => s.layers.length).map(layersOf)));
    fill($("answers-coefficient"), list(steered.filter((s) => s.coefficient !== null).sort((a, b) => a.coefficient - b.coefficient).map((s) => String(s.coefficient))));
    fill($("answers-tag"), list(data.prompts.map((p) => p.tag).filter((t) => t)));
    const options = [{ value: "", text: "any" }];
    data.judges.forEach(({ name, shows }, j) => {
      if (shows !== null) {
        options.push({ value: `${j} shown`, text: `${name}: shown`, group: name }, { value: `${j} not`, text: `${name}: not shown`, group: name },
          { value: `${j} changed`, text: `${name}: changed by steering`, group: name });
      }
      if (settings.some((s) => s.unread[name])) options.push({ value: `${j} unread`, text: `${name}: could not be read`, group: name });
    });
    if (settings.some((s) => s.errors)) options.push({ value: "failed", text: "could not be generated" });
    if (data.projected) options.push({ value: "projected", text: "with projections" });
    fill($("answers-verdict"), options);
  }

  function filterAnswers(page = 0) {
    if (!answers) return;
    const vector = $("answers-vector").value, layers = $("answers-layers").value, coefficient = $("answers-coefficient").value;
    const tag = $("answers-tag").value, asked = $("answers-verdict").value, [judge, test] = asked.split(" ");
    const wanted = $("answers-search").value.trim().toLowerCase();
    const allowed = settings.map((s) => s.kind !== "unsteered" && (vector === "" || nameOf(s) === vector)
      && (layers === "" || layersOf(s) === layers) && (coefficient === "" || String(s.coefficient) === coefficient));
    const asking = new Map(), reads = (text) => lower(text).includes(wanted);
    for (const p of data.prompts)
      asking.set(p.prompt, { tag: tag === "" || p.tag === tag, found: wanted !== "" && words(p.content).toLowerCase().includes(wanted) });
    matching = [];
    answers.setting.forEach((s, row) => {
      if (!allowed[s]) return;
      const prompt = asking.get(answers.prompt[row]), base = answers.base.get(answers.prompt[row]);
      if (!prompt.tag) return;
      if (asked === "projected" ? !steeredMap(row) : asked === "failed" ? answers.errors[row] === undefined : asked !== "" && !TESTS[test](verdict(judge, row), verdict(judge, base))) return;
      if (wanted !== "" && !prompt.found && !reads(answers.text[row]) && !(base !== undefined && reads(answers.text[base]))) return;
      matching.push(row);
    });
    showPage(page);
  }

  function showPage(page) {
    const wanted = $("answers-search").value.trim(), rows = matching.slice(page * PAGE.answers, (page + 1) * PAGE.answers);
    $("answers-count").textContent = `${matching.length.toLocaleString("en")} of ${(answers.setting.length - answers.base.size).toLocaleString("en")} steered answers`;
    $("answers-count").dataset.count = matching.length;
    for (const place of document.querySelectorAll("#answers .js-plotly-plot")) Plotly.purge(place);
    opened = [];
    $("answers").replaceChildren(...rows.map((row) => card(row, wanted)));
    document.querySelector("#answers .projections > button")?.click();
    pager($("answers-pager"), Math.ceil(matching.length / PAGE.answers), page, showPage);
  }

  function marked(text, wanted) {
    const made = element("div", { className: "text", dir: "auto" });
    const lowered = text.toLowerCase(), needle = wanted.toLowerCase();
    // Lower case may be longer than the text (İ): then nothing is marked.
    if (!needle || lowered.length !== text.length) { made.textContent = text; return made; }
    let from = 0;
    for (let at = lowered.indexOf(needle); at >= 0; at = lowered.indexOf(needle, from)) {
      made.append(text.slice(from, at), element("mark", { textContent: text.slice(at, at + needle.length) }));
      from = at + needle.length;
    }
    made.append(text.slice(from));
    return made;
  }

  function card(row, wanted) {
    const prompt = prompts.get(answers.prompt[row]), head = element("div", { className: "prompt" });
    const messages = typeof prompt.content === "string" ? [{ content: prompt.content }] : prompt.content;
    for (const { role, content } of messages) {
      if (role) head.append(element("div", { className: "role", textContent: role }));
      head.append(marked(typeof content === "string" ? content : JSON.stringify(content), wanted));
    }
    head.append(element("div", { className: "meta", textContent: `prompt ${prompt.id}${prompt.tag ? `, ${prompt.tag}` : ""}` }));
    const sides = element("div", { className: "sides" }, side(answers.base.get(answers.prompt[row]), "unsteered", wanted),
      side(row, settings[answers.setting[row]].name, wanted));
    const made = element("article", {}, head, sides, ...projections(row));
    made.dataset.setting = answers.setting[row];
    made.dataset.prompt = answers.prompt[row];
    return made;
  }

  function side(row, title, wanted) {
    const made = element("div", { className: "side" }, element("h4", { textContent: title }));
    if (row === undefined) { made.append(element("p", { className: "empty", textContent: "not there yet" })); return made; }
    const text = answers.texts[answers.text[row]], error = answers.errors[row];
    if (error !== undefined) made.append(element("p", { className: "empty", textContent: `could not be generated: ${error}` }));
    else made.append(text === "" ? element("p", { className: "empty", textContent: "an empty answer" }) : marked(text, wanted));
    const list = element("ul", { className: "verdicts" });
    const read = [];
    data.judges.forEach((_, j) => {
      const v = verdict(j, row);
      if (!v) return;
      const said = v.unread ? "could not be read" : v.label !== null ? v.label : number(v.score);
      const item = element("li", { textContent: `${v.name}: ${said}`, className: v.unread ? "unread" : v.shown ? "shown" : "" });
      item.dataset.judge = j;
      item.title = v.unread ? "" : `score ${number(v.score, 6)}`;
      list.append(item);
      const parts = v.parts ? Object.entries(v.parts).map(([name, value]) => `${name} ${number(value)}`).join(", ") : "";
      if (v.raw !== undefined || parts) read.push(element("details", {}, element("summary", { textContent: `What ${v.name} said` }),
        element("div", { className: "text", textContent: [parts, v.raw].filter((t) => t).join("\n") })));
    });
    made.append(list, ...read, element("div", { className: "meta", textContent: `${answers.tokens[row]} tokens, ended by ${answers.finishes[answers.finish[row]]}` }));
    return made;
  }

  // Projections: halves, read when they are drawn ---------------------------------------------------------------------

  let maps = null, opened = [];

  function loadProjections(packed) {
    const bytes = decoded(atob(packed.data));
    maps = { ...packed, halves: new DataView(bytes.buffer), at: new Map(), of: new Map() };
    for (const answer of packed.answers) maps.of.set(`${answer.setting} ${answer.prompt}`, answer);
    let from = 0;
    packed.setting.forEach((setting, i) => {
      const key = `${setting} ${packed.prompt[i]}`, tokens = maps.of.get(key).text.length;
      const found = { direction: packed.direction[i], scale: packed.scale[i], sites: packed.sites[i], tokens, from };
      maps.at.set(setting === 0 ? `${key} ${found.direction}` : key, found);
      from += 2 * found.sites * tokens;
    });
  }
  const steeredMap = (row) => maps.at.get(`${answers.setting[row]} ${answers.prompt[row]}`);

  function half(at) {
    const bits = maps.halves.getUint16(at, true), exponent = (bits >> 10) & 31, fraction = bits & 1023;
    const size = exponent === 0 ? fraction * 2 ** -24 : (1 + fraction / 1024) * 2 ** (exponent - 15);
    return exponent === 31 ? null : bits >> 15 ? -size : size;  // null: not finite
  }

  function read(found, key) {
    const { of_prompt, text } = maps.of.get(key), { scale, sites, tokens, from } = found;
    const z = Array.from({ length: sites }, (_, site) => Array.from({ length: tokens }, (_, token) => {
      const value = half(from + 2 * (site * tokens + token));
      return value === null ? null : value * scale;
    }));
    return { z, of_prompt, texts: text.map((number) => maps.texts[number]) };
  }

  // A button, and below it the maps of the unsteered and the steered answer, where there are any.
  function projections(row) {
    const prompt = answers.prompt[row], steered = steeredMap(row);
    const base = steered && maps.at.get(`0 ${prompt} ${steered.direction}`);
    if (!base) return [];
    const title = maps.titles[steered.direction], box = element("div", { className: "projections" });
    const button = element("button", { type: "button", textContent: title[0].toUpperCase() + title.slice(1), ariaExpanded: "false" });
    box.append(button);
    box.dataset.closed = "";
    let redraw = null;
    button.addEventListener("click", () => {
      if (redraw) {
        opened = opened.filter((other) => other !== redraw);
        for (const place of box.querySelectorAll(".plot")) Plotly.purge(place);
        box.lastChild.remove();
        redraw = null;
        box.dataset.closed = "";
        button.ariaExpanded = "false";
        return;
      }
      const both = [read(base, `0 ${prompt}`), read(steered, `${answers.setting[row]} ${prompt}`)];
      const names = ["unsteered", settings[answers.setting[row]].name], places = names.map(() => element("div", { className: "plot" }));
      box.append(element("div", { className: "sides" }, ...places.map((place) => element("div", { className: "side" }, place))));
      redraw = () => places.forEach((place, i) => drawMap(place, both[i], names[i], title, both));
      delete box.dataset.closed;
      button.ariaExpanded = "true";
      opened.push(redraw);
      redraw();
    });
    return [box];
  }

  function drawMap(place, { z, of_prompt, texts }, name, title, both) {
    let low = Infinity, high = -Infinity;
    for (const side of both) for (const line of side.z) line.forEach((value, token) => {
      if (value === null || (token === 0 && line.length > 1)) return;
      low = Math.min(low, value);
      high = Math.max(high, value);
    });
    const width = Math.max(...both.map((side) => side.texts.length)), sites = z.length;
    const token = (text) => label(short(text.replace(/\n/g, "⏎").trim() || "␣", 14));
    const every = Math.ceil(width / (printing ? 60 : narrow() ? 26 : 34)), rows = Math.ceil(sites / 16);
    const columns = texts.map((_, i) => i).filter((i) => i % every === 0);
    const lines = z.map((_, i) => i).filter((i) => i % rows === 0 || i === sites - 1);
    const traces = [{ type: "heatmap", x: texts.map((_, i) => i), y: z.map((_, i) => i), z, colorscale: "Cividis", zmin: low, zmax: high,
      colorbar: { thickness: 10 }, customdata: z.map(() => texts.map(token)),
      hovertemplate: "%{customdata}<br>layer %{y}: %{z:.3~g}<extra></extra>" }];
    const made = layout("", "enters layer", { showlegend: false,
      xaxis: { tickvals: columns, ticktext: columns.map((i) => token(texts[i])), tickangle: -90, tickfont: { size: narrow() ? 9 : 10 }, range: [-0.5, width - 0.5], showgrid: false, zeroline: false },
      yaxis: { tickvals: lines, ticktext: lines.map((i) => (i === sites - 1 ? "out" : String(i))), showgrid: false, zeroline: false } });
    made.title = { text: label(short(name, narrow() ? 40 : 56)), font: { size: 14 }, x: 0.02, y: 0.98, yanchor: "top" };
    made.margin.t = 34;
    if (printing) made.height = Math.min(420, 150 + 14 * sites);
    made.shapes = [{ type: "line", x0: of_prompt - 0.5, x1: of_prompt - 0.5, yref: "paper", y0: 0, y1: 1, line: { color: "#fff", width: 2, dash: "dot" } }];
    draw(place, traces, made, `${title}, by token and layer: ${name}`, "");
  }

  function chooseAnswers(n) {
    const s = settings[n];
    for (const [id, value] of [["vector", s.kind === "unsteered" ? "" : nameOf(s)], ["layers", layersOf(s)], ["coefficient", s.coefficient === null ? "" : String(s.coefficient)]])
      $(`answers-${id}`).value = value;
    $("answers-tag").value = behaviour().tag ?? "";
  }

  function showAnswers(n) {
    chooseAnswers(n);
    filterAnswers();
    $("answers-title").scrollIntoView({ behavior: "auto" });
  }

  // Start ------------------------------------------------------------------------------------------------------------

  function update() {
    choose();
    drawRecommended();
    drawSettings();
    drawFigures();
  }

  function later(action, ms = 150) {
    let timer;
    return () => { clearTimeout(timer); timer = setTimeout(action, ms); };
  }

  const start = data.start;
  fill($("behaviour"), data.behaviours.map((i) => measures[i]).map((m) => ({ value: m.key, text: m.label, group: tagGroup(m) })), start.behaviour);
  $("goal").value = start.goal;
  $("share").value = Number((100 * start.share).toPrecision(6));
  if ($("limit") && start.limit !== null) $("limit").value = start.limit;
  fillPrices(start.price);
  fillAnswers();
  if (vectors.length) {
    choose();
    const best = state.recommended === null ? null : settings[state.recommended];
    fill($("vector"), vectors.map((v) => ({ value: v, text: v })), best && best.kind === "vector" ? best.vector : vectors[0]);
    const fillLayers = () => {
      $("dose-layers").replaceChildren();
      fill($("dose-layers"), [{ value: "", text: "all" }, ...layersOfVector($("vector").value).map((l) => ({ value: l, text: l }))]);
    };
    fillLayers();
    $("vector").addEventListener("change", () => { fillLayers(); drawFigures(); });
    $("dose-layers").addEventListener("change", drawFigures);
  }
  $("behaviour").addEventListener("change", () => { fillPrices(price() && price().key); update(); });
  for (const id of ["goal", "price", "limit", "share"]) if ($(id)) $(id).addEventListener("change", update);
  $("settings-search").addEventListener("input", later(() => drawSettings()));
  $("settings-kind").addEventListener("change", () => drawSettings());
  for (const id of ["vector", "layers", "coefficient", "tag", "verdict"]) $(`answers-${id}`).addEventListener("change", () => filterAnswers());
  $("answers-search").addEventListener("input", later(() => filterAnswers()));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawFigures);
  let width = innerWidth;
  addEventListener("resize", later(() => { if (innerWidth !== width) { width = innerWidth; drawFigures(); } }));
  addEventListener("beforeprint", () => { printing = true; drawFigures(); });
  addEventListener("afterprint", () => { printing = false; drawFigures(); });
  update();
  await startPlotly();
  drawFigures();
  loadAnswers(JSON.parse(await unpack("data-answers")));
  loadProjections(JSON.parse(await unpack("data-projections")));
  if (state.recommended !== null) chooseAnswers(state.recommended);
  filterAnswers();
  document.documentElement.dataset.ready = "true";
})().catch(undrawn);
