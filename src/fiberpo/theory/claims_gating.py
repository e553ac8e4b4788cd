"""Claims on the ratio gating formalism: methods as triples, and the steps between them.

FiberPO, Definition 3.1, App. C.4, Remark C.5. A textbook loss is written in torch here and
differentiated by autograd; the library's objective must have its value and its gradient.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from .. import recipes
from ..objective import Objective
from ..peers import PEERS
from ..weights import Weights
from . import relaxations
from .batches import Case, random_case
from .claims import Array, Claim, Finding, Indices, Verdict, judge

Textbook = Callable[[Tensor, Tensor, Case], Tensor]
"""``(log ratios, advantages, case) -> J``, differentiable."""

TRIED = 40


def _min_clip(ell: Tensor, a: Tensor, low: float, high: float) -> Tensor:
    r = ell.exp()
    return torch.minimum(r * a, r.clamp(1 - low, 1 + high) * a)


def _rows(values: Tensor, case: Case) -> tuple[Tensor, ...]:
    return values.split(case.lengths.tolist())


def _mean_of_means(values: Tensor, case: Case) -> Tensor:
    return torch.stack([row.mean() for row in _rows(values, case)]).mean()


def _ppo(ell: Tensor, a: Tensor, case: Case) -> Tensor:
    return _min_clip(ell, a, 0.2, 0.2).mean()


def _dual_clip(ell: Tensor, a: Tensor, case: Case) -> Tensor:
    plain = _min_clip(ell, a, 0.2, 0.2)
    return torch.where(a < 0, torch.maximum(plain, 1.5 * a), plain).mean()


def _dapo(ell: Tensor, a: Tensor, case: Case) -> Tensor:
    return _min_clip(ell, a, 0.2, 0.28).mean()


def _grpo(ell: Tensor, a: Tensor, case: Case) -> Tensor:
    return _mean_of_means(_min_clip(ell, a, 0.2, 0.2), case)


def _dr_grpo(ell: Tensor, a: Tensor, case: Case) -> Tensor:
    rows = _rows(_min_clip(ell, a, 0.2, 0.2), case)
    return torch.stack([row.sum() / 16.0 for row in rows]).mean()


def _gspo(ell: Tensor, a: Tensor, case: Case) -> Tensor:
    s = torch.stack([row.mean() for row in _rows(ell, case)])
    mean = torch.stack([row.mean() for row in _rows(a, case)])
    return _min_clip(s, mean, 0.05, 0.08).mean()


def _apc(ell: Tensor, a: Tensor, case: Case) -> Tensor:
    x, delta = ell.exp() - 1, 0.2
    terms = []
    for i, state in enumerate(case.labels["state"]):
        mates = np.flatnonzero(case.labels["state"] == state)
        others = sum((x[j].abs() for j in mates if j != i), torch.zeros((), dtype=ell.dtype))
        bound = (len(mates) * delta - others).clamp(min=0)
        terms.append((1 + torch.maximum(torch.minimum(x[i], bound), -bound)) * a[i])
    return torch.stack(terms).mean()


def _with_states(case: Case, rng: np.random.Generator) -> Case:
    states: Indices = rng.integers(0, 6, len(case.log_ratio))
    return Case(case.log_ratio, case.advantage, case.lengths, {"state": states})


def _compare(objective: Objective, textbook: Textbook, rng: np.random.Generator) -> Finding:
    worst = 0.0
    for _ in range(TRIED):
        case = _with_states(random_case(rng, scale=0.2), rng)
        ell = torch.tensor(case.log_ratio, requires_grad=True)
        value = textbook(ell, torch.tensor(case.advantage), case)
        value.backward()
        assert ell.grad is not None
        out = objective(case.batch())
        worst = max(worst, abs(float(out.loss) + float(value.detach())))
        worst = max(worst, float((out.coefficients - ell.grad).abs().max()))
    return judge(TRIED, worst, 1e-12, note="value and gradient")


METHODS: tuple[tuple[str, str, Callable[[], Objective], Textbook], ...] = (
    ("PPO", "mean over tokens of min(r A, clip(r) A)", recipes.ppo, _ppo),
    (
        "PPO with dual clip", "PPO, and for A < 0 at least c A (c = 1.5)",
        lambda: recipes.ppo(dual_clip=1.5), _dual_clip,
    ),
    ("DAPO", "PPO with clip(r, 0.8, 1.28)", recipes.dapo, _dapo),
    ("GRPO", "mean over trajectories of PPO's mean over their tokens", recipes.grpo, _grpo),
    (
        "Dr. GRPO", "GRPO with a constant in place of each length",
        lambda: recipes.dr_grpo(16.0), _dr_grpo,
    ),
    (
        "GSPO", "mean over trajectories of min(s A, clip(s) A), A averaged over the trajectory",
        lambda: recipes.gspo(0.05, 0.08), _gspo,
    ),
    (
        "APC-Obj", "mean over tokens of (1 + clip(r - 1, B)) A", lambda: recipes.apc(0.2), _apc,
    ),
)  # fmt: skip


def _method_claim(name: str, loss: str, make: Callable[[], Objective], book: Textbook) -> Claim:
    source = "FiberPO, Def 3.2" if name == "APC-Obj" else "FiberPO, Def 3.1 and App. C.4"
    statement = f"As a triple (E, mu, G) {name} is its usual loss: {loss}."
    return Claim(
        f"{name} as a triple", source, statement,
        lambda rng: _compare(make(), book, rng), Verdict.HOLDS,
    )  # fmt: skip


def triple(rng: np.random.Generator) -> Finding:
    """``J = sum mu G A`` with ``mu`` and ``G`` taken from the objective, for every method here."""
    worst, made = 0.0, {"dr_grpo": {"length": 16.0}}
    beside = {*PEERS, "fiberstop"}
    own = {name: make for name, make in recipes.RECIPES.items() if name not in beside}
    for name, recipe in own.items():
        objective = recipe(**made.get(name, {}))
        for _ in range(10):
            case = random_case(rng, scale=0.2)
            out = objective(case.batch())
            mu = {
                "ppo": 1 / len(case.log_ratio), "dapo": 1 / len(case.log_ratio),
                "apc": 1 / len(case.log_ratio), "dr_grpo": 1 / (16.0 * len(case.lengths)),
            }.get(name, case.trajectory_mean)  # fmt: skip
            gated = out.log_gated_ratio.exp().numpy()
            worst = max(worst, abs(float(out.loss) + float((mu * gated * case.advantage).sum())))
    return judge(10 * len(own), worst, 1e-12, note="all eight recipes")


def weights_sum(rng: np.random.Generator) -> Finding:
    """Sum of ``mu`` for every kind of weights."""
    worst, apart, tried = 0.0, 0.0, 20
    kinds = [
        Weights.token_mean(), Weights.trajectory_mean(), Weights.group_mean(), Weights.domain_mean()
    ]  # fmt: skip
    for _ in range(tried):
        batch = random_case(rng).batch()
        worst = max(worst, *(abs(float(kind(batch).sum()) - 1) for kind in kinds))
        apart = max(apart, abs(float(Weights.constant(16.0)(batch).sum()) - 1))
    broken = None
    if apart > 0.1:
        broken = "constant(L) of Dr. GRPO sums to (mean length) / L"
    note = "token, trajectory, group and domain means"
    return judge(tried * len(kinds), worst, 1e-12, broken=broken, note=note)


def without_min(rng: np.random.Generator) -> Finding:
    """The plain clip against PPO's min, token by token."""
    worst, tried = 0.0, 2000
    r, a = np.exp(rng.normal(0, 0.4, tried)), rng.normal(size=tried)
    plain, least = relaxations.clipped(r, 0.2, 0.2) * a, relaxations.one_sided(r, a, 0.2, 0.2)
    agree = (np.abs(r - 1) <= 0.2) | ((r - 1) * a > 0)
    worst = float(np.abs(plain - least)[agree].max())
    one, minus = np.array([1.5]), np.array([-1.0])
    apart = relaxations.clipped(one, 0.2, 0.2) * minus - relaxations.one_sided(one, minus, 0.2, 0.2)
    broken = None
    if apart[0] > 0.1 and np.abs(plain - least)[~agree].min() > 0:
        broken = "r = 1.5, A = -1: plain -1.2 without a gradient, PPO -1.5 with one"
    return judge(
        tried, worst, 1e-12, broken=broken, note="equal inside the clip and where (r - 1) A > 0"
    )  # fmt: skip


