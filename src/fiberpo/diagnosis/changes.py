"""The trajectories and tokens that an objective changes most, with what is known of them."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import numpy as np

from ..gates import Regime
from .tally import Array, Gradient, Tokens, context_regimes

MOST = 10
"""How many of each are kept."""

EACH = 5
"""Tokens that are shown of each trajectory."""


@dataclass(eq=False)
class Largest:
    """The records with the largest ``share``; the first come wins where two are equal."""

    size: int = MOST
    _heap: list[tuple[float, int, dict[str, Any]]] = field(default_factory=list)
    _order: Any = field(default_factory=lambda: count(0, -1))

    @property
    def bar(self) -> float:
        """What a new record has to exceed."""
        return self._heap[0][0] if len(self._heap) == self.size else 0.0

    def offer(self, records: Iterable[dict[str, Any]]) -> None:
        """Take those that are large enough."""
        for record in records:
            entry = (record["share"], next(self._order), record)
            if len(self._heap) < self.size:
                heapq.heappush(self._heap, entry)
            elif entry > self._heap[0]:
                heapq.heapreplace(self._heap, entry)

    def ranked(self) -> list[dict[str, Any]]:
        """Largest first."""
        return [record for _, _, record in sorted(self._heap, key=lambda e: e[:2], reverse=True)]


@dataclass(frozen=True)
class Found:
    """Candidates of one batch."""

    trajectories: list[dict[str, Any]]
    tokens: list[dict[str, Any]]


def most_changed(item: Any, tokens: Tokens, gradient: Gradient, bars: tuple[float, float]) -> Found:
    """Trajectories and tokens whose share of the batch's gradient mass changes most.

    Args:
        item: the recorded step (``step``, ``text(row)``).
        tokens, gradient: of its batch.
        bars: shares that trajectories and tokens have to exceed.
    """
    whole = float(gradient.rows[:, 0].sum())
    if not np.isfinite(whole) or not whole:
        return Found([], [])
    changed, texts = gradient.changed / whole, _Texts(item, tokens)
    rows = [r for r in _top(changed) if changed[r] > bars[0]]
    trajectories = [_trajectory(item, tokens, gradient, r, whole, texts) for r in rows]
    moved = np.abs(gradient.coefficients - gradient.plain)
    largest = np.maximum.reduceat(moved, tokens.starts) / whole
    found = []
    for row in (r for r in _top(largest) if largest[r] > bars[1]):
        for record in _tokens(item, tokens, gradient, row, whole, texts, MOST):
            if record["share"] > bars[1]:
                found.append({**record, **_place(item, tokens, row)})
    found.sort(key=lambda record: -record["share"])
    return Found(trajectories, found[:MOST])


def _top(values: Array) -> list[int]:
    """Indices of the largest, largest first; ties by position."""
    size = min(MOST, len(values))
    candidates = np.argpartition(-values, size - 1)[:size]
    return sorted(candidates.tolist(), key=lambda i: (-values[i], i))


class _Texts:
    """The tokens of rows as text, asked for once a row."""

    def __init__(self, item: Any, tokens: Tokens) -> None:
        self.item, self.lengths = item, tokens.batch.lengths
        self.rows: dict[int, list[str] | None] = {}

    def __call__(self, row: int) -> list[str] | None:
        if row not in self.rows:
            self.rows[row] = self.item.text(row)
        return self.rows[row]


def _place(item: Any, tokens: Tokens, row: int) -> dict[str, Any]:
    """Which trajectory: step, row, labels."""
    labels = tokens.batch.labels
    named = {
        name: label.value(int(label.codes[row]))
        for name, label in labels.items()
        if not label.per_token and int(label.codes[row]) >= 0
    }
    return {"step": item.step, "row": row, "labels": named}


def _trajectory(
    item: Any, tokens: Tokens, gradient: Gradient, row: int, whole: float, texts: _Texts
) -> dict[str, Any]:
    batch = tokens.batch
    start, length = int(tokens.starts[row]), int(batch.lengths[row])
    here = slice(start, start + length)
    log_ratio = batch.log_ratio.detach()[here].double()
    own, kept, turned, amplified = gradient.rows[row].tolist()
    reward = None if item.rewards is None else float(item.rewards[row])
    text = texts(row)
    return {
        **_place(item, tokens, row),
        "share": float(gradient.changed[row]) / whole,
        "mass": own / whole,
        "kept": kept / own if own else None,
        "reversed": turned / own if own else None,
        "amplified": amplified / own if own else None,
        "tokens": length,
        "advantage": float(batch.advantages[here].double().mean()),
        "reward": reward,
        "drift_pos": float(log_ratio.clamp(min=0).mean()),
        "drift_neg": float((-log_ratio).clamp(min=0).mean()),
        "regimes": _path(gradient, start),
        "text": None if text is None else "".join(text),
        "most_changed": _tokens(item, tokens, gradient, row, whole, texts, EACH),
    }


def _path(gradient: Gradient, token: int) -> dict[str, list[str]]:
    """Regimes of the contexts above a token, ``[positive, negative]`` or one channel."""
    found: dict[str, list[str]] = {}
    for strata, regime in context_regimes(gradient.surrogate):
        path, context = {}, int(strata.leaf[token])
        while context >= 0:
            name = strata.names[int(strata.stratum[context])]
            path[name] = [Regime(int(r)).name.lower() for r in regime[:, context]]
            context = int(strata.parent[context])
        found = {**dict(reversed(path.items())), **found}
    return found


def _tokens(
    item: Any, tokens: Tokens, gradient: Gradient, row: int, whole: float, texts: _Texts, most: int
) -> list[dict[str, Any]]:
    """The tokens of a row that change most."""
    start, length = int(tokens.starts[row]), int(tokens.batch.lengths[row])
    here = slice(start, start + length)
    moved = np.abs(gradient.coefficients[here] - gradient.plain[here]) / whole
    order: Sequence[int] = np.argsort(-moved, kind="stable")[:most].tolist()
    gated, text = gradient.surrogate.log_gated_ratio.detach(), texts(row)
    log_ratio = tokens.batch.log_ratio.detach()
    ids = item.token_ids
    found = []
    for at in order:
        if not moved[at]:
            break
        found.append(
            {
                "position": at,
                "share": float(moved[at]),
                "log_ratio": float(log_ratio[start + at]),
                "log_gated_ratio": _finite(float(gated[start + at])),
                "coefficient": float(gradient.coefficients[start + at]),
                "ungated": float(gradient.plain[start + at]),
                "token_id": None if ids is None else int(ids[start + at]),
                "text": None if text is None else text[at],
            }
        )
    return found


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None
