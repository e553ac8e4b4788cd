"""`fiberpo.testing`: invariant objectives pass, the known faults are found and named."""

import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fiberpo
from core.cases import packed, random_case, random_tree
from core.test_ranks import OBJECTIVES
from fiberpo import recipes
from fiberpo.gating import GateMap
from fiberpo.testing import PartitionError, assert_partition_invariant, simulate_ranks


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("split", [False, True], ids=["whole", "pieces"])
def test_every_objective_is_partition_invariant(name, split):
    """Random cuts into micro-batches, ranks and pieces of trajectories."""
    case = random_case(1)
    case.labels["state"] = [i % 9 for i in range(len(case.log_ratios))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fiberpo.FiberPOWarning)
        assert_partition_invariant(
            OBJECTIVES[name], case.batch(), trials=4, split_trajectories=split, rtol=1e-9
        )


@given(st.integers(0, 10**6))
def test_trees_and_masks_survive_any_cut(seed):
    """Branches of different depth, with a mask on the rollout."""
    case = random_tree(seed)
    rollout = torch.randn(
        len(case.log_ratios), dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    batch = case.batch(rollout_log_probs=0.3 * rollout)
    plain = OBJECTIVES["fiberpo_domain, turns"]
    mask = fiberpo.MeanDivergence(0.08) & fiberpo.MaxDivergence(0.3)
    objective = fiberpo.Objective(plain.weights, plain.gate_map, mask)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fiberpo.FiberPOWarning)
        assert_partition_invariant(
            objective, batch, trials=1, seed=seed, split_trajectories=True, rtol=1e-8
        )


def token_mean(part, counts):
    """The known bug."""
    return -(part.log_ratio.exp() * part.advantages).sum() / len(part)


def right_token_mean(part, counts):
    return -(part.log_ratio.exp() * part.advantages).sum() / counts.tokens


def right_trajectory_mean(part, counts):
    terms = part.log_ratio.exp() * part.advantages / part.lengths[part.row]
    return -terms.sum() / counts.trajectories


def group_gate_of_the_part(part, counts):
    """Aggregates per micro-batch: what a registered loss does."""
    objective = recipes.fiberpo_domain({"group": (0.05, 0.05)})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fiberpo.FiberPOWarning)
        return objective(part).loss * part.trajectories / counts.trajectories


@pytest.mark.parametrize("loss", [right_token_mean, right_trajectory_mean])
def test_losses_over_global_counts_pass(loss):
    """However the batch is cut."""
    assert_partition_invariant(loss, random_case(1).batch())


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_dividing_by_local_tokens_is_found(reduction):
    """Also when the trainer averages over micro-batches: their sizes differ."""
    with pytest.raises(PartitionError) as caught:
        assert_partition_invariant(token_mean, random_case(1).batch(), reduction=reduction)
    message = str(caught.value)
    assert message.startswith("token 0 (trajectory 0, position 0) has the coefficient")
    assert "off by one factor" in message
    assert "divide by the counts of the whole optimizer batch" in message


def test_averaging_is_right_where_parts_are_equal():
    """Four equal trajectories, always cut into halves: the mean of means is the mean."""
    batch = packed([0.1, 0.2], [1.0, -1.0], [1, 1])
    assert_partition_invariant(token_mean, batch, ranks=1, parts=1, reduction="mean", trials=20)


def test_a_gate_that_sees_its_part_only_is_found():
    """Right counts, wrong aggregates: the factor differs from token to token."""
    with pytest.raises(PartitionError, match="its tokens are coupled to other parts"):
        assert_partition_invariant(group_gate_of_the_part, random_case(1).batch())


def test_the_token_named_is_the_first_that_differs():
    """Position in the trajectory and both values."""

    def wrong_from_row_three(part, counts):
        mine = right_token_mean(part, counts)
        if len(part) < counts.tokens:
            mine = mine + part.log_probs[part.advantages == 7.0].sum()
        return mine

    batch = packed([0.0] * 6, [1.0, 1.0, 1.0, 1.0, 7.0, 1.0], [2, 1, 3])
    with pytest.raises(PartitionError) as caught:
        assert_partition_invariant(wrong_from_row_three, batch)
    assert str(caught.value).startswith(
        "token 4 (trajectory 2, position 1) has the coefficient 1.16667 in the whole batch and "
        "0.166667 in"
    )
    assert "1 of 6 tokens differ" in str(caught.value)


