"""Sequence masks (Trust Region Masking, arXiv 2512.23075): multiply, never renormalise."""

import dataclasses
import math

import numpy as np
import pytest
import torch

import fiberpo
from core.cases import F64, packed, random_case
from fiberpo import (
    Certainty,
    LengthNeutral,
    MaxDivergence,
    MeanDivergence,
    Renormalised,
    TokenDivergence,
    corrections,
    recipes,
)
from fiberpo.masks import certainty_of
from fiberpo.testing import assert_partition_invariant


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


# ------------------------------------------------------------------ exact KL, certainty, length


def exact(values, certainty=Certainty.EXACT):
    return TokenDivergence(torch.tensor(values, dtype=F64), certainty)


def test_masks_on_the_carried_divergence():
    """Max and mean of the KL by hand, whatever the sampled tokens say."""
    divergence = exact([0.0, 0.2, 0.1, 0.1, 0.1])
    data = batch([5.0, 0.0, 0.0, 0.0, 0.0], [2, 3], token_divergence=divergence)
    assert MaxDivergence(0.2, "kl")(data).tolist() == [True, True]
    assert MaxDivergence(0.15, "kl")(data).tolist() == [False, True]
    assert MeanDivergence(0.101, "kl")(data).tolist() == [True, True]
    assert MeanDivergence(0.099, "kl")(data).tolist() == [False, False]


def test_estimators_can_be_exchanged():
    """k3 of the worst token, k2 of the mean."""
    data = batch([0.4, 0.0], [2])
    k3 = math.exp(0.4) - 1 - 0.4
    assert MaxDivergence(k3 + 1e-9, "k3")(data).tolist() == [True]
    assert MaxDivergence(k3 - 1e-9, "k3")(data).tolist() == [False]
    assert MeanDivergence(0.04 + 1e-9, "k2")(data).tolist() == [True]
    assert MeanDivergence(0.04 - 1e-9, "k2")(data).tolist() == [False]


def test_unknown_estimators_and_missing_columns_are_refused():
    """k1 is signed; the KL must be there."""
    with pytest.raises(fiberpo.ObjectiveError, match="'k1'"):
        MaxDivergence(0.1, estimator="k1")
    with pytest.raises(fiberpo.ObjectiveError, match="token_divergence"):
        MaxDivergence(0.1, "kl")(batch([0.0], [1]))


def test_masks_say_what_they_know():
    """Estimated by default, for kl as the batch says, of two the weaker."""
    data = batch([0.0], [1], token_divergence=exact([0.0]))
    bounded = batch([0.0], [1], token_divergence=exact([0.0], Certainty.LOWER_BOUND))
    largest, mean = MaxDivergence(0.1, "kl"), MeanDivergence(0.1)
    assert certainty_of(largest, data) is Certainty.EXACT
    assert certainty_of(largest, bounded) is Certainty.LOWER_BOUND
    assert certainty_of(mean, data) is Certainty.ESTIMATED
    assert certainty_of(largest & MeanDivergence(0.1, "kl"), data) is Certainty.EXACT
    assert certainty_of(largest & mean, data) is Certainty.ESTIMATED
    assert certainty_of(Renormalised(largest), data) is Certainty.EXACT
    assert certainty_of(LengthNeutral(0.1, tv_max=0.1), data) is Certainty.ESTIMATED
    assert certainty_of(lambda b: b.lengths > 0, data) is Certainty.ESTIMATED


@pytest.mark.parametrize(
    ("certainty", "expected"), [(Certainty.EXACT, 1.0), (Certainty.LOWER_BOUND, 0.0)]
)
def test_certified_is_logged(certainty, expected):
    """Only for the exact KL."""
    data = batch([0.0], [1], token_divergence=exact([0.0], certainty))
    metrics = recipes.grpo(mask=MaxDivergence(0.1, "kl"))(data).metrics()
    assert metrics["mask/certified"] == expected
    assert recipes.grpo(mask=MaxDivergence(0.1))(data).metrics()["mask/certified"] == 0.0


def test_acceptance_by_length():
    """Bins by powers of two; every trajectory counts once; no mask, no metric."""
    lengths = [1, 2, 3, 3, 4]
    log_rho = [0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0]
    out = recipes.grpo(mask=MaxDivergence(0.05))(batch(log_rho, lengths)).metrics()
    found = {k: v for k, v in out.items() if k.startswith("mask/kept")}
    assert found == pytest.approx(
        {"mask/kept": 3 / 5, "mask/kept/length=1": 1.0, "mask/kept/length=2-3": 2 / 3,
         "mask/kept/length=4-7": 0.0}
    )  # fmt: skip
    assert not any(k.startswith("mask/") for k in recipes.grpo()(batch([0.0], [1])).metrics())


def weights_oracle(length, eps):
    return [min(1.0, (length - 1 - t) * eps) for t in range(length)]


def test_length_neutral_mask_by_loops():
    """``W / sum w <= threshold`` with ``w_t = min(1, (T-t) eps)``; T = 1 is kept."""
    rng = np.random.default_rng(0)
    lengths = [1, 2, 5, 9, 4]
    log_rho = rng.normal(0, 0.3, sum(lengths)).tolist()
    log_rho[0] = 5.0
    data = batch(log_rho, lengths)
    for threshold in (0.05, 0.15, 0.25, 0.4):
        expected, start = [], 0
        for length in lengths:
            w = weights_oracle(length, 0.2)
            total = math.fsum(
                abs(math.exp(x) - 1) * y for x, y in zip(log_rho[start : start + length], w)
            )
            expected.append(total <= threshold * math.fsum(w))
            start += length
        assert LengthNeutral(threshold, tv_max=0.2)(data).tolist() == expected
        assert expected[0]
    assert len({*expected}) == 1  # the largest threshold keeps all of these
    assert LengthNeutral(0.15, tv_max=0.2)(data).tolist().count(False) >= 2


