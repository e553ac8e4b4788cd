"""`fiberpo report`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .app import app
from .completion import complete_run
from .options import TERMINAL, Json, progress_bar, write_json

if TYPE_CHECKING:
    from ..report.sources import Source


@app.command(epilog="Example: fiberpo report runs/default runs/grpo --out comparison.html")
def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN",
            autocompletion=complete_run,
            show_default=False,
            help="Directories of runs, or recordings; several are compared.",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help="The page; by default report.html in the directory of a single run, else here."
        ),
    ] = None,
    json_: Json = None,
) -> None:
    """Write one HTML page about a run, or about several side by side.

    The page opens from the file, without a network: curves, budgets against drifts, the most gated
    trajectories of a recording, findings, and sliders that redraw the gates.
    """
    from ..report.page import write_sources
    from ..report.sources import read_sources

    with progress_bar(None, "reading recordings") as progress:
        sources = read_sources(runs, progress)
    written = write_sources(sources, out)
    write_json(json_, _described(sources, written))
    if json_ == TERMINAL:
        return
    for source in sources:
        for note in [*source.run.notes, *(source.recorded.notes if source.recorded else ())]:
            typer.echo(f"note: {source.label}: {note}", err=True)
    print(written)


def _described(sources: list[Source], written: Path) -> dict[str, Any]:
    return {
        "report": str(written),
        "bytes": written.stat().st_size,
        "runs": [
            {
                "label": source.label,
                "path": str(source.path),
                "steps_read": len(source.run.train),
                "recording": None
                if source.recorded is None
                else {
                    "steps": source.recorded.steps,
                    "steps_read": source.recorded.steps_read,
                    "trajectories": len(source.recorded.gated) + len(source.recorded.others),
                },
                "findings": [finding.as_dict() for finding in source.findings],
                "notes": [
                    *source.run.notes, *(source.recorded.notes if source.recorded else ())
                ],
            }
            for source in sources
        ],
    }  # fmt: skip
