"""How many recorded tokens a second `fiberpo replay` works through, and where the time goes.

    python benchmarks/replay.py [--quick] [--json out.json]

A recording is written to a temporary directory by `fiberpo.recording.Recorder` (steps of 400
answers of about 1000 tokens in 4 domains with 8 answers a prompt) and replayed:

- each objective alone, and `fiberpo_domain` with `grpo` and `gspo` beside it, as the command does;
- *array work*: the steps are in memory already, so nothing is read;
- *in all*: `open_recording`, reading, and array work;
- *coefficients only*: ``objective(batch)`` in a loop on one thread, which is the floor of the
  array work with this engine.

Wall time means little while other programs use the cores (``load_before`` says); tokens a
CPU-second, times the cores, is what an idle machine reaches at most.

Correctness first: gradient kept and regimes of one step must be those of ``Surrogate.metrics`` or
nothing is printed. Peak memory is that of a process that replays and does nothing else.
Without ``--quick`` and ``--json`` the results go to ``benchmarks/results/replay.json``.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import torch

from fiberpo import RatioBatch, recipes
from fiberpo.diagnosis import replay
from fiberpo.recording import Recorder, open_recording

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results/replay.json"
BUDGETS = {"domain": (0.02, 0.015), "group": (0.04, 0.03), "trajectory": (0.12, 0.05)}
OBJECTIVES = {
    "fiberpo_domain": recipes.fiberpo_domain(BUDGETS, epsilon=0.2),
    "grpo": recipes.grpo(),
    "gspo": recipes.gspo(),
}
FULL = {"steps": 250, "rows": 400, "length": 1000, "held": 4}
QUICK = {"steps": 3, "rows": 64, "length": 40, "held": 2}


class Held:
    """A recording whose steps are in memory."""

    problems = ()

    def __init__(self, items, repeat=1):
        self.items, self.repeat = items, repeat

    def iterate(self, steps=None):
        for _ in range(self.repeat):
            yield from self.items


def make(rows, length, seed):
    """A step of ``rows`` answers of about ``length`` tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(length // 2, 3 * length // 2 + 1, (rows,), generator=generator)
    count = int(lengths.sum())
    old = -torch.rand(count, generator=generator) * 3
    shift = torch.repeat_interleave(0.05 * torch.randn(rows, generator=generator), lengths)
    moved = 0.3 * torch.randn(count, generator=generator)
    moved *= torch.rand(count, generator=generator) < 0.2
    group = torch.arange(rows) // 8
    return RatioBatch.from_packed(
        old + shift + moved, old, torch.randn(rows, generator=generator), lengths,
        labels={"domain": group % 4, "group": group},
    )  # fmt: skip


def write(path, size):
    batches = [make(size["rows"], size["length"], seed) for seed in range(4)]
    with Recorder(path, OBJECTIVES["fiberpo_domain"]) as recorder:
        for step in range(size["steps"]):
            recorder.record(step + 1, batches[step % len(batches)])


def check(items):
    """The statistics are those of the objective itself."""
    (item, *_) = items
    found = replay(Held([item]), OBJECTIVES)
    for outcome in found.outcomes:
        metrics = outcome.objective(item.batch).metrics()
        shares = outcome.total.mass / outcome.total.mass[0]
        pairs = [(shares[1], metrics["gate/gradient_kept"])]
        pairs.append((shares[2], metrics["gate/gradient_reversed"]))
        for stratum, counts in outcome.total.regimes.items():
            pairs.append((counts[0] / counts.sum(), metrics[f"gate/{stratum}/pass_frac"]))
        for mine, theirs in pairs:
            if abs(mine - theirs) > 1e-9:
                raise SystemExit(f"{outcome.name}: {mine} here, {theirs} in Surrogate.metrics")


def clock(action):
    wall, cpu = time.perf_counter(), time.process_time()
    result = action()
    return result, time.perf_counter() - wall, time.process_time() - cpu


def row(tokens, wall, cpu):
    return {
        "tokens": tokens, "seconds": wall, "cpu_seconds": cpu,
        "tokens_per_second": tokens / wall, "tokens_per_cpu_second": tokens / cpu,
    }  # fmt: skip


def peak(path):
    """Peak memory in MB of a process that only imports, and of those that replay."""
    code = (
        "import re, sys\n"
        "from fiberpo import recipes\n"
        "from fiberpo.diagnosis import replay\n"
        "from fiberpo.recording import open_recording\n"
        "if len(sys.argv) > 1:\n"
        "    recording = open_recording(sys.argv[1])\n"
        "    steps = recording.steps[: int(sys.argv[2])]\n"
        "    replay(recording, {'grpo': recipes.grpo()}, steps=steps)\n"
        "status = open('/proc/self/status').read()\n"
        "print(int(re.search(r'VmHWM:\\s+(\\d+)', status)[1]) / 1024)"
    )
    found = {}
    for name, more in (("imports", []), ("10 steps", [path, 10]), ("all steps", [path, 10**9])):
        command = [sys.executable, "-c", code, *map(str, more)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[name] = float(done.stdout)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    size = QUICK if options.quick else FULL
    torch.set_num_threads(1)
    found = {"size": size, "machine": f"{os.cpu_count()} cores, {platform.machine()}"}
    found["load_before"] = os.getloadavg()[0]
    found |= {"torch": torch.__version__, "coefficients_only": {}, "array_work": {}, "in_all": {}}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recording"
        write(path, size)
        found["bytes_per_token"] = sum(p.stat().st_size for p in path.rglob("*")) / sum(
            len(item.batch) for item in open_recording(path).iterate()
        )
        items = list(open_recording(path).iterate())[: size["held"]]
        check(items)
        tokens = sum(len(item.batch) for item in items)
        sets = {**{name: {name: o} for name, o in OBJECTIVES.items()}, "all three": OBJECTIVES}
        for name, chosen in sets.items():

            def engine(chosen=chosen):
                for item in items:
                    for objective in chosen.values():
                        objective(item.batch)

            engine()
            _, wall, cpu = clock(engine)
            found["coefficients_only"][name] = row(tokens, wall, cpu)
            for workers in (1, 2):
                _, wall, cpu = clock(
                    lambda c=chosen, w=workers: replay(Held(items, 2), c, workers=w)
                )
                found["array_work"][f"{name}, {workers} threads"] = row(2 * tokens, wall, cpu)
            whole, wall, cpu = clock(lambda c=chosen: replay(open_recording(path), c))
            found["in_all"][name] = row(whole.tokens, wall, cpu)
        found["peak_mb"] = peak(path)
    for part in ("coefficients_only", "array_work", "in_all"):
        for name, line in found[part].items():
            wall, cpu = line["tokens_per_second"] / 1e6, line["tokens_per_cpu_second"] / 1e6
            print(f"{part:18} {name:28} {wall:6.2f} M tokens/s  {cpu:6.2f} M tokens/CPU-second")
    print("peak MB", found["peak_mb"], "bytes/token", round(found["bytes_per_token"], 2))
    target = options.json or (None if options.quick else RESULTS)
    if target is not None:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(found, indent=1) + "\n")
        print(f"written: {target}")


if __name__ == "__main__":
    main()
