"""What the figures of the laboratory share: style, colours of drifts and regimes, files.

Everything goes through matplotlib's object-oriented interface; nothing touches its global state.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image

from .. import palette
from ..errors import ConfigError
from ..gates import Regime
from .responses import GLOBAL_REGIMES, Array, BaseMap, Regimes

COLUMN, PAGE = 3.4, 7.0
"""Widths of one column and of both columns of a paper, inches."""

FORMATS = ("png", "svg", "pdf")
RESOLUTION = 300
"""Dots per inch of PNG files."""

REGIME_COLORS = {
    Regime.PASS: palette.PASS,
    Regime.ROLLBACK: palette.ROLLBACK,
    Regime.ZERO: palette.ZEROED,
}

DRIFT_MAP = LinearSegmentedColormap.from_list(
    "drift",
    ["#7a3300", palette.VERMILLION, "#f6c9a6", "#f7f7f7", "#a9cde4", palette.BLUE, "#003f66"],
)
"""Vermillion for the negative channel, blue for the positive one, as in the report."""

_RC: Any = {
    **palette.RC,
    "text.parse_math": True,
    "mathtext.fontset": "dejavusans",
    "font.size": 7.5,
    "axes.labelcolor": palette.INK,
    "axes.labelsize": 7.5,
    "axes.titlesize": 8,
    "axes.titlepad": 5,
    "axes.grid": False,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "ytick.major.size": 3,
    "ytick.major.width": 0.7,
    "legend.fontsize": 7,
    "legend.handlelength": 1.6,
    "lines.linewidth": 1.4,
    "svg.fonttype": "path",
    "pdf.fonttype": 42,
}


@contextmanager
def paper_style() -> Iterator[None]:
    """The settings of these figures, for the time of a ``with`` block."""
    with matplotlib.rc_context(_RC), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*[Gg]lyph.*")
        yield


def check_formats(formats: Sequence[str]) -> None:
    """Refuse formats that `save` does not write.

    Raises:
        ConfigError: for an unknown format, or for none.
    """
    unknown = [f for f in formats if f not in FORMATS]
    if unknown or not formats:
        raise ConfigError(
            f"format {unknown[0]!r} is not drawn here; there are {', '.join(FORMATS)}"
            if unknown
            else f"no format is given; there are {', '.join(FORMATS)}"
        )


def save(figure: Figure, folder: Path, name: str, formats: Sequence[str]) -> list[Path]:
    """Write a figure once per format; the same figure gives the same bytes.

    Raises:
        ConfigError: for an unknown format, or a folder that cannot be made.
    """
    check_formats(formats)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot write figures to {folder}: {error.strerror}") from error
    with paper_style():  # one layout for all formats
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
    undated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
    written = []
    for suffix in formats:
        path = folder / f"{name}.{suffix}"
        with paper_style():
            figure.savefig(
                path, dpi=RESOLUTION, facecolor="white", metadata=undated.get(suffix, {})
            )
        if suffix == "png":
            with Image.open(path) as image:  # a palette of 256 colours: a tenth of the bytes
                small = image.convert("RGB").quantize(256, dither=Image.Dither.NONE)
            small.save(path, optimize=True, dpi=(RESOLUTION, RESOLUTION))
        written.append(path)
    return written


def regime_handles(zeroed: str = "zeroed (token: clipped)") -> list[Patch]:
    """Legend entries of the regimes, with a name for the last."""
    names = {Regime.PASS: "pass", Regime.ROLLBACK: "rollback", Regime.ZERO: zeroed}
    return [
        Patch(facecolor=REGIME_COLORS[r], edgecolor=palette.MUTED, lw=0.4, label=name)
        for r, name in names.items()
    ]


def plain(text: str, limit: int = 24) -> str:
    """``text`` for a label: one line, nothing read as mathematics, cut to ``limit`` characters."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    line = line if len(line) <= limit else line[: limit - 1] + "…"
    return line.replace("$", "\\$")


