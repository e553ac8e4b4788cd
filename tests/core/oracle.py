"""The equations of the paper as plain Python loops over floats; knows nothing of the library.

Functions are named after the equation or section they spell out.

Reference: *Fibration Policy Optimization*, arXiv 2603.08239. Log ratios are in nats. A *forest* is
a list of parents (``None`` for a root) and, per token, the finest context that holds it.
"""

import math
from dataclasses import dataclass

import numpy as np


def sign_label(log_ratio):
    """``sigma``: +1 where ``l >= 0`` (zero included), else -1."""
    return 1 if log_ratio >= 0 else -1


# ---------------------------------------------------------------------------------- atomic gates


def aggregate_gate_eq10(x, budget, k):
    """Value of the aggregate gate: pass, roll back with slope ``-k``, zero."""
    size = abs(x)
    if size <= budget:
        return x
    if size < (1 + 1 / k) * budget:
        return math.copysign((k + 1) * budget - k * size, x)
    return 0.0


def aggregate_gate_slope_eq10(x, budget, k):
    """Slope of the aggregate gate."""
    size = abs(x)
    if size <= budget:
        return 1.0
    return -float(k) if size < (1 + 1 / k) * budget else 0.0


def aggregate_gate_compact(x, budget, k):
    """``clip(x, -m, m)`` with ``m = max((k + 1) C - k |x|, 0)``: another spelling of Eq. 10."""
    bound = max((k + 1) * budget - k * abs(x), 0.0)
    return min(max(x, -bound), bound)


def log_clip_eq12(x, epsilon):
    """Clip of a log ratio."""
    return min(max(x, -epsilon), epsilon)


# ------------------------------------------------------------------------------ FiberPO, Def. 5.1


def aggregates_eq9(log_ratios):
    """``(S+, S-)`` of one trajectory: both divide by the whole token count."""
    plus = math.fsum(max(x, 0.0) for x in log_ratios) / len(log_ratios)
    minus = math.fsum(max(-x, 0.0) for x in log_ratios) / len(log_ratios)
    return plus, minus


def residuals_eqs14_15(log_ratios):
    """``(u_i, v_i)``: residual of a token in its own channel and in the other one."""
    plus, minus = aggregates_eq9(log_ratios)
    found = []
    for x in log_ratios:
        own, other = (plus, minus) if sign_label(x) > 0 else (minus, plus)
        found.append((sign_label(x) * x - own, -other))
    return found


def log_base_eq8(log_ratios, budget, k=None):
    """Gated drift of one trajectory."""
    plus, minus = aggregates_eq9(log_ratios)
    k = len(log_ratios) if k is None else k
    return aggregate_gate_eq10(plus, budget[0], k) - aggregate_gate_eq10(minus, budget[1], k)


def fiberpo_def51_eqs6_16(log_ratios, budget, epsilon, k=None):
    """``log G`` of the tokens of one trajectory."""
    base = log_base_eq8(log_ratios, budget, k)
    found = []
    for x, (u, v) in zip(log_ratios, residuals_eqs14_15(log_ratios)):
        sigma = sign_label(x)
        fiber = log_clip_eq12(sigma * u, epsilon) - log_clip_eq12(sigma * v, epsilon)
        found.append(base + fiber)
    return found


def jacobian_eq20(log_ratios, budget, epsilon, k=None):
    """``d log G_i / d l_j`` of one trajectory."""
    length = len(log_ratios)
    k = length if k is None else k
    drift = aggregates_eq9(log_ratios)
    gamma = {
        +1: aggregate_gate_slope_eq10(drift[0], budget[0], k),
        -1: aggregate_gate_slope_eq10(drift[1], budget[1], k),
    }
    residual = residuals_eqs14_15(log_ratios)
    jacobian = np.zeros((length, length))
    for i, (u, v) in enumerate(residual):
        for j in range(length):
            same = sign_label(log_ratios[i]) == sign_label(log_ratios[j])
            inside = abs(u) <= epsilon if same else abs(v) <= epsilon
            jacobian[i, j] = (gamma[sign_label(log_ratios[j])] - float(inside)) / length
            if i == j and abs(u) <= epsilon:
                jacobian[i, j] += 1.0
    return jacobian


