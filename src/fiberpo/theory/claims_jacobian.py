"""Claims on the gradient of FiberPO: Eq. 20, its properties, and what rollback does."""

from __future__ import annotations

import math

import numpy as np
import torch

from .. import recipes
from . import trajectory as two_scale
from .batches import Case, directed, random_case, single
from .claims import Array, Claim, Finding, Verdict, judge
from .claims_fiberpo import PLAIN, in_zone, random_parameters, recipe
from .trajectory import TwoScale


def engine_jacobian(case: Case, p: TwoScale) -> Array:
    """``d log G_i / d l_j`` by autograd through the library's gates."""
    batch = case.batch(grad=True)
    out = recipe(p).gate_map(batch).log_gated_ratio
    rows = [torch.autograd.grad(g, batch.log_probs, retain_graph=True)[0] for g in out]
    return torch.stack(rows).numpy()


def differences(ell: Array, p: TwoScale, step: float = 1e-6) -> Array:
    """The same by central differences of the equations."""
    columns = []
    for j in range(len(ell)):
        move = step * np.eye(len(ell))[j]
        rise = two_scale.log_gated(ell + move, p) - two_scale.log_gated(ell - move, p)
        columns.append(rise / (2 * step))
    return np.stack(columns, axis=1)


def _regime_case(rng: np.random.Generator, up: str, down: str) -> tuple[Array, TwoScale]:
    """A trajectory in the given zones, away from every corner."""
    while True:
        p, length = random_parameters(rng), int(rng.integers(2, 8))
        ell = directed(rng, in_zone(p, 0, up, length), in_zone(p, 1, down, length), length)
        if two_scale.distance_to_kinks(ell, p) > 1e-5:
            return ell, p


def jacobian(rng: np.random.Generator) -> Finding:
    """Eq. 20 against autograd and against differences, in every pair of zones."""
    zones = ("pass", "roll", "zero")
    cases = [_regime_case(rng, up, down) for up in zones for down in zones for _ in range(8)]
    cases += [(rng.uniform(-0.03, 0.03, 5), PLAIN) for _ in range(8)]
    worst, regimes = 0.0, set()
    for ell, p in cases:
        printed, scale = two_scale.jacobian(ell, p), 1 + p.slope(ell)
        by_engine = engine_jacobian(single(ell), p)
        worst = max(worst, float(np.abs(printed - differences(ell, p)).max()) / scale)
        worst = max(worst, float(np.abs(printed - by_engine).max()) / scale)
        regimes |= {two_scale.global_regime(ell, p), two_scale.local_regime(ell, p)}
    if len(regimes) < 8:
        worst = math.nan
    tried = len(cases)
    note = "equal to autograd and to differences, over 1 + k, in all global and local regimes"
    return judge(tried, worst, 1e-7, note=note)


def closed_form(rng: np.random.Generator) -> Finding:
    """``dJ/dl`` in O(T): from the Jacobian, and the library's coefficients."""
    worst, tried = 0.0, 60
    for _ in range(tried):
        p, case = random_parameters(rng), random_case(rng, scale=0.12)
        factor = case.trajectory_mean * case.advantage
        theirs = case.split(recipe(p)(case.batch()).coefficients.numpy())
        for ell, f, c in zip(case.split(case.log_ratio), case.split(factor), theirs, strict=True):
            a = f * np.exp(two_scale.log_gated(ell, p))
            mine = two_scale.gradient(ell, f, p)
            scale = float(np.abs(a).max()) * (1 + p.slope(ell))
            worst = max(worst, float(np.abs(mine - a @ two_scale.jacobian(ell, p)).max()) / scale)
            worst = max(worst, float(np.abs(mine - c).max()) / scale)
    return judge(
        tried,
        worst,
        1e-12,
        note="equal to the transposed Jacobian times a, and to the library's coefficients",
    )


def block_diagonal(rng: np.random.Generator) -> Finding:
    """Entries of the Jacobian between two trajectories."""
    worst, inside, tried = 0.0, 0.0, 15
    for _ in range(tried):
        case = random_case(rng)
        full = engine_jacobian(case, PLAIN)
        same = case.trajectory[:, None] == case.trajectory[None, :]
        worst = max(worst, float(np.abs(full[~same]).max()))
        inside = max(inside, float(np.abs((full - np.eye(len(full)))[same]).max()))
    return judge(tried, worst if inside > 0.1 else math.nan, 0.0)


