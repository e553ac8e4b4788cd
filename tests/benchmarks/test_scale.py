"""`benchmarks/scale.py`: its counts are those of the formulas, and it refuses to time a fault."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "benchmarks/scale.py"


@pytest.fixture(scope="module")
def scale():
    """The benchmark as a module."""
    spec = importlib.util.spec_from_file_location("scale_benchmark", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    sys.modules["scale_benchmark"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["scale_benchmark"]


def holders(rows, groups, ranks, torn):
    """Per rank the contexts it holds, by loops: 4 domains, ``groups`` groups of equal size."""
    held = [set() for _ in range(ranks)]
    for row in range(rows):
        rank = row % ranks if torn else row * ranks // rows
        group = row * groups // rows
        held[rank] |= {("domain", group % 4), ("group", group)}
    return held


def expected_bytes(held):
    """What `docs/exact.md` says: per rank and step."""
    everything = [context for mine in held for context in mine]
    straddling = sum(everything.count(context) > 1 for context in set(everything))
    return {
        "straddling": straddling,
        "keys": 16 * max(map(len, held)),  # a key and its parent's
        "keys_received": 16 * len(everything),
        "layout": 2 * 8 * straddling + 2 * 8 + 2 * 8,  # masses and counts; denominators; flags
        "step": 2 * 2 * 8 * straddling,  # two reductions of two channels
    }


@pytest.mark.filterwarnings("ignore::fiberpo.FiberPOWarning")
@pytest.mark.parametrize(
    ("rows", "groups", "ranks", "torn"),
    [(64, 8, 2, False), (64, 8, 2, True), (64, 16, 8, True), (96, 12, 3, False), (48, 12, 5, True)],
)
def test_two_all_reduces_of_what_straddles(scale, rows, groups, ranks, torn):
    """Bytes follow from the contexts that two ranks hold, and the step is two reductions."""
    found = scale.simulate(scale.make(rows, 6, groups), ranks, torn, 1)
    expected = expected_bytes(holders(rows, groups, ranks, torn))
    assert found["calls"] == {"keys": 1, "layout": 3, "step": 2}
    assert found["straddling"] == expected["straddling"]
    assert found["keys_received"] == expected["keys_received"]
    assert found["handed"] == {name: expected[name] for name in ("keys", "layout", "step")}
    assert found["error"] < 1e-9


@pytest.mark.filterwarnings("ignore::fiberpo.FiberPOWarning")
def test_bytes_do_not_know_tokens_or_rows(scale):
    """Eight times the tokens, twice the answers of each group: the same bytes."""
    plain = scale.simulate(scale.make(64, 4, 8), 4, True, 1)
    longer = scale.simulate(scale.make(64, 32, 8), 4, True, 1)
    more = scale.simulate(scale.make(128, 4, 8), 4, True, 1)
    assert longer["tokens"] > 6 * plain["tokens"]
    assert plain["handed"] == longer["handed"] == more["handed"]


@pytest.mark.filterwarnings("ignore::fiberpo.FiberPOWarning")
def test_nothing_is_reported_where_coefficients_are_wrong(scale, monkeypatch, capsys):
    """Ranks that do not hear the others: no table, exit status 1."""
    real = scale.Noted.total

    def deaf(self, values):
        answer = real(self, values)
        return answer if values.ndim == 1 else values.clone()

    monkeypatch.setattr(scale.Noted, "total", deaf)
    assert scale.main(["--quick"]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "wrong, so nothing is reported: 2 ranks: coefficients differ by" in printed.err


def test_tables_of_the_page_are_those_of_the_results(scale):
    """docs/exact.md holds every table, as results/scale.json gives it."""
    results, page = json.loads(scale.RESULTS.read_text()), scale.PAGE.read_text()
    for name, table in scale.tables(results).items():
        assert f"<!-- scale: {name} -->\n{table}\n<!-- end -->" in page, name
    assert scale.fill_page(page, results) == page
    assert {r["ranks"] for r in results["per_rank"]} == {2, 8, 32, 128, 512, 1024}
    assert all(r["error"] < 1e-9 for r in results["per_rank"] + results["total"])
    assert all(r["calls"]["step"] == 2 for r in results["per_rank"] + results["total"])
    assert set(results["machine"]) == {"platform", "cores", "threads", "python", "torch"}


@pytest.mark.slow
def test_the_program_runs(tmp_path):
    """Small settings from the command line, two real processes included; no file is changed."""
    kept = (ROOT / "benchmarks/results/scale.json").read_text()
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, PROGRAM, "--quick", "--json", tmp_path / "found.json"],
        capture_output=True, text=True, cwd=tmp_path, env=env, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["per_rank"][-1]["handed"]["step"] == 32 * found["per_rank"][-1]["straddling"]
    (pair,) = found["gloo"]
    assert pair["processes"] == 2
    assert pair["error"] < 1e-9
    assert pair["handed"]["step"] == 32 * (128 + 4)
    assert 0 < pair["wall_ms"]["step"] < pair["wall_ms"]["all"]
    assert "| torn | 8 | 256 |" in done.stdout
    assert (ROOT / "benchmarks/results/scale.json").read_text() == kept
