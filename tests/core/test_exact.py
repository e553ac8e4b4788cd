"""`fiberpo.exact`: the two-phase step gives the gradient of the undivided batch."""

import warnings

import numpy as np
import pytest
import torch

import fiberpo
from core.cases import packed, random_case, random_tree
from core.test_ranks import OBJECTIVES
from fiberpo import RatioBatch, exact, recipes
from fiberpo.exact import Route, Stepper
from fiberpo.testing import simulate_ranks

F64 = torch.float64
DOMAIN = OBJECTIVES["fiberpo_domain"]


def with_states(case):
    case.labels["state"] = [i % 9 for i in range(len(case.log_ratios))]
    return case


def cut(batch, place):
    """Parts of a batch by the part of every row, and the positions of their tokens."""
    place = torch.as_tensor(place)
    parts, tokens = [], []
    for k in range(int(place.max()) + 1):
        rows = (place == k).nonzero().flatten()
        parts.append(batch.select(rows))
        tokens.append(torch.isin(batch.row, rows).nonzero().flatten())
    return parts, tokens


def step(stepper, parts, **more):
    """One optimizer step; the window and d loss / d log_probs of every part."""
    leaves = [part.log_probs.detach().clone().requires_grad_() for part in parts]
    window = stepper.backward(parts, lambda k: leaves[k], **more)
    return window, [-leaf.grad for leaf in leaves]


TORN = [0, 1, 2] * 4


@pytest.mark.parametrize("name", OBJECTIVES)
def test_micro_batches_add_up_to_the_whole(name):
    """Every group is torn; coefficients, loss and metrics are those of one call."""
    batch = with_states(random_case(1)).batch()
    whole = OBJECTIVES[name](batch)
    parts, tokens = cut(batch, TORN)
    window, found = step(Stepper(OBJECTIVES[name]), parts)
    for got, at in zip(found, tokens):
        torch.testing.assert_close(got, whole.coefficients[at], rtol=1e-10, atol=1e-14)
    assert float(window.value()) == pytest.approx(whole.loss.item(), abs=1e-14)
    assert window.statistics.compute() == pytest.approx(whole.metrics(), rel=1e-9, abs=1e-12)
    expected = OBJECTIVES[name].weights(batch)
    for got, at in zip(window.weights, tokens):
        torch.testing.assert_close(got, expected[at])


