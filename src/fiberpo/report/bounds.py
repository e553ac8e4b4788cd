"""The bounds of Trust Region Masking as a table in the terminal."""

from __future__ import annotations

import io

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..theory.bounds import FORMULAS, NEEDS, Bounds


def bounds_table(found: Bounds) -> Table:
    """One row a bound: value, formula with the factor filled in, or what is missing."""
    table = Table(box=box.SIMPLE_HEAD, header_style="dim", padding=(0, 1))
    table.add_column("bound", no_wrap=True)
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("formula", overflow="fold")
    for name, formula in FORMULAS.items():
        value = found.known.get(name)
        text = formula.replace("F/2", f"{found.factor / 2:g}").replace("F ", f"{found.factor:g} ")
        if found.product:
            text = text.replace("min(1, (t-1) eps)", "(1 - (1-eps)^(t-1))")
            text = text.replace("(T-t) eps", "1 - (1-eps)^(T-t)")
        if value is None:
            text = f"needs {' and '.join(NEEDS[name])}"
        style = "bold" if name == found.tightest else "dim" if value is None else None
        table.add_row(name, "-" if value is None else f"{value:.3f}", Text(text), style=style)
    return table


def print_bounds(found: Bounds, console: Console | None = None) -> None:
    """Print the table, which bound is the tightest and why, and what it can certify.

    Args:
        found: from `fiberpo.theory.bounds.bounds`.
        console: where to print; standard output, in plain text if that is not a terminal.
    """
    target = console if console is not None else Console()
    if console is None and not target.is_terminal:
        buffer = io.StringIO()
        print_bounds(found, Console(file=buffer, width=100, color_system=None))
        print("\n".join(line.rstrip() for line in buffer.getvalue().splitlines()))
        return
    unit = "" if found.width == 1 else f"; rewards {found.width:g} wide multiply each bound"
    target.print(
        f"T = {found.length}, eps = {found.eps:.4g}: bounds on |J(theta) - J(roll) - L'|{unit}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    target.print(bounds_table(found))
    for line in verdict(found):
        target.print(line, highlight=False, soft_wrap=True)


def verdict(found: Bounds) -> list[str]:
    """The tightest bound and its reason; then what an ``L'`` above it would mean."""
    first = f"Tightest: {found.tightest}, B* = {found.best:.6g}. Why: {found.why}."
    if found.vacuous:
        return [
            first,
            f"It certifies nothing: with these divergences |L'| is at most {found.reach:.6g}.",
        ]
    lines = [
        first,
        f"L' > B* certifies an improvement if the divergences are exact, and the largest over all "
        f"reachable contexts. |L'| is at most {found.reach:.6g}.",
    ]
    if found.best >= found.width:
        lines.append(
            f"B* is larger than the reward range {found.width:g}: only an L' that claims more than "
            "any policy can gain exceeds it."
        )
    return lines
