"""Claims on FiberPO's two-scale map: its definition, bounds and regimes (Def 5.1, Eqs. 6-16)."""

from __future__ import annotations

import math
import warnings

import numpy as np

from .. import recipes
from ..errors import FiberPOWarning
from ..objective import Objective
from . import trajectory as two_scale
from .batches import directed, random_case, single
from .claims import Array, Claim, Finding, Verdict, judge
from .trajectory import TwoScale

PLAIN = TwoScale()
"""Budget (0.12, 0.05), epsilon 0.04."""


def recipe(p: TwoScale) -> Objective:
    """The library's FiberPO with these parameters."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FiberPOWarning)  # random budgets may have C- > C+
        return recipes.fiberpo(p.budget, p.epsilon, rollback="tokens" if p.k is None else p.k)


def random_parameters(rng: np.random.Generator) -> TwoScale:
    """Budgets around the paper's, epsilon below them, half of them with a fixed slope."""
    k = None if rng.random() < 0.5 else float(rng.integers(1, 40))
    plus, minus, epsilon = rng.uniform([0.05, 0.02, 0.01], [0.2, 0.1, 0.05])
    return TwoScale(float(plus), float(minus), float(epsilon), k)


def in_zone(p: TwoScale, channel: int, where: str, length: int) -> float:
    """A drift of one channel that passes, rolls back or is zeroed."""
    budget, k = p.budget[channel], float(length) if p.k is None else p.k
    return {"pass": 0.6, "roll": 1 + 0.5 / k, "zero": 1 + 1.6 / k}[where] * budget


def definition(rng: np.random.Generator) -> Finding:
    """Eqs. 6-16 as printed against the library's recipe."""
    worst, tried = 0.0, 60
    for _ in range(tried):
        p, case = random_parameters(rng), random_case(rng, scale=0.12)
        mine = [two_scale.log_gated(ell, p) for ell in case.split(case.log_ratio)]
        theirs = recipe(p)(case.batch()).log_gated_ratio.numpy()
        worst = max(worst, float(np.abs(np.concatenate(mine) - theirs).max()))
    return judge(tried, worst, 1e-12, note="token by token")


def written_out(rng: np.random.Generator) -> Finding:
    """The fiber by ``sigma``, ``u``, ``v`` and by cases."""
    worst, tried = 0.0, 300
    for _ in range(tried):
        p, ell = random_parameters(rng), rng.normal(0, 0.1, int(rng.integers(1, 8)))
        gap = two_scale.log_fiber(ell, p) - two_scale.log_fiber_written_out(ell, p)
        worst = max(worst, float(np.abs(gap).max()))
        u, v = two_scale.residuals(ell)
        centred = two_scale.sign(ell) * (u - v)
        worst = max(worst, float(np.abs(centred - (ell - ell.mean())).max()))
    note = "clip(l - S+) + clip(S-) and clip(l + S-) - clip(S+); unclipped it is l - mean(l)"
    return judge(tried, worst, 1e-12, note=note)


def identity_inside(rng: np.random.Generator) -> Finding:
    """Drifts within budget, residuals within epsilon: ``G = r``; one saturation ends that."""
    worst, tried = 0.0, 200
    for _ in range(tried):
        ell = rng.uniform(-0.03, 0.03, int(rng.integers(1, 8)))
        worst = max(worst, float(np.abs(two_scale.log_gated(ell, PLAIN) - ell).max()))
    return judge(tried, worst, 1e-12, note="|u| and |v| <= epsilon, S+- within budget")


def channels(rng: np.random.Generator) -> Finding:
    """What a trajectory with both channels within budget may have as mean ``|log r|``."""
    worst, tried = 0.0, 500
    for _ in range(tried):
        p, ell = random_parameters(rng), rng.normal(0, 0.08, int(rng.integers(1, 8)))
        if two_scale.global_regime(ell, p) == "G-I":
            worst = max(worst, float(np.abs(ell).mean()) - (p.plus + p.minus))
        s = np.array(two_scale.aggregates(ell))
        worst = max(worst, abs(float(s.sum() - np.abs(ell).mean())))
    return judge(tried, worst, 1e-12, note="S+ + S- is the mean of |log r|; delta = C+ + C-")


