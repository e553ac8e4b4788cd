"""``summary.json``: what a run was and what came of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .. import __version__
from .heldout import Heldout
from .sources import Row


def samples(
    rows: Mapping[str, Sequence[Row]],
    before: Mapping[str, Sequence[Sequence[Any]]],
    after: Heldout | None,
    each: int = 2,
) -> list[dict[str, Any]]:
    """Answers to the same held-out prompts before and after, ``each`` of every domain."""
    found = []
    for domain, prompts in rows.items():
        for i, row in enumerate(prompts[:each]):
            prompt = row["prompt"]
            text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
            late = after.answers[domain][i] if after is not None else (None, None)
            found.append(
                {
                    "domain": domain, "prompt": text, "answer": row.get("answer"),
                    "before": before[domain][i][0], "reward_before": before[domain][i][1],
                    "after": late[0], "reward_after": late[1],
                }
            )  # fmt: skip
    return found


def versions() -> dict[str, str]:
    """Versions of what took part."""
    from importlib.metadata import version

    return {"fiberpo": __version__, **{p: version(p) for p in ("torch", "transformers", "trl")}}
