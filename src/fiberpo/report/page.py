"""The report: one self-contained HTML page of one run or several, and the overview image.

`write_report` works on finished runs, on what a killed run left behind, and on recordings alone;
what is missing is said on the page. Needs the extra ``report`` (matplotlib, jinja2, plotly),
imported on use.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..palette import CSS_COLORS
from .comparison import COLUMNS, differences, outcomes
from .explorer import as_script, explorer_data, gated_rows, scale_of
from .html import asset, environment, packed_plotly, write_whole
from .panels import draw_panels
from .reader import is_run, number
from .sources import Source, read_sources
from .tables import (
    QUANTILES,
    Heldout,
    format_reward,
    format_seconds,
    heldout_table,
    sample_cards,
    strata_from_metrics,
    stratum_rows,
)

REPORT = "report.html"
_MARK = b"fiberpo"


def render_html(sources: Sequence[Source]) -> str:
    """The page of runs that were read."""
    templates = environment("matplotlib")
    panels = draw_panels(sources)
    scale = scale_of(sources)
    explorers = [explorer_data(source) for source in sources]
    data = {
        "panels": [panel.figure for panel in chain.from_iterable(panels.values())],
        "explorer": explorers,
        "scale": scale,
    }
    several = len(sources) > 1
    return templates.get_template("page.html.j2").render(
        name=f"{len(sources)} runs" if several else sources[0].label,
        several=several,
        runs=[_view(source, index, scale) for index, source in enumerate(sources)],
        panels=_numbered(panels),
        columns=COLUMNS,
        outcomes=outcomes(sources),
        differences=differences(sources) if several else [],
        explorers=explorers,
        quantiles=QUANTILES,
        colors=CSS_COLORS,
        data=as_script(data),
        scripts=[asset(name) for name in ("gates.js", "charts.js", "explorer.js")],
        plotly=packed_plotly(),
        recorded=any(source.recorded is not None for source in sources),
    )


def _view(source: Source, index: int, scale: float) -> dict[str, Any]:
    """What the template shows of one run."""
    run, summary, recorded = source.run, source.summary, source.recorded
    strata = source.strata or strata_from_metrics(run, source.series.stratum_names)
    rows = stratum_rows(strata)
    last = max((s for r in run.train if (s := number(r.get("step"))) is not None), default=None)
    last_step = None if last is None else f"{last:g}"
    steps, seconds = number(summary.get("steps")), number(summary.get("seconds"))
    facts = {
        "Model": summary.get("model"),
        "Seed": summary.get("seed"),
        "Optimizer steps": last_step if steps is None else f"{steps:g}",
        "Updates per rollout": summary.get("updates_per_rollout"),
        "Duration": None if seconds is None else format_seconds(seconds),
    }
    own = summary.get("notes") or []
    return {
        "label": source.label,
        "objective": summary.get("objective"),
        "facts": [(label, str(value)) for label, value in facts.items() if value is not None],
        "interrupted": summary.get("interrupted"),
        "last_step": last_step,
        "notes": [*([own] if isinstance(own, str) else own), *run.notes],
        "warn": run.notes or summary.get("interrupted"),
        "findings": source.findings,
        "heldout": heldout_table(run),
        "strata": rows,
        "strata_known": bool(source.strata),
        "contexts": any(row.context != "all" for row in rows),
        "recorded": recorded,
        "gated": [] if recorded is None else gated_rows(recorded, index, scale),
        "samples": sample_cards(summary.get("samples")),
        "config": run.config,
        "versions": summary.get("versions") or {},
    }


def _numbered(panels: dict[str, Any]) -> dict[str, list[tuple[int, Any]]]:
    """The panels of every section with their places in the page's data."""
    counter = iter(range(10**6))
    return {key: [(next(counter), panel) for panel in found] for key, found in panels.items()}


def write_report(runs: str | Path | Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Write the report of a run, or of several side by side; returns the HTML file.

    The page is one file: style, scripts and figures are inline, nothing is loaded from elsewhere.

    Args:
        runs: directories of runs, or recordings.
        out: the file; by default ``report.html`` in the directory of a single run (and
            ``report.png`` beside it), else in the working directory.

    Raises:
        FiberPOError: If matplotlib, jinja2 or plotly is not installed.
        DataError: If a run cannot be used, or ``out`` is something else than a report.
    """
    paths = [runs] if isinstance(runs, (str, Path)) else runs
    return write_sources(read_sources([Path(path) for path in paths]), out)


def write_sources(sources: Sequence[Source], out: str | Path | None = None) -> Path:
    """As `write_report`, of runs that were read."""
    alone = sources[0] if out is None and len(sources) == 1 and is_run(sources[0].path) else None
    out = (alone.path if alone else Path()) / REPORT if out is None else Path(out)
    _check_target(out)
    page = render_html(sources)
    if alone is not None:
        from .overview import overview_png

        title = _overview_title(alone.label, heldout_table(alone.run))
        image = overview_png(alone.series, title, alone.summary.get("objective") or "")
        write_whole(out.with_suffix(".png"), image)
    write_whole(out, page.encode("utf-8", errors="replace"))
    return out


def _check_target(out: Path) -> None:
    """Refuse to replace what is no report.

    Raises:
        DataError: for a directory, and for a file that this program did not write.
    """
    if out.is_dir():
        raise DataError(f"{out} is a directory; name a file, as {out / REPORT}")
    if out.suffix not in (".html", ".htm"):
        raise DataError(f"{out} does not end in .html; the report is an HTML page")
    if out.is_file():
        with out.open("rb") as file:
            if _MARK not in file.read(2000):
                raise DataError(f"{out} is not a report of this program; it is not overwritten")
    out.parent.mkdir(parents=True, exist_ok=True)


def _overview_title(name: str, heldout: Heldout) -> str:
    mean = heldout.mean
    if mean.before is None or mean.after is None:
        return name
    when = "" if heldout.after_label == "after" else f" ({heldout.after_label})"
    outcome = f"held-out reward {format_reward(mean.before)} → {format_reward(mean.after)}{when}"
    return f"{name}: {outcome}"
