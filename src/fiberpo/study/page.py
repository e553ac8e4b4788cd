"""The page of a study: one self-contained HTML file, and its numbers beside it.

``study.html`` shows everything, ``study.md`` the tables, ``measures.parquet`` one row a cell and
``comparisons.parquet`` one row a paired comparison. Needs pandas, pyarrow, scipy and the extra
``report``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import yaml

from ..palette import CSS_COLORS
from ..report.comparison import as_text, flat
from ..report.curves import Panel
from ..report.explorer import as_script
from ..report.html import asset, environment, packed_plotly, write_whole
from ..report.tables import DASH, MINUS, format_seconds
from . import markdown
from .figures import forest, further, learning, looks, span_of
from .measures import CELL, DEFINITIONS, DOMAIN, arranged, cell_measures
from .statistics import ALL, MEASURES, METHOD, best_trials, compare, interval, number, sentence

if TYPE_CHECKING:
    from .design import Study

PAGE, TABLES = "study.html", "study.md"
PACKAGE = "fiberpo.study"
_SHOWN = (
    "before", "final", "best", "auc", "auc_updates", "weakest", "damage", "entropy", "ratio/mean",
    "completions/mean_length", "grad_norm/growth",
)  # fmt: skip


def write_study_report(directory: Path, table: pd.DataFrame, study: Study) -> Path:
    """Write the page, the tables and the numbers of a study; returns the HTML file.

    Args:
        directory: of the study; what its ``study.json`` says of cells left out stands on the page.
        table: held-out evaluations of the cells so far (``results.parquet``).
        study: what was declared.

    Raises:
        DataError: for a table that is not of this study.
        FiberPOError: if jinja2 or plotly is not installed.
    """
    measures = arranged(cell_measures(table), study)
    comparisons = compare(measures, study.pairs)
    notes = selected(directory)
    page = render(table, measures, comparisons, study, notes)
    write_whole(directory / PAGE, page.encode())
    text = markdown.report(measures, comparisons, study, notes)
    write_whole(directory / TABLES, text.encode())
    measures.to_parquet(directory / "measures.parquet")
    comparisons.to_parquet(directory / "comparisons.parquet")
    return directory / PAGE


def selected(directory: Path) -> list[str]:
    """What ``study.json`` says of cells that were not asked for, or did not fit into the time."""
    path = directory / "study.json"
    if not path.is_file():
        return []
    selection = json.loads(path.read_text())["selection"]
    notes = [
        f"Only the {what} {', '.join(map(str, names))} were asked for."
        for what in ("settings", "arms", "seeds")
        if (names := selection[what]) is not None
    ]
    lost: dict[str, set[int]] = {}
    for name in selection["left_out"]:
        place, _, seed = name.rpartition("-seed")
        lost.setdefault(place.partition("/")[0], set()).add(int(seed))
    if lost:
        where = "; ".join(f"{s}, seeds {', '.join(map(str, sorted(n)))}" for s, n in lost.items())
        count = len(selection["left_out"])
        notes.append(
            f"{count} cell{' was' if count == 1 else 's were'} left out, to fit into "
            f"{selection['minutes']:g} minutes: {where}."
        )
    return notes


def declared(study: Study) -> list[tuple[str, str, int]]:
    """Setting, arm and seed of every cell of the plan, once."""
    cells = (
        (setting, arm, seed)
        for block in study.plan
        for setting in block.settings
        for arm in block.arms
        for seed in study.seeds_of(block, setting, arm)
    )
    return list(dict.fromkeys(cells))


def render(
    table: pd.DataFrame,
    measures: pd.DataFrame,
    comparisons: pd.DataFrame,
    study: Study,
    notes: Iterable[str] = (),
) -> str:
    """The page as text."""
    templates = environment(package=PACKAGE)
    from markupsafe import Markup, escape

    templates.filters["minus"] = lambda text: re.sub(r"(?<![\w.])-(?=[\d ])", MINUS, str(text))
    templates.filters["breakable"] = lambda name: escape(name).replace("_", Markup("_<wbr>"))
    settings, arms = markdown.settings_and_arms(measures, study)
    colors = looks(list(study.arms))
    styles = {arm: colors[arm] for arm in arms}
    panels: list[Panel] = []

    def placed(panel: Panel) -> tuple[int, Panel]:
        panels.append(panel)
        return len(panels) - 1, panel

    done = measures.loc[measures["status"] == "finished", CELL]
    finished = table.merge(done, on=CELL)
    rewards, others = [], []
    for setting in settings:
        own = finished[finished["setting"] == setting]
        curves = learning(own, styles)
        mean = curves.pop("", None)
        rewards.append({
            "name": setting, "about": study.settings[setting].about,
            "mean": None if mean is None else placed(replace(mean, title=setting)),
            "domains": [placed(panel) for panel in curves.values()],
        })  # fmt: skip
        others.append((setting, [placed(panel) for panel in further(own, styles)]))
    values = templates.get_template("study.html.j2").render(
        study=study, settings=settings, arms=arms, looks=styles, colors=CSS_COLORS,
        notes=list(notes), facts=_facts(measures, study), coverage=_coverage(measures, study),
        unfinished=measures[measures["status"] != "finished"].to_dict("records"),
        changes=_changes,
        base=yaml.safe_dump(dict(study.base), sort_keys=False).strip(),
        entries=markdown.entries(measures, study), rewards=rewards, others=others,
        collapsed=markdown.collapse_lines(measures, study),
        medians={setting: _medians(measures, setting, arms) for setting in settings},
        comparisons=list(_compared(comparisons, settings, placed)),
        trials=best_trials(measures).to_dict("records"), definitions=DEFINITIONS,
        number=number, interval=interval, p_value=markdown.p_value,
        short=_in_short(comparisons), method=METHOD,
        data=as_script({"panels": [panel.figure for panel in panels]}),
        scripts=[asset("study.js", PACKAGE), asset("charts.js")], plotly=packed_plotly(),
    )  # fmt: skip
    return str(values)


def _facts(measures: pd.DataFrame, study: Study) -> list[tuple[str, str]]:
    done = int((measures["status"] == "finished").sum())
    seconds = float(measures["cell_seconds"].sum()) if "cell_seconds" in measures else np.nan
    seeds = measures.groupby(["setting", "arm"])["seed"].nunique()
    count = str(seeds.max()) if seeds.min() == seeds.max() else f"{seeds.min()} to {seeds.max()}"
    return [
        ("Cells finished", f"{done} of {len(declared(study))}"),
        ("Settings", str(measures["setting"].nunique())),
        ("Arms", str(measures["arm"].nunique())),
        ("Seeds of a cell", count),
        *([("Time, all cells", format_seconds(seconds))] if seconds > 0 else []),
    ]


def _coverage(measures: pd.DataFrame, study: Study) -> list[tuple[str, list[str]]]:
    """Finished of declared seeds by arm and setting; nothing where all are done."""
    asked = pd.DataFrame(declared(study), columns=CELL).groupby(CELL[:2])["seed"].nunique()
    own = measures[measures["status"] == "finished"]
    done = own.groupby(CELL[:2])["seed"].nunique()
    if done.reindex(asked.index, fill_value=0).equals(asked):
        return []
    return [
        (arm, [f"{done.get((s, arm), 0)} of {asked[s, arm]}" if (s, arm) in asked.index else DASH
               for s in study.settings])
        for arm in study.arms
    ]  # fmt: skip


def _changes(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(name, as_text(value)) for name, value in flat(dict(config)).items()]


def _medians(
    measures: pd.DataFrame, setting: str, arms: list[str]
) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Names of measures, and the median over seeds of each for every arm."""
    own = measures[(measures["setting"] == setting) & (measures["status"] == "finished")]
    names = [n for n in _SHOWN if n in own and own[n].notna().any()]
    names += [n for n in own if n.startswith(f"final{DOMAIN}") and own[n].notna().any()]
    found = own.groupby("arm")[names].median()
    rows = [(arm, [number(v) for v in found.loc[arm]]) for arm in arms if arm in found.index]
    return names, rows


