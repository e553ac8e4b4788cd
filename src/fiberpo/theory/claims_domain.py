"""Claims on FiberPO-Domain and on trees (FiberPO, Def 6.4, Eqs. 30-33, Remark 6.5)."""

from __future__ import annotations

import math
import warnings

import numpy as np
import torch

from .. import recipes
from ..errors import FiberPOWarning
from ..objective import Objective
from . import operators as op
from .batches import Case, random_case
from .claims import Array, Claim, Finding, Indices, Verdict, judge
from .claims_operators import BUDGETS, EPSILON, on_densities
from .forest import Forest, domain_log_gated
from .trajectory import aggregates

CHAIN = ("domain", "group", "trajectory")


def engine(case: Case, strata: tuple[str, ...] = CHAIN) -> Objective:
    """The library's hierarchy over these strata."""
    return recipes.fiberpo_domain({name: BUDGETS[name] for name in strata}, EPSILON)


def forest_of(case: Case) -> tuple[Forest, Case]:
    """A tree whose branches differ in depth, and the same for the library.

    Domain 0 has groups and no turns, domain 1 turns and no groups.
    """
    text = case.labels["domain"] == 0
    group = np.where(text, case.labels["group"], -1)
    turn = np.where(text[case.trajectory], -1, case.labels["turn"])
    labelled = Case(
        case.log_ratio, case.advantage, case.lengths,
        {"domain": case.labels["domain"], "group": group, "turn": turn},
    )  # fmt: skip
    keys: dict[tuple[str, int, int], int] = {}
    parent: list[int] = []
    names: list[str] = []
    leaf = []
    for i, t in enumerate(case.trajectory):
        path = [("domain", int(case.labels["domain"][t]), 0)]
        path += [("group", int(group[t]), 0)] if group[t] >= 0 else []
        path += [("trajectory", int(t), 0)]
        path += [("turn", int(t), int(turn[i]))] if turn[i] >= 0 else []
        here = -1
        for key in path:
            if key not in keys:
                keys[key] = len(parent)
                parent.append(here)
                names.append(key[0])
            here = keys[key]
        leaf.append(here)
    budget = np.array([BUDGETS[name] for name in names]).T
    forest = Forest(np.array(parent), np.array(leaf), case.measure, budget, EPSILON)
    return forest, labelled


def printed(rng: np.random.Generator) -> Finding:
    """Eqs. 30-33 with loops, the operator at depth 3, the library."""
    worst, tried = 0.0, 40
    for _ in range(tried):
        case = random_case(rng, scale=0.1)
        loops = domain_log_gated(
            case.split(case.log_ratio), case.labels["group"].tolist(),
            case.labels["domain"].tolist(), BUDGETS, EPSILON,
        )  # fmt: skip
        theirs = engine(case)(case.batch()).log_gated_ratio.numpy()
        worst = max(worst, float(np.abs(loops - theirs).max()))
        worst = max(worst, float(np.abs(loops - on_densities(case, CHAIN)).max()))
    return judge(tried, worst, 1e-12, note="equal to the operator on densities, and to the library")


def domain_mean(rng: np.random.Generator) -> Finding:
    """Eq. 33: groups weighed by their trajectories; against equal groups, and equal tokens."""
    worst, groups, tokens, tried = 0.0, 0.0, 0.0, 40
    for _ in range(tried):
        case = random_case(rng, trajectories=9)
        s = np.array([aggregates(ell) for ell in case.split(case.log_ratio)])
        for d in np.unique(case.labels["domain"]):
            mine = case.labels["domain"] == d
            ours = np.unique(case.labels["group"][mine])
            means = np.array([s[case.labels["group"] == g].mean(0) for g in ours])
            share = np.array([(case.labels["group"] == g).sum() for g in ours]) / mine.sum()
            weighed = share @ means
            worst = max(worst, float(np.abs(weighed - s[mine].mean(0)).max()))
            apart = np.abs(means.mean(0) - weighed).max() / np.abs(weighed).max()
            groups = max(groups, float(apart))
            by_token = case.lengths[mine] @ s[mine] / case.lengths[mine].sum()
            tokens = max(tokens, float(np.abs(by_token - weighed).max() / np.abs(weighed).max()))
        strata = engine(case)(case.batch()).gated
        assert strata.mean is not None
        here = strata.mean[:, :2].numpy().T
        each = [s[case.labels["domain"] == d].mean(0) for d in (0, 1)]
        worst = max(worst, float(np.abs(here - each).max()))
    broken = None
    if min(groups, tokens) > 0.05:
        broken = (
            f"a plain mean over groups is up to {100 * groups:.0f} % off where their sizes differ, "
            f"one over tokens up to {100 * tokens:.0f} %"
        )
    note = "weighed by |Tj(g)| / |Tj(D)|"
    return judge(tried, worst, 1e-12, broken=broken, note=note)


