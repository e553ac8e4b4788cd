"""Operators on densities and forests in drifts, against the loops of the core oracle."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core import oracle
from core.cases import random_case, random_tree
from fiberpo import StrataError
from fiberpo.theory import operators as op
from fiberpo.theory.forest import Forest, domain_log_gated
from fiberpo.theory.gates import aggregate_gate, log_clip

seeds = st.integers(0, 10**6)
STRATA = ("domain", "group", "trajectory", "turn")
BUDGETS = {
    "domain": (0.06, 0.03),
    "group": (0.08, 0.05),
    "trajectory": (0.12, 0.05),
    "turn": (0.1, 0.06),
}
EPSILON = 0.04
DEPTHS = {
    1: ("trajectory",),
    2: ("group", "trajectory"),
    3: ("domain", "group", "trajectory"),
    4: STRATA,
}


def grown(case, strata=STRATA):
    """The oracle's forest and the same for the laboratory."""
    found = oracle.grow_forest(list(strata), case.lengths, case.labels)
    omega = oracle.measure_per_trajectory(case.lengths)
    parent = np.array([-1 if p is None else p for p in found.parent])
    budget = np.array([BUDGETS[s] for s in found.stratum]).T
    return found, Forest(parent, np.array(found.leaf), np.array(omega), budget, EPSILON)


def expected(case, found, log_ratios=None):
    omega = oracle.measure_per_trajectory(case.lengths)
    values = case.log_ratios if log_ratios is None else log_ratios
    return oracle.forest_log_gated_ratio(values, omega, found, lambda s, _: BUDGETS[s], EPSILON)


