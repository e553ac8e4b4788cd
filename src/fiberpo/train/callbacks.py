"""What watches a run: metrics file, progress bar, held-out evaluation, orderly interruption."""

from __future__ import annotations

import json
import math
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback

from .heldout import Heldout

METRICS_FILE = "metrics.jsonl"


class MetricsFile:
    """``metrics.jsonl``: one JSON object a line, flushed at once; NaN becomes null.

    Opening it for a resumed run drops what was written after the checkpoint.
    """

    def __init__(self, path: Path, resume_step: int | None = None) -> None:
        kept: list[str] = []
        if resume_step is not None and path.exists():
            for line in path.read_text().splitlines():
                try:
                    if json.loads(line)["step"] <= resume_step:
                        kept.append(line)
                except (json.JSONDecodeError, KeyError):
                    break  # torn by a kill: nothing after it counts
        path.write_text("".join(line + "\n" for line in kept))
        self._file = path.open("a")

    def write(self, kind: str, step: int, rollout: int, values: Mapping[str, Any]) -> None:
        """Append one line."""
        clean = {k: v for k, v in values.items() if not _nan(v)}
        record = {"kind": kind, "step": step, "rollout": rollout, **clean}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _nan(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


class Interruption:
    """First Ctrl-C (or SIGTERM): stop after the current update. Second: stop at once."""

    def __init__(self) -> None:
        self.asked = False

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        print(
            "\ninterrupted: finishing this update, then saving a checkpoint and the report "
            "(once more to stop at once)",
            file=sys.stderr,
        )

    @contextmanager
    def watching(self) -> Iterator[Interruption]:
        """Handle SIGINT and SIGTERM inside the block."""
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self._ask) for number in numbers}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class RunCallback(TrainerCallback):
    """Writes metrics, shows progress, evaluates on held-out prompts, stops when asked.

    Args:
        metrics: where lines go.
        evaluate: held-out evaluation of the current model.
        updates: optimizer steps of the run.
        updates_per_rollout: optimizer steps on one rollout.
        evaluate_every: optimizer steps between two evaluations.
        interruption: whether somebody asked to stop.
    """

    def __init__(
        self,
        metrics: MetricsFile,
        evaluate: Callable[[], Heldout],
        *,
        updates: int,
        updates_per_rollout: int,
        evaluate_every: int,
        interruption: Interruption,
        progress: bool = True,
    ) -> None:
        self.metrics, self.evaluate = metrics, evaluate
        self.updates, self.updates_per_rollout = updates, updates_per_rollout
        self.evaluate_every, self.interruption = evaluate_every, interruption
        self.last: Heldout | None = None
        self.last_step = -1
        self._progress = progress
        self._bar: tqdm | None = None
        self._shown: dict[str, str] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the progress bar."""
        self._bar = tqdm(
            total=self.updates, initial=state.global_step, unit="update", dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else 15, disable=not self._progress,
            file=sys.stderr,
        )  # fmt: skip

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Advance; stop and save when asked."""
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)
        if self.interruption.asked and state.global_step < self.updates:
            control.should_save = control.should_training_stop = True

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Write one line, and evaluate when it is time."""
        if not logs or "loss" not in logs:
            return
        rollout = (state.global_step - 1) // self.updates_per_rollout
        self.metrics.write("train", state.global_step, rollout, logs)
        for key, label in (("reward", "reward"), ("gate/active", "gate active")):
            if logs.get(key) is not None:
                self._shown[label] = f"{logs[key]:.2f}"
        if logs.get("gate/left_out"):
            self._shown["left out"] = f"{logs['gate/left_out']:.2f}"
        if state.global_step % self.evaluate_every == 0:
            self.last, self.last_step = self.evaluate(), state.global_step
            self._shown["held-out"] = f"{self.last.rewards['mean']:.2f}"
            self.metrics.write("eval", state.global_step, rollout, self.last.metrics())
        if self._bar is not None:
            self._bar.set_postfix(self._shown, refresh=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the progress bar."""
        if self._bar is not None:
            self._bar.close()
