"""Plans evaluated by Triton kernels: any chart, gate and forest; one to three sweeps over tokens.

=====================================  =========================================  ================
plan                                   launches                                   bytes a token
=====================================  =========================================  ================
no contexts, or one over each segment  tokens, sum                                12
stops (any contexts)                   tokens (guessing that none of them stops   12, and 12 more
                                       anything), contexts, tokens (only where    where one does
                                       the guess was wrong), sum
several strata, one finest context     tokens (guessing that all gates pass),     12, and 12 more
over each segment                      contexts, tokens (only where the guess     where a gate
                                       was wrong), sum                            acted
all else, and segments too long to     tokens, contexts, tokens, contexts,        28
hold                                   tokens, sum
=====================================  =========================================  ================

Bytes are those of float32 log-probs with weights constant on each segment. Every sum has a fixed
order and nothing is added atomically: the same input gives the same bits. Nothing asks the device:
tables are made at the first evaluation of a plan and kept with it, after which an evaluation can be
captured in a CUDA graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from triton import knobs

from ..plan import ChartCode, Evaluation, GateCode, GatePlan, LoweredGate, Merge
from . import context_kernels, token_kernels
from .context_kernels import stage
from .schedule import Run, cut
from .token_kernels import add, join, tokens

name = "triton"

SMALL = 4096
"""Contexts that one program takes through all strata in one launch."""

FINAL, GUESS, SUMS, MIDDLE, GRADIENT = (
    getattr(token_kernels, phase).value
    for phase in ("FINAL", "GUESS", "SUMS", "MIDDLE", "GRADIENT")
)
RISE_DRIFT, SINK_DRIFT, RISE_WEIGHT, SINK_PULL = (
    getattr(context_kernels, step).value
    for step in ("RISE_DRIFT", "SINK_DRIFT", "RISE_WEIGHT", "SINK_PULL")
)
_ADD = 8192
_OPTIONS = {"enable_fp_fusion": True}


def unsupported(plan: GatePlan, log_probs: Tensor) -> list[str]:
    """Reasons why these kernels cannot serve; empty if they can."""
    reasons = []
    if log_probs.device.type != "cuda" and not knobs.runtime.interpret:
        reasons.append(
            f"log_probs are on {log_probs.device.type!r}; Triton's kernels run on a GPU "
            "(or, slowly and for tests, anywhere under TRITON_INTERPRET=1)"
        )
    if log_probs.dtype not in (torch.float32, torch.float64):
        reasons.append(f"log_probs are {log_probs.dtype}; they must be float32 or float64")
    if plan.states is not None:
        reasons.append("tokens share states (BudgetClip over a label); there is no kernel for it")
    return reasons


@lru_cache(maxsize=256)
def _numbers(gates: tuple[LoweredGate, ...], device: torch.device) -> Tensor:
    """Four float64 a gate."""
    rows = [(*gate.numbers, 0.0, 0.0, 0.0, 0.0)[:4] for gate in gates]
    return torch.tensor(rows, dtype=torch.float64, device=device).flatten()


@dataclass(frozen=True, eq=False)
class _Tables:
    """What is made once for a plan (and must not keep it alive)."""

    runs: tuple[Run, ...]
    numbers: Tensor
    context_numbers: Tensor | None = None
    bounds: Tensor | None = None
    columns: tuple[int, ...] = ()
    order: Tensor | None = None
    hanging: Tensor | None = None

    @classmethod
    def of(cls, plan: GatePlan, length: int) -> _Tables:
        device, at = plan.starts.device, plan.contexts
        soft = GateCode.SOFT in (plan.first.code, plan.token.code)
        heavy = soft or plan.pessimistic or plan.chart is ChartCode.DEVIATION
        runs = cut(plan.starts, length, plan.longest, heavy)
        if at is None:
            return cls(runs, _numbers((plan.first, plan.token), device))
        sizes = [high - low for low, high in zip(at.bounds[:-1], at.bounds[1:], strict=True)]
        below = [*sizes[1:], plan.segments]
        fan = [more / max(size, 1) for more, size in zip(below, sizes, strict=True)]
        order, hanging = at.below
        return cls(
            runs,
            _numbers((plan.first, plan.token, at.gates[-1]), device),
            _numbers(at.gates, device),
            torch.tensor(at.bounds, dtype=torch.int64, device=device),
            tuple(512 if f > 64 else 64 if f > 8 else 8 for f in fan),
            order,
            hanging,
        )


_KEPT: WeakKeyDictionary[GatePlan, _Tables] = WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class _Call:
    """One evaluation: its inputs, its buffers, its launches."""

    plan: GatePlan
    tables: _Tables
    log_probs: Tensor
    old_log_probs: Tensor
    advantages: Tensor
    scale: Tensor
    merge: Merge | None

    @cached_property
    def signed(self) -> bool:
        return self.plan.chart is ChartCode.SIGNED_LOG

    @cached_property
    def slots(self) -> int:
        return self.plan.segments

    def empty(self, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.log_probs.device)

    @cached_property
    def gradient(self) -> Tensor:
        return self.empty(len(self.log_probs), dtype=self.log_probs.dtype)

    @cached_property
    def value(self) -> Tensor:
        return self.empty(self.slots)

    @cached_property
    def sums(self) -> Tensor:
        return self.empty(6, self.slots)

    @cached_property
    def above(self) -> dict[str, Tensor]:
        """Buffers of the contexts."""
        assert self.plan.contexts is not None
        size, channels = len(self.plan.contexts), self.plan.chart.channels
        flags = self.empty(2, size, dtype=torch.int32)
        rows = "summed", "mean", "path", "passed", "gated", "pulled", "pull"
        found = dict(zip(rows, self.empty(len(rows), channels, size), strict=True))
        return found | {"weight": self.empty(size), "passing": flags[0], "stale": flags[1]}

    def sweep(self, run: Run, phase: int, local: LoweredGate | None = None) -> None:
        """Launch a phase over the tokens of a run."""
        plan, at = self.plan, self.plan.contexts
        split, context, one = run.first is not None, -1, self.value
        sums, value, slots = self.sums if at is not None else one, self.value, self.slots
        if split:
            sums = self.empty(7, run.pieces)
            value, slots = sums[6], run.pieces
        above: dict[str, Tensor | None] = dict.fromkeys(("mean", "path", "pull", "stale"))
        leaf = None
        if at is not None:
            context = 0 if local is None else int(local.code)
            leaf = None if at.row_leaf else at.leaf
            if phase in (MIDDLE, GRADIENT):
                above = {key: self.above[key] for key in above}
            if phase == FINAL:
                above["mean"] = self.above["mean"]
            if not (self.guessing and phase == GRADIENT and not split):
                above["stale"] = None
        tokens[(run.programs,)](
            self.log_probs, self.old_log_probs, self.advantages, self.scale, self.gradient, value,
            plan.starts, plan.omega, leaf, self.tables.numbers,
            run.segment, run.low, run.high,
            *((None,) * 5 if at is None else (at.mass, at.budget, at.slope, at.sign, at.count)),
            above["mean"], above["path"], above["pull"], above["stale"], sums,
            len(self.log_probs), run.pieces, 0 if at is None else len(at),
            0 if at is None else at.bounds[-2], slots,
            PHASE=phase, CHART=int(plan.chart), FIRST=int(plan.first.code),
            TOKEN=int(plan.token.code), CONTEXT=context,
            PESSIMISTIC=plan.pessimistic, DETACHED=plan.detached,
            TOKEN_ADVANTAGES=self.advantages.shape[0] != plan.segments,
            TOKEN_SCALE=self.scale.shape[0] != plan.segments,
            TABLE=run.segment is not None, SPLIT=split,
            RAGGED=len(self.log_probs) % 4 != 0, VECTOR=run.vector,
            ROWS=run.rows, COLS=run.columns, num_warps=run.warps,
            maxnreg=128 if run.columns >= 512 else None, **_OPTIONS,
        )  # fmt: skip
        if split and phase != GRADIENT:
            assert run.segments is not None
            join[(len(run.segments),)](
                sums, self.value, self.sums if at is not None else one, run.first, run.segments,
                self.slots, run.pieces, PHASE=phase, CONTEXTS=at is not None, SIGNED=self.signed,
                num_warps=2, **_OPTIONS,
            )  # fmt: skip

    def rise_and_sink(self, steps: int, total: Tensor | None = None) -> None:
        """Launch steps over the contexts; ``total`` in place of what was summed here."""
        at, tables = self.plan.contexts, self.tables
        assert at is not None
        buffers, strata = self.above, len(at.gates)
        merged = steps & SINK_PULL

        def launch(programs: int, which: int, begin: int, end: int, lanes: int) -> None:
            stage[(programs,)](
                tables.bounds, at.parent, tables.order, tables.hanging, at.mass, at.budget,
                at.slope, at.sign, at.count, tables.context_numbers, self.sums, buffers["summed"],
                buffers["summed"] if total is None or merged else total,
                buffers["mean"], buffers["path"], buffers["passed"], buffers["passing"],
                buffers["weight"], buffers["gated"], buffers["pulled"],
                buffers["pulled"] if total is None or not merged else total,
                buffers["pull"], buffers["stale"], self.value, self.slots, len(at),
                STEPS=which, FROM=begin, TO=end, GATES=tuple(int(g.code) for g in at.gates),
                ROW_LEAF=at.row_leaf, GUESSED=self.guessing, SIGNED=self.signed,
                COLS=tables.columns, LANES=lanes, num_warps=lanes // 128, **_OPTIONS,
            )  # fmt: skip

        if len(at) <= SMALL:
            launch(1, steps, 0, strata, 1024)
            return
        for step in (RISE_DRIFT, SINK_DRIFT, RISE_WEIGHT, SINK_PULL):
            if steps & step:
                up = step in (RISE_DRIFT, RISE_WEIGHT)
                for k in reversed(range(strata)) if up else range(strata):
                    size = at.bounds[k + 1] - at.bounds[k]
                    direct = not up or (at.row_leaf and k == strata - 1)
                    rows = 512 if direct else 512 // tables.columns[k]
                    launch(max(-(-size // rows), 1), step, k, k + 1, 512)

    @cached_property
    def stops(self) -> bool:
        """Whether contexts stop tokens: no adjoints, and the first sweep guesses that none does."""
        return self.plan.token.code is GateCode.STOP

    @cached_property
    def guessing(self) -> bool:
        """Whether the first sweep writes the gradient that holds where every gate passes."""
        plan, at = self.plan, self.plan.contexts
        if at is None or self.stops:
            return self.stops
        return (
            at.row_leaf
            and len(at.gates) > 1
            and self.merge is None
            and not plan.pessimistic
            and not plan.detached
            and plan.chart is not ChartCode.DEVIATION
            and not any(run.first is not None for run in self.tables.runs)
        )

    def run(self) -> None:
        """All launches but the last sum."""
        runs, at = self.tables.runs, self.plan.contexts
        split = [run for run in runs if run.first is not None]
        whole = [run for run in runs if run.first is None]
        if at is None:
            for run in runs:
                self.sweep(run, FINAL)
            return
        final = at.row_leaf and len(at.gates) == 1 and self.merge is None
        for run in whole:
            if final:
                self.sweep(run, FINAL, at.gates[0])
            else:
                self.sweep(run, GUESS if self.guessing else SUMS)
        for run in split:
            self.sweep(run, SUMS)
        if final and not split:
            return
        if self.guessing and not self.stops:
            self.rise_and_sink(RISE_DRIFT | SINK_DRIFT | RISE_WEIGHT | SINK_PULL)
        else:
            self.rise_and_sink(RISE_DRIFT | (0 if self.merge else SINK_DRIFT))
            if self.merge:
                total = self.merge(self.above["summed"]).contiguous()
                self.rise_and_sink(SINK_DRIFT, total)
            for run in split + ([] if final or self.stops else whole):
                self.sweep(run, MIDDLE)
            if not self.plan.detached:
                self.rise_and_sink(RISE_WEIGHT | (0 if self.merge else SINK_PULL))
                if self.merge:
                    pulled = self.merge(self.above["pulled"]).contiguous()
                    self.rise_and_sink(SINK_PULL, pulled)
        for run in split + ([] if final else whole):
            self.sweep(run, GRADIENT)


def _total(values: Tensor) -> Tensor:
    """Sum of ``[n]``, in a fixed order."""
    while len(values) != 1:
        programs = max(-(-len(values) // _ADD), 1)
        out = torch.empty(programs, dtype=values.dtype, device=values.device)
        add[(programs,)](values, out, len(values), BLOCK=1024, REPEAT=_ADD // 1024, **_OPTIONS)
        values = out
    return values[0]


def evaluate(
    plan: GatePlan,
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    scale: Tensor,
    merge: Merge | None = None,
    merge_states: Merge | None = None,
) -> Evaluation:
    """As `fiberpo.ops.plan.Backend.evaluate`; only where `unsupported` has no reasons."""
    tables = _KEPT.get(plan)
    if tables is None:
        tables = _KEPT[plan] = _Tables.of(plan, len(log_probs))
    call = _Call(
        plan, tables, log_probs.detach().contiguous(), old_log_probs.detach().contiguous(),
        advantages.contiguous(), scale.contiguous(), merge,
    )  # fmt: skip
    call.run()
    mean = None if plan.contexts is None else call.above["mean"]
    return Evaluation(_total(call.value), call.value, call.gradient, mean)


__all__ = ["evaluate", "name", "unsupported"]
