"""Batches spread over ranks: two reductions of context sums give exactly the whole gradient."""

import pickle
import warnings

import numpy as np
import pytest
import torch

import fiberpo
from core.cases import packed, random_case, random_tree, run_ranks
from fiberpo import recipes
from fiberpo.testing import simulate_ranks

CHAIN = {"domain": (0.06, 0.03), "group": (0.08, 0.05), "trajectory": (0.12, 0.05)}
OBJECTIVES = {
    "fiberpo_domain": recipes.fiberpo_domain(CHAIN, rollback=2.0),
    "fiberpo_domain, turns": recipes.fiberpo_domain({**CHAIN, "turn": (0.1, 0.06)}),
    "fiberpo_domain, pessimistic": recipes.fiberpo_domain(CHAIN, pessimistic=True),
    "fiberpo_domain, token measure": recipes.fiberpo_domain(CHAIN, measure="token"),
    "fiberpo_domain, domain mean": recipes.fiberpo_domain(CHAIN, weights="domain_mean"),
    "domain only": recipes.fiberpo_domain({"domain": (0.06, 0.03)}),
    "fiberpo": recipes.fiberpo(),
    "grpo": recipes.grpo(),
    "grpo, group mean": recipes.grpo(weights="group_mean"),
    "ppo": recipes.ppo(),
    "ratio clip of groups": fiberpo.Objective(
        fiberpo.Weights.token_mean(),
        fiberpo.GateMap(fiberpo.Log(), {"group": fiberpo.RatioClip(0.05)}, fiberpo.Zero()),
    ),
    "gspo": recipes.gspo(0.1, 0.1),
    "apc": recipes.apc(0.2),
}


def parts_of(case, rank_of, ranks):
    """Per rank its batch and its tokens' positions in the whole."""
    starts = np.cumsum([0, *case.lengths])
    found = []
    for rank in range(ranks):
        mine = [t for t in range(12) if rank_of[t] == rank]
        tokens = [i for t in mine for i in range(starts[t], starts[t + 1])]
        labels = {}
        for name, ids in case.labels.items():
            at = tokens if name in ("turn", "state") else mine
            labels[name] = torch.tensor([ids[i] for i in at], dtype=torch.long)
        batch = packed(
            [case.log_ratios[i] for i in tokens],
            [case.advantages[i] for i in tokens],
            [case.lengths[t] for t in mine],
            labels=labels,
            allow_empty=True,
            grad=True,
        )
        found.append((batch, tokens))
    return found


# every group is torn apart; the third one leaves a rank without a single token
SPLITS = {
    "two ranks": ([0, 1] * 6, 2),
    "three ranks": ([0, 1, 2, 2, 1, 0, 0, 0, 0, 1, 2, 1], 3),
    "one rank empty": ([2, 0, 2, 0, 0, 0, 2, 2, 0, 2, 0, 0], 3),
}
every = pytest.mark.parametrize("name", OBJECTIVES)
splits = pytest.mark.parametrize(("rank_of", "ranks"), SPLITS.values(), ids=SPLITS)


@every
@splits
def test_ranks_together_have_the_coefficients_of_one_process(name, rank_of, ranks):
    """Coefficients, gated ratios and the summed loss."""
    case = random_case(1)
    case.labels["state"] = [i % 9 for i in range(len(case.log_ratios))]
    whole = OBJECTIVES[name](case.batch())
    parts = parts_of(case, rank_of, ranks)
    outs = run_ranks(OBJECTIVES[name], [batch for batch, _ in parts])
    for out, (_, tokens) in zip(outs, parts):
        expected = whole.coefficients[tokens].tolist()
        assert out.coefficients.tolist() == pytest.approx(expected, abs=1e-14, rel=1e-9)
        expected = whole.log_gated_ratio[tokens].tolist()
        assert out.log_gated_ratio.tolist() == pytest.approx(expected, abs=1e-12)
    assert sum(o.loss.item() for o in outs) == pytest.approx(whole.loss.item(), abs=1e-12)


