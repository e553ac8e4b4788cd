"""What an objective makes of one trajectory: the numbers behind the figures.

A *path* is an array ``[P, T]`` of log ratios, P positions of one trajectory of T tokens. `response`
evaluates any objective at every position, each one alone in its contexts, and `crossings` finds
where a gate changes its mind on the way. `base_map` does the same over the plane of ``S+`` and
``S-``. Everything is read off the library's own gates; no formula is written twice.

Reference: *Fibration Policy Optimization*, arXiv 2603.08239, Sections 3 to 5.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ..batch import RatioBatch
from ..errors import DataError, FiberPOWarning, ShapeError
from ..gates import Regime, Zero
from ..labels import TOKEN_LEVEL
from ..objective import Objective, Surrogate

Array = NDArray[np.float64]
Regimes = NDArray[np.int8]

GLOBAL_REGIMES = ("G-I", "G-II,r", "G-II", "G-III,r", "G-III")
"""Both channels of the base pass; one rolls back; one is zeroed; the second rolls back too (or the
other way round, or both roll back); both are zeroed."""

LOCAL_REGIMES = ("L-I", "L-II", "L-III")
"""No token, some tokens, all tokens are clipped in their own residual."""


@dataclass(frozen=True, eq=False)
class Response:
    """An objective on a path of P positions of one trajectory with T tokens.

    Attributes:
        objective: the objective.
        advantage: of every token.
        log_ratio: ``[P, T]`` nats.
        log_gated_ratio: ``[P, T]`` ``log G``.
        log_factor: ``[P, T]`` log of what multiplies ``mu A``: ``log G``, or ``log r`` where the
            pessimistic form takes the ratio.
        gradient: ``[P, T]`` ``(dJ / dl_j) / mu_j``; the ungated objective has ``A r_j``.
        log_base: ``[P]`` what the gates above the token let through; 0 where there are none.
        drift: stratum -> ``[channels, P]`` its aggregate ``S``, nats per token.
        regimes: stratum -> ``[channels, P]`` `Regime`; ``"token"`` -> ``[channels, P, T]``.
        clipped: ``[P, T]`` the token gate does not pass the token's residual in its own channel
            (never for `Zero`, which removes the residual by construction).
    """

    objective: Objective
    advantage: float
    log_ratio: Array
    log_gated_ratio: Array
    log_factor: Array
    gradient: Array
    log_base: Array
    drift: Mapping[str, Array]
    regimes: Mapping[str, Regimes]
    clipped: NDArray[np.bool_]

    @property
    def base_regime(self) -> Regimes:
        """``[channels, P]`` the worst regime of each channel over the strata above the token."""
        above = [r for name, r in self.regimes.items() if name != "token"]
        if not above:
            return np.zeros((self.regimes["token"].shape[0], len(self.log_base)), np.int8)
        return np.max(above, axis=0)

    @property
    def global_regime(self) -> NDArray[np.int64]:
        """``[P]`` index into `GLOBAL_REGIMES`."""
        return global_regime(self.base_regime)

    @property
    def local_regime(self) -> NDArray[np.int64]:
        """``[P]`` index into `LOCAL_REGIMES`."""
        return self.clipped.any(axis=1) * 1 + self.clipped.all(axis=1)


def response(objective: Objective, log_ratio: ArrayLike, *, advantage: float = 1.0) -> Response:
    """Evaluate an objective on one trajectory at every position of a path.

    Each position stands alone: one trajectory, one group, one domain. Strata that the objective
    gates and that the path does not know (domain, group, turn) have one context each, so that the
    coarsest one carries the drift and the residuals below it are 0. The rollout policy is the old
    one.

    Args:
        objective: any objective.
        log_ratio: ``[P, T]`` nats, for example from `one_token`, `together` or `straight`.
        advantage: of every token.

    Raises:
        ShapeError: if ``log_ratio`` is not ``[P, T]`` with P and T at least 1.
        NonFiniteError: for a log ratio that is not finite.
        BudgetError: if budgets are given by context name, without ``"*"``.

    >>> from fiberpo import recipes
    >>> r = response(recipes.fiberpo((0.12, 0.05), 0.04), one_token([0.0, 0.1, 0.9], [0.0, 0.0]))
    >>> r.log_gated_ratio[:, 0].round(4).tolist()
    [0.0, 0.0733, 0.04]
    >>> [GLOBAL_REGIMES[i] for i in r.global_regime]
    ['G-I', 'G-I', 'G-II']
    """
    path = np.asarray(log_ratio, dtype=np.float64)
    if path.ndim != 2 or path.size == 0:
        raise ShapeError(
            f"log_ratio has shape {path.shape}; a path is [positions, tokens], at least one of each"
        )
    shape = path.shape
    out, mu = _alone(objective, torch.from_numpy(path.copy()), advantage)
    gated = out.gated
    names: tuple[str, ...] = () if gated.strata is None else gated.strata.names
    token = _numpy(gated.token.regime).reshape(-1, *shape)
    own = np.where(path >= 0, 0, token.shape[0] - 1)
    clipped = np.take_along_axis(token, own[None], axis=0)[0] != Regime.PASS
    if isinstance(objective.gate_map.token, Zero):
        clipped[:] = False
    log_base = torch.zeros(shape[0], dtype=torch.float64)
    drift: dict[str, Array] = {}
    if gated.strata is not None and gated.gated is not None and gated.mean is not None:
        base = gated.strata.at_tokens(gated.strata.sum_path(gated.gated.value))
        log_base = gated.gate_map.chart.recover(base).reshape(shape)[:, 0]
        drift = {n: _numpy(gated.mean[:, gated.strata.level(k)]) for k, n in enumerate(names)}
    return Response(
        objective=objective,
        advantage=advantage,
        log_ratio=path,
        log_gated_ratio=_numpy(out.log_gated_ratio).reshape(shape),
        log_factor=_numpy(gated.log_factor()).reshape(shape),
        gradient=_numpy(out.coefficients / mu).reshape(shape),
        log_base=_numpy(log_base),
        drift=drift,
        regimes={**{n: _numpy(out.regimes[n]) for n in names}, "token": token},
        clipped=clipped,
    )


def _alone(objective: Objective, path: Tensor, advantage: float) -> tuple[Surrogate, Tensor]:
    """The objective on P trajectories, each in contexts of its own, and their ``mu``."""
    positions, tokens = path.shape
    needed = dict.fromkeys([*objective.strata, objective.weights.stratum])
    labels = {
        name: torch.zeros(path.numel(), dtype=torch.long)
        if name in TOKEN_LEVEL
        else torch.arange(positions)
        for name in needed
        if name not in (None, "trajectory")
    }
    zero = torch.zeros(path.numel(), dtype=torch.float64)
    batch = RatioBatch.from_packed(
        path.reshape(-1),
        zero,
        torch.full((positions,), float(advantage), dtype=torch.float64),
        [tokens] * positions,
        labels=labels,
        rollout_log_probs=zero,
    )
    with warnings.catch_warnings(), torch.no_grad():
        # contexts with a single child are what "alone" means
        warnings.filterwarnings("ignore", "every context of the stratum", FiberPOWarning)
        return objective(batch), objective.weights(batch)


def _numpy(values: Tensor) -> NDArray:
    return values.detach().cpu().numpy()


def global_regime(regimes: Regimes) -> NDArray[np.int64]:
    """Index into `GLOBAL_REGIMES` from the regimes ``[channels, ...]`` of the base."""
    rolling = (regimes == Regime.ROLLBACK).sum(axis=0)
    zeroed = (regimes == Regime.ZERO).sum(axis=0)
    found = np.where(zeroed == 1, 2, np.where(rolling == 1, 1, 0))
    return np.where(zeroed == 2, 4, np.where(rolling + zeroed == 2, 3, found))


# --- paths --------------------------------------------------------------------------------------


def one_token(at: ArrayLike, others: ArrayLike) -> Array:
    """``[P, 1 + len(others)]``: the first token's log ratio takes the values ``at``.

    >>> one_token([-0.1, 0.2], [0.05]).tolist()
    [[-0.1, 0.05], [0.2, 0.05]]
    """
    first, fixed = np.asarray(at, np.float64), np.asarray(others, np.float64)
    return np.concatenate([first[:, None], np.tile(fixed, (len(first), 1))], axis=1)


def together(at: ArrayLike, offsets: ArrayLike) -> Array:
    """``[P, T]``: all log ratios move as one, ``l_i = t + offset_i``.

    >>> together([-0.5, 0.5], [0.0, 0.25]).tolist()
    [[-0.5, -0.25], [0.5, 0.75]]
    """
    return np.asarray(at, np.float64)[:, None] + np.asarray(offsets, np.float64)


def straight(at: ArrayLike, deviations: ArrayLike) -> Array:
    """``[P, T]``: the *ratios* move on a straight line, ``r_i = 1 + t d_i``, ``l_i = log r_i``.

    Raises:
        DataError: where a ratio would not be positive.

    >>> straight([-1.0, 1.0], [0.25, -0.5]).round(4).tolist()
    [[-0.2877, 0.4055], [0.2231, -0.6931]]
    """
    deviation = np.asarray(deviations, np.float64)
    change = np.asarray(at, np.float64)[:, None] * deviation
    if (change <= -1).any():
        position, token = np.argwhere(change <= -1)[0]
        d = deviation[token]
        raise DataError(
            f"t = {np.asarray(at, np.float64)[position]:g} gives token {token} the ratio "
            f"{1 + change[position, token]:.3g}; with the deviation {d:g} its ratio is positive "
            f"for t {'>' if d > 0 else '<'} {-1 / d:.3f}"
        )
    return np.log1p(change)


def crossings(
    event: Callable[[Array], NDArray[np.bool_]], low: float, high: float, steps: int = 2001
) -> Array:
    """Positions between ``low`` and ``high`` where ``event`` changes, ascending, to about 1e-15.

    Args:
        event: positions ``[P]`` -> whether it holds, ``[P]``.
        low, high: ends of the search.
        steps: positions of the first scan; two changes within one of its steps are overlooked.

    >>> crossings(lambda t: t * t > 2, -3, 3).round(6).tolist()
    [-1.414214, 1.414214]
    """
    at = np.linspace(low, high, steps)
    holds = event(at)
    left_of = np.flatnonzero(holds[1:] != holds[:-1])
    left, right, before = at[left_of], at[left_of + 1], holds[left_of]
    for _ in range(48 if len(left) else 0):
        middle = (left + right) / 2
        same = event(middle) == before
        left, right = np.where(same, middle, left), np.where(same, right, middle)
    return (left + right) / 2


# --- the plane of drifts ------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class BaseMap:
    """The log base weight of one trajectory over the plane of its drifts.

    Attributes:
        objective: the objective.
        advantage: of every token (sign-aware gates look at it).
        positive: ``[W]`` values of ``S+``, nats per token.
        negative: ``[H]`` values of ``S-``.
        log_base: ``[H, W]`` nats.
        regimes: ``[channels, H, W]`` the worst `Regime` of each channel of the base.
        gated: whether there is a gate above the token at all; without one ``log_base`` is 0.
    """

    objective: Objective
    advantage: float
    positive: Array
    negative: Array
    log_base: Array
    regimes: Regimes
    gated: bool

    @property
    def global_regime(self) -> NDArray[np.int64]:
        """``[H, W]`` index into `GLOBAL_REGIMES`."""
        return global_regime(self.regimes)


def base_map(
    objective: Objective,
    positive: Sequence[float] | Array,
    negative: Sequence[float] | Array,
    *,
    tokens: int = 2,
    advantage: float = 1.0,
) -> BaseMap:
    """Log base weight of a trajectory with the drifts ``S+`` and ``S-``.

    The trajectory has one token at ``T S+``, one at ``-T S-``, and the rest at 0: the base of a
    log chart depends on nothing else.

    Args:
        objective: any objective.
        positive, negative: values of ``S+`` and ``S-``, >= 0, nats per token.
        tokens: T, at least 2; the ``k`` of the gates unless the objective sets another.
        advantage: of every token.

    Raises:
        ShapeError: for fewer than two tokens.
        DataError: for a negative drift.

    >>> from fiberpo import recipes
    >>> found = base_map(recipes.fiberpo((0.2, 0.1), 0.04), [0.1, 0.25, 0.5], [0.0, 0.5])
    >>> found.log_base.round(4).tolist()
    [[0.1, 0.1, 0.0], [0.1, 0.1, 0.0]]
    >>> [[GLOBAL_REGIMES[i] for i in row] for row in found.global_regime]
    [['G-I', 'G-II,r', 'G-II'], ['G-II', 'G-III,r', 'G-III']]
    """
    if tokens < 2:
        raise ShapeError(f"tokens is {tokens}; S+ and S- need a token each, so at least 2")
    plus, minus = np.asarray(positive, np.float64), np.asarray(negative, np.float64)
    for name, values in (("positive", plus), ("negative", minus)):
        if (values < 0).any():
            raise DataError(
                f"{name} holds {values.min():g}; S+ and S- are means of max(log r, 0) and "
                "max(-log r, 0), both >= 0"
            )
    path = np.zeros((len(minus), len(plus), tokens))
    path[..., 0] = tokens * plus
    path[..., 1] = -tokens * minus[:, None]
    found = response(objective, path.reshape(-1, tokens), advantage=advantage)
    shape = (len(minus), len(plus))
    return BaseMap(
        objective,
        advantage,
        plus,
        minus,
        found.log_base.reshape(shape),
        found.base_regime.reshape(-1, *shape),
        gated=bool(objective.gate_map.gates),
    )
