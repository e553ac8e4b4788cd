"""Labels and the forest that they make: what nests, what does not, and how it is said."""

import numpy as np
import pytest
import torch

import fiberpo
from core.cases import packed
from fiberpo import recipes

BUDGET = (0.12, 0.05)
NO_PARENT = fiberpo.Strata.NO_PARENT


def batch(lengths, **labels):
    return packed([0.0] * sum(lengths), [1.0] * sum(lengths), lengths, labels=labels)


def refused(call, *fragments):
    with pytest.raises(fiberpo.StrataError) as caught:
        call()
    assert isinstance(caught.value, fiberpo.FiberPOError)
    assert isinstance(caught.value, ValueError)
    for fragment in fragments:
        assert fragment in str(caught.value)


def parents(strata):
    """Per stratum, the parent contexts."""
    return {name: strata.parent[strata.level(k)].tolist() for k, name in enumerate(strata.names)}


# ----------------------------------------------------------------------------------- the forest


def test_chain_by_hand():
    """Domains 0, 1; groups 2, 3, 4; trajectories 5 to 8."""
    found = batch(
        [1, 2, 1, 1], domain=torch.tensor([0, 0, 1, 0]), group=torch.tensor([7, 7, 8, 9])
    ).strata(["domain", "group", "trajectory"])
    assert parents(found) == {
        "domain": [NO_PARENT, NO_PARENT],
        "group": [0, 1, 0],
        "trajectory": [2, 2, 3, 4],
    }
    assert found.leaf.tolist() == [5, 6, 6, 7, 8]


def test_tree_by_hand():
    """-1 is absent: trajectory 1 hangs on its domain, trajectory 2 on its group, 3 on nothing."""
    found = batch(
        [1, 1, 1, 1], domain=torch.tensor([0, 0, -1, -1]), group=torch.tensor([5, -1, 6, -1])
    ).strata(["domain", "group", "trajectory"])
    assert parents(found) == {
        "domain": [NO_PARENT],
        "group": [0, NO_PARENT],
        "trajectory": [1, 0, 2, NO_PARENT],
    }


def test_turns_hang_on_their_trajectory():
    """Turn ids are local; tokens without a turn hang on the trajectory itself."""
    found = batch([3, 2], turn=torch.tensor([0, 0, 1, 0, -1])).strata(["trajectory", "turn"])
    assert parents(found) == {"trajectory": [NO_PARENT] * 2, "turn": [0, 0, 1]}
    assert found.leaf.tolist() == [2, 2, 3, 4, 1]


def test_absent_labels_in_lists_of_strings():
    """None stands for -1."""
    found = batch([1, 1], domain=["math", None]).strata(["domain", "trajectory"])
    assert parents(found) == {"domain": [NO_PARENT], "trajectory": [0, NO_PARENT]}


def test_tokens_directly_under_an_inner_context_are_gated_with_it():
    """A tool turn of two tokens and two loose tokens: S_turn = 0.3, S_tau = 0.15."""
    labels = {"turn": torch.tensor([0, 0, -1, -1])}
    data = packed([0.3, 0.3, 0.0, 0.0], [1.0] * 4, [4], labels=labels)
    gates = {"trajectory": fiberpo.Pass(), "turn": fiberpo.Zero()}
    out = fiberpo.GateMap(fiberpo.SignedLog(), gates, fiberpo.Pass())(data)
    # turn tokens: 0.15 + 0 + (0.3 - 0.3); loose tokens: 0.15 + (0 - 0.15)
    assert out.log_gated_ratio.tolist() == pytest.approx([0.15, 0.15, 0.0, 0.0])


@pytest.mark.parametrize(
    "ids",
    [
        [0, 0, 1],
        torch.tensor([10, 10, 3]),
        torch.tensor([10, 10, 3], dtype=torch.int32),
        np.array([5, 5, 9]),
        ["a", "a", "b"],
        np.array(["x", "x", "y"]),
        ("p", "p", "q"),
    ],
)
def test_ids_may_be_integers_or_strings(ids):
    """Lists, tuples, arrays and tensors; the first two trajectories share a context."""
    found = batch([1, 2, 1], group=ids).strata(["group", "trajectory"])
    parent = parents(found)["trajectory"]
    assert parent[0] == parent[1] != parent[2]


@pytest.mark.parametrize("listed", [("domain", "group"), ("group", "domain")])
def test_known_strata_have_their_place_by_name(listed):
    """domain > group > trajectory > turn, in whatever order the dictionary is."""
    ids = {"domain": torch.tensor([0, 0, 0]), "group": torch.tensor([0, 0, 1])}
    data = batch([1, 1, 1], **{name: ids[name] for name in listed})
    assert tuple(data.labels) == ("domain", "group")
    assert data.strata(["trajectory", "group", "domain"]).names == ("domain", "group", "trajectory")


