"""The names under which data sets and trainers keep a row's domain, group and trajectory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from .errors import DataError

__all__ = [
    "DOMAIN_ALIASES",
    "GROUP_ALIASES",
    "RECORDED_ALIASES",
    "STRATUM_ALIASES",
    "TRAJECTORY_ALIASES",
    "find_column",
]

DOMAIN_ALIASES: tuple[str, ...] = (
    "domain",
    "data_source",
    "datasource",
    "task",
    "task_name",
    "env_name",
    "tag",
)
"""Columns that may name a row's domain."""

GROUP_ALIASES: tuple[str, ...] = ("group_id", "uid", "prompt_id", "group_index")
"""Columns that may name the group of completions of one prompt."""

TRAJECTORY_ALIASES: tuple[str, ...] = ("trajectory_id", "rollout_id")
"""Columns that may name a trajectory."""

STRATUM_ALIASES: Mapping[str, tuple[str, ...]] = {
    "domain": DOMAIN_ALIASES,
    "group": GROUP_ALIASES,
    "trajectory": TRAJECTORY_ALIASES,
}
"""The above by the stratum that they are ids of."""

RECORDED_ALIASES: Mapping[str, tuple[str, ...]] = {
    "log_probs": (
        "log_probs", "per_token_logps", "log_prob", "logprobs", "logps", "trainer_logprobs",
    ),
    "old_log_probs": (
        "old_log_probs", "old_per_token_logps", "old_log_prob", "old_logprobs", "prev_logprobs",
    ),
    "rollout_log_probs": (
        "rollout_log_probs", "sampling_per_token_logps", "rollout_log_prob", "rollout_logprobs",
        "inference_logprobs", "generation_logprobs",
    ),
    "mask": ("mask", "completion_mask", "response_mask", "loss_mask"),
    "advantages": ("advantages", "advantage"),
    "token_ids": ("token_ids", "completion_ids", "response_ids", "responses"),
    "entropies": ("entropies", "entropy"),
    "rewards": ("rewards", "reward", "raw_reward", "score"),
    "prompts": ("prompts", "prompt"),
    "step": ("step", "global_step", "global_steps", "training_step", "iteration"),
    "domain": DOMAIN_ALIASES,
    "group": ("group", *GROUP_ALIASES),
    "trajectory": ("trajectory", *TRAJECTORY_ALIASES),
    "turn": ("turn", "turn_id"),
}  # fmt: skip
"""Columns of a recording by the names that other trainers give them."""


def find_column(columns: Iterable[str], aliases: Sequence[str], what: str) -> str | None:
    """Return the one of ``aliases`` that occurs in ``columns``, or None where none does.

    Args:
        columns: the column names of a data set or batch.
        aliases: the accepted names, the preferred one first.
        what: what the column holds, for the error message (for example ``"the domain"``).

    Errors:
        DataError where two or more of the aliases occur; the message quotes them and says which
        to remove or rename.
    """
    present = set(columns)
    found = [name for name in aliases if name in present]
    if len(found) > 1:
        others = " and ".join(repr(name) for name in found[1:])
        raise DataError(
            f"the columns {', '.join(repr(name) for name in found)} could each hold {what}; keep "
            f"one: remove or rename {others} to use {found[0]!r}"
        )
    return found[0] if found else None
