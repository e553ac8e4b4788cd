"""Hosts without a package here: each function against the written-down contract of its host."""

import ast
import inspect
from pathlib import Path

import cloudpickle
import pytest
import torch

import fiberpo
from fiberpo import recipes
from fiberpo.integrations import hosts
from integrations import contracts
from integrations.contracts import Rows

WHOLE = [[[0, 1, 2, 3, 4, 5, 6, 7]]]
EVEN = [[[0, 3], [5, 1]], [[2, 4], [7, 6]]]
UNEVEN = [[[0], [1, 2, 3]], [[4, 5, 6], [7]]]
CUTS = {"one call": WHOLE, "2 ranks x 2 micro-batches": EVEN, "uneven": UNEVEN}
cuts = pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)

COUPLED = recipes.fiberpo_domain()
BY_TOKEN = [
    recipes.ppo(0.05),
    recipes.fiberpo((0.04, 0.03), 0.03, weights="token_mean"),
    recipes.gspo(0.02, weights="token_mean"),
]
BY_TRAJECTORY = [recipes.grpo(0.05), recipes.fiberpo((0.04, 0.03), 0.03), recipes.gspo(0.02)]


def by(objectives):
    return pytest.mark.parametrize("objective", objectives, ids=[o.name for o in objectives])


def expected(objective, rows, **more):
    """Gradient of the core objective on the undivided mini-batch, and its surrogate."""
    leaf = rows.log_probs.detach().clone().requires_grad_()
    batch = fiberpo.RatioBatch.from_padded(leaf, rows.old, rows.advantages, rows.mask, **more)
    out = objective(batch)
    assert out.metrics()["gate/active"] > 0.1
    return torch.autograd.grad(out.loss, leaf)[0], out


def assert_exact(objective, rows, **more):
    gradient, out = expected(objective, rows, **more)
    assert gradient.abs().max() > 1e-3
    torch.testing.assert_close(rows.log_probs.grad, gradient, rtol=1e-9, atol=1e-12)
    return out


# --------------------------------------------------------------------------------------- SkyRL


@cuts
@by([*BY_TOKEN, *BY_TRAJECTORY])
def test_skyrl(objective, cuts):
    """With the reduction that fits the weights: the gradient of the whole mini-batch."""
    rows = Rows.random(0)
    reduction = {"token_mean": "token_mean"}.get(objective.weights.kind, "sequence_mean")
    metrics = contracts.skyrl(hosts.skyrl(objective), rows, cuts, reduction=reduction)
    assert_exact(objective, rows)
    assert all(set(m) == set(hosts.TOKEN_MEANS) for m in metrics)
    assert all(isinstance(value, float) for m in metrics for value in m.values())


def test_skyrl_sequence_masks_see_the_engine():
    """``rollout_logprobs`` reach the objective."""
    rows = Rows.random(0)
    objective = recipes.ppo(0.05, mask=fiberpo.MaxDivergence(0.02))
    contracts.skyrl(hosts.skyrl(objective), rows, EVEN, reduction="token_mean")
    out = assert_exact(objective, rows, rollout_log_probs=rows.rollout)
    kept = objective.mask(out.batch)
    assert 0 < int(kept.sum()) < len(kept)


def test_skyrl_reduction_must_fit():
    """SkyRL's default under the recipe's weights would be other weights."""
    with pytest.raises(fiberpo.ConfigError, match="set loss_reduction='sequence_mean'"):
        contracts.skyrl(hosts.skyrl(recipes.grpo()), Rows.random(0), WHOLE, reduction="token_mean")


@pytest.mark.parametrize("name", ["tis_ratio_type", "sequence_mask_metric"])
def test_skyrl_corrections_are_refused(name):
    """They act inside SkyRL's own losses."""
    with pytest.raises(fiberpo.ConfigError, match=f"{name} = 'token' acts inside"):
        contracts.skyrl(
            hosts.skyrl(recipes.ppo()), Rows.random(0), WHOLE,
            reduction="token_mean", settings={name: "token"},
        )  # fmt: skip


def test_skyrl_sends_the_function_by_cloudpickle():
    """Workers get a copy."""
    rows = Rows.random(0)
    loss = cloudpickle.loads(cloudpickle.dumps(hosts.skyrl(recipes.ppo(0.05))))
    contracts.skyrl(loss, rows, EVEN, reduction="token_mean")
    assert_exact(recipes.ppo(0.05), rows)


