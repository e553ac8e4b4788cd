"""`Layout`: all that a gate map needs to know of a batch before any log-prob is known.

Contexts, their masses and token counts, and which of them other ranks hold, follow from labels,
lengths and advantages alone. A layout is made once for the tokens of an optimizer step (one gather
of keys, one all-reduce) and serves every evaluation on them.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from .batch import RatioBatch
from .collective import LOCAL, Collective, Match
from .errors import FiberPOWarning
from .strata import Strata


@dataclass(frozen=True, eq=False)
class ContextLayout:
    """The contexts above the token.

    Attributes:
        strata: the forest.
        match: the contexts that other ranks hold too.
        segment_omega: ``[S]`` measure of each token of a segment, float64.
        mass, count: ``[C]`` summed measure and token count below each context, over all ranks.
        advantage_sign: ``[C]`` sign of the advantage summed below each context, where a gate asks.
    """

    strata: Strata
    match: Match
    segment_omega: Float[Tensor, " S"]
    mass: Float[Tensor, " C"]
    count: Float[Tensor, " C"]
    advantage_sign: Float[Tensor, " C"] | None = None

    @cached_property
    def omega(self) -> Float[Tensor, " N"]:
        """Measure of each token."""
        return torch.repeat_interleave(self.segment_omega, self.strata.segment_lengths)


@dataclass(frozen=True, eq=False)
class StateLayout:
    """The states that tokens share (`BudgetClip`).

    Attributes:
        strata: states as a forest of roots.
        match: the states that other ranks hold too.
        count: ``[states]`` tokens in each state, over all ranks, float64.
    """

    strata: Strata
    match: Match
    count: Float[Tensor, " states"]


@dataclass(frozen=True, eq=False)
class Layout:
    """Where the tokens of a batch stand.

    Attributes:
        contexts: None where no gate stands above the token.
        states: None where every token is a state of its own.
    """

    contexts: ContextLayout | None = None
    states: StateLayout | None = None


def lay_out(
    batch: RatioBatch,
    names: tuple[str, ...],
    *,
    measure: str,
    needs_advantage: bool,
    states: str | None,
    collective: Collective,
    warn: bool = True,
) -> Layout:
    """The layout of a batch for gates at the strata ``names``.

    Args:
        batch: a `RatioBatch.joined` one.
        names: strata above the token that have a gate.
        measure: ``"trajectory"`` (``omega_i = 1 / T_tau``) or ``"token"`` (``omega_i = 1``).
        needs_advantage: whether some gate looks at the sign of the advantage.
        states: label of the states that tokens share (`BudgetClip`), where the batch has it.
        collective: the ranks.
        warn: say once which gates cannot act.

    Raises:
        StrataError: if the batch lacks a stratum, or labels do not nest (over all ranks).
    """
    contexts = shared = None
    if names:
        strata = batch.strata(names)
        if warn and collective.size == 1:
            _warn_if_idle(strata)  # across ranks a context may have other children elsewhere
        match = _match(strata, collective)
        tokens = strata.segment_lengths.double()
        omega = torch.ones_like(tokens)
        if measure == "trajectory":
            omega = 1.0 / strata.of_rows(batch.of_rows(batch.trajectory_lengths))
        rows = [omega * tokens, tokens]
        if needs_advantage:
            rows.append(_summed_advantages(batch, strata))
        mass, count, *advantage = match.merge(strata.push_segments(torch.stack(rows)))
        sign = torch.sign(advantage[0]) if advantage else None
        contexts = ContextLayout(strata, match, omega, mass, count, sign)
    if states is not None and states in batch.labels:
        strata = batch.strata([states])
        match = _match(strata, collective)
        counts = match.merge(strata.push_segments(strata.segment_lengths.double()[None]))
        shared = StateLayout(strata, match, counts[0])
    return Layout(contexts, shared)


def _summed_advantages(batch: RatioBatch, strata: Strata) -> Tensor:
    """Over each segment; float64."""
    values, lengths = batch.given_advantages.double(), strata.segment_lengths
    if batch.by_row:
        return strata.of_rows(values) * lengths
    return torch.segment_reduce(values, "sum", lengths=lengths, unsafe=True)


def _match(strata: Strata, collective: Collective) -> Match:
    if collective.size == 1 or not any(strata.shared):
        return LOCAL
    return collective.match(strata)


def _warn_if_idle(strata: Strata) -> None:
    for name in strata.idle:
        warnings.warn(
            f'every context of the stratum "{name}" is the only child of its parent: its residual '
            "drift is 0 and its gate cannot act in this batch (one prompt group a domain, one "
            "trajectory a group, ...)",
            FiberPOWarning,
            stacklevel=5,
        )
