"""Suggested budgets do what they say when they are replayed."""

import ast
import io
import json

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from rich.console import Console

from diagnosis.cases import DOMAINS, Memory, batch, steps
from fiberpo import DataError, FiberPOError, RatioBatch, recipes
from fiberpo.cli.options import objective_kwargs
from fiberpo.diagnosis import replay, suggest
from fiberpo.diagnosis.quantiles import SLACK, Sample, budget_at, clip_at, gated_share
from fiberpo.diagnosis.suggesting import Suggestion
from fiberpo.diagnosis.tables import print_suggestion
from fiberpo.recording import RecordedStep, open_recording
from fiberpo.train.config import make_config

STRATA = ("domain", "group", "trajectory")


def made(found):
    return recipes.from_name(found.recipe, **found.parameters)


def for_gates(recording, **more):
    return suggest(recording, stops=False, **more)


def gated(items, objective, stratum):
    """Share of contexts that leave PASS, counted one by one."""
    count = total = 0
    for item in items:
        for regimes in objective(item.batch).regimes[stratum].T.tolist():
            count += any(r != 0 for r in regimes)
            total += 1
    return count / total, total


@given(
    seed=st.integers(0, 50), activity=st.sampled_from([0.02, 0.1, 0.25, 0.5, 0.9]),
    size=st.sampled_from([0.01, 0.3, 1.0]),
)  # fmt: skip
@settings(max_examples=15)
def test_a_suggestion_gates_what_it_says(seed, activity, size):
    """The target share of every stratum and of the tokens, within the quantile's resolution."""
    items = steps(3, start=seed, groups=8, answers=3, length=10, size=size)
    found = for_gates(Memory(items), activity=activity)
    objective = made(found)
    for row in found.rows:
        if row.domain is not None:
            continue
        share, count = gated(items, objective, row.stratum)
        assert count == row.contexts
        assert share == pytest.approx(row.activity)
        # a context, and the slack in rank of both channels
        assert abs(share - activity) <= 1.001 / count + 2 * SLACK * activity
        assert row.budget[1] <= row.budget[0]


@given(seed=st.integers(0, 50), activity=st.sampled_from([0.05, 0.25, 0.5]))
@settings(max_examples=8)
def test_a_suggestion_for_stops_puts_that_share_out_of_budget(seed, activity):
    """The drifts themselves, not what a context adds to its parent; only children have one."""
    items = steps(3, start=seed, groups=4, answers=3, length=10)
    found = suggest(Memory(items), activity=activity, stops=True)
    assert (found.recipe, tuple(found.budgets)) == ("fiberstop", STRATA)
    objective = made(found)
    for row in found.rows:
        if row.domain is not None:
            continue
        outside = total = 0
        for item in items:
            stop = objective(item.batch).stopped[0]
            beyond, at = stop.far[None], slice(None)
            if row.stratum != "token":
                strata = stop.layout.contexts.strata
                beyond, at = stop.beyond, strata.level(strata.names.index(row.stratum))
            outside += int(beyond[:, at].any(0).sum())
            total += len(beyond[0, at])
        assert (total, row.acting) == (row.contexts, row.contexts)
        assert outside / total == pytest.approx(row.activity)
        assert abs(outside / total - activity) <= 1.001 / total + 2 * SLACK * activity


def test_stops_are_suggested_where_stops_were_recorded():
    """Over the strata of the recorded stop; as options, YAML and Python."""
    recorded = recipes.fiberstop({"group": (0.1, 0.1), "trajectory": (0.1, 0.1)})
    found = suggest(Memory(steps(3), objective=recorded), activity=0.2)
    assert (found.recipe, set(found.budgets)) == ("fiberstop", {"group", "trajectory"})
    words = found.flags().split()
    budgets = [words[i + 1] for i, word in enumerate(words) if word == "--budget"]
    epsilon = float(words[words.index("--epsilon") + 1])
    parsed = objective_kwargs("fiberstop", budgets, epsilon, None, {})
    trained = make_config(None, yaml.safe_load(found.yaml())).build_objective()
    for objective in (recipes.fiberstop(**parsed), trained):
        assert objective.factors == made(found).factors
    gates = suggest(Memory(steps(3), objective=recorded), activity=0.2, stops=False)
    assert (gates.recipe, set(gates.budgets)) == ("fiberpo_domain", {"group", "trajectory"})
    assert found.as_dict()["drift"] == "own"
    print_suggestion(found, Console(file=io.StringIO()))


@pytest.mark.parametrize("objective", [None, recipes.grpo(), recipes.gspo()])
def test_stops_are_suggested_where_nothing_has_a_budget(objective):
    """For the method that the trainers have by default."""
    found = suggest(Memory(steps(3), objective=objective))
    assert (found.recipe, set(found.budgets)) == ("fiberstop", set(STRATA))


