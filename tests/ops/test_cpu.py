"""The C++ backend against the plan read literally, the torch interpreter, and itself."""

import ctypes
import platform
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fiberpo.ops import build_cpp, cpu, eager
from fiberpo.ops.plan import ChartCode, Contexts, GateCode, GatePlan, LoweredGate, States
from ops import plan_oracle

CLIP = LoweredGate(GateCode.CLIP, (-0.04, 0.04, -0.04, 0.04))

seeds = st.integers(0, 2**32)
flags = st.fixed_dictionaries(
    {},
    optional={
        "pessimistic": st.just(True),
        "detached": st.just(True),
        "token_advantages": st.just(True),
        "token_scale": st.just(True),
        "first": st.sampled_from(plan_oracle.FIRST_CODES),
    },
)
depths = st.sampled_from([0, 1, 2, 4, "rows"])


@pytest.fixture(autouse=True)
def poison():
    """Memory that is not written is NaN; no test without a library to test."""
    if cpu.unavailable():
        pytest.skip(str(cpu.unavailable()))
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_memory_is_poisoned():
    assert torch.empty(3).isnan().all()


def close(found, value, parts, gradient, mean, weight, tolerance):
    """Relative to the largest gradient, weight, aggregate."""
    gradient, parts = torch.as_tensor(gradient), torch.as_tensor(parts)
    size = max(float(gradient.abs().max()), float(weight)) if len(gradient) else 1.0
    total = max(float(parts.abs().sum()), float(weight)) if len(parts) else 1.0
    assert found.gradient.shape == gradient.shape
    assert (found.gradient.double() - gradient).abs().max().item() <= tolerance * size
    assert (found.segment_values - parts).abs().max().item() <= tolerance * total
    assert abs(float(found.value) - float(value)) <= tolerance * total
    if mean is None:
        assert found.mean is None
    else:
        torch.testing.assert_close(found.mean, torch.as_tensor(mean), rtol=1e-12, atol=1e-14)


def agree(case, tolerance=1e-10):
    value, parts, gradient, mean = plan_oracle.evaluate(case.plan, *case.inputs)
    weight = (case.inputs[2].abs().max() * case.inputs[3].max()).item()
    for dtype, allowed in ((torch.float64, tolerance), (torch.float32, 2e-6)):
        found = cpu.evaluate(case.plan, *case.of(dtype))
        assert found.gradient.dtype == dtype
        close(found, value, parts, gradient, mean, weight, allowed)


@pytest.mark.parametrize("chart", list(ChartCode))
@pytest.mark.parametrize("token", plan_oracle.TOKEN_CODES)
@settings(max_examples=25)
@given(seeds, depths, flags, st.booleans())
def test_is_the_table(chart, token, seed, depth, kw, states):
    """Every code in every chart, trees, every option: value, gradient, aggregates."""
    states = states and token is GateCode.BUDGET
    agree(plan_oracle.case(seed, chart, token, depth=depth, states=states, **kw))


@pytest.mark.parametrize("chart", [ChartCode.LOG, ChartCode.SIGNED_LOG])
@pytest.mark.parametrize("token", [GateCode.CLIP, GateCode.PASS])
@settings(max_examples=60)
@given(seeds, depths, st.booleans(), st.sampled_from([2, 6, 25]))
def test_fast_paths_are_the_table(chart, token, seed, depth, pessimistic, longest):
    """One weight a segment, a clip at the token: the float32 path, whole vectors and tails."""
    agree(
        plan_oracle.case(
            seed, chart, token, depth=depth, pessimistic=pessimistic, longest=longest, segments=3
        )
    )


@settings(max_examples=100)
@given(seeds, depths, st.booleans(), st.booleans(), st.sampled_from([2, 6, 25]))
def test_stops_are_the_table(seed, depth, token_advantages, token_scale, longest):
    """Also of the torch interpreter; a ratio or an advantage of 0 goes nowhere."""
    case = plan_oracle.stops(
        seed, depth=depth, token_advantages=token_advantages, token_scale=token_scale,
        longest=longest,
    )  # fmt: skip
    case.inputs[0][::5] = case.inputs[1][::5]
    case.inputs[2][1::4] = 0
    agree(case)
    value, parts, gradient, mean = plan_oracle.evaluate(case.plan, *case.inputs)
    close(eager.evaluate(case.plan, *case.inputs), value, parts, gradient, mean, 1.0, 1e-10)


