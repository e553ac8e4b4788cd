"""Ratios that must not get worse: measured here, compared with `benchmarks/baselines/*.json`.

    python benchmarks/regression.py [--update]

Every ratio is of two times taken side by side in one process, in CPU seconds of one thread; the
fastest of interleaved repeats counts. Correctness first: a wrong gradient ends the program. A ratio
beyond its tolerance is measured again, at most twice, since cores are shared: a real regression
stays. Exit code 1 if one does. ``--update`` writes what is measured as the new baselines.
"""

import argparse
import importlib.util
import json
import os
import sys
import time
from collections import defaultdict
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

import fiberpo

HERE = Path(__file__).resolve().parent
BASELINES = HERE / "baselines"
TOLERANCE = 1.5
TOKENS = 1_048_576


def load(name):
    """A benchmark program as a module."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", HERE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def fastest(rows, repeats):
    """Seconds of every row, interleaved."""
    times = defaultdict(list)
    for call in rows.values():
        call()
    for _ in range(repeats):
        for name, call in rows.items():
            begin = time.process_time()
            call()
            times[name].append(time.process_time() - begin)
    return {name: min(found) for name, found in times.items()}


def loss():
    """Path A: kernels and whole objectives over an eager chain of torch operations."""
    program = load("loss")
    data = program.make(TOKENS)
    rows, truth = program.ours(data)  # refuses wrong gradients
    new, old, advantages = data
    batch = fiberpo.RatioBatch.from_packed(
        new.flatten(), old.flatten(), advantages, torch.full((len(new),), program.LENGTH)
    )
    objective = fiberpo.recipes.fiberpo(program.BUDGET, program.EPSILON)

    def whole():
        leaf = new.flatten().clone().requires_grad_()
        found = fiberpo.RatioBatch.from_packed(leaf, old.flatten(), advantages, batch.lengths)
        objective(found).loss.backward()
        return leaf.grad

    program.check("whole", whole(), truth["fiberpo"], 1e-5)
    names = ("fiberpo", "fiberpo pessimistic", "fiberpo_domain", "grpo", "gspo")
    chosen = {name: rows[f"C++: {name}"] for name in names}
    chosen["fiberpo from tensors"] = whole
    chosen["fiberpo metrics"] = lambda: objective(batch).metrics()
    out = torch.empty_like(new)
    chosen["exp(new - old)"] = lambda: torch.exp(torch.sub(new, old, out=out), out=out)
    seconds = fastest(chosen, 7)
    base = seconds.pop("exp(new - old)")
    found = {f"{name} / exp(new - old)": value / base for name, value in seconds.items()}
    found["fiberpo_domain / fiberpo"] = seconds["fiberpo_domain"] / seconds["fiberpo"]
    return found


def linear_logprob():
    """Path B: forward and backward over the matrix products that the mode needs."""
    torch.manual_seed(0)
    tokens, width, vocabulary = 1024, 256, 8192
    hidden, head = torch.randn(tokens, width), torch.randn(vocabulary, width) / 16
    targets, coefficients = torch.randint(vocabulary, (tokens,)), torch.randn(tokens)

    def gradient(function, trained, **more):
        h, w = hidden.clone().requires_grad_(), head.clone().requires_grad_(trained)
        (function(h, w, targets, **more) * coefficients).sum().backward()
        return h.grad

    def plain(h, w, targets):
        return (h @ w.T).log_softmax(-1).gather(1, targets[:, None])[:, 0]

    expected = gradient(plain, True)
    rows = {}
    for mode, trained in (("two-phase", True), ("frozen", False)):
        found = gradient(fiberpo.linear_logprob, trained, mode=mode)
        if not torch.allclose(found, expected, atol=1e-4, rtol=1e-4):
            sys.exit(f"linear_logprob, {mode}: wrong gradient; nothing is timed")
        rows[mode] = lambda t=trained, m=mode: gradient(fiberpo.linear_logprob, t, mode=m)
    logits = hidden @ head.T
    rows["product"] = lambda: torch.mm(hidden, head.T, out=logits)
    seconds = fastest(rows, 5)
    return {
        "two-phase / 4 products": seconds["two-phase"] / (4 * seconds["product"]),
        "frozen / 2 products": seconds["frozen"] / (2 * seconds["product"]),
    }


PROGRAMS = {"loss": loss, "linear_logprob": linear_logprob}


def beyond(found, baselines):
    """Ratios that exceed their baseline by more than the tolerance."""
    return [
        name for name, entry in baselines.items()
        if found[name] > entry["baseline"] * entry["tolerance"]
    ]  # fmt: skip


def compare(name, measure, baselines):
    """Whether a program's ratios hold, after at most three measurements."""
    best = {}
    for _ in range(3):
        for key, value in measure().items():
            best[key] = min(value, best.get(key, value))
        if not beyond(best, baselines):
            break
    worse = beyond(best, baselines)
    for key, entry in baselines.items():
        verdict = "WORSE" if key in worse else "ok"
        print(f"{name:15} {key:40} {best[key]:8.2f}  baseline {entry['baseline']:8.2f}  {verdict}")
    return not worse


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--update", action="store_true", help="write new baselines")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    sound = True
    for name, measure in PROGRAMS.items():
        path = BASELINES / f"{name}.json"
        if options.update:
            rounds = [measure() for _ in range(3)]
            entries = {
                key: {"baseline": round(min(r[key] for r in rounds), 3), "tolerance": TOLERANCE}
                for key in rounds[0]
            }
            path.write_text(json.dumps(entries, indent=1) + "\n")
            print(f"written: {path.name}: {entries}")
        else:
            sound = compare(name, measure, json.loads(path.read_text())) and sound
    if not sound:
        sys.exit("a ratio is more than its tolerance above its baseline")


if __name__ == "__main__":
    main()