def on_policy(rng: np.random.Generator) -> Finding:
    """``l = 0``: the Jacobian is the identity, and the gradient is ``mu A``."""
    worst, tried = 0.0, 30
    for _ in range(tried):
        p, case = random_parameters(rng), random_case(rng)
        still = Case(np.zeros_like(case.log_ratio), case.advantage, case.lengths, case.labels)
        worst = max(
            worst, float(np.abs(engine_jacobian(still, p) - np.eye(len(full(still)))).max())
        )
        zero = np.zeros(int(case.lengths[0]))
        worst = max(worst, float(np.abs(two_scale.jacobian(zero, p) - np.eye(len(zero))).max()))
        for objective in (recipe(p), recipes.fiberpo_domain()):
            gap = objective(still.batch()).coefficients.numpy() - full(still)
            worst = max(worst, float(np.abs(gap).max()))
    return judge(tried, worst, 1e-14, note="and dJ/dl = mu A, in FiberPO-Domain too")


def full(case: Case) -> Array:
    """``mu_i A_i`` with trajectory weights: the plain policy gradient on policy."""
    return case.trajectory_mean * case.advantage


def sign_of_zero(rng: np.random.Generator) -> Finding:
    """The slope at ``l = 0`` of ``max(l, 0) - max(-l, 0)`` under four spellings of the sign."""
    slopes = {}
    spellings = {
        "two clamps": lambda x: x.clamp(min=0) - (-x).clamp(min=0),
        "two relus": lambda x: torch.relu(x) - torch.relu(-x),
        "sign(l) |l|": lambda x: torch.sign(x) * x.abs(),
    }
    for name, spelling in spellings.items():
        zero = torch.zeros(1, requires_grad=True)
        (slope,) = torch.autograd.grad(spelling(zero).sum(), zero)
        slopes[name] = float(slope)
    ours = recipe(PLAIN)(single(np.zeros(4)).batch()).coefficients.numpy() * 4
    worst = max(abs(slope - 1) for slope in slopes.values())
    shown = ", ".join(f"{slope:g} by {name}" for name, slope in slopes.items())
    note = f"slope at 0 {shown}; with l = 0 counted as positive {ours[0]:g}"
    if np.abs(ours - 1).max() > 1e-12:
        worst = math.nan
    return judge(len(slopes), worst, 1e-12, note=note)


def separation(rng: np.random.Generator) -> Finding:
    """Coupling of different tokens in units of ``1/T``, outside and inside rollback."""
    worst, rolled, tried = 0.0, 0.0, 300
    for _ in range(tried):
        length = int(rng.integers(2, 40))
        ell = rng.normal(0, rng.choice([0.02, 0.1, 0.4]), length)
        off = np.abs(
            two_scale.jacobian(ell, PLAIN) - np.diag(np.diag(two_scale.jacobian(ell, PLAIN)))
        )
        if (two_scale.base_slopes(ell, PLAIN) < 0).any():
            rolled = max(rolled, float(off.max()))
        else:
            worst = max(worst, float(off.max()) * length - 1)
    length = 40
    ell = np.full(length, PLAIN.plus * (1 + 0.5 / length))
    rolled = float(two_scale.jacobian(ell, PLAIN)[0, 1])
    broken = None
    if abs(rolled) > 0.5:
        broken = (
            f"in the rollback zone, T = 40, a token moves every other by {rolled:.3f}, not 1/40"
        )
    return judge(
        tried, max(worst, 0.0), 1e-9, broken=broken, note="at most 1/T where no gate rolls back"
    )


def same_weights(rng: np.random.Generator) -> Finding:
    """``J`` against ``sum mu r A``: value in a neighbourhood, gradient on policy."""
    worst, apart, tried = 0.0, 0.0, 40
    for _ in range(tried):
        case = random_case(rng)
        near = Case(
            rng.uniform(-0.02, 0.02, len(case.log_ratio)), case.advantage, case.lengths, case.labels
        )
        linear = float((full(near) * np.exp(near.log_ratio)).sum())
        for objective in (recipes.fiberpo(), recipes.fiberpo_domain()):
            worst = max(worst, abs(-float(objective(near.batch()).loss) - linear))
        tokens = near.advantage / len(near.advantage)
        apart = max(apart, float(np.abs(full(near) - tokens).max() / np.abs(tokens).max()))
    broken = None
    if apart > 0.1:
        broken = "with the token-mean surrogate the gradients differ wherever lengths do"
    return judge(tried, worst, 1e-12, broken=broken, note="under the same weights mu")


def _cells(pessimistic: bool) -> list[tuple[float, float, bool, float]]:
    """Drift, advantage, whether it is restored, and the gradient in units of the plain one."""
    found, length = [], 50
    for drift in (0.12 * (1 + 0.5 / length), -0.05 * (1 + 0.5 / length)):
        for advantage in (1.0, -1.0):
            case = single(np.full(length, drift), advantage)
            out = recipes.fiberpo(PLAIN.budget, PLAIN.epsilon, pessimistic=pessimistic)
            c = float(out(case.batch()).coefficients.sum())
            found.append((drift, advantage, c * drift < 0, abs(c) / math.exp(drift)))
    return found


