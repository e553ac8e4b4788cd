"""Plans evaluated on the CPU in C++: sums, gates, ``J`` and gradient in one sweep over the tokens.

`cpu.cpp` is built when it is first asked for (`fiberpo.ops.build_cpp`), never at import. Rows are
shared out over ``torch.get_num_threads()`` threads; the answer does not depend on how many.
"""

from __future__ import annotations

import ctypes
import itertools
import struct
import weakref
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from . import build_cpp
from .plan import Evaluation, GateCode, GatePlan, Merge

name = "cpu"

_POINTER, _INT = ctypes.c_void_p, ctypes.c_int64


def _fields(kind: Any, names: str) -> list[tuple[str, Any]]:
    return [(field, kind) for field in names.split()]


class _Plan(ctypes.Structure):
    """``Plan`` of cpu.cpp."""

    _fields_ = [
        *_fields(
            _INT,
            "segments contexts strata states chart token first pessimistic detached has_contexts "
            "row_leaf",
        ),
        *_fields(ctypes.c_double * 4, "token_numbers first_numbers"),
        *_fields(_POINTER, "starts leaf parent bounds codes state"),
        *_fields(_POINTER, "omega numbers mass count budget slope sign multiplicity"),
    ]


_CALL = struct.Struct("=20q")
"""``Call`` of cpu.cpp: counts and flags, then pointers."""


class _Prepared:
    """A plan as the library reads it; keeps the tensors behind the pointers alive."""

    def __init__(self, plan: GatePlan) -> None:
        self.kept: list[Tensor] = []
        at, states = plan.contexts, plan.states
        found = _Plan(
            segments=plan.segments,
            contexts=0 if at is None else len(at),
            strata=0 if at is None else len(at.gates),
            states=0 if states is None else states.multiplicity.shape[0],
            chart=plan.chart,
            token=plan.token.code,
            first=plan.first.code,
            pessimistic=plan.pessimistic,
            detached=plan.detached,
            has_contexts=at is not None,
            row_leaf=at is not None and at.row_leaf,
            token_numbers=plan.token.numbers,
            first_numbers=plan.first.numbers,
            starts=self.keep(plan.starts, torch.int64),
            omega=self.keep(plan.omega, torch.float64),
        )
        if at is not None:
            found.leaf = self.keep(at.leaf, torch.int64)
            found.parent = self.keep(at.parent, torch.int64)
            found.bounds = self.keep(torch.tensor(at.bounds), torch.int64)
            found.codes = self.keep(torch.tensor([gate.code for gate in at.gates]), torch.int64)
            numbers = [(*gate.numbers, 0.0, 0.0, 0.0, 0.0)[:4] for gate in at.gates]
            found.numbers = self.keep(torch.tensor(numbers, dtype=torch.float64), torch.float64)
            for field in ("mass", "count", "budget", "slope", "sign"):
                setattr(found, field, self.keep(getattr(at, field), torch.float64))
        if states is not None:
            found.state = self.keep(states.index, torch.int64)
            found.multiplicity = self.keep(states.multiplicity, torch.float64)
        self.plan = found
        self.pointer = ctypes.addressof(found)
        # base, slope and adjoint of contexts; three sums of rows
        channels, contexts = plan.chart.channels, found.contexts
        self.channels = channels
        self.work = 3 * channels * contexts + (channels + 1) * plan.segments

    def keep(self, values: Tensor, dtype: torch.dtype) -> int:
        values = values.to(dtype).contiguous()
        self.kept.append(values)
        return values.data_ptr()


_prepared: weakref.WeakKeyDictionary[GatePlan, _Prepared] = weakref.WeakKeyDictionary()


def _prepare(plan: GatePlan) -> _Prepared:
    found = _prepared.get(plan)
    if found is None:
        found = _prepared[plan] = _Prepared(plan)
    return found


def _function() -> Any:
    library = build_cpp.load("cpu")
    if isinstance(library, str):
        return None
    function = library.fiberpo_evaluate
    if function.argtypes is None:
        function.restype, function.argtypes = None, [_POINTER, ctypes.c_char_p]
    return function


