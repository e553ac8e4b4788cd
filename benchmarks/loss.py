"""Loss and gradient from given log-probs: ours beside the memory floor and other libraries.

    python benchmarks/loss.py [--sizes 32768 2097152] [--compile] [--with-verl PYTHON] [--json FILE]

A row is one forward and backward with the log-probs as leaf: rows of 1,024 tokens, none padded,
which suits code that works on padded batches best. The floor is what must move: two float32
inputs read, one gradient written, 12 bytes a token; every other row is a multiple of it.

Correctness first: a row whose gradient is wrong stops the program before anything is timed. All
rows are timed interleaved in one process, the median counts; with one thread in CPU seconds, so
that other programs on the machine do not count as ours. verl lives in an environment of its own:
its rows are timed by that interpreter, beside the same floor.

TRL's loss is its own method, `GRPOTrainer._compute_loss`, on a stand-in for the trainer that only
lacks a model: the log-probs are given. Liger's is `ppo_loss_fn`, verl's the registered functions.
"""

import argparse
import ctypes
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results/loss.json"
LENGTH = 1024
STRATA = {"domain": (0.02, 0.015), "group": (0.04, 0.03), "trajectory": (0.12, 0.05)}
GSPO = (3e-4, 4e-4)
BUDGET, EPSILON = (0.12, 0.05), 0.04
SMALL = 100_000  # tokens that fit into cache: timed warm, that is, called twice
PEER_BOUND = 1e-4  # relative to the largest gradient; float32 arithmetic on padded batches
PEER_RARE = 1e-5  # share of tokens that float32 may put on the other side of a clip bound


class WrongError(Exception):
    """A row does not compute what it should."""


