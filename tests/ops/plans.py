"""Plans to evaluate, put together by hand."""

import torch

from fiberpo.ops.plan import ChartCode, Contexts, GateCode, GatePlan, LoweredGate

NUMBERS = {
    GateCode.PASS: (),
    GateCode.ZERO: (),
    GateCode.CLIP: (-0.03, float("inf"), -0.04, 0.05),
    GateCode.AGGREGATE: (0.03, 0.02, 3.0),
    GateCode.SOFT: (2.0, 3.0),
    GateCode.QUADRATIC: (0.2,),
    GateCode.ROLLBACK: (0.03, 0.5),
    GateCode.TAPER: (),
    GateCode.BUDGET: (0.04,),
    GateCode.STOP: (0.06, 0.04),
}


def gate(code):
    numbers = () if code in (GateCode.AGGREGATE, GateCode.STOP) else NUMBERS[code]
    return LoweredGate(code, numbers)


def token_gate(code):
    return LoweredGate(code, NUMBERS[code])


def forest(lengths, omega, parents, leaf, codes, *, k=4.0, budget=0.03, ranks=1, seed=0):
    """``parents[k]``: the parents of stratum ``k``, counted within stratum ``k - 1`` (-1: a root),
    or pairs ``(stratum, index)``; ``leaf`` counts within the whole forest."""
    bounds = [0]
    for level in parents:
        bounds.append(bounds[-1] + len(level))
    above = []
    for level, items in enumerate(parents):
        for item in items:
            if isinstance(item, tuple):
                above.append(bounds[item[0]] + item[1])
            else:
                above.append(-1 if item < 0 else bounds[level - 1] + item)
    parent, size = torch.tensor(above, dtype=torch.long), bounds[-1]
    leaf = torch.as_tensor(leaf)
    mass, count = torch.zeros(size).double(), torch.zeros(size).double()
    for s, c in enumerate(leaf.tolist()):
        while c >= 0:
            mass[c] += ranks * omega[s] * lengths[s]
            count[c] += ranks * lengths[s]
            c = above[c]
    torch.manual_seed(seed)
    bound = budget * (0.3 + torch.rand(2, size).double())
    bound[0, ::5] = float("inf")
    row_leaf = leaf.tolist() == list(range(bounds[-2], bounds[-1]))
    return Contexts(
        leaf, parent, tuple(bounds), tuple(map(gate, codes)), mass, count, bound,
        torch.full((size,), k).double(), torch.randn(size).double().sign(), row_leaf,
    )  # fmt: skip


def shapes(segments):
    """Named forests over some segments: parents and leaf contexts."""
    own, third = list(range(segments)), [s * 3 // segments for s in range(segments)]
    return {
        "one": ([[-1] * segments], own),
        "chain": ([[-1, -1], [0, 1, 1], third], [5 + s for s in own]),
        "groups": ([[-1, -1], [0, 1, 1, 0]], [2 + g for g in third]),
        # some segments hang on a group, some on contexts of their own, and one of these on a root
        "tree": (
            [[-1, -1], [0, 1], [0, (0, 1), 1]],
            [(2, 3, 4, 5, 6)[s % 5] for s in own],
        ),
    }


def make(
    lengths, *, chart=ChartCode.SIGNED_LOG, first=GateCode.PASS, token=GateCode.CLIP, shape=None,
    code=GateCode.AGGREGATE, pessimistic=False, detached=False, **more,
):  # fmt: skip
    lengths = torch.tensor(lengths, dtype=torch.long)
    starts = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    omega = 1.0 / lengths.clamp(min=1).double()
    contexts = None
    if shape is not None:
        parents, leaf = shapes(len(lengths))[shape]
        contexts = forest(lengths, omega, parents, leaf, [code] * len(parents), **more)
    return GatePlan(
        chart, token_gate(first), token_gate(token), pessimistic, detached, starts, omega,
        contexts, None, int(lengths.max()) if len(lengths) else 0,
    )  # fmt: skip


def inputs(plan, dtype=torch.float64, *, seed=0, spread=0.05, per_token=False, offset=0):
    """Log-probs, old ones, advantages (two of them 0), scale; ``offset`` into a larger tensor."""
    torch.manual_seed(seed)
    tokens, segments = int(plan.starts[-1]), plan.segments
    new = (torch.randn(tokens + offset, dtype=dtype) * 0.3 - 1)[offset:]
    old = (new + torch.randn(tokens, dtype=dtype) * spread).contiguous()
    entries = tokens if per_token else segments
    advantages = torch.randn(entries, dtype=dtype)
    advantages[1:3] = 0
    return new, old, advantages, torch.rand(entries).double()
