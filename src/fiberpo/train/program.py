"""``fiberpo train``: one run from configuration to report."""

from __future__ import annotations

import functools
import json
import logging
import os
import shutil
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import get_last_checkpoint

from ..errors import ConfigError, FiberPOWarning
from ..integrations.trl import FiberPOConfig, FiberPOTrainer
from ..recording import RUN_FOLDER
from ..report.page import write_report
from ..report.strata import strata_table
from .callbacks import METRICS_FILE, Interruption, MetricsFile, RunCallback
from .config import CONFIG_FILE, TrainConfig
from .heldout import Heldout, evaluate_heldout
from .mismatch import Engine, MismatchTrainer
from .sources import Source, check_directory, load_model, load_source
from .summary import samples, versions

BEFORE_FILE = "before.json"
SUMMARY_FILE = "summary.json"


def train(
    config: TrainConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    say: Any = print,
    report: bool = True,
) -> dict[str, Any]:
    """Run, or continue, a training run; everything it writes lies in ``config.run_dir``.

    Args:
        config: what to do.
        resume: continue from the last checkpoint in the run's directory.
        overwrite: replace a run of the same name.
        progress: show a progress bar.
        say: takes the lines meant for a person.
        report: write ``report.html`` and ``report.png``; `fiberpo.report` can do it later.

    Returns:
        The content of ``summary.json``.

    Raises:
        ConfigError, DataError: before anything is written, as far as possible.
    """
    _quiet()
    _check_strata(config)
    started, run_dir = time.monotonic(), config.run_dir
    check_directory(run_dir, resume=resume, overwrite=overwrite)
    checkpoint = _checkpoint(run_dir) if resume else None
    model, tokenizer = load_model(config)
    source = load_source(config, words=tokenizer.chat_template is not None)
    config = config.replace(max_completion_length=source.max_completion_length)
    _prepare_directory(run_dir, config, overwrite and not resume)
    _describe(config, source, model, say)

    def evaluate() -> Heldout:
        with torch.autocast(model.device.type, torch.bfloat16, enabled=config.bf16):
            return evaluate_heldout(
                model, tokenizer, source.heldout, source.reward,
                max_new_tokens=source.max_completion_length, temperature=config.temperature,
                seed=config.seed,
            )  # fmt: skip

    interruption = Interruption()
    with interruption.watching():
        before = _before(run_dir, evaluate, say, resume)
        metrics = MetricsFile(run_dir / METRICS_FILE, _step_of(checkpoint) if resume else None)
        if not resume:
            metrics.write("eval", 0, 0, _as_metrics(before["rewards"]))
        callback = RunCallback(
            metrics,
            evaluate,
            updates=config.updates,
            updates_per_rollout=config.updates_per_rollout * config.passes_per_rollout,
            evaluate_every=config.heldout_every
            * config.updates_per_rollout
            * config.passes_per_rollout,
            interruption=interruption,
            progress=progress,
        )
        trainer = _trainer(config, source, model, tokenizer, callback)
        trainer.train(resume_from_checkpoint=checkpoint)
        step = trainer.state.global_step
        finished = step >= config.updates
        after = callback.last if finished and callback.last_step == step else None
        if finished and after is None:
            after = evaluate()
            metrics.write("eval", step, config.rollouts - 1, after.metrics())
        metrics.close()
    summary = {
        "name": config.run_name,
        "objective": str(trainer.objective),
        "model": config.model,
        "seed": config.seed,
        "steps": step,
        "updates_per_rollout": config.updates_per_rollout * config.passes_per_rollout,
        "interrupted": not finished,
        "seconds": time.monotonic() - started,
        "heldout_before": before["rewards"],
        "heldout_after": after.rewards if after is not None else None,
        "strata": strata_table(trainer.objective, trainer.run_statistics),
        "samples": samples(source.heldout, before["answers"], after),
        "notes": _notes(config),
        "versions": versions(),
    }
    (run_dir / SUMMARY_FILE).write_text(json.dumps(summary, indent=1))
    if report:
        write_report(run_dir)
    return summary


def _quiet() -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("fiberpo").setLevel(logging.INFO)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*pin_memory.*")


def _check_strata(config: TrainConfig) -> None:
    """Before a model is loaded: the strata of the objective are those that this program has."""
    if config.objective == "dr_grpo":  # its length may still be open, and it has no strata
        return
    objective = config.build_objective()
    wanted = [*objective.strata, objective.weights.stratum or "trajectory"]
    unknown = [name for name in wanted if name not in ("domain", "group", "trajectory")]
    if unknown:
        raise ConfigError(
            f"{config.objective} looks at the stratum {unknown[0]!r}; fiberpo train has domain, "
            "group and trajectory"
        )


def _checkpoint(run_dir: Path) -> str:
    found = get_last_checkpoint(str(run_dir)) if run_dir.is_dir() else None
    if found is None:
        raise ConfigError(
            f"{run_dir} has no checkpoint to resume from; start the run without --resume"
        )
    return found


def _step_of(checkpoint: str | None) -> int:
    return int(str(checkpoint).rsplit("-", 1)[-1])