# --------------------------------------------------------------------------------------- slime


@cuts
@by(BY_TRAJECTORY)
def test_slime_by_rollout(objective, cuts):
    """The default: divided by the rollouts of the step."""
    rows = Rows.random(1)
    loss = hosts.slime(objective, contracts.slime_log_probs)
    metrics = contracts.slime(loss, rows, cuts)
    out = assert_exact(objective, rows)
    assert sum(float(m["loss"]) for m in metrics) / 8 == pytest.approx(out.loss.item())
    means = torch.stack([x.mean() for x in out.batch.log_ratio.split(rows.lengths.tolist())])
    assert sum(float(m["ppo_kl"]) for m in metrics) / 8 == pytest.approx(-means.mean().item())


@cuts
@by(BY_TOKEN)
def test_slime_by_token(objective, cuts):
    """With ``--calculate-per-token-loss``."""
    rows = Rows.random(1)
    loss = hosts.slime(objective, contracts.slime_log_probs)
    contracts.slime(loss, rows, cuts, per_token=True)
    assert_exact(objective, rows)


def test_slime_anchors():
    """``--use-rollout-logprobs`` takes the engine's; without stored ones every ratio is 1."""
    rows, objective = Rows.random(1), recipes.grpo(0.05)
    loss = hosts.slime(objective, contracts.slime_log_probs)
    contracts.slime(loss, rows, EVEN, old="rollout_log_probs")
    rows.old = rows.rollout
    assert_exact(objective, rows)
    rows = Rows.random(1)
    contracts.slime(loss, rows, EVEN, old=None)
    counted = rows.mask / (8.0 * rows.lengths[:, None])
    torch.testing.assert_close(rows.log_probs.grad, -counted * rows.advantages)


def test_slime_rollouts_of_several_rows():
    """Refused where trajectories matter, exact where they do not."""
    sums = Rows.random(1).lengths.clone()
    sums[:2] = sums[:2].sum()
    loss = hosts.slime(recipes.fiberpo(), contracts.slime_log_probs)
    with pytest.raises(fiberpo.ObjectiveError, match="row 0 has 4 of the 6 loss tokens"):
        contracts.slime(loss, Rows.random(1), WHOLE, sums=sums)
    rows = Rows.random(1)
    loss = hosts.slime(recipes.ppo(0.05), contracts.slime_log_probs)
    contracts.slime(loss, rows, EVEN, per_token=True, sums=sums)
    assert_exact(recipes.ppo(0.05), rows)


def test_slime_divisor_must_fit():
    """By the setting that is wrong."""
    loss = hosts.slime(recipes.grpo(), contracts.slime_log_probs)
    with pytest.raises(fiberpo.ConfigError, match="calculate_per_token_loss = True.* the tokens"):
        contracts.slime(loss, Rows.random(1), WHOLE, per_token=True)
    loss = hosts.slime(recipes.ppo(), contracts.slime_log_probs)
    with pytest.raises(fiberpo.ConfigError, match="calculate_per_token_loss = False.* rollouts"):
        contracts.slime(loss, Rows.random(1), WHOLE)


