"""The report of a run directory: one self-contained HTML page, and the overview image.

`write_report` works on finished runs and on what a killed run left behind; what is missing is said
on the page. Needs the extra ``report`` (matplotlib, jinja2), imported on use.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from fiberpo.errors import FiberPOError
from fiberpo.report.reader import Run, number, read_run
from fiberpo.report.series import RunSeries
from fiberpo.report.tables import (
    QUANTILES,
    Heldout,
    format_difference,
    format_drift,
    format_percent,
    format_reward,
    format_seconds,
    heldout_table,
    sample_cards,
    strata_from_metrics,
    stratum_rows,
)


def render_html(run: Run, series: RunSeries) -> str:
    """The page for a run that was read, with its figures drawn."""
    try:
        import matplotlib  # noqa: F401
        from jinja2 import Environment, StrictUndefined
    except ImportError as exc:
        raise FiberPOError(
            f"reports need {exc.name} ({exc}); install it with: pip install 'fiberpo[report]'"
        ) from exc
    from fiberpo.report.figures import draw_charts
    from fiberpo.report.style import CSS_COLORS

    summary = run.summary or {}
    strata = summary.get("strata")
    rows = stratum_rows(strata or strata_from_metrics(run, series.stratum_names))
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
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(
        reward=format_reward,
        difference=format_difference,
        drift=format_drift,
        percent=format_percent,
    )
    source = files("fiberpo.report").joinpath("template.html.j2").read_text(encoding="utf-8")
    return environment.from_string(source).render(
        name=run.name,
        objective=summary.get("objective"),
        facts=[(label, str(value)) for label, value in facts.items() if value is not None],
        interrupted=summary.get("interrupted"),
        last_step=last_step,
        notes=[*([own] if isinstance(own, str) else own), *run.notes],
        warn=run.notes or summary.get("interrupted"),
        heldout=heldout_table(run),
        charts=draw_charts(series),
        strata=rows,
        strata_known=bool(strata),
        contexts=any(row.context != "all" for row in rows),
        quantiles=QUANTILES,
        samples=sample_cards(summary.get("samples")),
        config=run.config,
        versions=summary.get("versions") or {},
        colors=CSS_COLORS,
    )


def write_report(run_dir: Path) -> Path:
    """Write ``report.html`` and ``report.png`` into a run directory; returns the HTML file.

    The page is one file: style and figures are inline, nothing is loaded from elsewhere.

    Raises:
        FiberPOError: If matplotlib or jinja2 is not installed.
        DataError: If a file of the run directory cannot be used.
    """
    run_dir = Path(run_dir)
    run = read_run(run_dir)
    summary = run.summary or {}
    series = RunSeries(run.train, run.evals, summary.get("strata") or ())
    page = render_html(run, series)
    from fiberpo.report.overview import overview_png

    title = _overview_title(run.name, heldout_table(run))
    image = overview_png(series, title, summary.get("objective") or "")
    _write(run_dir / "report.png", image)
    _write(run_dir / "report.html", page.encode("utf-8", errors="replace"))
    return run_dir / "report.html"


def _overview_title(name: str, heldout: Heldout) -> str:
    mean = heldout.mean
    if mean.before is None or mean.after is None:
        return name
    when = "" if heldout.after_label == "after" else f" ({heldout.after_label})"
    outcome = f"held-out reward {format_reward(mean.before)} → {format_reward(mean.after)}{when}"
    return f"{name}: {outcome}"


def _write(path: Path, data: bytes) -> None:
    """Write a file as a whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(data)
    partial.replace(path)
