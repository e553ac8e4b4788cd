"""Atomic gates (Eqs. 10, 12 and App. C.4 of arXiv 2603.08239)."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fiberpo
from core import oracle
from fiberpo import Regime
from fiberpo.gates import budget_clip, log_clip, ratio_clip

F64 = torch.float64
drifts = st.floats(-0.5, 0.5)
budgets = st.floats(0.01, 0.3)
counts = st.sampled_from([1, 2, 3, 8, 32, 1000])


def gate(x, budget, k):
    x = torch.as_tensor(x, dtype=F64)
    return fiberpo.aggregate_gate(
        x, torch.tensor(budget, dtype=F64), torch.tensor(float(k)).to(F64)
    )


@given(drifts, budgets, counts)
def test_aggregate_gate_is_eq10(x, budget, k):
    """Value and slope of every piece."""
    gated = gate([x], budget, k)
    assert gated.value.item() == pytest.approx(oracle.aggregate_gate_eq10(x, budget, k), abs=1e-12)
    assert gated.slope.item() == oracle.aggregate_gate_slope_eq10(x, budget, k)


@given(drifts, budgets, counts)
def test_aggregate_gate_is_the_compact_form(x, budget, k):
    """``g(x, C, k) = clip(x, -m, m)``, ``m = max((k + 1) C - k |x|, 0)``."""
    compact = oracle.aggregate_gate_compact(x, budget, k)
    assert gate([x], budget, k).value.item() == pytest.approx(compact, abs=1e-9)


@given(drifts, budgets, counts)
def test_aggregate_gate_is_odd(x, budget, k):
    """``g(-x) = -g(x)``: residual drifts may be negative."""
    both = gate([x, -x], budget, k).value
    assert both[0].item() == -both[1].item()


@pytest.mark.parametrize("k", [1, 4, 1000])
@pytest.mark.parametrize("edge", ["C", "(1 + 1/k) C"])
def test_aggregate_gate_is_continuous(k, edge):
    """Both kinks join up: ``C`` at ``|x| = C`` and ``0`` at ``(1 + 1/k) C``."""
    at = 0.25 if edge == "C" else 0.25 * (1 + 1 / k)
    step = 1e-9 / k
    low, high = gate([at - step, at + step], 0.25, k).value.tolist()
    assert low == pytest.approx(0.25 if edge == "C" else 0.0, abs=3e-9)
    assert high == pytest.approx(low, abs=3e-9)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_drift_of_exactly_the_budget_passes(sign):
    """``|x| = C`` is still inside."""
    gated = gate([sign * 0.25], 0.25, 4)
    assert (gated.value.item(), gated.slope.item()) == (sign * 0.25, 1.0)
    assert gated.regime.item() == Regime.PASS


def test_upper_edge_of_the_rollback_zone_is_zeroed():
    """``|x| = (1 + 1/k) C`` no longer rolls back."""
    gated = gate([0.5, 0.499], 0.25, 1)
    assert gated.regime.tolist() == [Regime.ZERO, Regime.ROLLBACK]
    assert gated.slope.tolist() == [0.0, -1.0]


def test_regimes_are_three_valued():
    """Pass, rollback and zero come with the value."""
    gated = gate([0.1, -0.26, 0.4], 0.25, 4)
    assert [Regime(r) for r in gated.regime.tolist()] == [
        Regime.PASS, Regime.ROLLBACK, Regime.ZERO
    ]  # fmt: skip


def test_infinite_budget_leaves_the_gate_open():
    """``C = inf``: slope 1 everywhere, in value and autograd."""
    x = torch.tensor([-50.0, 0.0, 3.0], dtype=F64, requires_grad=True)
    gated = gate(x, math.inf, 7)
    (slope,) = torch.autograd.grad(gated.value.sum(), x)
    assert gated.value.tolist() == x.tolist()
    assert slope.tolist() == gated.slope.tolist() == [1.0, 1.0, 1.0]


@given(drifts, budgets, counts)
def test_autograd_of_the_aggregate_gate_is_its_slope(x, budget, k):
    """The graph of ``value`` and the closed-form ``slope`` agree, kinks included."""
    x = torch.tensor([x], dtype=F64, requires_grad=True)
    gated = gate(x, budget, k)
    (slope,) = torch.autograd.grad(gated.value.sum(), x)
    assert slope.tolist() == gated.slope.tolist()


@given(drifts, st.floats(0.01, 0.3))
def test_log_clip_is_eq12(x, epsilon):
    """``clip(x, -epsilon, epsilon)``."""
    gated = log_clip(torch.tensor([x], dtype=F64), epsilon)
    assert gated.value.item() == oracle.log_clip_eq12(x, epsilon)
    assert gated.slope.item() == float(abs(x) <= epsilon)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_residual_of_exactly_epsilon_is_unsaturated(sign):
    """``|u| = epsilon`` keeps slope 1."""
    gated = log_clip(torch.tensor([sign * 0.25], dtype=F64), 0.25)
    assert gated.slope.item() == 1.0
    assert gated.regime.item() == Regime.PASS


def test_ratio_clip_bounds_are_inside():
    """A log ratio at a bound is not saturated; beyond it the value is the bound."""
    gated = ratio_clip(torch.tensor([-0.5, -0.25, 0.0, 0.125, 0.5], dtype=F64), -0.25, 0.125)
    assert gated.value.tolist() == [-0.25, -0.25, 0.0, 0.125, 0.125]
    assert gated.slope.tolist() == [0.0, 1.0, 1.0, 1.0, 0.0]


@given(st.lists(st.floats(-0.4, 0.4), min_size=1, max_size=5), st.floats(0.02, 0.4))
def test_budget_clip_is_def32(log_ratios, delta):
    """All tokens in one state: ``B_i = T delta - sum_{j != i} |r_j - 1|``."""
    x = torch.expm1(torch.tensor(log_ratios, dtype=F64))
    total = x.abs().sum().expand_as(x)
    count = torch.full_like(x, len(x))
    found = 1 + budget_clip(x, total, count, delta).value
    expected = oracle.apc_def32(log_ratios, [0] * len(x), delta)
    assert found.tolist() == pytest.approx(expected, abs=1e-12)


def test_budget_clip_regimes_are_eqs_61_to_63():
    """Fits; overdrawn but the others leave room; the others alone exhaust the budget."""
    x = torch.tensor([0.1, 0.3, 0.3], dtype=F64)
    total = torch.tensor([0.2, 0.5, 0.9], dtype=F64)  # others use 0.1, 0.2, 0.6 of 2 * 0.2
    gated = budget_clip(x, total, torch.full_like(x, 2), 0.2)
    assert gated.regime.tolist() == [Regime.PASS, Regime.ROLLBACK, Regime.ZERO]
    assert gated.value.tolist() == pytest.approx([0.1, 0.2, 0.0])


def test_pass_and_zero_are_neutral_elements():
    """``Pass`` is the identity with slope 1, ``Zero`` the zero map with slope 0."""
    x = torch.tensor([[0.3, -2.0]], dtype=F64)
    site = fiberpo.gates.Site("token", torch.ones(1, dtype=F64))
    through, removed = fiberpo.Pass()(x, site), fiberpo.Zero()(x, site)
    assert through.value.tolist() == x.tolist()
    assert through.slope.tolist() == [[1.0, 1.0]]
    assert removed.value.tolist() == removed.slope.tolist() == [[0.0, 0.0]]
    assert through.regime.unique().tolist() == [Regime.PASS]
    assert removed.regime.unique().tolist() == [Regime.ZERO]


@pytest.mark.parametrize("bad", [0.0, -0.1, math.nan, (0.1,), (0.1, 0.2, 0.3), (0.1, -0.1), "x"])
def test_impossible_budgets_are_refused(bad):
    """A budget is a pair of numbers > 0; the message quotes what was given."""
    bad = (bad, 0.05) if isinstance(bad, float) else bad
    with pytest.raises(fiberpo.BudgetError) as caught:
        fiberpo.Budget.parse(bad)
    quoted = [repr(v) for v in bad] if isinstance(bad, tuple) else [repr(bad)]
    assert any(q in str(caught.value) for q in quoted)
    assert isinstance(caught.value, fiberpo.FiberPOError)
    assert isinstance(caught.value, ValueError)


def test_negative_channel_with_more_room_is_warned_about():
    """``C- > C+`` is legal and rarely meant."""
    with pytest.warns(fiberpo.FiberPOWarning, match=r"0\.05, 0\.12.*C- < C\+"):
        fiberpo.Budget.parse((0.05, 0.12))


@pytest.mark.parametrize("rollback", [0, -1.0, math.nan])
def test_impossible_rollback_is_refused(rollback):
    """``k`` is the token count or a number > 0."""
    with pytest.raises(fiberpo.BudgetError, match=repr(rollback)):
        fiberpo.AggregateGate((0.12, 0.05), rollback)


@pytest.mark.parametrize("epsilon", [0.0, -0.2, math.nan])
def test_impossible_epsilons_are_refused(epsilon):
    """Every clip needs room."""
    for make in (fiberpo.LogClip, fiberpo.RatioClip, fiberpo.BudgetClip):
        with pytest.raises(fiberpo.BudgetError, match=repr(epsilon)):
            make(epsilon)


def test_plain_clip_has_no_dual_clip():
    """The dual clip bounds a side that the plain form clips already."""
    with pytest.raises(fiberpo.ObjectiveError, match="sign_aware=True"):
        fiberpo.RatioClip(0.2, sign_aware=False, dual_clip=3.0)
