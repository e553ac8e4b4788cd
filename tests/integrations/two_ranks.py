"""What one process and two processes must agree on; test_trl_ranks.py runs it as both.

    python two_ranks.py FOLDER          (FOLDER/start: the model, saved)
    torchrun --standalone --nproc_per_node 2 two_ranks.py FOLDER

Every case trains on the same 24 answers a rollout, in two micro-batches a process; the log lines of
all cases go to ``ranks<n>.json`` in the folder.
"""

import json
import os
import sys
import warnings
from pathlib import Path

from accelerate import PartialState
from transformers import PrinterCallback, TrainerCallback

import fiberpo
from integrations.tiny import double_model, rows, scripted, tiny_model, trainer, updates

ANSWERS, PARTS = 24, 2
RANKS = int(os.environ.get("WORLD_SIZE", "1"))
BUDGET, EPSILON = (0.004, 0.003), 0.02

OBJECTIVES = {
    "trajectory": fiberpo.recipes.fiberpo(BUDGET, EPSILON, rollback=2.0),
    "group": fiberpo.recipes.fiberpo_domain(
        {"group": BUDGET, "trajectory": BUDGET}, EPSILON, rollback=2.0
    ),
    "domain": fiberpo.recipes.fiberpo_domain(
        {"domain": BUDGET, "group": BUDGET, "trajectory": BUDGET}, EPSILON, rollback=2.0
    ),
    "tokens": fiberpo.recipes.dapo(0.003, 0.004),
}
LAYOUTS = {
    "whole": {"num_generations": 4},  # 3 groups on each of two ranks
    "straddling": {"num_generations": 8},  # the second of 3 groups lies half on either rank
    "interleaved": {"num_generations": 8, "keep_groups_together": False},
}


class Routes(TrainerCallback):
    """Where the coefficients of every update came from."""

    def __init__(self):
        self.found = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.found.append(self.run.last_window.route.value)


def make(folder, objective, layout, **settings):
    routes = Routes()
    defaults = {
        "per_device_train_batch_size": ANSWERS // RANKS // PARTS,
        "per_device_eval_batch_size": 16 // RANKS, "gradient_accumulation_steps": PARTS,
        "steps_per_generation": PARTS, "num_iterations": 3, "max_steps": 4,
        "model": double_model(),
    }  # fmt: skip
    routes.run = scripted(
        trainer(
            folder, objective=OBJECTIVES[objective], callbacks=[routes],
            **{**defaults, **LAYOUTS[layout], **settings},
        )
    )  # fmt: skip
    routes.run.remove_callback(PrinterCallback)
    return routes.run, routes


def train(folder, objective, layout, **settings):
    run, routes = make(folder, objective, layout, **settings)
    run.train()
    return {"steps": updates(run), "routes": routes.found}


def penalised(folder):
    """With the KL against a reference model, which TRL loads by its path."""
    model = str(folder / "start"), tiny_model()[1]
    return train(folder, "group", "straddling", beta=5.0, model=model)


def resumed(folder):
    """Updates 3 and 4 again, from a checkpoint in the middle of the first rollout."""
    settings = {"output_dir": str(folder / f"resume{RANKS}"), "save_steps": 2}
    make(folder, "domain", "straddling", save_strategy="steps", **settings)[0].train()
    run, routes = make(folder, "domain", "straddling", **settings)
    run.train(resume_from_checkpoint=str(folder / f"resume{RANKS}" / "checkpoint-2"))
    return {"steps": updates(run)[2:], "routes": routes.found}


def evaluated(folder):
    run, _ = make(folder, "tokens", "whole", max_steps=1)
    kept = ("eval_loss", "eval_entropy", "eval_reward", "eval_completions/mean_length")
    result = run.evaluate(rows(8))
    return {"steps": [{name: result[name] for name in kept}], "routes": []}


def finish(folder, found):
    if int(os.environ.get("RANK", "0")) == 0:
        (folder / f"ranks{RANKS}.json").write_text(json.dumps(found))
    PartialState().destroy_process_group()  # or gloo's threads may abort the exit


def main(folder):
    warnings.simplefilter("ignore")
    found = {
        f"{objective} {layout}": train(folder, objective, layout)
        for objective in OBJECTIVES
        for layout in LAYOUTS
    }
    found["local"] = train(folder, "domain", "straddling", split_mode="local", split_check_every=1)
    found["penalised"] = penalised(folder)
    found["resumed"] = resumed(folder)
    found["evaluated"] = evaluated(folder)
    finish(folder, found)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
