"""torchrl: equal to its own GRPO loss where it should be, and exact over parts."""

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tensordict import TensorDict, lazy_stack
from torchrl.modules.llm import TransformersWrapper
from torchrl.objectives.llm import GRPOLoss
from torchrl.objectives.llm.grpo import DAPO

import fiberpo
from core import oracle
from core.cases import run_ranks
from fiberpo import exact, recipes
from fiberpo.integrations.torchrl import REPLACED, FiberPOLoss
from integrations.tiny import tiny_model

ROWS, PROMPT, WIDTH = 6, 3, 10
LENGTHS = (7, 4, 6, 2, 5, 7)
TIGHT = {"domain": (0.02, 0.01), "group": (0.03, 0.02), "trajectory": (0.04, 0.03)}
COUPLED = recipes.fiberpo_domain(TIGHT, 0.05, rollback=2.0)


@pytest.fixture(scope="module")
def actor():
    model, tokenizer = tiny_model()
    return TransformersWrapper(
        model.eval(), tokenizer=tokenizer, input_mode="tokens", generate=False, pad_output=True
    )


def make_rows(actor, lengths=LENGTHS, seed=0):
    """Prompts of 3 tokens, answers of ``lengths``, right-padded; stored log-probs NaN elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    rows = len(lengths)
    full = torch.randint(3, 60, (rows, WIDTH), generator=generator)
    valid = torch.arange(WIDTH) < PROMPT + torch.tensor(lengths)[:, None]
    data = TensorDict(
        {
            ("tokens", "full"): full,
            ("tokens", "prompt"): full[:, :PROMPT],
            ("masks", "all_attention_mask"): valid,
            "advantage": torch.randn(rows, 1, 1, generator=generator),
            "group_id": torch.arange(rows) // 2,
            "domain": torch.arange(rows) // 4,
        },
        batch_size=[rows],
    )
    with torch.no_grad():
        current = log_probs_by_hand(actor, data)
    noise = 0.15 * torch.randn(rows, WIDTH, generator=generator)
    shift = 0.15 * torch.randn(rows, 1, generator=generator)
    answer = answer_mask(data)
    data["log_probs", "full"] = torch.where(answer, current + noise + shift, torch.nan)
    reference = current + 0.2 * torch.randn(rows, WIDTH, generator=generator)
    data["next", "ref_log_probs", "full"] = reference
    return data


def answer_mask(data):
    return data["masks", "all_attention_mask"] & (torch.arange(WIDTH) >= PROMPT)


def log_probs_by_hand(actor, data):
    """Log-probs of the tokens given those before, from the model alone."""
    full = data["tokens", "full"]
    logits = actor.model(full, attention_mask=data["masks", "all_attention_mask"].long()).logits
    chosen = logits[:, :-1].log_softmax(-1).gather(-1, full[:, 1:, None]).squeeze(-1)
    return torch.nn.functional.pad(chosen, (1, 0))


def core_batch(actor, data):
    return fiberpo.RatioBatch.from_padded(
        log_probs_by_hand(actor, data),
        data["log_probs", "full"],
        data["advantage"].flatten(),
        answer_mask(data),
        labels={"group": data["group_id"], "domain": data["domain"]},
    )


def gradients(actor, loss):
    return torch.autograd.grad(loss, list(actor.parameters()), allow_unused=True)


def assert_same(ours, theirs, **tolerance):
    for a, b in zip(ours, theirs, strict=True):
        if b is not None:
            torch.testing.assert_close(a, b, **{"rtol": 1e-4, "atol": 1e-7, **tolerance})


def added(out):
    return sum(value for key, value in out.items() if key.startswith("loss_"))


def plain(actor, objective, **settings):
    return FiberPOLoss(actor, objective=objective, **{"entropy_bonus": False, **settings})


@pytest.mark.parametrize(
    ("recipe", "host"),
    [
        (recipes.grpo(0.1), lambda a: GRPOLoss(
            a, clip_epsilon=0.1, aggregation="prompt_mean", entropy_bonus=False)),
        (recipes.ppo(0.1), lambda a: GRPOLoss(a, clip_epsilon=0.1, entropy_bonus=False)),
        (recipes.dapo(0.1, 0.15), lambda a: DAPO(
            a, clip_epsilon=(0.1, 0.15), entropy_bonus=False)),
    ],
    ids=["grpo", "ppo", "dapo"],
)  # fmt: skip
def test_equals_the_host_own_loss(actor, recipe, host):
    """Same rows: loss and gradient of torchrl's GRPOLoss and DAPO, while the clip acts."""
    data = make_rows(actor)
    ours, theirs = plain(actor, recipe)(data), host(actor)(data)
    assert ours.metrics["gate/active"] > 0.1
    assert ours.loss_objective.item() == pytest.approx(theirs.loss_objective.item(), rel=1e-5)
    assert ours.ESS.item() == pytest.approx(theirs.ESS.item(), rel=1e-4)
    assert_same(
        gradients(actor, ours.loss_objective), gradients(actor, theirs.loss_objective.sum())
    )