def test_trees_in_micro_batches():
    """Branches of different depth."""
    batch, objective = random_tree(2).batch(), OBJECTIVES["fiberpo_domain, turns"]
    whole = objective(batch)
    parts, tokens = cut(batch, TORN)
    _, found = step(Stepper(objective), parts)
    for got, at in zip(found, tokens):
        torch.testing.assert_close(got, whole.coefficients[at], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("name", ["fiberpo_domain", "fiberpo", "apc", "grpo, group mean"])
@pytest.mark.parametrize("gradients", ["averaged", "summed"])
def test_ranks_with_micro_batches_of_their_own(name, gradients):
    """Three ranks, the last without a token, two micro-batches each, groups torn over all."""
    case = with_states(random_case(1))
    batch, objective = case.batch(), OBJECTIVES[name]
    whole = objective(batch)
    place = [0, 1, 2, 3] * 3  # part 2 k + j of rank k; rank 2 has two empty parts
    parts, tokens = cut(batch, place)
    empty = batch.select(torch.tensor([], dtype=torch.long))
    by_rank = [parts[:2], parts[2:], [empty, empty]]

    def work(mine, ranks):
        window, found = step(Stepper(objective, collective=ranks, gradients=gradients), mine)
        return found, float(window.value()), window.route

    outs = simulate_ranks(work, by_rank)
    scale = 3 if gradients == "averaged" else 1
    for rank, (found, value, _) in enumerate(outs):
        assert value == pytest.approx(whole.loss.item(), abs=1e-14)
        for got, at in zip(found, tokens[2 * rank :]):
            torch.testing.assert_close(got / scale, whole.coefficients[at], rtol=1e-9, atol=1e-14)
    assert len({route for _, _, route in outs}) == 1


# -- pieces of trajectories ------------------------------------------------------------------


def F64_of(values):
    return torch.tensor(values, dtype=F64)


def in_pieces(case, at=1):
    """Every trajectory as two rows, cut after ``at`` tokens, on two ranks; token positions."""
    starts = np.cumsum([0, *case.lengths])
    found = []
    for rank in range(2):
        tokens, lengths = [], []
        for t, length in enumerate(case.lengths):
            cut_at = starts[t] + (at if t % 3 else length)  # every third stays whole on rank 0
            mine = range(starts[t], cut_at) if rank == 0 else range(cut_at, starts[t + 1])
            tokens += mine
            lengths.append(len(mine))
        labels = {k: v for k, v in case.labels.items() if k in ("domain", "group")}
        labels = {k: torch.tensor(v) for k, v in labels.items()}
        labels["trajectory"] = [f"t{t}" for t in range(len(case.lengths))]
        labels["turn"] = torch.tensor([case.labels["turn"][i] for i in tokens])
        batch = packed(
            [case.log_ratios[i] for i in tokens], [case.advantages[i] for i in tokens], lengths,
            labels=labels, rollout_log_probs=F64_of([ROLLOUT[i % 7] for i in tokens]),
        )  # fmt: skip
        found.append((batch, torch.tensor(tokens)))
    return found


ROLLOUT = [0.3, -0.2, 0.0, 0.5, -0.4, 0.1, -0.3]
MASKED = fiberpo.Objective(
    fiberpo.Weights.trajectory_mean(), fiberpo.open_gates(()), fiberpo.MeanDivergence(0.07)
)


@pytest.mark.parametrize(
    "name",
    ["fiberpo_domain", "fiberpo_domain, turns", "fiberpo_domain, token measure", "fiberpo", "gspo",
     "grpo", "ratio clip of groups", "masked"],
)  # fmt: skip
def test_a_trajectory_in_pieces_on_two_ranks(name):
    """Context parallelism: T_tau, aggregates and masks are those of the whole trajectory."""
    case = random_case(3)
    objective = {**OBJECTIVES, "masked": MASKED}[name]
    rollout = F64_of([ROLLOUT[i % 7] for i in range(len(case.log_ratios))])
    whole = objective(case.batch(rollout_log_probs=rollout))
    pieces = in_pieces(case)

    def work(batch, ranks):
        window, (found,) = step(Stepper(objective, collective=ranks, gradients="summed"), [batch])
        return found, float(window.value()), window.statistics

    outs = simulate_ranks(work, [batch for batch, _ in pieces])
    for (found, value, _), (_, at) in zip(outs, pieces):
        torch.testing.assert_close(found, whole.coefficients[at], rtol=1e-9, atol=1e-14)
        assert value == pytest.approx(whole.loss.item(), abs=1e-14)
    merged = outs[0][2].merge(outs[1][2]).compute()
    assert merged == pytest.approx(whole.metrics(), rel=1e-9, abs=1e-12)


def test_pieces_in_micro_batches_of_one_rank():
    """Also where the pieces lie in two micro-batches; without the ids it is another objective."""
    case = random_case(3)
    whole = DOMAIN(case.batch())
    pieces = in_pieces(case)
    parts = [batch for batch, _ in pieces]
    window, found = step(Stepper(DOMAIN), parts)
    assert window.route is Route.TWO_PHASE
    for got, (_, at) in zip(found, pieces):
        torch.testing.assert_close(got, whole.coefficients[at], rtol=1e-9, atol=1e-14)
    assert RatioBatch.concatenate(parts).trajectories == 12


def test_a_trajectory_in_two_groups_is_refused():
    """Pieces must agree about what lies above them."""
    with pytest.raises(fiberpo.StrataError, match='trajectory "7" lies in two contexts'):
        packed([0.1, 0.2], [1.0, 1.0], [1, 1], labels={"trajectory": [7, 7], "group": [0, 1]})


def test_every_row_needs_a_trajectory_id():
    """-1 would leave its tokens without T_tau."""
    with pytest.raises(fiberpo.StrataError, match=r'labels\["trajectory"\] has no id for row 1'):
        packed([0.1, 0.2], [1.0, 1.0], [1, 1], labels={"trajectory": ["a", None]})


# -- routes ----------------------------------------------------------------------------------


def counted(stepper, parts, **more):
    """A step and how often the policy was asked."""
    calls = []
    leaves = [part.log_probs.detach().clone().requires_grad_() for part in parts]

    def forward(k):
        calls.append(k)
        return leaves[k]

    return stepper.backward(parts, forward, **more), calls


def test_no_second_forward_where_contexts_lie_inside_micro_batches():
    """Trajectory gates always; group gates where groups are whole."""
    case = random_case(1)
    parts, _ = cut(case.batch(), TORN)
    window, calls = counted(Stepper(recipes.fiberpo()), parts)
    assert (window.route, calls) == (Route.CONTAINED, [0, 1, 2])
    by_group = {"group": (0.08, 0.05), "trajectory": (0.12, 0.05)}
    objective = recipes.fiberpo_domain(by_group)
    assert counted(Stepper(objective), parts)[0].route is Route.TWO_PHASE
    whole_groups, tokens = cut(case.batch(), [g % 2 for g in case.labels["group"]])
    window, calls = counted(Stepper(objective), whole_groups)
    assert (window.route, calls) == (Route.CONTAINED, [0, 1])
    whole = objective(case.batch())
    _, found = step(Stepper(objective), whole_groups)
    for got, at in zip(found, tokens):
        torch.testing.assert_close(got, whole.coefficients[at], rtol=1e-10, atol=1e-14)


def test_a_group_that_straddles_ranks_is_not_contained():
    """Nor on the rank where nothing straddles: all ranks take the same route."""
    objective = recipes.fiberpo_domain({"group": (0.08, 0.05), "trajectory": (0.12, 0.05)})
    labels = [["a", "b"], ["b", "c"], ["d", "e"]]
    batches = [packed([0.1, 0.3], [1.0] * 2, [1, 1], labels={"group": g}) for g in labels]
    parts = [[b.select(torch.tensor([0])), b.select(torch.tensor([1]))] for b in batches]
    routes = simulate_ranks(lambda p, r: Stepper(objective, collective=r).open(p).route, parts)
    assert routes == [Route.TWO_PHASE] * 3
    routes = simulate_ranks(lambda p, r: Stepper(objective, collective=r).open(p).route, parts[::2])
    assert routes == [Route.CONTAINED] * 2


def test_a_group_cut_on_one_rank_only_is_contained_on_none():
    """Rank 0 has a group in two micro-batches, rank 1 has whole groups."""
    objective = recipes.fiberpo_domain({"group": (0.08, 0.05), "trajectory": (0.12, 0.05)})
    batches = [
        packed([0.1, 0.3], [1.0] * 2, [1, 1], labels={"group": list(g)}) for g in ("aa", "bc")
    ]
    parts = [[b.select(torch.tensor([0])), b.select(torch.tensor([1]))] for b in batches]
    routes = simulate_ranks(lambda p, r: Stepper(objective, collective=r).open(p).route, parts)
    assert routes == [Route.TWO_PHASE] * 2


def test_one_micro_batch_a_rank_needs_no_second_forward():
    """Its own forward is phase 1."""
    batches, _ = cut(random_case(1).batch(), [0, 1] * 6)
    outs = simulate_ranks(lambda b, ranks: counted(Stepper(DOMAIN, collective=ranks), [b]), batches)
    assert [(w.route, calls) for w, calls in outs] == [(Route.SINGLE, [0])] * 2


def test_ranks_agree_about_the_route():
    """One rank's torn group, and one rank's second micro-batch, decide for all."""
    objective = recipes.fiberpo_domain({"group": (0.08, 0.05), "trajectory": (0.12, 0.05)})

    def routes(*ids):
        """Per rank the group of its two answers, and their micro-batches."""
        parts = []
        for rank, groups in enumerate(ids):
            labels = {"group": [f"{rank}{g}" if g != "z" else g for g in groups.replace("|", "")]}
            batch = packed([0.1, 0.3], [1.0] * 2, [1, 1], labels=labels)
            rows = [[0], [1]] if "|" in groups else [[0, 1]]
            parts.append([batch.select(torch.tensor(r)) for r in rows])
        return simulate_ranks(
            lambda p, r: Stepper(objective, collective=r).open(p).route.value, parts
        )

    assert routes("a|b", "a|b") == ["contained"] * 2
    assert routes("a|b", "a|a") == ["two-phase"] * 2
    assert routes("az", "az") == ["single"] * 2
    assert routes("az", "a|z") == ["two-phase"] * 2


@pytest.mark.parametrize(("name", "calls"), [("fiberpo_domain", 4), ("fiberpo", 1), ("ppo", 1)])
def test_reductions_that_open_a_window(name, calls):
    """Keys, masses, denominators, route; where nothing can straddle the denominators alone."""
    batches, _ = cut(random_case(1).batch(), [0, 1] * 6)

    def work(batch, ranks):
        window = Stepper(OBJECTIVES[name], collective=ranks).open(list(cut(batch, [0, 1] * 3)[0]))
        return ranks.calls, window.needs_forward

    assert simulate_ranks(work, batches) == [(calls, name == "fiberpo_domain")] * 2


def test_first_update_after_a_rollout_needs_no_second_forward():
    """All log ratios are 0: coefficients are mu A, whatever the gates."""
    case = random_case(1)
    case.log_ratios = [0.0] * len(case.log_ratios)
    parts, tokens = cut(case.batch(), TORN)
    window, calls = counted(Stepper(DOMAIN), parts, fresh=True)
    assert (window.route, calls) == (Route.FRESH, [0, 1, 2])
    _, found = step(Stepper(DOMAIN), parts, fresh=True)
    mu_a = DOMAIN.weights(case.batch()) * case.batch().advantages
    for got, at in zip(found, tokens):
        torch.testing.assert_close(got, mu_a[at], rtol=1e-12, atol=0)


def test_phase_difference_shows_a_forward_that_is_not_deterministic():
    """0 for a deterministic one, the largest gap otherwise."""
    parts, _ = cut(random_case(1).batch(), TORN)
    window, _ = step(Stepper(DOMAIN), parts)
    assert float(window.phase_difference) == 0.0
    noise = iter([0.0, 0.0, 0.0, 0.01, -0.25, 0.02])
    window = Stepper(DOMAIN).backward(
        parts, lambda k: (parts[k].log_probs + next(noise)).requires_grad_()
    )
    assert float(window.phase_difference) == pytest.approx(0.25)


# -- cheaper modes ---------------------------------------------------------------------------


def reference_local(objective, batch, parts, tokens):
    """Coefficients with each part's own aggregates, and the whole's weights."""
    mu = objective.weights(batch)
    found = []
    for part, at in zip(parts, tokens):
        gated = objective.gate_map(part)
        found.append(gated.pullback(mu[at] * part.advantages))
    return found


def test_local_mode_is_what_it_says_and_reports_its_error():
    """Aggregates per micro-batch, denominators of the whole; wrong, by the printed amount."""
    batch = random_case(1).batch()
    parts, tokens = cut(batch, TORN)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fiberpo.FiberPOWarning)
        expected = reference_local(DOMAIN, batch, parts, tokens)
    window, found = step(Stepper(DOMAIN, mode="local", check_every=1), parts)
    assert window.route is Route.LOCAL
    for got, want in zip(found, expected):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-14)
    exact_ones = torch.cat([DOMAIN(batch).coefficients[at] for at in tokens])
    error = float((torch.cat(expected) - exact_ones).norm() / exact_ones.norm())
    assert error > 0.05
    assert float(window.split_error()) == pytest.approx(error, rel=1e-9)