def test_own_strata_are_coarse_to_fine_as_listed():
    """Any names: continent > country."""
    data = batch([1, 1, 1], continent=["eu", "eu", "as"], country=["fr", "de", "jp"])
    found = data.strata(["continent", "country"])
    assert parents(found)["country"] == [1, 1, 0]  # de, fr, jp under as (0), eu (1)


def test_own_strata_are_gated_like_any_other():
    """An objective over a stratum of one's own name."""
    data = batch([1, 1, 1, 1], team=["a", "a", "b", "b"])
    out = recipes.fiberpo_domain({"team": BUDGET, "trajectory": BUDGET})(data)
    assert out.regimes["team"].shape == (2, 2)


# ------------------------------------------------------------------------------ what is refused


def test_group_in_two_domains_is_refused():
    """The message names the group and both domains."""
    refused(
        lambda: batch([1, 1], domain=["math", "code"], group=["g7", "g7"]),
        'group "g7"', 'domain "math"', 'domain "code"', "nest",
    )  # fmt: skip


def test_two_independent_classifications_are_refused():
    """Domain and modality both over the same trajectories are not a tree, and it says so."""
    refused(
        lambda: batch([1] * 4, domain=["a", "a", "b", "b"], modality=["x", "y", "x", "y"]),
        "two independent classifications", "not a tree", "join them",
    )  # fmt: skip


def test_strata_listed_fine_to_coarse_are_refused_with_the_remedy():
    """country before continent: each continent lies in several countries."""
    refused(
        lambda: batch([1, 1], country=["fr", "de"], continent=["eu", "eu"]),
        'continent "eu"', "list it first",
    )  # fmt: skip


def test_group_with_and_without_a_domain_is_refused():
    """Half of its trajectories have no domain."""
    refused(
        lambda: batch([1, 1], domain=["a", None], group=["g", "g"]),
        'group "g"', 'domain "a"', "no context above",
    )  # fmt: skip


@pytest.mark.parametrize("entries", [1, 3, 5])
def test_labels_of_another_length_are_refused(entries):
    """Two trajectories, four tokens."""
    refused(
        lambda: batch([2, 2], group=list(range(entries))),
        'labels["group"]', f"{entries} entries", "2 trajectories", "4 tokens",
    )  # fmt: skip


def test_turn_labels_are_one_a_token():
    """One a trajectory is not enough."""
    refused(lambda: batch([2, 2], turn=[0, 1]), 'labels["turn"]', "2 entries", "4")


def test_group_labels_are_one_a_trajectory():
    """One a token would make groups that end with their trajectory: refused, not reinterpreted."""
    refused(lambda: batch([1, 3], group=[0, 0, 0, 0]), 'labels["group"]', "4 entries")


def test_padded_labels_of_another_length_are_refused():
    """The rows are counted."""
    zeros = torch.zeros(3, 2)
    call = lambda: fiberpo.RatioBatch.from_padded(  # noqa: E731
        zeros, zeros, torch.ones(3), torch.ones(3, 2), labels={"group": torch.tensor([0, 1])}
    )
    refused(call, 'labels["group"]', "2 entries", "3 trajectories")


@pytest.mark.parametrize("ids", [torch.tensor([0.5, 1.5]), [0.0, 1.0], np.array([0.5, 2.0])])
def test_float_labels_are_refused(ids):
    """Rewards in the wrong place."""
    refused(lambda: batch([1, 1], group=ids), 'labels["group"]', "float", "integers or strings")


def test_negative_ids_are_refused():
    """Only -1 has a meaning."""
    refused(lambda: batch([1, 1], group=torch.tensor([0, -7])), 'labels["group"]', "-7", "-1")


def test_mixed_strings_and_numbers_are_refused():
    """The entry is quoted."""
    refused(lambda: batch([1, 1], group=["a", 3]), 'labels["group"][1]', "3", "strings")


def test_a_label_of_tokens_is_refused():
    """Every token is one already."""
    refused(lambda: batch([1, 1], token=[0, 1]), 'labels["token"]', "not needed")


def test_keys_of_contexts_follow_the_callers_ids():
    """Equal on every rank for equal ids, whatever their order and kind; never by position."""

    def keys(name, ids):
        label = batch([1] * len(ids), **{name: ids}).labels[name]
        return dict(zip(label.value_names(), label.keys().tolist()))

    text, numbers = keys("group", ["b", "7", "a"]), keys("group", torch.tensor([7, 3]))
    assert text["7"] == numbers["7"]
    assert keys("group", ["a", "z"])["a"] == text["a"]
    assert keys("domain", ["a"])["a"] != text["a"]
    assert keys("group", ["07"])["07"] != numbers["7"]
    # the same on every machine
    assert numbers == {"7": 593365377213018480, "3": 7429945414625556166}
    many = keys("group", torch.arange(20000))
    assert len(set(many.values())) == 20000