def global_regime(log_ratios, budget, k=None):
    """G-I to G-III by what the two channels of the base do."""
    k = len(log_ratios) if k is None else k
    slopes = [
        aggregate_gate_slope_eq10(drift, limit, k)
        for drift, limit in zip(aggregates_eq9(log_ratios), budget)
    ]
    rolling, zeroed = sum(s < 0 for s in slopes), sum(s == 0 for s in slopes)
    if zeroed == 2:
        return "G-III"
    if rolling + zeroed == 2:
        return "G-III,r"
    if zeroed == 1:
        return "G-II"
    return "G-II,r" if rolling else "G-I"


def local_regime(log_ratios, epsilon):
    """L-I none, L-II some, L-III all tokens beyond the fiber's clip."""
    beyond = sum(abs(u) > epsilon for u, _ in residuals_eqs14_15(log_ratios))
    if beyond == 0:
        return "L-I"
    return "L-III" if beyond == len(log_ratios) else "L-II"


def fiberpo_gradient(log_ratios, budget, epsilon, factor, k=None):
    """``dJ/dl_j`` of one trajectory in O(T), with ``factor_i = mu_i A_i``, from Eq. 20."""
    length = len(log_ratios)
    k = length if k is None else k
    drift = aggregates_eq9(log_ratios)
    gamma = {
        +1: aggregate_gate_slope_eq10(drift[0], budget[0], k),
        -1: aggregate_gate_slope_eq10(drift[1], budget[1], k),
    }
    residual = residuals_eqs14_15(log_ratios)
    gated = fiberpo_def51_eqs6_16(log_ratios, budget, epsilon, k)
    a = [f * math.exp(g) for f, g in zip(factor, gated)]
    sigma = [sign_label(x) for x in log_ratios]
    inside_u = [abs(u) <= epsilon for u, _ in residual]
    inside_v = [abs(v) <= epsilon for _, v in residual]
    total = math.fsum(a)
    own, other = {}, {}
    for s in (+1, -1):
        own[s] = math.fsum(a[i] for i in range(length) if sigma[i] == s and inside_u[i])
        other[s] = math.fsum(a[i] for i in range(length) if sigma[i] != s and inside_v[i])
    return [
        a[j] * inside_u[j] + (gamma[sigma[j]] * total - own[sigma[j]] - other[sigma[j]]) / length
        for j in range(length)
    ]


def domain_eqs30_33(trajectories, group_of, domain_of, budgets, epsilon):
    """FiberPO-Domain: ``log G`` per trajectory and token.

    ``trajectories`` holds lists of log ratios, ``group_of[t]`` and ``domain_of[t]`` their labels,
    ``budgets`` the pairs of ``"domain"``, ``"group"``, ``"trajectory"``.
    """
    members = {}
    for t, (g, d) in enumerate(zip(group_of, domain_of)):
        members.setdefault(("g", g), []).append(t)
        members.setdefault(("d", d), []).append(t)
    tokens = {key: sum(len(trajectories[t]) for t in ts) for key, ts in members.items()}
    found = []
    for t, log_ratios in enumerate(trajectories):
        group, domain = ("g", group_of[t]), ("d", domain_of[t])
        base, leaf = 0.0, aggregates_eq9(log_ratios)
        for channel, sign in ((0, +1), (1, -1)):
            drift = {
                key: sum(aggregates_eq9(trajectories[m])[channel] for m in ts) / len(ts)
                for key, ts in members.items()
            }
            base += sign * (
                aggregate_gate_eq10(drift[domain], budgets["domain"][channel], tokens[domain])
                + aggregate_gate_eq10(
                    drift[group] - drift[domain], budgets["group"][channel], tokens[group]
                )
                + aggregate_gate_eq10(
                    leaf[channel] - drift[group], budgets["trajectory"][channel], len(log_ratios)
                )
            )
        row = []
        for x, (u, v) in zip(log_ratios, residuals_eqs14_15(log_ratios)):
            s = sign_label(x)
            row.append(base + log_clip_eq12(s * u, epsilon) - log_clip_eq12(s * v, epsilon))
        found.append(row)
    return found