def test_error_is_checked_every_so_many_windows():
    """And costs the extra forward only then."""
    parts, _ = cut(random_case(1).batch(), TORN)
    stepper = Stepper(DOMAIN, mode="local", check_every=3)
    found = [counted(stepper, parts) for _ in range(4)]
    assert [len(calls) for _, calls in found] == [6, 3, 3, 6]
    assert [w.split_error() is not None for w, _ in found] == [True, False, False, True]
    assert all(w.needs_forward is False for w, _ in found[1:3])
    never = Stepper(DOMAIN, mode="local")
    assert [len(counted(never, parts)[1]) for _ in range(2)] == [3, 3]


@pytest.mark.parametrize("ranks", [1, 2])
def test_stale_mode_takes_the_sums_of_the_window_before(ranks):
    """With unchanged log-probs the second window has the exact gates, the third all of it."""
    batch = random_case(1).batch()
    whole = DOMAIN(batch)
    parts, tokens = cut(batch, [0, 1, 2, 3] * 3)
    by_rank = [parts[r::ranks] for r in range(ranks)]
    at_rank = [tokens[r::ranks] for r in range(ranks)]

    def work(mine, group):
        stepper = Stepper(DOMAIN, collective=group, mode="stale", check_every=1, gradients="summed")
        return [(w.route, found, float(w.split_error()))
                for w, found in (step(stepper, mine) for _ in range(3))]  # fmt: skip

    outs = simulate_ranks(work, by_rank)
    for (first, second, third), at in zip(outs, at_rank):
        assert first[0] is second[0] is third[0] is Route.STALE
        assert min(first[2], second[2]) > 0.05
        assert third[2] < 1e-12
        for got, index in zip(third[1], at):
            torch.testing.assert_close(got, whole.coefficients[index], rtol=1e-9, atol=1e-14)


