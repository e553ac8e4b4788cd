// Draws the page's charts with plotly, in the colours of the page, and again when those change.
"use strict";
(function (root) {
  const data = JSON.parse(document.getElementById("fiberpo-data").textContent);
  const coarse = matchMedia("(pointer: coarse)").matches;
  const drawn = new Map();

  function color(name) {
    return getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
  }

  function rgba(hex, opacity) {
    const n = parseInt(hex.slice(1), 16);
    return `rgba(${n >> 16}, ${(n >> 8) & 255}, ${n & 255}, ${opacity})`;
  }

  // "var(--blue)" and "var(--blue) 0.3", wherever they stand, in the colours of the page.
  function painted(value) {
    if (typeof value === "string") {
      const found = /^var\(--(\w+)\)(?: ([\d.]+))?$/.exec(value);
      if (!found) return value;
      return found[2] ? rgba(color(found[1]), found[2]) : color(found[1]);
    }
    if (Array.isArray(value)) {
      return typeof value[0] === "number" && typeof value[1] !== "string" ? value : value.map(painted);
    }
    if (value !== null && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, painted(v)]));
    }
    return value;
  }

  function axis(own) {
    return Object.assign(
      { gridcolor: color("grid"), linecolor: color("muted"), tickcolor: color("muted"),
        zeroline: false, automargin: true, nticks: 6, exponentformat: "power" },
      own || {},
      { title: { font: { size: 12, color: color("muted") }, standoff: 6, ...(own && own.title) } },
    );
  }

  function layout(own) {
    return {
      autosize: true, height: 270, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      margin: { l: 10, r: 10, t: 10, b: 10 }, hovermode: "closest",
      dragmode: coarse ? false : "zoom",
      font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: color("ink") },
      hoverlabel: { bgcolor: color("panel"), bordercolor: color("line"),
        font: { color: color("ink") } },
      legend: { orientation: "h", x: 0, xanchor: "left", y: 1.02, yanchor: "bottom" },
      ...own,
      xaxis: axis({ showgrid: false, showline: true, ...own.xaxis }),
      yaxis: axis(own.yaxis),
    };
  }

  const config = { displaylogo: false, responsive: true, displayModeBar: coarse ? false : "hover",
    modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"] };

  // A page may show figures in another way than they are stored: root.view(figure).
  function draw(element, figure) {
    drawn.set(element, figure);
    const own = painted(root.view ? root.view(figure) : figure);
    return Plotly.react(element, own.data, layout(own.layout), config);
  }

  function redraw() {
    for (const [element, figure] of drawn) draw(element, figure);
  }

  // plotly's own file, compressed
  async function load() {
    const packed = atob(document.getElementById("plotly").textContent);
    const bytes = Uint8Array.from(packed, (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = document.createElement("script");
    script.textContent = await new Response(stream).text();
    document.head.append(script);
  }

  async function start() {
    const failed = document.getElementById("no-drawing");
    try {
      await load();
    } catch (error) {
      failed.hidden = false;
      failed.append(" (" + error.message + ")");
      return;
    }
    for (const element of document.querySelectorAll("[data-panel]")) {
      const show = () => draw(element, data.panels[element.dataset.panel]);
      const fold = element.closest("details"); // closed, it has no width
      if (fold) fold.addEventListener("toggle", () => { if (fold.open) show(); });
      if (!fold || fold.open) show();
    }
    if (root.explore) root.explore();
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
    const print = (on) => () => {
      document.documentElement.toggleAttribute("data-print", on);
      redraw();
    };
    addEventListener("beforeprint", print(true));
    addEventListener("afterprint", print(false));
    document.documentElement.dataset.drawn = "yes";
  }

  root.data = data;
  root.draw = draw;
  root.redraw = redraw;
  addEventListener("DOMContentLoaded", start);
})(window.fiberpo);
