"""Our recipes against TRL's own losses: equal where they mean the same, else by how much not.

The second half measures the intended differences; docs/trl.md lists them with these numbers.
"""

import re
from pathlib import Path

import pytest
import torch

from fiberpo import recipes
from integrations.tiny import (
    answer,
    apart,
    double_model,
    gradients,
    host,
    scripted,
    tiny_model,
    trainer,
    updates,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),
]

PAGE = Path(__file__).parents[2] / "docs" / "trl.md"
GSPO = {"loss_type": "grpo", "importance_sampling_level": "sequence"}
PAIRS = {
    "grpo": (recipes.grpo(0.01), {"loss_type": "grpo", "epsilon": 0.01}),
    "gspo": (recipes.gspo(0.008, 0.01), {"epsilon": 0.008, "epsilon_high": 0.01, **GSPO}),
    "dapo": (
        recipes.dapo(0.008, 0.01), {"loss_type": "dapo", "epsilon": 0.008, "epsilon_high": 0.01},
    ),
    "dr_grpo": (recipes.dr_grpo(8, 0.01), {"loss_type": "dr_grpo", "epsilon": 0.01}),
    "bnpo": (recipes.ppo(0.01), {"loss_type": "bnpo", "epsilon": 0.01}),
    "dual_clip": (
        recipes.grpo(0.01, dual_clip=1.02), {"loss_type": "grpo", "epsilon": 0.01, "delta": 1.02},
    ),
}  # fmt: skip
CASES = [(name, size) for name in PAIRS for size in (16, 8, 4) if name != "bnpo" or size == 16]


def cut(size):
    """Rollouts of 16 answers in micro-batches of a size; a rollout is one window, used 3 times."""
    return {
        "per_device_train_batch_size": size, "gradient_accumulation_steps": 16 // size,
        "steps_per_generation": 16 // size, "num_iterations": 3, "max_steps": 3,
    }  # fmt: skip


def ours(tmp_path, name, answer=answer, **settings):
    run = trainer(
        tmp_path / "ours", objective=PAIRS[name][0], keep_groups_together=False,
        **{"model": double_model(), **settings},
    )  # fmt: skip
    return scripted(run, answer=answer)


def theirs(tmp_path, name, answer=answer, **settings):
    run = host(
        tmp_path / "theirs", **{"model": double_model(), **PAIRS[name][1], **settings}
    )  # fmt: skip
    return scripted(run, answer=answer)


@pytest.mark.parametrize(("name", "size"), CASES)
def test_equals_the_host_own_loss(tmp_path, name, size):
    """Same answers, same weights: gradients and logged loss agree while ratios are clipped."""
    mine, host_run = ours(tmp_path, name, **cut(size)), theirs(tmp_path, name, **cut(size))
    assert apart(gradients(mine), gradients(host_run)) < 1e-6
    assert mine.last_window.statistics.compute()["gate/active"] > 0.05
    for a, b in zip(updates(mine), updates(host_run), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-6, abs=5e-8)


@pytest.mark.parametrize("name", ["grpo", "gspo", "dr_grpo"])
def test_equals_the_host_over_several_updates(tmp_path, name):
    """Four updates a rollout, single answers shuffled over them as TRL does, two rollouts."""
    settings = {"per_device_train_batch_size": 4, "steps_per_generation": 4, "max_steps": 8}
    mine = ours(tmp_path, name, **settings)
    found = gradients(mine)
    wanted = gradients(theirs(tmp_path, name, **settings))  # made now: it seeds the shuffle anew
    assert apart(found, wanted) < 1e-6
    assert max(step["gate/active"] for step in updates(mine)) > 0.05


@pytest.mark.parametrize("corrected", [True, False])
@pytest.mark.parametrize("size", [16, 8])
def test_reference_kl_enters_gradient_and_loss(tmp_path, corrected, size):
    """With beta the k3 penalty of TRL is added, with its bias correction or without."""
    tiny_model()[0].save_pretrained(tmp_path / "start")  # TRL loads the reference by its path
    settings = {
        "beta": 5.0, "use_bias_correction_kl": corrected, **cut(size),
        "model": (str(tmp_path / "start"), tiny_model()[1]),
    }  # fmt: skip
    mine, host_run = ours(tmp_path, "grpo", **settings), theirs(tmp_path, "grpo", **settings)
    assert apart(gradients(mine), gradients(host_run)) < 1e-5
    for a, b in zip(updates(mine), updates(host_run), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4, abs=1e-7)
        if size == 16 and not corrected:
            assert a["kl"] == pytest.approx(b["kl"], rel=1e-4, abs=1e-8)
    assert updates(mine)[2]["kl"] > 1e-5
    if corrected and size == 16:  # the ratio is in TRL's metric
        a, b = updates(mine)[2]["kl"], updates(host_run)[2]["kl"]
        documented("metric `kl`", b / a - 1)