def test_entropy_bonus_equals_the_host(actor):
    """With the weights that torchrl uses, 1 / N."""
    data = make_rows(actor)
    ours = plain(actor, recipes.ppo(), entropy_bonus=True, entropy_coeff=0.3)(data)
    theirs = GRPOLoss(actor, entropy_coeff=0.3)(data)
    assert ours.loss_entropy.item() == pytest.approx(theirs.loss_entropy.item(), rel=1e-5)
    assert_same(gradients(actor, ours.loss_entropy), gradients(actor, theirs.loss_entropy))


@pytest.mark.parametrize("name", ["ref", "inference"])
def test_kl_terms_are_weighed_as_the_objective(actor, name):
    """torchrl divides by all positions, padding included: 60 of them for 31 loss tokens here."""
    data = make_rows(actor)
    settings = {f"kl_to_{name}_coeff": 0.5}
    data["log_probs", "full"] = data["log_probs", "full"].nan_to_num(0.0)
    ours = plain(actor, recipes.ppo(), **settings)(data)
    theirs = GRPOLoss(actor, entropy_bonus=False, **settings)(data)
    key = f"loss_kl_to_{name}"
    share = sum(LENGTHS) / (ROWS * WIDTH)
    assert ours.get(key).item() * share == pytest.approx(theirs.get(key).item(), rel=1e-4)
    assert_same(
        [g * share for g in gradients(actor, ours.get(key)) if g is not None],
        [g for g in gradients(actor, theirs.get(key)) if g is not None],
    )


def test_differences_in_what_is_logged(actor):
    """torchrl's clip fraction counts both sides and padding; its means count padding."""
    data = make_rows(actor)
    ours, theirs = plain(actor, recipes.ppo(0.1))(data), GRPOLoss(actor, clip_epsilon=0.1)(data)
    batch = core_batch(actor, data)
    log_ratio, advantages = batch.log_ratio.detach().numpy(), batch.advantages.numpy()
    low, high = math.log(0.9), math.log(1.1)
    outside = (log_ratio < low) | (log_ratio > high)
    assert theirs.clip_fraction.item() == pytest.approx(outside.sum() / (ROWS * WIDTH))
    stopped = np.where(advantages > 0, log_ratio > high, log_ratio < low)
    assert 0 < stopped.sum() < outside.sum()
    assert ours.clip_fraction.item() == pytest.approx(stopped.mean())
    assert ours.kl_approx.item() == pytest.approx(-log_ratio.mean(), rel=1e-4)
    tokens = sum(LENGTHS) / (ROWS * WIDTH)
    assert theirs.kl_approx.item() == pytest.approx(-log_ratio.mean() * tokens, rel=1e-4)


def test_empty_answers_are_in_no_denominator(actor):
    """torchrl's ``prompt_mean`` divides by all 6 rows, here by the 5 that have a loss token."""
    data = make_rows(actor, (7, 0, 6, 2, 5, 7))
    ours = plain(actor, recipes.grpo(0.1))(data)
    theirs = GRPOLoss(actor, clip_epsilon=0.1, aggregation="prompt_mean", entropy_bonus=False)(data)
    assert ours.loss_objective.item() * 5 / 6 == pytest.approx(
        theirs.loss_objective.item(), rel=1e-5
    )


