"""`BudgetStop` and the recipe `fiberstop`: scales by loops, edges by hand, exact over any cut."""

import dataclasses
import math
import pickle
import warnings

import jaxtyping
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fiberpo
from core import oracle
from core.cases import F64, fixed_budget, packed, random_case, random_tree, run_ranks, single
from core.test_exact import TORN, cut, in_pieces, step
from core.test_ranks import SPLITS, parts_of
from fiberpo import exact, recipes
from fiberpo.exact import Route, Stepper
from fiberpo.ops import dispatch
from fiberpo.stopping import STOP_BUDGETS
from fiberpo.stops import BudgetStop
from fiberpo.testing import PartitionError, assert_partition_invariant, simulate_ranks

inf = math.inf
WIDE, TIGHT = (inf, inf), (1e-9, 1e-9)
CHAIN = {"domain": (0.07, 0.05), "group": (0.09, 0.06), "trajectory": (0.13, 0.08)}
TURNS = {**CHAIN, "turn": (0.15, 0.1)}
NAMED = {
    "domain": {"0": (0.02, 0.01), "*": (inf, 0.05)},
    "group": {"0": (0.2, 0.1), "1": (0.05, 0.01), "2": (inf, inf), "3": (0.08, 0.08)},
}
OPEN = {"domain": (inf, 0.05), "trajectory": (0.1, 0.08)}

# name -> (budgets, epsilon, measure)
SETTINGS = {
    "chain": (CHAIN, (0.2, 0.2), "trajectory"),
    "chain, token measure": (CHAIN, (0.3, 0.15), "token"),
    "turns": (TURNS, (0.25, 0.2), "trajectory"),
    "turns, token measure": (TURNS, (inf, 0.2), "token"),
    "per context": (NAMED, (inf, inf), "trajectory"),
    "open sides": (OPEN, (0.15, inf), "trajectory"),
    "trajectory": ({"trajectory": (0.1, 0.06)}, (inf, inf), "trajectory"),
    "token": ({}, (0.1, 0.05), "trajectory"),
}
every = pytest.mark.parametrize("name", SETTINGS)


def make(name, **more):
    budgets, epsilon, measure = SETTINGS[name]
    return recipes.fiberstop(budgets, epsilon, measure=measure, **more)


def some_zero(case):
    """A fifth of the log ratios and of the advantages are 0."""
    case.log_ratios = [0.0 if i % 5 == 0 else x for i, x in enumerate(case.log_ratios)]
    case.advantages = [0.0 if i % 7 == 3 else a for i, a in enumerate(case.advantages)]
    return case


def budget_of(budgets):
    def of(stratum, name):
        given = budgets[stratum]
        return given.get(str(name), given.get("*")) if isinstance(given, dict) else given

    return of


def stopped_by(case, budgets, epsilon, measure):
    """Scale -> for every token whether that scale stops it; by loops."""
    omega = [1.0] * len(case.log_ratios)
    if measure == "trajectory":
        omega = oracle.measure_per_trajectory(case.lengths)
    found = {name: [False] * len(case.log_ratios) for name in [*budgets, "token"]}
    if budgets:
        forest = oracle.grow_forest(list(budgets), case.lengths, case.labels)
        drift, _ = oracle.forest_aggregates(case.log_ratios, omega, forest)
    for i, (x, a) in enumerate(zip(case.log_ratios, case.advantages)):
        if a == 0 or a * x < 0:
            continue
        channel = 0 if a > 0 else 1
        found["token"][i] = (x, -x)[channel] > epsilon[channel]
        for c in forest.path(i) if budgets else ():
            limit = budget_of(budgets)(forest.stratum[c], forest.name[c])
            found[forest.stratum[c]][i] |= drift[c][channel] > limit[channel]
    return found


def kept_by(case, *settings):
    rows = stopped_by(case, *settings).values()
    return [0.0 if any(column) else 1.0 for column in zip(*rows)]