@pytest.mark.parametrize("name", ["grpo", "dapo", "dr_grpo", "bnpo"])
def test_panel_is_the_host_own(tmp_path, name):
    """In one micro-batch TRL's clip fractions and entropy are ours."""
    names = ["entropy"] + [f"clip_ratio/{part}_mean" for part in ("low", "high", "region")]
    mine, host_run = ours(tmp_path, name, **cut(16)), theirs(tmp_path, name, **cut(16))
    mine.train()
    host_run.train()
    for a, b in zip(updates(mine), updates(host_run), strict=True):
        assert [a[n] for n in names] == pytest.approx([b[n] for n in names], rel=1e-6)
    assert updates(mine)[2]["clip_ratio/region_mean"] > 0.1


# -- intended differences --------------------------------------------------------------------


def documented(row, *fractions):
    """The numbers, in percent, stand in the row of this name in the list of differences."""
    (line,) = [x for x in PAGE.read_text().splitlines() if x.startswith(f"| {row} |")]
    found = [float(x) for x in re.findall(r"(-?[\d.]+) %", line)]
    assert found == pytest.approx([100 * x for x in fractions], rel=0.02), line


def test_bnpo_depends_on_the_cut(tmp_path):
    """TRL's bnpo is a mean over micro-batches of token means; `ppo` is one token mean."""
    whole, parts = (gradients(theirs(tmp_path / str(n), "bnpo", **cut(n))) for n in (16, 4))
    mine = gradients(ours(tmp_path, "bnpo", **cut(4)))
    assert apart(mine, whole) < 1e-6
    documented('`loss_type="bnpo"`', apart(parts[:1], whole[:1]))


def test_dapo_counts_the_tokens_of_the_rollout(tmp_path):
    """With several updates a rollout TRL divides by the mean window, we by this one."""
    settings = {"per_device_train_batch_size": 16, "steps_per_generation": 4, "max_steps": 4}
    mine = ours(tmp_path, "dapo", **settings)
    first = gradients(mine)[0]
    host_first = gradients(theirs(tmp_path, "dapo", **settings))[0]
    tokens = [int(x["completion_mask"].sum()) for x in mine._buffered_inputs]
    factor = tokens[0] / (sum(tokens) / 4)
    assert apart([first * factor], [host_first]) < 1e-6
    documented('`loss_type="dapo"`', factor - 1)


def unfinished(prompt, place):
    """Every fourth answer has no end of sequence."""
    return answer(prompt, place)[: -1 if place == 0 else None]


@pytest.mark.parametrize(("name", "kept"), [("grpo", 12 / 16), ("dr_grpo", 12 / 16), ("dapo", 1)])
def test_answers_without_loss_tokens(tmp_path, name, kept):
    """TRL counts them in its mean over answers; here they are in no denominator."""
    settings = {"mask_truncated_completions": True, "answer": unfinished, **cut(8)}
    mine, host_run = ours(tmp_path, name, **settings), theirs(tmp_path, name, **settings)
    first, host_first = gradients(mine)[0], gradients(host_run)[0]
    assert updates(mine)[0]["trajectories_dropped"] == 4
    assert apart([first * kept], [host_first]) < 1e-6
    if name == "grpo":
        documented("answers without a loss token", kept - 1)


def test_panel_under_accumulation(tmp_path):
    """TRL's clip fractions and entropy are means over micro-batches of means; ours of tokens."""
    found = {}
    for size in (16, 4):
        for run in (ours, theirs):
            one = run(tmp_path / str(size), "grpo", **cut(size))
            one.train()
            step = updates(one)[2]
            found[run, size] = torch.tensor([step["clip_ratio/region_mean"], step["entropy"]])
    torch.testing.assert_close(found[ours, 4], found[ours, 16], rtol=1e-6, atol=0)
    gap = found[theirs, 4] / found[theirs, 16] - 1
    documented("`entropy`, `clip_ratio/..._mean`", *gap.flip(0).tolist())
