"""Gate plans read literally, with loops; and random plans over every code.

The gradient is the sum over all pairs of tokens of ``a_i dy_i/dx_j``, not the closed form.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch

from fiberpo.ops.plan import (
    OPEN,
    ChartCode,
    Contexts,
    GateCode,
    GatePlan,
    LoweredGate,
    States,
)

CONTEXT_CODES = [c for c in GateCode if c not in (GateCode.BUDGET, GateCode.STOP)]
TOKEN_CODES = [c for c in GateCode if c not in (GateCode.TAPER, GateCode.STOP)]
FIRST_CODES = [c for c in TOKEN_CODES if c is not GateCode.BUDGET]


def aggregate(x, C, k):
    if abs(x) <= C:
        return x, 1.0
    if abs(x) < (1 + 1 / k) * C:
        return np.sign(x) * (k + 1) * C - k * x, -k
    return 0.0, 0.0


def gate(code, numbers, x, A, channel, channels, count=1.0):
    """Value and slope of a gate at one place."""
    if code == GateCode.PASS:
        return x, 1.0
    if code == GateCode.ZERO:
        return 0.0, 0.0
    if code == GateCode.CLIP:
        low, high = numbers[:2] if A < 0 else numbers[2:]
        return min(max(x, low), high), float(low <= x <= high)
    if code == GateCode.AGGREGATE:
        side = channel if channels == 2 else int(x < 0)
        return aggregate(x, numbers[side], numbers[2])
    if code == GateCode.SOFT:
        tau = numbers[0] if A > 0 else numbers[1]
        up, down = 1 / (1 + math.exp(-tau * x)), 1 / (1 + math.exp(tau * x))
        return 4 / tau * up - 1, 4 * up * down
    if code == GateCode.QUADRATIC:
        b = np.sign(A) / numbers[0]
        return x * (1 - b * x / 2), 1 - b * x
    if code == GateCode.ROLLBACK:
        epsilon, alpha = numbers
        if A < 0 and x < -epsilon:
            return -(1 + alpha) * epsilon - alpha * x, -alpha
        if not A < 0 and x > epsilon:
            return (1 + alpha) * epsilon - alpha * x, -alpha
        return x, 1.0
    assert code == GateCode.TAPER
    return (count * x, count) if A < 0 and x <= 0 else (0.0, 0.0)


def evaluate(plan, log_probs, old, advantages, scale):
    """``(J, J of segments, -dJ/dlog_probs, S)`` as floats and arrays."""
    starts, N = plan.starts.tolist(), len(log_probs)
    segment = [s for s in range(plan.segments) for _ in range(starts[s + 1] - starts[s])]
    lp, old = log_probs.double().tolist(), old.double().tolist()
    A = [float(advantages[i if len(advantages) == N else segment[i]]) for i in range(N)]
    mu = [float(scale[i if len(scale) == N else segment[i]]) for i in range(N)]
    w = [mu[i] * A[i] for i in range(N)]
    ratio = [lp[i] - old[i] for i in range(N)]
    CH = plan.chart.channels

    x, inward = np.zeros((CH, N)), np.zeros((CH, N))
    for i in range(N):
        if plan.chart is ChartCode.LOG:
            d, slopes = [ratio[i]], [1.0]
        elif plan.chart is ChartCode.SIGNED_LOG:
            d, slopes = (
                [max(ratio[i], 0), max(-ratio[i], 0)],
                [1.0, 0.0] if ratio[i] >= 0 else [0.0, -1.0],
            )
        else:
            d, slopes = [math.exp(ratio[i]) - 1], [math.exp(ratio[i])]
        for ch in range(CH):
            x[ch, i], s = gate(plan.first.code, plan.first.numbers, d[ch], A[i], ch, CH)
            inward[ch, i] = slopes[ch] * s

    at, path, S, h, slope = plan.contexts, [[] for _ in range(N)], None, None, None
    omega = [float(plan.omega[s]) for s in segment]
    if at is not None:
        C, parent = len(at), at.parent.tolist()
        for i in range(N):
            c = int(at.leaf[segment[i]])
            while c >= 0:
                path[i].append(c)
                c = parent[c]
        S, h, slope = np.zeros((CH, C)), np.zeros((CH, C)), np.zeros((CH, C))
        for ch in range(CH):
            for i in range(N):
                for c in path[i]:
                    S[ch, c] += omega[i] * x[ch, i] / float(at.mass[c])
            for k, lowered in enumerate(at.gates):
                if lowered.code == GateCode.STOP:
                    continue
                for c in range(at.bounds[k], at.bounds[k + 1]):
                    numbers = lowered.numbers
                    if lowered.code == GateCode.AGGREGATE:
                        numbers = [float(at.budget[0, c]), float(at.budget[1, c]), at.slope[c]]
                    above = S[ch, parent[c]] if parent[c] >= 0 else 0.0
                    h[ch, c], slope[ch, c] = gate(
                        lowered.code, [float(n) for n in numbers], S[ch, c] - above,
                        float(at.sign[c]), ch, CH, float(at.count[c]),
                    )  # fmt: skip

    state = list(range(N)) if plan.states is None else plan.states.index.tolist()
    u, v, token_slope = np.zeros((CH, N)), np.zeros((CH, N)), np.zeros((CH, N))
    shared = np.zeros((CH, N))
    for ch in range(CH):
        for i in range(N):
            u[ch, i] = x[ch, i] - (S[ch, path[i][0]] if path[i] else 0.0)
        for i in range(N):
            if plan.token.code == GateCode.BUDGET:
                total = sum(abs(u[ch, j]) for j in range(N) if state[j] == state[i])
                m = 1.0 if plan.states is None else float(plan.states.multiplicity[state[i]])
                bound = m * plan.token.numbers[0] - (total - abs(u[ch, i]))
                if bound <= 0:
                    continue
                token_slope[ch, i] = 1.0
                if abs(u[ch, i]) <= bound:
                    v[ch, i] = u[ch, i]
                else:
                    v[ch, i], shared[ch, i] = np.sign(u[ch, i]) * bound, -np.sign(u[ch, i])
            elif plan.token.code != GateCode.STOP:
                v[ch, i], token_slope[ch, i] = gate(
                    plan.token.code, plan.token.numbers, u[ch, i], A[i], ch, CH
                )

    for i in range(N if plan.token.code == GateCode.STOP else 0):
        side = 0 if A[i] > 0 else 1
        outward = ratio[i] * np.sign(A[i])
        beyond = any(S[side, c] > float(at.budget[side, c]) for c in path[i])
        if outward >= (0.0 if beyond else plan.token.numbers[side]):
            w[i] = 0.0

    parts, gradient, a = np.zeros(plan.segments), np.zeros(N), np.zeros((CH, N))
    for i in range(N):
        y = [v[ch, i] + sum(h[ch, c] for c in path[i]) for ch in range(CH)]
        if plan.chart is ChartCode.DEVIATION:
            G, slopes = 1 + y[0], [1.0]
            log_G = math.log1p(y[0]) if y[0] > -1 else (-math.inf if y[0] == -1 else math.nan)
        else:
            log_G = y[0] - y[1] if CH == 2 else y[0]
            G = math.exp(log_G)
            slopes = [G, -G]
        if w[i] == 0:
            continue
        direct = plan.pessimistic and (ratio[i] < log_G if A[i] >= 0 else ratio[i] > log_G)
        term = w[i] * (math.exp(ratio[i]) if direct else G)
        if plan.detached:
            parts[segment[i]] += term * lp[i]
            gradient[i] = term
            continue
        parts[segment[i]] += term
        if direct:
            gradient[i] += term
        else:
            for ch in range(CH):
                a[ch, i] = w[i] * slopes[ch]
    for ch in range(CH):
        for i in range(N):
            if a[ch, i] == 0:
                continue
            for j in range(N):
                own = token_slope[ch, i]
                pulled = own if i == j else 0.0
                for rank, c in enumerate(path[i]):  # leaf first; S_c stands in its own residual
                    if c in path[j]:
                        inner = own if rank == 0 else slope[ch, path[i][rank - 1]]
                        share = omega[j] / float(at.mass[c])
                        pulled += (slope[ch, c] - inner) * share
                if shared[ch, i] and state[j] == state[i]:
                    pulled += shared[ch, i] * np.sign(u[ch, j])
                gradient[j] += a[ch, i] * pulled * inward[ch, j]
    return parts.sum(), parts, -gradient, S


def numbers_of(code, rng):
    """Numbers of a gate, small enough that every piece of it is met."""
    if code == GateCode.CLIP:
        low, high = -rng.uniform(0.01, 0.2, 2), rng.uniform(0.01, 0.2, 2)
        found = [low[0], high[0], low[1], high[1]]
        if rng.random() < 0.4:  # from one side only
            found[1], found[2] = math.inf, -math.inf
        return tuple(found)
    if code == GateCode.AGGREGATE:
        return (*rng.uniform(0.02, 0.2, 2), rng.uniform(0.3, 3))
    if code == GateCode.SOFT:
        return tuple(rng.uniform(0.5, 5, 2))
    if code == GateCode.QUADRATIC:
        return (rng.uniform(0.1, 0.5),)
    if code == GateCode.ROLLBACK:
        return (rng.uniform(0.01, 0.2), rng.uniform(0.2, 2))
    if code == GateCode.BUDGET:
        return (rng.uniform(0.02, 0.3),)
    return ()


def lowered(code, rng):
    code = GateCode(int(code))
    return LoweredGate(code, tuple(float(n) for n in numbers_of(code, rng)))


def forest(rng, lengths, omega, depth):
    """Contexts in up to ``depth`` strata; a parent and a leaf may be in any of them."""
    S = len(lengths)
    sizes = [int(rng.integers(1, 4)) for _ in range(depth)]
    bounds = np.concatenate([[0], np.cumsum(sizes)]).tolist()
    parent = []
    for k in range(depth):
        for _ in range(sizes[k]):
            parent.append(int(rng.integers(-1, bounds[k])) if k else -1)
    bare = [c for c in range(bounds[-1]) if c not in parent]
    if len(bare) > S:
        return forest(rng, lengths, omega, max(depth - 1, 1)) if depth > 1 else None
    leaf = bare + [int(c) for c in rng.integers(0, bounds[-1], S - len(bare))]
    leaf = [leaf[i] for i in rng.permutation(S)]
    mass, count = np.zeros(bounds[-1]), np.zeros(bounds[-1])
    for s, c in enumerate(leaf):
        while c >= 0:
            mass[c] += omega[s] * lengths[s]
            count[c] += lengths[s]
            c = parent[c]
    budget = rng.uniform(0.01, 0.2, (2, bounds[-1]))
    budget[rng.random(budget.shape) < 0.1] = math.inf
    k = np.where(rng.random(bounds[-1]) < 0.5, count, rng.uniform(0.3, 3, bounds[-1]))
    return Contexts(
        leaf=torch.tensor(leaf),
        parent=torch.tensor(parent),
        bounds=tuple(bounds),
        gates=tuple(lowered(rng.choice(CONTEXT_CODES), rng) for _ in range(depth)),
        mass=torch.tensor(mass),
        count=torch.tensor(count),
        budget=torch.tensor(budget),
        slope=torch.tensor(k),
        sign=torch.tensor(rng.choice([-1.0, 0.0, 1.0], bounds[-1])),
        row_leaf=False,
    )


def rows(rng, lengths):
    """Every segment a root of its own."""
    S = len(lengths)
    count = torch.tensor(lengths, dtype=torch.float64)
    return Contexts(
        leaf=torch.arange(S),
        parent=torch.full((S,), -1),
        bounds=(0, S),
        gates=(lowered(rng.choice(CONTEXT_CODES), rng),),
        mass=torch.ones(S, dtype=torch.float64),
        count=count,
        budget=torch.tensor(rng.uniform(0.01, 0.2, (2, S))),
        slope=count.clone(),
        sign=torch.tensor(rng.choice([-1.0, 1.0], S)),
        row_leaf=True,
    )


@dataclass
class Case:
    """A plan and what it is evaluated on."""

    plan: GatePlan
    inputs: tuple

    def of(self, dtype):
        log_probs, old, advantages, scale = self.inputs
        return log_probs.to(dtype), old.to(dtype), advantages.to(dtype), scale

    def with_plan(self, **changes):
        return Case(replace(self.plan, **changes), self.inputs)


def case(seed, chart, token, *, depth=0, states=False, longest=6, segments=None, spread=0.15, **kw):
    """A random plan with the given codes, and random log-probs.

    Args:
        depth: strata above the token; "rows" for a context a row.
        states: whether tokens share states; a number: that many for each token.
        kw: fields of the plan (`first` is a code).
    """
    rng = np.random.default_rng(seed)
    S = int(rng.integers(1, 7)) if segments is None else segments
    lengths = rng.integers(1, longest + 1, S)
    N = int(lengths.sum())
    omega = 1 / lengths if rng.random() < 0.5 else rng.uniform(0.2, 2, S)
    if depth == "rows":
        omega, contexts = 1 / lengths, rows(rng, lengths)
    else:
        contexts = forest(rng, lengths, omega, depth) if depth else None
    shared = None
    if states:
        count = max(int(N * (0.5 if states is True else states)), 1)
        index = torch.tensor(rng.integers(0, count, N))
        m = torch.bincount(index, minlength=count).double()
        shared = States(index, m)
    plan = GatePlan(
        chart=ChartCode(chart),
        first=lowered(kw["first"], rng) if "first" in kw else OPEN,
        token=lowered(GateCode(token), rng),
        pessimistic=kw.get("pessimistic", False),
        detached=kw.get("detached", False),
        starts=torch.tensor(np.concatenate([[0], np.cumsum(lengths)]), dtype=torch.int64),
        omega=torch.tensor(omega, dtype=torch.float64),
        contexts=contexts,
        states=shared,
        longest=int(lengths.max(initial=0)),
    )
    old = -rng.uniform(0, 2, N)
    drift = rng.normal(0, spread, N) + np.repeat(rng.normal(0, spread, S), lengths)
    drift[rng.random(N) < 0.1] = 0.0
    A = rng.normal(size=N if kw.get("token_advantages") else S)
    scale = rng.uniform(0, 1, N if kw.get("token_scale") else S)
    scale[rng.random(scale.shape) < 0.1] = 0.0
    # exact in float32, so that both dtypes see the same log ratios
    old, new = (torch.tensor(v, dtype=torch.float32).double() for v in (old, old + drift))
    return Case(plan, (new, old, torch.tensor(A).float().double(), torch.tensor(scale)))


def stops(seed, *, depth=0, **kw):
    """As `case`, with stops at the token and at all contexts."""
    found = case(seed, ChartCode.SIGNED_LOG, GateCode.ZERO, depth=depth, detached=True, **kw)
    rng = np.random.default_rng(seed)
    token, at = LoweredGate(GateCode.STOP, tuple(rng.uniform(0.05, 0.3, 2))), found.plan.contexts
    if at is not None:
        at = replace(at, gates=(LoweredGate(GateCode.STOP),) * len(at.gates))
    return found.with_plan(token=token, contexts=at)
