// Choices of the page: which arms are shown, over tokens or updates, with or without bands.
"use strict";
window.fiberpo = {};
(function (root) {
  const hidden = new Set();
  const titles = { tokens: "completion tokens sampled", updates: "optimizer steps" };
  let axis = "tokens", bands = true;

  // Figures with places in updates are curves of arms; others stay as they are.
  root.view = function (figure) {
    if (!figure.updates) return figure;
    const data = figure.data.map((trace, i) => ({
      ...trace,
      x: axis === "updates" ? figure.updates[i] : trace.x,
      visible: !hidden.has(trace.meta.arm) && (bands || !trace.meta.band),
    }));
    const xaxis = { ...figure.layout.xaxis, title: { text: titles[axis] } };
    return { data, layout: { ...figure.layout, xaxis } };
  };

  addEventListener("DOMContentLoaded", () => {
    for (const input of document.querySelectorAll("[data-arm]")) {
      input.addEventListener("change", () => {
        if (input.checked) hidden.delete(input.dataset.arm);
        else hidden.add(input.dataset.arm);
        root.redraw();
      });
    }
    const all = document.getElementById("all-arms");
    all.addEventListener("click", () => {
      const show = hidden.size > 0;
      for (const input of document.querySelectorAll("[data-arm]")) {
        input.checked = show;
        if (show) hidden.delete(input.dataset.arm);
        else hidden.add(input.dataset.arm);
      }
      root.redraw();
    });
    for (const input of document.querySelectorAll("[name=axis]")) {
      input.addEventListener("change", () => { axis = input.value; root.redraw(); });
    }
    document.getElementById("bands").addEventListener("change", (event) => {
      bands = event.target.checked;
      root.redraw();
    });
  });
})(window.fiberpo);
