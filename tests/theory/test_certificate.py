"""Surrogate and bound of a sampled batch, for the log of a run."""

import itertools
import math

import numpy as np
import pytest

from fiberpo import BoundError
from fiberpo.theory.certificate import Evidence, certificate
from fiberpo.theory.enumeration import Pair, Policy

ROWS = [[0.1, -0.2, 0.05], [0.3], [-0.1, 0.0]]
REWARDS = [1.0, 0.5, 0.0]


def call(rows=ROWS, rewards=REWARDS, **options):
    flat = [x for row in rows for x in row]
    return certificate(flat, [len(row) for row in rows], rewards, **options)


def test_surrogate_by_hand():
    """Mean over sequences of ``R sum_t (rho_t - 1)``."""
    expected = (1.0 * sum(math.exp(x) - 1 for x in ROWS[0]) + 0.5 * (math.exp(0.3) - 1) + 0.0) / 3
    assert call().surrogate == pytest.approx(expected)


def test_estimates_by_hand():
    """k2 for the maximum, k3 for the sequence, half of ``|rho - 1|`` by position for TV."""
    found = call().bounds
    flat = [x for row in ROWS for x in row]
    kl_seq = sum(math.exp(x) - 1 - x for x in flat) / 3
    kl_max = 0.3**2 / 2
    tv = [abs(math.exp(x) - 1) / 2 for x in flat]
    by_position = [(tv[0] + tv[3] + tv[4]) / 3, (tv[1] + tv[5]) / 3, tv[2] / 3]
    eps = math.sqrt(kl_max / 2)  # smaller than the largest |rho - 1| / 2
    assert eps < max(tv)
    assert found.length == 3
    assert found.kl_max == pytest.approx(kl_max)
    assert found.kl_seq == pytest.approx(kl_seq)
    assert found.eps == pytest.approx(eps)
    assert found.mixed_kl == pytest.approx(4 * 3 * eps * math.sqrt(kl_seq / 2))
    weights = [min(1, 2 * max(tv), math.sqrt(kl_max)), min(max(tv), math.sqrt(kl_max / 2)), 0]
    expected = 4 * sum(m * w for m, w in zip(by_position, weights, strict=True))
    assert found.adaptive == pytest.approx(expected)
    assert found.mixed_tv is None


def test_estimates_never_contradict_each_other():
    """k3 of a positive log ratio is above its k2: the largest is at least the mean."""
    found = call([[0.5] * 4], [1.0]).bounds
    assert found.kl_max == pytest.approx(math.exp(0.5) - 1.5)
    assert found.kl_max > 0.5**2 / 2
    assert call([[3.0]], [1.0]).bounds.eps == 1.0  # |rho - 1| / 2 = 9.5 is no total variation


def test_exact_divergences():
    """Given the KL of every context, the bounds use it; the state says so."""
    kl = [0.01, 0.02, 0.0, 0.03, 0.01, 0.01]
    got = call(token_kl=kl)
    assert got.evidence is Evidence.EXACT_KL
    assert call().evidence is Evidence.ESTIMATED
    assert (got.bounds.kl_max, got.bounds.kl_seq) == (0.03, pytest.approx(0.08 / 3))
    assert got.bounds.adaptive is None
    tv = [0.05, 0.06, 0.0, 0.1, 0.02, 0.03]
    both = call(token_kl=kl, token_tv=tv).bounds
    assert both.eps == 0.1
    w = [min(0.2, math.sqrt(0.03)), min(0.1, math.sqrt(0.015)), 0]
    assert both.adaptive == pytest.approx(4 * (0.17 / 3 * w[0] + 0.09 / 3 * w[1]))


def test_metrics_are_floats():
    """Flat, with the two states apart."""
    metrics = call().metrics()
    assert all(type(value) is float for value in metrics.values())
    assert metrics["bound/best"] == min(
        metrics[f"bound/{name}"]
        for name in ("classical", "coupling", "pm_kl", "pm_tv", "mixed_kl", "adaptive")
    )
    assert metrics["bound/surrogate"] == call().surrogate
    assert (metrics["bound/exceeded"], metrics["bound/exact"]) == (0.0, 0.0)
    one = call([[0.3]], [1.0], token_kl=[0.1]).metrics()  # a single token has no error
    assert (one["bound/exceeded"], one["bound/exact"]) == (1.0, 1.0)


def test_reward_range_and_tight_constants():
    """Both reach the bounds."""
    plain, wide = call().bounds, call(reward_range=(-1.0, 1.0)).bounds
    assert wide.best == pytest.approx(2 * plain.best)
    assert call(tight=True).bounds.mixed_kl == pytest.approx(plain.mixed_kl / 2)


def test_on_policy_everything_is_zero():
    """No ratio has moved: ``L' = B* = 0``, and nothing is exceeded."""
    got = call([[0.0] * 3] * 2, [1.0, 0.0])
    assert (got.surrogate, got.bounds.best, got.exceeded) == (0.0, 0.0, False)


@pytest.mark.parametrize("seed", range(3))
def test_surrogate_and_sequence_divergences_are_unbiased(seed):
    """Expectation over all samples of two sequences, weighed by their probability."""
    rng = np.random.default_rng(seed)
    pair = Pair(Policy.random(rng, 2, 2), Policy.random(rng, 2, 2))
    p, rewards, ell = pair.roll.sequences, rng.random(4), np.log(pair.ratios)
    surrogate = kl_seq = 0.0
    for i, j in itertools.product(range(4), repeat=2):
        got = certificate([*ell[:, i], *ell[:, j]], [2, 2], rewards[[i, j]])
        surrogate += p[i] * p[j] * got.surrogate
        kl_seq += p[i] * p[j] * got.bounds.kl_seq
    assert surrogate == pytest.approx(pair.surrogate(rewards))
    assert kl_seq == pytest.approx(pair.kl_seq)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0.1, 0.1], [3], [1.0]), r"log_rho has shape \(2,\), but lengths add up to 3"),
        (([0.1], [1.0], [1.0]), r"lengths is \[1\.0\]"),
        (([0.1], [1, 0], [1.0, 1.0]), r"lengths is \[1, 0\]"),
        (([], np.array([], dtype=int), []), r"lengths is \[\]"),
        (([0.1, 900.0], [2], [1.0]), r"log_rho\[1\] is 900"),
        (([0.1, -math.inf], [2], [1.0]), r"log_rho\[1\] is -inf"),
        (([math.nan], [1], [1.0]), r"log_rho\[0\] is nan"),
        (([0.1], [1], [1.0, 1.0]), r"rewards has shape \(2,\); one for each of 1"),
        (([0.1], [1], [1.5]), r"rewards\[0\] is 1\.5, outside of \(0\.0, 1\.0\)"),
        (([0.1], [1], [math.nan]), r"rewards\[0\] is nan"),
    ],
)
def test_impossible_batches_are_refused(arguments, message):
    """What does not fit is quoted."""
    with pytest.raises(BoundError, match=message):
        certificate(*arguments)


def test_impossible_divergences_are_refused():
    """Of another shape; TV without KL; a range upside down."""
    with pytest.raises(BoundError, match=r"token_kl has shape \(1,\); .* \[6\]"):
        call(token_kl=[0.1])
    with pytest.raises(BoundError, match=r"token_tv has shape \(2,\)"):
        call(token_kl=[0.1] * 6, token_tv=[0.1] * 2)
    with pytest.raises(BoundError, match="token_tv without token_kl"):
        call(token_tv=[0.1] * 6)
    with pytest.raises(BoundError, match=r"reward_range is \(1, 0\)"):
        call(reward_range=(1.0, 0.0))