@pytest.mark.parametrize("tree", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_forest_is_the_sum_along_the_path(tree, seed):
    case = random_tree(seed) if tree else random_case(seed)
    found, forest = grown(case)
    ell = np.array(case.log_ratios)
    loops = expected(case, found)
    assert forest.log_gated(ell).tolist() == pytest.approx(loops, abs=1e-12)
    assert forest.log_gated_on_densities(ell).tolist() == pytest.approx(loops, abs=1e-12)
    drift, count = oracle.forest_aggregates(case.log_ratios, forest.measure.tolist(), found)
    assert pytest.approx(np.array(drift)) == forest.drifts(ell).T
    assert forest.count.tolist() == count


@pytest.mark.parametrize("tree", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_gradient_of_the_forest_is_central_differences(tree, seed):
    case = random_tree(seed) if tree else random_case(seed)
    found, forest = grown(case)
    factor = np.multiply(oracle.trajectory_mean(case.lengths), case.advantages)

    def value(point):
        return float(factor @ np.exp(expected(case, found, point)))

    slopes = oracle.central_differences(value, case.log_ratios)
    mine = forest.gradient(np.array(case.log_ratios), factor)
    assert mine == pytest.approx(slopes, abs=1e-6)


@given(seeds)
def test_domain_is_eqs_30_to_33(seed):
    case = random_case(seed)
    loops = oracle.domain_eqs30_33(
        case.trajectories(), case.labels["group"], case.labels["domain"], BUDGETS, EPSILON
    )
    rows = [np.array(row) for row in case.trajectories()]
    found = domain_log_gated(rows, case.labels["group"], case.labels["domain"], BUDGETS, EPSILON)
    assert found.tolist() == pytest.approx([x for row in loops for x in row], abs=1e-12)


@given(seeds)
def test_decompose_and_recover(seed):
    """Densities by hand, and back."""
    rng = np.random.default_rng(seed)
    ell, measure = rng.normal(size=5), rng.uniform(0.1, 1, 5)
    ell[0] = 0.0
    rho = op.decompose(ell, measure)
    for i, (x, m) in enumerate(zip(ell, measure)):
        assert rho[:, i].tolist() == pytest.approx([max(x, 0) * m, max(-x, 0) * m])
    assert op.recover(rho, measure) == pytest.approx(ell)


def test_bundle_by_hand():
    """Two base points of two tokens; base clips at 0.1, the fiber passes half.

    rho = (0.3, 0.1 | 0.05, 0.05), K = halves: pi rho = (0.4, 0.1), gated (0.1, 0.1).
    Residuals (0.1, -0.1 | 0, 0) halved: (0.05, -0.05). Sum: (0.1, 0, 0.05, 0.05).
    """
    parent = np.array([0, 0, 1, 1])
    kernel = op.mass_weighted(parent, np.ones(4))
    rho = np.array([[0.3, 0.1, 0.05, 0.05]])
    out = op.gate_bundle(rho, parent, kernel, lambda x: np.minimum(x, 0.1), lambda x: x / 2)
    assert out[0].tolist() == pytest.approx([0.1, 0.0, 0.05, 0.05])


def test_kernels_share_by_measure():
    """Measures (1, 3 | 2): shares 1/4, 3/4 and 1; the defect of halves is 0, of wholes 1."""
    parent = np.array([0, 0, 1])
    kernel = op.mass_weighted(parent, np.array([1.0, 3.0, 2.0]))
    assert kernel.tolist() == [[0.25, 0.0], [0.75, 0.0], [0.0, 1.0]]
    assert op.Fibration([parent], [kernel]).reflecting_defect() == 0
    wholes = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    assert op.Fibration([parent], [wholes]).reflecting_defect() == 1


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("seed", range(3))
def test_hierarchy_of_every_depth(depth, seed):
    """Chains: the operator with mass-weighted kernels is the sum along the path."""
    case, strata = random_case(seed), DEPTHS[depth]
    found, forest = grown(case, strata)
    leaf = np.array(found.leaf)
    labels = []
    for stratum in strata:
        path = [
            next(c for c in found.path(i) if found.stratum[c] == stratum) for i in range(len(leaf))
        ]
        labels.append(np.array(path))
    fibration = op.fibration_of(labels, forest.measure)
    masses = fibration.densities(forest.measure[None])
    counts = fibration.densities(np.ones((1, len(leaf))))
    gates = []
    for stratum, mass, count in zip(strata, masses, counts):
        budget = np.array(BUDGETS[stratum])[:, None]
        gates.append(
            op.per_measure(lambda x, c=budget, k=count[0]: aggregate_gate(x, c, k), mass[0])
        )
    gates.append(op.per_measure(lambda x: log_clip(x, EPSILON), forest.measure))
    rho = op.decompose(np.array(case.log_ratios), forest.measure)
    out = op.recover(op.gate_hierarchy(rho, fibration, gates), forest.measure)
    assert out.tolist() == pytest.approx(expected(case, found), abs=1e-12)
    assert fibration.reflecting_defect() < 1e-12


@given(seeds)
def test_any_kernel_cancels_while_gates_pass(seed):
    rng = np.random.default_rng(seed)
    parent, kernel = rng.integers(0, 3, 7), rng.normal(size=(7, 3))
    rho = rng.random((2, 7))
    out = op.gate_bundle(rho, parent, kernel, lambda x: x, lambda x: x)
    assert out == pytest.approx(rho)


def test_joint_condition_of_a_tree():
    """A root over a group of two tokens and a bare token: shares 2/3 and 1/3."""
    parent, leaf = np.array([-1, 0]), np.array([1, 1, 0])
    tree = op.tree_of(parent, leaf, np.ones(3))
    assert tree.share[1] == pytest.approx(2 / 3)
    assert tree.token_share.tolist() == pytest.approx([1 / 2, 1 / 2, 1 / 3])
    assert tree.joint_defect() < 1e-12
    edges = op.Tree(parent, leaf, np.ones(2), np.array([0.5, 0.5, 1.0]))
    assert edges.joint_defect() == pytest.approx(1.0)
    rho = np.array([[0.1, 0.1, 0.1]])
    total = []
    for one in (tree, edges):
        out = op.gate_tree(rho, one, lambda x: x * np.array([1.0, 0.0]), np.zeros_like)
        total.append(float(out.sum()))
    assert total == pytest.approx([0.3, 0.6])


def test_crossed_labels_are_refused():
    labels = [np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1])]
    message = r"context 0 of stratum 1 lies in two contexts of stratum 0: .*not a tree"
    with pytest.raises(StrataError, match=message):
        op.fibration_of(labels, np.ones(4))
