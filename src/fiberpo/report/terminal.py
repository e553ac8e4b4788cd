"""The outcome of a run for the terminal: the same two tables as in the HTML report."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from typing import Any

from fiberpo.errors import FiberPOError
from fiberpo.report.reader import number
from fiberpo.report.tables import (
    QUANTILES,
    format_difference,
    format_drift,
    format_percent,
    format_reward,
    format_seconds,
    reward_rows,
    stratum_rows,
)

try:
    from rich import box
    from rich.console import Console, RenderableType
    from rich.table import Table
    from rich.text import Text
except ImportError as exc:
    raise FiberPOError(
        f"tables for the terminal need rich ({exc}); install it with: pip install rich"
    ) from exc


def _table(title: str, padding: int = 1) -> Table:
    return Table(
        title=Text(title),
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        header_style="dim",
        padding=(0, padding),
    )


def reward_table(summary: Mapping[str, Any]) -> Table | None:
    """Held-out reward per domain before and after; None where nothing was evaluated."""
    rows, mean = reward_rows(summary.get("heldout_before"), summary.get("heldout_after"))
    if not any(row.known for row in [*rows, mean]):
        return None
    table = _table("Held-out reward")
    table.add_column("domain", overflow="fold")
    for heading in ("before", "after", "difference"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in [*rows, mean]:
        change = row.difference
        color = "" if not change else "green" if change > 0 else "red"
        if row is mean:
            table.add_section()
        table.add_row(
            Text(row.name),
            format_reward(row.before),
            format_reward(row.after),
            Text(format_difference(change), style=color),
            style="bold" if row is mean else None,
        )
    return table


def strata_table(summary: Mapping[str, Any]) -> Table | None:
    """Budget, drift quantiles and regimes per stratum; None where the run has no strata."""
    rows = stratum_rows(summary.get("strata"))
    if not rows:
        return None
    # Without padding, so that the columns fit into the 80 of an ordinary terminal.
    table = _table("Gates by stratum (drift in nats per token, * above budget)", padding=0)
    table.add_column("stratum", overflow="fold", min_width=10)
    table.add_column("", no_wrap=True)
    for heading in ("budget", *QUANTILES, "pass", "rollback", "zeroed"):
        table.add_column(heading, justify="right", overflow="fold")
    marked = {q: any(c.above(q) for row in rows for c in row.channels) for q in QUANTILES}
    for row in rows:
        name = row.stratum if row.context == "all" else f"{row.stratum}: {row.context}"
        shares = [format_percent(v) for v in (row.passed, row.rollback, row.zeroed)]
        for channel in row.channels:
            drifts = []
            for q in QUANTILES:
                above = channel.above(q)
                mark = "*" if above else " " if marked[q] else ""
                text = format_drift(channel.quantiles[q]) + mark
                drifts.append(Text(text, style="yellow" if above else ""))
            budget = format_drift(channel.budget)
            table.add_row(Text(name), channel.sign, budget, *drifts, *shares)
            name, shares = "", ["", "", ""]
    return table


def _renderables(summary: Mapping[str, Any]) -> Iterator[RenderableType]:
    first = Text(str(summary.get("name") or "run"), style="bold")
    if summary.get("objective") is not None:
        first.append(f"  {summary['objective']}", style="not bold")
    yield first
    keys = ("model", "seed", "steps", "updates_per_rollout")
    facts = [f"{k.replace('_', ' ')} {summary[k]}" for k in keys if summary.get(k) is not None]
    seconds = number(summary.get("seconds"))
    if seconds is not None:
        facts.append(format_seconds(seconds))
    if facts:
        yield Text(", ".join(facts), style="dim")
    if summary.get("interrupted"):
        yield Text("The run was interrupted.", style="bold yellow")
    rewards = reward_table(summary)
    if rewards is not None:
        yield Text("")
        yield rewards
    else:
        yield Text("No held-out evaluation is recorded.")
    strata = strata_table(summary)
    if strata is not None:
        yield strata
    notes = summary.get("notes") or []
    for note in [notes] if isinstance(notes, str) else notes:
        yield Text(f"Note: {note}")


def print_summary(summary: Mapping[str, Any], console: Console | None = None) -> None:
    """Print the outcome of a run: headline, held-out table, stratum table and notes.

    Args:
        summary: Content of ``summary.json``; missing entries are left out.
        console: Console to print to; standard output where it is not given.
    """
    target = console if console is not None else Console()
    for part in _renderables(summary):
        target.print(part)


def summary_text(summary: Mapping[str, Any], width: int = 100) -> str:
    """What `print_summary` prints, as plain text without colours."""
    buffer = io.StringIO()
    print_summary(summary, Console(file=buffer, width=width, color_system=None))
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"