@pytest.mark.parametrize("chart", list(ChartCode))
@settings(max_examples=20)
@given(seeds, depths, flags, st.sampled_from(plan_oracle.TOKEN_CODES), st.booleans())
def test_is_the_interpreter(chart, seed, depth, kw, token, states):
    """Longer segments than loops over pairs of tokens allow."""
    states = states and token is GateCode.BUDGET
    if kw.get("first") is GateCode.AGGREGATE:
        del kw["first"]  # no method has it, and the interpreter does not read it
    case = plan_oracle.case(
        seed, chart, token, depth=depth, states=states, longest=300, segments=9, **kw
    )
    ours, theirs = (m.evaluate(case.plan, *case.inputs) for m in (cpu, eager))
    weight = (case.inputs[2].abs().max() * case.inputs[3].max()).item()
    parts, mean = theirs.segment_values, theirs.mean
    close(ours, theirs.value, parts, theirs.gradient, mean, weight, 1e-9)


class Ranks:
    """Two threads that add up what they hand in."""

    def __init__(self):
        self.barrier, self.parts = threading.Barrier(2), [None, None]

    def merge(self, rank):
        def merge(values):
            self.parts[rank] = values
            self.barrier.wait(timeout=30)
            total = self.parts[0] + self.parts[1]
            self.barrier.wait(timeout=30)
            return total

        return merge


def part_of(case, rank):
    """Every other segment, or none and all (`rank` 2 and 3)."""
    plan, (new, old, A, scale) = case.plan, case.inputs
    picked = {0: slice(0, None, 2), 1: slice(1, None, 2), 2: slice(0, 0), 3: slice(None)}[rank]
    lengths = plan.starts.diff()
    segments = torch.arange(plan.segments)[picked]
    inside = torch.isin(torch.repeat_interleave(lengths), segments)
    contexts, states = plan.contexts, plan.states
    if contexts is not None:
        contexts = replace(contexts, leaf=contexts.leaf[picked], row_leaf=False)
    if states is not None:
        states = States(states.index[inside], states.multiplicity)
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), lengths[picked].cumsum(0)])
    part = replace(plan, starts=starts, omega=plan.omega[picked], contexts=contexts, states=states)
    tokens = len(new)
    A, scale = (v[inside] if len(v) == tokens else v[picked] for v in (A, scale))
    return part, (new[inside], old[inside], A, scale), inside


@pytest.mark.parametrize("ranks", [(0, 1), (2, 3)], ids=["halves", "one empty"])
@pytest.mark.parametrize("chart", list(ChartCode))
@settings(max_examples=8)
@given(seeds, st.sampled_from([0, 1, 3, "rows"]), st.sampled_from(plan_oracle.TOKEN_CODES), flags)
def test_two_ranks_are_one(ranks, chart, seed, depth, token, kw):
    """Sums merged over two ranks give what one process gives."""
    case = plan_oracle.case(
        seed, chart, token, depth=depth, states=token is GateCode.BUDGET, segments=6, **kw
    )
    same_in_ranks(case, ranks)


@pytest.mark.parametrize("ranks", [(0, 1), (2, 3)], ids=["halves", "one empty"])
@settings(max_examples=20)
@given(seeds, st.sampled_from([1, 3, "rows"]))
def test_stops_of_two_ranks(ranks, seed, depth):
    """What stops may lie on the other rank."""
    same_in_ranks(plan_oracle.stops(seed, depth=depth, segments=6), ranks)


def same_in_ranks(case, ranks):
    whole = cpu.evaluate(case.plan, *case.inputs)
    contexts, states = Ranks(), Ranks()
    found, failures = {}, []

    def work(rank):
        try:
            plan, inputs, inside = part_of(case, ranks[rank])
            merges = contexts.merge(rank), states.merge(rank)
            found[rank] = inside, cpu.evaluate(plan, *inputs, *merges)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in (0, 1)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not failures
    gradient = torch.full_like(whole.gradient, torch.nan)
    for inside, part in found.values():
        gradient[inside] = part.gradient
        if whole.mean is not None:
            torch.testing.assert_close(part.mean, whole.mean, rtol=1e-12, atol=1e-14)
    size = max(float(whole.gradient.abs().max()), 1.0)
    torch.testing.assert_close(gradient, whole.gradient, rtol=0, atol=1e-12 * size)
    value = sum(float(part.value) for _, part in found.values())
    total = max(1.0, float(whole.segment_values.abs().sum()))
    assert abs(value - float(whole.value)) <= 1e-12 * total


