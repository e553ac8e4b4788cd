"""The pages hold what the recorded results say."""

import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).resolve().parents[2] / "benchmarks/page.py"


def test_pages_are_current():
    """`python benchmarks/page.py` would change nothing."""
    done = subprocess.run(
        [sys.executable, str(PROGRAM), "--check"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