@every
@pytest.mark.parametrize("grow", [random_case, random_tree])
def test_every_scale_is_the_loop(name, grow):
    """Chains and trees whose branches differ in depth; tokens with ``l = 0`` and ``A = 0``."""
    budgets, epsilon, measure = SETTINGS[name]
    if grow is random_tree and name in ("per context", "open sides"):
        budgets = {**budgets, "trajectory": (0.13, 0.08)}
    for seed in range(4):
        case = some_zero(grow(seed))
        objective = recipes.fiberstop(budgets, epsilon, measure=measure)
        expected = stopped_by(case, budgets, epsilon, measure)
        out = objective(case.batch())
        assert {n: t.tolist() for n, t in out.stopped[0].tokens.items()} == expected
        kept = kept_by(case, budgets, epsilon, measure)
        assert objective.factors[0](case.batch()).tolist() == kept
        mu = oracle.trajectory_mean(case.lengths)
        assert (
            out.coefficients.tolist()
            == np.multiply(mu, np.multiply(case.advantages, kept)).tolist()
        )
        for scale, tokens in expected.items():
            assert out.metrics()[f"stop/{scale}"] == pytest.approx(np.mean(tokens))
        lost = np.mean([k == 0 for k in kept])
        assert out.metrics()["gate/left_out"] == pytest.approx(lost)


@every
def test_every_scale_of_the_cases_above_stops_something(name):
    """And none stops all."""
    budgets, epsilon, measure = SETTINGS[name]
    cases = [some_zero(random_case(seed)) for seed in range(4)]
    found = [stopped_by(case, budgets, epsilon, measure) for case in cases]
    for scale in found[0]:
        tokens = [t for part in found for t in part[scale]]
        assert not all(tokens)
        assert any(tokens) or (scale == "token" and min(epsilon) == inf)


def test_the_loss_and_the_gradient_that_reaches_the_log_probs():
    """``-J`` and ``-mu A M``."""
    case = random_case(1)
    batch = case.batch(grad=True)
    out = make("chain")(batch)
    out.loss.backward()
    weight = np.multiply(oracle.trajectory_mean(case.lengths), case.advantages)
    expected = weight * kept_by(case, *SETTINGS["chain"])
    assert batch.log_probs.grad.tolist() == pytest.approx((-expected).tolist(), abs=1e-17)
    assert out.loss.item() == pytest.approx(-float(expected @ np.array(case.log_ratios)))


# ------------------------------------------------------------------------------- edges, by hand


def by_every_backend(objective, batch):
    """Coefficients; all backends at hand agree to the last bit."""
    first, *others = (
        objective(batch, backend=name).coefficients
        for name in ("reference", "torch", "cpu", "triton")
        if name == "reference" or served(name)
    )
    assert others
    for other in others:
        assert other.tolist() == first.tolist()
    return first


def kept(log_ratios, advantage, budgets, epsilon=inf):
    return by_every_backend(
        recipes.fiberstop(budgets, epsilon), packed(log_ratios, [advantage], [len(log_ratios)])
    )


def test_a_drift_of_exactly_the_budget_passes():
    """0.25 and 0.5 have a mean of 0.375; a budget just below it stops both."""
    below = math.nextafter(0.375, 0.0)
    assert (kept([0.25, 0.5], 1.0, {"trajectory": (0.375, 0.1)}) > 0).tolist() == [True, True]
    assert (kept([0.25, 0.5], 1.0, {"trajectory": (below, 0.1)}) > 0).tolist() == [False, False]
    assert (kept([-0.25, -0.5], -1.0, {"trajectory": (1.0, 0.375)}) < 0).all()
    assert (kept([-0.25, -0.5], -1.0, {"trajectory": (1.0, below)}) == 0).all()


def test_a_token_at_exactly_epsilon_passes():
    above = kept([0.25, 0.2500001, -0.75], 1.0, {}, (0.25, 0.5))
    assert (above > 0).tolist() == [True, False, True]
    below = kept([-0.5, -0.5000001, 0.75], -1.0, {}, (0.25, 0.5))
    assert (below < 0).tolist() == [True, False, True]


def test_what_comes_back_is_never_stopped():
    """Both channels far out of every budget: only the outward half goes."""
    ell = [0.9, -0.9, 0.8, -0.8]
    assert (kept(ell, 1.0, {"trajectory": TIGHT}, 0.1) > 0).tolist() == [False, True, False, True]
    assert (kept(ell, -1.0, {"trajectory": TIGHT}, 0.1) < 0).tolist() == [True, False, True, False]


def test_the_channel_is_that_of_the_advantage():
    """S+ out of budget says nothing to a token that is pushed down, and the reverse."""
    ell = [0.9, 0.0]
    assert (kept(ell, -1.0, {"trajectory": TIGHT}) < 0).all()
    assert (kept(ell, 1.0, {"trajectory": TIGHT}) == 0).all()
    assert (kept([-0.9, 0.0], 1.0, {"trajectory": TIGHT}) > 0).all()
    assert (kept([-0.9, 0.0], -1.0, {"trajectory": TIGHT}) == 0).all()


