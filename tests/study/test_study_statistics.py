"""Comparisons over seeds, against loops and tables of the t distribution."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fiberpo.study.measures import cell_measures
from fiberpo.study.statistics import (
    ALL,
    adjusted,
    best_trials,
    collapses,
    compare,
    sentence,
    summaries,
)  # fmt: skip
from study.grids import cell, failed, table

T = {1: 12.7062, 2: 4.30265, 3: 3.18245, 4: 2.77645}
"""97.5 % quantile of Student's t by degrees of freedom, from a printed table."""


def interval(differences):
    n = len(differences)
    mean = sum(differences) / n
    variance = sum((d - mean) ** 2 for d in differences) / (n - 1)
    half = T[n - 1] * math.sqrt(variance / n)
    return mean - half, mean + half


def flat(setting, arm, seed, value, before=0.5):
    return cell(setting, arm, seed, [before, value, value])


def measures(values):
    """Finals by (setting, arm): a list over seeds, None where there is no cell."""
    return cell_measures(
        table(
            *(
                flat(setting, arm, seed, value)
                for (setting, arm), finals in values.items()
                for seed, value in enumerate(finals)
                if value is not None
            )
        )
    )


def final(found, setting="hot"):
    rows = found[(found["measure"] == "final") & (found["setting"] == setting)]
    assert len(rows) == 1
    return rows.iloc[0]


def test_interval_of_paired_differences():
    """Seeds differ a lot, the arms by little: pairing sees it."""
    a, b = [0.2, 0.45, 0.9, 0.61, 0.35], [0.1, 0.38, 0.78, 0.52, 0.24]
    row = final(compare(measures({("hot", "a"): a, ("hot", "b"): b}), [("a", "b")]))
    low, high = interval([x - y for x, y in zip(a, b, strict=True)])
    assert row["difference"] == pytest.approx(0.098)
    assert (row["low"], row["high"]) == (
        pytest.approx(low, abs=1e-5),
        pytest.approx(high, abs=1e-5),
    )
    assert (row["n"], row["wins"], row["ties"], row["losses"]) == (5, 5, 0, 0)
    assert row["verdict"] == "better"
    assert row["seeds"] == [0, 1, 2, 3, 4]
    assert row["differences"] == pytest.approx([0.1, 0.07, 0.12, 0.09, 0.11])
    assert sentence(row) == "a - b, setting hot, final: +0.098 [+0.074, +0.122], 5 seeds: better"


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=5))
def test_exchange(pairs):
    """a against b is the mirror image of b against a; the interval is that of the loops."""
    values = {("hot", "a"): [a for a, _ in pairs], ("hot", "b"): [b for _, b in pairs]}
    found = compare(measures(values), [("a", "b"), ("b", "a")], names=["final"])
    first, second = (row for _, row in found.iterrows())
    assert first["difference"] == pytest.approx(-second["difference"])
    assert (first["wins"], first["losses"]) == (second["losses"], second["wins"])
    mirror = {"better": "worse", "worse": "better"}
    assert mirror.get(first["verdict"], first["verdict"]) == second["verdict"]
    differences = [a - b for a, b in pairs]
    if max(differences) - min(differences) > 1e-6:
        low, high = interval(differences)
        assert (first["low"], first["high"]) == pytest.approx((low, high), abs=1e-4)
        assert (second["low"], second["high"]) == pytest.approx((-high, -low), abs=1e-4)
        if min(abs(low), abs(high)) > 1e-4:
            verdict = "better" if low > 0 else "worse" if high < 0 else "no difference shown"
            assert first["verdict"] == verdict


def test_less_damage_is_better():
    a, b = [0.5, 0.52, 0.49], [0.2, 0.25, 0.16]
    found = compare(measures({("hot", "a"): a, ("hot", "b"): b}), [("a", "b")])
    row = found[found["measure"] == "damage"].iloc[0]
    assert row["difference"] < 0
    assert row["verdict"] == "better"
    assert (row["wins"], row["losses"]) == (3, 0)


def test_only_common_seeds():
    """A failed cell and a cell that was not run take their seed out, and it is said."""
    rows = table(
        *(flat("hot", "a", s, v) for s, v in enumerate([0.5, 0.6, 0.8, 0.1])),
        *(flat("hot", "b", s, v) for s, v in enumerate([0.4, 0.4])),
        failed("hot", "b", 2, "out of memory"),
    )
    row = final(compare(cell_measures(rows), [("a", "b")]))
    assert row["seeds"] == [0, 1]
    assert row["difference"] == pytest.approx(0.15)
    assert row["note"] == "seed 2 left out: b failed; seed 3 left out: b not run"
    assert sentence(row).endswith(
        "2 seeds: no difference shown (seed 2 left out: b failed; seed 3 left out: b not run)"
    )


@pytest.mark.parametrize(
    ("a", "b", "verdict", "said"),
    [
        ([0.5], [0.4], "no verdict", "+0.100, 1 seed: no verdict (no interval: 1 common seed)"),
        ([0.5, 0.5], [0.4, 0.4], "no verdict", "the same difference on every seed"),
        ([0.5, 0.3], [0.5, 0.3], "no difference shown", "(no interval: equal on every seed)"),
        ([0.5, None], [None, 0.5], "no verdict", "no common seed: no verdict"),
    ],
)
def test_no_interval(a, b, verdict, said):
    row = final(compare(measures({("hot", "a"): a, ("hot", "b"): b}), [("a", "b")]))
    assert np.isnan(row["low"])
    assert np.isnan(row["high"])
    assert row["verdict"] == verdict
    assert said in sentence(row)


