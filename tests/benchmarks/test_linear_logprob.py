"""`benchmarks/linear_logprob.py` runs, and refuses to time a fault."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "benchmarks/linear_logprob.py"

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning")]


@pytest.fixture(scope="module")
def benchmark():
    """The benchmark as a module."""
    spec = importlib.util.spec_from_file_location("linear_benchmark", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    sys.modules["linear_benchmark"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["linear_benchmark"]


def test_quick_run(benchmark, tmp_path):
    """Every variant is right, and has a time, a ratio and a peak."""
    path = tmp_path / "out.json"
    assert benchmark.main(["--quick", "--liger", "none", "--json", str(path)]) == 0
    results = json.loads(path.read_text())
    assert [row["name"] for row in results["rows"]] == list(benchmark.VARIANTS)
    for row in results["rows"]:
        assert row["seconds"] > 0
        assert row["peak_mb"] > 0
        assert (row["x_floor_chunked"] is None) == (row["products"] is None)
    assert results["machine"]["torch"] == torch.__version__


@pytest.mark.parametrize("small", [True, False])
def test_a_wrong_variant_is_not_timed(benchmark, monkeypatch, capsys, small):
    """Whether it is the small head or the full one that shows it."""

    def wrong(scene, hidden, weight):
        out = benchmark.ours("two-phase")(scene, hidden, weight)
        if small or len(scene.weight) == 512:
            hidden.grad.mul_(1.01)
        return out

    monkeypatch.setitem(benchmark.VARIANTS, "ours, two-phase", (wrong, True, 4))
    monkeypatch.setattr(benchmark, "measure", None)  # would be called
    assert benchmark.main(["--quick", "--liger", "none"]) == 1
    printed = capsys.readouterr()
    assert "RED: ours, two-phase: hidden are off by 1.00e-02" in printed.err
    assert printed.out == ""


def test_the_page_shows_the_results(benchmark):
    """The table on the page is that of the stored results."""
    results = json.loads(benchmark.RESULTS.read_text())
    page = benchmark.PAGE.read_text()
    assert benchmark.fill_page(page, results) == page
    assert benchmark.table(results) in page
