"""What recorded steps, a live step or settings say: replay, suggested budgets, findings."""

from .examining import examine, examine_batch, examine_window
from .findings import Finding, exit_code
from .replaying import Outcome, Replay, replay
from .settings import examine_config
from .suggesting import DriftRow, Suggestion, suggest

__all__ = [
    "DriftRow", "Finding", "Outcome", "Replay", "Suggestion", "examine", "examine_batch",
    "examine_config", "examine_window", "exit_code", "replay", "suggest",
]  # fmt: skip