def test_all_settings_average_each_seed_first():
    """The blocks are seeds: two settings of two seeds are two differences, not four."""
    values = {
        ("hot", "a"): [0.5, 0.7], ("hot", "b"): [0.4, 0.5],
        ("long", "a"): [0.3, 0.9], ("long", "b"): [0.3, 0.6],
    }  # fmt: skip
    found = compare(measures(values), [("a", "b")])
    row = final(found, ALL)
    assert row["n"] == 2
    assert row["differences"] == pytest.approx([0.05, 0.25])
    low, high = interval([0.05, 0.25])
    assert (row["low"], row["high"]) == pytest.approx((low, high), abs=1e-4)
    assert sentence(row).startswith("a - b, all settings, final: +0.150 [")


def test_all_settings_of_uneven_seeds():
    """Seeds that lack a setting, and settings that an arm lacks, are named."""
    values = {
        ("hot", "a"): [0.5, 0.7, 0.6], ("hot", "b"): [0.4, 0.5, 0.5],
        ("long", "a"): [0.3, 0.9], ("long", "b"): [0.3, 0.6], ("cold", "a"): [0.1, 0.2],
    }  # fmt: skip
    found = compare(measures(values), [("a", "b")])
    row = final(found, ALL)
    assert row["seeds"] == [0, 1]
    assert row["note"] == "seed 2 not in all settings; without cold"
    assert set(found["setting"]) == {"hot", "long", ALL}
    alone = compare(measures({("hot", "a"): [0.1, 0.2], ("hot", "b"): [0.1, 0.3]}), [("a", "b")])
    assert ALL not in set(alone["setting"])


def test_adjustment_covers_all_comparisons():
    rng = np.random.default_rng(0)
    values = {("hot", arm): rng.uniform(0.3, 0.7, 5).tolist() for arm in "abc"}
    found = compare(measures(values), [("a", "b"), ("a", "c")])
    p = found["p"].to_numpy()
    assert not np.isnan(p).any()
    order = np.argsort(p)
    expected, smallest = np.empty(len(p)), 1.0
    for rank in range(len(p), 0, -1):
        smallest = min(smallest, p[order[rank - 1]] * len(p) / rank)
        expected[order[rank - 1]] = smallest
    np.testing.assert_allclose(found["p_adjusted"], expected)
    assert (found["p_adjusted"] >= found["p"]).all()
    assert np.isnan(adjusted(np.array([np.nan]))).all()


def test_summaries():
    rows = table(
        *(flat("hot", "a", s, v) for s, v in enumerate([0.2, 0.9, 0.4])), failed("hot", "a", 3)
    )
    row = summaries(cell_measures(rows)).iloc[0]
    low, high = interval([0.2, 0.9, 0.4])
    assert row[["median", "lowest", "highest"]].tolist() == pytest.approx([0.4, 0.2, 0.9])
    assert row[["mean", "low", "high"]].tolist() == pytest.approx([0.5, low, high], abs=1e-4)
    assert row[["cells", "n", "unfinished"]].tolist() == [4, 3, 1]


def test_collapses():
    """Cells, not domains, are counted; failed cells are not; the interval is Wilson's formula."""
    fallen = {"sum": [0.5, 0.1, 0.1], "sort": [0.5, 0.1, 0.1]}
    rows = table(
        cell("hot", "a", 0, fallen), flat("hot", "a", 1, 0.5), flat("long", "a", 0, 0.26),
        flat("long", "a", 1, 0.24), failed("long", "a", 2),
    )  # fmt: skip
    found = collapses(cell_measures(rows)).set_index("setting")
    assert found["collapsed"].to_dict() == {"hot": 1, "long": 1, ALL: 2}
    assert found["n"].to_dict() == {"hot": 2, "long": 2, ALL: 4}
    n, share, z = 4, 0.5, 1.959964
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    row = found.loc[ALL]
    assert (row["low"], row["high"]) == pytest.approx((middle - half, middle + half), abs=1e-5)


def test_best_trials():
    """Per setting and over all; a trial that failed on a seed has no advantage of it."""
    rows = [
        cell(setting, arm, seed, [0.5, value, value], family="grpo" if arm[0] == "g" else arm)
        for setting, arm, value in [
            ("hot", "g1", 0.5), ("hot", "g2", 0.7), ("hot", "g3", 0.9), ("hot", "other", 1.0),
            ("long", "g1", 0.8), ("long", "g2", 0.4), ("long", "g3", 0.5),
        ]
        for seed in (0, 1)
    ]  # fmt: skip
    rows = [row for row in rows if (row["arm"].iloc[0], row["seed"].iloc[0]) != ("g3", 1)]
    lost = [failed(setting, "g3", 1).assign(family="grpo") for setting in ("hot", "long")]
    found = best_trials(cell_measures(table(*rows, *lost))).set_index("setting")
    assert found["family"].unique().tolist() == ["grpo"]
    assert found["arm"].to_dict() == {"hot": "g2", "long": "g1", ALL: "g1"}
    assert found["auc"].to_dict() == pytest.approx({"hot": 0.7, "long": 0.8, ALL: 0.65})
    assert found["n"].to_dict() == {"hot": 2, "long": 2, ALL: 4}
    assert found.loc["hot", "unranked"] == ["g3"]