def trees(rng: np.random.Generator) -> Finding:
    """Branches of different depth: path sums, the operator with joint shares, the library."""
    worst, tried = 0.0, 30
    for _ in range(tried):
        case = random_case(rng, scale=0.1)
        forest, labelled = forest_of(case)
        values = forest.log_gated(case.log_ratio)
        dense = forest.log_gated_on_densities(case.log_ratio)
        worst = max(worst, float(np.abs(values - dense).max()))
        tree = op.tree_of(forest.parent, forest.leaf, forest.measure)
        worst = max(worst, tree.joint_defect())
        objective = engine(labelled, (*CHAIN, "turn"))
        theirs = objective(labelled.batch()).log_gated_ratio.numpy()
        worst = max(worst, float(np.abs(values - theirs).max()))
    note = "text domains without turns beside tool domains without groups; shares sum to 1 jointly"
    return judge(tried, worst, 1e-12, note=note)


def edgewise(rng: np.random.Generator) -> Finding:
    """A root with two branches, each of whose kernels alone gives ``pi_* K = id``."""
    worst, tried = 0.0, 20
    for _ in range(tried):
        # contexts: root 0; branch A = contexts 1, 2; branch B = contexts 3, 4; two tokens each
        parent, leaf = np.array([-1, 0, 0, 0, 0]), np.repeat([1, 2, 3, 4], 2)
        tree = op.tree_of(parent, leaf, np.ones(8))
        share = tree.share.copy()
        share[1:] *= 2  # each branch: 1/2 + 1/2
        alone = op.Tree(parent, leaf, share, tree.token_share)
        rho = op.decompose(np.full(8, float(rng.uniform(0.01, 0.1))), np.ones(8))
        total = []
        for one in (tree, alone):
            base = op.gate_tree(rho, one, lambda x: x * (np.arange(5) == 0), np.zeros_like)
            total.append(float(base.sum() / rho.sum()))
        worst = max(worst, abs(total[0] - 1), abs(total[1] - 1))
    note = (
        f"a root with two branches of two contexts: the tokens receive {total[1]:.0f} times its "
        f"drift ({total[0]:.0f} time with joint shares)"
    )
    return judge(tried, worst, 1e-12, note=note)


def roots(rng: np.random.Generator) -> Finding:
    """Which coefficients feel a token of another domain, and of another trajectory."""
    worst, within, tried = 0.0, 0.0, 15
    for _ in range(tried):
        case = random_case(rng, scale=0.1)
        batch = case.batch(grad=True)
        out = engine(case).gate_map(batch).log_gated_ratio
        rows = [torch.autograd.grad(g, batch.log_probs, retain_graph=True)[0] for g in out]
        full = np.abs(torch.stack(rows).numpy())
        domain = case.at_tokens("domain")
        worst = max(worst, float(full[domain[:, None] != domain[None, :]].max()))
        other = case.trajectory[:, None] != case.trajectory[None, :]
        within = max(within, float(full[other].max()))
    broken = None
    if within > 0.1:
        broken = f"tokens of different trajectories of a domain are coupled, up to {within:.1f}"
    return judge(tried, worst, 0.0, broken=broken, note="over roots (domains), not trajectories")