# ------------------------------------------------------------------ any hierarchy, Defs. 6.1, 6.2


@dataclass
class Forest:
    """Contexts with parent, stratum and the caller's id; ``leaf`` of every token."""

    parent: list
    stratum: list
    name: list
    leaf: list

    def path(self, token):
        """Contexts of a token, fine to coarse."""
        context = self.leaf[token]
        while context is not None:
            yield context
            context = self.parent[context]


def grow_forest(strata, lengths, labels, per_token=("turn",)):
    """A forest from ids, one a trajectory or one a token; -1 is absent."""
    parent, stratum, name, leaf, seen = [], [], [], [], {}
    token = 0
    for t, length in enumerate(lengths):
        for _ in range(length):
            here = None
            for s in strata:
                if s == "trajectory":
                    key = (s, t)
                elif s in per_token:
                    key = None if labels[s][token] == -1 else (s, t, labels[s][token])
                else:
                    key = None if labels[s][t] == -1 else (s, labels[s][t])
                if key is None:
                    continue
                if key not in seen:
                    seen[key] = len(parent)
                    parent.append(here)
                    stratum.append(s)
                    name.append(key[-1])
                here = seen[key]
            leaf.append(here)
            token += 1
    return Forest(parent, stratum, name, leaf)


def measure_per_trajectory(lengths):
    """``omega_i = 1 / T``: trajectories weigh equally."""
    return [1.0 / length for length in lengths for _ in range(length)]


def forest_aggregates(log_ratios, omega, forest):
    """Per context ``(S+, S-)`` and token count."""
    size = len(forest.parent)
    plus, minus, mass, count = [0.0] * size, [0.0] * size, [0.0] * size, [0] * size
    for i, x in enumerate(log_ratios):
        for c in forest.path(i):
            plus[c] += omega[i] * max(x, 0.0)
            minus[c] += omega[i] * max(-x, 0.0)
            mass[c] += omega[i]
            count[c] += 1
    return [(plus[c] / mass[c], minus[c] / mass[c]) for c in range(size)], count


def forest_log_gated_ratio(log_ratios, omega, forest, budget_of, epsilon, rollback_of=None):
    """``log G`` of every token of a forest.

    ``budget_of(stratum, name)`` is the pair of a context; ``rollback_of(stratum)`` a number or None
    for the token count. ``epsilon`` None leaves the token gate open.
    """
    drift, count = forest_aggregates(log_ratios, omega, forest)
    gated = []
    for c, above in enumerate(forest.parent):
        budget = budget_of(forest.stratum[c], forest.name[c])
        k = rollback_of(forest.stratum[c]) if rollback_of else None
        k = count[c] if k is None else k
        total = 0.0
        for channel, sign in ((0, +1), (1, -1)):
            residual = drift[c][channel] - (drift[above][channel] if above is not None else 0.0)
            total += sign * aggregate_gate_eq10(residual, budget[channel], k)
        gated.append(total)
    found = []
    for i, x in enumerate(log_ratios):
        base = sum(gated[c] for c in forest.path(i))
        plus, minus = drift[forest.leaf[i]]
        up, down = max(x, 0.0) - plus, max(-x, 0.0) - minus
        if epsilon is not None:
            up, down = log_clip_eq12(up, epsilon), log_clip_eq12(down, epsilon)
        found.append(base + up - down)
    return found


