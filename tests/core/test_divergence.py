"""KL of the full vocabulary, its lower bound from the top-k, and how a batch carries them."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fiberpo
from core.cases import F64, packed
from fiberpo import Certainty, TokenDivergence, full_divergence, top_k_divergence


def softmax(row):
    top = max(row)
    total = math.fsum(math.exp(x - top) for x in row)
    return [math.exp(x - top) / total for x in row]


def kl(p, q):
    """``sum p log p/q`` by loops; 0 log 0 = 0."""
    return math.fsum(a * math.log(a / b) for a, b in zip(p, q) if a > 0)


def logits(seed, *shape, scale=2.0):
    return torch.as_tensor(np.random.default_rng(seed).normal(0, scale, shape))


@pytest.mark.parametrize("at_once", [None, 1, 4])
def test_full_divergence_is_the_sum_over_the_vocabulary(at_once):
    """KL(rollout || current), in this direction, whatever the chunk; shape of the tokens kept."""
    rollout, current = logits(0, 2, 5, 7), logits(1, 2, 5, 7)
    found = full_divergence(rollout, current, tokens_at_once=at_once)
    assert found.certainty is Certainty.EXACT
    for b in range(2):
        for t in range(5):
            p, q = softmax(rollout[b, t].tolist()), softmax(current[b, t].tolist())
            assert found.values[b, t].item() == pytest.approx(kl(p, q), rel=1e-12)
            assert abs(kl(p, q) - kl(q, p)) > 1e-3  # the two directions differ here


def test_small_divergences_are_exact():
    """Of logits in float32 that differ by 1e-5, to 1e-15: far below any threshold."""
    rollout = logits(2, 3, 50).float()
    current = rollout + 1e-5 * logits(3, 3, 50).float()
    found = full_divergence(rollout, current).values
    for t in range(3):
        p, q = softmax(rollout[t].double().tolist()), softmax(current[t].double().tolist())
        assert found[t].item() == pytest.approx(kl(p, q), abs=1e-15)
        assert found[t].item() > 0


def test_words_that_a_policy_excludes():
    """Excluded by the rollout: no term. Excluded by the current policy alone: infinite."""
    some = torch.log(torch.tensor([[0.5, 0.5, 0.0]], dtype=F64))
    every = torch.log(torch.tensor([[0.25, 0.25, 0.5]], dtype=F64))
    assert full_divergence(some, every).values.tolist() == pytest.approx([math.log(2)])
    assert full_divergence(every, some).values.tolist() == [math.inf]


@given(seed=st.integers(0, 10_000), k=st.integers(1, 9))
def test_top_k_is_a_lower_bound_that_grows_to_the_exact_value(seed, k):
    """The formula by loops; never above the full KL; equal from ``k = V - 1`` on."""
    rollout, current = logits(seed, 3, 9), logits(seed + 1, 3, 9)
    top = torch.log_softmax(rollout, -1).topk(k)
    found = top_k_divergence(top.values, top.indices, current)
    exact = full_divergence(rollout, current).values
    for t in range(3):
        p, q = softmax(rollout[t].tolist()), softmax(current[t].tolist())
        stored = top.indices[t].tolist()
        rest = [v for v in range(9) if v not in stored]
        merged = kl(
            [p[v] for v in stored] + [math.fsum(p[v] for v in rest)],
            [q[v] for v in stored] + [math.fsum(q[v] for v in rest) or 1.0],
        )
        assert found.values[t].item() == pytest.approx(merged, rel=1e-9, abs=1e-12)
    assert bool((found.values <= exact + 1e-12).all())
    if k >= 8:
        assert found.certainty is Certainty.EXACT
        torch.testing.assert_close(found.values, exact, rtol=1e-9, atol=1e-12)
    else:
        assert found.certainty is Certainty.LOWER_BOUND


def test_stored_float32_rounding_does_not_explode():
    """All mass in the top-k up to rounding, almost none of the current policy's outside."""
    current = torch.tensor([[0.0, 0.0, -80.0, -80.0]], dtype=F64)
    top = torch.log(torch.tensor([[0.5, 0.4999999]]))
    found = top_k_divergence(top, torch.tensor([[0, 1]]), current)
    assert found.values.item() < 2e-5