@pytest.mark.filterwarnings("ignore::fiberpo.FiberPOWarning")
def test_stale_mode_knows_nothing_of_new_contexts_and_forgets_at_a_rollout():
    """Contexts not seen before take local sums; ``fresh`` clears the memory."""
    batch = random_case(1).batch()
    parts, tokens = cut(batch, TORN)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fiberpo.FiberPOWarning)
        local = reference_local(DOMAIN, batch, parts, tokens)
    stepper = Stepper(DOMAIN, mode="stale")
    others = random_case(1)
    others.labels.update({k: [10 + i for i in others.labels[k]] for k in ("domain", "group")})
    step(stepper, cut(others.batch(), TORN)[0])
    for fresh in (False, True):
        _, found = step(stepper, parts, fresh=fresh)
        for got, want in zip(found, local):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-14)
    drifted = [part.with_log_probs(part.log_probs + 0.05) for part in parts]
    _, found = step(stepper, drifted)
    other = reference_local(DOMAIN, batch, drifted, tokens)
    assert max(float((a - b).abs().max()) for a, b in zip(found, other)) > 1e-3


def test_stale_mode_remembers_contexts_that_skipped_a_window():
    """A group that was not in the last window keeps the sums of the one before."""
    batch = random_case(1).batch()
    objective = recipes.fiberpo_domain({"group": (0.08, 0.05)})
    parts, tokens = cut(batch, TORN)
    in_three = torch.tensor([g == 3 for g in random_case(1).labels["group"]])
    fewer, _ = cut(batch.select((~in_three).nonzero().flatten()), [0, 1, 2] * 3)
    stepper = Stepper(objective, mode="stale")
    for held in (parts, parts, parts, fewer):
        step(stepper, held)

    def error():
        """Of the tokens of group 3, over their size."""
        _, found = step(stepper, parts)
        whole, mine = objective(batch).coefficients, in_three[batch.row]
        got = torch.empty_like(whole).index_copy_(0, torch.cat(tokens), torch.cat(found))
        return float((got - whole)[mine].norm() / whole[mine].norm())

    assert error() < 1e-12
    stepper.open(parts, fresh=True)
    assert error() > 0.05


