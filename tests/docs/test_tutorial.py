"""docs/tutorial.md is executed: every command of it, with the exit codes and texts that it shows.

Numbers of a training run differ from machine to machine, so shown lines are compared without them.
"""

import re
import sys
from pathlib import Path

import pytest

from fiberpo.cli import main

PAGE = Path(__file__).resolve().parents[2] / "docs" / "tutorial.md"
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def steps(text):
    """``(command, exit code, shown)`` of every command on the page, before the Python part."""
    blocks = FENCE.findall(text.partition("## A TRL run of your own")[0])
    found = []
    for kind, body in blocks:
        if kind == "bash":
            for line in body.splitlines():
                command, _, comment = line.partition("    # ")
                code = int(comment.rsplit(" ", 1)[-1]) if comment else 0
                found.append([command.split(), code, []])
        elif kind == "text":
            found[-1][2] += body.splitlines()
    return found


def bare(line):
    """Without numbers, signs and widths."""
    return re.sub(r"\s+", " ", re.sub(r"[-+<]?[\d.,]+(e[-−]?\d+)?\*?|%", "", line)).strip()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_command_of_the_tutorial(tmp_path, monkeypatch, capfd):
    """From the broken runs to the repaired one."""
    text = PAGE.read_text()
    (settings,) = [body for kind, body in FENCE.findall(text) if kind == "yaml"]
    (tmp_path / "small.yaml").write_text(settings)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = {}
    for command, code, shown in steps(text):
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as end:
            main()
        said = capfd.readouterr()
        assert (end.value.code or 0) == code, (command, said.err[-2000:])
        lines = [bare(line) for line in said.out.splitlines()]
        for line in shown:
            if line != "...":
                assert bare(line) in lines, (command, line, said.out)
        found[" ".join(command[1:3]), command[-1]] = said.out
    assert "mostly-gated" in found["doctor runs/tight", "runs/tight"]
    assert "mostly-gated" not in found["doctor runs/sane", "runs/sane"]
    assert (tmp_path / "both.html").stat().st_size > 10_000


def test_lines_are_compared_without_numbers():
    """A changed word is seen, a changed number is not."""
    assert bare(" domain  +  0.002 1.2e−06* 31.2 %") == bare("domain + 0.02 7 3 %")
    assert bare("error: mostly-gated") != bare("error: inert-gates")
    commands = [command for command, _, _ in steps(PAGE.read_text())]
    assert {command[1] for command in commands} == {
        "train", "doctor", "report", "replay", "suggest"
    }  # fmt: skip
