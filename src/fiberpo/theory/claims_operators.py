"""Claims on fiber bundle gating and the gating hierarchy as operators (FiberPO, Sec. 4 and 6)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from .. import recipes
from ..errors import StrataError
from . import operators as op
from . import trajectory as two_scale
from .batches import Case, random_case
from .claims import Array, Claim, Finding, Indices, Verdict, judge
from .gates import aggregate_gate, log_clip
from .trajectory import TwoScale

BUDGETS = {
    "domain": (0.06, 0.03), "group": (0.08, 0.05), "trajectory": (0.12, 0.05), "turn": (0.1, 0.06),
}  # fmt: skip
EPSILON = 0.04
DEPTHS = (
    ("trajectory",),
    ("group", "trajectory"),
    ("domain", "group", "trajectory"),
    ("domain", "group", "trajectory", "turn"),
)


def token_labels(case: Case, strata: Sequence[str]) -> list[Indices]:
    """One label a token for every stratum; turns are local to their trajectory."""
    made = {
        "trajectory": case.trajectory,
        "turn": case.trajectory * 1000 + case.labels["turn"],
    }  # fmt: skip
    return [made[s] if s in made else case.at_tokens(s) for s in strata]


def gates_of(
    fibration: op.Fibration, strata: Sequence[str], measure: Array, k: float | None = None
) -> list[op.DensityGate]:
    """The aggregate gates of the strata and the log clip of the tokens, on densities.

    ``k`` is the rollback slope of all strata; None for the token counts.
    """
    masses = fibration.densities(measure[None])
    counts = fibration.densities(np.ones((1, len(measure))))
    gates: list[op.DensityGate] = []
    for stratum, mass, count in zip(strata, masses, counts, strict=False):
        budget = np.array(BUDGETS[stratum])[:, None]
        slope = count[0] if k is None else np.full_like(count[0], k)
        gates.append(_aggregate(budget, slope, mass[0]))
    gates.append(op.per_measure(lambda x: log_clip(x, EPSILON), measure))
    return gates


def _aggregate(budget: Array, count: Array, mass: Array) -> op.DensityGate:
    return op.per_measure(lambda x: aggregate_gate(x, budget, count), mass)


def on_densities(
    case: Case, strata: Sequence[str], log_ratio: Array | None = None, k: float | None = None
) -> Array:
    """``log R(G(F(r)))`` with the hierarchy over these strata."""
    ell = case.log_ratio if log_ratio is None else log_ratio
    fibration = op.fibration_of(token_labels(case, strata), case.measure)
    rho = op.decompose(ell, case.measure)
    gates = gates_of(fibration, strata, case.measure, k)
    return op.recover(op.gate_hierarchy(rho, fibration, gates), case.measure)


def charts(rng: np.random.Generator) -> Finding:
    """``R(F(r)) = r``; both channels are densities, and a token is in one of them."""
    worst, tried = 0.0, 50
    for _ in range(tried):
        case = random_case(rng)
        rho = op.decompose(case.log_ratio, case.measure)
        worst = max(worst, float(np.abs(op.recover(rho, case.measure) - case.log_ratio).max()))
        worst = max(worst, float(-rho.min()), float((rho[0] * rho[1]).max()))
    return judge(tried, worst, 1e-12)


def reflecting(rng: np.random.Generator) -> Finding:
    """``pi_* K = id`` for mass-weighted kernels, at every step of every depth."""
    worst, tried = 0.0, 20
    for strata, _ in itertools.product(DEPTHS, range(tried)):
        case = random_case(rng)
        fibration = op.fibration_of(token_labels(case, strata), case.measure)
        worst = max(worst, fibration.reflecting_defect())
    return judge(tried * len(DEPTHS), worst, 1e-12, note="for kernels that share by measure")


def bundle(rng: np.random.Generator) -> Finding:
    """Fiber bundle gating on densities against Def 5.1 in closed form."""
    worst, tried, p = 0.0, 50, TwoScale()
    for _ in range(tried):
        case = random_case(rng, scale=0.12)
        rho = op.decompose(case.log_ratio, case.measure)
        budget = np.array([[p.plus], [p.minus]])
        base = _aggregate(budget, case.lengths.astype(float), np.ones(len(case.lengths)))
        fiber = op.per_measure(lambda x: log_clip(x, p.epsilon), case.measure)
        kernel = op.mass_weighted(case.trajectory, case.measure)
        gated = op.recover(
            op.gate_bundle(rho, case.trajectory, kernel, base, fiber), case.measure
        )  # fmt: skip
        closed = [two_scale.log_gated(ell, p) for ell in case.split(case.log_ratio)]
        worst = max(worst, float(np.abs(gated - np.concatenate(closed)).max()))
    return judge(tried, worst, 1e-12, note="token by token")


def one_step(rng: np.random.Generator) -> Finding:
    """The hierarchy with one stratum is the bundle, for any kernel and gates."""
    worst, tried = 0.0, 50
    for _ in range(tried):
        case, count = random_case(rng), 8
        rho = op.decompose(case.log_ratio, case.measure)
        kernel = rng.random((len(case.log_ratio), count))
        a, b = rng.uniform(0.01, 0.1, 2)
        base, fiber = (lambda x, c=a: np.clip(x, -c, c)), (lambda x, c=b: np.clip(x, -c, c))
        two = op.gate_bundle(rho, case.trajectory, kernel, base, fiber)
        chain = op.Fibration([case.trajectory], [kernel])
        worst = max(worst, float(np.abs(two - op.gate_hierarchy(rho, chain, [base, fiber])).max()))
    return judge(tried, worst, 1e-12)


def hierarchy(rng: np.random.Generator) -> Finding:
    """The operator on densities, depths 1 to 4, against the library in value and gradient."""
    worst, tried, slopes = 0.0, 24, 0
    acting = set()
    for strata, i in itertools.product(DEPTHS, range(tried)):
        case, k = random_case(rng, scale=(0.05, 0.1, 0.2)[i % 3]), (None, 1.0)[i % 2]
        budgets = {name: BUDGETS[name] for name in strata}
        objective = recipes.fiberpo_domain(budgets, EPSILON, rollback="tokens" if k is None else k)
        out = objective(case.batch())
        acting |= {(name, int(r)) for name in strata for r in out.regimes[name].unique()}
        values = on_densities(case, strata, k=k)
        worst = max(worst, float(np.abs(out.log_gated_ratio.numpy() - values).max()))
        weight = case.trajectory_mean * case.advantage
        here, step = float(weight @ np.exp(values)), 1e-6
        for j in rng.integers(0, len(values), 4):
            ends = []
            for move in (step, -step):
                moved = case.log_ratio.copy()
                moved[j] += move
                ends.append(float(weight @ np.exp(on_densities(case, strata, moved, k))))
            right, left = (ends[0] - here) / step, (here - ends[1]) / step
            if abs(right - left) < 1e-4:  # no corner between
                found = float(out.coefficients[j])
                worst = max(worst, abs(found - (right + left) / 2) / (1 + abs(found)))
                slopes += 1
    note = f"depths 1 to 4, values and {slopes} slopes, every gate in every regime"
    if slopes < 50 or len(acting) < 12:  # every gate was seen in every regime
        worst = float("nan")
    return judge(tried * len(DEPTHS), worst, 1e-6, note=note)


def any_kernel(rng: np.random.Generator) -> Finding:
    """On-policy Jacobian of the bundle with random kernels that are far from reflecting."""
    worst, defect, tried = 0.0, 0.0, 50
    for _ in range(tried):
        case = random_case(rng)
        small = case.log_ratio * 1e-3
        kernel = 3 * rng.random((len(small), len(case.lengths)))
        chain = op.Fibration([case.trajectory], [kernel])
        defect = max(defect, chain.reflecting_defect())
        rho = op.decompose(small, case.measure)
        base = op.per_measure(lambda x: log_clip(x, 1.0), np.ones(len(case.lengths)))
        gated = op.gate_bundle(rho, case.trajectory, kernel, base, lambda x: x)
        worst = max(worst, float(np.abs(op.recover(gated, case.measure) - small).max()))
    note = f"K pi_* rho is added and subtracted; here pi_* K was off from id by up to {defect:.0f}"
    return judge(tried, worst, 1e-12, note=note)


def agreement_tests_reflection(rng: np.random.Generator) -> Finding:
    """Is a kernel that agrees to first order reflecting? Random kernels all agree."""
    agree = any_kernel(rng)
    case = random_case(rng)
    kernel = rng.random((len(case.log_ratio), len(case.lengths)))
    defect = op.Fibration([case.trajectory], [kernel]).reflecting_defect()
    error = defect if agree.verdict is Verdict.HOLDS else 0.0
    note = f"a random kernel with pi_* K off from id by {defect:.1f} agrees to first order as well"
    return judge(agree.tried, error, 1e-9, note=note)


def reflection_alone(rng: np.random.Generator) -> Finding:
    """Fiber gate zero: the base density that arrives is the gated one, iff K is reflecting."""
    worst, least, tried = 0.0, np.inf, 50
    for _ in range(tried):
        case, count = random_case(rng), 8
        rho = op.decompose(case.log_ratio, case.measure)
        good = op.mass_weighted(case.trajectory, case.measure)
        bad = rng.random(good.shape) * (good > 0)
        pushed = op.push(case.trajectory, rho, count)
        gated = np.clip(pushed, -0.05, 0.05)
        for kernel in (good, bad):
            out = op.gate_bundle(
                rho, case.trajectory, kernel, lambda x: np.clip(x, -0.05, 0.05), np.zeros_like
            )
            gap = float(np.abs(op.push(case.trajectory, out, count) - gated).max())
            if kernel is good:
                worst = max(worst, gap)
            else:
                least = min(least, gap)
    broken = "with random shares the base receives another drift" if least > 1e-3 else None
    return judge(tried, worst, 1e-12, broken=broken, note="if pi_* K = id")


def open_gates(rng: np.random.Generator) -> Finding:
    """All gates open: the residuals telescope to ``l`` at every depth."""
    worst, tried = 0.0, 20
    for strata, _ in itertools.product(DEPTHS, range(tried)):
        case = random_case(rng, scale=1.0)
        fibration = op.fibration_of(token_labels(case, strata), case.measure)
        rho = op.decompose(case.log_ratio, case.measure)
        out = op.gate_hierarchy(rho, fibration, [lambda x: x] * (len(strata) + 1))
        worst = max(worst, float(np.abs(op.recover(out, case.measure) - case.log_ratio).max()))
    return judge(tried * len(DEPTHS), worst, 1e-12)


def first_order(rng: np.random.Generator) -> Finding:
    """On-policy gradient of the hierarchy at depths 1 to 4: ``mu A``."""
    worst, tried = 0.0, 10
    for strata, _ in itertools.product(DEPTHS, range(tried)):
        case = random_case(rng)
        still = Case(np.zeros_like(case.log_ratio), case.advantage, case.lengths, case.labels)
        budgets = {name: BUDGETS[name] for name in strata}
        out = recipes.fiberpo_domain(budgets, EPSILON)(still.batch())
        plain = case.trajectory_mean * case.advantage
        worst = max(worst, float(np.abs(out.coefficients.numpy() - plain).max()))
        near = rng.uniform(-0.01, 0.01, len(plain))
        worst = max(worst, float(np.abs(on_densities(case, strata, near) - near).max()))
    return judge(tried * len(DEPTHS), worst, 1e-12, note="dJ/dl = mu A, G = r nearby")


def two_classifications(rng: np.random.Generator) -> Finding:
    """Crossed labels over the same tokens, here and in the library; nested ones pass."""
    wrong, tried = 0, 40
    for _ in range(tried):
        case = random_case(rng)
        modality = np.arange(len(case.lengths)) % 2
        topic = (np.arange(len(case.lengths)) // 2) % 2
        crossed = {"modality": modality, "topic": topic}
        batch_case = Case(case.log_ratio, case.advantage, case.lengths, crossed)
        nested = token_labels(case, DEPTHS[3])
        wrong += not _refused([x[case.trajectory] for x in crossed.values()], case.measure)
        wrong += not _refused_by_library(batch_case)
        wrong += _refused(nested, case.measure) + _refused_by_library(case)
    # what adding both up would do: one drift everywhere, two roots, gates open
    drift, rho = 0.05, np.array([[0.05 / 4] * 4, [0.0] * 4])
    base = sum(float(op.push(np.zeros(4, dtype=np.int64), rho, 1)[0, 0]) for _ in range(2))
    note = f"added up, two roots would count a common drift {base / drift:.0f} times"
    return judge(4 * tried, float(wrong), 0.0, note=note)


def _refused(labels: Sequence[Indices], measure: Array) -> bool:
    try:
        op.fibration_of(labels, measure)
    except StrataError:
        return True
    return False


def _refused_by_library(case: Case) -> bool:
    try:
        case.batch().strata([name for name in case.labels if name != "turn"])
    except StrataError:
        return True
    return False


CLAIMS = (
    Claim(
        "chart and its inverse", "FiberPO, Def 4.1",
        "Decomposing a ratio into signed densities and recovering it is the identity.",
        charts, Verdict.HOLDS,
    ),
    Claim(
        "reflecting condition of the kernels", "FiberPO, Defs 4.2-4.4",
        "Handing a density down by measure and summing it up again changes nothing.",
        reflecting, Verdict.HOLDS,
    ),
    Claim(
        "FiberPO is fiber bundle gating", "FiberPO, Defs 4.4 and 5.1",
        "The bundle operator on densities over trajectories is the closed form.",
        bundle, Verdict.HOLDS,
    ),
    Claim(
        "hierarchy of one step", "FiberPO, Def 6.2 at n = 1",
        "A hierarchy with one stratum above the tokens is fiber bundle gating.",
        one_step, Verdict.HOLDS,
    ),
    Claim(
        "hierarchy of any depth", "FiberPO, Defs 6.1 and 6.2, Eqs. 26-28, App. E.7",
        "The operator on densities is what the library computes.",
        hierarchy, Verdict.HOLDS,
    ),
    Claim(
        "gates open, G = r at any depth", "FiberPO, Def 6.2",
        "The residuals of all strata add up to the ratio.",
        open_gates, Verdict.HOLDS,
    ),
    Claim(
        "first-order agreement for any kernel", "FiberPO, Thm 4.5",
        "Agreement near the old policy does not depend on the kernel K.",
        any_kernel, Verdict.HOLDS,
    ),
    Claim(
        "agreement shows reflection", "FiberPO, Thm 4.5 and Defs 4.2-4.4",
        "A kernel that gives first-order agreement is reflecting.",
        agreement_tests_reflection, Verdict.FAILS,
    ),
    Claim(
        "reflection hands the gated drift down", "FiberPO, Defs 4.2-4.4",
        "With the fiber gate at zero each base point receives its gated drift.",
        reflection_alone, Verdict.CONDITIONAL,
    ),
    Claim(
        "first-order agreement at any depth", "FiberPO, Thm 4.5 and Def 6.2",
        "At every depth dJ/dl = mu A on policy.",
        first_order, Verdict.HOLDS,
    ),
    Claim(
        "two classifications refused", "FiberPO, Remark 6.5",
        "Two independent classifications of the same tokens are not a tree, and are refused.",
        two_classifications, Verdict.HOLDS,
    ),
)  # fmt: skip
