"""What exactness costs in a real optimizer step: FiberPO-Domain beside GRPO in the TRL trainer.

    python benchmarks/exact_step.py [--rounds 3] [--json out.json]

The embedded model, four domains, 256 answers a rollout, four optimizer steps on each, four
micro-batches a step: prompt groups and domains reach over micro-batches, so that FiberPO-Domain
needs the two-phase step, GRPO and FiberPO (a trajectory is one row) do not. Correctness first: with
one micro-batch a step the gradient norms must be the same to 1e-4, or nothing is timed.

The runs are interleaved, round by round, in one process; times are CPU seconds of one thread, split
by what the trainer was doing. Medians over the rounds; the ratio to GRPO is what counts.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import TrainerCallback

from fiberpo.exact import Window
from fiberpo.train import program
from fiberpo.train.config import TrainConfig
from fiberpo.train.sources import load_model, load_source

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks/results/exact_step.json"
STRATA = {"domain": (0.02, 0.015), "group": (0.04, 0.03), "trajectory": (0.12, 0.05)}
OBJECTIVES = {
    "grpo": ("grpo", {}),
    "fiberpo": ("fiberpo", {"pessimistic": True}),
    "fiberpo_domain": ("fiberpo_domain", {"budgets": STRATA, "pessimistic": True}),
}
PARTS = ("rollout", "phase 1", "phase 2", "statistics", "optimizer")


class Clock(TrainerCallback):
    """CPU seconds by part; the innermost part that is running gets them."""

    def __init__(self):
        self.seconds = dict.fromkeys((*PARTS, "other"), 0.0)
        self.stack, self.since = ["other"], time.process_time()

    def _charge(self):
        now = time.process_time()
        self.seconds[self.stack[-1]] += now - self.since
        self.since = now

    def wrap(self, owner, method, part):
        inner = getattr(owner, method)

        def timed(*args, **kwargs):
            self._charge()
            self.stack.append(part)
            try:
                return inner(*args, **kwargs)
            finally:
                self._charge()
                self.stack.pop()

        setattr(owner, method, timed)

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        self.wrap(optimizer, "step", "optimizer")
        self.__init__()


def trainer_of(name, micro_batch, rollouts, folder):
    objective, parameters = OBJECTIVES[name]
    config = TrainConfig(
        output=folder, name=name, objective=objective, objective_kwargs=parameters, prompts=32,
        generations=8, rollouts=rollouts, micro_batch=micro_batch, heldout_every=10**6,
        save_every=10**6, seed=0,
    )  # fmt: skip
    model, tokenizer = load_model(config)
    source = load_source(config, words=tokenizer.chat_template is not None)
    config = config.replace(max_completion_length=source.max_completion_length)
    clock = Clock()
    trainer = program._trainer(config, source, model, tokenizer, clock)
    clock.wrap(trainer, "_generate_and_score_completions", "rollout")
    clock.wrap(trainer, "training_step", "phase 2")
    clock.wrap(trainer, "_open_window", "phase 1")
    clock.wrap(trainer, "_log_window", "statistics")
    return trainer, clock


def run(name, micro_batch, rollouts, folder):
    trainer, clock = trainer_of(name, micro_batch, rollouts, folder)
    routes, close = [], Window.close
    Window.close = lambda window: (routes.append(window.route.value), close(window))[1]
    try:
        trainer.train()
    finally:
        Window.close = close
    clock._charge()
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    steps = trainer.state.global_step
    return {part: s / steps for part, s in clock.seconds.items()}, norms, routes


def check(folder):
    """Gradient norms with four micro-batches a step are those with one."""
    for name in OBJECTIVES:
        many, one = run(name, 16, 1, folder)[1], run(name, 64, 1, folder)[1]
        gap = max(abs(a - b) / b for a, b in zip(many, one, strict=True))
        print(f"{name:16} gradient norms, 4 micro-batches against 1: largest difference {gap:.1e}")
        if not gap < 1e-4:
            sys.exit(f"{name}: the cut changes the gradient; nothing is timed")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rollouts", type=int, default=3, help="of each run")
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    program._quiet()
    warnings.simplefilter("ignore")
    found = {name: [] for name in OBJECTIVES}
    taken = {}
    with tempfile.TemporaryDirectory() as folder:
        check(folder)
        for round_ in range(options.rounds):
            for name in OBJECTIVES:
                seconds, _, routes = run(name, 16, options.rollouts, folder)
                found[name].append(seconds)
                taken[name] = routes[:4]
                print(f"round {round_ + 1}/{options.rounds} {name}", file=sys.stderr, flush=True)
    rows = {}
    for name, rounds in found.items():
        rows[name] = {p: statistics.median(r[p] for r in rounds) for p in (*PARTS, "other")}
        rows[name]["whole step"] = statistics.median(sum(r.values()) for r in rounds)
        base = found["grpo"]
        for key, parts in {"ratio": (*PARTS, "other"), "ratio without rollout": PARTS[1:]}.items():
            pairs = zip(rounds, base, strict=True)
            rows[name][key] = statistics.median(
                sum(r[p] for p in parts) / sum(b[p] for p in parts) for r, b in pairs
            )
        rows[name]["routes"] = taken[name]
    columns = [*PARTS, "other", "whole step"]
    print(
        f"\nCPU ms per optimizer step\n{'':16}" + "".join(f"{c:>12}" for c in columns) + "  x GRPO"
    )
    for name, row in rows.items():
        cells = "".join(f"{1e3 * row[c]:12.1f}" for c in columns)
        print(f"{name:16}{cells}  {row['ratio']:.3f}   {', '.join(row['routes'])}")
    machine = {
        "python": platform.python_version(), "torch": torch.__version__, "threads": 1,
        "cpus": os.cpu_count(), "processor": platform.processor() or platform.machine(),
    }  # fmt: skip
    settings = {"rounds": options.rounds, "rollouts": options.rollouts, "micro_batches": 4}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"machine": machine, "settings": settings, "rows": rows}, indent=1)
    options.json.write_text(text + "\n")
    print(f"written: {options.json}")


if __name__ == "__main__":
    main()
