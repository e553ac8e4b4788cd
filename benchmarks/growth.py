"""How time and memory of one evaluation grow: with tokens, trajectory length, contexts, depth.

    python benchmarks/growth.py [--quick] [--json FILE] [--image FILE]

FiberPO (with contexts and depth: its hierarchy) on packed tokens, loss and gradient from given
log-probs, by the C++ backend and by torch operations, 1 thread. Time is the least of a few runs in
CPU seconds; memory is the most that the evaluation had allocated at once beyond its inputs, as
counted by torch's profiler. At every point of at most 100,000 tokens both must give the same
gradient, or nothing is reported. Without ``--quick``, ``--json`` or ``--image`` the results go to
``benchmarks/results/growth.json`` and the plot to ``docs/images/growth.png``.
"""

import argparse
import json
import os
import sys
import time
import warnings
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

import fiberpo
from fiberpo.ops import cpu, eager

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results/growth.json"
IMAGE = ROOT / "docs/images/growth.png"
BACKENDS = {"C++": cpu, "torch": eager}
FULL = {
    "tokens": [1_000, 10_000, 100_000, 1_000_000, 10_000_000],
    "length": [1, 4, 16, 64, 256, 1_024, 4_096, 16_384, 65_536, 131_072],
    "contexts": [2, 20, 200, 2_000, 20_000, 200_000, 1_000_000],
    "depth": [1, 2, 3, 4, 5, 6],
}
QUICK = {"tokens": [1_000, 10_000], "length": [1, 64], "contexts": [2, 200], "depth": [1, 3]}
TITLES = {
    "tokens": "tokens (rows of 1,000)",
    "length": "tokens of a trajectory",
    "contexts": "contexts in two strata (the more, the shorter)",
    "depth": "strata above the token",
}


class WrongError(Exception):
    """The backends disagree."""


def point(axis, value, total):
    """Tokens, length of a row, and how many contexts each stratum has, coarse to fine."""
    if axis == "tokens":
        return value, min(1_000, value), []
    if axis == "length":
        return total, value, []
    if axis == "contexts":
        rows = value // 2
        return total, max(total // rows, 1), [rows]
    rows = total // 1_024
    return total, 1_024, [max(rows >> k, 1) for k in range(value - 1, 0, -1)]


def prepare(axis, value, total):
    """A lowered plan and the inputs of `evaluate`."""
    tokens, length, sizes = point(axis, value, total)
    rows = max(tokens // length, 1)
    generator = torch.Generator().manual_seed(0)
    old = -2 * torch.rand(rows * length, generator=generator)
    new = old + 0.05 * torch.randn(rows * length, generator=generator)
    names = [f"level{k}" for k in range(len(sizes))]
    row = torch.arange(rows)
    labels = {name: row * size // rows for name, size in zip(names, sizes, strict=True)}
    batch = fiberpo.RatioBatch.from_packed(
        new, old, torch.randn(rows, generator=generator), torch.full((rows,), length),
        labels=labels,
    )  # fmt: skip
    budgets = dict.fromkeys([*names, "trajectory"], (0.03, 0.02))
    objective = fiberpo.recipes.fiberpo_domain(budgets) if names else fiberpo.recipes.fiberpo()
    plan = objective.plan(batch)
    contexts = len(plan.lowered.contexts)
    scale, advantages = plan.of_segments(plan.shares), plan.of_segments(batch.given_advantages)
    return (plan.lowered, batch.log_probs, batch.old_log_probs, advantages, scale), contexts


def peak_bytes(call):
    """The most that was allocated at once while ``call`` ran."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        call()
    held = most = 0
    events = profile.profiler.kineto_results.events()
    for event in sorted(events, key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def seconds(call, least=3, enough=0.5):
    """The fastest of at least three runs, in CPU seconds."""
    call()
    times, end = [], time.perf_counter() + enough
    while len(times) < least or (time.perf_counter() < end and len(times) < 200):
        begin = time.process_time()
        call()
        times.append(time.process_time() - begin)
    return min(times)


def measure(axes, total):
    """Rows of results per axis."""
    found = {}
    for axis, values in axes.items():
        found[axis] = []
        for value in values:
            inputs, contexts = prepare(axis, value, total)
            row = {axis: value, "tokens": len(inputs[1]), "contexts": contexts}
            ours, theirs = (b.evaluate(*inputs).gradient for b in BACKENDS.values())
            error = (ours - theirs).abs().max() / theirs.abs().max()
            if not error <= 1e-5:
                raise WrongError(f"{axis} {value}: gradients differ by {error:.1e}")
            for name, backend in BACKENDS.items():
                call = lambda backend=backend, inputs=inputs: backend.evaluate(*inputs)  # noqa: E731
                row[name] = {"seconds": seconds(call), "bytes": peak_bytes(call)}
            found[axis].append({**row, "at": value})
            shown = "  ".join(
                f"{n} {row[n]['seconds'] * 1e3:9.3f} ms {row[n]['bytes'] / 2**20:8.1f} MiB"
                for n in BACKENDS
            )
            print(f"{axis:9} {value:>10,}  {row['tokens']:>10,} tokens  {shown}", flush=True)
    return found


def plot(results, path):
    """Time and memory against each axis, with a line of slope 1 to compare with."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, grid = plt.subplots(2, 4, figsize=(15, 6.5), sharey="row", layout="constrained")
    for column, (axis, rows) in enumerate(results.items()):
        at = [row["at"] for row in rows]
        for line, (quantity, unit, label) in enumerate(
            [("seconds", 1e3, "time, ms"), ("bytes", 2**-20, "memory, MiB")]
        ):
            ax = grid[line, column]
            for name, colour in zip(BACKENDS, ("#0b6e8f", "#b5552b"), strict=True):
                values = [row[name][quantity] * unit for row in rows]
                ax.plot(at, values, "o-", color=colour, label=name, markersize=4)
            if axis == "tokens":
                first = rows[-1]["C++"][quantity] * unit / at[-1] * 0.4
                ax.plot(at, [first * x for x in at], ":", color="grey", label="slope 1")
            ax.set_yscale("log")
            ax.set_xscale("linear" if axis == "depth" else "log")
            ax.grid(alpha=0.25)
            if column == 0:
                ax.set_ylabel(label)
                ax.legend(frameon=False)
            if line == 1:
                ax.set_xlabel(TITLES[axis])
    tokens = results["length"][0]["tokens"]
    figure.suptitle(
        f"One evaluation, loss and gradient, 1 thread; {tokens:,} tokens where they are not varied",
        fontsize=11,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small settings, no file is changed")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--image", type=Path, help="write the plot here")
    args = parser.parse_args(arguments)
    warnings.simplefilter("ignore", fiberpo.FiberPOWarning)
    torch.set_num_threads(1)
    if cpu.unavailable():
        print(f"no C++ to time: {cpu.unavailable()[0]}", file=sys.stderr)
        return 1
    try:
        results = measure(*((QUICK, 4_096) if args.quick else (FULL, 1 << 20)))
    except WrongError as error:
        print(f"wrong, so nothing is reported: {error}", file=sys.stderr)
        return 1
    kept = not (args.quick or args.json or args.image)
    path, image = (RESULTS, IMAGE) if kept else (args.json, args.image)
    if path:
        from loss import machine

        text = json.dumps({"machine": machine(), "growth": results}, indent=1)
        path.write_text(text + "\n")
    if image:
        plot(results, image)
    return 0


if __name__ == "__main__":
    sys.exit(main())