@splits
def test_trees_over_ranks(rank_of, ranks):
    """Branches of different depth."""
    case, objective = random_tree(2), OBJECTIVES["fiberpo_domain, turns"]
    whole = objective(case.batch())
    parts = parts_of(case, rank_of, ranks)
    outs = run_ranks(objective, [batch for batch, _ in parts])
    for out, (_, tokens) in zip(outs, parts):
        expected = whole.coefficients[tokens].tolist()
        assert out.coefficients.tolist() == pytest.approx(expected, abs=1e-14, rel=1e-9)


UNEVEN = [0, 0, 0, 1, 0, 1, 0, 0, 1, 0, 1, 0]


@pytest.mark.parametrize("name", ["fiberpo_domain", "fiberpo", "ppo"])
def test_statistics_of_ranks_merge_to_those_of_the_whole(name):
    """A context that several ranks hold is counted once."""
    case, objective = random_case(1), OBJECTIVES[name]
    outs = run_ranks(objective, [batch for batch, _ in parts_of(case, UNEVEN, 2)])
    merged = outs[0].statistics.merge(outs[1].statistics).compute()
    whole = objective(case.batch()).metrics()
    assert merged == pytest.approx(whole, rel=1e-9, abs=1e-12)


def test_taking_parts_alone_is_wrong_here():
    """The split matters: without a collective the same parts give other coefficients."""
    case, objective = random_case(1), OBJECTIVES["fiberpo_domain"]
    whole = objective(case.batch())
    batch, tokens = parts_of(case, SPLITS["two ranks"][0], 2)[0]
    share = batch.trajectories / case.batch().trajectories
    error = (objective(batch).coefficients * share - whole.coefficients[tokens]).abs().max()
    assert float(error) > 0.1 * float(whole.coefficients.abs().max())


def test_a_part_is_refused_where_contexts_reach_beyond_it():
    """Right denominators are not enough for group and domain gates: an error, no wrong number."""
    case = random_case(1)
    counts = fiberpo.Denominators.of(case.batch())
    batch, _ = parts_of(case, SPLITS["two ranks"][0], 2)[0]
    with pytest.raises(fiberpo.ObjectiveError, match=r"\['domain', 'group'\]"):
        OBJECTIVES["fiberpo_domain"](batch, denominators=counts)
    assert torch.isfinite(OBJECTIVES["fiberpo"](batch, denominators=counts).loss)


@pytest.mark.parametrize(
    ("name", "reductions"), [("fiberpo_domain", 2), ("fiberpo", 0), ("ppo", 0)]
)
def test_two_reductions_of_shared_contexts_a_step(name, reductions):
    """Sums on the way up, adjoints on the way down; trajectory gates need none."""
    objective = OBJECTIVES[name]
    batches = [b for b, _ in parts_of(random_case(1), SPLITS["two ranks"][0], 2)]

    def step(batch, ranks):
        plan = objective.plan(batch, collective=ranks)
        calls, sent = ranks.calls, ranks.sent
        objective(batch, plan=plan)
        return ranks.calls - calls, ranks.sent - sent

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fiberpo.FiberPOWarning)
        for calls, sent in simulate_ranks(step, batches):
            assert calls == reductions
            # two channels in float64 of what both ranks hold, never of tokens or trajectories:
            # 2 domains and 3 of the 4 groups
            assert sent == reductions * 2 * 5 * 8


def test_only_contexts_that_two_ranks_hold_are_exchanged():
    """Groups that are whole on their rank cost nothing; their domain does."""
    case = random_case(1)
    rank_of = [0 if group in (0, 2) else 1 for group in case.labels["group"]]
    batches = [b for b, _ in parts_of(case, rank_of, 2)]
    objective = OBJECTIVES["fiberpo_domain"]
    widths = simulate_ranks(
        lambda b, ranks: objective.plan(b, collective=ranks).layout.contexts.match.width, batches
    )
    assert widths == [2, 2]


