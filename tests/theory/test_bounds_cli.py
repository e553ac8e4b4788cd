"""``fiberpo bounds``: table, reason, JSON, mistakes."""

import json
import os
import subprocess
import sys

import pytest
from rich.console import Console
from typer.testing import CliRunner

from fiberpo.cli import app, main
from fiberpo.report.bounds import print_bounds
from fiberpo.theory.bounds import bounds

KEYS = ["classical", "coupling", "pm_kl", "pm_tv", "mixed_kl", "mixed_tv", "adaptive", "best"]
FULL = "--length 4096 --kl-max 1e-4 --kl-seq 0.01 --tv-max 5e-3 --tv-seq 0.05"


def run(arguments):
    result = CliRunner().invoke(app, ["bounds", *arguments.split()])
    assert result.exit_code == 0, result.output
    return result.output


def parsed(arguments):
    return json.loads(run(f"{arguments} --json -"))


def test_json_has_the_keys():
    """One object, nothing else; null where an input is missing."""
    values = parsed("--length 4096 --kl-max 1e-4 --kl-seq 0.01")
    assert list(values) == [*KEYS, "tightest"]
    assert [key for key, value in values.items() if value is None] == [
        "pm_tv", "mixed_tv", "adaptive",
    ]  # fmt: skip
    rounded = {key: round(values[key], 3) for key in ("classical", "coupling", "pm_kl", "mixed_kl")}
    assert rounded == {
        "classical": 1677.312, "coupling": 113.838, "pm_kl": 34.946, "mixed_kl": 8.192,
    }  # fmt: skip
    assert (values["best"], values["tightest"]) == (values["mixed_kl"], "mixed_kl")


def test_json_with_total_variations():
    """The second set of reference numbers."""
    values = parsed(FULL)
    assert values["tightest"] == "mixed_tv"
    assert [round(values[key], 3) for key in ("classical", "coupling", "pm_tv", "mixed_tv")] == [
        838.656, 79.91, 24.711, 4.096,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "options"),
    [
        ("--mean-tv 0.001", {"mean_tv": [0.001] * 50}),
        ("--reward-range -1 3", {"reward_range": (-1, 3)}),
        ("--factor 2", {"factor": 2}),
        ("--product", {"product": True}),
        ("--tight", {"tight": True}),
    ],
)
def test_flags_reach_the_bounds(flags, options):
    """Every option has its effect."""
    given = {"kl_max": 0.3, "kl_seq": 0.1, "tv_max": 0.01}
    values = parsed(f"--length 50 --kl-max 0.3 --kl-seq 0.1 --tv-max 0.01 {flags}")
    assert values == pytest.approx(bounds(50, **given, **options).as_dict())
    assert values != bounds(50, **given).as_dict()


def test_table_shows_values_formulas_and_the_reason():
    """A row a bound, what is missing, and the sentence on the tightest."""
    output = run(FULL)
    for text in (
        "classical   838.656   2 T (T-1) eps^2",
        "mixed_tv      4.096   4 T min(1, eps) min(1, tv_seq)",
        "adaptive          -   needs mean_tv",
        "Tightest: mixed_tv, B* = 4.096. Why: it charges every prefix the drift of the whole",
        "|L'| is at most 4.52548.",
        "larger than the reward range 1",
    ):
        assert text in output
    assert all(line == line.rstrip() for line in output.splitlines())


def test_table_of_the_tight_constants():
    """The formulas are those that were used."""
    output = run(f"{FULL} --tight")
    assert "1 T (T-1) eps^2" in output
    assert "2 min(1, eps) sum_t (1 - (1-eps)^(t-1))" in output
    assert "min(1, (t-1) eps)" not in output


def test_a_bound_that_cannot_be_exceeded_is_called_so():
    """B* = 8.192, but |L'| is at most 4.525."""
    output = run("--length 4096 --kl-max 1e-4 --kl-seq 0.01 --reward-range 0 2")
    assert "It certifies nothing: with these divergences |L'| is at most 9.05097." in output
    assert "rewards 2 wide multiply each bound" in output


def test_a_terminal_gets_colours(capsys):
    """The same on a console of one's own."""
    console = Console(force_terminal=True, width=120)
    print_bounds(bounds(4, kl_max=0.1), console)
    assert "\x1b[" in capsys.readouterr().out


def test_small_bounds_leave_room():
    """Below the reward range nothing is added."""
    output = run("--length 10 --tv-max 0.001")
    assert "certifies an improvement if the divergences are exact" in output
    assert "reward range" not in output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--length 0 --tv-max 0.1", "length is 0"),
        ("--length 0 --tv-max 0.1 --mean-tv 0.1", "length is 0"),
        ("--length 5", "neither tv_max nor kl_max"),
        ("--length 5 --tv-max 1.1", "tv_max is 1.1; a total variation"),
        ("--length 5 --kl-max -1", "kl_max is -1"),
        ("--length 5 --kl-max 0.1 --kl-seq 1", "contradict each other"),
        ("--length 5 --kl-max 0.1 --reward-range 1 0", "reward_range is (1, 0)"),
        ("--length 5 --kl-max 0.1 --factor 3", "factor is 3"),
        ("--length 5 --tv-max 0.1 --mean-tv 0.2", "above tv_max = 0.1"),
    ],
)
def test_mistakes_give_one_line(arguments, said, monkeypatch, capsys):
    """Exit code 2, no traceback."""
    monkeypatch.setattr(sys, "argv", ["fiberpo", "bounds", *arguments.split()])
    with pytest.raises(SystemExit) as done:
        main()
    assert done.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("fiberpo: ")
    assert said in captured.err
    assert len(captured.err.strip().splitlines()) == 1


@pytest.mark.parametrize("arguments", ["--tv-max 0.1", "--length x --tv-max 0.1"])
def test_missing_and_malformed_options(arguments):
    """The command line's own message, exit code 2."""
    result = CliRunner().invoke(app, ["bounds", *arguments.split()])
    assert result.exit_code == 2
    assert "--length" in result.output


def test_help_has_an_example():
    """That can be pasted."""
    text = " ".join(run("--help").split())
    assert "Example: fiberpo bounds --length 4096 --kl-max 1e-4" in text
    assert "--tight" in text


def test_command_answers_without_torch():
    """In a fresh process; the output is JSON alone."""
    code = (
        "import sys; from fiberpo.cli import main\n"
        "try:\n    main()\nfinally:\n    print('torch' in sys.modules, file=sys.stderr)"
    )
    command = [sys.executable, "-c", code, "bounds", *FULL.split(), "--json", "-"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ})
    assert json.loads(done.stdout)["tightest"] == "mixed_tv"
    assert done.stderr.strip() == "False"