def coupling(rng: np.random.Generator) -> Finding:
    """Slope of a domain's base in one log ratio, in rollback: ``-(mean length) / T_tau``."""
    worst, tried = 0.0, 30
    for _ in range(tried):
        lengths = rng.integers(1, 12, 4)
        tokens = int(lengths.sum())
        drift = 0.12 * (1 + 0.5 / tokens)
        case = Case(
            np.full(tokens, drift), np.ones(tokens), lengths,
            {"domain": np.zeros(4, dtype=np.int64)},
        )  # fmt: skip
        batch = case.batch(grad=True)
        out = recipes.fiberpo_domain({"domain": (0.12, 0.05)})(batch, gradient="autograd")
        assert out.gated.gated is not None
        (slope,) = torch.autograd.grad(out.gated.gated.value[0, 0], batch.log_probs)
        expected = -lengths.mean() / lengths[case.trajectory]
        worst = max(worst, float(np.abs(slope.numpy() - expected).max()))
    return judge(tried, worst, 1e-10, note="tokens of short answers move the base more")


def adjoints(rng: np.random.Generator) -> Finding:
    """The gradient by context adjoints, by differences, and the library's, on trees."""
    worst, tried, slopes = 0.0, 20, 0
    for _ in range(tried):
        case = random_case(rng, scale=0.1)
        forest, labelled = forest_of(case)
        factor = case.trajectory_mean * case.advantage
        mine = forest.gradient(case.log_ratio, factor)
        theirs = engine(labelled, (*CHAIN, "turn"))(labelled.batch()).coefficients.numpy()
        scale = 1 + np.abs(mine).max()
        worst = max(worst, float(np.abs(mine - theirs).max()) / scale)
        here, step = _value(forest, case.log_ratio, factor), 1e-6
        for j in range(len(factor)):
            move = step * np.eye(len(factor))[j]
            right = (_value(forest, case.log_ratio + move, factor) - here) / step
            left = (here - _value(forest, case.log_ratio - move, factor)) / step
            if abs(right - left) < 1e-4 * scale:  # no corner between
                worst = max(worst, float(abs((right + left) / 2 - mine[j])) / scale)
                slopes += 1
    note = f"equal to the library's and to {slopes} differences, on trees"
    return judge(tried, worst if slopes > 100 else math.nan, 1e-7, note=note)


def _value(forest: Forest, ell: Array, factor: Array) -> float:
    return float(factor @ np.exp(forest.log_gated(ell)))


def only_child(rng: np.random.Generator) -> Finding:
    """A group that is all of its domain: its residual."""
    worst, tried = 0.0, 30
    for _ in range(tried):
        case = random_case(rng)
        label: Indices = case.labels["group"]
        alone = Case(
            case.log_ratio, case.advantage, case.lengths,
            {"domain": label, "group": label},
        )  # fmt: skip
        worst = max(worst, float(np.abs(_group_residual(alone)).max()))
    return judge(tried, worst, 1e-12, note="its gate cannot act; the library warns")


def _group_residual(case: Case) -> Array:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FiberPOWarning)
        gated = engine(case)(case.batch()).gated
    assert gated.residual is not None
    assert gated.strata is not None
    return gated.residual[:, gated.strata.level(1)].numpy()


def negative_residuals(rng: np.random.Generator) -> Finding:
    """Residuals above the trajectory: both signs occur, and the gate treats them alike."""
    worst, negative, tried = 0.0, 0, 20
    for _ in range(tried):
        case = random_case(rng, scale=0.1)
        out = engine(case)(case.batch()).gated
        assert out.residual is not None
        assert out.gated is not None
        residual, value = out.residual.numpy(), out.gated.value.numpy()
        negative += int((residual < -1e-6).sum())
        worst = max(worst, float((np.sign(residual) * value).min() * -1))
    if not negative:
        worst = math.nan
    return judge(tried, max(worst, 0.0), 1e-12, note="so the gate must be odd")


