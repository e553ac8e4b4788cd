"""Statistics: parts merge to the whole, and metrics mean what their names say."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fiberpo
from core import oracle
from core.cases import Case, packed, random_case, single
from fiberpo import Denominators, recipes
from fiberpo.statistics import Histogram, Moments

BUDGET, EPSILON = (0.12, 0.05), 0.04


def cut(case, at):
    """Two parts of a case, after trajectory ``at``."""
    token = sum(case.lengths[:at])
    labels = [{}, {}]
    for name, ids in case.labels.items():
        here = token if len(ids) == len(case.log_ratios) else at
        labels[0][name], labels[1][name] = ids[:here], ids[here:]
    return (
        Case(case.log_ratios[:token], case.advantages[:token], case.lengths[:at], labels[0]),
        Case(case.log_ratios[token:], case.advantages[token:], case.lengths[at:], labels[1]),
    )


@given(st.integers(0, 10**6), st.integers(1, 11), st.sampled_from(["fiberpo", "ppo", "gspo"]))
def test_statistics_of_parts_merge_to_those_of_the_whole(seed, at, name):
    """Every metric, quantiles included (their histograms add up exactly)."""
    case, objective = random_case(seed), getattr(recipes, name)()
    case.labels = {}
    whole = objective(case.batch()).metrics()
    counts = Denominators.of(case.batch())
    one, two = (objective(part.batch(), denominators=counts) for part in cut(case, at))
    merged = one.statistics.merge(two.statistics).compute()
    assert merged == pytest.approx(whole, rel=1e-9, abs=1e-12)


def test_statistics_of_domains_merge_too():
    """Metrics per domain, where both parts hold both domains."""
    whole, objective = random_case(3), recipes.fiberpo()
    whole.labels = {"domain": [t % 2 for t in range(12)]}
    counts = Denominators.of(whole.batch())
    one, two = (objective(part.batch(), denominators=counts) for part in cut(whole, 6))
    merged = one.statistics.merge(two.statistics).compute()
    assert merged == pytest.approx(objective(whole.batch()).metrics(), rel=1e-9, abs=1e-12)
    assert "gate/trajectory/pass_frac/domain=0" in merged


def test_statistics_of_parts_that_hold_one_domain_each_merge_too():
    """A rank or micro-batch of one domain still reports that domain's metrics."""
    whole, objective = random_case(3), recipes.fiberpo()
    whole.labels = {"domain": [0] * 5 + [1] * 7}
    counts = Denominators.of(whole.batch())
    one, two = (objective(part.batch(), denominators=counts) for part in cut(whole, 5))
    merged = one.statistics.merge(two.statistics).compute()
    assert merged == pytest.approx(objective(whole.batch()).metrics(), rel=1e-9, abs=1e-12)


def test_metrics_are_a_flat_dictionary_of_floats():
    """Nothing nested, no tensors."""
    metrics = recipes.fiberpo()(random_case(0).batch()).metrics()
    assert all(type(v) is float for v in metrics.values())
    assert all(isinstance(k, str) for k in metrics)


def test_names_of_the_metrics():
    """What dashboards rely on."""
    metrics = recipes.fiberpo_domain()(random_case(0).batch()).metrics()
    for stratum in ("domain", "group", "trajectory", "token"):
        for word in ("pass", "rollback", "zeroed"):
            assert f"gate/{stratum}/{word}_frac" in metrics
        for channel in ("pos", "neg"):
            for word in ("mean", "p90", "max"):
                assert f"gate/{stratum}/drift_{channel}/{word}" in metrics
    for name in (
        "gate/active", "gate/gradient_kept", "gate/gradient_reversed", "gate/gradient_amplified",
        "kl/k1", "kl/k3", "ratio/mean", "ratio/min", "ratio/max", "ratio/ess",
    ):  # fmt: skip
        assert name in metrics


@pytest.mark.parametrize("seed", range(3))
def test_fractions_of_regimes_add_up_to_one(seed):
    """Every context is counted once, by the worst regime of its channels."""
    metrics = recipes.fiberpo_domain()(random_case(seed).batch()).metrics()
    for stratum in ("domain", "group", "trajectory", "token"):
        words = ("pass", "rollback", "zeroed")
        total = sum(metrics[f"gate/{stratum}/{word}_frac"] for word in words)
        assert total == pytest.approx(1.0)


def test_trajectory_fractions_by_hand():
    """One trajectory passes, one rolls back in a channel, one is zeroed in one of two."""
    ell = [0.01] * 4 + [0.13] * 4 + [0.4, 0.4, -0.05, -0.05]
    metrics = recipes.fiberpo(BUDGET, EPSILON)(packed(ell, [1.0] * 12, [4] * 3)).metrics()
    for word in ("pass", "rollback", "zeroed"):
        assert metrics[f"gate/trajectory/{word}_frac"] == pytest.approx(1 / 3)


def test_gradient_shares_by_hand():
    """Uniform drift 0.13 in the rollback zone, T = 4: the gradient is -4 mu A exp(0.08).

    Nothing of the plain gradient is kept, and ``4 exp(0.08 - 0.13)`` of it is reversed.
    """
    metrics = recipes.fiberpo(BUDGET, EPSILON)(single([0.13] * 4)).metrics()
    assert metrics["gate/gradient_kept"] == 0.0
    assert metrics["gate/gradient_reversed"] == pytest.approx(4 * math.exp(-0.05))
    assert metrics["gate/gradient_amplified"] == 0.0