def unavailable() -> list[str]:
    """Why no plan at all can be served on this machine; empty if some can. Builds the library."""
    found = build_cpp.load("cpu")
    return [found] if isinstance(found, str) else []


def unsupported(plan: GatePlan, log_probs: Tensor) -> list[str]:
    """Why this backend cannot serve a plan; empty if it can."""
    reasons = []
    if log_probs.device.type != "cpu":
        reasons.append(f"the log-probs are on {log_probs.device}, not on the CPU")
    if log_probs.dtype not in (torch.float32, torch.float64):
        reasons.append(f"the log-probs are {log_probs.dtype}, not float32 or float64")
    at = plan.contexts.gates if plan.contexts is not None else ()
    if GateCode.TAPER in (plan.first.code, plan.token.code):
        reasons.append("a TAPER gate stands at the tokens, where there is nothing to count")
    if GateCode.BUDGET in (plan.first.code, *(gate.code for gate in at)):
        reasons.append("a BUDGET gate stands elsewhere than at the token")
    return reasons or unavailable()


def evaluate(
    plan: GatePlan,
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    scale: Tensor,
    merge: Merge | None = None,
    merge_states: Merge | None = None,
) -> Evaluation:
    """As `fiberpo.ops.plan.Backend.evaluate`."""
    if old_log_probs.dtype is not log_probs.dtype:
        wide = log_probs.double(), old_log_probs.double()
        found = evaluate(plan, *wide, advantages, scale, merge, merge_states)
        return replace(found, gradient=found.gradient.to(log_probs.dtype))
    function, at = _function(), _prepare(plan)
    dtype, tokens, segments = log_probs.dtype, log_probs.shape[0], plan.segments
    channels, contexts, states = at.channels, at.plan.contexts, at.plan.states
    log_probs, old_log_probs = log_probs.contiguous(), old_log_probs.contiguous()
    if advantages.dtype is not torch.float32:
        advantages = advantages.double()
    advantages, scale = advantages.contiguous(), scale.double().contiguous()
    gradient = torch.empty(tokens, dtype=dtype)
    answers = torch.empty(1 + segments + channels * contexts, dtype=torch.float64)
    sums = torch.empty(channels * (contexts + 2 * states) + at.work, dtype=torch.float64)
    answer, start = answers.data_ptr(), sums.data_ptr()

    def run(begin: int, end: int) -> None:
        function(
            at.pointer,
            _CALL.pack(
                tokens,
                dtype is torch.float64,
                advantages.dtype is torch.float64,
                advantages.shape[0] != segments,
                scale.shape[0] != segments,
                torch.get_num_threads(),
                begin,
                end,
                log_probs.data_ptr(),
                old_log_probs.data_ptr(),
                advantages.data_ptr(),
                scale.data_ptr(),
                gradient.data_ptr(),
                answer,
                answer + 8,
                answer + 8 * (1 + segments),
                start,
                start + 8 * channels * (contexts + 2 * states),
                start + 8 * channels * contexts,
                start + 8 * channels * (contexts + states),
            ),
        )

    mean = None
    if plan.contexts is not None:
        mean = answers[1 + segments :].view(channels, contexts)
    if merge is None and merge_states is None:
        run(0, 4)
    else:
        merge = None if mean is None else merge
        merge_states = None if plan.states is None else merge_states
        cuts = [0, contexts, contexts + states, contexts + 2 * states]
        adjoint, totals, shared = (
            sums[channels * i : channels * j].view(channels, j - i)
            for i, j in itertools.pairwise(cuts)
        )
        run(0, 1)
        _merge(merge, mean)
        run(1, 2)
        _merge(merge_states, totals)
        run(2, 3)
        if not plan.detached:
            _merge(merge_states, shared)
            _merge(merge, adjoint)
        run(3, 4)
    return Evaluation(answers[0], answers[1 : 1 + segments], gradient, mean)


def _merge(merge: Merge | None, sums: Tensor | None) -> None:
    if merge is not None and sums is not None:
        sums.copy_(merge(sums.clone()))


__all__ = ["evaluate", "name", "unavailable", "unsupported"]
