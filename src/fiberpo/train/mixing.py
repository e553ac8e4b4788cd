"""Held-out splits, and the plan of prompts of a whole run."""

from __future__ import annotations

import json
import logging
import math
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import numpy as np

from fiberpo.errors import ConfigError, DataError

logger = logging.getLogger(__name__)


def split_held_out(
    rows: Sequence[Mapping[str, Any]] | datasets.Dataset, per_domain: int, seed: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Split rows into ``(training, held out)`` with ``per_domain`` held-out rows of every domain.

    The held-out prompts of a domain are distinct and drawn at random by ``seed``. Other rows with
    the same prompt as a held-out one, in any domain, leave the training rows; their number is
    logged. Both lists keep the order of ``rows``.

    Errors:
        ConfigError for ``per_domain`` below 1; DataError for a domain that has too few distinct
        prompts to leave one for training.
    """
    if per_domain < 1:
        raise ConfigError(f"per_domain must be at least 1, got {per_domain}")
    listed = [dict(row) for row in rows]
    keys = [json.dumps(row["prompt"], sort_keys=True, default=str) for row in listed]
    first: dict[str, dict[str, int]] = {}  # domain -> prompt -> its first row
    for index, (row, key) in enumerate(zip(listed, keys, strict=True)):
        first.setdefault(row["domain"], {}).setdefault(key, index)
    chosen: set[int] = set()
    for domain, indices in first.items():
        if len(indices) <= per_domain:
            raise DataError(
                f"domain {domain!r} has {len(indices)} distinct prompts; holding out {per_domain} "
                f"needs at least {per_domain + 1}: add prompts or hold out fewer"
            )
        taken = {keys[i] for i in chosen}
        free = [i for key, i in indices.items() if key not in taken]
        if len(free) < per_domain:
            raise DataError(f"domain {domain!r} shares all but {len(free)} of its prompts with the "
                            f"held-out rows of other domains; hold out fewer")  # fmt: skip
        picks = _rng(seed, domain).permutation(len(free))[:per_domain]
        chosen.update(free[i] for i in picks)
    banned = {keys[i] for i in chosen}
    train = [row for row, key in zip(listed, keys, strict=True) if key not in banned]
    held_out = [listed[i] for i in sorted(chosen)]
    for domain in first:
        if not any(row["domain"] == domain for row in train):
            raise DataError(f"domain {domain!r} has no prompt left for training; hold out fewer")
    if repeated := len(listed) - len(train) - len(held_out):
        logger.warning("%d rows repeat a held-out prompt and were left out of training", repeated)
    return train, held_out


def mix_indices(
    sizes: Mapping[str, int], weights: Mapping[str, float] | None, count: int, seed: int
) -> list[tuple[str, int]]:
    """Plan the prompts of a whole run: ``count`` pairs ``(domain, index within the domain)``.

    The domain of prompt t is the one in whose share of [0, 1) the number ``(u + t * phi) mod 1``
    falls, with phi = (sqrt(5) - 1) / 2 and u drawn by ``seed``: every stretch of consecutive
    prompts has nearly the wanted shares. Within a domain, prompts come in a shuffled order, each
    once per epoch, with a new order in every epoch. A longer plan begins with the shorter one.

    Args:
        sizes: number of prompts of each domain.
        weights: relative share of each domain, 0 to leave it out; by default the square root of
            its size.
        count: number of prompts.
        seed: seed of the orders.

    Errors:
        ConfigError for a negative count, a domain that is unknown, has no weight or no prompts, and
        for weights that are negative, not finite or all zero.
    """
    if weights is None:
        weights = {domain: math.sqrt(size) for domain, size in sizes.items()}
    known = ", ".join(sizes)
    for domain, weight in weights.items():
        if domain not in sizes:
            raise ConfigError(f"a weight is given for {domain!r}; the domains are {known}")
        if not (math.isfinite(weight) and weight >= 0):
            raise ConfigError(f"the weight of {domain!r} is {weight}; use 0 or a positive number")
        if weight > 0 and sizes[domain] < 1:
            raise ConfigError(f"domain {domain!r} has {sizes[domain]} prompts; give it weight 0")
    if missing := [repr(domain) for domain in sizes if domain not in weights]:
        raise ConfigError(f"no weight for {', '.join(missing)}; give one (0 leaves a domain out)")
    if not any(weights.values()):
        raise ConfigError(f"all weights are 0 ({known}); give at least one domain a positive one")
    if count < 0:
        raise ConfigError(f"count must be 0 or more, got {count}")
    names = [domain for domain in sizes if weights[domain] > 0]
    shares = np.array([weights[domain] for domain in names], dtype=float)
    edges = np.cumsum(shares / shares.sum())[:-1]
    points = (_rng(seed, "").random() + np.arange(count) * (math.sqrt(5) - 1) / 2) % 1.0
    used = Counter[str]()
    orders: dict[str, list[int]] = {}
    plan: list[tuple[str, int]] = []
    for number in np.searchsorted(edges, points, side="right"):
        domain = names[number]
        epoch, place = divmod(used[domain], sizes[domain])
        if place == 0:
            orders[domain] = _rng(seed, domain, epoch).permutation(sizes[domain]).tolist()
        plan.append((domain, orders[domain][place]))
        used[domain] += 1
    return plan


def _rng(seed: int, domain: str, epoch: int = 0) -> np.random.Generator:
    if seed < 0:
        raise ConfigError(f"seed must be 0 or more, got {seed}")
    return np.random.default_rng([seed, zlib.crc32(domain.encode()), epoch])
