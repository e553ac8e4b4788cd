"""Claims on TV-TRPO: its bound, its exact maximizer, its radius (FiberPO, Thm 2.1, App. D)."""

from __future__ import annotations

import itertools

import numpy as np

from . import tvtrpo
from .claims import Array, Claim, Finding, Verdict, judge
from .linear import maximise
from .tabular import Problem, State, random_mdp, random_problem

GAMMAS = (0.5, 0.9, 0.99, 0.999, 0.9999)


def improvement_bound(rng: np.random.Generator) -> Finding:
    """``eta(new) - eta(old) >= L - penalty max_s TV^2`` by exact evaluation of both policies."""
    worst, halved, tried = 0.0, 0.0, 400
    for _ in range(tried):
        mdp = random_mdp(rng, int(rng.integers(2, 5)), 3, float(rng.uniform(0.1, 0.95)))
        old = rng.dirichlet(np.ones(3), size=len(mdp.start))
        new = old + rng.uniform(0, 1) * (rng.dirichlet(np.ones(3), size=len(old)) - old)
        gap = mdp.performance(new) - mdp.performance(old) - mdp.surrogate(new, old)
        bound = np.abs(mdp.advantage(old)).max() * 4 * mdp.gamma / (1 - mdp.gamma) ** 2
        tv = float(np.abs(new - old).sum(1).max())
        worst = max(worst, float(-bound * tv**2 - gap))
        halved = max(halved, float(-bound * (tv / 2) ** 2 - gap))
    note = "TV without the 1/2"
    if halved <= 1e-9:
        note += "; with the 1/2 it holds as well, so this penalty is 4 times what TRPO needs"
    return judge(tried, worst, 1e-9, note=note)


def largest_gain(rng: np.random.Generator) -> Finding:
    """``M(s)`` in closed form against the linear program, and how far its maximizer may move."""
    worst, tried = 0.0, 60
    for _ in range(tried):
        state = _distinct(rng)
        worst = max(worst, abs(tvtrpo.largest_gain_lp(state)[0] - tvtrpo.largest_gain(state)))
        hat = tvtrpo.direction(state)
        worst = max(worst, abs(state.mean(hat * state.advantage) - tvtrpo.largest_gain(state)))
        worst = max(worst, abs(state.deviation(hat) - 1), abs(state.mean(hat)))
        worst = max(worst, _freedom(state, hat))
    tied = State(np.array([1.0, 2.0, 1.0]), np.array([1.0, 1.0, -3.0]))
    apart = _freedom(tied, tvtrpo.direction(tied))
    broken = None
    if apart > 0.1:
        broken = "with two best actions the mass may go to either of them"
    note = "Delta-hat moves T_s / (2 n), the only maximizer iff best and worst action are unique"
    return judge(tried, worst, 1e-6, broken=broken, note=note)


def _distinct(rng: np.random.Generator) -> State:
    """A random state whose best and worst actions are better and worse than all others by 0.05."""
    while True:
        (state,) = random_problem(rng, states=1, actions=5).states
        steps = np.diff(np.sort(state.advantage))
        if min(steps[0], steps[-1]) > 0.05:
            return state


def _freedom(state: State, hat: Array) -> float:
    """How far a coordinate of a maximizer can be from ``hat``: linear programs on the face."""
    n, count = state.multiplicity / state.total, len(hat)
    split = np.concatenate([np.eye(count), -np.eye(count)], axis=1)
    gain = (n * state.advantage) @ split
    rows = [(np.concatenate([n, n]), 1.0), (-gain, -tvtrpo.largest_gain(state) + 1e-10)]
    worst = 0.0
    for a in range(count):
        for s in (1.0, -1.0):
            found = maximise(
                s * split[a], at_most=rows, equal=[(n @ split, 0.0)], bounds=[(0, None)] * 2 * count
            )
            assert found is not None
            worst = max(worst, abs(found[0] - s * hat[a]))
    return worst