@pytest.mark.parametrize(
    "objective",
    [recipes.fiberpo((0.04, 0.03), 0.03), COUPLED, recipes.gspo(0.02), recipes.apc(0.1)],
    ids=str,
)
def test_equals_the_core_objective(actor, objective):
    """Loss and gradient of the objective on the same rows, read by hand."""
    data = make_rows(actor)
    out = plain(actor, objective)(data)
    whole = objective(core_batch(actor, data))
    assert out.metrics["gate/active"] > 0.1
    assert out.loss_objective.item() == pytest.approx(whole.loss.item(), rel=1e-5)
    assert_same(gradients(actor, out.loss_objective), gradients(actor, whole.loss))
    assert out.metrics == pytest.approx(
        {**whole.metrics(), **{k: v for k, v in out.metrics.items() if "rollout" in k}},
        rel=1e-3, abs=1e-5,
    )  # fmt: skip


def test_gspo_against_loops(actor):
    """torchrl has no sequence ratio; the formula in numpy has."""
    data = make_rows(actor)
    out = plain(actor, recipes.gspo(0.02))(data)
    batch = core_batch(actor, data)
    rows = [list(x) for x in np.split(batch.log_ratio.detach().double().numpy(),
                                      np.cumsum(LENGTHS)[:-1])]  # fmt: skip
    advantages = data["advantage"].flatten().tolist()
    gated = oracle.gspo_app_c4(
        rows, [[a] * n for a, n in zip(advantages, LENGTHS, strict=True)], 0.02, 0.02
    )
    expected = -sum(
        g[0] * a for g, a in zip(gated, advantages, strict=True)
    ) / len(LENGTHS)  # fmt: skip
    assert out.loss_objective.item() == pytest.approx(expected, rel=1e-4)


def halves(data):
    return [data[:1], data[1:4], data[4:]]


@pytest.mark.parametrize(
    "objective",
    [recipes.fiberpo((0.04, 0.03), 0.03), recipes.ppo(0.1), recipes.gspo(0.02)],
    ids=str,
)
def test_parts_with_denominators_add_up(actor, objective):
    """Three tensordicts of 1, 3 and 2 rows: losses and gradients of the undivided batch."""
    data = make_rows(actor)
    settings = {"entropy_bonus": True, "entropy_coeff": 0.1, "kl_to_ref_coeff": 0.2}
    loss = plain(actor, objective, **settings)
    counts = fiberpo.Denominators(sum(LENGTHS), ROWS)
    whole = added(loss(data))
    parts = sum(added(loss(part, denominators=counts)) for part in halves(data))
    assert parts.item() == pytest.approx(whole.item(), rel=1e-5)
    assert_same(gradients(actor, parts), gradients(actor, whole))


def test_a_part_is_refused_where_gates_reach_beyond_it(actor):
    """With the remedy in the message."""
    data = make_rows(actor)
    counts = fiberpo.Denominators(sum(LENGTHS), ROWS)
    with pytest.raises(fiberpo.ObjectiveError, match=r"\['domain', 'group'\].*fiberpo.exact"):
        plain(actor, COUPLED)(data[:3], denominators=counts)


def test_parts_alone_are_wrong(actor):
    """What `split` is for: the sum over parts of their own objectives has another gradient."""
    data = make_rows(actor)
    loss = plain(actor, COUPLED)
    whole = gradients(actor, loss(data).loss_objective)
    with pytest.warns(fiberpo.FiberPOWarning):
        alone = sum(loss(part).loss_objective * len(part) / ROWS for part in halves(data))
    apart = gradients(actor, alone)
    error = sum((a - b).square().sum() for a, b in zip(apart, whole) if b is not None)
    size = sum(b.square().sum() for b in whole if b is not None)
    assert (error / size).sqrt() > 0.1


