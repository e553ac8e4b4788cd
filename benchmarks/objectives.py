"""Loss and gradient of every recipe from given log-probs, beside a plain eager PPO loss.

    python benchmarks/objectives.py [--tokens 524288] [--length 512] [--json out.json]

Correctness first: nothing is timed unless the closed form equals autograd through the gates in
float64, and the plain loss equals our PPO. All rows are measured interleaved in one process; the
ratio to the plain loss is what counts, absolute times depend on the machine.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

import fiberpo

STRATA = {"domain": (0.02, 0.015), "group": (0.04, 0.03), "trajectory": (0.12, 0.05)}
OBJECTIVES = {
    "ppo": fiberpo.recipes.ppo(),
    "grpo": fiberpo.recipes.grpo(),
    "gspo": fiberpo.recipes.gspo(),
    "fiberpo": fiberpo.recipes.fiberpo(),
    "fiberpo_domain": fiberpo.recipes.fiberpo_domain(STRATA),
}


def make(tokens, length, dtype=torch.float32):
    torch.manual_seed(0)
    rows = max(tokens // length, 1)
    log_probs = (torch.randn(rows, length, dtype=dtype) * 0.05 - 1).requires_grad_()
    old = log_probs.detach() + torch.randn(rows, length, dtype=dtype) * 0.05
    mask = torch.arange(length) < torch.randint(length // 2, length + 1, (rows, 1))
    labels = {"domain": torch.arange(rows) % 4, "group": torch.arange(rows) // 8 * 4}
    labels["group"] += labels["domain"]
    return log_probs, old, torch.randn(rows, dtype=dtype), mask, labels


def plain_ppo(log_probs, old, advantages, mask):
    ratio = torch.exp(log_probs - old)
    first, second = ratio * advantages[:, None], ratio.clamp(0.8, 1.2) * advantages[:, None]
    return -(torch.min(first, second) * mask).sum() / mask.sum()


def step(objective, log_probs, old, advantages, mask, labels, gradient="closed_form"):
    if objective is None:
        loss = plain_ppo(log_probs, old, advantages, mask)
    else:
        batch = fiberpo.RatioBatch.from_padded(log_probs, old, advantages, mask, labels=labels)
        loss = objective(batch, gradient=gradient).loss
    (grad,) = torch.autograd.grad(loss, log_probs)
    return loss.detach(), grad


def check():
    """Raise unless every row computes what it should."""
    data = make(4096, 64, torch.float64)
    for objective in OBJECTIVES.values():
        closed, auto = step(objective, *data), step(objective, *data, gradient="autograd")
        torch.testing.assert_close(closed[0], auto[0])
        torch.testing.assert_close(closed[1], auto[1])
    torch.testing.assert_close(step(None, *data)[0], step(OBJECTIVES["ppo"], *data)[0])
    torch.testing.assert_close(step(None, *data)[1], step(OBJECTIVES["ppo"], *data)[1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=524_288)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--json")
    args = parser.parse_args()
    check()
    data = make(args.tokens, args.length)
    rows = {"plain eager PPO": None, **OBJECTIVES}
    times = {name: [] for name in rows}
    for _ in range(args.repeat):
        for name, objective in rows.items():
            begin = time.process_time()
            step(objective, *data)
            times[name].append(time.process_time() - begin)
    medians = {name: statistics.median(t) for name, t in times.items()}
    base = medians["plain eager PPO"]
    print(f"{int(data[3].sum()):,} loss tokens, 1 thread, CPU seconds (median of {args.repeat})")
    for name, seconds in medians.items():
        print(f"{name:18} {seconds * 1e3:9.1f} ms   {seconds / base:6.2f} x plain")
    if args.json:
        machine = {"platform": platform.platform(), "torch": torch.__version__}
        with open(args.json, "w") as file:
            json.dump({"machine": machine, "seconds": medians}, file, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