def _sample(rng: np.random.Generator, *, single: bool = False, constant: bool = False) -> Case:
    case = random_case(rng, scale=0.2)
    tokens = len(case.log_ratio)
    states: Indices = np.arange(tokens) if single else rng.integers(0, 6, tokens)
    log_ratio: Array = case.log_ratio
    if constant:
        log_ratio = rng.normal(0, 0.2, len(case.lengths))[case.trajectory]
        advantage = rng.normal(size=len(case.lengths))[case.trajectory]
        return Case(log_ratio, advantage, case.lengths, {"state": states})
    return Case(log_ratio, case.advantage, case.lengths, {"state": states})


def _plain(case: Case) -> relaxations.Sample:
    return relaxations.Sample(
        case.log_ratio, case.advantage, case.labels["state"], case.trajectory
    )  # fmt: skip


def _step(
    rng: np.random.Generator,
    before: Callable[[relaxations.Sample], float],
    after: Callable[[relaxations.Sample], float],
    condition: Callable[[Case], Case],
    note: str,
) -> Finding:
    worst, apart = 0.0, 0.0
    for _ in range(TRIED):
        case = _sample(rng)
        free, bound = _plain(case), _plain(condition(case))
        worst = max(worst, abs(before(bound) - after(bound)))
        apart = max(apart, abs(before(free) - after(free)))
    broken = f"otherwise J differs by up to {apart:.2g}" if apart > 1e-3 else None
    return judge(TRIED, worst, 1e-12, broken=broken, note=note)


