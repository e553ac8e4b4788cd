"""What several commands share: JSON, a progress bar, objectives and budgets from text."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import ConfigError

TERMINAL = "-"

Json = Annotated[
    str | None, typer.Option("--json", help="Write everything here as JSON; - for the terminal.")
]
"""The same option for every command that has something to parse."""

Budgets = Annotated[
    list[str] | None, typer.Option(help="domain=0.02,0.015 (positive, negative; nats per token).")
]
Epsilon = Annotated[
    float | None, typer.Option(help="Bound of the token, in the unit of the objective.")
]
Pessimistic = Annotated[
    bool | None,
    typer.Option(
        "--pessimistic/--printed", help="min(G A, r A), or as the paper: fiberpo, fiberpo_domain."
    ),
]


def write_json(target: str | None, values: Any) -> None:
    """What ``--json`` asks for: a file, or with ``-`` standard output and nothing else there.

    Raises:
        ConfigError: for a file that cannot be written.
    """
    if target is None:
        return
    text = json.dumps(values, indent=1) + "\n"
    if target == TERMINAL:
        print(text, end="")
        return
    try:
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        Path(target).write_text(text)
    except OSError as error:
        raise ConfigError(f"--json {target}: {error.strerror}; name a file, or -") from error


@contextmanager
def progress_bar(total: int | None, what: str) -> Iterator[Callable[..., None]]:
    """A bar on standard error, for commands that read recordings; none where nobody looks.

    It takes the tokens done so far, and the new total where that changes.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn(what), BarColumn(), TextColumn("{task.percentage:.0f} %"),
        TextColumn("{task.fields[done]} tokens"), TimeRemainingColumn(),
    )  # fmt: skip
    console = Console(stderr=True)
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(what, total=None if total is None else max(total, 1), done="0")

        def show(tokens: int, of: int | None = total) -> None:
            bar.update(task, completed=tokens, total=of and max(of, 1), done=f"{tokens:,}")

        yield show


def _parse_budget(text: str) -> tuple[str, Any]:
    """``domain=0.02,0.015`` or ``domain:math=0.02,0.015`` -> (stratum, budget)."""
    place, _, pair = text.partition("=")
    try:
        positive, negative = (float(part) for part in pair.split(","))
    except ValueError as error:
        raise ConfigError(
            f"--budget {text!r} is not of the form domain=0.02,0.015 (or domain:math=0.02,0.015 "
            "for one context)"
        ) from error
    stratum, _, context = place.partition(":")
    return stratum, {context: (positive, negative)} if context else (positive, negative)


def budgets_from(texts: list[str]) -> dict[str, Any]:
    """Budgets by stratum from the command line; several contexts of one stratum are joined.

    >>> budgets_from(["domain:math=0.2,0.1", "domain:*=0.1,0.05", "group=0.1,0.1"])
    {'domain': {'math': (0.2, 0.1), '*': (0.1, 0.05)}, 'group': (0.1, 0.1)}
    """
    out: dict[str, Any] = {}
    for text in texts:
        stratum, budget = _parse_budget(text)
        if isinstance(budget, dict) and isinstance(out.get(stratum), dict):
            out[stratum].update(budget)
        elif stratum in out:
            raise ConfigError(f"--budget names the stratum {stratum!r} twice")
        else:
            out[stratum] = budget
    return out


def shares_from(option: str, texts: list[str]) -> dict[str, float]:
    """A number by domain from the command line.

    >>> shares_from("--reward-noise", ["sum=0.3", "sort=0.1"])
    {'sum': 0.3, 'sort': 0.1}
    """
    out: dict[str, float] = {}
    for text in texts:
        domain, _, share = text.rpartition("=")
        try:
            value = float(share)
        except ValueError:
            domain = ""
        if not domain:
            raise ConfigError(f"{option} {text!r} is not of the form sum=0.3")
        if domain in out:
            raise ConfigError(f"{option} names the domain {domain!r} twice")
        out[domain] = value
    return out


def objective_kwargs(
    objective: str | None,
    budget: list[str],
    epsilon: float | None,
    pessimistic: bool | None,
    values: dict[str, Any],
) -> dict[str, Any]:
    """Parameters of a recipe from command-line flags, on top of ``values``.

    Raises:
        ConfigError: for budgets that cannot be read, and flags that the recipe cannot follow.
    """
    out = dict(values)
    if budget:
        budgets = budgets_from(budget)
        if objective == "fiberpo":
            if set(budgets) != {"trajectory"}:
                raise ConfigError(
                    f"fiberpo has one budget, that of the trajectory, not {sorted(budgets)}; use "
                    "--objective fiberpo_domain for other strata"
                )
            out["budget"] = budgets["trajectory"]
        else:
            out["budgets"] = budgets
    if epsilon is not None:
        out["epsilon"] = epsilon
    if pessimistic is not None:
        if objective == "fiberstop":
            flag = "--pessimistic" if pessimistic else "--printed"
            raise ConfigError(
                f"{flag} chooses a form of fiberpo or fiberpo_domain, and fiberstop (the default "
                f"of fiberpo train) has one form only; write --objective fiberpo_domain {flag}"
            )
        out["pessimistic"] = pessimistic
    return out
