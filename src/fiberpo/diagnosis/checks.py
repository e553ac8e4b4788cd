"""The checks: from `Evidence` (and what is known of the host) to findings."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import NoneType

import numpy as np

from ..gates import AggregateGate
from ..objective import Objective
from .evidence import Drift, Evidence
from .findings import Finding, ranked
from .limits import limits
from .settings import HostSettings, inert, token_clip

FAR = 20.0
"""A budget this many times above the p90 of its drifts, or below it, is out of place."""

DISTINCT = 16
"""Different log-probs that a column must hold before bf16 is concluded from them."""

LARGE = 0.25
"""Part of a budget above which a drift of both channels counts as large."""

MOST, MOST_TOKENS = 0.5, 0.9
"""Gated share of contexts, and of tokens, above which little of the gradient can be left."""

BIASED, HALF = 0.2, 20
"""Difference of acceptance between short and long trajectories; how many of each are needed."""


def check(evidence: Evidence, host: HostSettings, *, first_step: bool = False) -> list[Finding]:
    """All findings from what was seen.

    Args:
        evidence: of one step or many.
        host: settings, as far as they are known.
        first_step: the only step seen is the first after a rollout: log ratios of 0 are right.
    """
    if not evidence.steps:
        return []
    found = [
        *_anchor(evidence, host, first_step), *_advantages(evidence), *_group_ids(evidence, host),
        *_precision(evidence), *_mismatch(evidence), *_length_bias(evidence), *_noise(evidence),
    ]  # fmt: skip
    if evidence.steps > evidence.fresh:
        found += [*_idle(evidence), *_budgets(evidence)]
    return ranked(found)


def _anchor(evidence: Evidence, host: HostSettings, first_step: bool) -> Iterator[Finding]:
    if evidence.fresh < evidence.steps or first_step:
        return
    numbers = {"steps": evidence.steps, "updates_per_rollout": host.updates}
    known = inert(host, evidence.objective)
    if known:
        yield known[0]
    elif host.updates is None and evidence.steps < 2:
        return
    elif host.updates is None:
        yield Finding(
            "inert-gates", "error",
            f"GATES ARE INERT: every log ratio is 0 in all {evidence.steps} steps.",
            "Every rollout is used for one optimizer step, or old_log_probs are taken from the "
            "current policy: no gate can act.",
            "Take several optimizer steps on each rollout, with the old_log_probs of its start.",
            numbers,
        )  # fmt: skip
    elif evidence.steps >= host.updates and evidence.zero_advantage_steps < evidence.steps:
        yield Finding(
            "old-equals-current", "error",
            f"Every log ratio is 0 in all {evidence.steps} steps, with {host.updates:g} updates "
            f"per rollout ({host.cause}).",
            "Only the first update of a rollout should look like that: old_log_probs are computed "
            "anew at every update, so the ratio is always 1 and no gate can act.",
            "Score the rollout once, before its first update, and keep those log-probs (or, if the "
            "weights do not change at all, look at the learning rate).",
            numbers,
        )  # fmt: skip


def _advantages(evidence: Evidence) -> Iterator[Finding]:
    zero, steps = evidence.zero_advantage_steps, evidence.steps
    if not zero:
        return
    yield Finding(
        "zero-advantages", "error" if zero == steps else "warning",
        f"All advantages are 0 in {zero} of {steps} steps.",
        "There is no gradient in such a step: all answers to a prompt had the same reward, or a "
        "filter removed the others.",
        "Look at the rewards: a task that is always or never solved, a reward function that "
        "returns a constant, one answer per prompt.",
        {"steps": steps, "zero_steps": zero},
    )  # fmt: skip


def _group_ids(evidence: Evidence, host: HostSettings) -> Iterator[Finding]:
    if not evidence.groups:
        return
    alone, groups = evidence.groups_of_one, evidence.groups
    if 2 * alone > groups:
        yield Finding(
            "group-of-one", "error" if alone == groups else "warning",
            f"{alone} of {groups} prompt groups have a single answer.",
            "The advantage of a lone answer is 0 where it is centred in its group, and its "
            "trajectory has no residual drift: the trajectory's gate cannot act.",
            "Sample several answers to a prompt and keep them in one optimizer step; if you do, "
            'the ids are wrong: labels["group"] must be the same for all answers to a prompt.',
            {"groups": groups, "groups_of_one": alone},
        )  # fmt: skip
    elif host.generations and 10 * evidence.small_groups > groups:
        yield Finding(
            "cut-groups", "warning" if "group" in _strata(evidence) else "note",
            f"{evidence.small_groups} of {groups} prompt groups have fewer than the "
            f"{host.generations} answers that were sampled.",
            "prompt groups are cut: group gates see parts of them (or answers without a loss token "
            "were dropped).",
            "Keep the answers to a prompt in one optimizer step (keep_groups_together in TRL).",
            {"groups": groups, "small_groups": evidence.small_groups},
        )  # fmt: skip
    if evidence.mixed_groups:
        yield Finding(
            "ids-do-not-nest", "error",
            f'labels["group"] {evidence.mixed_groups[0]!r} has answers to different prompts.',
            "Group ids repeat where they should differ (they restart in every domain, or belong to "
            "rows in another order): group drifts and centred advantages mix prompts.",
            "Make one id for each prompt of a step, and shuffle ids together with their rows.",
            {"groups": evidence.mixed_groups},
        )  # fmt: skip


def _strata(evidence: Evidence) -> list[str]:
    return [] if evidence.objective is None else list(evidence.objective.strata)


def _precision(evidence: Evidence) -> Iterator[Finding]:
    found = [
        name for name, distinct in evidence.values.items()
        if distinct >= DISTINCT and name not in evidence.not_bf16
    ]  # fmt: skip
    if found:
        yield Finding(
            "bf16-log-probs", "warning",
            f"Every number in {', '.join(found)} is one that bf16 has.",
            "They were computed or stored in bf16, whose rounding is of the size of the drifts "
            "that gates above the token measure.",
            "Cast the logits to float32 before the log-softmax, and keep log-probs in float32; the "
            "model may stay in bf16.",
            {"columns": found},
        )  # fmt: skip


def _mismatch(evidence: Evidence) -> Iterator[Finding]:
    if not evidence.mismatch or evidence.objective is None:
        return
    pair = _finest(evidence.objective)
    if pair is None:
        return
    stratum, budget = pair
    p90 = np.quantile(np.concatenate(evidence.mismatch, axis=1), 0.9, axis=1)
    share = p90 / np.array(budget)
    if share.max() > 0.5:
        yield Finding(
            "rollout-mismatch", "warning",
            f"The anchor is {p90[0]:.3g} / {p90[1]:.3g} nats per token away from the policy that "
            f"sampled (p90 over trajectories, + / -); the budget of the {stratum} is "
            f"{budget[0]:g} / {budget[1]:g}.",
            "Engine and trainer disagree by as much as the policy may move. The gates compare "
            "current with old and do not see it; the gradient is off-policy all the same.",
            "Align the two (precision, temperature, router replay), or correct for it: "
            "correction='tis' or a mask on the divergence (docs/masks.md).",
            {"p90": p90.tolist(), "budget": list(budget), "stratum": stratum},
        )  # fmt: skip


def _finest(objective: Objective) -> tuple[str, tuple[float, float]] | None:
    """The finest stratum, and its tightest budget; None where it has a gate of another kind."""
    name = objective.strata[-1] if objective.strata else None
    if name is None or not isinstance(
        objective.gate_map.gates.get(name), (AggregateGate, NoneType)
    ):
        return None
    pairs = [(pair[0], pair[1]) for _, pair in limits(objective)[name] if pair is not None]
    known = [pair for pair in pairs if math.isfinite(max(pair))]
    return (name, min(known)) if known else None


def _length_bias(evidence: Evidence) -> Iterator[Finding]:
    if not evidence.accepted:
        return
    lengths, kept = np.concatenate(evidence.accepted, axis=1)
    middle = np.median(lengths)
    short, long = kept[lengths <= middle], kept[lengths > middle]
    if min(len(short), len(long)) < HALF:
        return
    apart = short.mean() - long.mean()
    if abs(apart) <= BIASED:
        return
    yield Finding(
        "mask-length-bias", "warning",
        f"The mask keeps {short.mean():.0%} of the trajectories of up to {middle:.0f} tokens and "
        f"{long.mean():.0%} of the longer ones.",
        "A threshold on the largest divergence of a token rejects long answers more, whatever they "
        "say: the policy learns from short ones.",
        "Use MeanDivergence or LengthNeutral (docs/masks.md), or a threshold that grows with T.",
        {"length": float(middle), "kept_short": float(short.mean()),
         "kept_long": float(long.mean())},
    )  # fmt: skip


def _noise(evidence: Evidence) -> Iterator[Finding]:
    """Both channels large, and the mean log ratio much nearer to 0 than ``-mean l^2 / 2``."""
    if not evidence.moved_tokens:
        return
    count = evidence.moved_tokens
    positive, negative = (evidence.channels / count).tolist()
    mean, expected = evidence.lost / count, evidence.expected / count
    error = math.sqrt(evidence.spread) / count
    pair = None if evidence.objective is None else _finest(evidence.objective)
    floor = 0.01 if pair is None else LARGE * min(pair[1])
    if min(positive, negative) < floor or expected < 4 * error or abs(mean) > expected / 4:
        return
    yield Finding(
        "noise", "warning",
        f"Both channels drift by {positive:.3g} / {negative:.3g} nats per token, and -mean l is "
        f"{mean:.2g}, where a change of the policy gives about mean l^2 / 2 = {expected:.2g} "
        f"(standard error {error:.1g}).",
        "Under the policy that sampled, the mean of the ratio is 1. Log ratios that scatter around "
        "0 instead are errors of the log-probs (precision, other kernels, dropout, experts chosen "
        "anew), not learning; the gates act on noise.",
        "Score the same tokens twice with the same weights: the log ratio should be 0. Then look "
        "at bf16 logits, dropout, padding and batch-dependent kernels.",
        {"drift_pos": positive, "drift_neg": negative, "k1": mean, "expected": expected,
         "standard_error": error},
    )  # fmt: skip


def _idle(evidence: Evidence) -> Iterator[Finding]:
    moved = evidence.steps - evidence.fresh
    for stratum, steps in evidence.idle.items():
        if 2 * steps <= moved:
            continue
        yield Finding(
            "idle-stratum", "warning",
            f"In {steps} of {moved} steps every context of {stratum} is the only child of its "
            "parent.",
            "Its residual drift is 0 and its gate cannot act: one prompt group a domain, one "
            "answer a group, or batches recorded micro-batch by micro-batch.",
            "Put more prompts or answers into an optimizer step, evaluate the objective on the "
            "whole step (docs/exact.md), or leave the stratum out.",
            {"stratum": stratum, "steps": steps},
        )  # fmt: skip


def _budgets(evidence: Evidence) -> Iterator[Finding]:
    drifts, moved = evidence.drifts(), evidence.steps - evidence.fresh
    yield from budget_findings(drifts, set(evidence.idle) if moved else set())
    token = next((d for d in drifts if d.stratum == "token"), None)
    if token is not None and token.gated == 0:
        yield from token_clip(evidence.objective)


def budget_findings(drifts: list[Drift], idle: set[str]) -> Iterator[Finding]:
    """Limits beside the drifts that they bound; strata in ``idle`` cannot drift."""
    for drift in drifts:
        if drift.limit is None or drift.stratum in idle:
            continue
        ratios = [c / x for c, x in zip(drift.limit, drift.p90, strict=True) if x > 0]
        numbers = {"stratum": drift.stratum, "context": drift.context, "budget": drift.limit,
                   "p90": list(drift.p90), "gated": drift.gated}  # fmt: skip
        beside = (
            f"{drift.place}: budget {drift.limit[0]:.3g} / {drift.limit[1]:.3g}, p90 of the drift "
            f"{drift.p90[0]:.3g} / {drift.p90[1]:.3g} (+ / -)"
        )
        if ratios and min(ratios) > FAR:
            yield Finding(
                "budget-too-wide", "warning",
                f"{beside}: {min(ratios):.0f} times as wide.",
                "The gate never acts: this stratum is not bounded at all.",
                "fiberpo suggest RUN proposes budgets from the recorded drifts; or leave the "
                "stratum out.", numbers,
            )  # fmt: skip
        elif ratios and min(ratios) < 1 / FAR:
            yield Finding(
                "budget-too-narrow", "error",
                f"{beside}: {1 / min(ratios):.0f} times as narrow.",
                f"{drift.gated:.0%} are gated: next to no gradient passes. Often an offset of a "
                "ratio was given where nats per token are meant.",
                "fiberpo suggest RUN proposes budgets from the recorded drifts.", numbers,
            )  # fmt: skip
        elif drift.gated > (MOST_TOKENS if drift.stratum == "token" else MOST):
            yield Finding(
                "mostly-gated", "error" if drift.gated > MOST_TOKENS else "warning",
                f"{beside}: {drift.gated:.0%} are gated.",
                "The budget lies below the usual drift, so the gate removes most of the gradient "
                "that passes through this stratum, not only outliers.",
                "fiberpo suggest RUN proposes budgets from the recorded drifts; or take fewer "
                "updates per rollout, or a lower learning rate.", numbers,
            )  # fmt: skip


__all__ = ["budget_findings", "check"]