def test_a_token_that_has_not_moved_is_stopped_with_its_context():
    """``l = 0`` goes outward in either direction."""
    batch = packed([0.0, 0.4, 0.0], [1.0, 1.0, -1.0], [3])
    found = by_every_backend(recipes.fiberstop({"trajectory": (0.1, 0.1)}, inf), batch)
    assert (found == 0).tolist() == [True, True, False]


def test_no_advantage_no_stop():
    """It counts in the drift, and as no stopped token."""
    out = recipes.fiberstop({"trajectory": TIGHT}, 0.1)(packed([0.9, 0.9], [0.0, 1.0], [2]))
    assert out.stopped[0].tokens["trajectory"].tolist() == [False, True]
    assert out.stopped[0].tokens["token"].tolist() == [False, True]
    assert out.metrics()["gate/left_out"] == 0.5


def test_one_scale_is_enough():
    """The group is out of its budget, its second trajectory and all of its tokens are not."""
    batch = packed([0.4, 0.4, 0.0], [1.0, 1.0], [2, 1], labels={"group": ["g", "g"]})
    budgets = {"group": (0.1, 0.1), "trajectory": (0.5, 0.5)}
    assert by_every_backend(recipes.fiberstop(budgets, 0.5), batch).tolist() == [0.0] * 3
    down = packed([-0.4, -0.4, 0.0], [-1.0, -1.0], [2, 1], labels={"group": ["g", "g"]})
    assert by_every_backend(recipes.fiberstop(budgets, 0.5), down).tolist() == [0.0] * 3
    out = recipes.fiberstop(budgets, 0.5)(batch)
    metrics = out.metrics()
    assert [metrics[f"stop/{s}"] for s in ("group", "trajectory", "token")] == [1.0, 0.0, 0.0]
    assert metrics["gate/active"] == 0
    shares = [metrics[f"gate/{s}/zeroed_frac"] for s in ("group", "trajectory", "token")]
    assert shares == [1.0, 0.0, 0.0]
    assert metrics["gate/group/drift_pos/max"] == pytest.approx(0.2)
    assert metrics["gate/trajectory/drift_pos/max"] == pytest.approx(0.4)


def test_overflowing_ratios_do_no_harm():
    """``r = inf`` on a stopped token, on one that comes back, and without an advantage."""
    batch = packed([900.0, 900.0, 900.0], [1.0, -1.0, 0.0], [1, 1, 1])
    out = recipes.fiberstop({"trajectory": (0.1, 0.1)})(batch)
    assert out.coefficients.tolist() == pytest.approx([0.0, -1 / 3, 0.0])
    assert math.isfinite(out.loss.item())


# ------------------------------------------------------------------------------- properties

seeds = st.integers(0, 10**6)


@every
def test_on_policy_nothing_is_stopped(name):
    """``mu A``, at every depth."""
    case = random_case(3)
    case.log_ratios = [0.0] * len(case.log_ratios)
    out = make(name)(case.batch())
    expected = np.multiply(oracle.trajectory_mean(case.lengths), case.advantages)
    assert out.coefficients.tolist() == expected.tolist()
    assert out.metrics()["gate/left_out"] == 0


@given(seeds, st.sampled_from(list(SETTINGS)))
@settings(max_examples=25)
def test_small_drifts_are_not_stopped(seed, name):
    """Every aggregate is at most the largest drift of a token, so below it nothing happens."""
    case = random_case(seed)
    size = 0.009 / max(map(abs, case.log_ratios))  # the smallest budget above is 0.01
    case.log_ratios = [size * x for x in case.log_ratios]
    expected = np.multiply(oracle.trajectory_mean(case.lengths), case.advantages)
    assert make(name)(case.batch()).coefficients.tolist() == expected.tolist()


@given(seeds, st.floats(1.0, 5.0), st.floats(1.0, 5.0))
@settings(max_examples=20)
def test_larger_budgets_never_stop_more(seed, wider, further):
    """Scale by scale."""
    case = some_zero(random_case(seed))
    budgets = {name: (wider * pair[0], wider * pair[1]) for name, pair in CHAIN.items()}
    narrow = BudgetStop(CHAIN, (0.2, 0.1)).stopped(case.batch()).tokens
    wide = BudgetStop(budgets, (0.2 * further, 0.1 * further)).stopped(case.batch()).tokens
    for name, tokens in wide.items():
        assert not bool((tokens & ~narrow[name]).any())