def bounds(rng: np.random.Generator) -> Finding:
    """Base within the budgets, ``|log G|`` within the larger one and two epsilons."""
    worst, closest, tried = 0.0, 0.0, 4000
    for _ in range(tried):
        p, spread = random_parameters(rng), 10 ** rng.uniform(-2, 3)
        ell = rng.normal(0, spread, int(rng.integers(1, 10)))
        base = two_scale.log_base(ell, p)
        worst = max(worst, base - p.plus, -base - p.minus)
        limit = max(p.budget) + 2 * p.epsilon
        worst = max(worst, float(np.abs(two_scale.log_gated(ell, p)).max()) - limit)
    # all drift in one channel just within its budget, one token far above its mean
    extreme = np.array([0.479, -0.1, -0.1, -0.1])
    closest = float(np.abs(two_scale.log_gated(extreme, PLAIN)).max())
    note = (
        "log base in [-C-, C+]; |log G| <= max(C+-) + 2 epsilon, for log ratios of a thousand "
        f"nats too; {closest:.4f} of 0.2 is reached"
    )
    return judge(tried, worst, 1e-12, note=note)


def gated_residual(rng: np.random.Generator) -> Finding:
    """Residuals from the gated aggregate: the same while nothing is gated, useless afterwards."""
    same = 0.0
    for _ in range(100):
        ell = rng.uniform(-0.03, 0.03, 5)
        gap = two_scale.log_gated_from_gated_aggregate(ell, PLAIN) - two_scale.log_gated(ell, PLAIN)
        same = max(same, float(np.abs(gap).max()))
    p, ell = TwoScale(0.2, 0.2, 0.2, 1.0), np.full(10, 0.3)
    wrong = two_scale.log_gated_from_gated_aggregate(ell, p)[0]
    right, theirs = two_scale.log_gated(ell, p)[0], recipe(p)(single(ell).batch())
    if abs(float(theirs.log_gated_ratio[0]) - right) > 1e-12:
        wrong = math.nan
    note = (
        f"l = 0.3 everywhere, C = epsilon = 0.2, k = 1: log G = {wrong:.1f} = log r, as if nothing "
        f"were gated (ungated aggregate: {right:.1f}); "
        + ("within budget the two agree" if same < 1e-12 else "they differ within budget too")
    )
    return judge(101, abs(wrong - right), 1e-12, note=note)


def global_regimes(rng: np.random.Generator) -> Finding:
    """Each pair of zones: its name, and the base it says."""
    worst, tried = 0.0, 0
    kinds = {0: "G-I", 1: "G-II,r", 2: "G-II"}
    zones = ("pass", "roll", "zero")
    for i, up in enumerate(zones):
        for j, down in enumerate(zones):
            for _ in range(20):
                p, length = random_parameters(rng), int(rng.integers(2, 9))
                plus, minus = in_zone(p, 0, up, length), in_zone(p, 1, down, length)
                ell = directed(rng, plus, minus, length)
                acting = sorted((i, j))
                name = {(1, 1): "G-III,r", (1, 2): "G-III,r", (2, 2): "G-III"}.get(
                    (acting[0], acting[1]), kinds[acting[1]]
                )
                wrong = float(two_scale.global_regime(ell, p) != name)
                half = 0.5  # of the budget is left in the middle of the rollback zone
                base = {"pass": plus, "roll": half * p.plus, "zero": 0.0}[up]
                base -= {"pass": minus, "roll": half * p.minus, "zero": 0.0}[down]
                worst = max(worst, wrong, abs(two_scale.log_base(ell, p) - base))
                tried += 1
    note = "all nine pairs of zones; base S+ - S- in G-I, one channel in G-II, 0 in G-III"
    return judge(tried, worst, 1e-10, note=note)


def _slopes(ell: Array, p: TwoScale) -> Array:
    """``d log fiber_i / d l_j`` from Eq. 20: the Jacobian without the base gates."""
    gamma, positive = two_scale.base_slopes(ell, p), ell >= 0
    base = np.where(positive, gamma[0], gamma[1]) / len(ell)
    return two_scale.jacobian(ell, p) - base[None, :]


