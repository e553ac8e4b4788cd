"""TV-TRPO: closed form, linear programs, search; decision processes by simulation."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fiberpo import TheoryError
from fiberpo.theory import linear, tvtrpo
from fiberpo.theory.tabular import MDP, Problem, State, random_mdp, random_problem

seeds = st.integers(0, 10**6)
PAIR = State(np.ones(2), np.array([1.0, -1.0]))


def objective_by_loops(problem, deviations):
    """Definition D.1, token by token."""
    tokens, gain, largest, bound = 0, 0.0, 0.0, 0.0
    for state, delta in zip(problem.states, deviations):
        total = variation = 0.0
        for n, a, x in zip(state.multiplicity, state.advantage, delta):
            gain += n * a * x
            variation += n * abs(x)
            total += n
            bound = max(bound, abs(a))
        tokens += total
        largest = max(largest, variation / total)
    g = problem.gamma
    return gain / tokens / (1 - g) - 4 * g * bound / (1 - g) ** 2 * largest**2


def test_two_actions_by_hand():
    """A = (1, -1): M = 1, Delta_hat = (1, -1), t* = (1 - gamma) / (8 gamma)."""
    problem = Problem((PAIR,), 0.5)
    assert tvtrpo.largest_gain(PAIR) == 1
    assert tvtrpo.direction(PAIR).tolist() == [1, -1]
    assert tvtrpo.radius(problem) == pytest.approx(0.125)
    assert tvtrpo.solve(problem)[0].tolist() == pytest.approx([0.125, -0.125])


def test_direction_is_inverse_to_the_multiplicity():
    """n = (3, 1, 2), T = 6: 6 / (2 * 2) onto the best, 6 / (2 * 3) off the worst."""
    state = State(np.array([3.0, 1.0, 2.0]), np.array([-1.0, -0.5, 2.0]))
    assert tvtrpo.direction(state).tolist() == pytest.approx([-1.0, 0.0, 1.5])


@given(seeds)
def test_objective_is_definition_d1(seed):
    rng = np.random.default_rng(seed)
    problem = random_problem(rng)
    deviations = [rng.normal(size=len(s.advantage)) for s in problem.states]
    expected = objective_by_loops(problem, deviations)
    assert tvtrpo.objective(problem, deviations) == pytest.approx(expected)


@given(seeds)
def test_largest_gain_is_the_linear_program(seed):
    (state,) = random_problem(np.random.default_rng(seed), states=1, actions=6).states
    value, delta = tvtrpo.largest_gain_lp(state)
    assert value == pytest.approx(tvtrpo.largest_gain(state), abs=1e-9)
    assert state.deviation(delta) <= 1 + 1e-9
    assert state.mean(delta) == pytest.approx(0, abs=1e-9)


@given(seeds)
def test_no_feasible_point_is_better(seed):
    rng = np.random.default_rng(seed)
    problem = random_problem(rng)
    best = tvtrpo.objective(problem, tvtrpo.solve(problem))
    for _ in range(50):
        scale = tvtrpo.radius(problem) * 10 ** rng.uniform(-2, 1)
        other = [s.project(scale * rng.normal(size=len(s.advantage))) for s in problem.states]
        assert objective_by_loops(problem, other) <= best + 1e-12


@pytest.mark.parametrize("seed", range(3))
def test_closed_form_is_the_numerical_maximizer(seed):
    problem = random_problem(np.random.default_rng(seed))
    for mine, theirs in zip(tvtrpo.solve(problem), tvtrpo.solve_numerically(problem)):
        assert theirs == pytest.approx(mine, abs=1e-6 * tvtrpo.radius(problem))


def test_ties_share_by_tokens():
    """Two best actions with n = (1, 3): 8 / (2 * 4) each, the smallest sum n Delta^2."""
    state = State(np.array([1.0, 3.0, 4.0]), np.array([1.0, 1.0, -1.0]))
    hat = tvtrpo.direction(state)
    assert hat.tolist() == pytest.approx([1.0, 1.0, -1.0])
    norm = float(state.multiplicity @ hat**2)
    for share in np.linspace(0, 1, 11):
        other = np.array([4 * share, 4 * (1 - share) / 3, -1.0])
        assert state.mean(other * state.advantage) == pytest.approx(tvtrpo.largest_gain(state))
        assert float(state.multiplicity @ other**2) >= norm - 1e-12


def test_equal_advantages_move_nothing():
    state = State(np.ones(3), np.zeros(3))
    problem = Problem((state,), 0.5)
    assert tvtrpo.direction(state).tolist() == [0, 0, 0]
    assert tvtrpo.radius(problem) == 0
    assert tvtrpo.solve(problem)[0].tolist() == [0, 0, 0]


@pytest.mark.parametrize("gamma", [0.3, 0.9, 0.999])
def test_largest_radius(gamma):
    assert tvtrpo.radius(Problem((PAIR, PAIR), gamma)) == pytest.approx((1 - gamma) / (8 * gamma))
    assert tvtrpo.largest_radius(gamma) == pytest.approx((1 - gamma) / (8 * gamma))


def test_nonnegative_ratios_bind():
    """n = (19, 1): -1 on the single token is TV 0.1, whatever the radius."""
    state = State(np.array([19.0, 1.0]), np.array([1 / 19, -1.0]))
    free, tied = (tvtrpo.largest_gain_lp(state, 0.5, lowest=low)[1] for low in (-math.inf, -1.0))
    assert state.deviation(free) == pytest.approx(0.5)
    assert tied.tolist() == pytest.approx([1 / 19, -1.0])


# ------------------------------------------------------------------------------- linear programs


def test_linear_program_states():
    assert linear.maximise(np.ones(1))[0] == math.inf
    assert linear.maximise(np.ones(1), bounds=[(0, 1)], equal=[(np.ones(1), 2.0)]) is None


def test_scipy_missing_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "scipy.optimize", None)
    with pytest.raises(TheoryError, match=r"pip install 'fiberpo\[lab\]'"):
        linear.maximise(np.ones(1), bounds=[(0, 1)])


def test_impossible_bound_is_an_error():
    with pytest.raises(TheoryError, match="no deviation fits TV_s <= -1"):
        tvtrpo.largest_gain_lp(PAIR, -1.0)


# ------------------------------------------------------------------------------ decision processes


@pytest.fixture
def mdp():
    return random_mdp(np.random.default_rng(3), 4, 3, 0.8)


def rollout_value(mdp, policy, steps=200):
    """``sum_t gamma^t E[R_t]`` by pushing the state distribution forward."""
    here, total = mdp.start, 0.0
    for t in range(steps):
        pairs = here[:, None] * policy
        total += mdp.gamma**t * float((pairs * mdp.reward).sum())
        here = np.einsum("sa,sat->t", pairs, mdp.transition)
    return total


def test_performance_is_a_rollout(mdp):
    policy = np.random.default_rng(0).dirichlet(np.ones(3), size=4)
    assert mdp.performance(policy) == pytest.approx(rollout_value(mdp, policy))
    assert mdp.visitation(policy).sum() == pytest.approx(1 / (1 - mdp.gamma))
    assert (policy * mdp.advantage(policy)).sum(1) == pytest.approx(np.zeros(4), abs=1e-12)


def test_performance_difference_lemma(mdp):
    """eta(new) - eta(old) is the new visitation on the old advantages."""
    rng = np.random.default_rng(1)
    old, new = (rng.dirichlet(np.ones(3), size=4) for _ in range(2))
    gain = mdp.performance(new) - mdp.performance(old)
    exact = float(mdp.visitation(new) @ (new * mdp.advantage(old)).sum(1))
    assert gain == pytest.approx(exact)
    first = mdp.surrogate(old + 1e-6 * (new - old), old)
    moved = mdp.performance(old + 1e-6 * (new - old)) - mdp.performance(old)
    assert first == pytest.approx(moved, rel=1e-4)


def test_population_is_centred_and_weighs_by_visits(mdp):
    policy = np.random.default_rng(0).dirichlet(np.ones(3), size=4)
    problem = mdp.population(policy)
    assert problem.total == pytest.approx(1 / (1 - mdp.gamma))
    for state in problem.states:
        assert state.mean(state.advantage) == pytest.approx(0, abs=1e-12)
    assert tvtrpo.radius(problem) <= tvtrpo.largest_radius(mdp.gamma)


def test_one_state_by_hand():
    """One state, rewards (1, 0), policy (1/2, 1/2), gamma 1/2: V = 1, A = (1/2, -1/2)."""
    mdp = MDP(np.ones((1, 2, 1)), np.array([[1.0, 0.0]]), np.ones(1), 0.5)
    policy = np.full((1, 2), 0.5)
    assert mdp.value(policy).tolist() == [1.0]
    assert mdp.advantage(policy).tolist() == [[0.5, -0.5]]


@pytest.mark.parametrize(
    ("n", "a", "message"),
    [
        ([1.0, 2.0], [1.0], r"shape \(2,\) and advantages of shape \(1,\)"),
        ([], [], "one number of each per sampled action"),
        ([1.0, 0.0], [1.0, 2.0], r"\[1.0, 0.0\]; a sampled pair has n > 0"),
    ],
)
def test_states_are_checked(n, a, message):
    with pytest.raises(TheoryError, match=message):
        State(np.array(n), np.array(a))


def test_problems_are_checked():
    with pytest.raises(TheoryError, match="gamma is 1"):
        Problem((PAIR,), 1)
    with pytest.raises(TheoryError, match="at least one state"):
        Problem((), 0.5)
