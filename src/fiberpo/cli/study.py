"""`fiberpo study`."""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError
from .app import app
from .completion import complete_study
from .options import TERMINAL, Json, write_json

if TYPE_CHECKING:
    from ..study.planning import Plan

FAILED, INTERRUPTED = 1, 130


@app.command(epilog="Example: fiberpo study small --minutes 20 --arms grpo,fiberpo_domain")
def study(
    name: Annotated[
        str,
        typer.Argument(help="A shipped study, or a YAML file.", autocompletion=complete_study),
    ],
    output: Annotated[
        Path | None, typer.Option(help="Where its runs are kept; runs/study-NAME by default.")
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(help="Wall time; a balanced part of the grid that fits is run.")
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(help="Cells at a time; as many as cores by default.")
    ] = None,
    arms: Annotated[str | None, typer.Option(help="Run only these, as grpo,gspo.")] = None,
    settings: Annotated[str | None, typer.Option(help="Run only these, by comma.")] = None,
    seeds: Annotated[str | None, typer.Option(help="Run only these, as 0,1.")] = None,
    report_only: Annotated[
        bool, typer.Option("--report-only", help="Table and report of what is there; run nothing.")
    ] = False,
    list_: Annotated[
        bool, typer.Option("--list", help="Print the cells and what they take; run nothing.")
    ] = False,
    keep_checkpoints: Annotated[
        bool, typer.Option("--keep-checkpoints", help="Keep the weights of every cell.")
    ] = False,
    json_: Json = None,
) -> None:
    """Run a declared grid of settings, arms and seeds; one table and one report.

    Each cell is a run of `fiberpo train` in a directory of its own. The same command again goes
    on: finished cells are kept, failed ones and those whose configuration changed are run anew.
    """
    from ..study.design import find_study, load_study
    from ..study.planning import Options, make_plan
    from ..study.runner import report_study, run_study

    design = load_study(find_study(name))
    output = output or Path("runs") / f"study-{design.name}"
    if report_only and (list_ or arms or settings or seeds or minutes):
        raise ConfigError(
            "--report-only is about all cells that are there; leave out --list, --arms, "
            "--settings, --seeds and --minutes"
        )
    options = Options(
        minutes=minutes, jobs=_cores() if jobs is None else jobs, arms=_names(arms, "--arms"),
        settings=_names(settings, "--settings"), seeds=_numbers(seeds, "--seeds"),
        keep_checkpoints=keep_checkpoints,
    )  # fmt: skip
    say = partial(print, file=sys.stderr) if json_ == TERMINAL else print
    if list_:
        plan = make_plan(design, output, options)
        if json_ != TERMINAL:
            _print_list(plan)
        write_json(json_, _list(plan))
        return
    if report_only:
        result = report_study(design, output, say)
    else:
        result = run_study(design, output, options, say)
    report = None if result.report is None else str(result.report)
    write_json(
        json_,
        {**result.status, "errors": result.failed, "report": report, "output": str(output)},
    )
    say(f"table      {output / 'results.parquet'}")
    if report is not None:
        say(f"report     {report}")
    if result.interrupted:
        raise typer.Exit(INTERRUPTED)
    if result.failed:
        raise typer.Exit(FAILED)


def _cores() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on this system
        return os.cpu_count() or 1


def _names(text: str | None, option: str) -> list[str] | None:
    """Between the commas."""
    if text is None:
        return None
    found = [name.strip() for name in text.split(",")]
    if not all(found):
        raise ConfigError(f"{option} {text!r}: names go between commas, as a,b")
    return found


def _numbers(text: str | None, option: str) -> list[int] | None:
    names = _names(text, option)
    try:
        return None if names is None else [int(name) for name in names]
    except ValueError as error:
        raise ConfigError(f"{option} {text!r}: numbers go between commas, as 0,1") from error


def _list(plan: Plan) -> dict[str, Any]:
    chosen = {cell.name for cell in plan.chosen}
    cells = [
        {
            "name": cell.name, "setting": cell.setting, "arm": cell.arm, "seed": cell.seed,
            "state": plan.states[cell.name].value, "chosen": cell.name in chosen,
            "seconds": plan.costs.seconds(cell), "digest": cell.digest,
        }
        for cell in plan.wanted
    ]  # fmt: skip
    about = {
        kind: {name: part.about for name, part in parts.items()}
        for kind, parts in (("settings", plan.study.settings), ("arms", plan.study.arms))
    }
    return {"name": plan.study.name, "about": about, "cells": cells, "seconds": plan.seconds}


def _print_list(plan: Plan) -> None:
    from ..study.costs import format_seconds

    for line in plan.describe():
        print(line)
    listed = _list(plan)
    for kind, parts in listed["about"].items():
        width = max(len(name) for name in parts)
        print(f"\n{kind}")
        for name, about in parts.items():
            print(f"  {name:{width}}  {about}".rstrip())
    width = max(len(cell["name"]) for cell in listed["cells"])
    print("\ncells, in their order")
    for cell in listed["cells"]:
        state = cell["state"] if cell["chosen"] or cell["state"] == "finished" else "left out"
        print(f"  {cell['name']:{width}}  {format_seconds(cell['seconds']):>7}  {state}")