@given(seeds, st.floats(0.01, 100.0))
@settings(max_examples=20)
def test_only_signs_of_advantages_matter(seed, factor):
    """Scaling A scales the gradient."""
    case = some_zero(random_case(seed))
    one = make("chain")(case.batch())
    case.advantages = [factor * a for a in case.advantages]
    other = make("chain")(case.batch())
    assert torch.allclose(other.coefficients, factor * one.coefficients, rtol=1e-13, atol=0)
    assert torch.equal(other.coefficients == 0, one.coefficients == 0)


def test_without_budgets_it_is_the_policy_gradient():
    case = random_case(4)
    expected = np.multiply(oracle.trajectory_mean(case.lengths), case.advantages)
    for objective in (
        recipes.fiberstop({}, inf),
        recipes.fiberstop(dict.fromkeys(CHAIN, WIDE), inf),
    ):
        assert objective(case.batch()).coefficients.tolist() == expected.tolist()


def test_with_epsilon_alone_it_is_a_token_mask_in_the_log_ratio():
    """As DPPO, whose mask looks at probabilities: ``A l > 0`` and ``|l| > epsilon``."""
    case = random_case(5)
    ell, a = np.array(case.log_ratios), np.array(case.advantages)
    out = recipes.fiberstop({}, 0.1)(case.batch())
    assert (out.coefficients == 0).tolist() == ((a * ell > 0) & (np.abs(ell) > 0.1)).tolist()


@pytest.mark.parametrize("weights", ["token_mean", "group_mean"])
def test_weights_are_not_renormalised(weights):
    case = random_case(6)
    mu = fiberpo.Weights.parse(weights)(case.batch())
    out = make("chain", weights=weights)(case.batch())
    expected = mu.numpy() * np.multiply(case.advantages, kept_by(case, *SETTINGS["chain"]))
    assert out.coefficients.tolist() == pytest.approx(expected.tolist(), abs=1e-17)


def test_masks_multiply():
    """A trajectory that the mask drops still counts in the drift of its group."""
    ell = [0.4, 0.4, 0.0, 0.0]
    rollout = torch.tensor([3.0, 0.0, 0.0, 0.0], dtype=F64)
    batch = packed(
        ell, [1.0, 1.0, -1.0], [1, 1, 2], labels={"group": [0, 0, 0]}, rollout_log_probs=rollout
    )
    mask = fiberpo.MaxDivergence(0.5)
    out = recipes.fiberstop({"group": (0.2, 0.2)}, inf, mask=mask)(batch)
    assert out.kept.tolist() == [False, True, True]
    assert (out.coefficients == 0).tolist() == [True, True, False, False]
    alone = recipes.fiberstop({"group": (0.3, 0.2)}, inf, mask=mask)(batch)
    assert (alone.coefficients == 0).tolist() == [True, False, False, False]
    assert {"mask/kept", "stop/group", "gate/left_out"} <= set(alone.metrics())


# ------------------------------------------------------------------------------- exactness


@every
@pytest.mark.parametrize("split", [False, True], ids=["whole", "pieces"])
def test_partition_invariant(name, split):
    """Micro-batches, ranks, pieces of trajectories; loss, coefficients and metrics."""
    batch = some_zero(random_case(7)).batch()
    assert_partition_invariant(make(name), batch, trials=3, split_trajectories=split, rtol=1e-9)


@given(seeds)
@settings(max_examples=10)
def test_trees_survive_any_cut(seed):
    batch = random_tree(seed).batch()
    assert_partition_invariant(
        make("turns"), batch, trials=1, seed=seed, split_trajectories=True, rtol=1e-9
    )


def test_contexts_matched_on_one_rank_alone_are_found(monkeypatch):
    original = BudgetStop.lay_out
    monkeypatch.setattr(BudgetStop, "lay_out", lambda self, batch, *_: original(self, batch))
    with pytest.raises(PartitionError):
        assert_partition_invariant(make("chain"), random_case(7).batch())