def test_a_loss_that_differs_with_equal_gradients_is_found():
    """A constant per part."""
    with pytest.raises(PartitionError, match="with equal gradients"):
        assert_partition_invariant(
            lambda part, counts: right_token_mean(part, counts) + 1.0, random_case(1).batch()
        )


@pytest.mark.filterwarnings("ignore::fiberpo.FiberPOWarning")
def test_an_objective_that_forgets_other_ranks_is_found(monkeypatch):
    """The gate map with contexts matched on this rank alone."""
    original = GateMap.lay_out
    monkeypatch.setattr(
        GateMap,
        "lay_out",
        lambda self, batch, collective=None, **more: original(self, batch, **more),
    )
    with pytest.raises(PartitionError):
        assert_partition_invariant(OBJECTIVES["fiberpo_domain"], random_case(1).batch())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"reduction": "max"}, "reduction is 'max'"),
        ({"split_trajectories": True}, "needs an Objective"),
    ],
)
def test_arguments_that_contradict_are_refused(arguments, message):
    """Each says what it takes."""
    with pytest.raises(fiberpo.ObjectiveError, match=message):
        assert_partition_invariant(token_mean, random_case(1).batch(), **arguments)


def test_nothing_to_cut_is_refused():
    """One trajectory."""
    with pytest.raises(fiberpo.ObjectiveError, match="nothing to cut"):
        assert_partition_invariant(recipes.ppo(), packed([0.1, 0.2], [1.0], [2]))
    assert_partition_invariant(
        recipes.ppo(), packed([0.1, 0.2], [1.0], [2]), split_trajectories=True
    )


def test_a_loss_that_is_no_scalar_is_refused():
    """Quotes what came."""
    with pytest.raises(fiberpo.ObjectiveError, match="must be a scalar tensor"):
        assert_partition_invariant(lambda part, counts: 1.0, random_case(1).batch())


def test_an_exception_on_one_rank_ends_all():
    """The first error is raised; ranks that wait are let go."""

    def work(x, ranks):
        if x == 1:
            raise ValueError("rank 1 fell over")
        return ranks.total(torch.tensor(float(x)))

    with pytest.raises(ValueError, match="rank 1 fell over"):
        simulate_ranks(work, [0, 1, 2])
    assert simulate_ranks(work, [2, 3, 4]) == [9.0] * 3


def test_simulated_ranks_reduce_in_rank_order():
    """Sums to the last bit in rank order, maxima, gathers of unequal widths; new memory each."""
    parts = [torch.tensor([0.1, 1.0]), torch.tensor([0.2, -3.0]), torch.tensor([0.3, 2.0])]

    def work(part, ranks):
        rows = torch.full((2, ranks.rank), ranks.rank)
        total = ranks.total(part)
        total += 1.0  # of this rank alone
        return total - 1.0, ranks.largest(part), ranks.gather(rows), (ranks.calls, ranks.sent)

    for rank, (total, largest, gathered, counted) in enumerate(simulate_ranks(work, parts)):
        assert torch.equal(total, parts[0] + parts[1] + parts[2] + 1.0 - 1.0)
        assert largest.tolist() == pytest.approx([0.3, 2.0])
        assert [tuple(rows.shape) for rows in gathered] == [(2, 0), (2, 1), (2, 2)]
        assert counted == (3, 8 + 8 + 16 * rank)


def test_simulated_ranks_find_calls_that_do_not_match():
    """Over a network this hangs, or mixes up numbers."""

    def mixed(rank, ranks):
        return ranks.gather(torch.zeros(2, 1)) if rank else ranks.total(torch.zeros(2))

    with pytest.raises(fiberpo.ObjectiveError, match=r"'total of \[2\]', 1: 'gather'.*same labels"):
        simulate_ranks(mixed, [0, 1])
    with pytest.raises(fiberpo.ObjectiveError, match=r"'total of \[1\]', 1: 'total of \[2\]'"):
        simulate_ranks(lambda n, ranks: ranks.total(torch.zeros(n)), [1, 2])

    def early(rank, ranks):
        return [ranks.total(torch.zeros(1)) for _ in range(2 - rank)]

    with pytest.raises(fiberpo.ObjectiveError, match=r"waited 0.2 s .* calls by rank: \[2, 1\]"):
        simulate_ranks(early, [0, 1], timeout=0.2)


def test_an_error_on_one_rank_is_raised():
    """The others do not wait for it."""

    def work(rank, ranks):
        if rank:
            raise KeyError("rank 1")
        return ranks.total(torch.zeros(1))

    with pytest.raises(KeyError, match="rank 1"):
        simulate_ranks(work, [0, 1])