def _prepare_directory(run_dir: Path, config: TrainConfig, overwrite: bool) -> None:
    if overwrite and run_dir.exists():
        if any(run_dir.iterdir()) and not (run_dir / CONFIG_FILE).exists():
            raise ConfigError(f"{run_dir} is not a run of this program; it is not overwritten")
        shutil.rmtree(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    config.save(run_dir / CONFIG_FILE)


def _describe(config: TrainConfig, source: Source, model: Any, say: Any) -> None:
    updates = config.updates_per_rollout * config.passes_per_rollout
    size = sum(p.numel() for p in model.parameters())
    say(f"model      {config.model}, {size:,} parameters")
    say(f"domains    {', '.join(source.domains)}")
    say(f"objective  {config.build_objective()}")
    say(
        f"rollouts   {config.rollouts} x {config.prompts} prompts x {config.generations} answers, "
        f"{updates} update{'s' if updates > 1 else ''} each of {config.rows_per_update} answers"
    )
    for note in _notes(config):
        say(f"note       {note}")


def _notes(config: TrainConfig) -> list[str]:
    notes = []
    if config.objective == "fiberstop":
        notes.append(
            "fiberstop is a method of ours, not the paper's; the paper's is --objective "
            "fiberpo_domain --printed"
        )
        if "budgets" not in config.objective_kwargs:
            notes.append(
                "budgets are the defaults of the recipe, which were chosen on the embedded model; "
                "fiberpo suggest proposes others from a recorded run"
            )
    if config.objective == "fiberpo_domain":
        if not {"budgets", "epsilon"} & set(config.objective_kwargs):
            notes.append(
                "budgets and epsilon are the defaults of this program, of the size of the drifts "
                "that the embedded model shows; the recipe itself has those of the paper's figures"
            )
        if "pessimistic" not in config.objective_kwargs:
            notes.append(
                "the pessimistic form min(G A, r A) is what this program takes by default; it is "
                "ours, not the paper's, whose printed form --printed selects"
            )
    for domain, share in (config.reward_noise or {}).items():
        notes.append(
            f"in training {share:.0%} of the rewards of {domain} are coin flips (reward_noise); "
            "held-out rewards have no noise"
        )
    if config.engine_differs:
        cast = " in bfloat16" if config.engine_bf16 else ""
        notes.append(
            f"in training answers are sampled by a perturbed copy of the policy{cast} "
            f"(engine_noise = {config.engine_noise:g}); held-out answers by the policy itself"
        )
    return notes


def _before(run_dir: Path, evaluate: Any, say: Any, resume: bool) -> dict[str, Any]:
    path = run_dir / BEFORE_FILE
    if resume and path.exists():
        return json.loads(path.read_text())
    say("evaluating on held-out prompts before training ...")
    result = evaluate()
    before = {"rewards": result.rewards, "answers": result.answers}
    path.write_text(json.dumps(before))
    return json.loads(path.read_text())


def _as_metrics(rewards: dict[str, float]) -> dict[str, float]:
    return Heldout(rewards, {}).metrics()


def _trainer(
    config: TrainConfig, source: Source, model: Any, tokenizer: Any, callback: RunCallback
) -> FiberPOTrainer:
    trackers = [n for n in ("tensorboard", "trackio") if getattr(config, n)]
    if "tensorboard" in trackers:
        os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(config.run_dir / "tensorboard"))
    micro = config.rows_per_update // config.rows_per_forward
    args = FiberPOConfig(
        output_dir=str(config.run_dir),
        run_name=config.run_name,
        objective=config.objective,
        split_mode=config.split_mode,
        domain_column="domain",
        reward_range=source.reward_range(config),
        per_device_train_batch_size=config.rows_per_forward,
        gradient_accumulation_steps=micro,
        steps_per_generation=micro * config.updates_per_rollout,
        num_iterations=config.passes_per_rollout,
        num_generations=config.generations,
        max_completion_length=source.max_completion_length,
        max_steps=config.updates,
        learning_rate=config.learning_rate,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=config.warmup_steps,
        max_grad_norm=config.max_grad_norm,
        weight_decay=0.0,
        temperature=config.temperature,
        beta=0.0,
        bf16=config.bf16,
        cast_lm_head_to_fp32=config.bf16,  # log-probs in float32 whatever the model computes in
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=False,
        disable_dropout=True,
        shuffle_dataset=False,
        seed=config.seed,
        logging_steps=1,
        disable_tqdm=True,
        report_to=trackers or "none",
        save_strategy="steps",
        save_steps=config.save_every * config.updates_per_rollout * config.passes_per_rollout,
        save_total_limit=1,
        dataloader_pin_memory=False,
        record_to=str(config.run_dir / RUN_FOLDER) if config.record else None,
    )
    make: Any = FiberPOTrainer
    if config.engine_differs:
        engine = Engine(config.engine_noise, config.engine_bf16, config.seed)
        make = functools.partial(MismatchTrainer, engine=engine)
    trainer: FiberPOTrainer = make(
        model,
        source.training_reward(config),
        args,
        objective=config.build_objective(),
        train_dataset=source.train,
        processing_class=tokenizer,
        callbacks=[callback],
    )
    for unwanted in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(unwanted)
    warnings.filterwarnings("once", category=FiberPOWarning)
    return trainer
