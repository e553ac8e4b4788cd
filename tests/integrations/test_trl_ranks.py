"""Two gloo processes equal one: gradient norms and metrics of `two_ranks.py` run as both."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

from integrations.tiny import double_model
from integrations.two_ranks import LAYOUTS, OBJECTIVES

pytestmark = pytest.mark.slow
TESTS = Path(__file__).parents[1]
PROGRAM = Path(__file__).with_name("two_ranks.py")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")

DEPENDS_ON_THE_CUT = {"step_time", "gate/phase_difference", "gate/split_error"}
LOG_PROB = 5e-7  # nats: two units in the last place of a float32 log-prob


def start(folder, *launcher, program=PROGRAM):
    """Run the program, which writes what every case logged into the folder."""
    path = os.pathsep.join([str(TESTS), *sys.path])
    env = {
        **os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true",
        "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": path,
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, *launcher, str(program), str(folder)], env=env, cwd=folder,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, worker_id):
    """The log of one process and of two; made once, also for several workers of pytest-xdist."""
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "ranks"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            double_model()[0].save_pretrained(folder / "start")
            start(folder)
            start(folder, *TORCHRUN)
    return [json.loads((folder / f"ranks{n}.json").read_text()) for n in (1, 2)]


def assert_equal(one, two, log_prob=LOG_PROB):
    assert len(one["steps"]) == len(two["steps"]) > 0
    for mine, theirs in zip(one["steps"], two["steps"], strict=True):
        names = (mine.keys() | theirs.keys()) - DEPENDS_ON_THE_CUT
        for name in names:
            tolerance = 0.0 if name == "grad_norm" else log_prob
            assert theirs[name] == pytest.approx(mine[name], rel=1e-6, abs=tolerance), name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_two_ranks_equal_one(runs, objective, layout):
    """Gradient norm, gates, ratios, divergences, rewards: every number of every update."""
    one, two = (run[f"{objective} {layout}"] for run in runs)
    active = [step["gate/active"] for step in one["steps"]]
    assert active[0] == active[3] == 0  # the first update of either rollout
    assert min(active[1:3]) > 0.3
    assert_equal(one, two)


def test_routes(runs):
    """The second forward is left out where contexts lie inside micro-batches, and at the start."""
    one, two = runs
    everywhere, needed = ["contained"] * 4, ["fresh", "two-phase", "two-phase", "fresh"]
    for layout in LAYOUTS:
        for objective in ("trajectory", "tokens"):
            assert [run[f"{objective} {layout}"]["routes"] for run in runs] == [everywhere] * 2
        assert [run[f"domain {layout}"]["routes"] for run in runs] == [needed] * 2
    # 12 answers of one process are 3 whole groups of 4; the 6 answers of one of two ranks are not
    assert one["group whole"]["routes"] == everywhere
    assert two["group whole"]["routes"] == needed
    assert one["group straddling"]["routes"] == needed


def test_local_aggregates_are_seen_to_differ(runs):
    """The comparison can fail: aggregates per micro-batch change gradients by percents."""
    exact, local = runs[0]["domain straddling"], runs[1]["local"]
    with pytest.raises(AssertionError):
        assert_equal(exact, local)
    mine, theirs = ([s["grad_norm"] for s in run["steps"]] for run in (exact, local))
    assert theirs[0] == pytest.approx(mine[0], rel=1e-6)  # on policy every form is the same
    assert abs(theirs[1] / mine[1] - 1) > 0.01
    assert local["steps"][1]["gate/split_error"] > 0.1


def test_reference_kl(runs):
    """The penalty and its metric are those of all ranks."""
    one, two = (run["penalised"] for run in runs)
    assert one["steps"][1]["kl"] > 0
    assert one["steps"][1]["grad_norm"] != runs[0]["group straddling"]["steps"][1]["grad_norm"]
    assert_equal(one, two)


def test_resume(runs):
    """Every rank continues its own part of the rollout: as without a stop."""
    for run in runs:
        through = {name: values[2:] for name, values in run["domain straddling"].items()}
        assert_equal(through, run["resumed"])
        assert run["resumed"]["routes"] == through["routes"] == ["two-phase", "fresh"]


def test_evaluation(runs):
    """``eval_loss`` is that of the eval batches of all ranks together."""
    one, two = (run["evaluated"] for run in runs)
    assert one["steps"][0]["eval_loss"] != 0
    assert_equal(one, two)