def test_the_printed_forms_are_the_same_objective():
    """YAML, options and Python say what the parameters say, to the last digit."""
    found = for_gates(Memory(steps(3)), activity=0.2, per_domain=True)
    config = yaml.safe_load(found.yaml())
    trained = make_config(None, config).build_objective()
    objective = made(found)
    assert trained.gate_map.gates == objective.gate_map.gates
    assert trained.gate_map.token == objective.gate_map.token
    words = found.flags().replace("'", "").split()
    budgets = [words[i + 1] for i, word in enumerate(words) if word == "--budget"]
    epsilon = float(words[words.index("--epsilon") + 1])
    assert words[:2] == ["--objective", "fiberpo_domain"]
    parsed = objective_kwargs("fiberpo_domain", budgets, epsilon, None, {})
    assert recipes.fiberpo_domain(**parsed).gate_map.gates == objective.gate_map.gates
    call = ast.parse(found.python(), mode="eval").body
    values = {k.arg: ast.literal_eval(k.value) for k in call.keywords}
    assert recipes.fiberpo_domain(**values).gate_map.gates == objective.gate_map.gates
    assert found.as_dict()["objective_kwargs"]["epsilon"] == found.epsilon


def test_one_budget_for_each_domain():
    """Named pairs at the domain, each at the share of its own contexts; the rest has one."""
    items = steps(20, groups=4, answers=2, length=8)
    found = for_gates(Memory(items), activity=0.25, per_domain=True)
    named = found.budgets["domain"]
    assert set(named) == {*DOMAINS, "*"}
    assert isinstance(found.budgets["group"], tuple)
    rows = replay(Memory(items), {"x": made(found)}).as_dict()["objectives"][0]["regimes"]
    for domain in DOMAINS:
        (row,) = [r for r in rows if (r["stratum"], r["domain"]) == ("domain", domain)]
        assert row["contexts"] == 20
        assert 1 - row["pass"] == pytest.approx(0.25, abs=0.05)


def test_quantiles_are_those_of_numpy():
    """p50, p90 and p99 of the residuals of both channels, over all steps that move."""
    items = steps(4)
    found = for_gates(Memory(items))
    objective = recipes.fiberpo_domain(dict.fromkeys(STRATA, (1.0, 1.0)), epsilon=1.0)
    at = objective(items[0].batch).gated.strata.level(1)
    residual = np.concatenate([objective(i.batch).gated.residual[:, at] for i in items], axis=1)
    (row,) = [r for r in found.rows if (r.stratum, r.domain) == ("group", None)]
    for mine, theirs in ((row.positive, residual[0]), (row.negative, residual[1])):
        for name, q in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99)):
            assert mine[name] == pytest.approx(np.quantile(np.abs(theirs), q))


def test_first_updates_are_left_out_and_said():
    """They hold no drift; with them the quantile would be too low."""
    items = steps(6, fresh_every=3)
    found, moved = for_gates(Memory(items)), [i for k, i in enumerate(items) if k % 3]
    assert (found.steps, found.excluded) == (4, 2)
    assert found.budgets == for_gates(Memory(moved)).budgets
    assert any("in 2 of 6 steps every log ratio is 0" in note for note in found.notes)
    assert for_gates(Memory(moved)).excluded == 0
    assert not any("first update" in note for note in for_gates(Memory(moved)).notes)


def test_nothing_moves():
    """One update per rollout: no drift, no budget."""
    with pytest.raises(FiberPOError, match="every log ratio is 0 in all 3"):
        for_gates(Memory(steps(3, fresh_every=1)))


def test_a_stratum_that_cannot_act_gets_no_budget():
    """One answer a group: the trajectory is the only child of its parent."""
    lonely = [RecordedStep(i, batch(i, groups=12, answers=1)) for i in range(4)]
    found = for_gates(Memory(lonely))
    assert set(found.budgets) == {"domain", "group"}
    assert any(n.startswith("trajectory: its gate cannot act") for n in found.notes)
    assert not any("cannot act" in n for n in for_gates(Memory(steps(4))).notes)


def test_few_that_can_act():
    """Where fewer can act than are to be gated, it says what is reached."""
    items = []
    for i in range(8):
        item = batch(i, groups=9, answers=1)
        labels = {"domain": [0] * 9, "group": [0, 0, 1, 2, 3, 4, 5, 6, 7]}
        step = RatioBatch.from_packed(
            item.log_probs, item.old_log_probs, item.advantages, item.lengths, labels=labels
        )
        items.append(RecordedStep(i, step))
    found = for_gates(Memory(items), activity=0.5)
    (row,) = [r for r in found.rows if r.stratum == "trajectory"]
    assert row.acting == 16
    assert row.contexts == 72
    assert row.activity == pytest.approx(8 / 72)
    assert any("only 16 of 72 contexts can act" in n for n in found.notes)


