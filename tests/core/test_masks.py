"""Sequence masks (Trust Region Masking, arXiv 2512.23075): multiply, never renormalise."""

import math

import pytest
import torch

import fiberpo
from core.cases import F64, packed
from fiberpo import MaxDivergence, MeanDivergence, recipes


def batch(log_rho, lengths, log_ratios=None, **more):
    """A batch with given ``log pi_theta / pi_rollout``; on-policy towards the anchor by default."""
    log_ratios = [0.0] * len(log_rho) if log_ratios is None else log_ratios
    rollout = torch.tensor(log_ratios, dtype=F64) - torch.tensor(log_rho, dtype=F64)
    return packed(log_ratios, [1.0] * len(log_rho), lengths, rollout_log_probs=rollout, **more)


@pytest.mark.parametrize(("log_rho", "kept"), [(0.31, True), (0.32, False), (-0.32, False)])
def test_max_divergence_is_k2_of_the_worst_token(log_rho, kept):
    """``(log rho)^2 / 2 <= 0.05`` iff ``|log rho| <= 0.3162``."""
    mask = MaxDivergence(0.05)(batch([0.0, log_rho, 0.1, 0.1], [2, 2]))
    assert mask.tolist() == [kept, True]


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_mean_divergence_is_k3(sign):
    """``mean (rho - 1 - log rho)``: signed drifts do not cancel, as they would in k1."""
    log_rho = [sign * 0.1, -sign * 0.1]
    k3 = sum(math.exp(x) - 1 - x for x in log_rho) / 2
    data = batch(log_rho, [2])
    assert MeanDivergence(k3 * 1.001)(data).tolist() == [True]
    assert MeanDivergence(k3 * 0.999)(data).tolist() == [False]


def test_divergence_of_exactly_delta_is_kept():
    """``<=``: log rho = 0.5 has k2 = 0.125 exactly."""
    assert MaxDivergence(0.125)(batch([0.5], [1])).tolist() == [True]


def test_mean_divergence_of_exactly_delta_is_kept():
    """The threshold is the very float that the mean of one token gives."""
    log_rho = torch.tensor(0.5, dtype=F64)
    k3 = (torch.expm1(log_rho) - log_rho).item()
    assert MeanDivergence(k3)(batch([0.5], [1])).tolist() == [True]


def test_masks_combine_with_and():
    """First trajectory fails the max, second the mean, third neither."""
    data = batch([0.4] + [0.0] * 5 + [0.2, 0.2, 0.0, 0.1], [6, 2, 2])
    a, b = MaxDivergence(0.05), MeanDivergence(0.0195)
    assert a(data).tolist() == [False, True, True]
    assert b(data).tolist() == [True, False, True]  # k3(0.4) / 6 = 0.0153, k3(0.2) = 0.0214
    assert (a & b)(data).tolist() == [False, False, True]
    assert (a & b & a)(data).tolist() == [False, False, True]


@pytest.mark.parametrize("name", ["ppo", "grpo", "gspo", "fiberpo", "apc"])
def test_mask_multiplies_and_never_renormalises(name):
    """Coefficients of kept trajectories stay those of the unmasked batch; the others are 0."""
    recipe = getattr(recipes, name)
    data = batch([0.0, 0.0, 1.0, 0.0], [2, 2], log_ratios=[1e-5, -1e-5, 2e-5, 1e-5])
    plain, masked = recipe()(data), recipe(mask=MaxDivergence(0.05))(data)
    assert torch.equal(masked.coefficients[:2], plain.coefficients[:2])
    assert masked.coefficients[2:].tolist() == [0.0, 0.0]
    assert masked.weight[:2].tolist() == plain.weight[:2].tolist()


def test_masked_loss_by_hand():
    """Two trajectories of two tokens, one masked: ``J = 2 * 1/4``, not ``2 * 1/2``."""
    out = recipes.grpo(mask=MaxDivergence(0.05))(batch([0.0, 0.0, 1.0, 0.0], [2, 2]))
    assert out.loss.item() == pytest.approx(-0.5)


def test_masked_trajectory_still_counts_in_the_contexts_above():
    """A mask stops a trajectory's terms; the drift of its group is still what it is."""
    labels = {"group": torch.tensor([0, 0])}
    ell = [0.1, 0.1, 0.3, 0.3]
    data = batch([0.0, 0.0, 1.0, 1.0], [2, 2], log_ratios=ell, labels=labels)
    budgets = {"group": (0.12, 0.05), "trajectory": (0.12, 0.05)}
    plain = recipes.fiberpo_domain(budgets)(data)
    masked = recipes.fiberpo_domain(budgets, mask=MaxDivergence(0.05))(data)
    assert torch.equal(masked.log_gated_ratio, plain.log_gated_ratio)


@pytest.mark.parametrize("pessimistic", [False, True])
def test_masked_gradient_is_autograd(pessimistic):
    """The same coefficients with the mask in the graph."""
    log_rho, log_ratios = [0.0, 0.1, 0.5, 0.0, 0.1], [0.13, 0.14, 0.3, -0.1, 0.02]
    objective = recipes.fiberpo(mask=MaxDivergence(0.05), rollback=2.0, pessimistic=pessimistic)
    data = batch(log_rho, [2, 1, 2], log_ratios=log_ratios, grad=True)
    out = objective(data, gradient="autograd")
    out.loss.backward()
    assert out.coefficients.tolist() == pytest.approx((-data.log_probs.grad).tolist(), abs=1e-14)
    assert out.coefficients[2].item() == 0.0
    assert out.coefficients[0].item() != 0.0


def test_everything_masked_is_a_zero_loss():
    """Not an error, and no 0 / 0."""
    out = recipes.grpo(mask=MaxDivergence(0.05))(batch([1.0, 1.0], [1, 1]))
    assert out.loss.item() == 0.0
    assert out.coefficients.tolist() == [0.0, 0.0]


def test_masked_trajectory_with_an_overflowing_ratio_is_harmless():
    """``exp(900)`` is infinite: a masked trajectory must not turn the loss into 0 * inf."""
    data = batch([900.0, 0.0], [1, 1], log_ratios=[900.0, 0.0])
    advantages = torch.tensor([-1.0, 1.0], dtype=F64)
    data = fiberpo.RatioBatch.from_packed(
        data.log_probs, data.old_log_probs, advantages, [1, 1],
        rollout_log_probs=data.rollout_log_probs,
    )  # fmt: skip
    out = recipes.ppo(mask=MaxDivergence(0.05))(data)
    assert out.loss.item() == pytest.approx(-0.5)
    assert out.coefficients.tolist() == pytest.approx([0.0, 0.5])


def test_mask_without_rollout_log_probs_is_refused():
    """The message names the argument."""
    with pytest.raises(fiberpo.ObjectiveError, match="rollout_log_probs"):
        recipes.grpo(mask=MeanDivergence(0.001))(packed([0.0], [1.0], [1]))


@pytest.mark.parametrize("mask", [MaxDivergence, MeanDivergence])
@pytest.mark.parametrize("delta", [0.0, -1.0, math.nan])
def test_impossible_thresholds_are_refused(mask, delta):
    """delta > 0, quoted."""
    with pytest.raises(fiberpo.BudgetError, match=repr(delta)):
        mask(delta)


def test_own_masks_are_any_callable():
    """A mask is a function from the batch to one boolean a trajectory."""

    class Short:
        def __call__(self, data):
            return data.lengths <= 1

    out = recipes.grpo(mask=Short())(packed([0.0] * 3, [1.0] * 3, [1, 2]))
    assert out.coefficients.tolist() == pytest.approx([0.5, 0.0, 0.0])
