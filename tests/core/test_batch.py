"""`RatioBatch`: what it takes, what it refuses, and how the refusals read."""

import math

import numpy as np
import pytest
import torch

import fiberpo
from fiberpo import RatioBatch, recipes

F64 = torch.float64
NAN, INF = math.nan, math.inf


def padded(mask, *, labels=None, advantages=None, **values):
    """Rows of zeros of the mask's shape."""
    mask = torch.as_tensor(mask)
    zeros = torch.zeros(mask.shape)
    advantages = torch.ones(mask.shape[0]) if advantages is None else torch.tensor(advantages)
    given = {"log_probs": zeros, "old_log_probs": zeros, **values}
    return RatioBatch.from_padded(
        given["log_probs"], given["old_log_probs"], advantages, mask, labels=labels,
        rollout_log_probs=given.get("rollout_log_probs"),
        allow_empty=given.get("allow_empty", False),
    )  # fmt: skip


def packed(tokens, lengths, *, labels=None, advantages=None, **values):
    """Zeros laid end to end."""
    zeros = torch.zeros(tokens)
    advantages = torch.ones(tokens) if advantages is None else advantages
    log_probs = values.pop("log_probs", zeros)
    old = values.pop("old_log_probs", zeros)
    return RatioBatch.from_packed(log_probs, old, advantages, lengths, labels=labels, **values)


def refused(kind, call, *fragments):
    """The error is one of ours, a ValueError, and quotes every fragment."""
    with pytest.raises(kind) as caught:
        call()
    assert isinstance(caught.value, fiberpo.FiberPOError)
    assert isinstance(caught.value, ValueError)
    for fragment in fragments:
        assert fragment in str(caught.value)


# ------------------------------------------------------------------------------- what it takes


def test_log_ratio_is_current_minus_old():
    """``l = log pi_theta - log pi_old``, padding removed in row order."""
    log_probs = torch.tensor([[-0.5, -1.0, 9.0], [-2.0, 9.0, -0.25]])
    old = torch.tensor([[-1.0, -1.0, 9.0], [-1.5, 9.0, -0.5]])
    mask = torch.tensor([[True, True, False], [True, False, True]])
    batch = RatioBatch.from_padded(log_probs, old, torch.tensor([1.0, 2.0]), mask)
    assert batch.log_ratio.tolist() == [0.5, 0.0, -0.5, 0.25]
    assert batch.advantages.tolist() == [1.0, 1.0, 2.0, 2.0]
    assert (len(batch), batch.lengths.tolist()) == (4, [2, 2])


@pytest.mark.parametrize("lengths", [[2, 1], (2, 1), np.array([2, 1]), torch.tensor([2, 1])])
def test_lengths_may_be_any_list_of_integers(lengths):
    """Lists, tuples, arrays and tensors."""
    assert packed(3, lengths).trajectory.tolist() == [0, 0, 1]


def test_advantages_are_one_a_token_or_one_a_trajectory():
    """One a trajectory is spread over its tokens."""
    assert packed(3, [2, 1], advantages=torch.tensor([5.0, 7.0])).advantages.tolist() == [5, 5, 7]
    per_token = torch.tensor([1.0, 2.0, 3.0])
    assert packed(3, [2, 1], advantages=per_token).advantages.tolist() == [1, 2, 3]


def test_integer_advantages_become_floats():
    """Rewards of 0 and 1 are common."""
    found = packed(3, [2, 1], advantages=torch.tensor([0, 1])).advantages
    assert found.is_floating_point()
    assert found.tolist() == [0.0, 0.0, 1.0]


@pytest.mark.parametrize("mask", [[[1, 0], [1, 1]], [[1.0, 0.0], [1.0, 1.0]]])
def test_masks_of_ones_and_zeros_are_accepted(mask):
    """Integers and floats."""
    assert padded(mask).lengths.tolist() == [1, 2]


def test_round_trip_to_padded():
    """`to_padded` puts values back where they came from."""
    batch = padded([[True, False], [True, True]])
    assert batch.to_padded(torch.tensor([1.0, 2.0, 3.0]), fill=-1.0).tolist() == [[1, -1], [2, 3]]


def test_packed_batches_have_no_padded_form():
    """And wrong shapes are refused."""
    refused(fiberpo.ShapeError, lambda: packed(2, [2]).to_padded(torch.zeros(2)), "packed")
    refused(fiberpo.ShapeError, lambda: padded([[True]]).to_padded(torch.zeros(5)), "(5,)", "(1,)")


# ------------------------------------------------------------------------- empty trajectories


def test_empty_rows_are_dropped_and_counted():
    """A trajectory without loss tokens does not exist inside."""
    batch = padded([[False, False], [True, True], [True, True], [True, True], [False, False]])
    assert (batch.dropped, batch.trajectories, batch.lengths.tolist()) == (2, 3, [2, 2, 2])