def test_label_missing_for_a_named_stratum_is_refused():
    """The message names the stratum, what there is, and the remedy."""
    data = batch([1, 1], group=[0, 1])
    refused(
        lambda: recipes.fiberpo_domain()(data), 'stratum "domain"', "['group']", 'labels={"domain"'
    )
    refused(lambda: recipes.fiberpo_domain()(batch([1])), "no labels")


def test_weights_over_a_missing_stratum_are_refused():
    """As for gates."""
    refused(lambda: recipes.grpo(weights="group_mean")(batch([1, 1])), '"group"')


def test_stratum_named_twice_is_refused():
    """Quoted."""
    refused(
        lambda: batch([1, 1], group=[0, 1]).strata(["group", "group"]), "('group', 'group')", "once"
    )


def test_token_in_no_context_is_refused():
    """Only the domain is gated, and trajectory 1 has none."""
    data = batch([2, 1], domain=["a", None])
    refused(
        lambda: recipes.fiberpo_domain({"domain": BUDGET})(data),
        "token 2", "trajectory 1", "absent",
    )  # fmt: skip


def test_token_is_no_stratum_of_contexts():
    """Its gate is epsilon."""
    refused(lambda: recipes.fiberpo_domain({"token": BUDGET}), "token", "epsilon")


@pytest.mark.parametrize("budgets", [{}])
def test_hierarchy_without_strata_is_refused(budgets):
    """It would be a token clip."""
    refused(lambda: recipes.fiberpo_domain(budgets), "recipes.ppo")


def test_rollback_of_a_stratum_without_budget_is_refused():
    """Both are quoted."""
    refused(
        lambda: recipes.fiberpo_domain({"group": BUDGET}, rollback={"domain": 3.0}),
        "['domain']", "['group']",
    )  # fmt: skip


def test_labels_under_the_mask_may_be_anything():
    """Padding of -100 in a [B, T] label is removed with its position, as everything else is."""
    zeros, mask = torch.zeros(2, 2), torch.tensor([[True, True], [True, False]])
    found = fiberpo.RatioBatch.from_padded(
        zeros, zeros, torch.ones(2), mask, labels={"turn": torch.tensor([[0, 1], [0, -100]])}
    )
    assert found.labels["turn"].codes.tolist() == [0, 1, 0]


def test_padded_turns_may_be_strings():
    """Nested lists, with anything under the mask."""
    zeros, mask = torch.zeros(2, 2), torch.tensor([[True, True], [True, False]])
    found = fiberpo.RatioBatch.from_padded(
        zeros, zeros, torch.ones(2), mask, labels={"turn": [["plan", "act"], ["plan", "pad"]]}
    )
    strata = found.strata(["trajectory", "turn"])
    assert parents(strata)["turn"] == [0, 0, 1]


@pytest.mark.parametrize("absent", [[-1, -1], [None, None]])
def test_a_label_may_be_absent_everywhere(absent):
    """A rank whose trajectories all lie under no domain."""
    found = batch([1, 1], domain=absent).strata(["domain", "trajectory"])
    assert parents(found) == {"domain": [], "trajectory": [NO_PARENT] * 2}


def test_budgets_by_turn_name_hold_in_every_trajectory():
    """Turn 1 has room for 0.3, all others roll back at 0.3 (C = 0.2, T = 1)."""
    data = packed([0.3] * 4, [1.0] * 4, [2, 2], labels={"turn": torch.tensor([0, 1, 0, 1])})
    budgets = {"turn": {"1": (0.5, 0.1), "*": (0.2, 0.1)}}
    out = recipes.fiberpo_domain(budgets)(data)
    assert out.log_gated_ratio.tolist() == pytest.approx([0.1, 0.3, 0.1, 0.3])


def test_budgets_may_name_trajectories_by_number():
    """The second trajectory has room for 0.3, the others roll back (C = 0.2, T = 1)."""
    data = packed([0.3] * 3, [1.0] * 3, [1, 1, 1])
    out = recipes.fiberpo({"1": (0.5, 0.1), "*": (0.2, 0.1)})(data)
    assert out.log_gated_ratio.tolist() == pytest.approx([0.1, 0.3, 0.1])


@pytest.mark.parametrize("domains", [1, 2])
def test_smallest_batches_are_valid(domains):
    """One trajectory of one token per group per domain."""
    ids = list(range(domains))
    data = packed(
        [0.1] * domains, [1.0] * domains, [1] * domains, labels={"domain": ids, "group": ids}
    )
    with pytest.warns(fiberpo.FiberPOWarning, match="only child"):
        out = recipes.fiberpo_domain()(data)
    assert out.log_gated_ratio.tolist() == pytest.approx([0.1] * domains)
