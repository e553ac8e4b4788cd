"""Stand-ins for `fiberpo.train.program.train`: files in the real format, within milliseconds."""

import json
import os
import signal
import time
from pathlib import Path

DOMAINS = ("sum", "sort")
GRID = {
    "name": "grid",
    "about": "for tests",
    "seeds": [0, 1],
    "base": {
        "prompts": 4, "generations": 2, "rollouts": 4, "updates_per_rollout": 2,
        "heldout_every": 2, "heldout_prompts": 4,
    },
    "settings": {
        "usual": {"about": "as it is"},
        "hot": {"about": "faster", "config": {"learning_rate": 4e-4, "passes_per_rollout": 2}},
    },
    "arms": {
        "grpo": {"config": {"objective": "grpo", "objective_kwargs": {"epsilon": 0.2}}},
        "gspo": {"config": {"objective": "gspo", "objective_kwargs": {"epsilon": 0.02}}},
    },
}  # fmt: skip


def heldout(seed, step):
    """Reward per domain; no two are alike."""
    rewards = {name: 0.1 + i / 4 + seed / 100 + step / 1000 for i, name in enumerate(DOMAINS)}
    return {**rewards, "mean": sum(rewards.values()) / len(rewards)}


def lines(config):
    """What metrics.jsonl holds, one object a line."""
    per_rollout = config.updates_per_rollout * config.passes_per_rollout

    def evaluation(step, rollout):
        rewards = heldout(config.seed, step)
        named = {f"heldout/reward/domain={name}": rewards[name] for name in DOMAINS}
        return {
            "kind": "eval", "step": step, "rollout": rollout,
            "heldout/reward": rewards["mean"], **named,
        }  # fmt: skip

    yield evaluation(0, 0)
    for step in range(1, config.updates + 1):
        rollout, place = divmod(step - 1, per_rollout)
        line = {
            "kind": "train", "step": step, "rollout": rollout, "loss": 0.1 / step,
            "grad_norm": float(step % 5), "entropy": 1 / step, "epoch": step / 100,
        }  # fmt: skip
        if place == 0:
            length = 3.25 + rollout
            line |= {"completions/mean_length": length, "reward": 0.5, "num_tokens": 99.0 * step}
        yield line
        if step % (config.heldout_every * per_rollout) == 0:
            yield evaluation(step, rollout)


def train(config, *, overwrite, progress, say, report):
    """A run that works."""
    assert overwrite
    assert not progress
    assert not report
    run_dir = config.run_dir
    run_dir.mkdir(parents=True)
    config.replace(max_completion_length=21).save(run_dir / "config.yaml")
    with (run_dir / "metrics.jsonl").open("w") as file:
        for line in lines(config):
            file.write(json.dumps(line) + "\n")
    (run_dir / "checkpoint-8").mkdir()
    (run_dir / "checkpoint-8" / "model.safetensors").touch()
    summary = {
        "name": config.run_name, "objective": str(config.build_objective()),
        "seed": config.seed, "steps": config.updates, "interrupted": False, "seconds": 2.5,
        "heldout_before": heldout(config.seed, 0),
        "heldout_after": heldout(config.seed, config.updates),
    }  # fmt: skip
    (run_dir / "summary.json").write_text(json.dumps(summary))
    say(f"threads {os.environ['OMP_NUM_THREADS']}")
    return summary


def troubled(config, **arguments):
    """GSPO has a bug at seed 0, and is killed at seed 1, each in the middle of a run."""
    if config.objective != "gspo" or (config.run_dir.parents[2] / "mended").exists():
        return train(config, **arguments)
    train(config, **arguments)
    (config.run_dir / "summary.json").unlink()
    if config.seed == 0:
        raise ZeroDivisionError("by nothing")
    os.kill(os.getpid(), signal.SIGKILL)


def endless(config, **arguments):
    """GRPO is done at once; GSPO says who it is, and never ends."""
    if config.objective == "grpo":
        return train(config, **arguments)
    config.run_dir.mkdir(parents=True)
    config.save(config.run_dir / "config.yaml")
    Path(config.run_dir / "pid").write_text(str(os.getpid()))
    while True:
        time.sleep(0.1)