def test_labels_of_dropped_rows_go_with_them():
    """Domain "b" has no token left."""
    batch = padded([[False, False], [True, True]], labels={"domain": ["b", "a"]})
    assert batch.labels["domain"].count == 1


@pytest.mark.parametrize("values", [[3.0, 5.0], [NAN, 5.0]])
def test_advantages_of_dropped_rows_do_not_matter(values):
    """One advantage a row; only the second row has tokens."""
    batch = padded([[False] * 3, [True] * 3], advantages=values)
    assert batch.advantages.tolist() == [5.0, 5.0, 5.0]


def test_one_advantage_a_row_although_tokens_and_rows_are_equally_many():
    """Two rows, two loss tokens, both in row 0: each of them has the advantage of row 0."""
    batch = padded([[True, True], [False, False]], advantages=[1.0, -1.0])
    assert batch.advantages.tolist() == [1.0, 1.0]


def test_ambiguous_advantages_are_refused():
    """Two tokens, two trajectories, one of them empty: one a token or one a trajectory?"""
    refused(fiberpo.ShapeError, lambda: packed(2, [2, 0]), "2 advantages", "empty")


@pytest.mark.parametrize("mask", [[[True, True], [False, False]], [[False, True], [True, False]]])
def test_token_labels_although_tokens_and_rows_are_equally_many(mask):
    """A [B, T] label is one a token, whatever the mask leaves over."""
    batch = padded(mask, labels={"segment": torch.tensor([[0, 1], [0, 1]])})
    assert batch.labels["segment"].per_token
    assert batch.strata(["trajectory", "segment"]).names == ("trajectory", "segment")
    assert batch.strata(["segment"]).bounds == (0, 2)


def test_batch_without_a_loss_token_is_refused():
    """Unless a rank may hold nothing."""
    refused(
        fiberpo.EmptyBatchError, lambda: padded([[False, False]] * 3), "3 traj", "allow_empty=True"
    )


def test_empty_batch_is_allowed_on_request():
    """Loss 0 with a graph."""
    log_probs = torch.zeros(2, 2, requires_grad=True)
    batch = padded([[False, False]] * 2, log_probs=log_probs, allow_empty=True)
    counts = fiberpo.Denominators(10, 2)
    out = recipes.fiberpo()(batch, denominators=counts)
    out.loss.backward()
    assert (len(batch), batch.dropped, out.loss.item()) == (0, 2, 0.0)
    assert log_probs.grad.abs().max() == 0


def test_empty_list_of_lengths_is_an_empty_batch():
    """What a rank that holds nothing naturally has."""
    batch = packed(0, [], allow_empty=True)
    assert (len(batch), batch.trajectories) == (0, 0)


# --------------------------------------------------------------------------------- non-finite


@pytest.mark.parametrize("junk", [NAN, INF, -INF])
def test_anything_may_stand_under_the_mask(junk):
    """Same loss and gradients as without it; the junk positions get gradient 0."""
    mask = torch.tensor([[True, True, False], [True, False, False]])
    found = []
    for fill in (0.0, junk):
        log_probs = torch.tensor([[-0.9, -1.3, fill], [-0.6, fill, fill]], requires_grad=True)
        old = torch.tensor([[-1.0, -1.0, fill], [-1.0, fill, fill]])
        advantages = torch.tensor([[1.0, 1.0, fill], [-1.0, fill, fill]])
        out = recipes.fiberpo()(
            RatioBatch.from_padded(log_probs, old, advantages, mask, rollout_log_probs=old)
        )
        out.loss.backward()
        found.append((out.loss.item(), log_probs.grad))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])
    assert found[1][1][~mask].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("name", ["log_probs", "old_log_probs", "rollout_log_probs"])
def test_non_finite_loss_tokens_are_refused_by_row_and_position(name, bad):
    """Row 2 of the caller (row 0 is dropped), third loss token of that row."""
    values = torch.zeros(3, 4)
    values[2, 3] = bad
    mask = torch.tensor([[False] * 4, [True] * 4, [True, False, True, True]])
    refused(
        fiberpo.NonFiniteError, lambda: padded(mask, **{name: values}),
        name, str(float(bad)), "token 2 of trajectory 2", "Mask",
    )  # fmt: skip


def test_non_finite_advantages_are_refused_by_row():
    """An advantage of NaN: often a group whose rewards have no spread."""
    call = lambda: padded([[False] * 3, [True] * 3, [True] * 3], advantages=[1, 1, NAN])  # noqa: E731
    refused(fiberpo.NonFiniteError, call, "advantages is nan", "token 0 of trajectory 2")


