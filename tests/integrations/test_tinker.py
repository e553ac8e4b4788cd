"""tinker: the loss of ``forward_backward_custom``, through the installed client's own code."""

import numpy as np
import pytest
import torch
from tinker import types
from tinker.lib.public_interfaces.training_client import TrainingClient

import fiberpo
from core import oracle
from fiberpo import recipes
from fiberpo.integrations.tinker import loss_fn

TIGHT = {"domain": (0.02, 0.01), "group": (0.03, 0.02), "trajectory": (0.04, 0.03)}
COUPLED = recipes.fiberpo_domain(TIGHT, 0.05, rollback=2.0)
LENGTHS, PROMPT, WORDS = (5, 3, 4, 2, 6, 1), 2, 11


def make_data(seed=0, ids=("group_id", "domain"), mask="mask"):
    """Six answers behind prompts of two tokens, and the policy that scores them."""
    rng = np.random.default_rng(seed)
    policy = torch.tensor(rng.normal(0, 0.5, (WORDS, WORDS)), requires_grad=True)
    data = []
    for i, length in enumerate(LENGTHS):
        tokens = rng.integers(0, WORDS, PROMPT + length).tolist()
        targets = tokens[1:] + [0]
        current = policy.detach().log_softmax(-1)[tokens, targets].numpy()
        answer = np.arange(len(tokens)) >= PROMPT
        sampled = current + rng.normal(0, 0.1, len(tokens)) + rng.normal(0, 0.1)
        inputs = {
            "target_tokens": targets,
            "logprobs": np.where(answer, sampled, 0.0).astype(np.float32),
            "advantages": np.where(answer, rng.normal(), 0.0).astype(np.float32),
            mask: answer.astype(np.float32),
        }
        values = {"group_id": i // 2, "domain": i // 4, "trajectory_id": (0, 0, 1, 2, 3, 4)[i]}
        inputs.update({key: torch.tensor([values[key]]) for key in ids})
        data.append(types.Datum(types.ModelInput.from_ints(tokens), inputs))
    return data, policy


def served(data, policy):
    """What the service returns for the forward pass: log-probs in float32, datum by datum."""
    outputs = [
        {"logprobs": types.TensorData.from_torch(scores(datum, policy).detach().float())}
        for datum in data
    ]
    return types.ForwardBackwardOutput("ArrayRecord", outputs)


def scores(datum, policy):
    tokens = datum.model_input.to_ints()
    return policy.log_softmax(-1)[tokens, datum.loss_fn_inputs["target_tokens"].tolist()]


def whole_batch(data, policy, labels=None, **more):
    """The undivided batch for the core, read by hand from the data."""
    columns = {name: [] for name in ("current", "logprobs", "advantages")}
    for datum in data:
        answer = torch.arange(datum.model_input.length) >= PROMPT
        columns["current"].append(scores(datum, policy)[answer])
        for name in ("logprobs", "advantages"):
            columns[name].append(datum.loss_fn_inputs[name].to_torch()[answer])
    columns = {name: torch.cat(parts).double() for name, parts in columns.items()}
    if labels is None:
        labels = {
            "group": torch.arange(len(data)) // 2,
            "domain": torch.arange(len(data)) // 4,
        }
    return fiberpo.RatioBatch.from_packed(
        columns["current"], columns["logprobs"], columns["advantages"], list(LENGTHS),
        labels=labels, **more,
    )  # fmt: skip


@pytest.mark.parametrize(
    "objective",
    [COUPLED, recipes.fiberpo((0.04, 0.03), 0.03), recipes.grpo(0.1), recipes.gspo(0.02)],
    ids=lambda o: o.name,
)
def test_through_the_client(objective):
    """The client's own backward, then the linear loss of the service: the gradient of the whole.

    The service computes ``sum(-log_probs * weights)`` chunk by chunk, so a cut changes nothing.
    """
    data, policy = make_data()
    result = TrainingClient._compute_custom_loss(data, loss_fn(objective), served(data, policy))
    whole = objective(whole_batch(data, policy))
    assert result.loss_sum == pytest.approx(whole.loss.item(), rel=1e-5)
    assert result.metrics["gate/active"] > 0.1
    for chunk in (result.data[:1], result.data[1:4], result.data[4:]):
        weights = [d.loss_fn_inputs["weights"].to_torch() for d in chunk]
        sum(-(scores(d, policy) * w).sum() for d, w in zip(chunk, weights, strict=True)).backward()
    (expected,) = torch.autograd.grad(whole.loss, policy)
    torch.testing.assert_close(policy.grad, expected, rtol=1e-4, atol=1e-7)
    sent = torch.cat([d.loss_fn_inputs["weights"].to_torch()[PROMPT:] for d in result.data])
    torch.testing.assert_close(sent.double(), whole.coefficients, rtol=1e-3, atol=1e-6)
    prompts = torch.cat([d.loss_fn_inputs["weights"].to_torch()[:PROMPT] for d in result.data])
    assert not prompts.any()


def test_value_against_loops():
    """FiberPO-Domain of the same tokens in numpy."""
    data, policy = make_data()
    loss, _ = loss_fn(COUPLED)(data, [scores(d, policy).detach() for d in data])
    batch = whole_batch(data, policy)
    ell = batch.log_ratio.detach().tolist()
    labels = {"group": [i // 2 for i in range(6)], "domain": [i // 4 for i in range(6)]}
    forest = oracle.grow_forest(["domain", "group", "trajectory"], LENGTHS, labels)
    gated = oracle.forest_log_gated_ratio(
        ell, oracle.measure_per_trajectory(LENGTHS), forest,
        lambda stratum, name: TIGHT[stratum], 0.05, lambda stratum: 2.0,
    )  # fmt: skip
    mu = oracle.trajectory_mean(LENGTHS)
    expected = -oracle.objective_def31(mu, np.exp(gated), batch.advantages.tolist())
    assert loss.item() == pytest.approx(expected, abs=1e-6)


def test_every_datum_gets_a_gradient():
    """The client refuses a datum without one; one without a loss token gets zeros."""
    data, policy = make_data()
    data[1].loss_fn_inputs["mask"] = types.TensorData.from_numpy(np.zeros(PROMPT + 3, np.float32))
    result = TrainingClient._compute_custom_loss(
        data, loss_fn(recipes.grpo()), served(data, policy)
    )
    assert not result.data[1].loss_fn_inputs["weights"].to_torch().any()


def test_labels_may_be_given_beside_the_data():
    """One a datum, strings too (tinker's tensors hold numbers only); they win over the data's."""
    data, policy = make_data()
    logprobs = [scores(d, policy).detach() for d in data]
    labels = {"domain": ["math"] * 4 + ["code"] * 2}
    loss, metrics = loss_fn(COUPLED, labels=labels)(data, logprobs)
    assert loss.item() == pytest.approx(COUPLED(whole_batch(data, policy)).loss.item(), rel=1e-5)
    assert "gate/domain/pass_frac/domain=math" in metrics
    with pytest.raises(fiberpo.StrataError, match='"domain".* has 5 entries'):
        loss_fn(COUPLED, labels={"domain": ["math"] * 5})(data, logprobs)


def test_data_of_one_trajectory_are_joined():
    """Several data with one ``trajectory_id``: one trajectory of the objective."""
    data, policy = make_data(ids=("trajectory_id",))
    objective = recipes.fiberpo((0.04, 0.03), 0.03)
    loss, _ = loss_fn(objective)(data, [scores(d, policy).detach() for d in data])
    batch = whole_batch(data, policy, labels={})
    joined = fiberpo.RatioBatch.from_packed(
        batch.log_probs, batch.old_log_probs, batch.advantages, [8, 4, 2, 6, 1]
    )
    assert loss.item() == pytest.approx(objective(joined).loss.item(), rel=1e-5)


def test_several_calls_in_one_step():
    """With the counts of the step, the calls add up; group and domain gates are refused."""
    data, policy = make_data()
    logprobs = [scores(d, policy) for d in data]
    counts = fiberpo.Denominators(sum(LENGTHS), len(LENGTHS))
    objective = recipes.fiberpo((0.04, 0.03), 0.03)
    fn = loss_fn(objective, denominators=counts)
    parts = fn(data[:2], logprobs[:2])[0] + fn(data[2:], logprobs[2:])[0]
    whole = objective(whole_batch(data, policy)).loss
    assert parts.item() == pytest.approx(whole.item(), rel=1e-6)
    grads = [torch.autograd.grad(x, policy)[0] for x in (parts, whole)]
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-8)
    with pytest.raises(fiberpo.ObjectiveError, match=r"\['domain', 'group'\]"):
        loss_fn(COUPLED, denominators=counts)(data[:5], logprobs[:5])


def test_weights_may_be_the_mask():
    """``weights`` of 0 and 1, which tinker's own cross entropy uses, serve as the mask."""
    data, policy = make_data(mask="weights")
    logprobs = [scores(d, policy).detach() for d in data]
    loss, _ = loss_fn(recipes.grpo())(data, logprobs)
    assert loss.item() == pytest.approx(
        recipes.grpo()(whole_batch(data, policy)).loss.item(), rel=1e-5
    )


def test_without_the_package_types():
    """Anything with ``loss_fn_inputs`` of tensors will do."""

    class Row:
        def __init__(self, datum):
            self.loss_fn_inputs = {k: v.to_torch() for k, v in datum.loss_fn_inputs.items()}

    data, policy = make_data()
    logprobs = [scores(d, policy).detach() for d in data]
    theirs, ours = (loss_fn(COUPLED)(x, logprobs) for x in (data, [Row(d) for d in data]))
    assert theirs[0].item() == ours[0].item()
    assert theirs[1] == ours[1]


def edited(key, value):
    data, policy = make_data()
    if value is None:
        del data[1].loss_fn_inputs[key]
    else:
        data[1].loss_fn_inputs[key] = types.TensorData.from_torch(torch.tensor(value))
    return data, [scores(d, policy).detach() for d in data]


@pytest.mark.parametrize(
    ("key", "value", "quoted"),
    [
        ("mask", None, "datum 1 has no mask of its loss tokens.*'mask'"),
        ("logprobs", None, r"datum 1 has no loss_fn_inputs\['logprobs'\]"),
        ("advantages", [1.0], r"'advantages'\] of datum 1 has shape \(1,\).* 5 target tokens"),
        ("mask", [0.0, 0.0, 0.5, 1.0, 1.0], r"'mask'\] of datum 1 holds 0.5"),
        ("group_id", None, r"datum 1 has no loss_fn_inputs\['group_id'\], which other data have"),
        ("group_id", [1, 2], r"'group_id'\] of datum 1 is \[1, 2\]; it holds one id"),
        ("uid", [1], "'group_id', 'uid' could each hold the group"),
        ("logprobs", [0.0, 0.0, float("nan"), 0.0, 0.0], "old_log_probs is nan at loss token 0"),
    ],
)
def test_what_is_refused(key, value, quoted):
    """The message names the datum and the key."""
    data, logprobs = edited(key, value)
    with pytest.raises(fiberpo.FiberPOError, match=quoted):
        loss_fn(COUPLED)(data, logprobs)


def test_misshapen_log_probs_are_refused():
    """Top-k targets, and another number of log-probs than of data."""
    data, policy = make_data()
    logprobs = [scores(d, policy).detach() for d in data]
    with pytest.raises(fiberpo.ShapeError, match="6 data, but log-probs of 5"):
        loss_fn(COUPLED)(data, logprobs[:5])
    with pytest.raises(fiberpo.ShapeError, match=r"datum 0 have shape \(7, 2\).*top-k"):
        loss_fn(COUPLED)(data, [torch.zeros(7, 2), *logprobs[1:]])
