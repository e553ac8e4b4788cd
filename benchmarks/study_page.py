"""The numbers of `docs/study.md` and of the README, written from the tables in `docs/study/`.

    python benchmarks/study_page.py [--check]
    python benchmarks/study_page.py --take runs/study-small       copy the table of a finished study

``--check`` changes nothing and exits with 1 where a page is not what the tables say. Besides the
blocks of `fiberpo.study.markdown` there are marks for single numbers:

    study:NAME:difference:SETTING:A:B:MEASURE   paired difference A - B with its 95 % interval
    study:NAME:mean:SETTING:ARM:MEASURE         mean over the seeds
    study:NAME:metric:SETTING:ARM:COLUMN        mean of a training metric over updates and seeds
    study:NAME:collapsed:SETTING:ARM            collapsed cells of finished ones
    study:NAME:cells                            finished cells and their hours
"""

import argparse
import sys
from pathlib import Path

import pandas as pd

from fiberpo.study import measures as measuring
from fiberpo.study.design import find_study, load_study
from fiberpo.study.markdown import blocks, fill_page
from fiberpo.study.statistics import ALL, compare

ROOT = Path(__file__).resolve().parents[1]
PAGES, TABLES = (ROOT / "docs/study.md", ROOT / "README.md"), ROOT / "docs/study"


METRICS = (
    "gate/gradient_reversed",
    "gate/gradient_amplified",
    "kl/k3",
    "mask/kept",
    "gate/left_out",
    "gate/active",
)
"""Training metrics that the page names."""


def single_numbers(name, cells, table, comparisons):
    """Mark -> text for the numbers in sentences."""
    mark, found = f"study:{name}", {}
    for (setting, arm), own in table[table["step"] > 0].groupby(["setting", "arm"]):
        for column in METRICS:
            if column in own and own[column].notna().any():
                found[f"{mark}:metric:{setting}:{arm}:{column}"] = f"{own[column].mean():.3f}"
    for row in comparisons.to_dict("records"):
        setting = "all" if row["setting"] == ALL else row["setting"]
        key = f"{mark}:difference:{setting}:{row['a']}:{row['b']}:{row['measure']}"
        interval = "" if pd.isna(row["low"]) else f" [{row['low']:+.2f}, {row['high']:+.2f}]"
        found[key] = f"{row['difference']:+.2f}{interval}"
    finished = cells[cells["status"] == "finished"]
    for (setting, arm), own in finished.groupby(["setting", "arm"]):
        for measure in ("before", "final", "best", "auc", "weakest", "damage", "entropy"):
            found[f"{mark}:mean:{setting}:{arm}:{measure}"] = f"{own[measure].mean():.2f}"
        for column in own.columns:
            if column.startswith("final/domain="):
                domain = column.removeprefix("final/domain=")
                found[f"{mark}:mean:{setting}:{arm}:{domain}"] = f"{own[column].mean():.2f}"
        gone = int((own["collapsed"] > 0).sum())
        found[f"{mark}:collapsed:{setting}:{arm}"] = f"{gone} of {len(own)}"
    hours = finished["cell_seconds"].sum() / 3600
    found[f"{mark}:cells"] = f"{len(finished)} cells, {hours:.1f} hours of one thread"
    return found


def numbers():
    """Mark -> text, for every table."""
    every = {}
    for path in sorted(TABLES.glob("*.parquet")):
        study, table = load_study(find_study(path.stem)), pd.read_parquet(path)
        cells = measuring.arranged(measuring.cell_measures(table), study)
        comparisons = compare(cells, study.pairs)
        every.update(blocks(cells, study, comparisons))
        every.update(single_numbers(path.stem, cells, table, comparisons))
    return every


def filled(text, every):
    """A page with every mark filled."""
    return fill_page(text, {k: v for k, v in every.items() if f"<!-- {k} -->" in text})


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing")
    parser.add_argument("--take", type=Path, help="output directory of a finished study")
    options = parser.parse_args()
    if options.take is not None:
        table = pd.read_parquet(options.take / "results.parquet")
        TABLES.mkdir(exist_ok=True)
        place = TABLES / f"{table['study'].iloc[0]}.parquet"
        table.to_parquet(place, index=False, compression="zstd")
    stale, every = False, numbers()
    for page in PAGES:
        text = page.read_text()
        new = filled(text, every)
        stale = stale or new != text
        if not options.check:
            page.write_text(new)
    sys.exit(int(options.check and stale))


if __name__ == "__main__":
    main()
