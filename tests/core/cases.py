"""Batches for the tests: random ones with known structure, and a stand-in for several ranks."""

import warnings
from dataclasses import dataclass, field

import numpy as np
import torch

import fiberpo
from core import oracle
from fiberpo.testing import simulate_ranks

F64 = torch.float64


def packed(log_ratios, advantages, lengths, *, grad=False, **more):
    """A float64 batch whose log ratios are exactly ``log_ratios`` (the old log-probs are 0)."""
    log_probs = torch.as_tensor(np.asarray(log_ratios, dtype=np.float64)).clone()
    if grad:
        log_probs.requires_grad_()
    return fiberpo.RatioBatch.from_packed(
        log_probs,
        torch.zeros_like(log_probs),
        torch.as_tensor(np.asarray(advantages, dtype=np.float64)),
        torch.as_tensor(lengths, dtype=torch.long),
        **more,
    )


def single(log_ratios, advantage=1.0, **more):
    """One trajectory."""
    return packed(log_ratios, [advantage] * len(log_ratios), [len(log_ratios)], **more)


def split(values, lengths):
    """Per trajectory, the list of its tokens' values."""
    found, start = [], 0
    for length in lengths:
        found.append([float(v) for v in values[start : start + length]])
        start += length
    return found


@dataclass
class Case:
    """Everything of a random batch as plain lists."""

    log_ratios: list
    advantages: list
    lengths: list
    labels: dict = field(default_factory=dict)

    def batch(self, *, grad=False, **more):
        """The same as a `RatioBatch`."""
        labels = {k: torch.tensor(v) for k, v in self.labels.items()}
        return packed(
            self.log_ratios, self.advantages, self.lengths, labels=labels, grad=grad, **more
        )

    def trajectories(self):
        """Log ratios per trajectory."""
        return split(self.log_ratios, self.lengths)


def random_case(seed, scale=0.2, longest=5):
    """2 domains x 2 groups, 12 trajectories of 2 to ``longest`` tokens in turns of 1 or 2.

    Groups hold 2, 4, 3 and 3 trajectories: means over groups, trajectories and tokens all differ.
    """
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, longest + 1, 12).tolist()
    tokens = sum(lengths)
    # some trajectories drift as a whole, so that every stratum and both channels are exercised
    shift = np.repeat(rng.normal(0, scale, 12), lengths)
    log_ratios = rng.normal(0, scale / 2, tokens) + shift
    turns = [i // 2 for length in lengths for i in range(length)]
    order = rng.permutation(12)
    group = [(0, 0, 1, 1, 1, 1, 2, 2, 2, 3, 3, 3)[order[t]] for t in range(12)]
    return Case(
        log_ratios.tolist(),
        rng.normal(0, 1, tokens).tolist(),
        lengths,
        {"domain": [g // 2 for g in group], "group": group, "turn": turns},
    )


def random_tree(seed, scale=0.2):
    """A tree whose branches differ in depth.

    Domain 0: groups, no turns. Domain 1: turns, no groups. Group 3: under no domain, no turns.
    """
    case = random_case(seed, scale)
    turns = split(case.labels["turn"], case.lengths)
    domain, group = list(case.labels["domain"]), list(case.labels["group"])
    for t in range(12):
        if group[t] == 2:
            group[t] = -1
        else:
            turns[t] = [-1.0] * len(turns[t])
            domain[t] = -1 if group[t] == 3 else domain[t]
    case.labels = {
        "domain": domain,
        "group": group,
        "turn": [int(x) for row in turns for x in row],
    }
    return case


def fixed_budget(pairs):
    """``budget_of`` of the oracle for one pair per stratum."""
    return lambda stratum, name: pairs[stratum]


def hierarchy_oracle(case, budgets, epsilon, measure="trajectory", log_ratios=None, **more):
    """``log G`` of a case by loops; ``budgets`` maps strata, in order, to pairs."""
    forest = oracle.grow_forest(list(budgets), case.lengths, case.labels)
    omega = (
        oracle.measure_per_trajectory(case.lengths)
        if measure == "trajectory"
        else [1.0] * len(case.log_ratios)
    )
    values = case.log_ratios if log_ratios is None else log_ratios
    return oracle.forest_log_gated_ratio(
        values, omega, forest, fixed_budget(budgets), epsilon, **more
    )


def run_ranks(objective, batches, **more):
    """Call the objective on every part at once; the surrogates in rank order."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fiberpo.FiberPOWarning)  # parts may hold single contexts
        return simulate_ranks(lambda b, ranks: objective(b, collective=ranks, **more), batches)
