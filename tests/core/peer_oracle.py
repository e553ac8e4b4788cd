"""Losses of other methods as loops over floats, from their papers; knows nothing of the library.

Every function gives the terms ``G_i A_i`` of the tokens (to be multiplied by ``mu_i`` and added).
``new`` is differentiated; ``frozen`` holds the same numbers where a paper stops the gradient.
"""

import math
from itertools import pairwise


def starts(lengths):
    """First token of each trajectory, and the end."""
    found = [0]
    for length in lengths:
        found.append(found[-1] + length)
    return found


def clip(x, low, high):
    """``x`` held inside ``[low, high]``."""
    return min(max(x, low), high)


def cispo(new, frozen, old, advantages, lengths, low, high):
    """MiniMax-M1: ``sg(clip(r, 1 - low, 1 + high)) A log pi``; ``low`` None: open."""
    found = []
    for n, f, o, a in zip(new, frozen, old, advantages):
        weight = min(math.exp(f - o), 1 + high)
        if low is not None:
            weight = max(weight, 1 - low)
        found.append(weight * a * n)
    return found


def sapo(new, frozen, old, advantages, lengths, tau_pos, tau_neg):
    """``(4 / tau) sigmoid(tau (r - 1)) A``."""
    found = []
    for n, o, a in zip(new, old, advantages):
        tau = tau_pos if a > 0 else tau_neg
        found.append(4 / tau / (1 + math.exp(-tau * (math.exp(n - o) - 1))) * a)
    return found


def gmpo(new, frozen, old, advantages, lengths, low, high):
    """``(prod_t min-clipped r_t)^(1/T) A``: the clip first, the geometric mean then."""
    found, at = [], starts(lengths)
    for begin, end in pairwise(at):
        total = 0.0
        for i in range(begin, end):
            x = new[i] - old[i]
            total += max(x, -low) if advantages[i] < 0 else min(x, high)
        mean_ratio = math.exp(total / (end - begin))
        found += [mean_ratio * advantages[i] for i in range(begin, end)]
    return found


def divergence(kind, new, old):
    """Between Bernoulli(exp old) and Bernoulli(exp new)."""
    p, q = math.exp(new), math.exp(old)
    if kind == "tv":
        return (abs(p - q) + abs((1 - p) - (1 - q))) / 2
    return q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p))


def dppo(new, frozen, old, advantages, lengths, delta, kind):
    """``M r A`` with ``M = 0`` iff the update leads away and the divergence exceeds delta."""
    found = []
    for n, f, o, a in zip(new, frozen, old, advantages):
        away = (a > 0 and f > o) or (a < 0 and f < o)
        dropped = away and divergence(kind, f, o) > delta
        found.append(0.0 if dropped else math.exp(n - o) * a)
    return found


def cppo(new, frozen, old, advantages, lengths, delta, w_min, delta_b, kind="tv"):
    """``M r A``: position weights and a budget for the prefix."""
    found, at = [], starts(lengths)
    for begin, end in pairwise(at):
        length, used, allowed = end - begin, 0.0, 0.0
        for t in range(1, length + 1):
            i = begin + t - 1
            w = 1.0 if length == 1 else 1 - (1 - w_min) * (t - 1) / (length - 1)
            z = w * divergence(kind, frozen[i], old[i])
            bound = min(delta, delta + delta_b * allowed - used)
            ratio = math.exp(frozen[i] - old[i])
            keep = advantages[i] * (ratio - 1) <= 0 or z <= bound
            found.append(math.exp(new[i] - old[i]) * advantages[i] if keep else 0.0)
            used, allowed = used + z, allowed + w
    return found


def spo(new, frozen, old, advantages, lengths, epsilon):
    """``r A - |A| (r - 1)^2 / (2 epsilon)``."""
    found = []
    for n, o, a in zip(new, old, advantages):
        r = math.exp(n - o)
        found.append(r * a - abs(a) * (r - 1) ** 2 / (2 * epsilon))
    return found


def topr(new, frozen, old, advantages, lengths):
    """``sg(w) A log pi``: 1, or the clipped ratio of the whole answer where it is punished."""
    found, at = [], starts(lengths)
    for begin, end in pairwise(at):
        product = 1.0
        for i in range(begin, end):
            product *= math.exp(frozen[i] - old[i])
        punished = sum(advantages[begin:end]) < 0
        weight = clip(product, 0.0, 1.0) if punished else 1.0
        found += [weight * advantages[i] * new[i] for i in range(begin, end)]
    return found


def truly_ppo(new, frozen, old, advantages, lengths, epsilon, alpha):
    """PPO-RB: ``min(r A, F(r) A)``."""
    found = []
    for n, o, a in zip(new, old, advantages):
        r = math.exp(n - o)
        rolled = r
        if r >= 1 + epsilon:
            rolled = -alpha * r + (1 + alpha) * (1 + epsilon)
        elif r <= 1 - epsilon:
            rolled = -alpha * r + (1 + alpha) * (1 - epsilon)
        found.append(min(r * a, rolled * a))
    return found
