// The regime explorer: budgets, epsilon and rollback count by hand, on a trajectory of the run.
"use strict";
(function (root) {
  const { gates, data, draw } = root;
  const at = (id) => document.getElementById("explorer-" + id);
  const REGIME = ["pass", "rollback", "zeroed"];
  const SLIDERS = ["plus", "minus", "epsilon", "rollback"];
  let run, trajectory, stratum, settings;

  const unlimited = (c) => (c === null ? Infinity : c);
  const digits = (x, n = 3) => Number(x.toPrecision(n)).toString().replace("-", "\u2212");

  function option(value, text) {
    const element = document.createElement("option");
    element.value = value;
    element.textContent = text;
    return element;
  }

  function chooseRun(index) {
    run = data.explorer[index];
    const groups = run.groups.map((group) => {
      const element = document.createElement("optgroup");
      element.label = group.label;
      element.append(...group.items.map((i) => option(i, run.trajectories[i].title)));
      return element;
    });
    at("trajectory").replaceChildren(...groups);
    at("stratum").replaceChildren(...run.strata.map((s, i) => option(i, s.name)));
    at("stratum").value = run.strata.length - 1;
    at("source").textContent = run.source;
    chooseTrajectory(run.groups[0].items[0]);
  }

  function chooseTrajectory(index) {
    const found = run.trajectories[index];
    trajectory = { ...found, contexts: found.contexts.map(
      (c) => ({ ...c, c: c.c.map(unlimited) })) };
    at("trajectory").value = index;
    reset();
  }

  function reset() {
    stratum = Number(at("stratum").value);
    settings = {
      budget: run.strata.map(() => null), rollback: run.strata.map((s) => s.rollback),
      epsilon: run.epsilon, pessimistic: run.pessimistic,
    };
    at("pessimistic").checked = settings.pessimistic;
    show();
  }

  // The context of the chosen stratum on the trajectory; the last one, where there are several.
  function here() {
    const all = trajectory.contexts.map((c, i) => i).filter((i) => trajectory.contexts[i].s === stratum);
    return all.length ? all[all.length - 1] : -1;
  }

  function budgetHere() {
    const i = here();
    if (settings.budget[stratum]) return settings.budget[stratum];
    return i < 0 ? run.strata[stratum].budget.map(unlimited) : trajectory.contexts[i].c;
  }

  function countHere() {
    const i = here();
    if (settings.rollback[stratum] !== null) return settings.rollback[stratum];
    return i < 0 ? trajectory.l.length : trajectory.contexts[i].k;
  }

  const value = {
    plus: () => budgetHere()[0], minus: () => budgetHere()[1],
    epsilon: () => settings.epsilon, rollback: countHere,
  };

  function set(name, x) {
    if (!(x > 0)) return;
    if (name === "epsilon") settings.epsilon = x;
    else if (name === "rollback") settings.rollback[stratum] = x;
    else {
      const pair = [...budgetHere()];
      pair[name === "plus" ? 0 : 1] = x;
      settings.budget[stratum] = pair;
    }
    show();
  }

  // Positions of the controls; a slider is logarithmic, its number is what counts.
  function showControls() {
    for (const name of SLIDERS) {
      const x = value[name](), slider = at(name), field = at(name + "-number");
      const position = Math.log10(Math.min(x, 10 ** slider.max));
      if (document.activeElement !== slider) slider.value = position;
      const text = Number.isFinite(x) ? String(Number(x.toPrecision(4))) : "";
      if (document.activeElement !== field) field.value = text;
      const unit = name === "rollback" ? "" : " nats per token";
      slider.setAttribute("aria-valuetext", text ? text + unit : "no limit");
    }
    at("tokens").checked = settings.rollback[stratum] === null;
  }

  function curve(channel, name, dash, budget, k, reach) {
    const c = Math.min(budget[channel], reach), end = Math.min((1 + 1 / k) * c, reach);
    const xs = [-reach, -end, -c, 0, c, end, reach];
    return { type: "scatter", mode: "lines", name, x: xs,
      y: xs.map((x) => gates.gate(x, budget[channel], k).value),
      line: { color: `var(--${channel ? "vermillion" : "blue"})`, width: 2, dash } };
  }

  function drawGate(result) {
    const budget = budgetHere(), k = countHere(), i = here();
    const own = i < 0 ? null : result.contexts[i];
    const sizes = budget.filter(Number.isFinite).map((c) => 2 * c);
    const seen = own ? [Math.abs(own.plus), Math.abs(own.minus)].map((x) => 1.25 * x) : [];
    const reach = Math.max(...sizes, ...seen, 1e-4);
    const traces = [curve(0, "positive channel, C+", "solid", budget, k, reach),
      curve(1, "negative channel, C\u2212", "dash", budget, k, reach)];
    if (own) {
      traces.push({ type: "scatter", mode: "markers", name: "the chosen trajectory",
        x: [own.plus, own.minus], y: [own.up.value, own.down.value],
        marker: { size: 11, symbol: ["circle", "diamond"],
          color: ["var(--blue)", "var(--vermillion)"], line: { width: 1.5, color: "var(--ink)" } } });
    }
    draw(at("gate"), { data: traces, layout: {
      height: 330, xaxis: { title: { text: "residual drift, nats per token" }, range: [-reach, reach] },
      yaxis: { title: { text: "gated drift" } } } });
  }

  function quantile(values, q) {
    const sorted = [...values].sort((a, b) => a - b);
    return sorted[Math.min(sorted.length - 1, Math.floor(q * sorted.length))];
  }

  // Reach of one axis of the map: the budget, the run's points, the chosen trajectory.
  function span(values, own, budget) {
    const limit = Number.isFinite(budget) ? 1.7 * budget : 0;
    const top = Math.max(limit, values.length ? 1.05 * quantile(values, 0.995) : 0, 1.1 * (own || 0), 1e-4);
    const low = Math.min(0, values.length ? 1.05 * quantile(values, 0.005) : 0, 1.1 * (own || 0));
    return [low < -1e-9 ? low : 0, top];
  }

  function drawMap(result) {
    const budget = budgetHere(), k = countHere(), i = here(), cells = 81;
    const own = i < 0 ? null : result.contexts[i];
    const points = run.points[stratum] || [];
    const xs = points.map((p) => p[0]), ys = points.map((p) => p[1]);
    const [x0, x1] = span(xs, own && own.plus, budget[0]);
    const [y0, y1] = span(ys, own && own.minus, budget[1]);
    const grid = (low, high) => Array.from({ length: cells }, (_, j) => low + (high - low) * (j + 0.5) / cells);
    const gx = grid(x0, x1), gy = grid(y0, y1);
    const z = gy.map((y) => gx.map((x) => gates.base(x, y, budget, k)));
    const limit = Math.max(...z.flat().map(Math.abs), 1e-9);
    const traces = [{ type: "heatmap", x: gx, y: gy, z, zmin: -limit, zmax: limit, showlegend: false,
      colorscale: [[0, "var(--vermillion)"], [0.5, "var(--page)"], [1, "var(--blue)"]],
      colorbar: { thickness: 10, outlinewidth: 0, nticks: 5, ...(innerWidth < 600
        ? { orientation: "h", y: -0.2, yanchor: "top", title: { text: "log base", side: "bottom" } }
        : { len: 0.9, title: { text: "log base", side: "right" } }) },
      hovertemplate: "S+ %{x:.4g}, S\u2212 %{y:.4g}<br>log base %{z:.4g}<extra></extra>" }];
    if (points.length) {
      traces.push({ type: "scatter", mode: "markers", x: xs, y: ys, name: run.points_name,
        marker: { size: 4, color: "var(--ink) 0.55" },
        hovertemplate: "%{x:.4g}, %{y:.4g}<extra></extra>" });
    }
    if (own) {
      traces.push({ type: "scatter", mode: "markers", x: [own.plus], y: [own.minus],
        name: "the chosen trajectory", marker: { size: 13, symbol: "star",
          color: "var(--orange)", line: { width: 1, color: "var(--ink)" } } });
    }
    const rule = (vertical, c, color) => ({ type: "line", layer: "above",
      line: { color: `var(--${color})`, width: 1.5, dash: "dash" },
      ...(vertical ? { x0: c, x1: c, y0, y1 } : { x0, x1, y0: c, y1: c }) });
    const name = run.strata[stratum].name, root_ = i >= 0 && trajectory.contexts[i].up < 0;
    const what = root_ || i < 0 ? "" : ", over its parent";
    draw(at("map"), { data: traces, layout: { height: innerWidth < 600 ? 450 : 380,
      xaxis: { title: { text: `log s+ of the ${name}${what}` }, range: [x0, x1] },
      yaxis: { title: { text: `log s\u2212 of the ${name}${what}` }, range: [y0, y1], showgrid: false },
      shapes: [[true, budget[0], "blue"], [false, budget[1], "vermillion"]]
        .filter((r) => Number.isFinite(r[1])).map((r) => rule(...r)) } });
  }

  function drawResponse(result) {
    const xs = result.tokens.map((_, i) => i + 1);
    const stems = { x: [], y: [] };
    result.tokens.forEach((t, i) => { stems.x.push(i + 1, i + 1, null); stems.y.push(0, t.l, null); });
    const text = xs.map((_, i) => shown(i).replace(/&/g, "&amp;").replace(/</g, "&lt;"));
    const open = result.tokens.map((t) => !t.saturated);
    const traces = [
      { type: "scatter", mode: "lines", name: "log ratio", ...stems, hoverinfo: "skip",
        line: { color: "var(--grey)", width: xs.length > 120 ? 1.2 : 4 } },
      { type: "scatter", mode: "markers", name: "log gated ratio", x: xs,
        y: result.tokens.map((t) => t.gated), text,
        marker: { size: xs.length > 120 ? 4 : 8,
          symbol: open.map((o) => (o ? "circle" : "diamond-open")), color: "var(--blue)",
          line: { color: "var(--blue)", width: 1.5 } },
        hovertemplate: "token %{x}: %{text}<br>log gated %{y:.4g}<extra></extra>" },
    ];
    draw(at("response"), { data: traces, layout: { height: 290,
      xaxis: { title: { text: "token of the trajectory" }, range: [0.3, xs.length + 0.7] },
      yaxis: { title: { text: "nats" }, zeroline: true, zerolinecolor: "var(--muted)" } } });
  }

  function shown(i) {
    const text = trajectory.text ? trajectory.text[i] : null;
    return text === null || text === undefined ? "\u00b7" : text.replace(/\n/g, "\u21b5");
  }

  function showTokens(result) {
    const change = result.tokens.map((t) => t.gated - t.l);
    at("tokens-text").replaceChildren(...result.tokens.map((t, i) => {
      const element = document.createElement("span");
      const size = Math.abs(change[i]), kind = size < 5e-7 ? "" : change[i] < 0 ? " lower" : " higher";
      element.className = "token" + kind;
      if (kind) element.style.setProperty("--w", Math.round(12 + 43 * Math.min(1, size / data.scale)) + "%");
      element.textContent = shown(i);
      element.title = `token ${i + 1}: log ratio ${digits(t.l)}, gated ${digits(t.gated)}`;
      return element;
    }));
    return change;
  }

  function tell(result, change) {
    const parts = result.contexts.map((c, i) => {
      const own = trajectory.contexts[i], name = `${run.strata[own.s].name} ${own.name}`;
      return [name, digits(c.plus), REGIME[c.up.regime], digits(c.minus), REGIME[c.down.regime],
        digits(c.own)];
    });
    at("contexts").replaceChildren(...parts.map((row) => {
      const line = document.createElement("tr");
      line.append(...row.map((text, i) => {
        const cell = document.createElement(i ? "td" : "th");
        if (!i) cell.scope = "row";
        cell.textContent = text;
        if (i === 2 || i === 4) cell.className = "regime " + text;
        return cell;
      }));
      return line;
    }));
    const saturated = result.tokens.filter((t) => t.saturated).length, n = result.tokens.length;
    const local = saturated === 0 ? "L-I" : saturated === n ? "L-III" : "L-II";
    const mean = change.reduce((sum, x) => sum + Math.abs(x), 0) / n;
    const taken = result.tokens.filter((t) => t.ratio).length;
    at("status").textContent =
      `${saturated} of ${n} tokens saturated (${local}); mean |log gated \u2212 log ratio| ` +
      `${digits(mean)} nats` + (taken ? `; ${taken} tokens take r A (pessimistic)` : "") + ".";
  }

  function show() {
    showControls();
    const result = gates.respond(trajectory, settings);
    drawGate(result);
    drawMap(result);
    drawResponse(result);
    tell(result, showTokens(result));
    root.shown = { trajectory, settings, result, stratum };
  }

  root.explore = function () {
    if (!at("gate")) return;
    if (at("run")) at("run").addEventListener("change", (e) => chooseRun(Number(e.target.value)));
    at("trajectory").addEventListener("change", (e) => chooseTrajectory(Number(e.target.value)));
    at("stratum").addEventListener("change", (e) => { stratum = Number(e.target.value); show(); });
    at("pessimistic").addEventListener("change", (e) => { settings.pessimistic = e.target.checked; show(); });
    at("tokens").addEventListener("change", (e) => {
      settings.rollback[stratum] = e.target.checked ? null : Number(countHere().toPrecision(4));
      show();
    });
    at("reset").addEventListener("click", reset);
    for (const name of SLIDERS) {
      at(name).addEventListener("input", (e) => set(name, Number((10 ** e.target.value).toPrecision(3))));
      at(name + "-number").addEventListener("input", (e) => set(name, Number(e.target.value)));
      for (const id of [name, name + "-number"]) at(id).addEventListener("blur", showControls);
    }
    for (const button of document.querySelectorAll("[data-explore]")) {
      button.hidden = false;
      button.addEventListener("click", () => {
        const [index, item] = button.dataset.explore.split(",").map(Number);
        if (at("run")) at("run").value = index;
        chooseRun(index);
        chooseTrajectory(item);
        document.getElementById("explorer-title").scrollIntoView();
        at("trajectory").focus({ preventScroll: true });
      });
    }
    chooseRun(0);
  };
})(window.fiberpo);