def rows_plan(lengths, chart=ChartCode.SIGNED_LOG, token=CLIP, k=None, **kw):
    """FiberPO of rows of the given lengths."""
    lengths = torch.as_tensor(lengths, dtype=torch.int64)
    S, count = len(lengths), lengths.double()
    contexts = Contexts(
        leaf=torch.arange(S),
        parent=torch.full((S,), -1),
        bounds=(0, S),
        gates=(LoweredGate(GateCode.AGGREGATE),),
        mass=torch.ones(S, dtype=torch.float64),
        count=count,
        budget=torch.tensor([[0.12], [0.05]], dtype=torch.float64).expand(2, S),
        slope=count if k is None else torch.full((S,), k, dtype=torch.float64),
        sign=torch.zeros(S, dtype=torch.float64),
        row_leaf=True,
    )
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    more = {"first": LoweredGate(GateCode.PASS), "pessimistic": False, "detached": False, **kw}
    return GatePlan(
        chart=chart, token=token, starts=starts, omega=1 / count, contexts=contexts, states=None,
        longest=int(lengths.max()) if S else 0, **more,
    )  # fmt: skip


def inputs(lengths, seed=0, dtype=torch.float32, spread=0.05):
    lengths = torch.as_tensor(lengths, dtype=torch.int64)
    generator = torch.Generator().manual_seed(seed)
    S, N = len(lengths), int(lengths.sum())
    old = -2 * torch.rand(N, generator=generator)
    shift = spread * torch.randn(S, generator=generator)
    new = old + spread * torch.randn(N, generator=generator) + shift.repeat_interleave(lengths)
    A = torch.randn(S, generator=generator)
    return new.to(dtype), old.to(dtype), A.to(dtype), 1 / (S * lengths.double())


def error(plan, data):
    """Largest error of the gradient, relative to its largest entry, against float64."""
    truth = eager.evaluate(plan, *(v.double() for v in data)).gradient
    found = cpu.evaluate(plan, *data).gradient
    return ((found - truth).abs().max() / truth.abs().max()).item()


@pytest.mark.parametrize("pessimistic", [False, True])
@pytest.mark.parametrize(
    "lengths",
    [[1], [1] * 5000, [40_000], [17, 40_001, 1, 33], list(range(1, 80)), [4096] * 3 + [5]],
    ids=["one", "ones", "40k", "mixed", "staircase", "chunks"],
)
def test_lengths(lengths, pessimistic):
    assert error(rows_plan(lengths, pessimistic=pessimistic), inputs(lengths)) < 1e-6


def zone(T, where, seed=0):
    """A trajectory whose S+ lies in its rollback zone, at the given part of it, with k = T."""
    new, old, A, scale = inputs([T], seed)
    drift = (new - old).double()
    target = 0.12 * (1 + where / T)
    low, high = -1.0, 1.0
    for _ in range(200):
        middle = (low + high) / 2
        S = (drift + middle).clamp(min=0).mean()
        low, high = (low, middle) if target < S else (middle, high)
    new = (old.double() + drift + low).float()
    # float32 moves S+ by less than the zone is wide: bring it back with single tokens
    for i in range(T):
        S = (new.double() - old.double()).clamp(min=0).mean().item()
        if abs(S - target) < 0.1 * 0.12 / T or i > 50:
            break
        chosen = torch.randint(T, (), generator=torch.Generator().manual_seed(i))
        step = max(min((target - S) * T, 0.05), -0.05)
        new[chosen] = (
            old[chosen].double() + (new - old)[chosen].double().clamp(min=0) + step
        ).float()
    return new, old, A, scale


