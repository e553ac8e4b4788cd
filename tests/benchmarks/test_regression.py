"""No ratio of the benchmarks is half as bad again as its recorded baseline."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).resolve().parents[2] / "benchmarks/regression.py"


@pytest.fixture
def regression():
    """The program as a module."""
    spec = importlib.util.spec_from_file_location("regression_benchmark", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_ratios_hold():
    """Measured in a process of its own."""
    done = subprocess.run(
        [sys.executable, str(PROGRAM)], env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_worse_ratio_is_found_and_noise_forgiven(regression, capsys):
    """Three bad measurements are a regression, two are noise."""
    baselines = {"a / b": {"baseline": 2.0, "tolerance": 1.5}}
    assert regression.compare("x", lambda: {"a / b": 2.9}, baselines)
    assert not regression.compare("x", lambda: {"a / b": 3.1}, baselines)
    assert "WORSE" in capsys.readouterr().out
    noisy = iter([9.0, 9.0, 2.1])
    assert regression.compare("x", lambda: {"a / b": next(noisy)}, baselines)
