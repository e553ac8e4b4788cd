"""Claims on APC-Obj: its forms, regimes and retraction, and Theorem D.10 with its conditions."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from .. import recipes
from ..gates import Regime
from . import apc, equivalence, tvtrpo
from .apc import StateRegime
from .batches import Case
from .claims import Array, Claim, Finding, Verdict, judge
from .tabular import Problem, State, random_problem


def _random_state(rng: np.random.Generator, actions: int = 4) -> tuple[State, Array, float]:
    """A state, real deviations of zero mean, and a radius near their TV."""
    (state,) = random_problem(rng, states=1, actions=actions).states
    deviation = state.project(rng.normal(0, 0.3, len(state.advantage)))
    delta = state.deviation(deviation) * float(rng.uniform(0.1, 1.2))
    return state, deviation, delta


def forms(rng: np.random.Generator) -> Finding:
    """Token, pair and soft-threshold form, and the library's engine where ratios exist."""
    worst, tried = 0.0, 200
    for _ in range(tried):
        state, deviation, delta = _random_state(rng)
        copies = state.multiplicity.astype(int)
        token = apc.token_form(np.repeat(deviation, copies), delta)
        pair = apc.pair_form(state, deviation, delta)
        worst = max(worst, float(np.abs(token - np.repeat(pair, copies)).max()))
        soft = apc.soft_threshold(state, deviation, delta)
        worst = max(worst, float(np.abs(pair - soft).max()))
        if deviation.min() > -0.9:
            tokens = np.repeat(deviation, copies)
            case = Case(
                np.log1p(tokens), np.ones(len(tokens)), np.array([len(tokens)]),
                {"state": np.zeros(len(tokens), dtype=np.int64)},
            )  # fmt: skip
            gated = recipes.apc(delta)(case.batch()).log_gated_ratio.exp().numpy() - 1
            worst = max(worst, float(np.abs(gated - token).max()))
    return judge(tried, worst, 1e-12, note="and the library's apc")


def single_visits(rng: np.random.Generator) -> Finding:
    """``T_s = 1``: the bound is ``delta`` itself."""
    worst, tried = 0.0, 50
    for _ in range(tried):
        ell, delta = rng.normal(0, 0.3, 6), float(rng.uniform(0.05, 0.5))
        alone = [1 + apc.token_form(np.expm1(ell[i : i + 1]), delta)[0] for i in range(6)]
        clipped = np.clip(np.exp(ell), 1 - delta, 1 + delta)
        worst = max(worst, float(np.abs(np.array(alone) - clipped).max()))
        case = Case(ell, rng.normal(size=6), np.array([2, 4]))
        mine, theirs = recipes.apc(delta), recipes.ppo(delta, sign_aware=False)
        gap = mine(case.batch()).coefficients - theirs(case.batch()).coefficients
        worst = max(worst, float(gap.abs().max()))
    return judge(tried, worst, 1e-12, note="values, and the library's gradients")


def regimes(rng: np.random.Generator) -> Finding:
    """Slope of the gated deviation in its own pair, by differences; the engine's regimes."""
    worst, seen, tried, step = 0.0, set(), 400, 1e-5
    slope: dict[StateRegime, Callable[[float], float]] = {
        StateRegime.P: lambda n: 1.0, StateRegime.R: lambda n: 1 - n, StateRegime.Z: lambda n: 0.0
    }  # fmt: skip
    codes = {StateRegime.P: Regime.PASS, StateRegime.R: Regime.ROLLBACK, StateRegime.Z: Regime.ZERO}
    for _ in range(tried):
        state, deviation, delta = _random_state(rng)
        named = apc.regimes(state, deviation, delta)
        for a, regime in enumerate(named):
            ends = []
            for move in (step, -step):
                moved = deviation.copy()
                moved[a] += move
                ends.append((apc.regimes(state, moved, delta), apc.pair_form(state, moved, delta)))
            if any(found != named for found, _ in ends) or abs(deviation[a]) < 2 * step:
                continue  # a corner lies between
            found = (ends[0][1][a] - ends[1][1][a]) / (2 * step)
            worst = max(worst, abs(found - slope[regime](state.multiplicity[a])))
            seen.add(regime)
        if deviation.min() > -0.9:
            copies = state.multiplicity.astype(int)
            tokens = np.repeat(deviation, copies)
            labels = {"state": np.zeros(len(tokens), dtype=np.int64)}
            case = Case(np.log1p(tokens), np.ones(len(tokens)), np.array([len(tokens)]), labels)
            theirs = recipes.apc(delta)(case.batch()).regimes["token"][0].tolist()
            mine = [codes[r] for r, n in zip(named, copies, strict=True) for _ in range(n)]
            worst = max(worst, float(mine != theirs))
    if len(seen) < 3:
        worst = math.nan
    note = "slopes 1, 1 - n, 0 in the pair's own deviation; the library's three regimes"
    return judge(tried, worst, 1e-6, note=note)


def retraction(rng: np.random.Generator) -> Finding:
    """``TV_s(proj G(u)) <= delta``, strictly inside where ``TV_s(u) > delta``."""
    worst, least, tried = 0.0, math.inf, 3000
    for _ in range(tried):
        (state,) = random_problem(rng, states=1, actions=6).states
        u = state.project(rng.normal(size=len(state.advantage)) ** 3)
        delta = state.deviation(u) * float(rng.uniform(0.1, 1.3))
        back = state.deviation(apc.retraction(state, u, delta))
        worst = max(worst, back / delta - 1)
        over = state.deviation(u) / delta - 1
        if 0.01 < over <= 1:
            least = min(least, (1 - back / delta) / over)
    if not least > 0:
        worst = math.nan
    note = f"relative; what is over by x delta (x <= 1) ends {least:.2g} x delta inside or more"
    return judge(tried, worst, 1e-12, note=note)