def make(tokens):
    """Padded inputs of whole rows: log-probs, old log-probs, advantages of rows."""
    generator = torch.Generator().manual_seed(0)
    rows = max(tokens // LENGTH, 1)
    old = -2 * torch.rand(rows, LENGTH, generator=generator)
    shift = 0.03 * torch.randn(rows, 1, generator=generator)
    new = old + 0.05 * torch.randn(rows, LENGTH, generator=generator) + shift
    return new, old, torch.randn(rows, generator=generator)


def measure(rows, threads, budget, warm, least=5, most=200):
    """Median seconds of every row, interleaved; ``warm``: each called once more just before."""
    clock = time.process_time if threads == 1 else time.perf_counter
    for call in rows.values():
        call()
    times = defaultdict(list)
    end = time.perf_counter() + budget
    for turn in range(most):
        for name, call in rows.items():
            if warm:
                call()
            begin = clock()
            call()
            times[name].append(clock() - begin)
        if turn + 1 >= least and time.perf_counter() > end:
            break
    return {name: statistics.median(found) for name, found in times.items()}


def backward(loss_of, log_probs):
    """A row: forward and backward with ``log_probs`` as leaf."""
    leaf = log_probs.clone().requires_grad_()

    def call():
        leaf.grad = None
        loss_of(leaf).backward()
        return leaf.grad

    return call


def check(name, gradient, truth, bound, rare=0.0):
    """Raise unless a gradient is the true one, relative to its largest entry."""
    error = (gradient.flatten().double() - truth).abs() / truth.abs().max()
    share = 1 - (error <= bound).double().mean()
    if share > rare:
        raise WrongError(f"{name}: its gradient is off by {error.max():.1e} of the largest entry")


def ours(data):
    """``(rows, true gradients)``: kernels alone, the torch interpreter, and whole objectives."""
    import fiberpo
    from fiberpo.ops import cpu, eager

    if cpu.unavailable():
        raise WrongError(f"no C++ to time: {cpu.unavailable()[0]}")
    new, old, advantages = data
    count = len(new)
    labels = {"domain": torch.arange(count) // 8 % 4, "group": torch.arange(count) // 8}
    batch = fiberpo.RatioBatch.from_packed(
        new.flatten(), old.flatten(), advantages, torch.full((count,), LENGTH), labels=labels
    )
    recipes = {
        "fiberpo": fiberpo.recipes.fiberpo(BUDGET, EPSILON),
        "fiberpo pessimistic": fiberpo.recipes.fiberpo(BUDGET, EPSILON, pessimistic=True),
        "fiberpo_domain": fiberpo.recipes.fiberpo_domain(STRATA, epsilon=EPSILON),
        "fiberstop": fiberpo.recipes.fiberstop(STRATA, EPSILON),
        "grpo": fiberpo.recipes.grpo(),
        "gspo": fiberpo.recipes.gspo(*GSPO),
    }
    rows, truth = {}, {}
    for name, objective in recipes.items():
        plan = objective.plan(batch)
        truth[name] = -objective(batch, plan=plan, backend="reference").coefficients
        inputs = (
            plan.lowered, batch.log_probs, batch.old_log_probs,
            plan.of_segments(batch.given_advantages), plan.of_segments(plan.shares),
        )  # fmt: skip
        rows[f"C++: {name}"] = lambda inputs=inputs: cpu.evaluate(*inputs).gradient
        slow = name in ("fiberpo", "grpo")
        if slow:
            rows[f"torch: {name}"] = lambda inputs=inputs: eager.evaluate(*inputs).gradient
        if name != "fiberpo pessimistic":
            for backend in ("cpu", *(["reference"] if slow else [])):

                def loss(leaf, objective=objective, plan=plan, backend=backend):
                    found = batch.with_log_probs(leaf)
                    return objective(found, plan=plan, backend=backend).loss

                rows[f"objective, {backend}: {name}"] = backward(loss, batch.log_probs)
    for name, call in rows.items():
        check(name, call(), truth[name.split(": ")[1]], 1e-5)
    return rows, truth


def trl(data, truth):
    """Rows of the installed TRL."""
    try:
        from trl.trainer.grpo_trainer import GRPOTrainer
    except ImportError as error:
        print(f"TRL: not timed, {error}")
        return {}
    new, old, advantages = data
    ids = torch.zeros(new.shape, dtype=torch.long)
    inputs = {
        "prompt_ids": ids[:, :1], "prompt_mask": torch.ones_like(ids[:, :1]),
        "completion_ids": ids, "completion_mask": torch.ones_like(ids),
        "advantages": advantages, "old_per_token_logps": old,
    }  # fmt: skip
    entropies = torch.zeros_like(new)

    def row(level, low, high):
        trainer = SimpleNamespace(
            aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None,
            importance_sampling_level=level, beta=0.0, loss_type="grpo", use_vllm=False,
            args=SimpleNamespace(delta=None), epsilon_low=low, epsilon_high=high,
            model=SimpleNamespace(training=True), current_gradient_accumulation_steps=1,
            _entropy_bonus_enabled=False, _metrics={"train": defaultdict(list)},
            accelerator=SimpleNamespace(
                gather=lambda x: x, reduce=lambda x, reduction: x, num_processes=1
            ),
        )  # fmt: skip

        def loss(leaf):
            trainer._get_per_token_logps_and_entropies = lambda *a, **k: (leaf, entropies, None)
            return GRPOTrainer._compute_loss(trainer, None, inputs)

        return backward(loss, new)

    rows = {"TRL: grpo": row("token", 0.2, 0.2), "TRL: gspo": row("sequence", *GSPO)}
    for name, call in rows.items():
        check(name, call(), truth[name.split(": ")[1]], PEER_BOUND, PEER_RARE)
    return rows


def liger(data, truth):
    """Rows of the installed Liger kernels."""
    try:
        from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOFunction as Liger
    except ImportError as error:
        print(f"Liger: not timed, {error}")
        return {}
    new, old, advantages = data
    mask = torch.ones_like(new)

    def row(level, low, high):
        def loss(leaf):
            return Liger.ppo_loss_fn(
                leaf, mask, advantages, mask, old_per_token_logps=old, epsilon_low=low,
                epsilon_high=high, beta=0.0, loss_type="grpo", importance_sampling_level=level,
            )[0]  # fmt: skip

        return backward(loss, new)

    rows = {"Liger: grpo": row("token", 0.2, 0.2), "Liger: gspo": row("sequence", *GSPO)}
    for name, call in rows.items():
        check(name, call(), truth[name.split(": ")[1]], PEER_BOUND, PEER_RARE)
    return rows


def padded_grpo(new, old, advantages):
    """GRPO as it is usually written; no token is padded here."""
    ratio = torch.exp(new - old)
    first, second = ratio * advantages[:, None], ratio.clamp(0.8, 1.2) * advantages[:, None]
    return -torch.min(first, second).mean(-1).mean()


def padded_gspo(new, old, advantages):
    """GSPO as it is usually written; no token is padded here."""
    ratio = torch.exp((new - old).mean(-1))
    clipped = ratio.clamp(1 - GSPO[0], 1 + GSPO[1])
    return -torch.min(ratio * advantages, clipped * advantages).mean()


def padded_fiberpo(new, old, advantages):
    """FiberPO through autograd; no token is padded here."""
    ratio, k = new - old, new.shape[1]
    right = ratio >= 0
    means, bases = [], []
    for drift, budget in zip((ratio.clamp(min=0), (-ratio).clamp(min=0)), BUDGET, strict=True):
        mean = drift.double().mean(-1, keepdim=True)
        rolled = torch.where(mean < (1 + 1 / k) * budget, (k + 1) * budget - k * mean, 0.0)
        bases.append(torch.where(mean <= budget, mean, rolled).float())
        means.append(mean.float())
    clip = [m.clamp(-EPSILON, EPSILON) for m in means]
    plus = (ratio - means[0]).clamp(-EPSILON, EPSILON) + clip[1]
    minus = (ratio + means[1]).clamp(-EPSILON, EPSILON) - clip[0]
    log_gated = bases[0] - bases[1] + torch.where(right, plus, minus)
    return -(log_gated.exp() * advantages[:, None]).mean(-1).mean()


def compiled(data, truth):
    """The two functions above, as they are and under torch.compile."""
    new, *rest = data
    rows = {}
    for name, loss in (("grpo", padded_grpo), ("fiberpo", padded_fiberpo)):
        faster = torch.compile(loss, dynamic=False)
        for kind, function in (("eager autograd", loss), ("torch.compile", faster)):
            row = backward(lambda leaf, function=function: function(leaf, *rest), new)
            check(f"{kind}: {name}", row(), truth[name], PEER_BOUND, PEER_RARE)
            rows[f"{kind}: {name}"] = row
    return rows


def floor(data, library):
    """The pass that nobody can beat; by torch where there is no library."""
    new, old = data[0].flatten(), data[1].flatten()
    out = torch.empty_like(new)
    if library is None:
        return {"floor": lambda: torch.sub(new, old, out=out)}
    arguments = [ctypes.c_void_p(v.data_ptr()) for v in (new, old, out)]
    call = library.fiberpo_floor
    call.argtypes, call.restype = [ctypes.c_void_p] * 3 + [ctypes.c_int64], None
    return {
        "floor": lambda: call(*arguments, len(new)),
        "torch.sub": lambda: torch.sub(new, old, out=out),
    }


def verl(data):
    """Rows of verl, in an interpreter that has it."""
    from verl.trainer.ppo import core_algos
    from verl.workers.config import ActorConfig

    new, old, advantages = data
    mask, spread = torch.ones_like(new), advantages[:, None].expand_as(new).contiguous()
    rows = {}
    for name, mode, low, high in (("grpo", "vanilla", 0.2, 0.2), ("gspo", "gspo", *GSPO)):
        config = ActorConfig(
            strategy="fsdp2", rollout_n=1, ppo_micro_batch_size_per_gpu=1,
            clip_ratio=low, clip_ratio_low=low, clip_ratio_high=high, clip_ratio_c=1e9,
        )  # fmt: skip
        function = core_algos.get_policy_loss_fn(mode)

        def loss(leaf, function=function, config=config):
            found = function(old, leaf, spread, mask, "seq-mean-token-mean", config)
            return found[0]

        call = backward(loss, new)
        plain = {"grpo": padded_grpo, "gspo": padded_gspo}[name]
        truth = new.double().requires_grad_()
        plain(truth, old.double(), advantages.double()).backward()
        check(f"verl: {name}", call(), truth.grad.flatten(), PEER_BOUND, PEER_RARE)
        rows[f"verl: {name}"] = call
    return rows


def verl_main(tokens, threads, budget, library):
    """What the other interpreter does; prints one line of JSON."""
    torch.set_num_threads(threads)
    data = make(tokens)
    rows = {**floor(data, ctypes.CDLL(library)), **verl(data)}
    seconds = measure(rows, threads, budget, tokens <= SMALL)
    import verl as package

    print(json.dumps({"seconds": seconds, "verl": package.__version__}))


def ask_verl(python, tokens, threads, budget, library):
    """Ratios to the floor, as that interpreter measured them."""
    if not Path(python).exists():
        print(f"verl: not timed, there is no {python}; `make test-verl` makes .venv-verl")
        return {}, None
    command = [python, __file__, "--as-verl", str(tokens), str(threads), str(budget), library]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise WrongError(f"verl: {done.stderr.strip()[-2000:]}")
    found = json.loads(done.stdout.strip().splitlines()[-1])
    seconds = found["seconds"]
    return {k: v / seconds["floor"] for k, v in seconds.items() if k[:4] == "verl"}, found["verl"]


def machine():
    """What the numbers were measured on."""
    from fiberpo.ops import build_cpp

    compiler = build_cpp.find_compiler()
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True).stdout
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), name)
    return {
        "cpu": name, "cores": os.cpu_count(), "platform": platform.system(),
        "python": platform.python_version(), "torch": torch.__version__,
        "compiler": version.splitlines()[0], "flags": " ".join(build_cpp.FLAGS[:2]),
    }  # fmt: skip


