"""The Triton kernels against torch operations: interpreted here, compiled for a GPU unseen."""

import importlib.util
import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from fiberpo.ops import eager
from fiberpo.ops.plan import ChartCode, GateCode, LoweredGate, States
from ops import plans

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

backend = pytest.importorskip("fiberpo.ops.triton")
schedule = pytest.importorskip("fiberpo.ops.triton.schedule")

LENGTHS = [5, 0, 1, 17, 270, 4, 30]
ASKING = (
    "_local_scalar_dense", "nonzero", "_unique2", "masked_select", "sort", "repeat_interleave",
)  # fmt: skip
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def quiet():
    """The interpreter computes with numpy what masked lanes would."""
    with np.errstate(all="ignore"):
        yield


@pytest.fixture
def small_programs(monkeypatch):
    """Trajectories above 1024 tokens (512 where heavy) are split, into chunks of 512."""
    monkeypatch.setattr(schedule, "RESIDENT", 1024)
    monkeypatch.setattr(schedule, "CHUNK", 512)
    monkeypatch.setattr(schedule, "_WIDTHS", (32,))


def compare(plan, given, tolerance=1e-12, **merges):
    found = backend.evaluate(plan, *given, **merges)
    wanted = eager.evaluate(plan, given[0].double(), given[1].double(), *given[2:], **merges)
    scale = wanted.gradient.abs().max() if len(wanted.gradient) else torch.ones(())
    close = torch.testing.assert_close
    terms = wanted.segment_values.abs().sum()
    close(found.value, wanted.value, rtol=0, atol=float(terms * tolerance))
    close(found.segment_values, wanted.segment_values, rtol=0, atol=float(terms * tolerance))
    assert found.gradient.dtype == given[0].dtype
    close(found.gradient.double(), wanted.gradient, rtol=0, atol=float(scale * tolerance))
    if wanted.mean is None:
        assert found.mean is None
    else:
        lies = plan.contexts.mass > 0
        close(found.mean[:, lies], wanted.mean[:, lies], rtol=1e-12, atol=1e-14)
    return found


CODES = [c for c in GateCode if c not in (GateCode.TAPER, GateCode.STOP)]
CHARTS = list(ChartCode)
STOPS = {"token": GateCode.STOP, "code": GateCode.STOP, "detached": True}
CASES = [
    *({"chart": CHARTS[i % 3], "token": code} for i, code in enumerate(CODES)),
    *({"chart": CHARTS[i % 2], "token": code, "shape": "one"} for i, code in enumerate(CODES[1:5])),
    *({"chart": chart, "shape": "chain"} for chart in CHARTS),
    *({"shape": shape, "token": GateCode.AGGREGATE} for shape in ("groups", "tree")),
    *({"chart": ChartCode.LOG, "shape": "one", "code": c, "token": GateCode.ZERO}
      for c in (GateCode.CLIP, GateCode.TAPER, GateCode.ROLLBACK)),
    *({"chart": chart, "first": GateCode.CLIP, "shape": "one"} for chart in CHARTS),
    {"first": GateCode.SOFT, "shape": "groups", "token": GateCode.SOFT},
    *({"chart": chart, "pessimistic": True} for chart in CHARTS),
    *({"shape": shape, "pessimistic": True} for shape in ("one", "chain")),
    *({"shape": shape, "detached": True} for shape in (None, "one", "chain")),
    {"chart": ChartCode.DEVIATION, "pessimistic": True, "detached": True, "token": GateCode.CLIP},
    *({"shape": shape, **STOPS} for shape in (None, "one", "chain", "groups", "tree")),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(f"{k}={v!s}" for k, v in c.items()))
def test_every_code(case):
    """Value, terms, gradient and aggregates, in float64 to the last digits."""
    plan = plans.make(LENGTHS, **case)
    compare(plan, plans.inputs(plan, per_token="shape" not in case))


