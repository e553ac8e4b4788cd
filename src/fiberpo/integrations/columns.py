"""The names under which data sets and trainers keep a row's domain, group and trajectory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from fiberpo.errors import DataError

__all__ = [
    "DOMAIN_ALIASES",
    "GROUP_ALIASES",
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