@pytest.mark.parametrize("T", [512, 131_072])
@pytest.mark.parametrize("where", [0.2, 0.8])
def test_rollback_zone(T, where):
    """The slope -k multiplies the error of S; 1e-5 is what is promised."""
    plan, data = rows_plan([T]), zone(T, where)
    found = eager.evaluate(plan, *data)
    assert 0.12 < float(found.mean[0, 0]) < 0.12 * (1 + 1 / T)
    assert error(plan, data) < 1e-5


@settings(max_examples=15)
@given(seeds, st.integers(0, 7), depths)
def test_odd_offsets(seed, offset, depth):
    """Tensors that start anywhere in memory."""
    case = plan_oracle.case(seed, ChartCode.SIGNED_LOG, GateCode.CLIP, depth=depth, longest=60)
    for dtype in (torch.float32, torch.float64):
        data = case.of(dtype)
        moved = [torch.cat([v.new_zeros(offset), v])[offset:] for v in data]
        ours, theirs = cpu.evaluate(case.plan, *data), cpu.evaluate(case.plan, *moved)
        assert torch.equal(ours.gradient, theirs.gradient)
        assert torch.equal(ours.value, theirs.value)


@pytest.mark.parametrize("contexts", [True, False])
def test_nothing(contexts):
    """A batch without tokens: on a rank that holds none."""
    plan = rows_plan([])
    plan = plan if contexts else replace(plan, contexts=None)
    found = cpu.evaluate(plan, *inputs([]))
    assert found.value == 0
    assert found.gradient.shape == (0,)


@pytest.mark.parametrize("depth", [0, 3, "rows", "states", "stops"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_threads_change_nothing(depth, dtype):
    """One thread, two, five, and again: the same bits."""
    seed, token, more = 3, GateCode.CLIP, {"depth": depth}
    if depth == "states":  # a few tokens each, many of them beyond the bound
        seed, token, more = 1, GateCode.BUDGET, {"states": 0.2}
    more |= {"segments": 500, "longest": 400}
    if depth == "stops":
        case = plan_oracle.stops(seed, **{**more, "depth": 3})
    else:
        case = plan_oracle.case(seed, ChartCode.SIGNED_LOG, token, **more)
    assert len(case.inputs[0]) > 2 * 32_768  # fewer are left to one thread
    data = case.of(dtype)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, *[2] * 10, 5, 1):
            torch.set_num_threads(threads)
            found.append(cpu.evaluate(case.plan, *data))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert torch.equal(found[0].gradient, other.gradient)
        assert torch.equal(found[0].value, other.value)
        assert torch.equal(found[0].segment_values, other.segment_values)


def test_callers_in_parallel():
    """Threads of Python that call at once, each with threads of its own."""
    case = plan_oracle.case(
        5, ChartCode.SIGNED_LOG, GateCode.CLIP, depth=3, segments=500, longest=400
    )
    data, before = case.of(torch.float32), torch.get_num_threads()
    truth = cpu.evaluate(case.plan, *data)
    wrong = []

    def work():
        for _ in range(20):
            found = cpu.evaluate(case.plan, *data)
            if not torch.equal(found.gradient, truth.gradient):
                wrong.append(found)

    try:
        torch.set_num_threads(2)
        threads = [threading.Thread(target=work) for _ in range(4)]
        [t.start() for t in threads]
        [t.join() for t in threads]
    finally:
        torch.set_num_threads(before)
    assert not wrong


def test_far_ratios():
    """Beyond the range of float32 exponentials the careful path takes over."""
    open_gate = LoweredGate(GateCode.PASS)
    for chart in (ChartCode.LOG, ChartCode.SIGNED_LOG):
        plan = replace(rows_plan([40, 30], chart=chart, token=open_gate), contexts=None)
        new, old, A, scale = inputs([40, 30])
        new[3], new[50] = old[3] + 100.0, old[50] - 200.0
        data = (new, old, A, scale * 1e-20)
        truth = eager.evaluate(plan, *(v.double() for v in data))
        found = cpu.evaluate(plan, *data)
        assert truth.gradient.abs().max() > 1e19
        torch.testing.assert_close(found.value, truth.value, rtol=1e-6, atol=0)
        torch.testing.assert_close(found.gradient.double(), truth.gradient, rtol=1e-6, atol=1e-38)


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="flags of one processor family")
@pytest.mark.parametrize("flags", ["-mno-avx512f", "-march=x86-64"])
def test_other_vector_widths(flags, monkeypatch):
    """The same source for processors with narrower vectors."""
    library = ctypes.CDLL(str(build_cpp.build("cpu", (flags, "-O1"))))
    function = library.fiberpo_evaluate
    function.restype, function.argtypes = None, [ctypes.c_void_p, ctypes.c_char_p]
    monkeypatch.setattr(cpu, "_function", lambda: function)
    for seed in range(18):
        for chart in ChartCode:
            token = plan_oracle.TOKEN_CODES[seed % len(plan_oracle.TOKEN_CODES)]
            depth, states = [0, 2, "rows"][seed % 3], token is GateCode.BUDGET
            more = {"pessimistic": seed % 2 == 0, "longest": 25, "segments": 3}
            agree(plan_oracle.case(seed, chart, token, depth=depth, states=states, **more))
            token = GateCode.CLIP
            agree(plan_oracle.case(seed, chart, token, depth=depth, **more))
    assert error(rows_plan([70, 1, 16]), inputs([70, 1, 16])) < 1e-6


