"""Replay, suggestion and findings for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from .findings import Finding
from .replaying import CAVEAT, Outcome, Replay, gradient_shares, left_out, regime_rows
from .suggesting import LEVELS, DriftRow, Suggestion

DASH = "\N{EN DASH}"
COLORS = {"error": "bold red", "warning": "yellow", "note": "cyan"}
SHOWN = 5
"""Trajectories and tokens that are printed; the rest is in the JSON."""

WIDE = 60
"""Characters of a text that are printed."""


def _table(title: str, *columns: str, left: int = 1) -> Table:
    table = Table(
        title=Text(title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD,
        header_style="dim", padding=(0, 1, 0, 0), pad_edge=False,
    )  # fmt: skip
    for i, column in enumerate(columns):
        justify: Any = "left" if i < left else "right"
        table.add_column(column, justify=justify, overflow="fold", no_wrap=i >= left)
    return table


def _percent(value: float | None) -> str:
    if value is None:
        return DASH
    if 0 < value < 0.0005:
        return "<0.1 %"
    return f"{100 * value:.1f} %"


def _number(value: float | None, digits: int = 3) -> str:
    return DASH if value is None else f"{value:.{digits}g}"


# --- replay ------------------------------------------------------------------------------------


def print_replay(result: Replay, console: Console | None = None) -> None:
    """Print regimes, gradient mass, cosines and what changes most."""
    target = Console() if console is None else console
    for part in _replay_parts(result):
        target.print(part)


def _replay_parts(result: Replay) -> Iterator[RenderableType]:
    yield Text(
        f"{len(result.steps)} steps, {result.trajectories:,} trajectories, {result.tokens:,} tokens"
    )
    yield Text(CAVEAT, style="italic")
    if result.fresh:
        yield Text(
            f"In {len(result.fresh)} of the steps every log ratio is 0 (the first update after a "
            "rollout): no gate acts there."
        )
    for outcome in result.outcomes:
        if share := left_out(outcome.total):
            yield Text(
                f"{outcome.name} drops {_percent(share)} of the tokens (a mask, a stop); the "
                "gradient mass below is that of the others."
            )
    for stratum, steps in result.idle.items():
        yield Text(
            f"{stratum}: every context is the only child of its parent in {steps} of "
            f"{len(result.steps)} steps, so its gate cannot act there.", style="yellow",
        )  # fmt: skip
    for problem in result.problems:
        yield Text(problem, style="yellow")
    yield Text()
    table = _table("Objectives", "", "objective", left=2)
    for outcome in result.outcomes:
        table.add_row(Text(outcome.name, style="bold"), Text(_short(outcome)))
    yield table
    yield _gradient_table(result)
    yield _regime_table(result)
    if len(result.outcomes) > 1:
        yield _cosine_table(result)
    for outcome in result.outcomes:
        yield from _changed_tables(outcome)


def _short(outcome: Outcome) -> str:
    return str(outcome.objective)


def _gradient_table(result: Replay) -> Table:
    words = ("kept", "removed", "reversed", "amplified")
    table = _table("Gradient mass, against the ungated objective", "objective", "domain", *words,
                   left=2)  # fmt: skip
    for outcome in result.outcomes:
        rows = [("all", outcome.total.mass), *sorted(outcome.total.mass_by_domain.items())]
        for i, (domain, mass) in enumerate(rows):
            shares = gradient_shares(mass)
            name = Text(outcome.name if not i else "", style="bold")
            table.add_row(name, Text(domain), *(_percent(shares[w]) for w in words))
    return table


def _regime_table(result: Replay) -> Table:
    table = _table("Regimes (contexts by their worst channel)", "objective", "stratum", "domain",
                   "contexts", "pass", "rollback", "zeroed", left=3)  # fmt: skip
    for outcome in result.outcomes:
        name = outcome.name
        for row in regime_rows(outcome.total):
            stratum = "" if row["domain"] else row["stratum"]
            shares = (_percent(row[w]) for w in ("pass", "rollback", "zeroed"))
            table.add_row(
                Text(name, style="bold"), Text(stratum), Text(row["domain"] or "all"),
                f"{row['contexts']:,}", *shares,
            )  # fmt: skip
            name = ""
    return table


def _cosine_table(result: Replay) -> Table:
    names = [outcome.name for outcome in result.outcomes]
    table = _table("Cosines of the coefficients", "", *names)
    for name, row in zip(names, result.cosine(), strict=True):
        table.add_row(Text(name, style="bold"), *(_number(x, 4) for x in row))
    return table


def _changed_tables(outcome: Outcome) -> Iterator[Table]:
    if outcome.trajectories:
        table = _table(
            f"{outcome.name}: trajectories most changed (share of the step's gradient mass)",
            "step", "row", "labels", "tokens", "A", "drift +", "drift -", "kept", "share", left=3,
        )  # fmt: skip
        for found in outcome.trajectories[:SHOWN]:
            table.add_row(
                str(found["step"]), str(found["row"]), _labels(found), f"{found['tokens']:,}",
                _number(found["advantage"]), _number(found["drift_pos"]),
                _number(found["drift_neg"]), _percent(found["kept"]), _percent(found["share"]),
            )  # fmt: skip
            if found["text"]:
                table.add_row("", "", Text(_clip(found["text"]), style="dim"))
        yield table
    if outcome.tokens:
        table = _table(
            f"{outcome.name}: tokens most changed",
            "step", "row", "token", "position", "log r", "log G", "gradient", "ungated", left=3,
        )  # fmt: skip
        for found in outcome.tokens[:SHOWN]:
            text = found["text"]
            if text is None:
                text = DASH if found["token_id"] is None else f"id {found['token_id']}"
            else:
                text = repr(text)
            table.add_row(
                str(found["step"]), str(found["row"]), Text(text), str(found["position"]),
                _number(found["log_ratio"]), _number(found["log_gated_ratio"]),
                _number(found["coefficient"]), _number(found["ungated"]),
            )  # fmt: skip
        yield table


def _labels(found: dict[str, Any]) -> Text:
    return Text(" ".join(f"{k}={v}" for k, v in found["labels"].items()) or DASH)


def _clip(text: str) -> str:
    shown = text.replace("\n", "\\n")
    return shown if len(shown) <= WIDE else f"{shown[: WIDE - 1]}\N{HORIZONTAL ELLIPSIS}"


# --- suggestion --------------------------------------------------------------------------------


def print_suggestion(result: Suggestion, console: Console | None = None) -> None:
    """Print drifts and budgets, what limits them, and how to use them."""
    target = Console() if console is None else console
    target.print(_drift_table(result.rows, "Drift" if result.stops else "Residual drift"))
    for note in result.notes:
        target.print(Text(f"note: {note}", style="yellow"))
    verb = "Puts" if result.stops else "Gates"
    end = "out of their budgets in these steps" if result.stops else "of these steps"
    target.print(Text(f"\n{verb} {result.activity:.3g} of the contexts of each stratum and "
                      f"{result.token_activity:.3g} of the tokens {end}.\n"))  # fmt: skip
    for title, text in (
        ("config.yaml of fiberpo train", result.yaml()),
        ("the same as options", f"fiberpo train {result.flags()}\n"),
        ("in Python (TRL: objective_kwargs)", f"{result.python()}\n"),
    ):
        target.print(Text(f"# {title}", style="dim"))
        target.print(Text(text), soft_wrap=True)


def _drift_table(rows: Sequence[DriftRow], what: str) -> Table:
    table = _table(
        f"{what}, nats per token, and the budget that follows", "stratum", "domain",
        "contexts", "", *LEVELS, "budget", "gated", left=2,
    )  # fmt: skip
    for row in rows:
        place = Text("" if row.domain else row.stratum), Text(row.domain or "all")
        first = (*place, f"{row.contexts:,}"), ("", "", "")
        gated = (_percent(row.activity), "")
        for i, (sign, drift) in enumerate((("+", row.positive), ("-", row.negative))):
            budget = None if row.budget is None else row.budget[i]
            style = "bold" if row.domain is None else ""
            table.add_row(
                *first[i], sign, *(_number(drift[q]) for q in LEVELS),
                Text(_number(budget, 6), style=style), gated[i],
            )  # fmt: skip
    return table


# --- findings ----------------------------------------------------------------------------------


def print_findings(findings: Sequence[Finding], console: Console | None = None) -> None:
    """Print each finding: what was seen, what it means, what to change."""
    target = Console() if console is None else console
    if not findings:
        target.print("Nothing found.")
    for finding in findings:
        head = Text(f"{finding.severity}: {finding.code}", style=COLORS[finding.severity])
        target.print(head)
        for label, text in (
            ("seen", finding.seen), ("means", finding.means), ("change", finding.change),
        ):  # fmt: skip
            grid = Table.grid(padding=(0, 1, 0, 0))
            grid.add_column(width=8, justify="right", style="dim")
            grid.add_column(overflow="fold")
            grid.add_row(label, Text(text))
            target.print(grid)
        target.print()
