"""Batches to record, and what must come back."""

import warnings

import numpy as np
import torch
from hypothesis import strategies as st

import fiberpo
from fiberpo import Certainty, RatioBatch, TokenDivergence


def make(seed=0, rows=6, labels=("domain", "group"), per_token=False, dtype=torch.float32, **more):
    """Random tokens; groups of two rows, domains of two groups."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 5, rows)
    tokens = int(lengths.sum())

    def column():
        return torch.tensor(rng.normal(-1, 0.3, tokens), dtype=dtype)

    names = {
        "domain": [("math", "code")[i // 4 % 2] for i in range(rows)],
        "group": torch.arange(rows) // 2 + 10,
        "turn": torch.tensor(rng.integers(0, 2, tokens)),
    }
    return RatioBatch.from_packed(
        column(), column(),
        torch.tensor(rng.normal(size=tokens if per_token else rows), dtype=dtype),
        lengths.tolist(), labels={n: names[n] for n in labels}, **more,
    )  # fmt: skip


SPECIFICATIONS = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 99), "rows": st.integers(1, 7), "per_token": st.booleans(),
        "labels": st.lists(st.sampled_from(["domain", "group", "turn"]), unique=True),
        "dtype": st.sampled_from([torch.float32, torch.float64]),
        "rollout": st.sampled_from([None, 0.0, -0.1]),
        "certainty": st.sampled_from([None, Certainty.EXACT, Certainty.LOWER_BOUND]),
    }
)  # fmt: skip
"""What a `RatioBatch` can have; see `build`."""


def build(seed, rows, per_token, labels, dtype, rollout, certainty):
    """A batch with the columns asked for."""
    batch = make(seed, rows, labels, per_token, dtype)
    divergence = torch.linspace(0, 1, len(batch), dtype=dtype)
    return RatioBatch.from_packed(
        batch.log_probs, batch.old_log_probs, batch.advantages, batch.lengths,
        labels={n: _ids(v) for n, v in batch.labels.items()},
        token_labels=["turn"],
        rollout_log_probs=None if rollout is None else batch.old_log_probs + rollout,
        token_divergence=None if certainty is None else TokenDivergence(divergence, certainty),
    )  # fmt: skip


def _ids(label):
    if isinstance(label.values, tuple):
        return [None if c < 0 else label.values[c] for c in label.codes.tolist()]
    return torch.where(label.codes < 0, -1, label.values[label.codes])


def same(found, batch):
    """Every column and label of two batches is the same."""
    for name in ("log_probs", "old_log_probs", "advantages", "lengths", "rollout_log_probs"):
        a, b = getattr(found, name), getattr(batch, name)
        assert (a is None) == (b is None), name
        if a is not None:
            assert a.dtype == b.dtype, name
            assert torch.equal(a, b), name
    assert list(found.labels) == list(batch.labels)
    for name, label in batch.labels.items():
        mine = found.labels[name]
        assert mine.per_token == label.per_token
        assert torch.equal(mine.codes, label.codes)
        assert mine.value_names() == label.value_names()
        assert isinstance(mine.values, tuple) == isinstance(label.values, tuple)
    assert found.dropped == batch.dropped
    a, b = found.token_divergence, batch.token_divergence
    assert (a is None) == (b is None)
    if a is not None:
        assert a.certainty == b.certainty
        torch.testing.assert_close(a.values, b.values.float())


def value_of(batch, objective=None):
    """The objective on a batch: one number that looks at everything."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fiberpo.FiberPOWarning)
        return float((objective or fiberpo.recipes.fiberpo())(batch).loss)
