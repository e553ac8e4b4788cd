"""Kernels over contexts: up the forest and down again, a stratum at a time, in a fixed order.

Four steps. With few contexts one program takes all of them and all strata in one launch; with many,
each step on each stratum is a launch of its own.

===============  ===================================================================================
`RISE_DRIFT`     summed drifts of everything below, fine to coarse
`SINK_DRIFT`     aggregates ``S``, gates, ``h`` summed from the root, coarse to fine
`RISE_WEIGHT`    adjoints ``B``, ``D``, fine to coarse
`SINK_PULL`      ``D / mass`` summed from the root, coarse to fine
===============  ===================================================================================
"""

from __future__ import annotations

import triton
import triton.language as tl

from .gate_kernels import STOP, context_gate

RISE_DRIFT = tl.constexpr(1)
SINK_DRIFT = tl.constexpr(2)
RISE_WEIGHT = tl.constexpr(4)
SINK_PULL = tl.constexpr(8)


@triton.jit
def gathered(
    segments, below, order, begin, end, real, children, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """Per row, what ``order[begin:end]`` names: segments, then contexts; in a fixed order."""
    lanes = tl.arange(0, COLS)[None, :]
    summed = tl.zeros([ROWS, COLS], tl.float64)
    longest = tl.max(tl.where(real, end - begin, 0), 0)
    for offset in range(0, longest, COLS):
        at = begin[:, None] + offset + lanes
        here = real[:, None] & (at < end[:, None])
        thing = tl.load(order + at, mask=here, other=0)
        is_segment = here & (thing < children)
        summed += tl.load(segments + thing, mask=is_segment, other=0.0)
        if below is not None:
            summed += tl.load(below + thing - children, mask=here & (thing >= children), other=0.0)
    return tl.sum(summed, 1)


@triton.jit
def rise_drift(
    c, real, low, order, starts, sums, summed, slots, contexts,
    DIRECT: tl.constexpr, SIGNED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """``summed[ch, c]``; ``DIRECT``: context ``low + s`` holds segment ``s`` and nothing else."""
    if DIRECT:
        sum0 = tl.load(sums + c - low, mask=real, other=0.0)
        if SIGNED:
            sum1 = tl.load(sums + slots + c - low, mask=real, other=0.0)
    else:
        begin = tl.load(starts + c, mask=real, other=0)
        end = tl.load(starts + c + 1, mask=real, other=0)
        sum0 = gathered(sums, summed, order, begin, end, real, slots, ROWS, COLS)
        if SIGNED:
            sum1 = gathered(
                sums + slots, summed + contexts, order, begin, end, real, slots, ROWS, COLS
            )
    tl.store(summed + c, sum0, mask=real)
    if SIGNED:
        tl.store(summed + contexts + c, sum1, mask=real)


@triton.jit
def sink_channel(
    c, real, above, rooted, total, mass, mean, path, passed, budget, slope, sign, count, numbers,
    contexts, CODE: tl.constexpr, CHANNEL: tl.constexpr, SIGNED: tl.constexpr,
):  # fmt: skip
    """One channel of `sink_drift`; whether the gate did nothing."""
    row = CHANNEL * contexts
    own = tl.load(mass + c, mask=real, other=1.0)
    own = tl.where(own == 0.0, 1.0, own)
    whole = tl.load(mass + above, mask=rooted, other=1.0)
    whole = tl.where(whole == 0.0, 1.0, whole)
    found = tl.load(total + row + c, mask=real, other=0.0) / own
    x = found - tl.load(total + row + above, mask=rooted, other=0.0) / whole
    if CODE == STOP:
        x = found
    value, gain = context_gate(
        x, c, real, budget, slope, sign, count, numbers, contexts, CODE, CHANNEL, not SIGNED
    )
    tl.store(mean + row + c, found, mask=real)
    tl.store(passed + row + c, gain, mask=real)
    tl.store(path + row + c, value + tl.load(path + row + above, mask=rooted, other=0.0), mask=real)
    return value == 0.0 if CODE == STOP else (value == x) & (gain == 1.0)


@triton.jit
def sink_drift(
    c, real, parent, total, mass, mean, path, passed, passing, stale, budget, slope, sign, count,
    numbers, contexts, CODE: tl.constexpr, SIGNED: tl.constexpr,
):  # fmt: skip
    """``S``, slopes, ``h`` along the path, and whether every gate on it passes."""
    above = tl.load(parent + c, mask=real, other=-1)
    rooted = real & (above >= 0)
    open_ = sink_channel(
        c, real, above, rooted, total, mass, mean, path, passed, budget, slope, sign, count,
        numbers, contexts, CODE, 0, SIGNED,
    )  # fmt: skip
    if SIGNED:
        open_ = open_ & sink_channel(
            c, real, above, rooted, total, mass, mean, path, passed, budget, slope, sign, count,
            numbers, contexts, CODE, 1, SIGNED,
        )  # fmt: skip
    open_ = open_ & (tl.load(passing + above, mask=rooted, other=1) != 0)
    tl.store(passing + c, open_.to(tl.int32), mask=real)
    if CODE == STOP:
        tl.store(stale + c, (open_ == 0).to(tl.int32), mask=real)


@triton.jit
def rise_weight(
    c, real, low, order, starts, sums, weight, gated, pulled, passed, path, mean, value,
    slots, contexts, DIRECT: tl.constexpr, GUESSED: tl.constexpr, SIGNED: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """``A`` (sum of adjoints below), ``B = A g'``, and ``D`` of the part that lies here."""
    if DIRECT:
        s = c - low
        total = tl.load(sums + 2 * slots + s, mask=real, other=0.0)
        lower0 = tl.load(sums + 3 * slots + s, mask=real, other=0.0)
        lower1 = lower0
        if SIGNED:
            lower1 = tl.load(sums + 4 * slots + s, mask=real, other=0.0)
        if GUESSED:
            more = tl.load(path + c, mask=real, other=0.0)
            more = more - tl.load(mean + c, mask=real, other=0.0)
            if SIGNED:
                less = tl.load(path + contexts + c, mask=real, other=0.0)
                more = more - (less - tl.load(mean + contexts + c, mask=real, other=0.0))
            factor = tl.exp(more + tl.load(sums + 5 * slots + s, mask=real, other=0.0))
            factor = tl.where(total == 0.0, tl.where(lower0 == 0.0, 1.0, factor), factor)
            total, lower0, lower1 = total * factor, lower0 * factor, lower1 * factor
            tl.store(value + s, total, mask=real)
    else:
        begin = tl.load(starts + c, mask=real, other=0)
        end = tl.load(starts + c + 1, mask=real, other=0)
        total = gathered(sums + 2 * slots, weight, order, begin, end, real, slots, ROWS, COLS)
        lower0 = gathered(sums + 3 * slots, gated, order, begin, end, real, slots, ROWS, COLS)
        lower1 = lower0
        if SIGNED:
            lower1 = gathered(
                sums + 4 * slots, gated + contexts, order, begin, end, real, slots, ROWS, COLS
            )
    through = total * tl.load(passed + c, mask=real, other=0.0)
    tl.store(weight + c, total, mask=real)
    tl.store(gated + c, through, mask=real)
    tl.store(pulled + c, through - lower0, mask=real)
    if SIGNED:
        through = -total * tl.load(passed + contexts + c, mask=real, other=0.0)
        tl.store(gated + contexts + c, through, mask=real)
        tl.store(pulled + contexts + c, through - lower1, mask=real)


@triton.jit
def sink_pull(c, real, parent, mass, pulled, pull, passing, stale, contexts, SIGNED: tl.constexpr):
    """``D / mass`` along the path; what a guess that all gates pass got wrong is ``stale``."""
    above = tl.load(parent + c, mask=real, other=-1)
    rooted = real & (above >= 0)
    own = tl.load(mass + c, mask=real, other=1.0)
    own = tl.where(own == 0.0, 1.0, own)
    over = tl.load(pull + above, mask=rooted, other=0.0)
    tl.store(pull + c, over + tl.load(pulled + c, mask=real, other=0.0) / own, mask=real)
    wrong = (tl.load(passing + c, mask=real, other=1) == 0) | (over != 0.0)
    if SIGNED:
        over = tl.load(pull + contexts + above, mask=rooted, other=0.0)
        here = tl.load(pulled + contexts + c, mask=real, other=0.0) / own
        tl.store(pull + contexts + c, over + here, mask=real)
        wrong = wrong | (over != 0.0)
    tl.store(stale + c, wrong.to(tl.int32), mask=real)


@triton.jit
def stratum(
    bounds, parent, order, starts, mass, budget, slope, sign, count, numbers,
    sums, summed, total, mean, path, passed, passing, weight, gated, pulled, merged, pull, stale,
    value, slots, contexts, STEP: tl.constexpr, K: tl.constexpr, CODE: tl.constexpr,
    DIRECT: tl.constexpr, GUESSED: tl.constexpr, SIGNED: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """One step of one stratum, ``ROWS`` contexts at a time."""
    low = tl.load(bounds + K)
    high = tl.load(bounds + K + 1)
    begin = low + tl.program_id(0).to(tl.int64) * ROWS
    for here in range(begin, high, tl.num_programs(0).to(tl.int64) * ROWS):
        c = here + tl.arange(0, ROWS)
        real = c < high
        if STEP == RISE_DRIFT:
            rise_drift(
                c, real, low, order, starts, sums, summed, slots, contexts,
                DIRECT, SIGNED, ROWS, COLS,
            )  # fmt: skip
        elif STEP == SINK_DRIFT:
            sink_drift(
                c, real, parent, total, mass, mean, path, passed, passing, stale, budget,
                slope, sign, count, numbers, contexts, CODE, SIGNED,
            )  # fmt: skip
        elif STEP == RISE_WEIGHT:
            rise_weight(
                c, real, low, order, starts, sums, weight, gated, pulled, passed, path,
                mean, value, slots, contexts, DIRECT, GUESSED, SIGNED, ROWS, COLS,
            )  # fmt: skip
        else:
            sink_pull(c, real, parent, mass, merged, pull, passing, stale, contexts, SIGNED)
    tl.debug_barrier()


@triton.jit
def stage(
    bounds, parent, order, starts, mass, budget, slope, sign, count, numbers,
    sums, summed, total, mean, path, passed, passing, weight, gated, pulled, merged, pull, stale,
    value, slots, contexts, STEPS: tl.constexpr, FROM: tl.constexpr, TO: tl.constexpr,
    GATES: tl.constexpr, ROW_LEAF: tl.constexpr, GUESSED: tl.constexpr, SIGNED: tl.constexpr,
    COLS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """``STEPS`` on strata ``FROM`` to ``TO``; several programs only for one step of one stratum.

    ``total`` and ``merged`` are ``summed`` and ``pulled``, summed over ranks where there are more.
    ``numbers`` points at four float64 a stratum; ``COLS`` is a guess of the children of a context
    of each stratum.
    """
    for step in tl.static_range(4):
        if STEPS & (1 << step):
            for i in tl.static_range(TO - FROM):
                if step % 2 == 0:
                    stratum(
                        bounds, parent, order, starts, mass, budget, slope, sign, count, numbers,
                        sums, summed, total, mean, path, passed, passing, weight, gated, pulled,
                        merged, pull, stale, value, slots, contexts, 1 << step, TO - 1 - i, 0,
                        ROW_LEAF and TO - 1 - i == len(GATES) - 1, GUESSED, SIGNED,
                        LANES if ROW_LEAF and TO - 1 - i == len(GATES) - 1
                        else LANES // COLS[TO - 1 - i], COLS[TO - 1 - i],
                    )  # fmt: skip
                else:
                    stratum(
                        bounds, parent, order, starts, mass, budget, slope, sign, count,
                        numbers + 4 * (FROM + i), sums, summed, total, mean, path, passed, passing,
                        weight, gated, pulled, merged, pull, stale, value, slots, contexts,
                        1 << step, FROM + i, GATES[FROM + i], False, GUESSED, SIGNED, LANES, 1,
                    )  # fmt: skip


__all__ = ["stage"]
