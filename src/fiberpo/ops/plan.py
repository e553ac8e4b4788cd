"""`GatePlan`: a gate map lowered to codes and numbers, which every backend reads.

A backend never sees a gate class: a method that is composed from the gates below needs no kernel of
its own. What a backend computes, for tokens ``i`` in segments ``s`` (a segment is a run of tokens
with one row and one leaf context):

    l_i    = log_probs_i - old_log_probs_i                         (at least float32)
    x_ch,i = first(decompose(l_i))                                           per channel
    S_ch,c = sum_{i below c} omega_i x_ch,i / mass_c                         per context
    h_ch,c = g_c(S_ch,c - S_ch,parent(c))              S_parent = 0 at a root
    y_ch,i = token(x_ch,i - S_ch,leaf(i)) + sum_{c on the path of i} h_ch,c
    G_i    = recover(y_i)
    J      = sum_i w_i G_i,                            w_i = scale_i advantage_i

and ``dJ/dl`` by two more passes: with ``a_ch,i = w_i dG_i/dy_ch,i``, ``t_ch,i = a_ch,i token'``,

    B_ch,c  = (sum_{i below c} a_ch,i) g'_c
    D_ch,c  = B_ch,c - sum_{children k of c} B_ch,k - sum_{i with leaf c} t_ch,i
    P_ch,i  = omega_i sum_{c on the path of i} D_ch,c / mass_c
    dJ/dl_i = sum_ch first'_ch,i decompose'_ch,i (t_ch,i + P_ch,i)

``pessimistic``: where ``A_i >= 0`` and ``l_i < log G_i``, or ``A_i < 0`` and ``l_i > log G_i``,
the token takes ``w_i exp(l_i)`` in place of ``w_i G_i``: that is its part of ``J``; it adds the
same number to ``dJ/dl_i``, and its ``a`` is 0. ``detached``: ``J = sum w_i G_i log_probs_i`` and
``dJ/dlog_probs_i = w_i G_i``. A token with ``w_i = 0`` contributes 0 to ``J`` and has ``a = 0``,
whatever overflows there; it still counts in the sums ``S``.

Charts (``channels``): `LOG` (1) ``d = l``, ``G = exp(y)``; `SIGNED_LOG` (2) ``d = (max(l, 0),
max(-l, 0))`` with slopes ``(1, 0)`` where ``l >= 0`` and ``(0, -1)`` elsewhere,
``G = exp(y_0 - y_1)``; `DEVIATION` (1) ``d = exp(l) - 1``, slope ``exp(l)``, ``G = 1 + y``,
``log G = log1p(y)`` (NaN where ``G < 0``: comparisons with it are false).

Gates, ``x`` the drift, ``A`` the advantage at the site (of the token; of a context the sign of the
advantages summed below it), ``numbers`` in the order given:

============  ==============================  ====================================================
code          numbers                         value; slope
============  ==============================  ====================================================
`PASS`                                        ``x``; 1
`ZERO`                                        0; 0
`CLIP`        low, high where ``A < 0``;      ``clip(x, low, high)``; 1 where
              low, high where ``A >= 0``      ``low <= x <= high``, else 0 (bounds may be infinite)
`AGGREGATE`   C+, C-, k (at tokens)           ``|x| <= C``: ``x``; 1.
                                              ``|x| < (1 + 1/k) C``: ``sign(x) (k+1) C - k x``;
                                              ``-k``. Else 0; 0. ``C`` is that of the channel;
                                              with one channel ``C+`` where ``x >= 0``, else
                                              ``C-``. ``C`` may be inf (always passes). Of
                                              contexts, ``C`` and ``k`` stand in `Contexts`.
`SOFT`        tau (``A > 0``), tau elsewhere  ``4/tau sigmoid(tau x) - 1``;
                                              ``4 sigmoid(tau x) sigmoid(-tau x)``
`QUADRATIC`   epsilon                         ``b = sign(A)/epsilon``: ``x (1 - b x / 2)``;
                                              ``1 - b x`` (``b = 0``: ``x``; 1, also at inf)
`ROLLBACK`    epsilon, alpha                  beyond ``A < 0: x < -epsilon``, else
                                              ``x > epsilon``:
                                              ``+-(1 + alpha) epsilon - alpha x`` (``-`` where
                                              ``A < 0``); ``-alpha``. Else ``x``; 1.
`TAPER`                                       ``A < 0`` and ``x <= 0``: ``count x``; ``count``.
                                              Else 0; 0 (contexts only)
`BUDGET`      radius                          tokens only, see below
`STOP`        e+, e- (at tokens)              see below
============  ==============================  ====================================================

`BUDGET` at a token of state ``s`` with ``m_s`` tokens and ``total_s = sum of |x|`` over them:
``bound = m_s radius - (total_s - |x|)``; ``bound <= 0``: 0; slope 0. ``|x| <= bound``: ``x``; 1.
Else ``sign(x) bound``; slope 1 and, besides, every token of ``s`` (this one included) receives
``-sign(x) a`` times the sign of its own ``x``. Without `States` every token is its own state.

`STOP` stands at the token and at every context, in detached plans of the chart `SIGNED_LOG`. At a
context: 1 where the aggregate ``S`` itself (not the residual) is above ``C``, else 0; slope 0, so
that ``h`` summed over a path counts what is out of its budget there. At a token: 0; slope 0
(``G = 1``), and ``w_i`` becomes 0 unless ``x = sign(A_i) l_i`` is below ``e``, or below 0 where the
count is not 0. ``e > 0`` and the count are the first where ``A_i > 0``, the second elsewhere.

Reference: *Fibration Policy Optimization*, arXiv 2603.08239, Definitions 5.1, 6.1, 6.2; App. E.7.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..errors import ObjectiveError

Merge = Callable[[Tensor], Tensor]
"""``[rows, C]`` sums of this process -> the same over all ranks (float64)."""


class ChartCode(enum.IntEnum):
    """How a log ratio becomes drifts and back."""

    LOG = 0
    SIGNED_LOG = 1
    DEVIATION = 2

    @property
    def channels(self) -> int:
        """Drifts per token."""
        return 2 if self is ChartCode.SIGNED_LOG else 1


class GateCode(enum.IntEnum):
    """What a gate does to a drift (see the module's table)."""

    PASS = 0
    ZERO = 1
    CLIP = 2
    AGGREGATE = 3
    SOFT = 4
    QUADRATIC = 5
    ROLLBACK = 6
    TAPER = 7
    BUDGET = 8
    STOP = 9


@dataclass(frozen=True)
class LoweredGate:
    """A gate as a code and its numbers."""

    code: GateCode
    numbers: tuple[float, ...] = ()


OPEN = LoweredGate(GateCode.PASS)


@dataclass(frozen=True, eq=False)
class Contexts:
    """The forest above the tokens, coarse to fine, and the numbers of its gates.

    Attributes:
        leaf: ``[S]`` context of each segment.
        parent: ``[C]`` parent context, -1 for a root; always smaller than the context's own index.
        bounds: contexts ``bounds[k]`` to ``bounds[k + 1]`` belong to stratum ``k``. A parent may
            lie more than one stratum up (trees whose branches differ in depth).
        gates: one per stratum.
        mass, count: ``[C]`` summed measure and token count below each context, over all ranks.
        budget: ``[2, C]`` of `GateCode.AGGREGATE` and `GateCode.STOP`; inf elsewhere.
        slope: ``[C]`` the ``k`` of `GateCode.AGGREGATE`; 1 elsewhere.
        sign: ``[C]`` sign of the advantage summed below each context; 0 where no gate asks.
        row_leaf: whether segment ``s`` is context ``bounds[-2] + s``: one segment a finest context,
            in order, all of them in the last stratum.
    """

    leaf: Int[Tensor, " S"]
    parent: Int[Tensor, " C"]
    bounds: tuple[int, ...]
    gates: tuple[LoweredGate, ...]
    mass: Float[Tensor, " C"]
    count: Float[Tensor, " C"]
    budget: Float[Tensor, "2 C"]
    slope: Float[Tensor, " C"]
    sign: Float[Tensor, " C"]
    row_leaf: bool

    def __len__(self) -> int:
        return self.bounds[-1]

    @cached_property
    def below(self) -> tuple[Int[Tensor, " pieces"], Int[Tensor, " C1"]]:
        """What hangs directly on each context, for sums in a fixed order: ``(order, starts)``.

        Things are numbered: segment ``s`` is ``s``, context ``c`` is ``S + c``; those on context
        ``c`` are ``order[starts[c] : starts[c + 1]]``, ascending. Roots hang on nothing.
        """
        above = torch.cat([self.leaf, self.parent])
        hanging = (above >= 0).nonzero()[:, 0]
        order = hanging[torch.argsort(above[hanging], stable=True)]
        counts = torch.bincount(above[hanging], minlength=len(self))
        return order, torch.cat([counts.new_zeros(1), counts.cumsum(0)])


@dataclass(frozen=True, eq=False)
class States:
    """The states that tokens share (`GateCode.BUDGET`).

    Attributes:
        index: ``[N]`` state of each token.
        multiplicity: ``[states]`` tokens in each state, over all ranks, float64.
    """

    index: Int[Tensor, " N"]
    multiplicity: Float[Tensor, " states"]


@dataclass(frozen=True, eq=False)
class GatePlan:
    """All that a backend needs besides log-probs and weights. Tensors lie on one device.

    Attributes:
        chart, first, token, pessimistic, detached: the gate map.
        starts: ``[S + 1]`` int64, the first token of each segment, and N.
        omega: ``[S]`` float64, the measure of each token of the segment.
        contexts: None where no gate stands above the token.
        states: None where every token is a state of its own.
        longest: tokens of the longest segment (known without asking the device).
    """

    chart: ChartCode
    first: LoweredGate
    token: LoweredGate
    pessimistic: bool
    detached: bool
    starts: Int[Tensor, " S1"]
    omega: Float[Tensor, " S"]
    contexts: Contexts | None
    states: States | None
    longest: int

    def __post_init__(self) -> None:
        gates = () if self.contexts is None else self.contexts.gates
        codes = {gate.code for gate in (self.token, *gates)}
        whole = codes == {GateCode.STOP} and self.detached and self.chart is ChartCode.SIGNED_LOG
        if GateCode.STOP in {*codes, self.first.code} and not (whole and self.first == OPEN):
            raise ObjectiveError(
                "a STOP stands beside other gates, in another chart than SIGNED_LOG, or in a plan "
                "that is not detached; see fiberpo.ops.plan"
            )

    @property
    def segments(self) -> int:
        """Number of segments."""
        return self.starts.shape[0] - 1


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What a backend answers.

    Attributes:
        value: float64 scalar, ``J`` of the tokens here.
        segment_values: ``[S]`` float64, the part of ``J`` of each segment.
        gradient: ``[N]``, ``-dJ/dlog_probs`` in the dtype of the log-probs: that of the loss.
        mean: ``[channels, C]`` float64, the aggregates ``S``; None without contexts.
    """

    value: Float[Tensor, ""]
    segment_values: Float[Tensor, " S"]
    gradient: Float[Tensor, " N"]
    mean: Float[Tensor, "channels C"] | None


@runtime_checkable
class Backend(Protocol):
    """A module of `fiberpo.ops` that evaluates plans."""

    name: str

    def unsupported(self, plan: GatePlan, log_probs: Tensor) -> list[str]:
        """Reasons why this backend cannot serve; empty if it can. Never raises."""
        ...

    def evaluate(
        self,
        plan: GatePlan,
        log_probs: Float[Tensor, " N"],
        old_log_probs: Float[Tensor, " N"],
        advantages: Float[Tensor, "..."],
        scale: Float[Tensor, "..."],
        merge: Merge | None = None,
        merge_states: Merge | None = None,
    ) -> Evaluation:
        """Evaluate.

        Args:
            plan: the lowered gate map and the contexts.
            log_probs, old_log_probs: float32 or float64, contiguous.
            advantages: ``[S]`` where constant on each segment, or ``[N]``.
            scale: ``[S]`` or ``[N]`` float64 >= 0: aggregation weights, masks and factors.
            merge: sums over contexts across ranks, called twice (once where ``detached``); None in
                a single process.
            merge_states: the same for states.
        """
        ...