def test_says_why_not(monkeypatch, tmp_path):
    """Without a compiler, with a wrong one, with one that fails: the reason, and no exception."""
    build_cpp.load.cache_clear()
    plan, log_probs = rows_plan([3]), torch.zeros(3)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    try:
        with monkeypatch.context() as patched:
            patched.setenv("PATH", "")
            patched.delenv("CXX", raising=False)
            (reason,) = cpu.unsupported(plan, log_probs)
            assert "no C++ compiler" in reason
        build_cpp.load.cache_clear()
        with monkeypatch.context() as patched:
            patched.setenv("CXX", "no-such-compiler")
            (reason,) = cpu.unsupported(plan, log_probs)
            assert "no-such-compiler" in reason
        build_cpp.load.cache_clear()
        broken = tmp_path / "broken"
        broken.write_text(
            "#!/bin/sh\n[ $1 = --version ] && echo 1 && exit 0\necho cannot do it >&2\nexit 1\n"
        )
        broken.chmod(0o755)
        monkeypatch.setenv("CXX", str(broken))
        (reason,) = cpu.unsupported(plan, log_probs)
        assert "cannot do it" in reason
    finally:
        build_cpp.load.cache_clear()
    reasons = cpu.unsupported(plan, log_probs.half())
    assert any("float16" in r for r in reasons)
    taper = replace(plan, token=LoweredGate(GateCode.TAPER))
    assert any("TAPER" in r for r in cpu.unsupported(taper, log_probs))
    assert any("meta" in r for r in cpu.unsupported(plan, log_probs.to("meta")))


def compiler(folder, body):
    """A stand-in for a compiler: ``$out`` is the file to write, ``$real`` a library that works."""
    path = folder / "compiler"
    path.write_text(
        "#!/bin/sh\n[ $1 = --version ] && echo 1 && exit 0\nfor out; do :; done\n"
        f"real={build_cpp.build('cpu')}\n{body}\n"
    )
    path.chmod(0o755)
    return str(path)


def test_falls_back_without_native(monkeypatch, tmp_path):
    """A compiler that does not know ``-march=native`` builds without."""
    body = 'case "$*" in *-march=native*) exit 1;; esac\ncp $real $out'
    monkeypatch.setenv("CXX", compiler(tmp_path, body))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    ctypes.CDLL(str(build_cpp.build("cpu")))


def test_two_builds_at_once(monkeypatch, tmp_path):
    """Neither process sees the other's half of a file; both end up with the same, whole one."""
    body = "echo half > $out\nsleep 0.5\ncp $real $out"
    code = (
        "import ctypes; from fiberpo.ops import build_cpp; path = build_cpp.build('cpu'); "
        "ctypes.CDLL(str(path)); print(path)"
    )
    monkeypatch.setenv("CXX", compiler(tmp_path, body))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    both = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    paths = {process.communicate(timeout=120)[0].strip() for process in both}
    assert [process.returncode for process in both] == [0, 0]
    assert paths == {str(path) for path in (tmp_path / "fiberpo").iterdir()}
    assert len(paths) == 1
