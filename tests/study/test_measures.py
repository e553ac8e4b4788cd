"""Measures of a cell, against loops over the definitions."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fiberpo.errors import DataError
from fiberpo.study.measures import DEFINITIONS, arranged, cell_measures, curve_measures
from study.grids import cell, failed, grid, table


def trapezoid(values, places):
    area = 0.0
    for k in range(1, len(values)):
        area += (places[k] - places[k - 1]) * (values[k] + values[k - 1]) / 2
    return area


def one(**columns):
    found = cell_measures(cell(**columns))
    assert len(found) == 1
    return found.iloc[0]


def test_auc_counts_tokens():
    """0.2 over 100 tokens, then 0.2 to 1.0 over 300: nothing of the point before training."""
    tokens = [0, 100, 200, 500]
    found = one(rewards=[0.9, 0.2, 0.2, 1.0], tokens=tokens)
    assert found["auc"] == pytest.approx((0.2 * 100 + 0.6 * 300) / 400)
    assert found["auc_updates"] == pytest.approx((0.2 * 8 + 0.6 * 8) / 16)
    assert found["final"] == pytest.approx(0.6)
    assert found["best"] == 1.0
    assert found["before"] == 0.9
    assert found["damage"] == pytest.approx(0.3)


@given(
    st.lists(st.tuples(st.floats(0, 1), st.integers(1, 1000)), min_size=2, max_size=9),
    st.floats(0, 1),
)
def test_curve_against_loops(points, before):
    rewards = np.array([before, *(value for value, _ in points)])
    tokens = np.cumsum([0, *(width for _, width in points)]).astype(float)
    found = curve_measures(rewards, tokens, np.arange(len(rewards), dtype=float))
    final = (rewards[-1] + rewards[-2]) / 2
    auc = trapezoid(rewards[1:].tolist(), tokens[1:].tolist()) / (tokens[-1] - tokens[1])
    assert found["auc"] == pytest.approx(auc)
    assert found["final"] == pytest.approx(final)
    assert found["damage"] == pytest.approx(max(0.0, before - final))
    assert bool(found["collapsed"]) == (final < before / 2)
    assert min(rewards[1:]) - 1e-9 <= found["auc"] <= found["best"] + 1e-9


def test_domains():
    """One domain falls under a half, one falls a little, one rises."""
    found = one(rewards={"sum": [0.5, 0.2, 0.2], "sort": [0.6, 0.5, 0.4], "boolean": [0.5, 0.8, 1]})
    assert found["weakest"] == pytest.approx(0.2)
    assert found["weakest_domain"] == "sum"
    assert found["damage"] == pytest.approx(0.3 + 0.15)
    assert found["collapsed"] == 1
    assert found["collapsed/domain=sum"] == 1
    assert found["collapsed/domain=sort"] == 0
    assert found["damage/domain=sort"] == pytest.approx(0.15)
    assert found["final/domain=boolean"] == pytest.approx(0.9)
    assert found["auc/domain=sum"] == pytest.approx(0.2)


def test_one_evaluation():
    """A single evaluation after training began stands for itself."""
    found = one(rewards=[0.5, 0.7])
    assert found["status"] == "finished"
    assert [found[name] for name in ("final", "best", "auc", "auc_updates")] == [0.7] * 4


def test_training_metrics():
    """The last stretch, the largest norm, growth from the first to the last third, mean drift."""
    nan = np.nan
    found = one(
        rewards=[0.5] * 7, entropy=[nan, 6, 5, 4, 3, 2, 1], grad_norm=[nan, 1, 3, 9, 9, 4, 6],
        **{
            "ratio/mean": [nan, 1, 1, 1, 1, 1, 1.5], "ratio/mean/domain=sum": [nan] + [2.0] * 6,
            "grad_norm/max": [nan, 1, 30, 1, 1, 1, 1],
            "gate/token/drift_pos/p90": [nan, 1, 2, 3, 4, 5, 6],
        },
    )  # fmt: skip
    assert found["entropy"] == 1
    assert found["ratio/mean"] == 1.5
    assert found["ratio/mean/domain=sum"] == 2
    assert found["grad_norm"] == 6
    assert found["grad_norm/max"] == 30
    assert found["grad_norm/growth"] == pytest.approx(5 / 2)
    assert found["gate/token/drift_pos/p90"] == 3.5


def test_nothing_is_dropped():
    """Failed and incomplete cells stay, with the reason and without numbers."""
    found = cell_measures(
        table(
            cell(seed=0),
            failed(seed=1),
            cell(seed=2).query("step > 0"),
            cell(seed=3).query("step != 8"),
            cell(seed=4, rewards=[0.5, np.nan, 0.5]),
            cell(seed=5).query("step == 0"),
        )
    ).set_index("seed")
    assert found["status"].tolist() == ["finished", "failed", *["incomplete"] * 4]
    assert found["note"].tolist() == [
        "", "NonFiniteError: loss is nan", "no evaluation before training",
        "no evaluation at step 8, which other seeds have", "no heldout/reward at step 8",
        "no evaluation after training began",
    ]  # fmt: skip
    numbers = [name for name in DEFINITIONS if name in found]
    assert len(numbers) >= 8
    assert found.loc[1:, numbers].isna().all(axis=None)
    assert found.loc[0, numbers].notna().all()


def test_only_failed_cells():
    """Measures exist as columns even if no cell has them."""
    found = cell_measures(failed())
    assert found[["final", "auc", "weakest", "damage", "collapsed"]].isna().all(axis=None)


def test_a_domain_that_a_setting_lacks():
    """Null on every row is no gap; null on one row is."""
    both = {"sum": [0.5, 0.6, 0.7], "sort": [0.5, 0.4, 0.3]}
    some = {"sum": [0.5, 0.6, 0.7], "sort": [0.5, np.nan, 0.3]}
    rows = table(cell("hot", rewards=both), cell("single"), cell("gap", rewards=some))
    rows.loc[rows["setting"] == "gap", "heldout/reward"] = 0.5
    found = cell_measures(rows).set_index("setting")
    assert found.loc["single", "status"] == "finished"
    assert np.isnan(found.loc["single", "final/domain=sort"])
    assert found.loc["single", "weakest_domain"] == "sum"
    assert found.loc["gap", "note"] == "no heldout/reward/domain=sort at step 8"


def test_refusals():
    with pytest.raises(DataError, match="no column 'tokens'"):
        cell_measures(cell().drop(columns="tokens"))
    with pytest.raises(DataError, match="step 0 of cell hot, grpo, seed 0 is in the table twice"):
        cell_measures(table(cell(), cell()))
    with pytest.raises(DataError, match="has the arm 'spo', the study has grpo, gspo"):
        arranged(cell_measures(cell(arm="spo")), grid())


def test_order_of_the_study():
    rows = table(cell("b", "gspo", 1), cell("b", "grpo", 0), cell("a", "gspo", 0))
    found = arranged(cell_measures(rows), grid(settings=("a", "b")))
    order = found[["setting", "arm", "seed"]].to_numpy().tolist()
    assert order == [["a", "gspo", 0], ["b", "grpo", 0], ["b", "gspo", 1]]