def local_first(rng: np.random.Generator) -> Finding:
    """L-I: no ``|u|`` beyond epsilon. Is the fiber then ``l - mean(l)``?"""
    worst, tried = 0.0, 0
    while tried < 200:
        ell = rng.normal(0, 0.04, int(rng.integers(1, 8)))
        inside = max(two_scale.aggregates(ell)) <= PLAIN.epsilon
        if two_scale.local_regime(ell, PLAIN) == "L-I" and inside:
            gap = two_scale.log_fiber(ell, PLAIN) - (ell - ell.mean())
            worst, tried = max(worst, float(np.abs(gap).max())), tried + 1
    ell = np.array([0.0] + [-0.18] * 9)
    fiber, centred = two_scale.log_fiber(ell, PLAIN)[0], -ell.mean()
    broken = None
    if two_scale.local_regime(ell, PLAIN) == "L-I" and abs(fiber - centred) > 0.05:
        broken = (
            f"l = 0 beside nine tokens at -0.18 is L-I, but S- = {-ell.mean():.3f} is clipped: log "
            f"fiber {fiber:.2f} instead of {centred:.3f}"
        )
    return judge(tried, worst, 1e-12, broken=broken, note="needs S+- <= epsilon too")


def local_last(rng: np.random.Generator) -> Finding:
    """L-III: every ``|u|`` beyond epsilon. Is the fiber then constant?"""
    worst, tried = 0.0, 0
    while tried < 100:
        p, ell = PLAIN, directed(rng, 0.3, 0.3, int(rng.integers(2, 8)))
        if two_scale.local_regime(ell, p) != "L-III":
            continue
        u, _ = two_scale.residuals(ell)
        constant = two_scale.sign(ell) * p.epsilon * (np.sign(u) + 1)
        worst = max(worst, float(np.abs(two_scale.log_fiber(ell, p) - constant).max()))
        worst, tried = max(worst, float(np.abs(_slopes(ell, p)).max())), tried + 1
    ell = np.array([1.0, -0.2] + [0.0] * 8)
    fiber, broken = two_scale.log_fiber(ell, PLAIN)[0], None
    slope = np.abs(_slopes(ell, PLAIN)).max()
    if two_scale.local_regime(ell, PLAIN) == "L-III" and slope > 0.01:
        broken = (
            f"l = 1, -0.2 and eight zeros is L-III with S- = 0.02 below epsilon: log fiber "
            f"{fiber:.2f} = epsilon + S-, not 2 epsilon, and it has a gradient"
        )
    return judge(tried, worst, 1e-12, broken=broken, note="needs |v| > epsilon too")


def untouched(rng: np.random.Generator) -> Finding:
    """A token with ``l = 0`` in a trajectory that drifts: its log G, from both sides."""
    worst, tried = 0.0, 200
    for _ in range(tried):
        length, plus = int(rng.integers(2, 9)), float(rng.uniform(0.045, 0.3))
        ell = np.append(rng.dirichlet(np.full(length - 1, 3.0)) * plus * length, 0.0)
        base = two_scale.log_base(ell, PLAIN)
        got = two_scale.log_gated(ell, PLAIN)[-1]
        worst = max(worst, abs(got - (base - PLAIN.epsilon)))
    half = np.repeat([1.0, -1.0], 5)
    edge = [int((np.abs(two_scale.residuals(x * half)[0]) > 0.04).sum()) for x in (0.079, 0.081)]
    if edge != [0, 10]:
        worst = math.nan
    note = (
        "likewise half at +x and half at -x saturate at x > 2 epsilon: S+- divide by T, not by "
        "the number of tokens of that sign"
    )
    return judge(tried, worst, 1e-12, note=note)


def concerted(rng: np.random.Generator) -> Finding:
    """All tokens at one drift: passed within budget, gated beyond, saturated if signs mix."""
    worst, tried = 0.0, 100
    for _ in range(tried):
        p, length = random_parameters(rng), int(rng.integers(1, 9))
        drift = float(rng.uniform(0, 1)) * p.plus
        ell = np.full(length, drift) + rng.uniform(-0.4, 0.4, length) * min(drift, p.epsilon)
        if two_scale.aggregates(ell)[0] > p.plus:
            continue
        worst = max(worst, float(np.abs(two_scale.log_gated(ell, p) - ell).max()))
    half = np.repeat([0.1, -0.1], 5)
    mixed = two_scale.jacobian(half, TwoScale(0.2, 0.1))
    beyond = two_scale.log_gated(np.full(5, 0.3), PLAIN)[0]
    broken = None
    if np.abs(np.diag(mixed)).max() < 0.2 and abs(beyond) < 1e-12:
        broken = (
            "half at +0.1 and half at -0.1, within both budgets: every token saturated; all at "
            f"0.3, beyond C+ = 0.12: log G = {abs(beyond):.0f}"
        )
    note = "for one sign, drift within budget, spread within epsilon"
    return judge(tried, worst, 1e-12, broken=broken, note=note)