def test_slime_context_parallelism_is_refused():
    """A rank then holds pieces of answers."""

    def pieces(args, batch, logits):
        return [x[: len(x) // 2] for x in contracts.slime_log_probs(args, batch, logits)]

    with pytest.raises(fiberpo.ConfigError, match="context parallelism"):
        contracts.slime(hosts.slime(recipes.grpo(), pieces), Rows.random(1), WHOLE)


@pytest.mark.parametrize("name", ["use_kl_loss", "entropy_coef", "use_tis", "use_opsm"])
def test_slime_terms_of_its_own_loss_are_refused(name):
    """A custom loss replaces all of them."""
    loss = hosts.slime(recipes.grpo(), contracts.slime_log_probs)
    with pytest.raises(fiberpo.ConfigError, match=f"{name} = 0.1 acts inside"):
        contracts.slime(loss, Rows.random(1), WHOLE, settings={name: 0.1})


# ------------------------------------------------------------------------------------ prime-rl


@pytest.mark.parametrize(
    ("settings", "objective"),
    [
        ({"objective": "ppo", "epsilon": 0.05}, BY_TOKEN[0]),
        (
            {
                "objective": "fiberpo", "budget": [0.04, 0.03], "epsilon": 0.03,
                "weights": "token_mean",
            },
            BY_TOKEN[1],
        ),
        ({"objective": "gspo", "epsilon": 0.02, "weights": "token_mean"}, BY_TOKEN[2]),
    ],
    ids=["ppo", "fiberpo", "gspo"],
)  # fmt: skip
def test_prime_rl(settings, objective):
    """Named in the configuration, called once a sequence."""
    rows = Rows.random(2)
    metrics = contracts.prime_rl(lambda x: hosts.prime_rl(x, **settings), rows, WHOLE)
    assert_exact(objective, rows)
    assert {len(values) for values in metrics.values()} == {8}


def test_prime_rl_weights_of_tokens():
    """``loss_aggregation = "prompt"`` comes as weights, whose sum the host divides by."""
    rows = Rows.random(2)
    weights = (1.0 / torch.tensor([6, 6, 8, 8, 6, 6, 6, 6]).double())[:, None].expand(
        rows.mask.shape
    )
    contracts.prime_rl(
        lambda x: hosts.prime_rl(x, objective="ppo", epsilon=0.05), rows, WHOLE, weights=weights
    )
    labels = {"group": torch.arange(8) // 2}
    grouped = recipes.ppo(0.05, weights="group_mean")
    assert_exact(grouped, rows, labels=labels)


def test_prime_rl_other_weights_are_refused():
    """The host divides by tokens."""
    with pytest.raises(fiberpo.ObjectiveError, match=r"prime-rl would turn.*weights='token_mean'"):
        contracts.prime_rl(lambda x: hosts.prime_rl(x, objective="grpo"), Rows.random(2), WHOLE)


# --------------------------------------------------------------------------------- Trinity-RFT


@pytest.mark.parametrize(
    ("cuts", "varying"), [(WHOLE, False), (EVEN, False), (UNEVEN, True)],
    ids=["one call", "2 ranks x 2 micro-batches", "dynamic batch size"],
)  # fmt: skip
@by([*BY_TRAJECTORY, recipes.dr_grpo(6.0, 0.05)])
def test_trinity(objective, cuts, varying):
    """Means over rows, averaged: the gradient of the mini-batch."""
    rows = Rows.random(3)
    metrics = contracts.trinity(hosts.trinity(objective), rows, cuts, varying=varying)
    assert_exact(objective, rows)
    assert all(set(m) == {"pg_loss", *hosts.TOKEN_MEANS} for m in metrics)


@pytest.mark.parametrize("cuts", [WHOLE, EVEN], ids=["one call", "2 ranks x 2 micro-batches"])
def test_trinity_counts_rows(cuts):
    """Rows without a loss token count in the host's mean: one of 8, wherever it falls."""
    rows, objective = Rows.random(3, (4, 2, 5, 0, 1, 5, 2, 4)), recipes.grpo(0.05)
    contracts.trinity(hosts.trinity(objective), rows, cuts)
    gradient, _ = expected(objective, rows)
    torch.testing.assert_close(rows.log_probs.grad, gradient * 7 / 8)


def test_trinity_token_means_are_refused():
    """1 / tokens of a micro-batch is not 1 / tokens of the mini-batch."""
    with pytest.raises(
        fiberpo.ObjectiveError, match="Trinity-RFT would turn the weights token_mean"
    ):
        hosts.trinity(recipes.ppo())


# ------------------------------------------------------------------------------------- NeMo-RL


@cuts
@by([*BY_TOKEN, *BY_TRAJECTORY])
def test_nemo_rl(objective, cuts, monkeypatch):
    """Denominators come from the host: exact however it is cut; metrics add up."""
    interfaces, rows = contracts.nemo_interfaces(monkeypatch), Rows.random(4)
    loss = hosts.nemo_rl(objective)
    by_token = objective.weights.kind == "token_mean"
    kinds = interfaces.LossType
    assert loss.loss_type is (kinds.TOKEN_LEVEL if by_token else kinds.SEQUENCE_LEVEL)
    assert loss.input_type is interfaces.LossInputType.LOGPROB
    totals = contracts.nemo_rl(loss, rows, cuts)
    out = assert_exact(objective, rows)
    assert totals["loss"] == pytest.approx(out.loss.item())
    assert totals["num_valid_samples"] == 8
    whole = out.metrics()
    for name in hosts.TOKEN_MEANS:
        assert totals[name] == pytest.approx(whole[name], abs=1e-12)


def test_nemo_rl_masks(monkeypatch):
    """Invalid samples and filtered tokens are no loss tokens."""
    contracts.nemo_interfaces(monkeypatch)
    rows, objective = Rows.random(4), recipes.grpo(0.05)
    valid = torch.tensor([1.0, 0, 1, 1, 0, 1, 1, 0])
    contracts.nemo_rl(hosts.nemo_rl(objective), rows, EVEN, sample_mask=valid)
    rows.mask = rows.mask & valid.bool()[:, None]
    assert_exact(objective, rows)
    rows = Rows.random(4)
    keep = torch.ones_like(rows.mask)
    keep[0, 0] = False
    contracts.nemo_rl(hosts.nemo_rl(objective), rows, EVEN, keep_mask=keep)
    rows.mask = rows.mask & keep
    assert_exact(objective, rows)


# ----------------------------------------------------------------------------------------- all

MAKERS = {
    "SkyRL": hosts.skyrl,
    "slime": lambda objective: hosts.slime(objective, contracts.slime_log_probs),
    "Trinity-RFT": hosts.trinity,
    "NeMo-RL": hosts.nemo_rl,
    "prime-rl": lambda objective: contracts.prime_rl(
        lambda x: hosts.prime_rl(x, objective=objective.name), Rows.random(0), WHOLE
    ),
}


@pytest.mark.parametrize("host", MAKERS)
def test_gates_above_the_trajectory_are_refused(host, monkeypatch):
    """Before the first step, with the host, the strata and the remedy."""
    contracts.nemo_interfaces(monkeypatch)
    quoted = rf"{host} hands its loss one micro-batch .*\['domain', 'group'\].*fiberpo.exact"
    with pytest.raises(fiberpo.ObjectiveError, match=quoted):
        MAKERS[host](COUPLED)
    if host != "prime-rl":
        with pytest.raises(fiberpo.ObjectiveError, match=quoted):
            MAKERS[host](recipes.fiberstop())


@pytest.mark.parametrize("host", [h for h in MAKERS if h != "prime-rl"])
def test_means_over_groups_are_refused(host, monkeypatch):
    """They need ids and the whole step."""
    contracts.nemo_interfaces(monkeypatch)
    with pytest.raises(fiberpo.ObjectiveError, match=f"{host} would turn the weights stratum_mean"):
        MAKERS[host](recipes.grpo(weights="group_mean"))


def test_micro_batches_without_a_loss_token(monkeypatch):
    """Loss 0, gradient 0, the same metrics: ranks reduce them key by key."""
    contracts.nemo_interfaces(monkeypatch)
    rows = Rows.random(0)
    rows.mask[:4] = False
    objective, cut = recipes.fiberpo(), [[[0, 1, 2, 3], [4, 5, 6, 7]]]
    found = [
        contracts.skyrl(hosts.skyrl(objective), rows, cut, reduction="sequence_mean"),
        contracts.slime(hosts.slime(objective, contracts.slime_log_probs), rows, cut),
        contracts.trinity(hosts.trinity(objective), rows, cut),
    ]
    for empty, full in found:
        assert set(empty) == set(full)
    contracts.nemo_rl(hosts.nemo_rl(objective), rows, cut)
    contracts.prime_rl(lambda x: hosts.prime_rl(x, objective="ppo"), rows, cut)
    assert not rows.log_probs.grad[:4].nan_to_num(7.0).any()
    assert rows.log_probs.grad[4:][rows.mask[4:]].abs().min() > 0


def test_each_host_is_one_short_function():
    """Under 40 lines; what is longer belongs into the host."""
    tree = ast.parse(Path(inspect.getfile(hosts)).read_text())
    lengths = {
        node.name: node.end_lineno - node.lineno + 1
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
    }
    assert set(hosts.__all__) - {"LossOutputs"} <= set(lengths)
    assert {n: size for n, size in lengths.items() if size >= 40} == {}