def _compared(
    comparisons: pd.DataFrame, settings: list[str], placed: Any
) -> Iterator[dict[str, Any]]:
    """Measure by measure: forest plots and rows."""
    for name in MEASURES:
        own = comparisons[comparisons["measure"] == name]
        if own.empty:
            continue
        span = span_of(own)
        charts = [forest(own[own["setting"] == s], span) for s in (ALL, *settings)]
        pairs = {
            f"{a} - {b}": own[(own["a"] == a) & (own["b"] == b)].to_dict("records")
            for a, b in dict.fromkeys(zip(own["a"], own["b"], strict=True))
        }
        yield {
            "name": name, "less": MEASURES[name] < 0, "pairs": [*pairs.items()],
            "charts": [placed(panel) for panel in charts if panel is not None],
        }  # fmt: skip


def _in_short(comparisons: pd.DataFrame) -> list[dict[str, str]]:
    """The final reward of every pair over all settings, or in the only one, in words."""
    own = comparisons[comparisons["measure"] == "final"]
    if (own["setting"] == ALL).any():
        own = own[own["setting"] == ALL]
    elif own["setting"].nunique() > 1:
        return []
    return [
        {"verdict": row["verdict"], "sentence": sentence(row, verdict=False)}
        for row in own.to_dict("records")
    ]