def update(rng: np.random.Generator) -> Finding:
    """The exact maximum of APC-Obj (linear programs on every piece) against TV-TRPO's."""
    worst, margin, tried = 0.0, math.inf, 20
    for _ in range(tried):
        problem = random_problem(rng, states=int(rng.integers(1, 4)))
        both = equivalence.updates(problem)
        t = tvtrpo.radius(problem)
        worst = max(worst, both.gap / t)
        for state in problem.states:
            beyond, _ = apc.best_beyond(state, t, excess=0.05)
            margin = min(margin, 1 - beyond / (t * tvtrpo.largest_gain(state)))
    if not margin > 0:
        worst = math.nan
    note = f"5 % outside the ball APC-Obj is at least {100 * margin:.1f} % worse"
    return judge(tried, worst, 1e-6, note=note)


def only_radius(rng: np.random.Generator) -> Finding:
    """APC-Obj with ``c t*``: its update is ``c`` times that of TV-TRPO."""
    worst, tried = 0.0, 5
    for _ in range(tried):
        problem = random_problem(rng)
        t, target = tvtrpo.radius(problem), tvtrpo.solve(problem)
        for c in (0.5, 0.9, 1.1, 2.0):
            for mine, theirs in zip(apc.solve(problem, c * t), target, strict=True):
                worst = max(worst, float(np.abs(mine - c * theirs).max()) / t)
    note = "radius c t* gives c times TV-TRPO's update, c = 0.5, 0.9, 1.1, 2"
    return judge(4 * tried, worst, 1e-6, note=note)


def one_sample(rng: np.random.Generator) -> Finding:
    """``T_s = 1``: both constraints leave a single point."""
    moved, tried = 0.0, 50
    for _ in range(tried):
        states = tuple(State(np.ones(1), rng.normal(size=1)).centred() for _ in range(3))
        problem = Problem(states, 0.5)
        both = [*tvtrpo.solve(problem), *(apc.best_inside(s, 0.2)[1] for s in states)]
        moved = max(moved, tvtrpo.gain(problem), *(float(np.abs(x).max()) for x in both))
    empty = 1.0 if moved < 1e-9 else 0.0
    note = "Delta = 0, A = 0, M = 0 and t* = 0 are forced: for language models it says nothing"
    return judge(tried, empty, 0.5, note=note)


def fractional(rng: np.random.Generator) -> Finding:
    """``n`` below 1/2, and how much of "integer" is needed."""
    both, worst, tried = equivalence.fractional_multiplicities(), 0.0, 10
    for _ in range(tried):
        states = []
        for state in random_problem(rng).states:
            n = rng.uniform(0.52, 1.6, len(state.advantage))
            states.append(State(n, state.advantage).centred())
        problem = Problem(tuple(states), 0.5)
        worst = max(worst, equivalence.updates(problem).gap / tvtrpo.radius(problem))
    enough = "n > 1/2 is enough" if worst < 1e-6 else "n > 1/2 is not enough either"
    return judge(
        1 + tried, both.gap, 1e-6, note=f"{both.remark}; {enough} ({tried} random problems)"
    )  # fmt: skip


def _dropped(
    make: Callable[[], equivalence.Updates],
) -> Callable[[np.random.Generator], Finding]:
    def check(rng: np.random.Generator) -> Finding:
        both = make()
        return judge(1, both.gap, 1e-6, note=both.remark)

    return fractional if make is equivalence.fractional_multiplicities else check


def _condition(name: str, make: Callable[[], equivalence.Updates]) -> Claim:
    return Claim(
        f"equivalence {name}", "FiberPO, Thm D.10, one condition dropped",
        f"APC-Obj and TV-TRPO give the same update {name}.",
        _dropped(make), Verdict.FAILS,
    )  # fmt: skip


CLAIMS = (
    Claim(
        "three forms of APC-Obj", "FiberPO, Def 3.2 and D.4",
        "Token form, pair form (own copies counted) and soft threshold are one map.",
        forms, Verdict.HOLDS,
    ),
    Claim(
        "single visits are PPO without min", "FiberPO, Def 3.2",
        "Where every state is visited once APC-Obj is PPO without min, epsilon = delta.",
        single_visits, Verdict.HOLDS,
    ),
    Claim(
        "regimes P, R, Z of APC-Obj", "FiberPO, Eqs. 61-63",
        "A pair passes, is rolled back, or is zeroed by what its state and the others consume.",
        regimes, Verdict.HOLDS,
    ),
    Claim(
        "retraction", "FiberPO, Lemma D.9",
        "TV_s(proj G(u)) <= delta, and < delta if TV_s(u) > delta.",
        retraction, Verdict.HOLDS,
    ),
    Claim(
        "APC-Obj and TV-TRPO give the same update", "FiberPO, Thm D.10",
        "Under all its conditions the maximizers of both objectives agree, delta = t*.",
        update, Verdict.HOLDS,
    ),
    *(_condition(name, make) for name, make in equivalence.CONDITIONS.items()),
    Claim(
        "radius of the equivalence", "FiberPO, App. D (delta = t*)",
        "The update of APC-Obj is proportional to its radius, so only delta = t* gives TV-TRPO's.",
        only_radius, Verdict.HOLDS,
    ),
    Claim(
        "equivalence with one sample a state", "FiberPO, Thm D.10 at T_s = 1",
        "Where every state is sampled once, as in language models, the theorem has content.",
        one_sample, Verdict.FAILS,
    ),
)  # fmt: skip