def test_contexts_that_nest_differently_on_two_ranks_are_refused_on_both():
    """The same group in two domains: every rank says so, none hangs."""
    batches = [
        packed([0.1, 0.2], [1.0, 1.0], [1, 1], labels={"domain": ["m", "m"], "group": ["a", "b"]}),
        packed([0.1, 0.2], [1.0, 1.0], [1, 1], labels={"domain": ["c", "m"], "group": ["a", "c"]}),
    ]
    found = []

    def call(batch, ranks):
        try:
            OBJECTIVES["fiberpo_domain"](batch, collective=ranks)
        except fiberpo.StrataError as error:
            found.append(str(error))

    simulate_ranks(call, batches)
    assert len(found) == 2
    assert all('group "a" lies in different parents on different ranks (1 such' in f for f in found)


@pytest.mark.parametrize("kind", ["strings", "integers"])
def test_ranks_agree_by_the_callers_ids(kind):
    """Contexts are matched by id, not by their number on each rank."""
    ids = (["b"], ["a", "b"]) if kind == "strings" else ([7], [3, 7])
    one = packed([0.10], [1.0], [1], labels={"group": ids[0]})
    two = packed([0.00, 0.04], [1.0, 1.0], [1, 1], labels={"group": ids[1]})
    objective = fiberpo.Objective(
        fiberpo.Weights.token_mean(),
        fiberpo.GateMap(fiberpo.SignedLog(), {"group": fiberpo.Pass()}, fiberpo.Zero()),
    )
    outs = run_ranks(objective, [one, two])
    assert outs[0].log_gated_ratio.tolist() == pytest.approx([0.07])
    assert outs[1].log_gated_ratio.tolist() == pytest.approx([0.00, 0.07])


def test_a_group_spread_over_ranks_is_not_idle():
    """One trajectory of the group on each rank: its gate does act, so nothing warns.

    (`run_ranks` silences warnings; here they are recorded.)
    """
    labels = {"group": torch.tensor([0])}
    batches = [packed([ell, ell], [1.0] * 2, [2], labels=labels) for ell in (0.3, 0.0)]
    objective = recipes.fiberpo_domain({"group": (0.1, 0.1), "trajectory": (0.1, 0.1)})
    found = []
    original = warnings.warn
    warnings.warn = lambda message, *a, **k: found.append(str(message))
    try:
        run_ranks(objective, batches)
    finally:
        warnings.warn = original
    assert found == []


def test_autograd_over_ranks_is_refused():
    """It sees one process only."""
    batches = [b for b, _ in parts_of(random_case(1), [0, 1] * 6, 2)]

    def call(batch, collective):
        return recipes.fiberpo_domain(CHAIN)(batch, collective=collective, gradient="autograd")

    with pytest.raises(fiberpo.ObjectiveError, match="closed form"):
        run_ranks(call, batches)


def test_a_part_with_pieces_of_trajectories_is_refused():
    """T_tau of a piece would be silently wrong in weights by trajectory and in masks."""
    counts = fiberpo.Denominators(4, 1)
    piece = packed([0.1], [1.0], [1], labels={"trajectory": ["a"]})
    with pytest.raises(fiberpo.ObjectiveError, match=r"\['trajectory'\]"):
        recipes.grpo()(piece, denominators=counts)
    assert recipes.ppo()(piece, denominators=counts).coefficients.tolist() == pytest.approx(
        [0.25 * np.exp(0.1)]
    )


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives_travel_between_processes(name):
    """Pickle and back."""
    again = pickle.loads(pickle.dumps(OBJECTIVES[name]))
    batch = random_case(1).batch()
    assert torch.equal(again(batch).coefficients, OBJECTIVES[name](batch).coefficients)
    assert str(again) == str(OBJECTIVES[name])