@pytest.mark.parametrize("shape", ["one", "chain"])
def test_float32(shape):
    """Log-probs as they come from a model; weights by token above one stratum."""
    plan = plans.make(LENGTHS, shape=shape)
    compare(plan, plans.inputs(plan, torch.float32, per_token=shape == "one"), 1e-6)


@pytest.mark.parametrize(
    ("length", "shape"),
    [(6147, "chain"), (40_000, "one"), pytest.param(40_000, "chain", marks=pytest.mark.slow)],
)
def test_long_trajectories(length, shape):
    """Held by one program, or split into chunks."""
    plan = plans.make([3, length, 1, 70, 2], shape=shape)
    compare(plan, plans.inputs(plan), 1e-11)


@pytest.mark.usefixtures("small_programs")
@pytest.mark.parametrize(
    ("shape", "more"),
    [
        (None, {}),
        ("one", {}),
        ("chain", {"pessimistic": True}),
        ("tree", {"detached": True}),
        (None, STOPS),
        ("one", STOPS),
        ("tree", STOPS),
    ],
)
def test_chunks(shape, more):
    """As long trajectories, with less to compute; short ones beside them are not split."""
    plan = plans.make([3, 1500, 1, 0, 1100, 2, *[1] * 10], shape=shape, **more)
    assert [run.first is None for run in schedule.cut(plan.starts, 2616, 1500)] == [False, True]
    compare(plan, plans.inputs(plan), 1e-11)


@pytest.mark.slow
@pytest.mark.parametrize("length", [8000, 131_072])
def test_rollback_zone(length):
    """The slope ``-T`` multiplies the error of the aggregate: 1e-5 of the largest coefficient."""
    plan = plans.make([length, 10], shape="one")
    given = plans.inputs(plan, torch.float32)
    mean = eager.evaluate(plan, *given).mean
    plan.contexts.budget.fill_(1.0)
    plan.contexts.budget[:, 0] = mean[:, 0] / (1 + 0.5 / length)
    plan.contexts.slope[0] = length
    wanted = eager.evaluate(plan, *given).gradient
    open_ = replace(plan, contexts=replace(plan.contexts, budget=torch.ones(2, 2).double()))
    assert (wanted - eager.evaluate(open_, *given).gradient).abs().max() > 0.1 * wanted.abs().max()
    compare(plan, given, 1e-6)


@pytest.mark.parametrize("lengths", [[1] * 2000, [1] * 99 + [400] + [40] * 3, [1], [2, 1]])
def test_short_trajectories(lengths):
    """Many to a program, whatever else there is."""
    plan = plans.make(lengths, shape="one")
    compare(plan, plans.inputs(plan))