def test_divergence_errors():
    """Shapes that do not fit, ids twice, logits for log-probs."""
    with pytest.raises(fiberpo.ShapeError, match=r"\(2, 3\)"):
        full_divergence(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(fiberpo.ShapeError, match="token_ids"):
        top_k_divergence(torch.zeros(2, 3), torch.zeros(2, 2).long(), torch.zeros(2, 4))
    with pytest.raises(fiberpo.ShapeError, match="twice"):
        top_k_divergence(torch.full((1, 2), -1.0), torch.tensor([[1, 1]]), torch.zeros(1, 4))
    with pytest.raises(fiberpo.ShapeError, match="not logits"):
        top_k_divergence(torch.ones(1, 2), torch.tensor([[0, 1]]), torch.zeros(1, 4))
    assert full_divergence(torch.zeros(0, 3), torch.zeros(0, 3)).values.tolist() == []


def test_certainties_combine_to_the_weaker():
    """EXACT > LOWER_BOUND > ESTIMATED."""
    exact, lower, estimated = Certainty
    assert exact & exact is exact
    assert lower & exact is lower
    assert exact & estimated is estimated
    assert estimated & lower is estimated


def carried(values, certainty=Certainty.EXACT):
    return TokenDivergence(torch.tensor(values, dtype=F64), certainty)


def test_a_batch_carries_the_divergence():
    """Through select and concatenate; another policy does not inherit it."""
    data = packed([0.0] * 3, [1.0] * 3, [2, 1], token_divergence=carried([0.1, 0.2, 0.3]))
    assert data.select(torch.tensor([1, 0])).token_divergence.values.tolist() == [0.3, 0.1, 0.2]
    other = packed([0.0], [1.0], [1], token_divergence=carried([0.4], Certainty.LOWER_BOUND))
    whole = fiberpo.RatioBatch.concatenate([data, other])
    assert whole.token_divergence.values.tolist() == [0.1, 0.2, 0.3, 0.4]
    assert whole.token_divergence.certainty is Certainty.LOWER_BOUND
    moved = data.with_log_probs(data.log_probs + 0.1)
    assert moved.token_divergence is None
    moved = data.with_log_probs(data.log_probs + 0.1, carried([0.5, 0.5, 0.5]))
    assert moved.token_divergence.values.tolist() == [0.5] * 3


def test_padded_divergence_is_masked():
    """What stands under the mask may be anything."""
    zeros, mask = torch.zeros(2, 2), torch.tensor([[True, False], [True, True]])
    data = fiberpo.RatioBatch.from_padded(
        zeros, zeros, torch.ones(2), mask, token_divergence=carried([[0.1, math.nan], [0.2, 0.3]])
    )
    assert data.token_divergence.values.tolist() == [0.1, 0.2, 0.3]


@pytest.mark.parametrize(
    ("given_", "error", "quoted"),
    [
        (torch.zeros(2), fiberpo.ShapeError, "Tensor; wrap it"),
        (carried([0.1]), fiberpo.ShapeError, r"\(1,\)"),
        (carried([0.1, math.inf]), fiberpo.NonFiniteError, "token_divergence is inf at loss token"),
        (carried([0.1, -0.2]), fiberpo.NonFiniteError, "-0.2 at token 1"),
    ],
)
def test_refused_divergences(given_, error, quoted):
    """Type, shape, finiteness and sign, each quoted."""
    with pytest.raises(error, match=quoted):
        packed([0.0, 0.0], [1.0, 1.0], [2], token_divergence=given_)


def test_parts_must_agree_on_the_divergence():
    """One part with, one without."""
    parts = [packed([0.0], [1.0], [1], token_divergence=carried([0.1])), packed([0.0], [1.0], [1])]
    with pytest.raises(fiberpo.StrataError, match="token_divergence"):
        fiberpo.RatioBatch.concatenate(parts)