def test_gradient_is_kept_where_everything_passes():
    """G = r: kept 1, reversed 0."""
    metrics = recipes.fiberpo(BUDGET, EPSILON)(single([0.01, -0.01, 0.0])).metrics()
    assert metrics["gate/gradient_kept"] == pytest.approx(1.0)
    assert metrics["gate/gradient_reversed"] == 0.0
    assert metrics["gate/active"] == 0.0


def test_gate_active_counts_tokens_with_some_gate_that_does_not_pass():
    """4 of 6 tokens lie in the trajectory whose base is zeroed."""
    metrics = recipes.fiberpo(BUDGET, EPSILON)(
        packed([0.3] * 4 + [0.0] * 2, [1.0] * 6, [4, 2])
    ).metrics()
    assert metrics["gate/active"] == pytest.approx(4 / 6)


def test_divergences_and_ratios_by_hand():
    """``k1 = -mean l``, ``k3 = mean (r - 1 - l)``, ``ess = (sum r)^2 / (N sum r^2)``."""
    ell = [0.2, -0.1, 0.0]
    metrics = recipes.ppo()(single(ell)).metrics()
    r = [math.exp(x) for x in ell]
    assert metrics["kl/k1"] == pytest.approx(-0.1 / 3)
    assert metrics["kl/k3"] == pytest.approx(sum(a - 1 - x for a, x in zip(r, ell)) / 3)
    assert metrics["ratio/ess"] == pytest.approx(sum(r) ** 2 / (3 * sum(a * a for a in r)))
    assert (metrics["ratio/min"], metrics["ratio/max"]) == pytest.approx((min(r), max(r)))


def test_drift_metrics_are_the_aggregates():
    """``gate/trajectory/drift_pos/mean`` is the mean ``S+`` over trajectories."""
    case = random_case(4)
    metrics = recipes.fiberpo()(case.batch()).metrics()
    plus, minus = zip(*[oracle.aggregates_eq9(row) for row in case.trajectories()])
    assert metrics["gate/trajectory/drift_pos/mean"] == pytest.approx(sum(plus) / 12)
    assert metrics["gate/trajectory/drift_neg/max"] == pytest.approx(max(minus))
    p90 = sorted(plus)[10]  # the smallest with at least 0.9 * 12 = 10.8 of them at or below
    assert metrics["gate/trajectory/drift_pos/p90"] == pytest.approx(p90, rel=0.026)


def test_token_drift_metrics_are_the_residuals():
    """``l = (0.2, 0.0)``: ``u = (0.1, -0.1)``, one token above and one below its trajectory."""
    metrics = recipes.fiberpo(BUDGET, EPSILON)(single([0.2, 0.0])).metrics()
    assert metrics["gate/token/drift_pos/mean"] == pytest.approx(0.1)
    assert metrics["gate/token/drift_neg/mean"] == pytest.approx(0.1)


def test_rollout_divergence_needs_rollout_log_probs():
    """Reported exactly when the batch has them."""
    with_rollout = single([0.0, 0.0], rollout_log_probs=torch.tensor([-0.1, 0.1]).double())
    assert recipes.ppo()(with_rollout).metrics()["kl_rollout/k1"] == pytest.approx(0.0)
    assert "kl_rollout/k1" not in recipes.ppo()(single([0.0, 0.0])).metrics()


def test_on_policy_metrics():
    """Everything inert: ratio 1, no divergence, no gate active."""
    metrics = recipes.fiberpo()(single([0.0] * 5)).metrics()
    assert metrics["ratio/ess"] == metrics["ratio/mean"] == metrics["gate/gradient_kept"] == 1.0
    assert metrics["kl/k3"] == metrics["gate/active"] == 0.0


def test_empty_batch_has_no_metrics_to_report():
    """A rank without tokens merges as the neutral element."""
    empty = fiberpo.RatioBatch.from_packed(
        torch.zeros(0), torch.zeros(0), torch.zeros(0), torch.zeros(0).long(), allow_empty=True
    )
    full = recipes.ppo()(single([0.1, -0.1]))
    merged = recipes.ppo()(empty, denominators=Denominators(2, 1)).statistics.merge(full.statistics)
    assert merged.compute() == pytest.approx(full.metrics())


@given(st.lists(st.floats(-10, 10), max_size=8), st.lists(st.floats(-10, 10), max_size=8))
def test_moments_merge(left, right):
    """Count, sum, squares, extremes."""
    one, two = (Moments.of(torch.tensor(x, dtype=torch.float64)) for x in (left, right))
    both = Moments.of(torch.tensor(left + right, dtype=torch.float64))
    assert one.merge(two).values.tolist() == pytest.approx(both.values.tolist())


@given(st.floats(1e-9, 1e3))
def test_quantiles_are_within_two_and_a_half_percent(x):
    """One value is its own median."""
    found = Histogram.of(torch.tensor([x], dtype=torch.float64)).quantile(0.5)
    assert found == pytest.approx(x, rel=0.026)
