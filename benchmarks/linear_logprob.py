"""Log-probs and backward from hidden states and output head: time and peak memory by variant.

    python benchmarks/linear_logprob.py [--tokens 4096 --hidden 512 --vocabulary 32768]
        [--dtype float32] [--device cpu] [--threads 1] [--repeat 3] [--quick] [--json out.json]

Correctness first: log-probs and gradients of every variant must be those of the float64 reference
on a small head, and of logits in memory at the full size, or nothing is timed.

All variants take the same coefficients ``A / (rows * length)`` (GRPO on its own samples, which is
what Liger's loss computes by itself). Rows are timed interleaved in one process, in CPU seconds
where there is one thread, and the median of the repeats is given. The floor of a row is the time of
its matrix products alone, each timed by itself in the same rounds: as one product (``unchunked``)
and in the chunks that we take. Peak memory is what a forked process gains in resident memory
(``ru_maxrss``) over what it held when it began, after ``malloc_trim``; on a GPU
``torch.cuda.max_memory_allocated``. Inputs are not in it, gradients are.

Without ``--quick``, ``--json`` and other sizes the results go to
``benchmarks/results/linear_logprob.json`` and the table of ``docs/linear_logprob.md`` is written
again from them.
"""

import argparse
import ctypes
import importlib.metadata
import json
import os
import platform
import re
import resource
import statistics
import sys
import time
import warnings
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from trl.kernels import ChunkedLogProbFunction
from trl.trainer.utils import selective_log_softmax

import fiberpo
from fiberpo import RatioBatch, exact, recipes
from fiberpo.ops import linear_reference

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "benchmarks/results/linear_logprob.json", ROOT / "docs/linear_logprob.md"
TEMPERATURE = 0.9
TRL_TILE = 32768  # what its trainers pass
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2, "float16": 1e-2}


class WrongError(Exception):
    """A variant does not compute what it should."""


class Scene:
    """Tokens of ``rows`` answers of equal length, and a head."""

    def __init__(self, tokens, hidden, vocabulary, dtype, device, rows=8):
        generator = torch.Generator().manual_seed(0)

        def normal(*shape):
            return torch.randn(shape, generator=generator).to(device, dtype)

        self.rows, self.length = rows, tokens // rows
        self.hidden, self.weight = normal(tokens, hidden), normal(vocabulary, hidden) / hidden**0.5
        self.targets = torch.randint(vocabulary, (tokens,), generator=generator).to(device)
        self.advantages = torch.linspace(-1, 1, rows).to(device)
        each = self.advantages / (rows * self.length)
        self.coefficients = each.repeat_interleave(self.length)
        some = torch.rand(tokens, generator=generator).to(device) < 0.5
        self.half = self.coefficients * some
        old = torch.zeros(tokens, device=device)
        self.batch = RatioBatch.from_packed(old, old, self.advantages, [self.length] * rows)

    def padded(self, x):
        return x.view(self.rows, self.length, *x.shape[1:])


def pull(scene, log_probs, coefficients=None):
    given = scene.coefficients if coefficients is None else coefficients
    (given * log_probs.float()).sum().backward()
    return log_probs.detach().reshape(-1)


def trl_logits(scene, hidden, weight):
    logits = torch.nn.functional.linear(scene.padded(hidden), weight)
    found = selective_log_softmax(logits, scene.padded(scene.targets), TEMPERATURE)
    del logits
    return pull(scene, found.reshape(-1))


def trl_fused(scene, hidden, weight):
    found = ChunkedLogProbFunction.apply(
        hidden, weight, None, scene.targets, TEMPERATURE, TRL_TILE, None, 1.0, ("log_probs",)
    )
    return pull(scene, found[0])


def liger(compiled):
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss = LigerFusedLinearGRPOLoss(
        beta=0.0, use_ref_model=False, loss_type="grpo", temperature=TEMPERATURE, compiled=compiled
    )

    def run(scene, hidden, weight):
        mask = torch.ones(scene.rows, scene.length, device=hidden.device)
        value, _ = loss(
            scene.padded(hidden), weight, scene.padded(scene.targets), mask, scene.advantages
        )
        (-value).backward()

    return run


def ours(mode, half=False, **settings):
    def run(scene, hidden, weight):
        given = scene.half if half else scene.coefficients
        more = dict(settings)
        if mode == "resident":
            more = {"lengths": scene.batch.lengths, "coefficients": more.pop("rule")(scene)}
        found = fiberpo.linear_logprob(
            hidden, weight, scene.targets, TEMPERATURE, mode=mode, **more
        )
        found = found[0] if isinstance(found, tuple) else found
        return pull(scene, found, given)

    return run


def by_trajectory(scene):
    """FiberPO's coefficients of each chunk; the anchor is the policy itself, as for Liger."""
    rule = exact.by_trajectory(recipes.fiberpo(), scene.batch)
    return lambda log_probs, where: rule(torch.zeros_like(log_probs), where)


