"""Tables of a study as markdown, and the marks of a page that they fill."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from ..errors import DataError
from .measures import DEFINITIONS
from .statistics import (
    ALL,
    MEASURES,
    METHOD,
    NONE,
    best_trials,
    collapses,
    compare,
    interval,
    number,
    sentence,
    summaries,
)  # fmt: skip

if TYPE_CHECKING:
    from .study import Study


def table(head: Sequence[str], rows: Iterable[Sequence[object]], text: int = 1) -> str:
    r"""A markdown table; the first ``text`` columns to the left, the others to the right.

    >>> print(table(["arm", "final"], [["a|b", 0.5]]))
    | arm | final |
    | --- | ---: |
    | a\|b | 0.5 |
    """
    rule = ["---"] * text + ["---:"] * (len(head) - text)
    escaped = [[str(cell).replace("|", r"\|") for cell in line] for line in (head, rule, *rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped)


@dataclass(frozen=True)
class Entry:
    """A measure of one arm in one setting, as text; ``best`` has the highest median.

    ``ends`` and ``mean`` are empty with fewer than two seeds.
    """

    median: str
    ends: str
    mean: str
    counts: tuple[str, ...]
    best: bool


def entries(
    measures: pd.DataFrame, study: Study, name: str = "final"
) -> dict[str, list[Entry | None]]:
    """Arm -> an entry for every setting of `settings_and_arms`, None where there is no cell."""
    found = summaries(measures, name).set_index(["setting", "arm"])
    highest, spread = found.groupby("setting")["median"].max(), found.to_dict("index")
    counted = collapses(measures).set_index(["setting", "arm"])["collapsed"].to_dict()
    settings, arms = settings_and_arms(measures, study)

    def entry(setting: str, arm: str) -> Entry | None:
        key = setting, arm
        if key not in spread:
            return None
        cell, fallen = spread[key], counted.get(key, 0)
        counts = [f"{fallen} of {cell['n']} collapsed"] if fallen else []
        if cell["unfinished"]:
            counts.append(f"{cell['unfinished']} of {cell['cells']} not finished")
        return Entry(
            number(cell["median"]),
            f"{number(cell['lowest'])} to {number(cell['highest'])}" if cell["n"] > 1 else "",
            f"{number(cell['mean'])} {interval(cell['low'], cell['high'])}".strip()
            if cell["n"] > 1
            else "",
            tuple(counts),
            bool(cell["median"] == highest[setting]),
        )

    return {arm: [entry(setting, arm) for setting in settings] for arm in arms}


def main_table(measures: pd.DataFrame, study: Study, name: str = "final") -> str:
    """A measure by arm and setting: median (lowest to highest seed), then mean [95 % interval].

    Cells that collapsed or did not come to an end are counted below.
    """

    def text(entry: Entry | None) -> str:
        if entry is None:
            return NONE
        if not entry.ends:
            return "<br>".join([entry.median, *entry.counts])
        ends, mean = f"{entry.median} ({entry.ends})", f"mean {entry.mean}"
        return "<br>".join([ends, mean, *entry.counts])

    settings, _ = settings_and_arms(measures, study)
    found = entries(measures, study, name)
    return table(["arm", *settings], [[arm, *map(text, row)] for arm, row in found.items()])


def settings_and_arms(measures: pd.DataFrame, study: Study) -> tuple[list[str], list[str]]:
    """Settings and arms that have cells, in the order of the study."""
    settings, arms = set(measures["setting"]), set(measures["arm"])
    return [s for s in study.settings if s in settings], [a for a in study.arms if a in arms]


def collapse_lines(measures: pd.DataFrame, study: Study) -> list[list[str]]:
    """Head and rows of `collapse_table`."""
    counted = collapses(measures).set_index(["setting", "arm"]).to_dict("index")
    settings, arms = settings_and_arms(measures, study)
    head = [*settings, *([ALL] if len(settings) > 1 else [])]

    def text(setting: str, arm: str) -> str:
        found = counted.get((setting, arm))
        if found is None:
            return NONE
        ends = f"[{100 * found['low']:.0f} %, {100 * found['high']:.0f} %]"
        return f"{found['collapsed']} of {found['n']} {ends}"

    return [["arm", *head], *([arm, *(text(setting, arm) for setting in head)] for arm in arms)]


def collapse_table(measures: pd.DataFrame, study: Study) -> str:
    """Collapsed of finished cells by arm and setting, with the 95 % interval of the share."""
    head, *rows = collapse_lines(measures, study)
    return table(head, rows)


def comparison_table(comparisons: pd.DataFrame) -> str:
    """Every comparison: difference, interval, seeds, wins, adjusted p value, verdict."""
    rows = []
    for row in comparisons.to_dict("records"):
        ends = interval(row["low"], row["high"], "+")
        rows.append([
            f"{row['a']} - {row['b']}", row["setting"], row["measure"],
            f"{number(row['difference'], '+')} {ends}".strip(), row["n"],
            f"{row['wins']}/{row['ties']}/{row['losses']}", p_value(row["p_adjusted"]),
            row["verdict"],
        ])  # fmt: skip
    head = [
        "pair",
        "setting",
        "measure",
        "difference [95 %]",
        "seeds",
        "w/t/l",
        "p adj.",
        "verdict",
    ]
    return table(head, rows, text=3)


def p_value(value: float) -> str:
    """A p value with two digits.

    >>> p_value(0.0312), p_value(1e-6), p_value(1.0), p_value(float("nan"))
    ('0.031', '< 0.001', '1', '-')
    """
    if np.isnan(value):
        return NONE
    return "< 0.001" if value < 0.001 else f"{value:.2g}"


def search_table(measures: pd.DataFrame) -> str:
    """The best trial of every family, per setting and over all settings."""
    rows = [
        [row["family"], row["setting"], row["arm"], number(row["auc"]), row["n"], row["trials"]]
        for row in best_trials(measures).to_dict("records")
    ]
    return table(["family", "setting", "best trial", "mean auc", "cells", "trials"], rows, text=3)


def report(
    measures: pd.DataFrame, comparisons: pd.DataFrame, study: Study, notes: Iterable[str] = ()
) -> str:
    """Every table of a study, as a page of its own."""
    said = [f"- {note}" for note in notes]
    said += [
        f"- {row['setting']}, {row['arm']}, seed {row['seed']}: {row['status']}: {row['note']}"
        for row in measures[measures["status"] != "finished"].to_dict("records")
    ]
    parts = [
        f"# {study.name}", study.about, *(["\n".join(said)] if said else []),
        "## Final held-out reward",
        "Median over seeds (lowest to highest), then the mean with its 95 % interval.",
        main_table(measures, study),
        "## Collapsed cells",
        f"Collapsed: {DEFINITIONS['collapsed']}. With Wilson's 95 % interval of the share.",
        collapse_table(measures, study),
    ]  # fmt: skip
    if len(best_trials(measures)):
        parts += ["## Best trials", search_table(measures)]
    if len(comparisons):
        parts += ["## Paired differences", METHOD, comparison_table(comparisons)]
    parts += ["## Measures", "\n".join(f"- `{k}`: {v}" for k, v in DEFINITIONS.items())]
    return "\n\n".join(filter(None, parts)) + "\n"


def blocks(
    measures: pd.DataFrame, study: Study, comparisons: pd.DataFrame | None = None
) -> dict[str, str]:
    """Everything that a page may show of a study, by the name of its mark.

    Args:
        measures, study: the cells and their study.
        comparisons: `compare` of the study's pairs, where it is known.
    """
    if comparisons is None:
        comparisons = compare(measures, study.pairs)
    mark = f"study:{study.name}"
    found = {
        f"{mark}:main": main_table(measures, study),
        f"{mark}:collapse": collapse_table(measures, study),
        f"{mark}:search": search_table(measures),
    }
    for name in MEASURES:
        own = comparisons[comparisons["measure"] == name]
        found[f"{mark}:{name}"] = comparison_table(own)
        lines = [f"- {sentence(row)}" for row in own.to_dict("records")]
        found[f"{mark}:{name}:sentences"] = "\n".join(lines)
    return found


def fill_page(text: str, found: Mapping[str, str]) -> str:
    """A page with its marks filled: ``<!-- NAME -->`` to the next ``<!-- end -->``.

    >>> fill_page("a <!-- study:small:main -->old<!-- end --> z", {"study:small:main": "new"})
    'a <!-- study:small:main -->new<!-- end --> z'

    Raises:
        DataError: If the page has a mark of one of the studies that has no value, or no end.
    """
    studies = {":".join(name.split(":")[:2]) for name in found}
    for name in re.findall(r"<!-- (study:\S+) -->", text):
        if ":".join(name.split(":")[:2]) in studies and name not in found:
            raise DataError(f"there is nothing for the mark {name!r}; there are {', '.join(found)}")
    for name, block in found.items():
        start = f"<!-- {name} -->"
        mark = re.compile(
            rf"({re.escape(start)})(\n?)(?:(?!<!-- study:).)*?(<!-- end -->)", re.DOTALL
        )
        text, count = mark.subn(lambda m, b=block: m[1] + m[2] + b + m[2] + m[3], text)  # type: ignore[misc]
        if count != text.count(start):
            raise DataError(f"the mark {start} has no <!-- end --> before the next mark")
    return text