def stricter(rng: np.random.Generator) -> Finding:
    """``|log G|`` and a plain log clip of half-width epsilon, token by token."""
    worst, tried = 0.0, 200
    for _ in range(tried):
        ell = rng.normal(0, 0.1, 8)
        plain = np.abs(np.clip(ell, -PLAIN.epsilon, PLAIN.epsilon))
        worst = max(worst, float((np.abs(two_scale.log_gated(ell, PLAIN)) - plain).max()))
    ell = np.array([0.2] * 5 + [0.0] * 5)
    still = two_scale.log_gated(ell, PLAIN)[-1]
    note = (
        f"five tokens at 0.2, five that have not moved: these get log G = {still:.2f}, "
        "a plain clip leaves them at 0; Eq. 77 itself was not tried"
    )
    return judge(tried + 1, max(worst, abs(still)), 1e-12, note=note)


CLAIMS = (
    Claim(
        "FiberPO, two scales", "FiberPO, Def 5.1, Eqs. 6-13",
        "log G = g(S+) - g(S-) + log fiber is what the library computes.",
        definition, Verdict.HOLDS,
    ),
    Claim(
        "fiber written out", "FiberPO, Eqs. 14-16",
        "clip(sigma u) - clip(sigma v) is clip(l - S+) + clip(S-), or its mirror image.",
        written_out, Verdict.HOLDS,
    ),
    Claim(
        "nothing saturated, G = r", "FiberPO, Def 5.1",
        "Where no gate acts the gated ratio is the ratio.",
        identity_inside, Verdict.HOLDS,
    ),
    Claim(
        "budgets add up", "FiberPO, Def 5.1 (C+ + C- = delta)",
        "Both channels within budget bound the mean of |log r| by delta.",
        channels, Verdict.HOLDS,
    ),
    Claim(
        "log G is bounded", "FiberPO, Eqs. 8 and 16",
        "-C- <= log base <= C+ and |log G| <= max(C+, C-) + 2 epsilon.",
        bounds, Verdict.HOLDS,
    ),
    Claim(
        "residual from the gated aggregate", "FiberPO, Eqs. 14 and 15",
        "The fiber residual may be taken from the gated aggregate g(S+-).",
        gated_residual, Verdict.FAILS,
    ),
    Claim(
        "global regimes", "FiberPO, regimes G-I to G-III",
        "The zones of S+ and S- make five regimes; the base is theirs.",
        global_regimes, Verdict.HOLDS,
    ),
    Claim(
        "local regime L-I", "FiberPO, regimes L-I to L-III",
        "With no |u| > epsilon the fiber is unclipped: log fiber = l - mean(l).",
        local_first, Verdict.CONDITIONAL,
    ),
    Claim(
        "local regime L-III", "FiberPO, regimes L-I to L-III",
        "With all |u| > epsilon the fiber is constant, sigma epsilon (sign(u) + 1), and the "
        "gradient is that of the base.",
        local_last, Verdict.CONDITIONAL,
    ),
    Claim(
        "S+- divide by all tokens", "FiberPO, Eq. 9",
        "Once S+ > epsilon, a token that has not moved gets log G = g(S+) - epsilon.",
        untouched, Verdict.HOLDS,
    ),
    Claim(
        "tokens that move together pass", "JoyAI-LLM Flash, arXiv 2604.03044, on FiberPO",
        "Tokens that shift with their trajectory pass the gating map unattenuated.",
        concerted, Verdict.CONDITIONAL,
    ),
    Claim(
        "stricter clipping", "FiberPO, text before Eq. 77",
        "Token by token the gating map clips at least as strictly as a log clip at epsilon.",
        stricter, Verdict.FAILS,
    ),
)  # fmt: skip
