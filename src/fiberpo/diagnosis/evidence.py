"""What the doctor collects from batches: sums, so that steps, micro-batches and parts add up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ..batch import RatioBatch
from ..gates import Zero
from ..objective import Objective, Surrogate
from ..statistics import Statistics
from .limits import ALL, limits
from .tally import FRESH

COLUMNS = ("log_probs", "old_log_probs", "rollout_log_probs")

MOST_PAIRS = 1_000_000
"""Most trajectories of which length and acceptance are kept."""


@dataclass(frozen=True)
class Drift:
    """Drifts of the contexts of one stratum beside their limit.

    Attributes:
        stratum, context: ``context`` is a domain that has a budget of its own, or ``"all"``.
        limit: ``[positive, negative]``, None for gates without one.
        p90: the same of the observed drifts.
        gated: share of the contexts whose gate leaves PASS.
    """

    stratum: str
    context: str
    limit: list[float] | None
    p90: tuple[float, float]
    gated: float

    @property
    def place(self) -> str:
        """For messages."""
        return self.stratum if self.context == ALL else f"{self.stratum} {self.context!r}"


@dataclass(eq=False)
class Evidence:
    """Sums over batches; `add` once an optimizer step.

    Attributes:
        objective: whose gates stand beside the drifts, or None.
        steps, fresh: optimizer steps; those on which every log ratio is 0.
        values, not_bf16: per column of log-probs, how many different numbers were seen at once;
            columns with a number that bf16 does not have.
        idle: stratum -> steps (that are not fresh) in which its gate could not act.
        channels, lost, expected, spread: sums over the tokens of steps that are not fresh: of
            ``max(l, 0)`` and ``max(-l, 0)``, of ``-l``, of ``l^2 / 2``, and over trajectories of
            the square of the summed ``l``.
        mismatch: ``[2, rows]`` drifts from the engine to the anchor.
        accepted: ``[2, trajectories]`` lengths, and what the mask says.
    """

    objective: Objective | None = None
    steps: int = 0
    fresh: int = 0
    tokens: int = 0
    trajectories: int = 0
    zero_advantage_steps: int = 0
    groups: int = 0
    groups_of_one: int = 0
    small_groups: int = 0
    mixed_groups: list[str] = field(default_factory=list)
    values: dict[str, int] = field(default_factory=dict)
    not_bf16: set[str] = field(default_factory=set)
    idle: dict[str, int] = field(default_factory=dict)
    channels: np.ndarray = field(default_factory=lambda: np.zeros(2))
    expected: float = 0.0
    lost: float = 0.0
    spread: float = 0.0
    moved_tokens: int = 0
    mismatch: list[np.ndarray] = field(default_factory=list)
    accepted: list[np.ndarray] = field(default_factory=list)
    statistics: Statistics | None = None

    def add(
        self,
        batches: Sequence[RatioBatch],
        surrogates: Sequence[Surrogate] = (),
        *,
        prompts: Sequence[str] | None = None,
        generations: int | None = None,
    ) -> None:
        """One optimizer step.

        Args:
            batches: its tokens, whole or in parts.
            surrogates: what the objective says of them, where there is one.
            prompts: one a row, of a step that is one batch.
            generations: answers to a prompt, where known.
        """
        batches = [batch for batch in batches if len(batch)]
        if not batches:
            return
        self.steps += 1
        self.tokens += sum(len(batch) for batch in batches)
        self.trajectories += sum(batch.rows for batch in batches)
        fresh = all(float(_log_ratio(b).abs().max()) <= FRESH for b in batches)
        self.fresh += fresh
        self.zero_advantage_steps += all(not bool(b.advantages.any()) for b in batches)
        self._count_groups(batches, prompts, generations)
        for batch in batches:
            self._look_at_values(batch)
            self._compare_with_rollout(batch)
        for surrogate in surrogates:
            self._look_at_mask(surrogate)
        if fresh:
            return
        for batch in batches:
            self._moments(batch)
        for name in {n for s in surrogates for n in _idle(s)}:
            self.idle[name] = self.idle.get(name, 0) + 1
        for surrogate in surrogates:
            found = surrogate.statistics
            self.statistics = found if self.statistics is None else self.statistics.merge(found)

    def _count_groups(
        self,
        batches: Sequence[RatioBatch],
        prompts: Sequence[str] | None,
        generations: int | None,
    ) -> None:
        """Answers of each group; a group may lie in several parts of a step."""
        sizes: dict[str, float] = {}
        for batch in batches:
            label = batch.labels.get("group")
            if label is None or label.per_token:
                continue
            codes = label.codes
            share = torch.ones(batch.rows, dtype=torch.float64, device=codes.device)
            if "trajectory" in batch.labels:  # rows may be pieces of an answer
                share = batch.lengths / batch.trajectory_lengths[batch.labels["trajectory"].codes]
            here = codes >= 0
            sums = torch.bincount(codes[here], share[here].double(), minlength=label.count)
            for name, size in zip(label.value_names(), sums.tolist(), strict=True):
                sizes[name] = sizes.get(name, 0.0) + size
            if prompts is not None and len(self.mixed_groups) < 3:
                self._mixed(label.value_names(), codes.tolist(), prompts)
        self.groups += len(sizes)
        self.groups_of_one += sum(size < 1.5 for size in sizes.values())
        if generations is not None:
            self.small_groups += sum(size < generations - 0.5 for size in sizes.values())

    def _mixed(self, names: Sequence[str], codes: list[int], prompts: Sequence[str]) -> None:
        first: dict[int, str] = {}
        for code, prompt in zip(codes, prompts, strict=True):
            if code >= 0 and first.setdefault(code, prompt) != prompt:
                self.mixed_groups.append(names[code])
                return

    def _look_at_values(self, batch: RatioBatch) -> None:
        """Whether every log-prob of a column is a number that bf16 has."""
        for name in COLUMNS:
            column = getattr(batch, name)
            if column is None or name in self.not_bf16:
                continue
            column = column.detach()
            distinct = len(torch.unique(column[:4096]))
            self.values[name] = max(distinct, self.values.get(name, 0))
            if not torch.equal(column.bfloat16().to(column.dtype), column):
                self.not_bf16.add(name)

    def _compare_with_rollout(self, batch: RatioBatch) -> None:
        """``[2, rows]`` drift of each trajectory from the engine to the anchor."""
        if batch.rollout_log_probs is None or len(self.mismatch) * batch.rows > MOST_PAIRS:
            return
        gap = (batch.old_log_probs - batch.rollout_log_probs).double()
        sums = [_rows(batch, gap.clamp(min=0)), _rows(batch, (-gap).clamp(min=0))]
        self.mismatch.append((torch.stack(sums) / batch.lengths).cpu().numpy())

    def _look_at_mask(self, surrogate: Surrogate) -> None:
        if surrogate.kept is None or len(self.accepted) * len(surrogate.kept) > MOST_PAIRS:
            return
        lengths = surrogate.batch.trajectory_lengths.double()
        self.accepted.append(torch.stack([lengths, surrogate.kept.double()]).cpu().numpy())

    def _moments(self, batch: RatioBatch) -> None:
        """For the identity ``E_old[r] = 1``: ``-mean l`` is about ``mean l^2 / 2``."""
        log_ratio = _log_ratio(batch)
        up, down = log_ratio.clamp(min=0).sum(), (-log_ratio).clamp(min=0).sum()
        self.channels += np.array([float(up), float(down)])
        self.moved_tokens += len(batch)
        self.lost -= float(log_ratio.sum())
        self.expected += float(log_ratio.square().sum()) / 2
        self.spread += float(_rows(batch, log_ratio).square().sum())

    def drifts(self) -> list[Drift]:
        """Each stratum's drifts beside the limits of its gate, over steps that are not fresh."""
        if self.statistics is None or self.objective is None:
            return []
        gates, found = {**self.objective.gate_map.gates, "token": self.objective.gate_map.token}, []
        for stratum, known in limits(self.objective).items():
            if isinstance(gates.get(stratum), Zero) and not self.objective.stops:
                continue
            for context, limit in known:
                row = self._drift(stratum, context, limit)
                found += [] if row is None else [row]
        return found

    def _drift(self, stratum: str, context: str, limit: list[float] | None) -> Drift | None:
        statistics = self.statistics
        suffix = "" if context == ALL else f"/domain={context}"
        passed = f"gate/{stratum}/pass_frac{suffix}"
        keys = [f"gate/{stratum}/drift_{c}{suffix}" for c in ("pos", "neg")]
        assert statistics is not None
        if passed not in statistics.means or any(k not in statistics.drifts for k in keys):
            return None
        count, total = statistics.means[passed].values[:2].tolist()
        p90 = [statistics.quantiles(k, (0.9,))[0] for k in keys]
        p90 = [0.0 if np.isnan(x) else x for x in p90]
        return Drift(stratum, context, limit, (p90[0], p90[1]), 1 - total / count)


def _log_ratio(batch: RatioBatch) -> Tensor:
    return batch.log_ratio.detach().double()


def _rows(batch: RatioBatch, values: Tensor) -> Tensor:
    out = torch.zeros(batch.rows, dtype=torch.float64, device=values.device)
    return out.index_add(0, batch.row, values)


def _idle(surrogate: Surrogate) -> tuple[str, ...]:
    strata = surrogate.gated.strata
    return () if strata is None else strata.idle