def test_micro_batches_take_two_phases():
    """Torn groups; statistics too."""
    batch, objective = random_case(1).batch(), make("chain")
    whole = objective(batch)
    parts, tokens = cut(batch, TORN)
    window, found = step(Stepper(objective), parts)
    assert window.route is Route.TWO_PHASE
    for got, at in zip(found, tokens):
        assert torch.equal(got, whole.coefficients[at])
    assert window.statistics.compute() == pytest.approx(whole.metrics(), rel=1e-9, abs=1e-12)


def test_trajectory_stops_are_contained():
    """One pass, no reduction."""
    batch, objective = random_case(1).batch(), make("trajectory")
    parts, tokens = cut(batch, TORN)
    window, found = step(Stepper(objective), parts)
    assert window.route is Route.CONTAINED
    whole = objective(batch).coefficients
    for got, at in zip(found, tokens):
        assert torch.equal(got, whole[at])
    by_row = exact.by_trajectory(objective, batch)
    assert torch.equal(by_row(batch.log_probs, slice(0, len(batch))), whole)
    with pytest.raises(
        fiberpo.ObjectiveError, match=r"couples trajectories by \['domain', 'group'"
    ):
        exact.by_trajectory(make("chain"), batch)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(("rank_of", "ranks"), SPLITS.values(), ids=SPLITS)
def test_ranks_together_are_one_process(rank_of, ranks, backend):
    """Also the statistics, which no rank has to read with the others."""
    case = random_case(1)
    whole = make("turns")(case.batch())
    parts = parts_of(case, rank_of, ranks)
    outs = run_ranks(make("turns"), [batch for batch, _ in parts], backend=backend)
    for out, (_, tokens) in zip(outs, parts):
        assert out.coefficients.tolist() == whole.coefficients[tokens].tolist()
    merged = outs[0].statistics
    for out in outs[1:]:
        merged = merged.merge(out.statistics)
    assert merged.compute() == pytest.approx(whole.metrics(), rel=1e-9, abs=1e-12)


def test_one_reduction_a_step_of_shared_contexts_alone():
    """No adjoints: the stop has no gradient."""
    batches = [batch for batch, _ in parts_of(random_case(1), SPLITS["two ranks"][0], 2)]

    def work(batch, ranks):
        objective = make("chain")
        plan = objective.plan(batch, collective=ranks)
        calls, sent = ranks.calls, ranks.sent
        objective(batch, plan=plan).metrics()
        return ranks.calls - calls, ranks.sent - sent

    # 2 channels in float64 of the 2 domains and 3 of the 4 groups
    assert simulate_ranks(work, batches) == [(1, 2 * 5 * 8)] * 2


def test_pieces_of_trajectories_on_two_ranks():
    case = random_case(3)
    whole = make("turns")(case.batch())
    pieces = in_pieces(case)

    def work(batch, ranks):
        stepper = Stepper(make("turns"), collective=ranks, gradients="summed")
        return step(stepper, [batch])[1][0]

    for found, (_, at) in zip(simulate_ranks(work, [batch for batch, _ in pieces]), pieces):
        assert found.tolist() == whole.coefficients[at].tolist()


def local_coefficients(objective, parts):
    """Each part's own aggregates, and the weights of the whole."""
    mu = objective.weights(fiberpo.RatioBatch.concatenate(parts)).split([len(p) for p in parts])
    return [m * p.advantages * objective.factors[0](p) for m, p in zip(mu, parts)]


def test_the_cheaper_modes():
    """Local: each part's own drifts. Stale: once seen, those of the window before."""
    batch, objective = random_case(1).batch(), make("chain")
    parts, tokens = cut(batch, TORN)
    window, found = step(Stepper(objective, mode="local", check_every=1), parts)
    assert window.route is Route.LOCAL
    for got, want in zip(found, local_coefficients(objective, parts)):
        assert torch.equal(got, want)
    assert float(window.split_error()) > 0
    stepper = Stepper(objective, mode="stale")
    first, found = step(stepper, parts)
    assert first.route is Route.STALE
    for got, want in zip(found, local_coefficients(objective, parts)):
        assert torch.equal(got, want)
    first.statistics.compute()  # looked at after the window, and not at all in others
    for _ in range(2):  # the same tokens once more: the sums of the window before are their own
        _, found = step(stepper, parts)
        whole = objective(batch).coefficients
        for got, at in zip(found, tokens):
            assert torch.equal(got, whole[at])