def versions():
    """Of the libraries that are compared with."""
    import importlib.metadata

    found = {}
    for name in ("trl", "liger_kernel"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def run(tokens, threads, args):
    """All rows at one size."""
    from fiberpo.ops import build_cpp

    torch.set_num_threads(threads)
    data = make(tokens)
    rows, truth = ours(data)
    library = build_cpp.load("cpu")
    rows = {**floor(data, library), **rows, **trl(data, truth), **liger(data, truth)}
    if args.compile:
        rows |= compiled(data, truth)
    seconds = measure(rows, threads, args.seconds, tokens <= SMALL)
    ratios = {name: value / seconds["floor"] for name, value in seconds.items()}
    more, version = {}, None
    if args.with_verl:
        path = str(build_cpp.build("cpu"))
        more, version = ask_verl(args.with_verl, tokens, threads, args.seconds / 2, path)
    print(f"\n{data[0].numel():,} tokens, {threads} thread{'s' * (threads > 1)}")
    for name, ratio in {**ratios, **more}.items():
        time_ms = f"{seconds[name] * 1e3:10.3f} ms" if name in seconds else " " * 13
        print(f"{name:36} {time_ms} {ratio:8.2f} x floor")
    return {
        "tokens": data[0].numel(), "threads": threads, "seconds": seconds,
        "times_floor": {**ratios, **more}, "verl": version,
    }  # fmt: skip


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[32_768, 2_097_152])
    parser.add_argument("--seconds", type=float, default=20.0, help="for each size and threads")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--compile", action="store_true", help="torch.compile too; slow at first")
    parser.add_argument("--with-verl", metavar="PYTHON", help="an interpreter that has verl")
    parser.add_argument("--json", type=Path, help="write the results here, not to the repository")
    parser.add_argument("--as-verl", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.as_verl:
        tokens, threads, budget, library = args.as_verl
        verl_main(int(tokens), int(threads), float(budget), library)
        return 0
    import warnings

    from fiberpo import FiberPOWarning

    warnings.simplefilter("ignore", FiberPOWarning)
    try:
        found = []
        for tokens in args.sizes:
            for threads in args.threads:
                if threads == 1 or tokens <= SMALL:  # threads matter where little is to be done
                    found.append(run(tokens, threads, args))
    except WrongError as error:
        print(f"wrong, so nothing is reported: {error}", file=sys.stderr)
        return 1
    results = {"machine": machine(), "versions": versions(), "length": LENGTH, "sizes": found}
    path = args.json or RESULTS
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(f"\n{path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