def test_non_finite_packed_tokens_are_refused_by_position():
    """Token 4 of the batch is token 1 of trajectory 2 (trajectory 1 is empty)."""
    log_probs = torch.tensor([0, 0, 0, 0, INF])
    call = lambda: packed(5, [3, 0, 2], log_probs=log_probs)  # noqa: E731
    refused(fiberpo.NonFiniteError, call, "inf", "token 1 of trajectory 2", "token 4")


# ---------------------------------------------------------------------------- shapes and types


def test_packed_takes_vectors_and_padded_takes_matrices():
    """Each names the other."""
    two, one = torch.zeros(2, 2), torch.zeros(2)
    refused(
        fiberpo.ShapeError, lambda: RatioBatch.from_packed(two, two, one, [2]),
        "(2, 2)", "from_padded",
    )  # fmt: skip
    refused(
        fiberpo.ShapeError, lambda: RatioBatch.from_padded(one, one, one, one), "(2,)",
        "from_packed",
    )  # fmt: skip


@pytest.mark.parametrize("name", ["old_log_probs", "mask", "rollout_log_probs"])
def test_padded_shapes_must_agree(name):
    """One column too many, as with the prompt still in."""
    given = {
        "log_probs": torch.zeros(2, 3),
        "old_log_probs": torch.zeros(2, 3),
        "mask": torch.ones(2, 3),
        name: torch.ones(2, 4),
    }
    call = lambda: RatioBatch.from_padded(advantages=torch.ones(2), **given)  # noqa: E731
    refused(fiberpo.ShapeError, call, name, "(2, 4)", "(2, 3)", "prompt")


@pytest.mark.parametrize("name", ["old_log_probs", "rollout_log_probs"])
def test_packed_lengths_of_vectors_must_agree(name):
    """Both counts are quoted."""
    call = lambda: packed(3, [3], **{name: torch.zeros(4)})  # noqa: E731
    refused(fiberpo.ShapeError, call, name, "4 tokens", "3")


@pytest.mark.parametrize("shape", [(4,), (2, 2), ()])
def test_advantages_of_another_shape_are_refused(shape):
    """Two trajectories of three tokens."""
    call = lambda: packed(6, [3, 3], advantages=torch.zeros(shape))  # noqa: E731
    refused(fiberpo.ShapeError, call, str(shape), "6 tokens", "2 trajectories")
    call = lambda: padded([[True] * 3] * 2, advantages=torch.zeros(shape).tolist())  # noqa: E731
    if shape != (2, 2):
        refused(fiberpo.ShapeError, call, str(shape), "(2, 3)")


@pytest.mark.parametrize("bad", [2, -1, 0.5, NAN])
def test_masks_with_other_values_are_refused(bad):
    """The value is quoted."""
    refused(
        fiberpo.ShapeError, lambda: padded([[1.0, 0.0], [bad, 1.0]]), str(float(bad)), "true/false"
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_log_probs_are_warned_about(dtype):
    """Their rounding is of the size of the drifts."""
    with pytest.warns(fiberpo.FiberPOWarning, match=f"log_probs is {dtype}.*float32"):
        batch = packed(2, [2], log_probs=torch.zeros(2, dtype=dtype))
    assert batch.log_probs.dtype == torch.float32


def test_gradient_flows_into_sixteen_bit_log_probs():
    """They are widened inside the graph."""
    log_probs = torch.zeros(2, dtype=torch.bfloat16, requires_grad=True)
    with pytest.warns(fiberpo.FiberPOWarning):
        batch = packed(2, [2], log_probs=log_probs)
    recipes.fiberpo()(batch).loss.backward()
    assert log_probs.grad.tolist() == [-0.5, -0.5]


def test_integer_log_probs_are_refused():
    """Token ids in the wrong place."""
    call = lambda: packed(2, [2], log_probs=torch.zeros(2, dtype=torch.long))  # noqa: E731
    refused(fiberpo.ShapeError, call, "log_probs", "int64", "floating-point")


@pytest.mark.parametrize("lengths", [[2, 2], [5, 1], [2]])
def test_lengths_that_do_not_add_up_are_refused(lengths):
    """Both numbers are quoted."""
    refused(fiberpo.ShapeError, lambda: packed(3, lengths), f"add up to {sum(lengths)}", "3 tokens")


def test_cumulative_lengths_are_recognised():
    """``cu_seqlens = [0, 2, 5]`` instead of ``[2, 3]``."""
    refused(fiberpo.ShapeError, lambda: packed(5, [0, 2, 5]), "add up to 7", "cu_seqlens")


@pytest.mark.parametrize("lengths", [[4, -1], [1.5, 1.5], [[3]], 3])
def test_lengths_that_are_no_counts_are_refused(lengths):
    """Quoted as given."""
    refused(fiberpo.ShapeError, lambda: packed(3, lengths), repr(lengths))