def maximizer(rng: np.random.Generator) -> Finding:
    """Closed form against linear programs, and against random feasible points."""
    worst, tried, points = 0.0, 25, 400
    for _ in range(tried):
        problem = random_problem(rng, states=int(rng.integers(1, 4)), actions=4)
        closed = tvtrpo.solve(problem)
        scale = tvtrpo.radius(problem)
        for mine, theirs in zip(closed, tvtrpo.solve_numerically(problem), strict=True):
            worst = max(worst, float(np.abs(mine - theirs).max()) / scale)
        best = tvtrpo.objective(problem, closed)
        for _ in range(points):
            size = scale * rng.choice([0.01, 0.3, 1.0, 3.0])
            near = rng.random() < 0.5
            other = [
                s.project(near * d + size * rng.normal(size=len(d)))
                for s, d in zip(problem.states, closed, strict=True)
            ]
            worst = max(worst, (tvtrpo.objective(problem, other) - best) / best)
    note = f"closed form = linear programs (relative to t*); best of {points} feasible points each"
    return judge(tried, worst, 1e-6, note=note)


def largest_radius(rng: np.random.Generator) -> Finding:
    """``t* <= (1 - gamma)/(8 gamma)``, and the problem that attains it."""
    worst, tried = 0.0, 500
    for _ in range(tried):
        problem = random_problem(rng, states=3, actions=4)
        worst = max(worst, tvtrpo.radius(problem) / tvtrpo.largest_radius(problem.gamma) - 1)
    pair = State(np.ones(2), np.array([1.0, -1.0]))
    for gamma in GAMMAS:
        attained = tvtrpo.radius(Problem((pair, pair), gamma))
        worst = max(worst, abs(attained / tvtrpo.largest_radius(gamma) - 1))
    note = "attained where best and worst advantage are +-||A|| in every state; TV without the 1/2"
    return judge(tried, worst, 1e-12, note=note)


def vanishing(rng: np.random.Generator) -> Finding:
    """``t*`` of random decision processes as ``gamma`` rises to 1."""
    worst, tried = 0.0, 40
    largest = dict.fromkeys(GAMMAS, 0.0)
    for _ in range(tried):
        states = int(rng.integers(2, 7))
        base = random_mdp(rng, states, 3, 0.5)
        policy = rng.dirichlet(np.ones(3), size=states)
        for gamma in GAMMAS:
            mdp = type(base)(base.transition, base.reward, base.start, gamma)
            t = tvtrpo.radius(mdp.population(policy))
            largest[gamma] = max(largest[gamma], t)
            worst = max(worst, t / tvtrpo.largest_radius(gamma) - 1)
    if not all(largest[a] > largest[b] for a, b in itertools.pairwise(GAMMAS)):
        worst = float("nan")
    shown = ", ".join(f"{largest[g]:.1e} ({g:g})" for g in (0.9, 0.99, 0.9999))
    return judge(tried * len(GAMMAS), worst, 1e-12, note=f"largest radius at gamma: {shown}")


CLAIMS = (
    Claim(
        "improvement bound", "FiberPO, Def D.1 (TRPO's bound)",
        "The true improvement is at least the linear surrogate minus "
        "4 gamma ||A|| / (1 - gamma)^2 times the squared maximal TV.",
        improvement_bound, Verdict.HOLDS,
    ),
    Claim(
        "largest gain M(s)", "FiberPO, App. D.1",
        "The largest gain at TV_s = 1 is (max A - min A) / 2, from one maximizer Delta-hat.",
        largest_gain, Verdict.CONDITIONAL,
    ),
    Claim(
        "TV-TRPO maximizer", "FiberPO, Thm D.3",
        "Sample-based TV-TRPO is maximized by Delta* = t* Delta-hat, "
        "t* = (1 - gamma) M / (8 gamma ||A||).",
        maximizer, Verdict.HOLDS,
    ),
    Claim(
        "TRPO's radius", "FiberPO, Eq. 76",
        "No radius t* exceeds (1 - gamma) / (8 gamma).",
        largest_radius, Verdict.HOLDS,
    ),
    Claim(
        "radius vanishes as gamma -> 1", "FiberPO, Thm 2.1",
        "On any tabular problem TRPO's radius goes to 0 as gamma goes to 1.",
        vanishing, Verdict.HOLDS,
    ),
)  # fmt: skip