def test_few_contexts_are_said():
    """A quantile needs some contexts beyond it."""
    few = for_gates(Memory(steps(2)), activity=0.1)
    assert any(n.startswith("domain: 4 contexts") and "too few" in n for n in few.notes)
    many = for_gates(Memory(steps(60, groups=2, answers=2, length=6)), activity=0.1)
    assert not any("too few" in n for n in many.notes)


def test_aggregates_of_micro_batches_are_said():
    """The recorded run gated other drifts."""
    local = for_gates(Memory(steps(3), settings={"split_mode": "local"}))
    assert any("per micro-batch" in n for n in local.notes)
    exact = for_gates(Memory(steps(3), settings={"split_mode": "exact"}))
    assert not any("per micro-batch" in n for n in exact.notes)


def test_strata_are_those_of_the_run():
    """Of the recorded objective; of the caller; of the labels."""
    items = steps(3)
    plain = suggest(Memory(items, objective=recipes.fiberpo(pessimistic=True)))
    assert plain.recipe == "fiberpo"
    assert set(plain.budgets) == {"trajectory"}
    assert plain.parameters["pessimistic"]
    assert "--pessimistic" in plain.flags()
    assert set(for_gates(Memory(items), strata=["group", "trajectory"]).budgets) == set(STRATA[1:])
    assert set(for_gates(Memory(items, objective=recipes.grpo())).budgets) == set(STRATA)
    with pytest.raises(FiberPOError, match="continent"):
        for_gates(Memory(items), strata=["continent"])


@pytest.mark.parametrize("activity", [0.0, 1.0, -0.1, float("nan")])
def test_activity_is_a_share(activity):
    """Between 0 and 1."""
    with pytest.raises(FiberPOError, match="activity"):
        for_gates(Memory(steps(1)), activity=activity)


@given(
    arrays.arrays(
        float, st.tuples(st.just(2), st.integers(1, 40)), elements=st.floats(0, 2).map(
            lambda x: round(x, 1))
    ), st.floats(0.01, 0.99),
)  # fmt: skip
def test_budgets_of_drifts_with_ties(drift, activity):
    """As near to the target as a pair with C- <= C+ at one quantile comes; never beyond ties."""
    pair = budget_at(drift, activity)
    count = drift.shape[1]
    target = min(max(round(activity * count), 1), count)
    larger = np.sort(drift.max(0))
    if pair is None:
        assert larger[count - target] == 0
        return
    assert 0 < pair[1] <= pair[0]
    share = gated_share(drift, pair) * count
    # contexts that no budget can tell apart
    ties = max(int((drift == x).sum()) for x in np.unique(drift))
    assert abs(share - target) <= 1 + 2 * ties


def test_token_clip_is_symmetric():
    """Either channel saturates a token."""
    drift = np.array([[0.1, 0.0, 0.3, 0.0], [0.0, 0.2, 0.0, 0.4]])
    half = clip_at(drift, 0.5)
    assert 0.2 <= half < 0.3
    assert clip_at(np.zeros((2, 4)), 0.5) is None


def test_a_sample_stays_bounded():
    """Every second one goes, evenly; counts are of all."""
    sample = Sample(limit=100)
    values = np.arange(1000.0)
    for part in np.split(values, 50):
        sample.add(np.stack([part, part]), part.astype(int), len(part))
    drift, where = sample.values()
    assert sample.seen == sample.acting == 1000
    assert drift.shape[1] <= 100
    assert drift.shape[1] >= 50
    assert set(np.diff(drift[0])) == {drift[0][1] - drift[0][0]}
    assert where.tolist() == drift[0].astype(int).tolist()
    whole = Sample(limit=10_000)
    whole.add(np.stack([values, values]), values.astype(int), 1000)
    assert whole.values()[0].shape == (2, 1000)


def test_random_numbers_do_not_matter():
    """The same recording, the same suggestion."""
    torch.manual_seed(1)
    first = for_gates(Memory(steps(3)))
    torch.manual_seed(2)
    assert for_gates(Memory(steps(3)), workers=1).as_dict() == first.as_dict()


def test_an_option_is_as_short_as_its_number() -> None:
    """The digits that give the number again, no more."""
    found = Suggestion(
        0.1, 0.1, (), {"domain": (0.0085, 0.0085), "trajectory": (0.1, 0.07)}, 0.07, 1, 0, ()
    )
    assert "--budget domain=0.0085,0.0085 " in found.flags()
    assert found.flags().endswith("--epsilon 0.07")


def test_a_recording_without_tokens(tmp_path) -> None:
    path = tmp_path / "x.jsonl"
    row = {"step": 1, "log_probs": [], "old_log_probs": [], "advantages": 1.0}
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=r"x\.jsonl has no loss token"):
        suggest(open_recording(path))
