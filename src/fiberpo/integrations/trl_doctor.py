"""The doctor inside the TRL trainer: settings at once, steps of the first rollouts, each told once.

What is seen in the steps is told twice: after the first rollout, and after the first whole rollout
beyond the learning rate's warm-up, since drifts are small before.
"""

from __future__ import annotations

import logging
from typing import Any

from transformers import TrainerCallback

from ..diagnosis.checks import check
from ..diagnosis.evidence import Evidence
from ..diagnosis.findings import Finding
from ..diagnosis.settings import HostSettings, examine_config

logger = logging.getLogger("fiberpo.doctor")

SETTINGS = (
    "steps_per_generation", "num_iterations", "gradient_accumulation_steps",
    "per_device_train_batch_size", "num_generations", "keep_groups_together", "split_mode",
    "bf16", "cast_lm_head_to_fp32",
)  # fmt: skip

OF_DRIFT = ("budget-too-wide", "budget-too-narrow", "mostly-gated", "epsilon-above-budget", "noise")
"""Findings that need drifts of the size that they will have."""

OF_ALL_RANKS = ("group-of-one", "cut-groups", "zero-advantages", "idle-stratum", "noise")
"""Findings that the part of one of several processes does not show."""

MOST_WINDOWS = 8


class FirstSteps(TrainerCallback):
    """Looks at ``trainer.last_window`` after each of the first optimizer steps.

    Args:
        trainer: a `FiberPOTrainer`; its settings are examined at once.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        settings = {name: getattr(trainer.args, name) for name in SETTINGS}
        self.host = HostSettings.read(settings)
        self.evidence: Evidence | None = Evidence(trainer.objective)
        self.looks = 0
        self._told: set[tuple[str, Any]] = set()
        self._tell(examine_config(settings, objective=trainer.objective))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """One window more; at the end of a look, say what was found."""
        evidence, window = self.evidence, self.trainer.last_window
        each = max(int(self.host.updates or 1), 1)
        if self.looks == 1:  # a whole rollout that begins after the warm-up
            start = -(-args.get_warmup_steps(state.max_steps) // each) * each
            if state.global_step <= max(start, each):
                return
        if evidence is None or window is None or not self.trainer.is_world_process_zero():
            return
        if evidence.steps < MOST_WINDOWS:
            surrogates = window.surrogates
            batches = [surrogate.batch for surrogate in surrogates]
            evidence.add(batches, surrogates, generations=self.host.generations)
        if state.global_step % each:
            return
        hidden = () if self.looks else OF_DRIFT
        if self.trainer.accelerator.num_processes > 1:
            hidden = (*hidden, *OF_ALL_RANKS)
        found = check(evidence, self.host, first_step=each == 1)
        self._tell([f for f in found if f.code not in hidden])
        self.looks += 1
        self.evidence = Evidence(self.trainer.objective) if self.looks < 2 else None

    def _tell(self, findings: list[Finding]) -> None:
        if not self.trainer.is_world_process_zero():
            return
        for finding in findings:
            what = (finding.code, finding.numbers.get("stratum"))
            if what not in self._told:
                level = logging.INFO if finding.severity == "note" else logging.WARNING
                logger.log(level, "%s", finding)
            self._told.add(what)
