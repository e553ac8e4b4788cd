"""Recordings for the tests: tokens sampled from one policy and scored under another."""

from types import SimpleNamespace

import numpy as np
import torch

from fiberpo import RatioBatch
from fiberpo.recording import RecordedStep

DOMAINS = ("code", "math")


class Memory:
    """A recording in memory, with what `open_recording` promises."""

    def __init__(self, items, objective=None, settings=None, problems=()):
        self.items, self.problems = list(items), list(problems)
        self.manifest = SimpleNamespace(settings=settings or {})
        self.steps = sorted({item.step for item in self.items})
        self.tokens = sum(len(item.batch) for item in self.items)
        self.path, self._objective = "memory", objective

    def objective(self):
        return self._objective

    def iterate(self, steps=None):
        for item in self.items:
            if steps is None or item.step in steps:
                yield item


def tokens(generator, count, size=0.3, words=8):
    """Log-probs of sampled words under an old and a new policy, as a changed policy has them."""
    old = torch.log_softmax(torch.randn(count, words, generator=generator).double(), 1)
    moved = old + size * torch.randn(count, words, generator=generator).double()
    new = torch.log_softmax(moved, 1)
    chosen = torch.multinomial(old.exp(), 1, generator=generator)
    return new.gather(1, chosen)[:, 0], old.gather(1, chosen)[:, 0]


def batch(seed=0, groups=6, answers=4, length=20, size=0.3, fresh=False, **changes):
    """One optimizer step; ``changes`` replace arguments of `RatioBatch.from_packed`."""
    generator = torch.Generator().manual_seed(seed)
    rows = groups * answers
    lengths = torch.randint(length // 2, 3 * length // 2, (rows,), generator=generator)
    new, old = tokens(generator, int(lengths.sum()), size)
    group = torch.arange(rows) // answers
    given = {
        "log_probs": old if fresh else new, "old_log_probs": old,
        "advantages": torch.randn(rows, generator=generator).double(), "lengths": lengths,
        "labels": {"domain": [DOMAINS[g % 2] for g in group.tolist()], "group": group},
    }  # fmt: skip
    return RatioBatch.from_packed(**{**given, **changes})


def steps(count=4, start=0, fresh_every=0, **settings):
    """Recorded steps; with ``fresh_every = n`` each n-th is the first after a rollout."""
    return [
        RecordedStep(
            i + 1, batch(start + i, fresh=bool(fresh_every) and i % fresh_every == 0, **settings)
        )
        for i in range(count)
    ]


def with_text(item, generator=None):
    """Token ids with a text for each."""
    count = len(item.batch)
    ids = torch.arange(count) % 7

    class Spelled(RecordedStep):
        def text(self, row):
            end = int(self.batch.lengths[: row + 1].sum())
            here = self.token_ids[end - int(self.batch.lengths[row]) : end]
            return [f"<{int(i)}>" for i in here]

    rewards = torch.arange(item.batch.rows).double()
    return Spelled(item.step, item.batch, token_ids=ids, rewards=rewards)


def rows_of(item):
    """Slices of the rows."""
    ends = np.cumsum(item.lengths.tolist())
    return [slice(e - n, e) for e, n in zip(ends, item.lengths.tolist(), strict=True)]
