"""`fiberpo train` and `fiberpo warmstart`."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
import yaml

from ..errors import ConfigError
from .app import app
from .completion import complete_objective, complete_run
from .options import (
    TERMINAL,
    Budgets,
    Epsilon,
    Json,
    Pessimistic,
    objective_kwargs,
    shares_from,
    write_json,
)


@app.command(epilog="Example: fiberpo train --objective gspo --epsilon 0.02 --rollouts 50 --seed 1")
def train(
    name: Annotated[str | None, typer.Option(help="Directory of the run.")] = None,
    output: Annotated[str | None, typer.Option(help="Where runs are kept.")] = None,
    model: Annotated[
        str | None, typer.Option(help="embedded, smollm2, a directory, or a hub id.")
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(help="A domain: sum, sort, reverse, boolean or reasoning_gym:NAME."),
    ] = None,
    data: Annotated[str | None, typer.Option(help="Own prompts: JSONL, parquet, ...")] = None,
    reward: Annotated[str | None, typer.Option(help="file.py:function.")] = None,
    objective: Annotated[
        str | None,
        typer.Option(
            help="A recipe, as grpo or gspo; by default fiberstop.",
            autocompletion=complete_objective,
        ),
    ] = None,
    budget: Budgets = None,
    epsilon: Epsilon = None,
    pessimistic: Pessimistic = None,
    mask_max: Annotated[
        float | None, typer.Option(help="Leave out answers with a token of a larger k2, in nats.")
    ] = None,
    mask_mean: Annotated[
        float | None, typer.Option(help="Leave out answers of a larger mean k3, in nats.")
    ] = None,
    reward_noise: Annotated[
        list[str] | None,
        typer.Option(help="sum=0.3: this share of a domain's training rewards are coin flips."),
    ] = None,
    engine_noise: Annotated[
        float | None,
        typer.Option(help="Sample with weights that carry noise of this relative size."),
    ] = None,
    engine_bf16: Annotated[
        bool | None, typer.Option("--engine-bf16", help="Sample with weights in bfloat16.")
    ] = None,
    rollouts: Annotated[int | None, typer.Option(help="How often answers are sampled.")] = None,
    updates_per_rollout: Annotated[
        int | None, typer.Option(help="Optimizer steps on each rollout.")
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Of AdamW.")] = None,
    seed: Annotated[int | None, typer.Option(help="Makes a run repeatable.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any other setting, as prompts=32 (value in YAML)."),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file with settings.")] = None,
    resume: Annotated[
        Path | None,
        typer.Option(help="Continue this run directory.", autocompletion=complete_run),
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace a run of the same name.")] = False,
    tensorboard: Annotated[bool | None, typer.Option("--tensorboard")] = None,
    trackio: Annotated[bool | None, typer.Option("--trackio")] = None,
    record: Annotated[
        bool | None,
        typer.Option("--record", help="Keep every step for replay, suggest, doctor and report."),
    ] = None,
    json_: Json = None,
) -> None:
    """Train a language model by RL with any objective, and write a report.

    Without options: FiberStop on the embedded model and four small domains, a few minutes on two
    cores. The run's directory holds the report, metrics, config and checkpoint.
    """
    given = {
        "name": name, "output": output, "model": model, "tasks": task, "data": data,
        "reward": reward, "objective": objective, "rollouts": rollouts,
        "updates_per_rollout": updates_per_rollout, "learning_rate": learning_rate,
        "seed": seed, "tensorboard": tensorboard, "trackio": trackio,
        "mask_max": mask_max, "mask_mean": mask_mean, "record": record,
        "reward_noise": shares_from("--reward-noise", reward_noise) if reward_noise else None,
        "engine_noise": engine_noise, "engine_bf16": engine_bf16,
    }  # fmt: skip
    values = {k: v for k, v in given.items() if v is not None}
    for text in set_ or []:
        key, _, value = text.partition("=")
        try:
            values[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(
                f"--set {text!r}: the value is not YAML ({getattr(error, 'problem', error)}); "
                "quote it for YAML, as in --set 'tasks=[sum, sort]'"
            ) from error
    from ..report.terminal import print_summary
    from ..train.config import CONFIG_FILE, make_config
    from ..train.program import train as run

    if resume is not None:
        if config is not None:
            raise ConfigError("--resume takes its settings from the run; leave out --config")
        if not (resume / CONFIG_FILE).is_file():
            raise ConfigError(
                f"--resume {resume}: there is no {CONFIG_FILE} in it, so it is not the directory "
                "of a run"
            )
        config = resume / CONFIG_FILE
        values = {**values, "output": str(resume.parent), "name": resume.name}
    base = make_config(config, values)
    parameters = objective_kwargs(
        base.objective, budget or [], epsilon, pessimistic, base.objective_kwargs
    )
    settings = base.replace(objective_kwargs=parameters)
    say = partial(print, file=sys.stderr) if json_ == TERMINAL else print
    summary = run(settings, resume=resume is not None, overwrite=overwrite, say=say)
    if json_ != TERMINAL:
        print_summary(summary)
    write_json(json_, summary)
    say(f"\nreport: {settings.run_dir / 'report.html'}")
    if summary["interrupted"]:
        say(f"continue with: fiberpo train --resume {settings.run_dir}")
        raise typer.Exit(130)


@app.command(epilog="Example: fiberpo warmstart build/embedded --seed 0")
def warmstart(
    output: Annotated[Path, typer.Argument(help="Directory for the checkpoint.")],
    seed: Annotated[int, typer.Option(help="Of weights and problems.")] = 0,
) -> None:
    """Rebuild the embedded model's checkpoint by supervised fine-tuning (about two minutes)."""
    from ..train.warmstart import warmstart as run

    report = run(output, seed=seed)
    for kind in ("greedy", "sampled"):
        accuracy = ", ".join(f"{k} {v:.3f}" for k, v in report[f"{kind}_accuracy"].items())
        print(f"{kind:8} {accuracy}")
