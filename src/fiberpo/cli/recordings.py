"""`fiberpo replay`, `fiberpo suggest` and `fiberpo doctor`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError, RecordingError
from .app import app
from .completion import complete_run
from .options import (
    TERMINAL,
    Budgets,
    Epsilon,
    Json,
    Pessimistic,
    objective_kwargs,
    progress_bar,
    write_json,
)

if TYPE_CHECKING:
    from ..objective import Objective

RECORDED = "recorded"
"""The name of the objective that a recording was made with."""

CHANGED = "changed"
"""The name of that objective with parameters from the command line."""

Run = Annotated[
    Path,
    typer.Argument(
        help="A recording, or the directory of a run with one.", autocompletion=complete_run
    ),
]
Column = Annotated[
    list[str] | None,
    typer.Option(help="Of a foreign file: log_probs=lp, ours and theirs; repeatable."),
]


@app.command(
    epilog="Example: fiberpo replay runs/default --objective fiberpo_domain "
    "--budget domain=0.02,0.015 --budget trajectory=0.12,0.05 --compare grpo,'gspo(epsilon=0.02)'"
)
def replay(
    run: Run,
    objective: Annotated[
        str | None,
        typer.Option(help="As grpo, or 'gspo(epsilon=0.02)'; by default recorded."),
    ] = None,
    budget: Budgets = None,
    epsilon: Epsilon = None,
    pessimistic: Pessimistic = None,
    compare: Annotated[
        list[str] | None,
        typer.Option(help="Objectives beside it, as grpo,'gspo(epsilon=0.02)',recorded."),
    ] = None,
    column: Column = None,
    json_: Json = None,
) -> None:
    """What objectives would have done on recorded steps: regimes, gradient, cosines, most changed.

    Counterfactual for one step only: later steps would hold other tokens under another objective.
    """
    from ..diagnosis.replaying import replay as work
    from ..diagnosis.tables import print_replay
    from ..recording import open_recording

    recording = open_recording(run, columns=_columns(column))
    chosen = _objectives(recording, objective, compare or [], budget or [], epsilon, pessimistic)
    with progress_bar(recording.tokens, "replaying") as progress:
        result = work(recording, chosen, progress=progress)
    if json_ != TERMINAL:
        print_replay(result)
    write_json(json_, result.as_dict())


@app.command(epilog="Example: fiberpo suggest runs/default --activity 0.1 --per-domain")
def suggest(
    run: Run,
    activity: Annotated[
        float, typer.Option(help="Share of the contexts of each stratum that is to be gated.")
    ] = 0.1,
    token_activity: Annotated[
        float | None, typer.Option(help="Share of the tokens beyond epsilon; as --activity.")
    ] = None,
    strata: Annotated[
        str | None, typer.Option(help="Which get a budget, as domain,group,trajectory.")
    ] = None,
    per_domain: Annotated[bool, typer.Option(help="One budget for each domain.")] = False,
    stops: Annotated[
        bool | None,
        typer.Option(
            help="For fiberstop, or for gates; by default for gates where the run had some."
        ),
    ] = None,
    column: Column = None,
    json_: Json = None,
) -> None:
    """Budgets per stratum from the drifts that a run showed, with the numbers behind them."""
    from ..diagnosis.suggesting import suggest as work
    from ..diagnosis.tables import print_suggestion
    from ..recording import open_recording

    recording = open_recording(run, columns=_columns(column))
    names = None if strata is None else [name.strip() for name in strata.split(",")]
    with progress_bar(recording.tokens, "measuring drifts") as progress:
        result = work(
            recording, activity=activity, token_activity=token_activity, strata=names,
            per_domain=per_domain, stops=stops, progress=progress,
        )  # fmt: skip
    if json_ != TERMINAL:
        print_suggestion(result)
    write_json(json_, result.as_dict())


@app.command(epilog="Example: fiberpo doctor runs/default --strict")
def doctor(
    path: Annotated[
        Path, typer.Argument(help="A run, a recording, or a YAML or JSON file of settings.")
    ],
    strict: Annotated[bool, typer.Option(help="Exit code 1 for warnings too.")] = False,
    column: Column = None,
    json_: Json = None,
) -> None:
    """What is wrong with a run or with settings: seen, what it means, what to change.

    Settings are those of fiberpo train, TRL or verl. Exit code 0: no error; 1: at least one.
    """
    from ..diagnosis.examining import examine, read_settings
    from ..diagnosis.findings import exit_code
    from ..diagnosis.settings import examine_config
    from ..diagnosis.tables import print_findings

    if path.is_file() and path.suffix in (".yaml", ".yml", ".json"):
        if column:
            raise ConfigError(
                f"--column {column[0]!r} names a column of recorded steps, and {path} is read as "
                "settings; leave it out, or name a recording (parquet, JSONL, or a directory)"
            )
        settings = read_settings(path)
        values, objective = _training(path, settings)
        found = examine_config(values, objective=objective)
    else:
        config = path / "config.yaml"
        objective = _training(config, read_settings(config))[1] if config.is_file() else None
        source: Any = path
        if column:
            from ..recording import open_recording

            source = open_recording(path, columns=_columns(column))
        found = examine(source, objective=objective)
    code = exit_code(found, strict=strict)
    if json_ != TERMINAL:
        print_findings(found)
    counts = {s: sum(f.severity == s for f in found) for s in ("error", "warning", "note")}
    write_json(
        json_, {"findings": [f.as_dict() for f in found], "counts": counts, "exit_code": code}
    )
    if code:
        raise typer.Exit(code)


def _training(
    path: Path, settings: Mapping[str, Any]
) -> tuple[Mapping[str, Any], Objective | None]:
    """Settings of ``fiberpo train`` with its defaults, and their objective; others as they are."""
    import dataclasses

    from ..train.config import TrainConfig, make_config

    known = {field.name for field in dataclasses.fields(TrainConfig)}
    if set(settings) - known:
        return settings, None
    config = make_config(path)
    needs_length = config.objective == "dr_grpo" and config.max_completion_length is None
    return dataclasses.asdict(config), None if needs_length else config.build_objective()


def _objectives(
    recording: Any,
    objective: str | None,
    compare: list[str],
    budget: list[str],
    epsilon: float | None,
    pessimistic: bool | None,
) -> dict[str, Objective]:
    """Name -> objective, the main one first."""
    from ..recipes import from_name, parse_call

    main = RECORDED if objective is None else objective
    texts = [main, *(text for many in compare for text in _split(many))]
    found: dict[str, Objective] = {}
    for i, text in enumerate(texts):
        flags = ([], None, None) if i else (budget, epsilon, pessimistic)
        key = text
        if text == RECORDED:
            known = _recorded(recording)
            changes = objective_kwargs(known.name, *flags, {})
            made = _change(recording, known, changes) if changes else known
            key = CHANGED if changes else RECORDED
        else:
            name, parameters = parse_call(text)
            changes = objective_kwargs(name, *flags, {})
            twice = sorted(set(parameters) & set(changes))
            if twice:
                raise ConfigError(
                    f"{twice[0]} is given twice, in --objective {text!r} and by an option of its "
                    "own; leave one of them out"
                )
            made = from_name(name, **parameters, **changes)
        if key in found:
            raise ConfigError(f"the objective {key!r} is named twice")
        found[key] = made
    return found


def _recorded(recording: Any) -> Objective:
    known: Objective | None = recording.objective()
    if known is None:
        raise ConfigError(
            f"{recording.path} does not say which objective it was made with; name one with "
            "--objective"
        )
    return known


def _change(recording: Any, known: Objective, changes: dict[str, Any]) -> Objective:
    """The recorded objective with other parameters; a budget replaces that of its stratum."""
    from dataclasses import replace

    from ..recording.manifest import encode

    if "budgets" in changes and "budgets" in known.parameters:
        changes = {**changes, "budgets": {**known.parameters["budgets"], **changes["budgets"]}}
    manifest = recording.manifest
    try:
        made: Objective = replace(
            manifest, parameters={**manifest.parameters, **encode(changes)}
        ).build_objective()
    except RecordingError as error:
        raise ConfigError(
            f"the recorded objective is {known.name}, and does not take these options: "
            f"{error.__cause__}. Name an objective that does with --objective"
        ) from error
    return made


def _columns(texts: list[str] | None) -> dict[str, str] | None:
    """``log_probs=lp`` -> our name and theirs.

    >>> _columns(["log_probs=lp", "domain=source"])
    {'log_probs': 'lp', 'domain': 'source'}
    """
    found: dict[str, str] = {}
    for text in texts or []:
        ours, _, theirs = text.partition("=")
        if not ours or not theirs:
            raise ConfigError(f"--column {text!r} is not of the form log_probs=lp (ours=theirs)")
        found[ours] = theirs
    return found or None


def _split(text: str) -> list[str]:
    """Parts between commas that stand outside of brackets.

    >>> _split("grpo, gspo(epsilon=0.1, epsilon_high=0.2)")
    ['grpo', 'gspo(epsilon=0.1, epsilon_high=0.2)']
    """
    parts, depth = [""], 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and not depth:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


__all__ = ["doctor", "replay", "suggest"]