def test_gates_and_stops_on_the_same_strata_are_remembered_apart():
    """In the mode "stale" too: two forests of one name, each with sums of its own."""
    gates = recipes.fiberpo_domain(CHAIN, measure="token", rollback=2.0)
    both = dataclasses.replace(gates, factors=(BudgetStop(CHAIN, (0.3, 0.3)),))
    assert both.strata == ("domain", "group", "trajectory")
    batch = random_case(1).batch()
    whole, alone = both(batch), gates(batch)
    stop = both.factors[0]
    out = gates.gate_map(batch).pullback(gates.weights(batch) * stop(batch) * batch.advantages)
    torch.testing.assert_close(whole.coefficients, out)
    assert whole.metrics()["gate/group/zeroed_frac"] == alone.metrics()["gate/group/zeroed_frac"]
    assert_partition_invariant(both, batch, trials=3, rtol=1e-9)
    parts, tokens = cut(batch, TORN)
    stepper = Stepper(both, mode="stale")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fiberpo.FiberPOWarning)
        # drifts of the second window are those of the first, adjoints of the third of the second
        _, found = [step(stepper, parts) for _ in range(3)][-1]
    for got, at in zip(found, tokens):
        torch.testing.assert_close(got, whole.coefficients[at], rtol=1e-9, atol=1e-14)


def test_a_part_is_refused_where_contexts_reach_beyond_it():
    case = random_case(1)
    counts = fiberpo.Denominators.of(case.batch())
    batch, _ = parts_of(case, SPLITS["two ranks"][0], 2)[0]
    with pytest.raises(fiberpo.ObjectiveError, match=r"contexts of \['domain', 'group'\]"):
        make("chain")(batch, denominators=counts)
    assert torch.isfinite(make("trajectory")(batch, denominators=counts).loss)
    piece = packed([0.1], [1.0], [1], labels={"trajectory": ["a"]})
    with pytest.raises(fiberpo.ObjectiveError, match=r"\['trajectory'"):
        make("trajectory")(piece, denominators=fiberpo.Denominators(4, 1))


# ------------------------------------------------------------------------------- engine


def served(name):
    batch = packed([0.1], [1.0], [1])
    plan = make("token").plan(batch)
    return not dispatch.unsupported(name, plan.lowered, batch.log_probs)


@every
@pytest.mark.parametrize("backend", ["cpu", "torch", "triton"])
def test_backends_agree_with_the_gate_classes(name, backend):
    if not served(backend):
        pytest.skip(f"{backend} is not at hand")
    case = some_zero(random_case(8))
    expected = make(name)(case.batch(), backend="reference")
    found = make(name)(case.batch(), backend=backend)
    torch.testing.assert_close(found.coefficients, expected.coefficients, rtol=1e-12, atol=0)
    assert torch.equal(found.coefficients == 0, expected.coefficients == 0)
    assert found.loss.item() == pytest.approx(expected.loss.item(), rel=1e-12)
    assert found.metrics() == pytest.approx(expected.metrics(), rel=1e-9, abs=1e-12)


def test_closed_form_is_autograd():
    leaf = random_case(2).batch(grad=True)
    out = make("turns")(leaf, gradient="autograd")
    out.loss.backward()
    torch.testing.assert_close(out.coefficients, -leaf.log_probs.grad)


def test_a_plan_serves_its_own_objective():
    """It carries budgets; those of another objective would be ignored."""
    batch = random_case(2).batch()
    plan = make("chain").plan(batch)
    with pytest.raises(fiberpo.ObjectiveError, match="another objective than this fiberstop"):
        make("chain")(batch, plan=plan)
    with pytest.raises(fiberpo.ObjectiveError, match="another objective than this grpo"):
        recipes.grpo()(batch, plan=recipes.grpo().plan(batch))


def test_log_ratios_are_exact_differences():
    """0.19999999925 in float64, 0.20000000298 in float32; the reverse with an old log-prob that no
    float32 is."""
    new = torch.tensor([-0.06148456409573555])
    batch = fiberpo.RatioBatch.from_packed(
        new, torch.tensor([-0.2614845633506775]), torch.ones(1), [1]
    )
    assert new.dtype == torch.float32
    assert by_every_backend(recipes.fiberstop({}, 0.2), batch).tolist() == [1.0]
    out = recipes.fiberstop({}, 0.2)(batch)
    assert out.scale.tolist() == [1.0]
    assert out.metrics()["stop/token"] == 0
    old = torch.tensor([-0.8 + 5e-9], dtype=F64)
    mixed = fiberpo.RatioBatch.from_packed(torch.tensor([-0.5]), old, torch.ones(1), [1])
    assert by_every_backend(recipes.fiberstop({}, 0.3), mixed).tolist() == [1.0]
    assert recipes.fiberstop({}, 0.3)(mixed).gradient.dtype == torch.float32