@pytest.mark.parametrize(
    "objective", [COUPLED, recipes.fiberpo((0.04, 0.03), 0.03)], ids=["coupled", "trajectory"]
)
def test_split_is_exact(actor, objective):
    """Group and domain gates, entropy and KL over three parts: the gradient of the whole."""
    data = make_rows(actor)
    loss = plain(actor, objective, entropy_bonus=True, entropy_coeff=0.1, kl_to_ref_coeff=0.2)
    whole = loss(data)
    expected = gradients(actor, added(whole))
    actor.zero_grad()
    outs = []
    for out in loss.split(exact.Stepper(objective), halves(data)):
        added(out).backward()
        outs.append(out)
    assert sum(o.loss_objective.item() for o in outs) == pytest.approx(
        whole.loss_objective.item(), rel=1e-5
    )
    assert_same([p.grad for p in actor.parameters()], expected)
    assert [o.metrics is None for o in outs] == [True, True, False]
    assert outs[-1].metrics == pytest.approx(whole.metrics, rel=1e-4, abs=1e-6)
    clipped = sum(o.clip_fraction.item() * n for o, n in zip(outs, (7, 12, 12), strict=True))
    assert clipped / 31 == pytest.approx(whole.clip_fraction.item(), abs=1e-6)
    actor.zero_grad()


def test_split_over_ranks(actor):
    """Two ranks with two parts each tear groups and domains apart; their mean is the whole."""
    data = make_rows(actor)
    settings = {"entropy_bonus": True, "entropy_coeff": 0.1, "kl_to_ref_coeff": 0.2}
    expected = gradients(actor, added(plain(actor, COUPLED, **settings)(data)))

    def rank(parts, collective):
        mine = copy.deepcopy(actor)
        stepper = exact.Stepper(COUPLED, collective=collective)
        for out in plain(mine, COUPLED, **settings).split(stepper, parts):
            added(out).backward()
        return [p.grad for p in mine.parameters()]

    both = run_ranks(rank, [[data[:1], data[4:]], [data[1:3], data[3:4]]])
    assert_same([(a + b) / 2 for a, b in zip(*both, strict=True)], expected)


def test_split_wants_the_same_objective(actor):
    """Two objectives would silently be one."""
    loss = plain(actor, COUPLED)
    with pytest.raises(fiberpo.ObjectiveError, match="the stepper optimises grpo"):
        next(loss.split(exact.Stepper(recipes.grpo()), halves(make_rows(actor))))


def test_metrics_do_not_enter_reductions_of_the_output(actor):
    """torchrl's script takes ``loss.mean(reduce=True)``, a mean over every tensor of the output."""
    data = make_rows(actor)
    ours = plain(actor, recipes.ppo(0.1))(data)
    theirs = GRPOLoss(actor, clip_epsilon=0.1, entropy_bonus=False)(data)
    assert_same(
        gradients(actor, ours.mean(reduce=True)), gradients(actor, theirs.mean(reduce=True))
    )


def test_ids_may_have_other_keys_and_be_strings(actor):
    """By ``set_keys``; context names reach the metrics."""
    data = make_rows(actor)
    loss = plain(actor, COUPLED)
    expected = loss(data).loss_objective
    other = data.exclude("group_id", "domain")
    other["env", "prompt"] = data["group_id"][:, None, None].expand(ROWS, WIDTH, 1)
    other["env", "realm"] = ["left"] * 4 + ["right"] * 2
    loss.set_keys(group=("env", "prompt"), domain=("env", "realm"))
    out = loss(other)
    assert out.loss_objective.item() == pytest.approx(expected.item(), rel=1e-6)
    assert "gate/domain/pass_frac/domain=left" in out.metrics
    loss.set_keys(domain="nowhere")
    with pytest.raises(fiberpo.DataError, match="no 'nowhere' for the domain"):
        loss(other)


def test_ids_are_one_a_row(actor):
    """An id that changes within a row is refused with the values."""
    data = make_rows(actor)
    data["group_id"] = torch.arange(ROWS * WIDTH).reshape(ROWS, WIDTH)
    with pytest.raises(fiberpo.DataError, match=r"'group_id' holds \[0, 1, 2, 3\] in row 0"):
        plain(actor, COUPLED)(data)


def test_missing_ids_are_refused(actor):
    """The objective has gates for which the rows carry no ids."""
    data = make_rows(actor).exclude("group_id")
    with pytest.raises(fiberpo.StrataError, match="group"):
        plain(actor, COUPLED)(data)


