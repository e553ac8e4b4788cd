"""The laboratory's table as a page of the documentation, and for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from .claims import Claim, Verdict
from .lab import SECTIONS, Result, counts, worst_error

COLUMNS = ("claim", "where", "tried", "verdict", "worst error or counterexample")
STYLES = {Verdict.HOLDS: "green", Verdict.CONDITIONAL: "yellow", Verdict.FAILS: "red"}

INTRODUCTION = """\
# The laboratory

What the papers state, tried on a computer. `fiberpo.theory` writes every definition down once more,
on densities, sampled states and probability tables, apart from the library's engine. The claims
below compare the two, and the papers' statements with exact solutions. This page is written by

```bash
fiberpo lab --markdown docs/lab.md
```

which takes about half a minute and needs `pip install 'fiberpo[lab]'` (scipy, for the linear
programs). A failing verdict is information. A verdict that differs from the recorded one is an
error: exit code 1.

- **holds**: no random or enumerated case broke the statement.
- **holds under conditions**: it holds in the cases that the last column names first, and the case
  named after them breaks it.
- **fails**: the last column has the counterexample.

"Tried" counts random or enumerated cases. Errors below 1e-5 are shown as an upper bound. Numbers
depend on the seed; verdicts must not.

The functions are there to be used. One state, three actions, sampled once, once and twice:

```python
import numpy as np
from fiberpo.theory import apc, tvtrpo
from fiberpo.theory.tabular import Problem, State

state = State(multiplicity=np.array([1.0, 1.0, 2.0]), advantage=np.array([2.0, -1.0, -0.5]))
problem = Problem((state,), gamma=0.9)
t = tvtrpo.radius(problem)
print(f"M = {tvtrpo.gain(problem):.2f}, t* = {t:.4f}")
for name, updates in (
    ("closed form", tvtrpo.solve(problem)),
    ("linear programs", tvtrpo.solve_numerically(problem)),
    ("APC-Obj", apc.solve(problem, t)),
):
    print(f"{name:15}", (updates[0].round(4) + 0.0).tolist())
```

```text
M = 1.50, t* = 0.0104
closed form     [0.0208, -0.0208, 0.0]
linear programs [0.0208, -0.0208, 0.0]
APC-Obj         [0.0208, -0.0208, 0.0]
```
"""

LEFT_OUT = """\
## Left out

- Eq. 77 of *Fibration Policy Optimization*: only the sentence before it was tried.
- The radius that the main text prints for APC-Obj: the one tried is App. D's t\\*, which its proof
  uses.
- Experiments with language models: nothing here is about whether a method trains better.

## Reference

*Fibration Policy Optimization*, arXiv 2603.08239. *JoyAI-LLM Flash*, arXiv 2604.03044. *Trust
Region Masking*, arXiv 2512.23075. *Trust Region Policy Optimization*, arXiv 1502.05477.
"""


def _escape(text: str) -> str:
    for character in ("\\", "|", "*", "_", "[", "]"):
        text = text.replace(character, "\\" + character)
    return text.replace("<", "&lt;")


def _row(result: Result) -> str:
    claim, finding = result.claim, result.finding
    cells = (
        f"**{_escape(claim.name)}**: {_escape(claim.statement)}",
        _escape(claim.source),
        f"{finding.tried}",
        finding.verdict.value,
        _escape(result.outcome),
    )
    return f"| {' | '.join(cells)} |"


def markdown(
    results: Sequence[Result],
    seed: int,
    sections: Sequence[tuple[str, tuple[Claim, ...]]] = SECTIONS,
) -> str:
    """The page; the same for the same seed, whatever the machine took."""
    parts = [INTRODUCTION, f"{counts(results)} (seed {seed}).\n"]
    by_name = {r.claim.name: r for r in results}
    for title, claims in sections:
        rows = [_row(by_name[c.name]) for c in claims if c.name in by_name]
        if rows:
            head = f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}"
            parts.append("\n".join([f"## {title}", "", head, *rows, ""]))
    parts.append(LEFT_OUT)
    return "\n".join(parts)


def print_table(results: Sequence[Result], console: Console | None = None) -> None:
    """The table in the terminal, with the counts below."""
    console = Console() if console is None else console
    table = Table(*COLUMNS, show_lines=False, pad_edge=False)
    table.columns[0].ratio, table.columns[4].ratio = 3, 5
    table.columns[2].justify = "right"
    for result in results:
        verdict = result.finding.verdict
        table.add_row(
            result.claim.name, result.claim.source, str(result.finding.tried),
            f"[{STYLES[verdict]}]{verdict.value}[/]", _literal(_short(result)),
        )  # fmt: skip
    console.print(table)
    console.print(counts(results))


def _short(result: Result) -> str:
    """The error where the claim holds, the whole outcome elsewhere."""
    holds = result.finding.verdict is Verdict.HOLDS
    return worst_error(result.finding.worst) if holds else result.outcome


def _literal(text: str) -> str:
    """Square brackets are not markup."""
    return text.replace("[", "\\[")


__all__ = ["COLUMNS", "markdown", "print_table"]
