"""Gates of other methods of the field: soft, quadratic, rolling back without end, one-sided.

As in `gates`: each binds its parameters and gives value, slope and regime of a drift.

References: the papers named at each recipe in `peers`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .budgets import check_positive
from .errors import ObjectiveError
from .gates import Gated, Regime, Site, ratio_clip
from .ops.plan import GateCode, LoweredGate


def _sign(site: Site, gate: str) -> Tensor:
    if site.advantage_sign is None:
        raise ObjectiveError(f"{gate} needs the sign of the advantages")
    return site.advantage_sign


def _by_slope(value: Tensor, slope: Tensor) -> Gated:
    """Positive slopes pass, negative ones roll back."""
    regime = torch.where(slope < 0, Regime.ROLLBACK.value, Regime.PASS.value)
    return Gated(value, slope, torch.where(slope == 0, Regime.ZERO.value, regime).to(torch.int8))


@dataclass(frozen=True)
class WeightClip:
    """Clip of a ratio to ``[1 - epsilon_low, 1 + epsilon_high]`` (drift: its log, `Log` chart).

    Args:
        epsilon_low: offset below 1, in (0, 1); None leaves that side open.
        epsilon_high: offset above 1, > 0.
    """

    epsilon_low: float | None
    epsilon_high: float
    needs_advantage = False

    def __post_init__(self) -> None:
        if self.epsilon_low is not None:
            check_positive("epsilon_low", self.epsilon_low, below=1.0)
        check_positive("epsilon_high", self.epsilon_high)

    def __call__(self, drift: Tensor, site: Site) -> Gated:
        """Clip the log ratio."""
        _, _, low, high = self.lowered().numbers
        return ratio_clip(drift, low, high)

    def lowered(self) -> LoweredGate:
        """For the fused backends."""
        low = -math.inf if self.epsilon_low is None else math.log1p(-self.epsilon_low)
        return LoweredGate(GateCode.CLIP, (low, math.log1p(self.epsilon_high)) * 2)


@dataclass(frozen=True)
class SignedLogClip:
    """Clip of a log ratio to ``[-epsilon, epsilon_high]``, from the side that the advantage names.

    Above where the advantage is not negative, below where it is.

    Args:
        epsilon: half-width below 0, nats, > 0.
        epsilon_high: above 0, nats; ``epsilon`` if None.
    """

    epsilon: float
    epsilon_high: float | None = None
    needs_advantage = True

    def __post_init__(self) -> None:
        check_positive("epsilon", self.epsilon)
        if self.epsilon_high is not None:
            check_positive("epsilon_high", self.epsilon_high)

    def __call__(self, drift: Tensor, site: Site) -> Gated:
        """Clip every channel."""
        negative = _sign(site, "SignedLogClip") < 0
        low, _, _, high = self.lowered().numbers
        bound = torch.zeros_like(drift)
        return ratio_clip(
            drift,
            torch.where(negative, bound + low, -math.inf),
            torch.where(negative, math.inf, bound + high),
        )

    def lowered(self) -> LoweredGate:
        """For the fused backends."""
        high = self.epsilon if self.epsilon_high is None else self.epsilon_high
        return LoweredGate(GateCode.CLIP, (-self.epsilon, math.inf, -math.inf, high))


@dataclass(frozen=True)
class SoftGate:
    """``1 + y = (4 / tau) sigmoid(tau x)`` of a ratio deviation ``x = r - 1`` (`Deviation` chart).

    The slope ``4 sigmoid(tau x) sigmoid(-tau x)`` is 1 at ``x = 0`` and falls off on both sides;
    it is never 0, so that every token passes.

    Args:
        tau_pos, tau_neg: temperatures > 0 where the advantage is positive, and elsewhere.
    """

    tau_pos: float
    tau_neg: float
    needs_advantage = True

    def __post_init__(self) -> None:
        check_positive("tau_pos", self.tau_pos)
        check_positive("tau_neg", self.tau_neg)

    def __call__(self, drift: Tensor, site: Site) -> Gated:
        """Gate each deviation with the temperature of its sign."""
        positive = _sign(site, "SoftGate") > 0
        tau = torch.where(positive, self.tau_pos, torch.full_like(drift, self.tau_neg))
        value = 4 / tau * torch.sigmoid(tau * drift) - 1
        slope = 4 * torch.sigmoid(tau * drift) * torch.sigmoid(-tau * drift)
        regime = torch.full_like(slope, Regime.PASS.value).to(torch.int8)
        return Gated(value, slope, regime)

    def lowered(self) -> LoweredGate:
        """For the fused backends."""
        return LoweredGate(GateCode.SOFT, (self.tau_pos, self.tau_neg))


@dataclass(frozen=True)
class QuadraticGate:
    """``y = x - sign(A) x^2 / (2 epsilon)`` of a ratio deviation ``x = r - 1`` (`Deviation` chart).

    The slope ``1 - sign(A) x / epsilon`` is 0 at ``x = sign(A) epsilon`` and negative beyond.

    Args:
        epsilon: deviation at which the slope is 0, > 0.
    """

    epsilon: float
    needs_advantage = True

    def __post_init__(self) -> None:
        check_positive("epsilon", self.epsilon)

    def __call__(self, drift: Tensor, site: Site) -> Gated:
        """Bend each deviation against the side that the advantage names."""
        bend = _sign(site, "QuadraticGate").to(drift.dtype) / self.epsilon
        bent = torch.where(bend == 0, 0.0, bend * drift)  # a deviation may be infinite
        return _by_slope(drift * (1 - bent / 2), 1 - bent)

    def lowered(self) -> LoweredGate:
        """For the fused backends."""
        return LoweredGate(GateCode.QUADRATIC, (self.epsilon,))


@dataclass(frozen=True)
class RollbackClip:
    """Clip of a ratio deviation that turns back instead of going flat (`Deviation` chart).

    ``y = x`` inside ``[-epsilon, epsilon]`` and on the side that the advantage does not name;
    beyond, ``y = sign(x) (1 + alpha) epsilon - alpha x``, of slope ``-alpha``.

    Args:
        epsilon: offset from a ratio of 1, in (0, 1).
        alpha: slope of the rollback, > 0.
    """

    epsilon: float
    alpha: float
    needs_advantage = True

    def __post_init__(self) -> None:
        check_positive("epsilon", self.epsilon, below=1.0)
        check_positive("alpha", self.alpha)

    def __call__(self, drift: Tensor, site: Site) -> Gated:
        """Roll each deviation back from the side that the advantage names."""
        negative = _sign(site, "RollbackClip") < 0
        beyond = torch.where(negative, drift < -self.epsilon, drift > self.epsilon)
        turn = torch.full_like(drift, (1 + self.alpha) * self.epsilon)
        turn = torch.where(negative, -turn, turn)
        value = torch.where(beyond, turn - self.alpha * drift, drift)
        return _by_slope(value, torch.where(beyond, -self.alpha, torch.ones_like(drift)))

    def lowered(self) -> LoweredGate:
        """For the fused backends."""
        return LoweredGate(GateCode.ROLLBACK, (self.epsilon, self.alpha))


@dataclass(frozen=True)
class Taper:
    """``min(sum of drifts, 0)`` of a context whose advantage is negative, 0 elsewhere.

    The drift of a context is a mean; times its token count it is the log of the ratio of the whole
    context, so that the gated ratio is ``clip(product of ratios, 0, 1)`` or 1 (`Log` chart).
    """

    needs_advantage = True

    def __call__(self, drift: Tensor, site: Site) -> Gated:
        """Taper the contexts of negative advantage."""
        passing = (_sign(site, "Taper") < 0) & (drift <= 0)
        value = torch.where(passing, site.count * drift, torch.zeros_like(drift))
        return _by_slope(value, torch.where(passing, site.count, torch.zeros_like(drift)))

    def lowered(self) -> LoweredGate:
        """For the fused backends."""
        return LoweredGate(GateCode.TAPER)
