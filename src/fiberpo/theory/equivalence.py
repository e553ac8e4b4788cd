"""APC-Obj and TV-TRPO give the same update (Theorem D.10), and what each condition is for.

Both sides are solved exactly and independently (`tvtrpo`, `apc`). `CONDITIONS` holds, for every
condition of the theorem, the smallest problem known to us on which dropping it separates the two.

Reference: *Fibration Policy Optimization*, arXiv 2603.08239, Theorem D.10.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from . import apc, tvtrpo
from .claims import Array
from .tabular import Problem, State

NEVER = math.inf


@dataclass(frozen=True, eq=False)
class Updates:
    """The two updates on one problem.

    Attributes:
        tv_trpo, apc_obj: one deviation vector a state.
        remark: what to know beside the gap.
    """

    tv_trpo: Sequence[Array]
    apc_obj: Sequence[Array]
    remark: str

    @property
    def gap(self) -> float:
        """Largest difference of a deviation; ``inf`` where APC-Obj has no maximum."""
        gaps = [np.abs(a - b).max() for a, b in zip(self.tv_trpo, self.apc_obj, strict=True)]
        return max(NEVER if np.isnan(g) else float(g) for g in gaps)


def updates(problem: Problem) -> Updates:
    """Both updates under the conditions of the theorem, ``delta = t*``."""
    return Updates(tvtrpo.solve(problem), apc.solve(problem, tvtrpo.radius(problem)), "")


def nonnegative_ratios() -> Updates:
    """``r >= 0`` imposed on both: two states, n = (19, 1) and (2, 2), gamma = 0.3."""
    states = (State(np.array([19.0, 1.0]), np.array([1 / 19, -1.0])),
              State(np.array([2.0, 2.0]), np.array([1.0, -1.0])))  # fmt: skip
    problem = Problem(states, 0.3)
    t = tvtrpo.radius(problem)
    return Updates(
        tvtrpo.solve_numerically(problem, lowest=-1.0),
        apc.solve(problem, t, lowest=-1.0),
        f"n = (19,1), (2,2), gamma = 0.3: r = 0 stops the first state at TV 0.1 < t* = {t:.3f}, "
        "so TV-TRPO stops the second there too and APC-Obj does not",
    )


def offset_advantages(offset: float = 3.0) -> Updates:
    """Advantages that do not average to 0 over the tokens of a state."""
    state = State(np.ones(3), np.array([1.2, -0.2, -1.0]) + offset)
    problem = Problem((state,), 0.5)
    t = tvtrpo.radius(problem)
    update = apc.solve(problem, t)
    return Updates(
        tvtrpo.solve(problem), update,
        f"n = (1,1,1), A = (1.2,-0.2,-1) + {offset:g}: APC-Obj goes to TV = "
        f"{state.deviation(update[0]) / t:.2f} t*, where G(u) does not sum to 0 and the offset "
        "rewards that",
    )  # fmt: skip


def fractional_multiplicities(copies: float = 0.4) -> Updates:
    """``n`` not an integer: below 1/2 a token loses less than it gains by overdrawing.

    With ``sum n u = 0`` the rises of ``u`` sum to ``T TV / 2``, and so do its falls. Overdrawn by
    ``x = T (TV - delta)``, every active token loses ``x``: at most ``T TV / 2 - n x`` is left of
    either, less than ``T delta / 2`` iff ``n > 1/2``. Lemma D.9 needs no more than that.
    """
    problem = Problem((State(np.full(2, copies), np.array([1.0, -1.0])),), 0.5)
    update = apc.solve(problem, tvtrpo.radius(problem))
    return Updates(
        tvtrpo.solve(problem), update,
        f"n = ({copies:g},{copies:g}): APC-Obj "
        f"{'has no maximum' if np.isnan(update[0]).any() else 'has a maximum'}",
    )  # fmt: skip


def unconstrained() -> Updates:
    """Without ``sum n Delta = 0`` on either side: only the largest ``|A|`` moves."""
    problem = Problem((State(np.ones(3), np.array([2.0, -1.0, -1.0])),), 0.5)
    theirs, t = tvtrpo.solve_numerically(problem, constrained=False), tvtrpo.radius(problem)
    larger = t * problem.advantage_bound / tvtrpo.gain(problem)
    same = Updates(theirs, apc.solve(problem, larger, constrained=False), "").gap < 1e-6
    return Updates(
        theirs, apc.solve(problem, t, constrained=False),
        "n = (1,1,1), A = (2,-1,-1): the best gain is max|A| = 2, not M = 1.5"
        + ("; with that in the radius, and the tie rule, both agree again" if same else ""),
    )  # fmt: skip


def tied_parameters() -> Updates:
    """One parameter for two states: ``Delta = theta (1,-1)`` and ``theta (0.1,-0.1)``."""
    pair, plain = np.array([1.0, -1.0]), np.array([1.0, -1.0])
    states = State(np.ones(2), plain), State(np.full(2, 20.0), plain)
    problem = Problem(states, 0.5)
    t = tvtrpo.radius(problem)

    def spread(theta: float) -> list[Array]:
        return [theta * pair, 0.1 * theta * pair]

    thetas = np.linspace(0.0, 20 * t, 4001)
    best_trpo = thetas[np.argmax([tvtrpo.objective(problem, spread(x)) for x in thetas])]
    best_apc = thetas[np.argmax([apc.objective(problem, spread(x), t) for x in thetas])]
    return Updates(
        spread(float(best_trpo)), spread(float(best_apc)),
        "n = (1,1), (20,20), Delta = theta (1,-1), 0.1 theta (1,-1): theta = "
        f"{best_trpo / t:.2f} t* for TV-TRPO, {best_apc / t:.2f} t* for APC-Obj",
    )  # fmt: skip


def free_ties(size: float = 10.0) -> Updates:
    """Without the smallest-norm rule a state with ``A = 0`` may go anywhere in APC-Obj."""
    states = (State(np.ones(2), np.array([1.0, -1.0])), State(np.ones(2), np.zeros(2)))
    problem = Problem(states, 0.5)
    t = tvtrpo.radius(problem)
    smallest = tvtrpo.solve(problem)
    moved = [smallest[0], np.array([size, -size])]
    apc_loss = apc.objective(problem, smallest, t) - apc.objective(problem, moved, t)
    trpo_loss = tvtrpo.objective(problem, smallest) - tvtrpo.objective(problem, moved)
    still_best = abs(apc_loss) < 1e-12
    return Updates(
        smallest, moved if still_best else smallest,
        f"a state with A = 0 moved by +-{size:g} costs APC-Obj {abs(apc_loss):.0f} and TV-TRPO "
        f"{trpo_loss:.0f}",
    )  # fmt: skip


CONDITIONS: dict[str, Callable[[], Updates]] = {
    "with r >= 0 imposed": nonnegative_ratios,
    "with advantages that are not centred": offset_advantages,
    "with multiplicities that are not integers": fractional_multiplicities,
    "without the probability constraint": unconstrained,
    "with tied parameters": tied_parameters,
    "without the smallest-norm tie rule": free_ties,
}
"""Each condition of Theorem D.10 dropped -> the two updates where all others are fulfilled."""


__all__ = ["CONDITIONS", "Updates", "updates"]
