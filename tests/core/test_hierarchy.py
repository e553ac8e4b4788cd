"""The hierarchy at any depth and in trees: Defs. 6.1 to 6.4, Eqs. 26-33, Remark 6.5, App. E.7."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fiberpo
from core import oracle
from core.cases import Case, hierarchy_oracle, packed, random_case, random_tree
from fiberpo.ops import reference

F64 = torch.float64
BUDGETS = {
    "domain": (0.06, 0.03),
    "group": (0.08, 0.05),
    "trajectory": (0.12, 0.05),
    "turn": (0.10, 0.06),
}
EPSILON = 0.04
DEPTHS = [
    ("trajectory",),
    ("group", "trajectory"),
    ("domain", "group", "trajectory"),
    ("domain", "group", "trajectory", "turn"),
    ("domain", "trajectory"),
    ("trajectory", "turn"),
    ("domain",),
    ("turn",),
]
TREE = ("domain", "group", "trajectory", "turn")
seeds = st.integers(0, 10**6)


def pick(strata):
    return {name: BUDGETS[name] for name in strata}


def domain(budgets=BUDGETS, epsilon=EPSILON, **more):
    return fiberpo.recipes.fiberpo_domain(budgets=budgets, epsilon=epsilon, **more)


def chain_or_tree(seed, strata, tree):
    return random_tree(seed) if tree else random_case(seed)


shapes = pytest.mark.parametrize(
    ("strata", "tree"),
    [(s, False) for s in DEPTHS] + [(TREE, True), (("domain", "group", "turn"), True)],
    ids=lambda v: "-".join(v) if isinstance(v, tuple) else ("tree" if v else "chain"),
)


@given(seeds, st.sampled_from([0.05, 0.2, 0.6]))
def test_three_strata_are_eqs_30_to_33(seed, scale):
    """FiberPO-Domain as the paper writes it: trajectories weigh equally, counts are of tokens."""
    case = random_case(seed, scale)
    budgets = pick(("domain", "group", "trajectory"))
    out = domain(budgets)(case.batch())
    expected = oracle.domain_eqs30_33(
        case.trajectories(), case.labels["group"], case.labels["domain"], budgets, EPSILON
    )
    flat = [x for row in expected for x in row]
    assert out.log_gated_ratio.tolist() == pytest.approx(flat, abs=1e-9)


@shapes
@pytest.mark.parametrize("measure", ["trajectory", "token"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_any_forest_is_the_sum_along_the_path(strata, tree, measure, seed):
    """``log base_i = sum over the path of g(S_c - S_parent)`` in both channels."""
    case = chain_or_tree(seed, strata, tree)
    out = domain(pick(strata), measure=measure)(case.batch())
    expected = hierarchy_oracle(case, pick(strata), EPSILON, measure)
    assert out.log_gated_ratio.tolist() == pytest.approx(expected, abs=1e-9)


@shapes
def test_on_policy_the_gradient_is_mu_times_a(strata, tree):
    """``l = 0`` gives ``G = 1`` and ``dJ/dl_i = mu_i A_i`` at every depth."""
    case = chain_or_tree(7, strata, tree)
    case.log_ratios = [0.0] * len(case.log_ratios)
    out = domain(pick(strata))(case.batch())
    mu = oracle.trajectory_mean(case.lengths)
    assert out.log_gated_ratio.abs().max() == 0
    expected = np.multiply(mu, case.advantages)
    assert out.coefficients.numpy() == pytest.approx(expected, abs=1e-15)


@shapes
def test_open_gates_telescope_to_the_identity(strata, tree):
    """Infinite budgets and an open token gate: the residuals add up to ``l``, ``G = r``."""
    case = chain_or_tree(8, strata, tree)
    out = fiberpo.open_gates(strata)(case.batch())
    assert out.log_gated_ratio.tolist() == pytest.approx(case.log_ratios, abs=1e-12)


@given(seeds)
def test_infinite_budgets_telescope_too(seed):
    """As above with ``AggregateGate(inf)`` at every stratum and a clip that cannot bind."""
    case = random_tree(seed)
    budgets = dict.fromkeys(BUDGETS, (math.inf, math.inf))
    out = domain(budgets, epsilon=100.0)(case.batch())
    assert out.log_gated_ratio.tolist() == pytest.approx(case.log_ratios, abs=1e-12)


def test_order_in_which_budgets_are_listed_does_not_matter():
    """Strata have their place by name."""
    batch = random_case(2).batch()
    here, there = domain(pick(TREE))(batch), domain(pick(TREE[::-1]))(batch)
    assert torch.equal(here.coefficients, there.coefficients)


@given(seeds, st.booleans())
def test_order_of_trajectories_does_not_matter(seed, tree):
    """A permutation of trajectories permutes values and coefficients."""
    case = random_tree(seed) if tree else random_case(seed)
    order = np.random.default_rng(seed).permutation(12)
    starts = np.cumsum([0, *case.lengths])
    tokens = np.concatenate([np.arange(starts[t], starts[t + 1]) for t in order])
    shuffled = Case(
        [case.log_ratios[i] for i in tokens],
        [case.advantages[i] for i in tokens],
        [case.lengths[t] for t in order],
        {
            "domain": [case.labels["domain"][t] for t in order],
            "group": [case.labels["group"][t] for t in order],
            "turn": [case.labels["turn"][i] for i in tokens],
        },
    )
    here, there = domain()(case.batch()), domain()(shuffled.batch())
    for mine, other in [
        (here.log_gated_ratio, there.log_gated_ratio),
        (here.coefficients, there.coefficients),
    ]:
        assert other.tolist() == pytest.approx(mine[tokens].tolist(), abs=1e-10)


@given(seeds, st.booleans())
def test_names_of_contexts_do_not_matter(seed, tree):
    """Other integers or strings for the same contexts change nothing."""
    case = random_tree(seed) if tree else random_case(seed)
    rng = np.random.default_rng(seed)
    codes = {name: rng.choice(10**9, 10, replace=False) for name in case.labels}
    renamed = {
        "domain": [None if d < 0 else f"d{codes['domain'][d]}" for d in case.labels["domain"]],
        "group": torch.tensor([-1 if g < 0 else codes["group"][g] for g in case.labels["group"]]),
        "turn": torch.tensor([-1 if t < 0 else codes["turn"][t] for t in case.labels["turn"]]),
    }
    batch = packed(case.log_ratios, case.advantages, case.lengths, labels=renamed)
    here, there = domain()(case.batch()), domain()(batch)
    expected = here.coefficients.tolist()
    assert there.coefficients.tolist() == pytest.approx(expected, abs=1e-10)
    assert there.log_gated_ratio.tolist() == pytest.approx(here.log_gated_ratio.tolist(), abs=1e-12)


def test_turn_ids_are_local_to_their_trajectory():
    """Turn 0 of two trajectories are two contexts: each has its own aggregate."""
    ell, lengths = [0.08, 0.0, 0.02, 0.0], [2, 2]
    batch = packed(ell, [1.0] * 4, lengths, labels={"turn": torch.tensor([0, 1, 0, 1])})
    out = domain({"turn": (0.05, 0.05)}, epsilon=1.0)(batch)
    assert out.regimes["turn"][0].tolist() == [1, 0, 0, 0]  # 0.08 of (0.05, 0.10): rolls back
    assert out.log_gated_ratio.tolist() == pytest.approx([0.02, 0.0, 0.02, 0.0])


@pytest.mark.parametrize("tree", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_density_operator_is_the_engine_in_value_and_gradient(tree, seed):
    """The operator of Defs. 6.1, 6.2 on densities, differentiated by autograd."""
    case = random_tree(seed) if tree else random_case(seed)
    found = oracle.grow_forest(TREE, case.lengths, case.labels)
    omega = torch.tensor(oracle.measure_per_trajectory(case.lengths), dtype=F64)
    forest = reference.Forest([-1 if p is None else p for p in found.parent], found.leaf, omega)
    count = forest.incidence().sum(1)
    limits = torch.tensor([BUDGETS[s] for s in found.stratum], dtype=F64)
    ell = torch.tensor(case.log_ratios, dtype=F64, requires_grad=True)
    gated = reference.hierarchy(
        reference.decompose_signed(ell, omega),
        forest,
        lambda c, x: fiberpo.aggregate_gate(x, limits[c], count[c]).value,
        lambda x: fiberpo.gates.log_clip(x, EPSILON).value,
    )
    log_g = reference.recover_signed(gated, omega)
    out = domain()(case.batch())
    assert out.log_gated_ratio.tolist() == pytest.approx(log_g.tolist(), abs=1e-10)
    (log_g.exp() * out.weight).sum().backward()
    assert out.coefficients.tolist() == pytest.approx(ell.grad.tolist(), rel=1e-8, abs=1e-10)
    regimes = torch.cat([out.regimes[name].flatten() for name in TREE])
    assert set(regimes.tolist()) >= {0, 2}  # the case is not one where all gates are open


@pytest.mark.parametrize("tree", [False, True])
@pytest.mark.parametrize("measure", ["trajectory", "token"])
def test_reflecting_condition_at_every_stratum(tree, measure):
    """``pi_* K = id``: what is reflected to the tokens of a context sums up to its density."""
    case = random_tree(4) if tree else random_case(4)
    found = oracle.grow_forest(TREE, case.lengths, case.labels)
    omega = oracle.measure_per_trajectory(case.lengths)
    omega = omega if measure == "trajectory" else [1.0] * len(omega)
    forest = reference.Forest(
        [-1 if p is None else p for p in found.parent], found.leaf, torch.tensor(omega, dtype=F64)
    )
    back = forest.push_forward(forest.reflect_to_tokens())  # [from context, to context]
    assert back.diagonal().tolist() == pytest.approx([1.0] * len(found.parent))


def test_joint_reflecting_condition_in_a_tree():
    """The shares of all children of a context sum to 1, whatever their strata (Remark 6.5)."""
    case = random_tree(5)
    found = oracle.grow_forest(TREE, case.lengths, case.labels)
    omega = torch.tensor(oracle.measure_per_trajectory(case.lengths), dtype=F64)
    parents = [-1 if p is None else p for p in found.parent]
    shares = reference.Forest(parents, found.leaf, omega).reflect_to_children()
    inner = sorted(set(parents) - {-1})
    assert shares.sum(0)[inner].tolist() == pytest.approx([1.0] * len(inner))
    assert len({found.stratum[c] for c in inner}) == 3  # domains, groups, trajectories


@pytest.mark.parametrize("kept", TREE)
@pytest.mark.parametrize("tree", [False, True])
def test_engine_reflects_a_stratum_without_loss(kept, tree):
    """One gate open, all others zero: each context receives exactly its own residual drift.

    The mean of ``log G`` over a context of that stratum, in the measure, is its drift minus the
    share of its parent.
    """
    case = random_tree(6) if tree else random_case(6)
    gates = {name: fiberpo.Pass() if name == kept else fiberpo.Zero() for name in TREE}
    out = fiberpo.GateMap(fiberpo.SignedLog(), gates, fiberpo.Zero())(case.batch())
    forest = oracle.grow_forest(TREE, case.lengths, case.labels)
    omega = oracle.measure_per_trajectory(case.lengths)
    net = [p - m for p, m in oracle.forest_aggregates(case.log_ratios, omega, forest)[0]]
    log_g = out.log_gated_ratio.tolist()
    seen = 0
    for c, stratum in enumerate(forest.stratum):
        if stratum != kept:
            continue
        inside = [i for i in range(len(log_g)) if c in forest.path(i)]
        mass = sum(omega[i] for i in inside)
        above = net[forest.parent[c]] if forest.parent[c] is not None else 0.0
        mean = sum(omega[i] * log_g[i] for i in inside) / mass
        assert mean == pytest.approx(net[c] - above, abs=1e-12)
        seen += 1
    assert seen >= 2


def full_jacobian(case, objective):
    batch = case.batch(grad=True)
    out = objective.gate_map(batch).log_gated_ratio
    rows = [torch.autograd.grad(g, batch.log_probs, retain_graph=True)[0] for g in out]
    return batch, torch.stack(rows)


def test_jacobian_is_block_diagonal_over_domains_only():
    """Above the trajectory the blocks are the roots: domains, not trajectories."""
    case = random_case(9)
    batch, full = full_jacobian(case, domain())
    at = torch.tensor(case.labels["domain"])[batch.trajectory]
    assert torch.all(full[at[:, None] != at[None, :]] == 0)
    other = batch.trajectory[:, None] != batch.trajectory[None, :]
    assert torch.any(full[other & (at[:, None] == at[None, :])] != 0)


def test_rollback_coupling_of_a_domain_is_minus_mean_length_over_length():
    """``d base / d l_j = -T_D / (|Tj(D)| T_tau)``: with lengths 1 and 5, -3 and -0.6.

    One domain alone: its gate rolls back at S = 0.13 (C = 0.12, k = 6, zone up to 0.14).
    """
    batch = packed(
        [0.13] * 6, [1.0] * 6, [1, 5], labels={"domain": torch.tensor([0, 0])}, grad=True
    )
    gates = {"domain": fiberpo.AggregateGate((0.12, 0.05)), "trajectory": fiberpo.Zero()}
    out = fiberpo.GateMap(fiberpo.SignedLog(), gates, fiberpo.Zero())(batch)
    (row,) = torch.autograd.grad(out.log_gated_ratio[0], batch.log_probs)
    assert row.tolist() == pytest.approx([-3.0] + [-0.6] * 5)


def test_aggregates_weigh_trajectories_equally_unless_told_otherwise():
    """Lengths 1 and 3, drifts 0.4 and 0: ``S_g`` is 0.2 by trajectories and 0.1 by tokens."""
    batch = packed([0.4, 0, 0, 0], [1.0] * 4, [1, 3], labels={"group": torch.tensor([0, 0])})
    found = {}
    for measure in ("trajectory", "token"):
        gates = {"group": fiberpo.Pass()}
        out = fiberpo.GateMap(fiberpo.SignedLog(), gates, fiberpo.Zero(), measure)(batch)
        found[measure] = out.log_gated_ratio[0].item()
    assert found == pytest.approx({"trajectory": 0.2, "token": 0.1})


def test_budgets_are_per_context_name():
    """The same drift passes in "math" and rolls back in "code"."""
    labels = {"domain": ["math", "math", "code", "code"]}
    ell = [0.10, 0.02] * 4
    batch = packed(ell, [1.0] * 8, [2, 2, 2, 2], labels=labels)
    named = {"math": (0.2, 0.1), "*": (0.05, 0.03)}
    out = domain({"domain": named, "trajectory": (0.2, 0.1)})(batch)
    assert out.regimes["domain"].tolist() == [[1, 0], [0, 0]]  # contexts sorted: code, math
    case = Case(ell, [1.0] * 8, [2, 2, 2, 2], {"domain": labels["domain"]})
    forest = oracle.grow_forest(("domain", "trajectory"), case.lengths, case.labels)

    def budget_of(stratum, name):
        return named.get(name, named["*"]) if stratum == "domain" else (0.2, 0.1)

    omega = oracle.measure_per_trajectory(case.lengths)
    expected = oracle.forest_log_gated_ratio(ell, omega, forest, budget_of, EPSILON)
    assert out.log_gated_ratio.tolist() == pytest.approx(expected, abs=1e-12)


def test_budget_missing_for_a_context_is_refused():
    """No ``"*"``: the message names the context and the remedy."""
    batch = packed([0.1, 0.1], [1.0] * 2, [1, 1], labels={"domain": ["math", "code"]})
    with pytest.raises(fiberpo.BudgetError, match=r'domain "code".*math.*"\*"'):
        domain({"domain": {"math": (0.2, 0.1)}})(batch)


def test_rollback_slope_can_be_set_per_stratum():
    """``rollback={"trajectory": 1}``: at S = 0.15, C = 0.12: ``2 * 0.12 - 0.15 = 0.09``."""
    out = domain({"trajectory": (0.12, 0.05)}, rollback={"trajectory": 1.0})(
        packed([0.15] * 4, [1.0] * 4, [4])
    )
    assert out.log_gated_ratio.tolist() == pytest.approx([0.09] * 4)


@pytest.mark.parametrize("depth", [2, 3])
def test_strata_of_single_children_warn(depth):
    """One trajectory a group (and one group a domain): correct, and its gate cannot act."""
    strata = ("domain", "group", "trajectory")[-depth:]
    labels = {"domain": torch.tensor([0, 1]), "group": torch.tensor([0, 1])}
    batch = packed([0.1, 0.1, 0.0], [1.0] * 3, [1, 2], labels=labels)
    with pytest.warns(fiberpo.FiberPOWarning, match="only child of its parent") as caught:
        domain(pick(strata))(batch)
    assert len(caught) == depth - 1