def rollback(rng: np.random.Generator) -> Finding:
    """Four cells of drift and advantage, all tokens in the rollback zone, T = 50."""
    cells = _cells(pessimistic=False)
    aligned = [c for c in cells if c[0] * c[1] > 0]
    adverse = [c for c in cells if c[0] * c[1] < 0]
    broken = None
    if not any(restored for _, _, restored, _ in adverse):
        low, high = min(c[3] for c in adverse), max(c[3] for c in adverse)
        broken = (
            "where A opposes the drift it drives the drift on, with "
            f"{low:.0f} to {high:.0f} times the plain gradient at T = 50"
        )
    error = 0.0 if all(restored for _, _, restored, _ in aligned) else 1.0
    return judge(4, error, 0.5, broken=broken, note="where A has the sign of the drift")


def pessimistic(rng: np.random.Generator) -> Finding:
    """The same cells under ``min(G A, r A)``, which is this library's option; one token alone."""
    error = 0.0 if all(restored for _, _, restored, _ in _cells(pessimistic=True)) else 1.0
    alone = recipes.fiberpo(PLAIN.budget, PLAIN.epsilon, pessimistic=True)
    batch = single(np.array([-0.205, 0.0, 0.0, 0.0]), 1.0).batch()
    slope = float(alone(batch).coefficients[0]) * len(batch)
    broken = None
    if slope < 0:
        broken = (
            "where one token moves alone: l = (-0.205, 0, 0, 0) with A = 1 pushes that token "
            f"further down, with {slope:.2f} in place of {math.exp(-0.205):.2f}"
        )
    note = "where a trajectory moves as one, in all four cells; min(G A, r A) is this library's"
    return judge(5, error, 0.5, broken=broken, note=note)


def no_way_back(rng: np.random.Generator) -> Finding:
    """Base zeroed, every token saturated: coefficients of the library."""
    worst, tried = 0.0, 0
    while tried < 100:
        ell = directed(rng, 0.4, 0.4, int(rng.integers(2, 9)))
        u, v = two_scale.residuals(ell)
        if min(np.abs(u).min(), np.abs(v).min()) <= PLAIN.epsilon:
            continue
        for advantage in (1.0, -1.0):
            out = recipe(PLAIN)(single(ell, advantage).batch())
            worst = max(worst, float(out.coefficients.abs().max()))
        tried += 1
    return judge(tried, worst, 0.0, note="for either sign of A: nothing pulls the policy back")


CLAIMS = (
    Claim(
        "Jacobian", "FiberPO, Eq. 20",
        "Eq. 20 is the derivative of the gating map.",
        jacobian, Verdict.HOLDS,
    ),
    Claim(
        "closed-form gradient", "FiberPO, Eq. 20 (summed)",
        "dJ/dl is a handful of segment sums.",
        closed_form, Verdict.HOLDS,
    ),
    Claim(
        "trajectories are independent", "FiberPO, Prop 5.3",
        "The Jacobian is block-diagonal over trajectories.",
        block_diagonal, Verdict.HOLDS,
    ),
    Claim(
        "identity on policy", "FiberPO, Prop 5.4",
        "At r = 1 the Jacobian is the identity.",
        on_policy, Verdict.HOLDS,
    ),
    Claim(
        "sign of l = 0", "FiberPO, Eq. 9 (sign label)",
        "Any spelling of the sign split has slope 1 at l = 0.",
        sign_of_zero, Verdict.FAILS,
    ),
    Claim(
        "scale separation", "FiberPO, Prop 5.5",
        "A token's own term is of order 1, the coupling of different tokens of order 1/T.",
        separation, Verdict.CONDITIONAL,
    ),
    Claim(
        "first-order agreement", "FiberPO, Thm 4.5",
        "Near the old policy the objective agrees with the linear surrogate, the policy gradient.",
        same_weights, Verdict.CONDITIONAL,
    ),
    Claim(
        "rollback restores", "FiberPO, Def 5.1 (rollback)",
        "In the rollback zone the gradient pulls the drift back.",
        rollback, Verdict.CONDITIONAL,
    ),
    Claim(
        "pessimistic form restores", "not in the papers",
        "With min(G A, r A) the gradient in the rollback zone pulls the drift back.",
        pessimistic, Verdict.CONDITIONAL,
    ),
    Claim(
        "no gradient beyond", "FiberPO, regime G-III with L-III",
        "A zeroed base with a saturated fiber leaves no gradient in either direction.",
        no_way_back, Verdict.HOLDS,
    ),
)  # fmt: skip
