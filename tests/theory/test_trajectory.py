"""The two-scale map and the gates, against the loops of the core oracle."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core import oracle
from fiberpo.theory import gates, trajectory
from fiberpo.theory.batches import directed
from fiberpo.theory.trajectory import TwoScale

log_ratios = st.lists(st.floats(-0.4, 0.4), min_size=1, max_size=7)
budgets = st.tuples(st.floats(0.02, 0.3), st.floats(0.01, 0.1))
slopes = st.sampled_from([None, 1.0, 2.5, 32.0])


def parameters(budget, epsilon, k):
    return TwoScale(*budget, epsilon, k)


@given(st.floats(-2, 2), st.floats(0.01, 1), st.floats(0.5, 100))
def test_gate_is_eq10(x, budget, k):
    expected = oracle.aggregate_gate_eq10(x, budget, k)
    point = np.array([x])
    assert gates.aggregate_gate(point, budget, k)[0] == pytest.approx(expected, abs=1e-12)
    assert gates.aggregate_gate_compact(point, budget, k)[0] == pytest.approx(
        oracle.aggregate_gate_compact(x, budget, k), abs=1e-12
    )
    slope = oracle.aggregate_gate_slope_eq10(x, budget, k)
    assert gates.aggregate_slope(point, budget, k)[0] == slope
    assert gates.log_clip(point, budget)[0] == oracle.log_clip_eq12(x, budget)


@given(log_ratios, budgets, st.floats(0.005, 0.1), slopes)
def test_log_gated_is_definition_51(ell, budget, epsilon, k):
    p, row = parameters(budget, epsilon, k), np.array(ell)
    expected = oracle.fiberpo_def51_eqs6_16(ell, budget, epsilon, k)
    assert trajectory.log_gated(row, p).tolist() == pytest.approx(expected, abs=1e-12)
    base = oracle.log_base_eq8(ell, budget, k)
    assert trajectory.log_base(row, p) == pytest.approx(base, abs=1e-12)
    written = trajectory.log_base(row, p) + trajectory.log_fiber_written_out(row, p)
    assert written.tolist() == pytest.approx(expected, abs=1e-12)


@given(log_ratios, budgets, st.floats(0.005, 0.1), slopes)
def test_jacobian_is_eq20(ell, budget, epsilon, k):
    p = parameters(budget, epsilon, k)
    expected = oracle.jacobian_eq20(ell, budget, epsilon, k)
    assert trajectory.jacobian(np.array(ell), p) == pytest.approx(expected, abs=1e-12)


@given(log_ratios, budgets, st.floats(0.005, 0.1), slopes, st.integers(0, 10**6))
def test_gradient_is_that_of_the_loops(ell, budget, epsilon, k, seed):
    p, factor = parameters(budget, epsilon, k), np.random.default_rng(seed).normal(size=len(ell))
    expected = oracle.fiberpo_gradient(ell, budget, epsilon, factor.tolist(), k)
    found = trajectory.gradient(np.array(ell), factor, p).tolist()
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-9)


@given(log_ratios)
def test_regimes_are_named_as_in_the_paper(ell):
    p, row = TwoScale(), np.array(ell)
    assert trajectory.global_regime(row, p) == oracle.global_regime(ell, p.budget)
    assert trajectory.local_regime(row, p) == oracle.local_regime(ell, p.epsilon)


def test_gated_aggregate_by_hand():
    """l = 0.3 everywhere, C = epsilon = 0.2, k = 1: base 0.1, wrong residual 0.2: back to 0.3."""
    p, ell = TwoScale(0.2, 0.2, 0.2, 1.0), np.full(4, 0.3)
    assert trajectory.log_gated(ell, p).tolist() == pytest.approx([0.1] * 4)
    wrong = trajectory.log_gated_from_gated_aggregate(ell, p)
    assert wrong.tolist() == pytest.approx([0.3] * 4)


def test_distance_to_the_next_corner():
    """S+ = 0.1 on C+ = 0.12; u = 0 on epsilon = 0.04; S- = 0 on its budget 0.05."""
    assert trajectory.distance_to_kinks(np.full(3, 0.1), TwoScale()) == pytest.approx(0.02)
    assert trajectory.distance_to_kinks(np.array([0.1, 0.0]), TwoScale()) == 0


@given(st.integers(0, 10**6), st.floats(0.01, 0.5), st.floats(0.01, 0.5), st.integers(2, 9))
def test_directed_trajectories_have_the_drifts_asked_for(seed, plus, minus, length):
    ell = directed(np.random.default_rng(seed), plus, minus, length)
    assert oracle.aggregates_eq9(ell.tolist()) == pytest.approx((plus, minus))
