"""Charts: how a policy ratio becomes additive drifts per channel, and back (F and R of the paper).

A chart maps the log ratio ``l_i = log r_i`` of a token to one drift per channel, ``d[channel, i]``
(nats, or ratio deviation for `Deviation`). Gates act on drifts and on their averages; `recover`
turns gated drifts ``y[channel, i]`` into the log of the gated ratio. Densities of the paper are
``rho_i = omega_i * d_i`` with the token measure ``omega_i`` (`fiberpo.ops.reference` works with
them); everything else in the library works with drifts per unit of measure.

Reference: *Fibration Policy Optimization*, arXiv 2603.08239, Definitions 4.1 and 6.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from .ops.plan import ChartCode


@runtime_checkable
class Chart(Protocol):
    """What an engine needs of a chart: values and derivatives, both ways."""

    channels: ClassVar[int]

    def decompose(self, log_ratio: Float[Tensor, " N"]) -> Float[Tensor, "channels N"]:
        """Drift of every token in every channel."""
        ...

    def decompose_slope(self, log_ratio: Float[Tensor, " N"]) -> Float[Tensor, "channels N"]:
        """``d drift / d log_ratio``."""
        ...

    def recover(self, drift: Float[Tensor, "channels N"]) -> Float[Tensor, " N"]:
        """Log of the gated ratio that the gated drifts stand for."""
        ...

    def ratio(self, drift: Float[Tensor, "channels N"]) -> Float[Tensor, " N"]:
        """The gated ratio ``G`` itself."""
        ...

    def ratio_slope(self, log_gated_ratio: Float[Tensor, " N"]) -> Float[Tensor, "channels N"]:
        """``d G / d drift`` where ``G = exp(log_gated_ratio)``."""
        ...


@dataclass(frozen=True)
class Log:
    """One channel, ``d = log r``; ``G = exp(y)``. The chart of PPO, GRPO and GSPO.

    >>> Log().decompose(torch.tensor([0.5, -0.2]))
    tensor([[ 0.5000, -0.2000]])
    """

    channels: ClassVar[int] = 1
    lowered: ClassVar[ChartCode] = ChartCode.LOG

    def decompose(self, log_ratio: Float[Tensor, " N"]) -> Float[Tensor, "1 N"]:
        """``d = l``."""
        return log_ratio[None]

    def decompose_slope(self, log_ratio: Float[Tensor, " N"]) -> Float[Tensor, "1 N"]:
        """1 everywhere."""
        return torch.ones_like(log_ratio)[None]

    def recover(self, drift: Float[Tensor, "1 N"]) -> Float[Tensor, " N"]:
        """``log G = y``."""
        return drift[0]

    def ratio(self, drift: Float[Tensor, "1 N"]) -> Float[Tensor, " N"]:
        """``G = exp(y)``."""
        return drift[0].exp()

    def ratio_slope(self, log_gated_ratio: Float[Tensor, " N"]) -> Float[Tensor, "1 N"]:
        """``dG/dy = G``."""
        return log_gated_ratio.exp()[None]


@dataclass(frozen=True)
class SignedLog:
    """Two non-negative channels, ``d+ = max(l, 0)`` and ``d- = max(-l, 0)``; ``G = exp(y+ - y-)``.

    A token with ``l = 0`` carries the sign label ``+1``: its derivative is 1 in the positive
    channel and 0 in the negative one (`torch.sign` is 0 there and would lose the on-policy
    gradient). The chart of FiberPO and of every fibration hierarchy.

    >>> SignedLog().decompose(torch.tensor([0.5, -0.2, 0.0]))
    tensor([[0.5000, 0.0000, 0.0000],
            [0.0000, 0.2000, 0.0000]])
    """

    channels: ClassVar[int] = 2
    lowered: ClassVar[ChartCode] = ChartCode.SIGNED_LOG

    def decompose(self, log_ratio: Float[Tensor, " N"]) -> Float[Tensor, "2 N"]:
        """``(max(l, 0), max(-l, 0))``."""
        zero = torch.zeros_like(log_ratio)
        positive = log_ratio >= 0
        return torch.stack(
            [torch.where(positive, log_ratio, zero), torch.where(positive, zero, -log_ratio)]
        )

    def decompose_slope(self, log_ratio: Float[Tensor, " N"]) -> Float[Tensor, "2 N"]:
        """``+1`` in the positive channel where ``l >= 0``, ``-1`` in the negative one elsewhere."""
        positive = (log_ratio >= 0).to(log_ratio.dtype)
        return torch.stack([positive, positive - 1])

    def recover(self, drift: Float[Tensor, "2 N"]) -> Float[Tensor, " N"]:
        """``log G = y+ - y-``."""
        return drift[0] - drift[1]

    def ratio(self, drift: Float[Tensor, "2 N"]) -> Float[Tensor, " N"]:
        """``G = exp(y+ - y-)``."""
        return (drift[0] - drift[1]).exp()

    def ratio_slope(self, log_gated_ratio: Float[Tensor, " N"]) -> Float[Tensor, "2 N"]:
        """``dG/dy+ = G``, ``dG/dy- = -G``."""
        gated = log_gated_ratio.exp()
        return torch.stack([gated, -gated])


@dataclass(frozen=True)
class Deviation:
    """One channel, ``d = r - 1``; ``G = 1 + y``. The chart of APC-Obj and of
    other gates that are functions of the ratio itself (SAPO, SPO, Truly PPO).

    >>> Deviation().decompose(torch.tensor([0.0]))
    tensor([[0.]])
    """

    channels: ClassVar[int] = 1
    lowered: ClassVar[ChartCode] = ChartCode.DEVIATION

    def decompose(self, log_ratio: Float[Tensor, " N"]) -> Float[Tensor, "1 N"]:
        """``d = exp(l) - 1``."""
        return torch.expm1(log_ratio)[None]

    def decompose_slope(self, log_ratio: Float[Tensor, " N"]) -> Float[Tensor, "1 N"]:
        """``exp(l)``."""
        return log_ratio.exp()[None]

    def recover(self, drift: Float[Tensor, "1 N"]) -> Float[Tensor, " N"]:
        """``log G = log(1 + y)``; ``-inf`` where the gated ratio is 0, NaN where it is negative."""
        return torch.log1p(drift[0])

    def ratio(self, drift: Float[Tensor, "1 N"]) -> Float[Tensor, " N"]:
        """``G = 1 + y``; a gate may make it negative."""
        return 1 + drift[0]

    def ratio_slope(self, log_gated_ratio: Float[Tensor, " N"]) -> Float[Tensor, "1 N"]:
        """1 everywhere."""
        return torch.ones_like(log_gated_ratio)[None]