def test_length_neutral_weighs_early_tokens_more():
    """The same drift at the first and at the last token: only the first can be followed."""
    data = batch([0.5, 0.0, 0.0, 0.0, 0.0, 0.5], [3, 3])
    assert LengthNeutral(0.2, kl_max=0.01)(data).tolist() == [False, True]


def test_length_neutral_needs_whole_trajectories():
    """Whole rows in any order of ids are fine; pieces are refused, here and on other ranks."""
    ids = {"trajectory": ["b", "a"]}
    data = batch([0.5, 0.0, 0.0, 0.0, 0.0, 0.5], [3, 3], labels=ids)
    kept = LengthNeutral(0.2, kl_max=0.01)(data)
    assert kept[data.trajectory].tolist() == [False] * 3 + [True] * 3
    pieces = batch([0.5, 0.0], [1, 1], labels={"trajectory": ["a", "a"]})
    with pytest.raises(fiberpo.ObjectiveError, match="pieces in no known order"):
        LengthNeutral(0.2, kl_max=0.01)(pieces)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"threshold": 0.0, "tv_max": 0.1}, fiberpo.BudgetError),
        ({"threshold": 0.1}, fiberpo.ObjectiveError),
        ({"threshold": 0.1, "tv_max": 2.0}, fiberpo.BoundError),
        ({"threshold": 0.1, "kl_max": -1.0}, fiberpo.BoundError),
    ],
)
def test_impossible_length_neutral_masks_are_refused(arguments, error):
    """Each argument in its range."""
    with pytest.raises(error):
        LengthNeutral(**arguments)


# ------------------------------------------------------------------------------- composition


RECIPES = [recipes.ppo(), recipes.gspo(), recipes.apc(), recipes.fiberpo(), recipes.dr_grpo(4)]


@pytest.mark.parametrize("objective", RECIPES, ids=lambda o: o.name)
@pytest.mark.parametrize("scale", [False, True])
def test_renormalised_is_the_other_denominator(objective, scale):
    """``sum mu`` of the kept trajectories becomes that of all; the plain mask leaves it alone."""
    log_ratios = [1e-5, -1e-5, 2e-5, 1e-5, -2e-5]
    data = batch([0.0, 0.0, 1.0, 0.0, 0.0], [2, 2, 1], log_ratios=log_ratios)
    plain, mask = objective(data), MaxDivergence(0.05)
    out = dataclasses.replace(objective, mask=Renormalised(mask) if scale else mask)(data)
    mu = plain.weight / data.advantages
    factor = mu.sum() / mu[[0, 1, 4]].sum() if scale else 1.0
    expected = plain.coefficients * factor
    expected[2:4] = 0.0
    torch.testing.assert_close(out.coefficients, expected, rtol=1e-12, atol=1e-15)


def test_renormalised_with_nothing_kept_is_a_zero_loss():
    """No 0 / 0."""
    out = recipes.grpo(mask=Renormalised(MaxDivergence(0.05)))(batch([1.0, 1.0], [1, 1]))
    assert out.loss.item() == 0.0
    assert out.coefficients.tolist() == [0.0, 0.0]


def test_renormalised_goes_around_the_whole():
    """Inside an AND its denominator would be lost; of parts its denominator is not known."""
    mask = MaxDivergence(0.05)
    with pytest.raises(fiberpo.ObjectiveError, match=r"Renormalised\(a & b\)"):
        mask & Renormalised(mask)
    with pytest.raises(fiberpo.ObjectiveError, match="Renormalised"):
        recipes.grpo(mask=Renormalised(mask))(
            batch([0.0], [1]), denominators=fiberpo.Denominators(2, 2)
        )


def drifted(seed=0):
    """12 trajectories in groups, rollout and KL columns, some masked."""
    case = random_case(seed)
    rng = np.random.default_rng(seed)
    ell = torch.tensor(case.log_ratios, dtype=F64)
    rollout = torch.tensor(rng.normal(0, 0.15, len(ell)))
    kl = TokenDivergence(torch.tensor(rng.exponential(0.02, len(ell))), Certainty.EXACT)
    return case.batch(rollout_log_probs=rollout, token_divergence=kl)


MASKS = {
    "max": MaxDivergence(0.05),
    "mean": MeanDivergence(0.03),
    "both": MaxDivergence(0.1) & MeanDivergence(0.03),
    "kl": MaxDivergence(0.05, "kl"),
    "renormalised": Renormalised(MaxDivergence(0.05)),
    "opsm": corrections.OPSM(0.05),
    "geometric": corrections.GeometricMask(0.95, 1.05),
}


@pytest.mark.parametrize("split", [False, True], ids=["whole", "pieces"])
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.filterwarnings("ignore::fiberpo.FiberPOWarning")
def test_masks_survive_any_cut(name, split):
    """Loss, coefficients and metrics of any micro-batches, ranks and pieces."""
    data = drifted()
    objective = recipes.fiberpo(mask=MASKS[name])
    kept = objective(data).kept
    assert 0 < int(kept.sum()) < 12
    assert_partition_invariant(objective, data, split_trajectories=split, trials=3)


@pytest.mark.filterwarnings("ignore::fiberpo.FiberPOWarning")
def test_length_neutral_survives_any_cut_between_trajectories():
    """Trajectories whole, wherever they lie."""
    objective = recipes.fiberpo(mask=LengthNeutral(0.2, tv_max=0.1))
    assert 0 < int(objective(drifted()).kept.sum()) < 12
    assert_partition_invariant(objective, drifted(), trials=3)
