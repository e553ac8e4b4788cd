"""Named methods: a few lines each, composed from weights, charts and gates.

All budgets and log-scale epsilons are in nats per token; the epsilons of PPO-type clips are
offsets from a ratio of 1. Every recipe returns an `Objective`.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal

from .budgets import BudgetLike
from .building import Aggregation, build
from .charts import Deviation, Log, SignedLog
from .errors import ObjectiveError, StrataError
from .gates import AggregateGate, BudgetClip, Gate, LogClip, RatioClip, Zero
from .gating import GateMap, Measure
from .labels import order_strata
from .masks import SequenceMask
from .objective import Objective
from .peers import PEERS, cispo, cppo, dppo, gmpo, sapo, spo, topr, truly_ppo
from .stopping import fiberstop
from .weights import Weights

Rollback = Literal["tokens"] | float

RECOMMENDED_BUDGET = (0.12, 0.05)
"""Budget pair of the paper's last figure, in nats per token."""


def ppo(
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    *,
    dual_clip: float | None = None,
    sign_aware: bool = True,
    weights: Aggregation = "token_mean",
    mask: SequenceMask | None = None,
) -> Objective:
    """PPO: ``G_i A_i = min(r_i A_i, clip(r_i, 1 - epsilon, 1 + epsilon_high) A_i)``.

    Args:
        epsilon: offset below 1, in (0, 1).
        epsilon_high: offset above 1; ``epsilon`` if None.
        dual_clip: for ``A < 0`` also ``G <= dual_clip`` (3 is usual).
        sign_aware: False gives the plain form ``G = clip(r)`` (Remark C.5).
        weights: aggregation weights, ``1 / N`` by default.
        mask: sequence mask.

    References:
        Proximal Policy Optimization Algorithms, arXiv 1707.06347; FiberPO, App. C.4; dual clip:
        Mastering Complex Control in MOBA Games, arXiv 1912.09729.
    """
    gate = RatioClip(epsilon, epsilon_high, sign_aware, dual_clip)
    return _clipped("ppo", gate, weights, mask, ("ppo",), locals())


def grpo(
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    *,
    dual_clip: float | None = None,
    sign_aware: bool = True,
    weights: Aggregation = "trajectory_mean",
    mask: SequenceMask | None = None,
) -> Objective:
    """GRPO: the PPO gate with ``mu_i = 1 / (trajectories T_i)``. Arguments as in `ppo`.

    References:
        DeepSeekMath, arXiv 2402.03300.
    """
    gate = RatioClip(epsilon, epsilon_high, sign_aware, dual_clip)
    return _clipped("grpo", gate, weights, mask, ("grpo",), locals())


def dr_grpo(
    length: float,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    *,
    sign_aware: bool = True,
    mask: SequenceMask | None = None,
) -> Objective:
    """Dr. GRPO: the PPO gate with ``mu_i = 1 / (trajectories length)``.

    Args:
        length: the constant ``L`` in tokens (the maximal completion length is usual).
        epsilon, epsilon_high, sign_aware, mask: as in `ppo`.

    References:
        Understanding R1-Zero-Like Training, arXiv 2503.20783.
    """
    gate = RatioClip(epsilon, epsilon_high, sign_aware)
    return _clipped("dr_grpo", gate, Weights.constant(length), mask, ("dr_grpo",), locals())


def dapo(
    epsilon: float = 0.2,
    epsilon_high: float = 0.28,
    *,
    sign_aware: bool = True,
    mask: SequenceMask | None = None,
) -> Objective:
    """DAPO: the PPO gate with a higher upper bound, ``mu_i = 1 / N``. Arguments as in `ppo`.

    References:
        DAPO, arXiv 2503.14476.
    """
    gate = RatioClip(epsilon, epsilon_high, sign_aware)
    return _clipped("dapo", gate, Weights.token_mean(), mask, ("dapo",), locals())


def gspo(
    epsilon: float | None = None,
    epsilon_high: float | None = None,
    *,
    sign_aware: bool = True,
    weights: Aggregation = "trajectory_mean",
    mask: SequenceMask | None = None,
) -> Objective:
    """GSPO: every token carries the clipped ``s = exp(mean of log r over its trajectory)``.

    A ratio clip at the trajectory, zero at the token. The sign is that of the advantages summed
    over the trajectory.

    Args:
        epsilon, epsilon_high: offsets from 1 of ``s``; 3e-4 and 4e-4 if neither is given,
            symmetric if only ``epsilon`` is. They are far smaller than PPO's: a mean over a
            trajectory moves far less than a token.
        sign_aware, weights, mask: as in `ppo`.

    References:
        Group Sequence Policy Optimization, arXiv 2507.18071.
    """
    if epsilon is None:
        if epsilon_high is not None:
            raise ObjectiveError(f"epsilon_high = {epsilon_high} without epsilon; give both")
        epsilon, epsilon_high = 3e-4, 4e-4
    gates: dict[str, Gate] = {"trajectory": RatioClip(epsilon, epsilon_high, sign_aware)}
    gate_map = GateMap(Log(), gates, Zero())
    return build("gspo", gate_map, weights, mask, ("gspo",), locals())


