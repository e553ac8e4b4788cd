"""Deliberate faults: what is replaced in which file, and the test that must turn red."""

from typing import NamedTuple


class Mutant(NamedTuple):
    """One fault. ``old`` occurs exactly once in ``file``; ``killer`` fails once it is ``new``."""

    name: str
    file: str
    old: str
    new: str
    killer: str


MUTANTS = [
    Mutant(
        "residual of the tokens from the gated aggregate",
        "gating.py",
        "token_drift = drift - strata.at_tokens(mean)",
        "token_drift = drift - strata.at_tokens(strata.sum_path(gated.value))",
        "test_fiberpo.py::test_residual_is_taken_from_the_ungated_aggregate[1-0.1]",
    ),
    Mutant(
        "residual of a context without its parent",
        "gating.py",
        "residual = mean - strata.of_parent(mean)",
        "residual = mean",
        "test_hierarchy.py::test_three_strata_are_eqs_30_to_33",
    ),
    Mutant(
        "channels of the decomposition swapped",
        "charts.py",
        "[torch.where(positive, log_ratio, zero), torch.where(positive, zero, -log_ratio)]",
        "[torch.where(positive, zero, -log_ratio), torch.where(positive, log_ratio, zero)]",
        "test_worked_cases.py::test_everything_passes",
    ),
    Mutant(
        "budgets of the two channels swapped",
        "gates.py",
        "return aggregate_gate(drift, pairs, count)",
        "return aggregate_gate(drift, pairs.flip(0), count)",
        "test_worked_cases.py::test_channels_have_their_own_budgets",
    ),
    Mutant(
        "rollback slope T - 1 in the value",
        "gates.py",
        "(count + 1) * finite - count * drift",
        "count * finite - (count - 1) * drift",
        "test_worked_cases.py::test_trajectory_in_its_rollback_zone",
    ),
    Mutant(
        "rollback slope T - 1 in the closed form",
        "gates.py",
        "torch.where(rolling, -count * one, 0 * one)",
        "torch.where(rolling, -(count - 1) * one, 0 * one)",
        "test_gates.py::test_autograd_of_the_aggregate_gate_is_its_slope",
    ),
    Mutant(
        "padded length as T in the weights",
        "weights.py",
        "(trajectories * batch.trajectory_lengths)[batch.trajectory]",
        "(trajectories * batch.trajectory_lengths.amax())",
        "test_weights.py::test_weights_by_hand[trajectory_mean]",
    ),
    Mutant(
        "padded length as T in the gate",
        "layout.py",
        "rows = [omega, ones, *",
        "rows = [omega, omega * batch.lengths.amax(), *",
        "test_hierarchy.py::test_rollback_coupling_of_a_domain_is_minus_mean_length_over_length",
    ),
    Mutant(
        "group mean over tokens instead of trajectories",
        "layout.py",
        'if measure == "trajectory":',
        "if False:",
        "test_worked_cases.py::test_group_over_two_trajectories",
    ),
    Mutant(
        "mask that renormalises",
        "objective.py",
        "weight = weight * self.mask(batch)[batch.trajectory]",
        "kept = self.mask(batch)\n"
        "                weight = weight * kept[batch.trajectory] / kept.double().mean()",
        "test_masks.py::test_masked_loss_by_hand",
    ),
    Mutant(
        "sign(0) = 0",
        "charts.py",
        "positive = (log_ratio >= 0).to(log_ratio.dtype)\n"
        "        return torch.stack([positive, positive - 1])",
        "return torch.stack([(log_ratio > 0).double(), -(log_ratio < 0).double()])",
        "test_gradients.py::test_on_policy_the_gradient_is_the_plain_policy_gradient[fiberpo]",
    ),
    Mutant(
        "sign(0) = -1 in the value",
        "charts.py",
        "positive = log_ratio >= 0\n",
        "positive = log_ratio > 0\n",
        "test_fiberpo.py::test_zero_log_ratio_has_sign_plus_one",
    ),
    Mutant(
        "sign(0) = -1 in the closed form",
        "charts.py",
        "positive = (log_ratio >= 0).to",
        "positive = (log_ratio > 0).to",
        "test_fiberpo.py::test_closed_form_gives_zero_log_ratio_the_sign_plus_one",
    ),
    Mutant(
        "context sums not merged over ranks",
        "gating.py",
        "mean = at.match.merge(sums) / at.mass",
        "mean = sums / at.mass",
        "test_ranks.py::test_ranks_together_have_the_coefficients_of_one_process"
        "[two ranks-fiberpo_domain]",
    ),
    Mutant(
        "cross terms between ranks dropped (second merge skipped)",
        "gating.py",
        "context_adjoint = at.match.merge(below - finer)",
        "context_adjoint = below - finer",
        "test_ranks.py::test_ranks_together_have_the_coefficients_of_one_process"
        "[two ranks-fiberpo_domain]",
    ),
    Mutant(
        "weights counted per rank",
        "weights.py",
        "return collective.total(torch.stack([torch.full_like(share, len(batch)), share]))",
        "return torch.stack([torch.full_like(share, len(batch)), share])",
        "test_ranks.py::test_ranks_together_have_the_coefficients_of_one_process[two ranks-grpo]",
    ),
    Mutant(
        "closed form without the gates of the children",
        "gating.py",
        "finer = strata.add_to_parents(below) + leaf.rows(at_token)",
        "finer = leaf.rows(at_token)",
        "test_gradients.py::test_coefficients_are_central_differences[0-fiberpo_domain]",
    ),
    Mutant(
        "closed form without the fiber's share of the aggregate",
        "gating.py",
        "finer = strata.add_to_parents(below) + leaf.rows(at_token)",
        "finer = strata.add_to_parents(below)",
        "test_worked_cases.py::test_everything_passes",
    ),
    Mutant(
        "closed form without the measure",
        "gating.py",
        "return at.omega * strata.at_tokens(strata.sum_path(context_adjoint / at.mass))",
        "return strata.at_tokens(strata.sum_path(context_adjoint / at.mass))",
        "test_worked_cases.py::test_group_over_two_trajectories",
    ),
    Mutant(
        "pessimistic maximum instead of minimum",
        "gating.py",
        "torch.where(self.batch.advantages >= 0, lower, higher)",
        "torch.where(self.batch.advantages >= 0, higher, lower)",
        "test_fiberpo.py::test_pessimistic_form_is_the_minimum",
    ),
    Mutant(
        "budget itself no longer passes",
        "gates.py",
        "passing = size <= budget",
        "passing = size < budget",
        "test_gates.py::test_drift_of_exactly_the_budget_passes",
    ),
    Mutant(
        "epsilon itself saturates",
        "gates.py",
        "saturated = drift.abs() > epsilon",
        "saturated = drift.abs() >= epsilon",
        "test_fiberpo.py::test_residual_of_exactly_epsilon_is_unsaturated",
    ),
    Mutant(
        "dual clip on the wrong sign",
        "gates.py",
        "high = torch.where(negative, top, high)",
        "high = torch.where(negative, high, top)",
        "test_baselines.py::test_dual_clip_bounds_the_punished_side_only",
    ),
    Mutant(
        "PPO clips the side that the advantage opposes",
        "gates.py",
        "negative = site.advantage_sign < 0",
        "negative = site.advantage_sign > 0",
        "test_baselines.py::test_ppo_by_hand",
    ),
    Mutant(
        "APC counts a token's own deviation against it",
        "gates.py",
        "bound = multiplicity * radius - (total - drift.abs())",
        "bound = multiplicity * radius - total",
        "test_baselines.py::test_apc_own_copies_count",
    ),
    Mutant(
        "APC without the gradient through the shared budget",
        "gating.py",
        "pulled = pulled + self._pull_states(adjoint * self.token.total_slope)",
        "pulled = pulled * 1",
        "test_worked_cases.py::test_apc_on_two_tokens_of_one_state",
    ),
    Mutant(
        "turns of different trajectories joined",
        "strata.py",
        "trajectory * label.count + label.codes, -1)",
        "label.codes, -1)",
        "test_hierarchy.py::test_turn_ids_are_local_to_their_trajectory",
    ),
    Mutant(
        "context sums in float32",
        "gating.py",
        "strata.push_up(strata.leaf_segments.rows(at.omega * drift))",
        "strata.push_up(strata.leaf_segments.rows((at.omega * drift).float())).double()",
        "test_numerics.py::test_long_sequences_in_float32[rollback-1]",
    ),
    Mutant(
        "signed k1 instead of k3 in the mean mask",
        "masks.py",
        "k3 = torch.expm1(log_rho) - log_rho",
        "k3 = -log_rho",
        "test_masks.py::test_mean_divergence_is_k3",
    ),
    Mutant(
        "labels matched by number instead of id over ranks",
        "strata.py",
        "keys[self.level(k)] = self.context_names[k].keys()",
        "keys[self.level(k)] = torch.arange(1, len(self) + 1)[self.level(k)]",
        "test_ranks.py::test_ranks_agree_by_the_callers_ids",
    ),
    Mutant(
        "a piece of a trajectory takes its own length",
        "batch.py",
        "return replace(found, whole_lengths=found.pieces.merge(self.trajectory_lengths[None])[0])",
        "return found",
        "test_exact.py::test_a_trajectory_in_pieces_on_two_ranks[fiberpo]",
    ),
    Mutant(
        "pieces counted as trajectories",
        "batch.py",
        "return (1.0 / self.trajectory_lengths[self.trajectory]).sum()",
        "return (1.0 / self.lengths.double()[self.row]).sum()",
        "test_exact.py::test_a_trajectory_in_pieces_on_two_ranks[grpo]",
    ),
    Mutant(
        "one pass although contexts straddle micro-batches",
        "exact.py",
        "inside = inside and not match.width and not bool((low < high).any())",
        "inside = inside and not match.width",
        "test_exact.py::test_micro_batches_add_up_to_the_whole[fiberpo_domain]",
    ),
    Mutant(
        "one pass although contexts straddle ranks",
        "exact.py",
        "inside = inside and not match.width and not bool((low < high).any())",
        "inside = inside and not bool((low < high).any())",
        "test_exact.py::test_a_group_that_straddles_ranks_is_not_contained",
    ),
    Mutant(
        "each rank decides its route alone",
        "exact.py",
        "return float(collective.total(flag)) == collective.size",
        "return condition",
        "test_exact.py::test_a_group_cut_on_one_rank_only_is_contained_on_none",
    ),
    Mutant(
        "gradients not scaled for an engine that averages",
        "exact.py",
        'self.scale = collective.size if gradients == "averaged" else 1',
        "self.scale = 1",
        "test_exact.py::test_ranks_with_micro_batches_of_their_own[averaged-fiberpo]",
    ),
    Mutant(
        "stale sums of other contexts",
        "memory.py",
        "torch.where(past.keys[at] == keys, past.values[stage][:, at], values)",
        "past.values[stage][:, at]",
        "test_exact.py::test_stale_mode_knows_nothing_of_new_contexts_and_forgets_at_a_rollout",
    ),
    Mutant(
        "stale memory of the last window only",
        "memory.py",
        "self._past[names] = _updated(self._past.get(names), _Table(keys, values))",
        "self._past[names] = _Table(keys, values)",
        "test_exact.py::test_stale_mode_remembers_contexts_that_skipped_a_window",
    ),
    Mutant(
        "parents not compared over ranks",
        "collective.py",
        "torn = ids[low != high]",
        "torn = ids[:0]",
        "test_ranks.py::test_contexts_that_nest_differently_on_two_ranks_are_refused_on_both",
    ),
]