def test_rows_of_one_trajectory_are_joined(actor):
    """Rows with one ``trajectory_id`` share their aggregates."""
    data = make_rows(actor)
    objective = recipes.fiberpo((0.04, 0.03), 0.03)
    apart = plain(actor, objective)(data).loss_objective
    data["trajectory_id"] = torch.tensor([0, 0, 1, 2, 3, 4])
    joined = plain(actor, objective)(data).loss_objective
    batch = core_batch(actor, data)
    one = fiberpo.RatioBatch.from_packed(
        batch.log_probs, batch.old_log_probs, batch.advantages, [11, 6, 2, 5, 7]
    )
    assert joined.item() == pytest.approx(objective(one).loss.item(), rel=1e-5)
    assert joined.item() != pytest.approx(apart.item(), rel=1e-3)


def test_ragged_rows_are_padded_on_one_side(actor):
    """Per-token advantages of ragged rows: log-probs are padded left, so advantages must be.

    torchrl pads them right, which gives the tokens of short rows each other's advantages.
    """
    data = make_rows(actor, (7, 4))
    data["advantage"] = torch.randn(2, WIDTH, 1, generator=torch.Generator().manual_seed(1))
    ragged = lazy_stack(
        [_cut(data[i], PROMPT + n) for i, n in enumerate((7, 4))]
    )  # fmt: skip
    expected = plain(actor, recipes.ppo(0.1))(data).loss_objective
    ours = plain(actor, recipes.ppo(0.1))(ragged).loss_objective
    assert ours.item() == pytest.approx(expected.item(), rel=1e-5)
    theirs = GRPOLoss(actor, clip_epsilon=0.1, entropy_bonus=False)(ragged).loss_objective
    assert abs(theirs.item() - expected.item()) > 0.05


def _cut(row, length):
    """One row without its padding."""
    cut = row.select("advantage", ("tokens", "prompt"), "group_id", "domain").clone()
    cut["advantage"] = row["advantage"][:length]
    for key in (("tokens", "full"), ("masks", "all_attention_mask"), ("log_probs", "full")):
        cut[key] = row[key][:length]
    return cut


def test_infinite_log_probs_are_an_error(actor):
    """NaN is torchrl's padding and stays out; an infinity on a loss token does not."""
    data = make_rows(actor)
    data["log_probs", "full"][2, 4] = -math.inf
    with pytest.raises(fiberpo.NonFiniteError, match="old_log_probs is -inf at loss token 1"):
        plain(actor, recipes.ppo())(data)


def test_the_hosts_loss_mask_is_obeyed(actor):
    """``("collector", "mask")`` takes rows out, in both."""
    data = make_rows(actor)
    data["collector", "mask"] = torch.tensor([True, True, False, True, True, True])[:, None]
    ours = plain(actor, recipes.ppo(0.1))(data)
    theirs = GRPOLoss(actor, clip_epsilon=0.1, entropy_bonus=False)(data)
    assert ours.loss_objective.item() == pytest.approx(theirs.loss_objective.item(), rel=1e-5)


@pytest.mark.parametrize("name", REPLACED)
def test_settings_without_effect_are_refused(actor, name):
    """The message quotes the value and names what takes its place."""
    with pytest.raises(fiberpo.ConfigError, match=f"{name} = 0.3 has no effect"):
        FiberPOLoss(actor, objective=recipes.grpo(), **{name: 0.3})


def test_settings_without_effect_are_documented():
    """docs/hosts.md lists them."""
    text = (Path(__file__).resolve().parents[2] / "docs" / "hosts.md").read_text()
    assert [name for name in REPLACED if f"`{name}`" not in text] == []


def test_missing_or_misshapen_columns_are_refused(actor):
    """By key, with what there is."""
    data = make_rows(actor)
    loss = plain(actor, recipes.ppo(), kl_to_ref_coeff=0.1)
    with pytest.raises(fiberpo.DataError, match=r"no 'advantage'.*set_keys"):
        loss(data.exclude("advantage"))
    with pytest.raises(fiberpo.DataError, match="which the KL term compares with"):
        loss(data.exclude("next"))
    narrow = data.clone()
    narrow["next", "ref_log_probs", "full"] = torch.zeros(ROWS, WIDTH - 1)
    with pytest.raises(fiberpo.ShapeError, match=r"\(6, 9\)"):
        loss(narrow)
    data["advantage"] = torch.zeros(ROWS, WIDTH - 1, 1)
    with pytest.raises(fiberpo.ShapeError, match=r"'advantage' has shape \(6, 9, 1\)"):
        loss(data)