VARIANTS = {
    # name: (what runs, whether the head is trained, products)
    "TRL, logits in memory": (trl_logits, True, 3),
    "TRL 1.16 fused head": (trl_fused, True, 4),
    "ours, resident (FiberPO)": (ours("resident", rule=by_trajectory), True, 3),
    "ours, two-phase": (ours("two-phase"), True, 4),
    "ours, two-phase, half of the coefficients 0": (ours("two-phase", half=True), True, None),
    "TRL, logits in memory, frozen head": (trl_logits, False, 2),
    "TRL 1.16 fused head, frozen head": (trl_fused, False, 3),
    "ours, frozen": (ours("frozen"), False, 2),
    "ours, frozen, with entropy": (ours("frozen", entropy=True), False, 2),
}


def step(variant, scene):
    """Log-probs (None where a variant keeps them to itself), gradients."""
    run, trained, _ = variant
    hidden = scene.hidden.detach().requires_grad_()
    weight = scene.weight.detach().requires_grad_(trained)
    return run(scene, hidden, weight), hidden.grad, weight.grad


def compare(name, found, wanted, tolerance):
    for what, a, b in zip(("log-probs", "hidden", "weight"), found, wanted, strict=True):
        if a is None:
            continue
        size = max(float(b.abs().max()), 1e-30)
        error = float((a.double() - b.double()).abs().max()) / size
        if not error <= tolerance:
            raise WrongError(f"{name}: {what} are off by {error:.2e} of the largest; not timed")


def check_small(variants, dtype, device):
    """Against the reference in float64."""
    scene = Scene(64, 24, 311, dtype, device)
    for name, variant in variants.items():
        hidden, weight = (x.double().requires_grad_() for x in (scene.hidden, scene.weight))
        log_probs, _ = linear_reference.linear_logprob(hidden, weight, scene.targets, TEMPERATURE)
        given = scene.half if "half" in name else scene.coefficients
        (given.double() * log_probs).sum().backward()
        wanted = log_probs.detach(), hidden.grad, weight.grad
        compare(name, step(variant, scene), wanted, TOLERANCE[str(dtype).split(".")[1]])


def check_full(variants, scene):
    """Against logits in memory; also the warm-up. One pair of gradients at a time."""
    dtype = str(scene.hidden.dtype).split(".")[1]
    wanted = step((trl_logits, True, 3), scene)
    for name, variant in variants.items():
        if "half" not in name:
            compare(name, step(variant, scene), wanted, 2 * TOLERANCE[dtype])


def products(scene, rows):
    """The three products as they are timed: logits, for hidden states, for the weight."""
    tokens = len(scene.hidden)
    tile = torch.empty(
        rows, len(scene.weight), dtype=scene.hidden.dtype, device=scene.hidden.device
    )
    for_hidden, for_weight = torch.empty_like(scene.hidden), torch.zeros_like(scene.weight)

    def over(one):
        def run():
            for start in range(0, tokens, rows):
                part = slice(start, min(start + rows, tokens))
                one(tile[: part.stop - start], part)

        return run

    def weight_product(x, part):
        if rows >= tokens:
            torch.mm(x.T, scene.hidden[part], out=for_weight)
        else:
            for_weight.addmm_(x.T, scene.hidden[part])

    return {
        "logits": over(lambda x, part: torch.mm(scene.hidden[part], scene.weight.T, out=x)),
        "hidden": over(lambda x, part: torch.mm(x, scene.weight, out=for_hidden[part])),
        "weight": over(weight_product),
    }


def timed(run, device):
    """Seconds; of CPU time with one thread, which other programs on the machine disturb less."""
    clock = time.process_time if clock_name(device) == "CPU seconds" else time.perf_counter
    if device == "cuda":
        torch.cuda.synchronize()
    begin = clock()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - begin


def clock_name(device):
    one = device == "cpu" and torch.get_num_threads() == 1
    return "CPU seconds" if one else "seconds"


def peak_mb(run, device):
    """Memory that a run needs beyond what is there before."""
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # forking beside idle threads
        child = os.fork()
    if child == 0:
        try:
            ctypes.CDLL(None).malloc_trim(0)
            resident = int(Path("/proc/self/statm").read_text().split()[1])
            before = resident * resource.getpagesize()
            run()
            gained = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
            os.write(write, str(gained).encode())
        finally:
            os._exit(0)
    os.close(write)
    answer = os.read(read, 100)
    os.close(read)
    os.waitpid(child, 0)
    return int(answer) / 1e6