def test_float32_log_probs():
    """Drifts are summed in float64 whatever the log-probs are."""
    case = random_case(9)
    batch = case.batch()
    low = dataclasses.replace(
        batch, log_probs=batch.log_probs.float(), old_log_probs=batch.old_log_probs.float()
    )
    found = make("chain")(low)
    assert found.gradient.dtype == torch.float32
    assert found.stopped[0].mean.dtype == F64
    torch.testing.assert_close(
        found.coefficients, make("chain")(batch).coefficients, atol=1e-8, rtol=1e-6
    )


def test_objectives_travel_between_processes():
    again = pickle.loads(pickle.dumps(make("per context")))
    batch = random_case(1).batch()
    assert torch.equal(again(batch).coefficients, make("per context")(batch).coefficients)
    assert again.factors == make("per context").factors
    assert str(again) == str(make("per context"))


def test_an_only_child_is_nothing_to_warn_of():
    """Its residual is 0, its drift is not: the stop acts (warnings are errors here)."""
    labels = {"domain": ["d"], "group": ["g"]}
    out = recipes.fiberstop()(packed([0.3, 0.3], [1.0], [2], labels=labels))
    assert out.coefficients.tolist() == [0.0, 0.0]


def test_defaults():
    objective = recipes.fiberstop()
    assert objective.strata == ("domain", "group", "trajectory")
    assert objective.factors[0].epsilon == (0.2, 0.2)
    assert fixed_budget(STOP_BUDGETS)("group", "any") == (0.06, 0.06)
    listed = recipes.fiberstop({"trajectory": [0.1, 0.1], "domain": [0.2, 0.2]}, [0.1, 0.3])
    assert listed.strata == ("domain", "trajectory")
    assert listed.factors[0].epsilon == (0.1, 0.3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"budgets": (0.1, 0.1)}, fiberpo.StrataError, r"budgets is \(0.1, 0.1\); it maps"),
        ({"budgets": {"group": 0.1}}, fiberpo.BudgetError, "budget is 0.1; a budget is a pair"),
        ({"budgets": {"group": (0.0, 0.1)}}, fiberpo.BudgetError, "positive channel.*must be > 0"),
        ({"budgets": {"group": {}}}, fiberpo.BudgetError, "empty mapping"),
        ({"epsilon": 0.0}, fiberpo.BudgetError, "epsilon is 0.0; it must be > 0"),
        ({"epsilon": -0.1}, fiberpo.BudgetError, "epsilon is -0.1"),
        ({"epsilon": math.nan}, fiberpo.BudgetError, "epsilon is nan; it must be a number"),
        ({"epsilon": None}, fiberpo.BudgetError, "epsilon is None; it must be a number"),
        ({"epsilon": (0.1, 0.0)}, fiberpo.BudgetError, "epsilon is 0.0"),
        ({"epsilon": "ab"}, fiberpo.ObjectiveError, "epsilon is 'ab'; it is a number or"),
        ({"epsilon": (0.1, 0.2, 0.3)}, fiberpo.ObjectiveError, "a number or a pair"),
        ({"measure": "row"}, fiberpo.ObjectiveError, "measure is 'row'; it is"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore::fiberpo.FiberPOWarning")
def test_arguments_that_are_refused(monkeypatch, arguments, error, message):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # types that are wrong too
    with pytest.raises(error, match=message):
        recipes.fiberstop(**arguments)


def test_a_factor_takes_a_pair():
    for epsilon in ((0.1,), (0.1, 0.2, 0.3)):
        with pytest.raises(fiberpo.ObjectiveError, match="it is a number or a pair"):
            BudgetStop({}, epsilon)


def test_what_a_batch_lacks_is_named():
    with pytest.raises(fiberpo.StrataError, match='the stratum "domain"'):
        recipes.fiberstop()(single([0.1, 0.2]))
    named = recipes.fiberstop({"group": {"a": (0.1, 0.1)}})
    with pytest.raises(fiberpo.BudgetError, match='no budget for the group "b"'):
        named(packed([0.1], [1.0], [1], labels={"group": ["b"]}))
