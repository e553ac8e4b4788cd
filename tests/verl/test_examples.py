"""Examples and documentation: run, read by verl, and five lines away from an ordinary one."""

import dataclasses
import difflib
import os
import re
import subprocess
import sys
from pathlib import Path

import cpu_step
import harness
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from verl.utils.config import omega_conf_to_dataclass, validate_config

from fiberpo.integrations import verl as plugin

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples" / "verl"
PAGE = (ROOT / "docs" / "verl.md").read_text()


def blocks(kind):
    return re.findall(rf"^```{kind}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def difference():
    """Changed lines between the two configurations, without the comment on top."""
    before, after = (
        (EXAMPLES / f"{name}.yaml").read_text().splitlines()[1:]
        for name in ("grpo", "fiberpo_domain")
    )
    lines = list(difflib.unified_diff(before, after, lineterm="", n=0))[2:]
    return [line for line in lines if not line.startswith("@@")]


def test_five_lines():
    """From an existing configuration to FiberPO-Domain, as the page shows it."""
    changed = difference()
    assert sum(line.startswith("+") for line in changed) <= 5
    (shown,) = blocks("diff")
    assert sorted(changed) == sorted(line for line in shown.splitlines() if line[0] in "+-")


@pytest.mark.parametrize("name", ["grpo", "fiberpo_domain"])
def test_configurations_pass_verls_own_check(name):
    """Unchanged, as verl's main would read them."""
    with initialize_config_dir(str(EXAMPLES), version_base=None):
        config = compose(name)
    validate_config(config, use_reference_policy=True, use_critic=False)


def run(command, **more):
    environment = {name: value for name, value in os.environ.items() if name != "RANK"}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**environment, **more}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_launch_script():
    """verl's main finds the configuration, the overrides and the cluster's size."""
    out = run(
        ["bash", EXAMPLES / "launch.sh", "--cfg", "job", f"{harness.POLICY}.epsilon=0.03"],
        PYTHON=sys.executable, NNODES="3",
    )  # fmt: skip
    config = OmegaConf.create(out)
    assert config.actor_rollout_ref.actor.policy_loss._target_ == plugin.CONFIG
    assert config.actor_rollout_ref.actor.policy_loss.epsilon == 0.03
    assert config.trainer.nnodes == 3


def test_cpu_step():
    """Both configurations in one process; FiberPO-Domain acts."""
    out = run([sys.executable, EXAMPLES / "cpu_step.py"])
    lines = [line for line in out.splitlines() if "grad_norm" in line]
    assert [line.split()[0] for line in lines] == ["grpo"] * 4 + ["fiberpo_domain"] * 4
    active = [float(line.split("gate/active")[1].split()[0]) for line in lines[4:]]
    assert active[0] == 0
    assert max(active) > 0.5


@pytest.mark.parametrize("block", blocks("yaml"))
def test_settings_on_the_page(block):
    """Each block, laid over grpo.yaml, is read by verl and accepted."""
    with initialize_config_dir(str(EXAMPLES), version_base=None):
        config = compose("grpo")
    OmegaConf.set_struct(config, False)
    actor = omega_conf_to_dataclass(
        OmegaConf.merge(config, OmegaConf.create(block)).actor_rollout_ref.actor
    )
    settings = plugin.settings_of(actor)
    assert settings is not None or "param_dtype" in block
    if settings is not None:
        plugin.check_actor(actor, plugin.make_objective(settings))


def test_overrides_on_the_page():
    """The command line, as Hydra reads it."""
    overrides = [
        line.strip(" \\'") for line in blocks("bash")[0].splitlines() if "actor_rollout_ref" in line
    ]
    config = cpu_step.make_config("grpo", "unused", *overrides)
    settings = harness.policy_loss_of(config)
    assert set(plugin.make_objective(settings).gate_map.gates) == {"domain", "trajectory"}


def test_python_on_the_page():
    """It runs, and makes what it says."""
    (code,) = blocks("python no-run")
    names = {}
    exec(code, names)
    assert names["MyWorker"].actor_worker_cls.__name__ == "FiberPOTrainingWorker"


def test_tables_on_the_page():
    """Every setting with its default, every loss mode, every replaced setting."""
    own = {f.name for f in dataclasses.fields(plugin.PolicyLossConfig)} - {"loss_mode"}
    for field in dataclasses.fields(plugin.FiberPOPolicyLossConfig):
        if field.name not in own:
            made = field.default is dataclasses.MISSING
            default = field.default_factory() if made else field.default
            assert f"| `{field.name}` | `{default!r}` |" in PAGE, field.name
    for mode, recipe in plugin.LOSS_MODES.items():
        assert re.search(rf"^\| `{mode}` \| \[.*\]\(objectives/{recipe}\.md\)", PAGE, re.M), mode
    for name, instead in plugin.REPLACED.items():
        assert f"`{name}`" in PAGE
        assert f"`{instead.split(' of ')[0]}`" in PAGE