def measure(args, variants, scene):
    memory = min(max(scene.weight.numel() * 4, 64 << 20), 1 << 30)  # the default of the library
    rows = min(memory // (4 * len(scene.weight)), len(scene.hidden))
    memory_of = {
        name: peak_mb(lambda v=variant: step(v, scene), args.device)
        for name, variant in variants.items()
    }
    tables = {"chunked": products(scene, rows), "unchunked": products(scene, len(scene.hidden))}
    seconds = {name: [] for name in variants}
    floors = {kind: {name: [] for name in table} for kind, table in tables.items()}
    for _ in range(args.repeat):
        for name, variant in variants.items():
            seconds[name].append(timed(lambda v=variant: step(v, scene), args.device))
        for kind, table in tables.items():
            for name, run in table.items():
                floors[kind][name].append(timed(run, args.device))
    floors = {k: {n: statistics.median(x) for n, x in table.items()} for k, table in floors.items()}
    sums = {
        kind: {
            2: t["logits"] + t["hidden"],
            3: t["logits"] + t["hidden"] + t["weight"],
            4: 2 * t["logits"] + t["hidden"] + t["weight"],
        }
        for kind, t in floors.items()
    }
    found = []
    for name, variant in variants.items():
        _, trained, count = variant
        if not trained and count == 3:  # logits twice, hidden once
            floor = {k: 2 * t["logits"] + t["hidden"] for k, t in floors.items()}
        else:
            floor = {k: t[count] if count else None for k, t in sums.items()}
        median = statistics.median(seconds[name])
        found.append({
            "name": name, "trained": trained, "products": count, "seconds": median,
            "fastest": min(seconds[name]), "peak_mb": memory_of[name],
            **{f"x_floor_{k}": median / f if f else None for k, f in floor.items()},
        })  # fmt: skip
    return {"rows": found, "floors": floors, "chunk_rows": rows, "clock": clock_name(args.device)}


def machine():
    model = platform.processor()
    if Path("/proc/cpuinfo").exists():
        text = Path("/proc/cpuinfo").read_text()
        model = (re.search(r"model name\s*:\s*(.*)", text) or [None, model])[1]
    found = {
        "cpu": model, "cores": os.cpu_count(), "threads": torch.get_num_threads(),
        "python": platform.python_version(), "torch": torch.__version__,
        "trl": importlib.metadata.version("trl"),
    }  # fmt: skip
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def table(results):
    """Markdown."""
    lines = [
        f"| variant | products | {results['clock']} | x its products, in chunks "
        "| x its products, whole | peak MB |",
        "|---|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        ratios = [row[f"x_floor_{k}"] for k in ("chunked", "unchunked")]
        cells = [f"{x:.2f}" if x else "" for x in ratios]
        lines.append(
            f"| {row['name']} | {row['products'] or ''} | {row['seconds']:.2f} | {cells[0]} | "
            f"{cells[1]} | {row['peak_mb']:.0f} |"
        )
    return "\n".join(lines)


def describe(results):
    a, m = results["arguments"], results["machine"]
    return (
        f"{a['tokens']:,} tokens, hidden size {a['hidden']:,}, vocabulary {a['vocabulary']:,}, "
        f"{a['dtype']}, {a['device']}, threads: {m['threads']}; median of {a['repeat']}; "
        f"{m.get('gpu', m['cpu'])}, torch {m['torch']}."
    )


def fill_page(text, results):
    for name, block in (("machine", describe(results)), ("table", table(results))):
        mark = re.compile(rf"(<!-- linear: {name} -->\n).*?(\n<!-- end -->)", re.DOTALL)
        text = mark.sub(lambda m, b=block: m[1] + b + m[2], text)
    return text


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=32768)
    parser.add_argument("--dtype", choices=list(TOLERANCE), default="float32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--liger", choices=["compiled", "eager", "none"], default="compiled")
    parser.add_argument("--quick", action="store_true", help="64 tokens; a test of the program")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    if args.quick:
        args.tokens, args.hidden, args.vocabulary, args.repeat = 64, 16, 512, 1
    torch.set_num_threads(args.threads)
    variants = dict(VARIANTS)
    if args.liger != "none":
        variants[f"Liger GRPO, {args.liger}"] = (liger(args.liger == "compiled"), True, 3)
    dtype = getattr(torch, args.dtype)
    try:
        check_small(variants, dtype, args.device)
        scene = Scene(args.tokens, args.hidden, args.vocabulary, dtype, args.device)
        check_full(variants, scene)
    except WrongError as error:
        print(f"RED: {error}", file=sys.stderr)
        return 1
    results = measure(args, variants, scene)
    names = "tokens", "hidden", "vocabulary", "dtype", "device", "repeat", "liger"
    results["arguments"] = {name: getattr(args, name) for name in names}
    results["machine"] = machine()
    print(f"{describe(results)}\n\n{table(results)}")
    standard = not args.quick and all(
        getattr(args, n) == parser.get_default(n) for n in (*names, "threads")
    )
    path = args.json or (RESULTS if standard else None)
    if path:
        path.write_text(json.dumps(results, indent=1) + "\n")
    if standard and not args.json:
        PAGE.write_text(fill_page(PAGE.read_text(), results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
