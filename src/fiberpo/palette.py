"""Colours and matplotlib settings of all figures; imports no plotting library."""

from __future__ import annotations

from typing import Any

# Okabe-Ito, without its yellow (too faint on white) and with a grey in its place.
BLUE, VERMILLION, GREEN = "#0072b2", "#d55e00", "#009e73"
PURPLE, ORANGE, SKY, GREY = "#cc79a7", "#e69f00", "#56b4e9", "#7d8590"
INK, MUTED, GRID = "#1f2731", "#5d6874", "#e1e6eb"
# Ordered by lightness, so that the three regimes stay apart in greyscale as well.
PASS, ROLLBACK, ZEROED = "#dfe7ee", "#e8a200", "#0b4f7d"

CYCLE = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, GREY)
CSS_COLORS: dict[str, tuple[str, str]] = {
    "ink": (INK, "#e4e9ee"),
    "muted": (MUTED, "#9aa6b2"),
    "grid": (GRID, "#2c353f"),
    "blue": (BLUE, "#4aa8e0"),
    "vermillion": (VERMILLION, "#f0824a"),
    "green": (GREEN, "#2fc39b"),
    "purple": ("#b85f92", "#dd94bb"),
    "orange": ("#c98b00", "#efb433"),
    "sky": ("#2f9bd8", "#8ccdf5"),
    "grey": (GREY, "#a3abb5"),
    "pass": (PASS, "#2a3540"),
    "rollback": (ROLLBACK, "#e8a200"),
    "zeroed": (ZEROED, "#86c8f4"),
}
"""Name of a colour in the report's style sheet -> on a light page, on a dark page."""
NAMES = ("blue", "vermillion", "green", "purple", "orange", "sky", "grey")
"""The colours of `CYCLE` by name, as the report's style sheet calls them."""
PLOT_DASHES = ("solid", "dash", "dot")
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)))
BUDGET_DASH = (0, (4, 2.5))

RC: Any = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 8.5,
    "text.color": INK,
    "text.parse_math": False,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.linewidth": 0.7,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.labelsize": 8.5,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.width": 0.7,
    "ytick.major.size": 0,
    "xtick.major.size": 3,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "figure.constrained_layout.use": True,
    "svg.fonttype": "none",
    "svg.hashsalt": "fiberpo",
}
"""Settings for `matplotlib.rc_context`."""
