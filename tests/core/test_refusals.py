"""Input of the wrong kind: one root of errors, the value quoted, a remedy named."""

import pytest
import torch

import fiberpo
from fiberpo import RatioBatch, Weights, recipes

ZEROS = torch.zeros(2, 3)
ONES = torch.ones(2, 3)


def padded(**changes):
    arguments = {
        "log_probs": ZEROS, "old_log_probs": ZEROS, "advantages": torch.ones(2), "mask": ONES,
    }  # fmt: skip
    return RatioBatch.from_padded(**{**arguments, **changes})


def packed(**changes):
    arguments = {
        "log_probs": torch.zeros(3), "old_log_probs": torch.zeros(3),
        "advantages": torch.ones(3), "lengths": [1, 2],
    }  # fmt: skip
    return RatioBatch.from_packed(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("call", "quoted"),
    [
        (lambda: padded(log_probs=[[0.0]]), "log_probs is a list"),
        (lambda: padded(mask=[[1]]), "mask is a list"),
        (lambda: padded(old_log_probs=ZEROS.numpy()), "old_log_probs is a ndarray"),
        (lambda: packed(lengths="ab"), "lengths is 'ab'"),
        (lambda: packed(lengths=None), "lengths is None"),
        (lambda: packed(advantages="x"), "advantages is 'x'"),
        (lambda: packed(labels=[0, 1]), "labels is a list"),
        (lambda: packed(labels={"group": None}), r'labels\["group"\] is None'),
        (lambda: packed(labels={"group": "ab"}), r'labels\["group"\] is \'ab\''),
        (lambda: padded(labels={"turn": [["a"], ["b", "c"]]}), "different lengths"),
        (lambda: Weights.parse(3), "weights is 3"),
        (lambda: recipes.gspo(epsilon_high=0.1), "epsilon_high = 0.1 without epsilon"),
    ],
)
def test_refused_with_the_value(call, quoted):
    """All are `FiberPOError`, which is a ``ValueError``."""
    with pytest.raises(fiberpo.FiberPOError, match=quoted) as error:
        call()
    assert isinstance(error.value, ValueError)


def test_a_misspelt_weight_is_named():
    """``tokn_mean`` reads as the mean over a stratum that does not exist."""
    objective = recipes.ppo(weights="tokn_mean")
    with pytest.raises(fiberpo.StrataError, match='"tokn".*misspelt'):
        objective(packed())


def test_budget_names_are_compared_as_text():
    """A superscript is a digit to Python, but no id."""
    gate = fiberpo.AggregateGate({"²": (0.2, 0.1), "*": (0.1, 0.05)})
    gate_map = fiberpo.GateMap(gates={"group": gate})
    out = gate_map(packed(labels={"group": [2, 3]}))
    assert out.gated.value.shape == (2, 2)


def test_own_token_labels_can_be_declared():
    """With as many tokens as trajectories the length cannot tell what a label stands on."""
    arguments = {"advantages": torch.ones(2), "lengths": [1, 1], "labels": {"segment": [0, 0]}}
    arguments |= {"log_probs": torch.zeros(2), "old_log_probs": torch.zeros(2)}
    above = RatioBatch.from_packed(**arguments)
    below = RatioBatch.from_packed(**arguments, token_labels=["segment"])
    assert not above.labels["segment"].per_token
    assert below.labels["segment"].per_token
    assert len(above.strata(["segment"])) == 1
    assert len(below.strata(["trajectory", "segment"])) == 4
    empty = {k: v[:0] for k, v in arguments.items() if k != "labels"}
    rank = RatioBatch.from_packed(
        **empty, labels={"segment": []}, token_labels=["segment"], allow_empty=True
    )
    assert rank.labels["segment"].per_token


def test_a_component_removed_by_construction_is_no_activity():
    """GSPO's token gate is zero by construction: with ratio 1 nothing is active."""
    metrics = recipes.gspo()(packed()).metrics()
    assert metrics["gate/active"] == 0
    assert metrics["gate/token/zeroed_frac"] == 1
    moved = packed(log_probs=torch.full((3,), 0.1))
    assert recipes.gspo()(moved).metrics()["gate/active"] == 1


def test_gspo_epsilons():
    """3e-4 and 4e-4 if neither is given, symmetric if only epsilon is."""
    gates = [o.gate_map.gates["trajectory"] for o in (recipes.gspo(), recipes.gspo(0.02))]
    assert [(g.epsilon, g.epsilon_high) for g in gates] == [(3e-4, 4e-4), (0.02, None)]


def test_a_p90_never_exceeds_the_largest():
    """The histogram's bins are 5 % wide; the maximum is exact."""
    for drift in (0.0883, 0.05, 0.3):
        metrics = recipes.fiberpo()(packed(log_probs=torch.full((3,), drift))).metrics()
        key = "gate/trajectory/drift_pos"
        assert metrics[f"{key}/p90"] <= metrics[f"{key}/max"]
