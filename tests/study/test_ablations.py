"""Objectives that differ in one decision: by hand, and equal to the originals where it is idle."""

import pytest
import torch

from fiberpo import RatioBatch, Regime, recipes
from fiberpo.study import ablations

WIDE = {"domain": (9.0, 9.0), "group": (9.0, 9.0), "trajectory": (9.0, 9.0)}
TIGHT = {"domain": (0.03, 0.02), "group": (0.05, 0.04), "trajectory": (0.08, 0.06)}


def some_batch(seed=0, rows=16):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 9, (rows,), generator=generator)
    old = -torch.rand(int(lengths.sum()), generator=generator, dtype=torch.float64)
    new = old + 0.1 * torch.randn(len(old), generator=generator, dtype=torch.float64)
    groups = torch.arange(rows) // 4
    return RatioBatch.from_packed(
        new.requires_grad_(), old, torch.randn(rows, generator=generator, dtype=torch.float64),
        lengths, labels={"domain": groups // 2, "group": groups},
    )  # fmt: skip


def one_answer(*log_ratios, advantage=1.0):
    new = torch.tensor(log_ratios, dtype=torch.float64) - 1
    old = torch.full_like(new, -1)
    advantages = torch.tensor([advantage], dtype=torch.float64)
    return RatioBatch.from_packed(new, old, advantages, [len(new)])


def test_gated_residual_cancels_the_gate():
    """l = 0.3 everywhere: the gate rolls back to 0, the wrong residual puts the ratio back."""
    batch, budgets = one_answer(0.3, 0.3, 0.3, 0.3), {"trajectory": (0.2, 0.2)}
    wrong = ablations.gated_residual(budgets, 0.2)(batch)
    right = recipes.fiberpo_domain(budgets, 0.2)(batch)
    assert wrong.log_gated_ratio.tolist() == pytest.approx([0.2] * 4)
    assert right.log_gated_ratio.tolist() == pytest.approx([0.0] * 4)


@pytest.mark.parametrize("pessimistic", [False, True])
def test_gradient_of_the_gated_residual_by_differences(pessimistic):
    objective = ablations.gated_residual(TIGHT, 0.05, pessimistic)
    batch, step = some_batch(), 1e-6
    found = objective(batch).coefficients
    base = batch.log_probs.detach()
    for i in range(0, len(base), 7):
        losses = []
        for sign in (1, -1):
            moved = base.clone()
            moved[i] += sign * step
            losses.append(float(objective(batch.with_log_probs(moved)).loss))
        slope = (losses[1] - losses[0]) / (2 * step)
        assert float(found[i]) == pytest.approx(slope, abs=1e-5)


def test_with_wide_budgets_residuals_make_no_difference():
    batch = some_batch(1)
    wrong = ablations.gated_residual(WIDE, 9.0)(batch)
    right = recipes.fiberpo_domain(WIDE, 9.0)(batch)
    assert torch.allclose(wrong.coefficients, right.coefficients, atol=1e-12)
    tight = ablations.gated_residual(TIGHT, 0.05)(batch).coefficients
    assert not torch.allclose(tight, recipes.fiberpo_domain(TIGHT, 0.05)(batch).coefficients)


def test_single_mean_does_not_see_drifts_that_cancel():
    """Half up, half down: the signed mean is 0 and passes, both channels are out of budget."""
    batch, budgets = one_answer(0.3, -0.3), {"trajectory": (0.1, 0.1)}
    one = ablations.single_mean(budgets, 1.0)(batch)
    two = recipes.fiberpo_domain(budgets, 1.0)(batch)
    assert one.regimes["trajectory"].tolist() == [[Regime.PASS]]
    assert two.regimes["trajectory"].tolist() == [[Regime.ZERO], [Regime.ZERO]]
    assert one.coefficients.tolist() != two.coefficients.tolist()


def coefficients(objective, batch):
    return objective(batch).coefficients.tolist()


def test_stops_by_hand():
    """Three tokens of weight 1/3; S+ = S- = 0.1 of 3 tokens, budget 0.05, epsilon 1, A > 0."""
    batch, budgets = one_answer(0.3, 0.0, -0.3), {"trajectory": (0.05, 0.05)}
    third = pytest.approx(1 / 3)
    assert coefficients(recipes.fiberstop(budgets, 1.0), batch) == [0, 0, third]
    assert coefficients(ablations.stop_net(budgets, 1.0), batch) == [third, third, third]
    assert coefficients(ablations.stop_every(budgets, 1.0), batch) == [0, 0, 0]
    ratio = coefficients(ablations.stop_ratio(budgets, 1.0), batch)
    assert ratio == [0, 0, pytest.approx(float(torch.tensor(-0.3).exp()) / 3)]


def test_stop_every_says_what_it_stops():
    out = ablations.stop_every({"trajectory": (0.05, 0.05)}, 1.0)(one_answer(0.3, 0.0, -0.3))
    assert out.metrics()["stop/trajectory"] == 1
    assert out.stopped[0].kept.tolist() == [0, 0, 0]