def test_approximate_modes_refuse_pieces():
    """T_tau of a piece would be silently wrong."""
    parts = [batch for batch, _ in in_pieces(random_case(3))]
    with pytest.raises(fiberpo.ObjectiveError, match="whole trajectories"):
        Stepper(DOMAIN, mode="local").open(parts)


# -- refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "lokal"}, "mode is 'lokal'"),
        ({"gradients": "mean"}, "gradients is 'mean'"),
        ({"check_every": -1}, "check_every is -1"),
    ],
)
def test_bad_settings_are_refused(arguments, message):
    """Each quotes the value."""
    with pytest.raises(fiberpo.ObjectiveError, match=message):
        Stepper(DOMAIN, **arguments)


def test_a_window_is_used_in_order():
    """No loss before phase 1, none twice, no phase 1 where there is none."""
    parts, _ = cut(random_case(1).batch(), TORN)
    window = Stepper(DOMAIN).open(parts)
    with pytest.raises(fiberpo.ObjectiveError, match="needs the log-probs of all its parts first"):
        window.loss(0, parts[0].log_probs)
    with pytest.raises(fiberpo.ObjectiveError, match="nothing has been evaluated"):
        window.statistics
    with pytest.raises(fiberpo.ObjectiveError, match="2 log-probs for 3 parts"):
        window.fill([p.log_probs for p in parts[:2]])
    window.fill([p.log_probs for p in parts])
    window.loss(0, parts[0].log_probs)
    with pytest.raises(fiberpo.ObjectiveError, match="part 0 .* has had its loss already"):
        window.loss(0, parts[0].log_probs)
    with pytest.raises(fiberpo.ObjectiveError, match="part 3 of a window of 3"):
        window.loss(3, parts[0].log_probs)
    with pytest.raises(fiberpo.ObjectiveError, match="'contained' and needs no log-probs"):
        Stepper(recipes.ppo()).open(parts).fill([p.log_probs for p in parts])
    with pytest.raises(fiberpo.EmptyBatchError, match="no parts"):
        Stepper(DOMAIN).open([])