@settings(max_examples=60)
@given(
    st.lists(st.one_of(st.integers(0, 40), st.integers(0, 20_000)), min_size=1, max_size=60),
    st.integers(0, 400),
)
def test_every_token_has_one_program(lengths, ones):
    """The pieces of all launches are the segments, each token once, none wider than its launch."""
    lengths = torch.tensor([*lengths, *[1] * ones])
    starts = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    tokens, longest = int(starts[-1]), int(lengths.max())
    seen = torch.zeros(tokens, dtype=torch.int)
    for run in schedule.cut(starts, tokens, longest):
        assert run.columns <= schedule.RESIDENT
        low = starts[:-1] if run.low is None else run.low
        high = starts[1:] if run.high is None else run.high
        segment = torch.arange(len(lengths)) if run.segment is None else run.segment
        assert run.programs * run.rows >= len(low) == run.pieces
        for a, b, s in zip(low.tolist(), high.tolist(), segment.tolist(), strict=True):
            seen[a:b] += 1
            assert b - (a // 4 * 4 if run.vector else a) <= run.columns
            assert a == b or starts[s] <= a < b <= starts[s + 1]
    assert bool((seen == 1).all())


def test_skewed_lengths_do_not_share_a_width():
    """Ten thousand one-token segments beside one of 4,096."""
    starts = torch.cat([torch.zeros(1), torch.tensor([4096] + [1] * 10_000).cumsum(0)]).long()
    runs = schedule.cut(starts, 14_096, 4096)
    assert sum(run.programs * run.rows * run.columns for run in runs) < 1_000_000  # of 41 million
    assert sum(run.programs for run in runs) < 2000


@pytest.mark.usefixtures("small_programs")
@pytest.mark.parametrize("more", [{}, STOPS], ids=["gates", "stops"])
@pytest.mark.parametrize("shape", [None, "one", "chain", "tree"])
def test_unwritten_memory_is_never_read(shape, more, monkeypatch):
    """Fresh buffers hold NaN, and flags that mislead."""
    plan = plans.make([9, 0, 1030, 3] if shape == "tree" else LENGTHS, shape=shape, **more)
    given, real = plans.inputs(plan), torch.empty

    def poisoned(*args, **kwargs):
        out = real(*args, **kwargs)
        return out.fill_(float("nan") if out.is_floating_point() else 7)

    monkeypatch.setattr(torch, "empty", poisoned)
    found = backend.evaluate(plan, *given)
    monkeypatch.undo()
    wanted = eager.evaluate(plan, *given)
    torch.testing.assert_close(found.gradient, wanted.gradient, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.segment_values, wanted.segment_values, rtol=0, atol=1e-10)


def test_neighbours_are_not_read():
    """Aligned reads reach into other segments, whose NaN stay there."""
    plan = plans.make([301, 302, 300])
    given = plans.inputs(plan, torch.float32)
    given[0][:301] = float("nan")
    found = backend.evaluate(plan, *given)
    wanted = eager.evaluate(plan, *given)
    torch.testing.assert_close(found.gradient[301:], wanted.gradient[301:], rtol=0, atol=1e-6)
    assert bool(found.segment_values[1:].isfinite().all())


@pytest.mark.parametrize("offset", [1, 3])
def test_odd_offsets(offset):
    """Log-probs may be a slice that begins anywhere."""
    plan = plans.make([300, 301, 5], shape="one")
    given = plans.inputs(plan, torch.float32, offset=offset)
    assert given[0].data_ptr() % 16 == 4 * offset
    compare(plan, given, 1e-6)


@pytest.mark.usefixtures("small_programs")
@pytest.mark.parametrize("shape", ["one", "chain"])
def test_same_bits(shape):
    """Nothing depends on the order in which programs run."""
    plan = plans.make([1030, 4, 1, 30], shape=shape)
    given = plans.inputs(plan, torch.float32)
    first, second = backend.evaluate(plan, *given), backend.evaluate(plan, *given)
    for a, b in itertools.zip_longest(vars(first).values(), vars(second).values()):
        assert torch.equal(a, b)


@pytest.mark.parametrize("segments", [0, 3])
def test_no_tokens(segments):
    """A rank may have no token, even no segment; the sums of the others come through."""
    plan = plans.make([0] * segments)
    found = compare(plan, plans.inputs(plan))
    assert found.value == 0
    plan = plans.make([0] * segments, shape="groups") if segments else plan
    if segments:
        plan.contexts.mass.fill_(2.0)
        compare(plan, plans.inputs(plan), merge=lambda sums: sums + 0.3)


@pytest.mark.parametrize("more", [{}, STOPS], ids=["gates", "stops"])
@pytest.mark.parametrize("shape", ["one", "chain", "tree"])
def test_sums_over_ranks(shape, more):
    """Two equal ranks, each with half of every context; stops have no adjoints to add up."""
    plan = plans.make(LENGTHS, shape=shape, ranks=2, **more)
    seen = []

    def merge(sums):
        seen.append(tuple(sums.shape))
        return 2 * sums

    compare(plan, plans.inputs(plan), merge=merge)
    assert seen == [(2, len(plan.contexts))] * (2 if more else 4)


def test_many_contexts(monkeypatch):
    """A launch for each step and stratum where one program would take too long."""
    monkeypatch.setattr(backend, "SMALL", 3)
    plan = plans.make([3, 1, 4, 2, 5], shape="tree")
    compare(plan, plans.inputs(plan))
    for more in ({}, STOPS):
        plan = plans.make([3, 1, 4, 2, 5], shape="chain", **more)
        compare(plan, plans.inputs(plan))


@pytest.mark.parametrize("more", [{}, STOPS], ids=["gates", "stops"])
@pytest.mark.parametrize("budget", [1.0, 0.008, 0.001])
def test_guesses(budget, more, monkeypatch):
    """What a guess got wrong is computed again, and no more than that."""
    budget = 4 * budget if more and budget == 0.008 else budget  # aggregates, not residuals
    plan = plans.make([40, 41, 42, 43, 44, 45, 46], shape="chain", budget=budget, **more)
    plan.contexts.budget[:, :2] = 1.0  # domains never gate: groups go wrong one by one
    stale, sweep = [], backend._Call.sweep

    def watched(self, run, phase, local=None):
        if phase == backend.GRADIENT:
            stale.append(self.above["stale"][plan.contexts.leaf].tolist())
        sweep(self, run, phase, local)

    monkeypatch.setattr(backend._Call, "sweep", watched)
    compare(plan, plans.inputs(plan))
    assert sum(map(sum, stale)) == {1.0: 0, 0.001: 7}.get(budget, sum(stale[0]))
    if budget not in (1.0, 0.001):
        assert 0 < sum(stale[0]) < 7


def test_guess_that_overflows():
    """A ratio beyond float32 under a gate that zeroes it."""
    plan = plans.make([40, 41, 42, 43, 44], shape="chain")
    plan.contexts.budget.fill_(0.001)
    given = plans.inputs(plan, torch.float32)
    given[0][:85] = 400.0
    found = compare(plan, given, 1e-6)
    assert bool(found.gradient.isfinite().all())


@pytest.mark.usefixtures("small_programs")
def test_nothing_asks_the_device():
    """After the first evaluation no shape and no branch depends on what a tensor holds."""

    class NoSync(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert func.overloadpacket.__name__ not in ASKING
            return func(*args, **(kwargs or {}))

    for shape in ("one", "chain"):
        plan = plans.make([1030, 20, 3] if shape == "one" else [3, 0, 20, 9], shape=shape)
        given = plans.inputs(plan)
        backend.evaluate(plan, *given)
        with NoSync():
            backend.evaluate(plan, *given)


def test_what_cannot_be_served(monkeypatch):
    """Reasons, in words."""
    plan = plans.make(LENGTHS)
    x = plans.inputs(plan)[0]
    assert backend.unsupported(plan, x) == []
    states = States(torch.zeros(len(x), dtype=torch.long), torch.ones(1).double())
    shared = replace(plan, token=LoweredGate(GateCode.BUDGET, (0.1,)), states=states)
    assert "share states" in backend.unsupported(shared, x)[0]
    assert "bfloat16" in backend.unsupported(plan, x.bfloat16())[0]
    if not torch.cuda.is_available():
        monkeypatch.setattr(backend.knobs.runtime, "interpret", False)
        assert "'cpu'" in backend.unsupported(plan, x)[0]


@pytest.mark.slow
def test_compiles_for_a_gpu_without_spills(tmp_path):
    """Machine code for compute capability 9.0; tokens are read and written 16 bytes at a time."""
    binaries = Path(importlib.util.find_spec("triton").origin).parent / "backends/nvidia/bin"
    if not (binaries / "ptxas").exists():
        pytest.skip(f"no ptxas in {binaries}")
    out = tmp_path / "compiled.json"
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    env.pop("TRITON_INTERPRET", None)
    program = ROOT / "benchmarks" / "gpu_compile.py"
    subprocess.run([sys.executable, program, "--quick", "--json", out], check=True, env=env)
    rows = json.loads(out.read_text())["rows"]
    assert {row["kernel"] for row in rows} == {"tokens", "join", "add", "stage"}
    assert all(row["spilled"] == 0 for row in rows)
    wide = [row for row in rows if row["kernel"] == "tokens" and row["length"] > 1000]
    assert wide
    assert all(row["loads_128"] >= 8 for row in wide if row["method"] == "fiberpo")