def apc(
    delta: float = 0.2,
    *,
    states: str = "state",
    weights: Aggregation = "token_mean",
    mask: SequenceMask | None = None,
) -> Objective:
    """APC-Obj: ``G_i = 1 + clip(r_i - 1, B_i)``, a TV budget shared by the tokens of a state.

    ``B_i = T_s delta - sum_{j != i, same state} |r_j - 1|``. With every state visited once (a batch
    without a label for the state) it is PPO without the min, ``epsilon = delta``.

    Args:
        delta: radius > 0, mean ``|r - 1|`` allowed per state (no factor 1/2).
        states: token label that names the state of each token.
        weights, mask: as in `ppo`.

    References:
        FiberPO, arXiv 2603.08239, Definition 3.2.
    """
    gate_map = GateMap(Deviation(), {}, BudgetClip(delta, states))
    return build("apc", gate_map, weights, mask, ("fiberpo",), locals())


def fiberpo(
    budget: BudgetLike = RECOMMENDED_BUDGET,
    epsilon: float = 0.04,
    *,
    rollback: Rollback = "tokens",
    pessimistic: bool = False,
    weights: Aggregation = "trajectory_mean",
    mask: SequenceMask | None = None,
) -> Objective:
    """FiberPO: an aggregate gate on each trajectory, a log clip on what each token adds to it.

    With ``S+- = mean over the trajectory of max(+-log r, 0)``::

        log base  = g(S+, C+, T) - g(S-, C-, T)
        log fiber = clip(l - S+) + clip(S-)     where l >= 0
                    clip(l + S-) - clip(S+)     where l < 0
        G = exp(log base + log fiber)

    Args:
        budget: ``(C+, C-)`` in nats per token; ``C- < C+`` is recommended.
        epsilon: half-width of the token's log clip, nats; well below ``C+ + C-``.
        rollback: ``k`` of the aggregate gate, ``"tokens"`` (the paper) or a number.
        pessimistic: ``min(G A, r A)`` per token. Ours, not the paper's.
        weights, mask: as in `ppo`; ``1 / (trajectories T)`` by default.

    References:
        Fibration Policy Optimization, arXiv 2603.08239, Definition 5.1.

    Example:
        >>> import torch
        >>> from fiberpo import RatioBatch
        >>> old = torch.tensor([-1.0, -1.0, -1.0], dtype=torch.float64)
        >>> new = torch.tensor([-0.9, -1.0, -1.1], dtype=torch.float64)
        >>> batch = RatioBatch.from_packed(new, old, torch.ones(1), [3])
        >>> fiberpo(budget=(0.12, 0.05), epsilon=0.04)(batch).log_gated_ratio.round(decimals=4)
        tensor([ 0.0733,  0.0000, -0.0733], dtype=torch.float64)
    """
    gates: dict[str, Gate] = {"trajectory": AggregateGate(budget, rollback)}
    gate_map = GateMap(SignedLog(), gates, LogClip(epsilon), pessimistic=pessimistic)
    return build("fiberpo", gate_map, weights, mask, ("fiberpo",), locals())