def force(rng: np.random.Generator) -> Finding:
    """``A_c = sum of mu A G`` below groups and domains as part of ``sum mu |A|``, gates acting."""
    far, near, uncentred, uneven, tried = 0.0, 0.0, 0.0, 0.0, 20
    for _ in range(tried):
        case = random_case(rng, scale=0.1)
        ell = case.log_ratio / np.abs(case.log_ratio).max()
        given = rng.normal(size=len(case.lengths))
        label = case.labels["group"]
        centred = given - np.array([given[label == g].mean() for g in label])
        far = max(far, _force(case, 0.1 * ell, centred))
        near = max(near, _force(case, 1e-8 * ell, centred))
        uncentred = max(uncentred, _force(case, 1e-8 * ell, given))
        uneven = max(uneven, _force(case, 1e-8 * ell, centred, "token_mean"))
    broken = None
    if min(uncentred, uneven) > 0.05:
        broken = (
            f"at any drift up to {uncentred:.2f} where advantages are not centred, up to "
            f"{uneven:.2f} with mu = 1 / N and unequal lengths"
        )
    note = (
        "advantages of trajectories centred in their group, mu = 1 / (|Tj| T): A_c is O(drift), "
        f"at most {far:.2g} of sum mu |A| for log ratios up to 0.1"
    )
    return judge(tried, near, 1e-7, broken=broken, note=note)


def _force(case: Case, ell: Array, advantage: Array, weights: str = "trajectory_mean") -> float:
    """Largest ``|A_c|`` of the groups and domains over ``sum mu |A|``."""
    moved = Case(ell, advantage[case.trajectory], case.lengths, case.labels)
    budget = 0.2 * float(np.abs(ell).max())
    narrow = dict.fromkeys(CHAIN, (budget, budget))
    objective = recipes.fiberpo_domain(narrow, budget, weights=weights)
    out = objective(moved.batch())
    terms = (out.weight * out.log_gated_ratio.exp()).numpy()
    contexts = np.stack(
        [case.at_tokens(name) == i for name in CHAIN[:2] for i in np.unique(case.labels[name])]
    )
    return float(np.abs(contexts @ terms).max() / np.abs(out.weight.numpy()).sum())


CLAIMS = (
    Claim(
        "FiberPO-Domain", "FiberPO, Def 6.4, Eqs. 30-32",
        "The three gated residuals and the fiber are what the library computes.",
        printed, Verdict.HOLDS,
    ),
    Claim(
        "domain mean", "FiberPO, Eq. 33",
        "S_D, the mean of S_g, is the mean of S_tau over the trajectories of the domain.",
        domain_mean, Verdict.CONDITIONAL,
    ),
    Claim(
        "residuals of either sign", "FiberPO, Eqs. 30-32 and Eq. 10",
        "Residual drifts above the trajectory may be negative and are gated alike.",
        negative_residuals, Verdict.HOLDS,
    ),
    Claim(
        "trees", "FiberPO, Remark 6.5",
        "Rooted trees with branches of different depth are gated under the joint condition.",
        trees, Verdict.HOLDS,
    ),
    Claim(
        "each edge reflecting is enough", "FiberPO, Remark 6.5",
        "In a tree it suffices that every edge alone fulfils pi_* K = id.",
        edgewise, Verdict.FAILS,
    ),
    Claim(
        "block-diagonal above the trajectory", "FiberPO, Prop 5.3 and Def 6.4",
        "The Jacobian of FiberPO-Domain is block-diagonal.",
        roots, Verdict.CONDITIONAL,
    ),
    Claim(
        "rollback coupling of a domain", "FiberPO, Def 6.4 and Eq. 20",
        "In rollback a domain's base has the slope -(mean length) / T in one log ratio.",
        coupling, Verdict.HOLDS,
    ),
    Claim(
        "gradient by context adjoints", "FiberPO, Def 6.2",
        "dJ/dS_c = A_c g'_c - sum over children of A g', and the fiber's share.",
        adjoints, Verdict.HOLDS,
    ),
    Claim(
        "only child", "FiberPO, Def 6.2",
        "A context that is the only child of its parent has residual 0.",
        only_child, Verdict.HOLDS,
    ),
    Claim(
        "no force above the trajectory", "ours",
        "With centred advantages the gate of a group or domain has no force at first order: the "
        "sum A_c of mu A G below it, which its slope g'_c multiplies, is O(drift).",
        force, Verdict.CONDITIONAL,
    ),
)  # fmt: skip