def to_ppo_without_min(rng: np.random.Generator) -> Finding:
    """APC-Obj with every state visited once."""

    def alone(case: Case) -> Case:
        states = {"state": np.arange(len(case.log_ratio))}
        return Case(case.log_ratio, case.advantage, case.lengths, states)

    return _step(
        rng, lambda s: relaxations.apc_obj(s, 0.2), lambda s: relaxations.ppo_without_min(s, 0.2),
        alone, "equal if every state is visited once",
    )  # fmt: skip


def to_ppo(rng: np.random.Generator) -> Finding:
    """The min, where every advantage has the sign of its deviation."""

    def aligned(case: Case) -> Case:
        advantage = np.abs(case.advantage) * np.sign(case.log_ratio)
        return Case(case.log_ratio, advantage, case.lengths, case.labels)

    return _step(
        rng, lambda s: relaxations.ppo_without_min(s, 0.2), lambda s: relaxations.ppo(s, 0.2),
        aligned, "equal if A has the sign of r - 1",
    )  # fmt: skip


def to_grpo(rng: np.random.Generator) -> Finding:
    """Trajectory weights, where all lengths are equal."""

    def even(case: Case) -> Case:
        tokens = 4 * (len(case.log_ratio) // 4)
        lengths = np.full(tokens // 4, 4)
        labels = {"state": case.labels["state"][:tokens]}
        return Case(case.log_ratio[:tokens], case.advantage[:tokens], lengths, labels)

    return _step(
        rng, lambda s: relaxations.ppo(s, 0.2), lambda s: relaxations.grpo(s, 0.2),
        even, "equal if all trajectories are equally long",
    )  # fmt: skip


def to_gspo(rng: np.random.Generator) -> Finding:
    """One ratio a trajectory, where it is constant on the trajectory and so is the advantage."""
    (other,) = rng.spawn(1)
    return _step(
        rng, lambda s: relaxations.grpo(s, 0.2), lambda s: relaxations.gspo(s, 0.2),
        lambda case: _sample(other, constant=True),
        "equal if log r and A are constant on each trajectory",
    )  # fmt: skip


def engine(rng: np.random.Generator) -> Finding:
    """Every step's objective against the library's recipe of that name."""
    worst = 0.0
    pairs: list[tuple[Objective, Callable[[relaxations.Sample], float]]] = [
        (recipes.apc(0.2), lambda s: relaxations.apc_obj(s, 0.2)),
        (recipes.ppo(0.2, sign_aware=False), lambda s: relaxations.ppo_without_min(s, 0.2)),
        (recipes.ppo(0.2), lambda s: relaxations.ppo(s, 0.2)),
        (recipes.grpo(0.2), lambda s: relaxations.grpo(s, 0.2)),
        (recipes.gspo(0.1), lambda s: relaxations.gspo(s, 0.1)),
    ]
    for _ in range(TRIED):
        case = _sample(rng)
        for objective, step in pairs:
            worst = max(worst, abs(float(objective(case.batch()).loss) + step(_plain(case))))
    return judge(TRIED * len(pairs), worst, 1e-12)


CLAIMS = (
    Claim(
        "ratio gating formalism", "FiberPO, Def 3.1",
        "Every method is J = sum mu_i G(r)_i A_i with weights given from outside.",
        triple, Verdict.HOLDS,
    ),
    Claim(
        "weights sum to 1", "FiberPO, Def 3.1",
        "The aggregation weights mu sum to 1.",
        weights_sum, Verdict.CONDITIONAL,
    ),
    *(_method_claim(*method) for method in METHODS),
    Claim(
        "clip without min", "FiberPO, Remark C.5",
        "The plain clip, without the min, is PPO's objective.",
        without_min, Verdict.CONDITIONAL,
    ),
    Claim(
        "APC-Obj to PPO without min", "FiberPO, App. C.4 and Def 3.2",
        "PPO without min is APC-Obj with the coupling inside a state dropped, epsilon = delta.",
        to_ppo_without_min, Verdict.CONDITIONAL,
    ),
    Claim(
        "PPO without min to PPO", "FiberPO, Remark C.5",
        "Clipping only the side that the sign of A names is the same objective.",
        to_ppo, Verdict.CONDITIONAL,
    ),
    Claim(
        "PPO to GRPO", "FiberPO, App. C.4",
        "Weighing trajectories instead of tokens equally is the same objective.",
        to_grpo, Verdict.CONDITIONAL,
    ),
    Claim(
        "GRPO to GSPO", "FiberPO, App. C.4",
        "One geometric mean ratio for a trajectory is the same objective.",
        to_gspo, Verdict.CONDITIONAL,
    ),
    Claim(
        "relaxation steps in the library", "FiberPO, App. C.4",
        "The objectives of the four steps are the library's apc, ppo, grpo and gspo.",
        engine, Verdict.HOLDS,
    ),
)  # fmt: skip