def regime_strips(ax: Axes, at: Array, rows: Mapping[str, Regimes]) -> None:
    """One horizontal strip a row, coloured by regime along ``at``."""
    step = (at[-1] - at[0]) / (len(at) - 1)
    edges = np.concatenate([at - step / 2, [at[-1] + step / 2]])
    heights = np.arange(len(rows) + 1, dtype=np.float64)
    for i, regimes in enumerate(rows.values()):
        # runs of one regime are one rectangle: small files, no seams
        starts = np.flatnonzero(np.diff(regimes, prepend=-1))
        for start, end in zip(starts, [*starts[1:], len(regimes)], strict=True):
            ax.fill_between(
                edges[[start, end]], heights[i] + 0.1, heights[i + 1] - 0.1,
                color=REGIME_COLORS[Regime(int(regimes[start]))], linewidth=0,
            )  # fmt: skip
    ax.set_ylim(len(rows), 0)
    ax.set_yticks(heights[:-1] + 0.5, list(rows))
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)


def color_bar(figure: Figure, colors: ScalarMappable, axes: Any, label: str, **look: Any) -> None:
    """A colour bar without a frame, drawn as vectors."""
    bar = figure.colorbar(colors, ax=axes, label=label, **look)
    bar.outline.set_visible(False)
    assert bar.solids is not None
    bar.solids.set(rasterized=False, edgecolor="face")


def zero_lines(ax: Axes, *, vertical: bool = True) -> None:
    """Thin lines through the origin, behind the curves."""
    ax.axhline(0, color=palette.GRID, linewidth=0.7, zorder=0)
    if vertical:
        ax.axvline(0, color=palette.GRID, linewidth=0.7, zorder=0)


def panel_name(ax: Axes, letter: str, title: str) -> None:
    """A title with the letter of the panel in front."""
    ax.set_title(f"({letter})  {title}" if letter else title)


def draw_base_map(ax: Axes, plane: BaseMap, *, names: bool = False) -> ScalarMappable:
    """Draw a `BaseMap`: colour is ``log base``, lines are borders of regimes.

    Args:
        ax: axes.
        plane: what to draw.
        names: write the names of the global regimes into their fields.

    Returns:
        What a colour bar needs.
    """
    limit = 0.2
    norm = TwoSlopeNorm(0.0, -limit, limit)
    levels = np.linspace(-limit - 0.005, limit + 0.005, 42)  # 0 is the middle of a step
    # colours on every fourth point: the base is piecewise linear, and files stay small
    x, y, shown = plane.positive[::4], plane.negative[::4], plane.log_base[::4, ::4]
    ax.contourf(x, y, np.clip(shown, -limit, limit), levels, cmap=DRIFT_MAP, norm=norm)
    for regimes in plane.regimes:
        if np.ptp(regimes):
            ax.contour(
                plane.positive, plane.negative, regimes, [0.5, 1.5], colors=palette.INK,
                linewidths=0.6,
            )  # fmt: skip
    if names:
        for index, name in enumerate(GLOBAL_REGIMES):
            _name_fields(ax, plane, index, name)
    if not plane.gated:
        ax.text(
            0.5, 0.5, "no gate above\nthe token", ha="center", va="center", fontsize=6.5,
            color=palette.MUTED, transform=ax.transAxes,
        )  # fmt: skip
    ax.set_xlabel("$S^+$ (nats per token)")
    ax.set_ylabel("$S^-$ (nats per token)")
    return ScalarMappable(norm, DRIFT_MAP)


def _name_fields(ax: Axes, plane: BaseMap, index: int, name: str) -> None:
    """Write a regime's name into the middle of each rectangle in which both channels hold still."""
    cells = plane.regimes[0] * 3 + plane.regimes[1]
    for cell in np.unique(cells[plane.global_regime == index]):
        rows, columns = np.nonzero(cells == cell)
        ax.text(
            plane.positive[columns].mean(), plane.negative[rows].mean(), name, ha="center",
            va="center", fontsize=6.5, color=palette.INK,
            bbox={"boxstyle": "round,pad=0.2", "facecolor": "white", "alpha": 0.7, "linewidth": 0},
        )  # fmt: skip