# ---------------------------------------------------------------------------- baselines, App. C.4


def ppo_app_c4(log_ratios, advantages, low, high, dual=None):
    """Sign-aware PPO: the ``G_i`` with ``G A = min(r A, clip(r) A)``, and dual clip."""
    found = []
    for x, a in zip(log_ratios, advantages):
        r = math.exp(x)
        clipped = min(max(r, 1 - low), 1 + high)
        g = r if r * a <= clipped * a else clipped
        if dual is not None and a < 0:
            g = min(g, dual)
        found.append(g)
    return found


def ppo_plain(log_ratios, low, high):
    """PPO without min (Remark C.5)."""
    return [min(max(math.exp(x), 1 - low), 1 + high) for x in log_ratios]


def gspo_app_c4(trajectories, advantages, low, high, sign_aware=True):
    """GSPO: every token carries the clipped geometric mean ratio; sign of the summed advantage."""
    found = []
    for log_ratios, a in zip(trajectories, advantages):
        s = math.exp(math.fsum(log_ratios) / len(log_ratios))
        clipped = min(max(s, 1 - low), 1 + high)
        total = math.fsum(a)
        g = s if sign_aware and s * total <= clipped * total else clipped
        found.append([g] * len(log_ratios))
    return found


def apc_def32(log_ratios, states, delta):
    """APC-Obj: ``1 + clip(r - 1, B)``, ``B = T_s delta`` minus what the others of the state use."""
    found = []
    for i, x in enumerate(log_ratios):
        mine = [j for j in range(len(states)) if states[j] == states[i]]
        others = sum(abs(math.exp(log_ratios[j]) - 1) for j in mine if j != i)
        bound = max(len(mine) * delta - others, 0.0)
        found.append(1 + min(max(math.exp(x) - 1, -bound), bound))
    return found


# ------------------------------------------------------------------------- objective and weights


def objective_def31(mu, gated_ratio, advantages):
    """``J = sum_i mu_i G_i A_i``."""
    return math.fsum(m * g * a for m, g, a in zip(mu, gated_ratio, advantages))


def pessimistic(gated_ratio, log_ratios, advantages):
    """The ``G'`` with ``G' A = min(G A, r A)``."""
    ratios = [math.exp(x) for x in log_ratios]
    return [g if g * a <= r * a else r for g, r, a in zip(gated_ratio, ratios, advantages)]


def token_mean(lengths):
    """``1 / N``."""
    return [1.0 / sum(lengths)] * sum(lengths)


def trajectory_mean(lengths):
    """``1 / (trajectories T)``."""
    return [1.0 / (len(lengths) * length) for length in lengths for _ in range(length)]


def constant_length(lengths, length):
    """``1 / (trajectories L)``."""
    return [1.0 / (len(lengths) * length)] * sum(lengths)


def context_mean(lengths, ids):
    """Mean over the contexts of token means: ``1 / (contexts T_context)``."""
    tokens = {}
    for length, c in zip(lengths, ids):
        tokens[c] = tokens.get(c, 0) + length
    return [
        1.0 / (len(tokens) * tokens[c]) for length, c in zip(lengths, ids) for _ in range(length)
    ]


def central_differences(function, point, step=1e-6):
    """Gradient of ``function(list)``; fails where the one-sided slopes disagree (a kink)."""
    point = [float(x) for x in point]
    here, found = function(point), []
    for j in range(len(point)):
        up, down = list(point), list(point)
        up[j] += step
        down[j] -= step
        f_up, f_down = function(up), function(down)
        right, left = (f_up - here) / step, (here - f_down) / step
        if abs(right - left) > 1e-3 * (1 + abs(right) + abs(left)):
            raise ArithmeticError(f"kink at token {j}: one-sided slopes {left} and {right}")
        found.append((f_up - f_down) / (2 * step))
    return np.array(found)