def test_parts_must_carry_the_same_columns():
    """A label in one part only cannot be matched."""
    one = packed([0.1], [1.0], [1], labels={"group": [0]})
    with pytest.raises(fiberpo.StrataError, match="do not carry the same columns"):
        RatioBatch.concatenate([one, packed([0.1], [1.0], [1])])
    strings = packed([0.1], [1.0], [1], labels={"group": ["0"]})
    with pytest.raises(fiberpo.StrataError, match="integers in one part and strings in another"):
        RatioBatch.concatenate([one, strings])


def test_a_plan_serves_its_own_tokens_only():
    """Other log-probs are fine, other rows are not."""
    case = random_case(1)
    plan = DOMAIN.plan(case.batch())
    other = random_case(2)
    other.lengths, other.labels = case.lengths, case.labels
    other.log_ratios = [x / 2 for x in case.log_ratios]
    other.advantages = case.advantages
    expected = DOMAIN(other.batch()).coefficients
    assert torch.equal(DOMAIN(other.batch(), plan=plan).coefficients, expected)
    with pytest.raises(fiberpo.ObjectiveError, match="the plan was made for"):
        DOMAIN(random_case(2, longest=6).batch(), plan=plan)


# -- batches ---------------------------------------------------------------------------------


def test_padded_parts_take_padded_log_probs():
    """[B, T] in, gradient [B, T] out, zero on what is masked."""
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]]).bool()
    old = torch.full((2, 3), -1.0, dtype=F64)
    part = RatioBatch.from_padded(old, old, torch.ones(2), mask, labels={"group": ["p", "p"]})
    policy = torch.full((2, 3), -0.9, dtype=F64)
    policy[~mask] = float("nan")
    policy.requires_grad_()
    objective = recipes.fiberpo_domain({"group": (0.5, 0.5), "trajectory": (0.5, 0.5)}, epsilon=0.3)
    other = part.select(torch.tensor([1]))
    more = (other.log_probs + 0.1).requires_grad_()
    exact.Stepper(objective).backward([part, other], lambda k: (policy, more)[k])
    assert policy.grad[~mask].tolist() == [0.0, 0.0, 0.0]
    assert (policy.grad[mask] != 0).all()
    with pytest.raises(fiberpo.ShapeError, match=r"\(2, 2\), but the batch was made from \(2, 3\)"):
        part.with_log_probs(policy[:, :2])


def test_with_log_probs_checks_what_it_is_given():
    """Length, finiteness, dtype."""
    batch = packed([0.1, 0.2], [1.0], [2])
    with pytest.raises(fiberpo.ShapeError, match="3 tokens"):
        batch.with_log_probs(torch.zeros(3))
    with pytest.raises(fiberpo.NonFiniteError, match="loss token 1 of trajectory 0"):
        batch.with_log_probs(torch.tensor([0.0, float("nan")], dtype=F64))


def test_select_and_concatenate_are_inverse():
    """Tokens, labels, rollout log-probs and dropped rows."""
    case = random_case(4)
    rollout = torch.randn(len(case.log_ratios), dtype=F64)
    batch = case.batch(rollout_log_probs=rollout)
    parts, tokens = cut(batch, TORN)
    whole = RatioBatch.concatenate(parts)
    at = torch.cat(tokens)
    assert torch.equal(whole.log_probs, batch.log_probs[at])
    assert torch.equal(whole.rollout_log_probs, rollout[at])
    assert torch.equal(whole.advantages, batch.advantages[at])
    for name, label in batch.labels.items():
        per_token = label.codes[at] if label.per_token else label.codes[batch.row][at]
        mine = whole.labels[name]
        mine = mine.codes if mine.per_token else mine.codes[whole.row]
        assert torch.equal(whole.labels[name].values[mine], label.values[per_token])
    reordered = batch.select(torch.tensor([3, 1]))
    assert reordered.lengths.tolist() == [case.lengths[3], case.lengths[1]]
    assert reordered.log_ratio[: case.lengths[3]].tolist() == case.trajectories()[3]
    named = [packed([0.1], [1.0], [1], labels={"group": [g]}) for g in ("b", None, "a")]
    joined = RatioBatch.concatenate(named).labels["group"]
    assert (joined.values, joined.codes.tolist()) == (("a", "b"), [1, -1, 0])
