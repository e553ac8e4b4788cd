"""APC-Obj: forms by loops, the exact maximum by grids, the equivalence and its conditions."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core import oracle
from fiberpo.theory import apc, equivalence, relaxations, tvtrpo
from fiberpo.theory.apc import StateRegime
from fiberpo.theory.tabular import Problem, State, random_problem

seeds = st.integers(0, 10**6)


def drawn(seed, actions=4):
    rng = np.random.default_rng(seed)
    (state,) = random_problem(rng, states=1, actions=actions).states
    deviation = state.project(rng.normal(0, 0.3, len(state.advantage)))
    return state, deviation, state.deviation(deviation) * rng.uniform(0.1, 1.2)


@given(st.lists(st.floats(-0.5, 0.5), min_size=1, max_size=6), st.floats(0.05, 0.5))
def test_token_form_is_definition_32(log_ratios, delta):
    expected = oracle.apc_def32(log_ratios, [0] * len(log_ratios), delta)
    found = 1 + apc.token_form(np.expm1(log_ratios), delta)
    assert found.tolist() == pytest.approx(expected, abs=1e-12)


@given(seeds)
def test_pair_form_by_loops(seed):
    """Each copy of a pair counts the other copies of the same pair against itself."""
    state, deviation, delta = drawn(seed)
    pair, soft = apc.pair_form(state, deviation, delta), apc.soft_threshold(state, deviation, delta)
    for a, (n, x) in enumerate(zip(state.multiplicity, deviation)):
        others = sum(
            m * abs(y) for b, (m, y) in enumerate(zip(state.multiplicity, deviation)) if b != a
        )
        bound = max(state.total * delta - others - (n - 1) * abs(x), 0.0)
        expected = min(max(x, -bound), bound)
        assert pair[a] == pytest.approx(expected, abs=1e-12)
        assert soft[a] == pytest.approx(expected, abs=1e-12)


def test_regimes_by_hand():
    """n = (1, 1, 1), T delta = 0.66. Sizes 0.5, 0.2, 0.1: the others consume 0.3, 0.6, 0.7."""
    state = State(np.ones(3), np.zeros(3))
    assert apc.regimes(state, np.array([0.3, -0.2, -0.1]), 0.22) == [StateRegime.P] * 3
    found = apc.regimes(state, np.array([0.5, -0.2, -0.1]), 0.22)
    assert found == [StateRegime.R, StateRegime.R, StateRegime.Z]


@given(seeds)
def test_retraction_stays_in_the_ball(seed):
    state, deviation, delta = drawn(seed, actions=6)
    back = apc.retraction(state, deviation, delta)
    assert state.mean(back) == pytest.approx(0, abs=1e-12)
    assert state.deviation(back) <= delta * (1 + 1e-12)
    if state.deviation(deviation) > 1.01 * delta:
        assert state.deviation(back) < delta


def best_on_a_grid(state, delta, reach=2.0, points=401):
    """The maximum of APC-Obj for two or three actions by brute force."""
    n, total = state.multiplicity, state.total
    axis = np.linspace(-reach, reach, points) * delta * total
    free = np.stack(np.meshgrid(*[axis] * (len(n) - 1)), -1).reshape(-1, len(n) - 1)
    u = np.column_stack([free, -(free @ n[:-1]) / n[-1]])
    overdraft = np.maximum(np.abs(u) @ n - total * delta, 0)
    gated = np.sign(u) * np.maximum(np.abs(u) - overdraft[:, None], 0)
    return float((gated @ (n * state.advantage) / total).max())


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("offset", [0.0, 2.0])
def test_exact_maximum_against_a_grid(seed, offset):
    """Centred advantages or not: no grid point is better, and the grid comes close."""
    (state,) = random_problem(np.random.default_rng(seed), states=1, actions=3).states
    state = State(state.multiplicity, state.advantage + offset)
    value, where = apc.maximise_state(state, 0.1)
    assert state.mean(state.advantage * apc.pair_form(state, where, 0.1)) == pytest.approx(value)
    assert state.mean(where) == pytest.approx(0, abs=1e-9)
    on_grid = best_on_a_grid(state, 0.1)
    assert on_grid <= value + 1e-9
    assert on_grid >= value - 0.05 * abs(value)


def test_maximum_under_nonnegative_ratios():
    state = State(np.array([19.0, 1.0]), np.array([1 / 19, -1.0]))
    _, where = apc.maximise_state(state, 0.2, lowest=-1.0)
    assert where.tolist() == pytest.approx([1 / 19, -1.0])


def test_beyond_may_be_unbounded():
    """n = (0.4, 0.4): every unit of overdraft loses 0.8 and gains 1."""
    state = State(np.full(2, 0.4), np.array([1.0, -1.0]))
    assert apc.best_beyond(state, 0.1)[0] == math.inf
    for x in (1.0, 10.0):
        gated = apc.pair_form(state, np.array([x, -x]), 0.1)
        assert gated[0] == pytest.approx(x - 0.8 * (x - 0.1))


@pytest.mark.parametrize("seed", range(3))
def test_updates_agree_under_all_conditions(seed):
    problem = random_problem(np.random.default_rng(seed))
    both = equivalence.updates(problem)
    assert both.gap < 1e-6 * tvtrpo.radius(problem)


@pytest.mark.parametrize("name", equivalence.CONDITIONS)
def test_every_condition_is_needed(name):
    assert equivalence.CONDITIONS[name]().gap > 0.01


def test_nonnegative_ratios_by_hand():
    """t* = 0.7 M / 2.4 with M = (200/19 + 4) / 24; TV-TRPO stops both states at TV 0.1."""
    both = equivalence.nonnegative_ratios()
    t = 0.7 / 2.4 * (200 / 19 + 4) / 24
    assert both.tv_trpo[1] == pytest.approx([0.1, -0.1], abs=1e-5)
    assert both.apc_obj[1] == pytest.approx([t, -t], abs=1e-9)


def test_multiplicities_above_one_half_are_enough():
    assert equivalence.fractional_multiplicities(0.6).gap < 1e-9
    assert equivalence.fractional_multiplicities(0.45).gap == math.inf


def test_ties_stay_ties():
    """The first state must not move when the second, indifferent one does."""
    both = equivalence.free_ties(5.0)
    assert both.gap == 5.0
    assert both.tv_trpo[0].tolist() == both.apc_obj[0].tolist()


def test_one_sample_a_state_leaves_nothing():
    state = State(np.ones(1), np.array([3.0])).centred()
    problem = Problem((state,), 0.5)
    assert state.advantage.tolist() == [0]
    assert tvtrpo.radius(problem) == 0


# ---------------------------------------------------------------------------------- relaxations


def sample(seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 5, 5)
    n = int(lengths.sum())
    return relaxations.Sample(
        rng.normal(0, 0.3, n), rng.normal(size=n), rng.integers(0, 4, n),
        np.repeat(np.arange(5), lengths),
    )  # fmt: skip


def by_trajectory(values, s):
    return [[v for v, t in zip(values, s.trajectory) if t == k] for k in range(5)]


@given(seeds)
def test_steps_are_the_textbook_objectives(seed):
    """Each step against loops over tokens and trajectories."""
    s = sample(seed)
    ell, a, n = s.log_ratio.tolist(), s.advantage.tolist(), len(s.log_ratio)
    rows, gains = by_trajectory(ell, s), by_trajectory(a, s)
    even = [1 / n] * n
    weighted = [1 / (5 * len(row)) for row in rows for _ in row]
    clipped = oracle.ppo_app_c4(ell, a, 0.2, 0.2)
    sequence = [g for row in oracle.gspo_app_c4(rows, gains, 0.1, 0.1) for g in row]
    expected = {
        relaxations.apc_obj(s, 0.2): (even, oracle.apc_def32(ell, s.state.tolist(), 0.2)),
        relaxations.ppo_without_min(s, 0.2): (even, oracle.ppo_plain(ell, 0.2, 0.2)),
        relaxations.ppo(s, 0.2): (even, clipped),
        relaxations.ppo(s, 0.2, 0.28): (even, oracle.ppo_app_c4(ell, a, 0.2, 0.28)),
        relaxations.grpo(s, 0.2): (weighted, clipped),
        relaxations.gspo(s, 0.1): (weighted, sequence),
    }
    for found, (mu, gated) in expected.items():
        assert found == pytest.approx(oracle.objective_def31(mu, gated, a), abs=1e-12)