def fiberpo_domain(
    budgets: Mapping[str, BudgetLike] | None = None,
    epsilon: float = 0.04,
    *,
    rollback: Rollback | Mapping[str, Rollback] = "tokens",
    measure: Measure = "trajectory",
    pessimistic: bool = False,
    weights: Aggregation = "trajectory_mean",
    mask: SequenceMask | None = None,
) -> Objective:
    """FiberPO-Domain, and any other fibration hierarchy: one aggregate gate per stratum.

    ::

        log base = sum over channels of  g(S_D, C_D, T_D) + g(S_g - S_D, C_g, T_g)
                                         + g(S_tau - S_g, C_tau, T_tau)

    Args:
        budgets: stratum name -> budget; the strata named here take part. Each budget is a pair
            ``(C+, C-)`` in nats per token or a mapping from context name to a pair. Default:
            domain, group and trajectory with `RECOMMENDED_BUDGET` each.
        epsilon: half-width of the token's log clip, nats.
        rollback: ``k`` for all strata, or one per stratum.
        measure: ``"trajectory"``: trajectories weigh equally in the aggregates above them;
            ``"token"``: tokens do.
        pessimistic, weights, mask: as in `fiberpo`.

    Raises:
        StrataError, BudgetError, ObjectiveError: for impossible arguments.

    References:
        Fibration Policy Optimization, arXiv 2603.08239, Definition 6.4, Eqs. 30-33.
    """
    if budgets is None:
        budgets = dict.fromkeys(("domain", "group", "trajectory"), RECOMMENDED_BUDGET)
    if not isinstance(budgets, Mapping):
        raise StrataError(
            f"budgets is {budgets!r}; it maps stratum names to budgets, "
            '{"domain": (0.12, 0.05), "group": (0.12, 0.05), "trajectory": (0.12, 0.05)}'
        )
    if not budgets:
        raise StrataError(
            "budgets is empty; name at least one stratum (without any it would be a token clip: "
            "use recipes.ppo)"
        )
    slopes: Mapping[str, Rollback]
    if isinstance(rollback, Mapping):
        unknown = sorted(set(rollback) - set(budgets))
        if unknown:
            raise StrataError(f"rollback names {unknown}, but budgets has {sorted(budgets)}")
        slopes = rollback
    else:
        slopes = dict.fromkeys(budgets, rollback)
    gates: dict[str, Gate] = {
        name: AggregateGate(budgets[name], slopes.get(name, "tokens"))
        for name in order_strata(list(budgets))
    }
    gate_map = GateMap(SignedLog(), gates, LogClip(epsilon), measure, pessimistic)
    return build("fiberpo_domain", gate_map, weights, mask, ("fiberpo",), locals())


RECIPES: Mapping[str, Callable[..., Objective]] = {
    "ppo": ppo,
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "dapo": dapo,
    "gspo": gspo,
    "apc": apc,
    "fiberpo": fiberpo,
    "fiberpo_domain": fiberpo_domain,
    "fiberstop": fiberstop,
    **PEERS,
}
"""By name, for hosts and command lines that demand a string."""


def from_name(name: str, **parameters: Any) -> Objective:
    """A recipe by its name.

    Raises:
        ObjectiveError: for an unknown name or parameter, quoting what there is.

    >>> str(from_name("grpo", epsilon=0.1))
    "grpo(epsilon=0.1, sign_aware=True, weights='trajectory_mean')"
    """
    if name not in RECIPES:
        raise ObjectiveError(f"unknown objective {name!r}; there are {', '.join(RECIPES)}")
    recipe = RECIPES[name]
    known = inspect.signature(recipe).parameters
    unknown = sorted(set(parameters) - set(known))
    if unknown:
        raise ObjectiveError(f"{name} has no parameter {unknown[0]!r}; it has {', '.join(known)}")
    missing = [p.name for p in known.values() if p.default is p.empty and p.name not in parameters]
    if missing:
        raise ObjectiveError(f"{name} needs the parameter {missing[0]!r}")
    return recipe(**parameters)


def parse_call(text: str) -> tuple[str, dict[str, Any]]:
    """Name and parameters of an objective that is written as its name or as the call that makes it.

    Raises:
        ObjectiveError: for text that is neither.

    >>> parse_call("gspo(epsilon=0.02)")
    ('gspo', {'epsilon': 0.02})
    >>> parse_call("grpo")
    ('grpo', {})
    """
    try:
        call = ast.parse(text.strip(), mode="eval").body
        name, parameters = call, {}
        if isinstance(call, ast.Call) and not call.args:
            name = call.func
            parameters = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
        if not isinstance(name, ast.Name):
            raise ValueError(text)
    except (SyntaxError, ValueError) as error:
        raise ObjectiveError(
            f"cannot read the objective {text!r}; write its name, or the name with parameters as "
            f"in fiberpo(budget=(0.2, 0.1), pessimistic=True). There are {', '.join(RECIPES)}"
        ) from error
    return name.id, parameters


def _clipped(
    name: str,
    gate: RatioClip,
    weights: Aggregation,
    mask: SequenceMask | None,
    papers: tuple[str, ...],
    parameters: dict[str, Any],
) -> Objective:
    parameters.pop("gate")
    return build(name, GateMap(Log(), {}, gate), weights, mask, papers, parameters)


__all__ = [
    "RECIPES", "RECOMMENDED_BUDGET", "apc", "cispo", "cppo", "dapo", "dppo", "dr_grpo", "fiberpo",
    "fiberpo_domain", "fiberstop", "from_name", "gmpo", "grpo", "gspo", "parse_call", "ppo",
    "sapo", "spo", "topr", "truly_ppo",
]  # fmt: skip
