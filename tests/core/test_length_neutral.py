"""The length-neutral form of a sequence mask, against loops."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fiberpo import BoundError
from fiberpo.length_neutral import future_weights, keep_length_neutral
from fiberpo.theory.bounds import adaptive

F64 = torch.float64


def oracle_weights(length, eps, delta):
    """``w_t = min(1, (T-t) eps, sqrt((T-t) delta/2))`` for t = 1 .. T."""
    return [
        min(
            1.0,
            math.inf if eps is None else (length - t) * eps,
            math.inf if delta is None else math.sqrt((length - t) * delta / 2),
        )
        for t in range(1, length + 1)
    ]


def oracle_mean(log_rho, eps, delta):
    """``W / sum w``, None where all weights are 0."""
    weights = oracle_weights(len(log_rho), eps, delta)
    if sum(weights) == 0:
        return None
    distance = [abs(math.exp(x) - 1) for x in log_rho]
    return sum(w * d for w, d in zip(weights, distance, strict=True)) / sum(weights)


def keep(rows, threshold, **options):
    log_rho = torch.tensor([x for row in rows for x in row], dtype=F64)
    lengths = torch.tensor([len(row) for row in rows])
    return keep_length_neutral(log_rho, lengths, threshold, **options).tolist()


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=5), seed=st.integers(0, 99),
    eps=st.none() | st.floats(0, 1), delta=st.floats(0, 2),
    threshold=st.floats(0.01, 1),
)  # fmt: skip
def test_mask_is_the_loops(lengths, seed, eps, delta, threshold):
    """Weights and decisions of ragged batches."""
    rng = np.random.default_rng(seed)
    rows = [rng.normal(0, 0.5, length).tolist() for length in lengths]
    weights = future_weights(torch.tensor(lengths), tv_max=eps, kl_max=delta)
    assert weights.dtype == F64
    expected = [w for length in lengths for w in oracle_weights(length, eps, delta)]
    assert weights.tolist() == pytest.approx(expected)
    means = [oracle_mean(row, eps, delta) for row in rows]
    told = [mean is None or mean <= threshold for mean in means]
    assert keep(rows, threshold, tv_max=eps, kl_max=delta) == told


@pytest.mark.parametrize("kl_max", [None, 0.01])
def test_weights_are_those_of_the_adaptive_bound(kl_max):
    """``4 sum_t mean_tv_t w_t``."""
    weights = future_weights(torch.tensor([9]), tv_max=0.05, kl_max=kl_max)
    means = np.linspace(0.0, 0.05, 9)
    bound = adaptive(means, tv_max=0.05, kl_max=kl_max)
    assert bound == pytest.approx(4 * float(weights.numpy() @ means))


def test_one_token_is_kept():
    """T = 1: nothing follows that could have drifted, however large the ratio."""
    assert keep([[5.0], [5.0, 0.0]], 0.1, tv_max=0.1) == [True, False]


def test_last_token_does_not_count():
    """``w_T = 0``, and 0 times an infinite ratio is not NaN."""
    assert keep([[0.0, 0.0, 2000.0], [0.0, 2000.0, 0.0]], 0.1, tv_max=0.1) == [True, False]


def test_no_divergence_keeps_everything():
    """eps = 0: all weights are 0."""
    assert keep([[3.0, 3.0]], 0.1, tv_max=0.0) == [True]


def test_the_threshold_itself_is_kept():
    """rho = 1/2 at every token: the mean is 0.5 whatever the weights."""
    half = [-math.log(2)] * 8
    assert keep([half], 0.5 + 1e-12, tv_max=0.1) == [True]
    assert keep([half], 0.5 - 1e-12, tv_max=0.1) == [False]
    assert keep([[-800.0, 0.0]], 1.0, tv_max=1.0) == [True]  # rho = 0: exactly 1


def test_float32_log_ratios_are_summed_in_float64():
    """A long sequence at the threshold."""
    log_rho = torch.full((100_000,), 0.01)
    exact = math.expm1(float(log_rho[0]))
    lengths = torch.tensor([100_000])
    assert keep_length_neutral(log_rho, lengths, exact * (1 + 1e-9), kl_max=1e-5).tolist() == [True]
    assert keep_length_neutral(log_rho, lengths, exact * (1 - 1e-9), kl_max=1e-5).tolist() == [
        False
    ]


@pytest.mark.parametrize(
    ("threshold", "options", "message"),
    [
        (0.1, {}, "neither tv_max nor kl_max"),
        (0.0, {"tv_max": 0.1}, "threshold is 0; it must be > 0"),
        (math.nan, {"tv_max": 0.1}, "threshold is nan"),
        (0.1, {"tv_max": 2.0}, "tv_max is 2; a total variation"),
        (0.1, {"kl_max": -1.0}, "kl_max is -1; a KL divergence"),
    ],
)
def test_impossible_settings_are_refused(threshold, options, message):
    """Quoted."""
    with pytest.raises(BoundError, match=message):
        keep([[0.0, 0.0]], threshold, **options)


def test_lengths_that_do_not_fit_are_refused():
    """The packed tokens must be those of the lengths."""
    with pytest.raises(BoundError, match="lengths add up to 3, but log_rho has 2"):
        keep_length_neutral(torch.zeros(2), torch.tensor([3]), 0.1, tv_max=0.1)
