"""Aggregation weights mu: given from outside, with denominators counted once (Def. 3.1)."""

import pytest
import torch

import fiberpo
from core import oracle
from core.cases import Case, packed, random_case
from fiberpo import Denominators, Weights, recipes

LENGTHS = [1, 2, 5]


def batch(**more):
    return packed([0.0] * 8, [1.0] * 8, LENGTHS, **more)


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        (Weights.token_mean(), [1 / 8] * 8),
        (Weights.trajectory_mean(), [1 / 3] + [1 / 6] * 2 + [1 / 15] * 5),
        (Weights.trajectory_sum(), [1 / 3] * 8),
        (Weights.constant(10), [1 / 30] * 8),
    ],
    ids=["token_mean", "trajectory_mean", "trajectory_sum", "constant"],
)
def test_weights_by_hand(weights, expected):
    """Lengths 1, 2, 5."""
    assert weights(batch()).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("stratum", ["group", "domain"])
def test_context_means(stratum):
    """``1 / (contexts T_context)``: every context weighs the same, by its tokens inside."""
    labels = {stratum: torch.tensor([7, 7, 3])}
    expected = oracle.context_mean(LENGTHS, [7, 7, 3])  # 1/6 three times, 1/10 five times
    found = getattr(Weights, f"{stratum}_mean")()(batch(labels=labels))
    assert found.tolist() == pytest.approx(expected)
    assert found[0].item() == pytest.approx(1 / 6)


@pytest.mark.parametrize(
    "name", ["token_mean", "trajectory_mean", "group_mean", "domain_mean", "turn_mean"]
)
def test_means_sum_to_one(name):
    """mu is a distribution over the tokens (`trajectory_sum` and `constant` are not)."""
    assert Weights.parse(name)(random_case(0).batch()).sum().item() == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("alias", "weights"),
    [
        ("token-mean", Weights.token_mean()),
        ("seq-mean-token-mean", Weights.trajectory_mean()),
        ("seq-mean-token-sum", Weights.trajectory_sum()),
        ("group_mean", Weights.group_mean()),
    ],
)
def test_names_of_other_libraries(alias, weights):
    """The same weights under the names that other libraries give them."""
    assert Weights.parse(alias) == weights


def test_unknown_weights_are_refused():
    """The message quotes the name and lists what there is."""
    with pytest.raises(fiberpo.ObjectiveError, match="'tokens'.*token_mean"):
        recipes.ppo(weights="tokens")


def test_misspelt_mean_is_reported_as_weights():
    """``tokn_mean`` reads as the mean over a stratum ``tokn``: the error names it."""
    objective = recipes.ppo(weights="tokn_mean")
    with pytest.raises(fiberpo.FiberPOError, match="tokn"):
        objective(batch())


def test_constant_needs_a_length():
    """By name alone it has none."""
    with pytest.raises(fiberpo.ObjectiveError, match=r"Weights\.constant\(length\)"):
        recipes.ppo(weights="constant")


@pytest.mark.parametrize("length", [0, -3.0])
def test_constant_length_is_positive(length):
    """The value is quoted."""
    with pytest.raises(fiberpo.BudgetError, match=repr(length)):
        Weights.constant(length)


def test_dropped_trajectories_are_in_no_denominator():
    """An empty row does not exist: 1 / (2 T), not 1 / (3 T)."""
    with_empty = packed([0.0] * 4, [1.0] * 4, [2, 0, 2])
    assert Weights.trajectory_mean()(with_empty).tolist() == pytest.approx([0.25] * 4)


@pytest.mark.parametrize("name", ["ppo", "grpo", "dapo", "gspo", "fiberpo"])
def test_parts_with_whole_denominators_are_the_whole(name):
    """Micro-batches of 5 and 7 trajectories: losses add up and coefficients concatenate."""
    case, objective = random_case(1), getattr(recipes, name)()
    whole = objective(case.batch())
    cut = sum(case.lengths[:5])
    counts = Denominators.of(case.batch())
    parts = [
        Case(case.log_ratios[:cut], case.advantages[:cut], case.lengths[:5]),
        Case(case.log_ratios[cut:], case.advantages[cut:], case.lengths[5:]),
    ]
    out = [objective(part.batch(), denominators=counts) for part in parts]
    assert sum(o.loss.item() for o in out) == pytest.approx(whole.loss.item(), abs=1e-14)
    found = torch.cat([o.coefficients for o in out]).tolist()
    assert found == pytest.approx(whole.coefficients.tolist(), abs=1e-15)


def test_context_mean_of_a_part_is_refused():
    """Token and trajectory counts say nothing about the contexts of the other parts."""
    labels = {"group": torch.tensor([0, 0, 1])}
    objective = recipes.grpo(weights="group_mean")
    with pytest.raises(fiberpo.ObjectiveError, match="whole batch, or a collective"):
        objective(batch(labels=labels), denominators=Denominators(100, 10))


def test_gates_and_masks_do_not_change_the_weights():
    """mu is the same whatever the log ratios are."""
    labels = {"group": torch.tensor([0, 0, 1])}
    drifted = packed([5.0] * 8, [1.0] * 8, LENGTHS, labels=labels)
    for weights in (Weights.token_mean(), Weights.trajectory_mean(), Weights.group_mean()):
        assert torch.equal(weights(drifted), weights(batch(labels=labels)))
