"""The command line as a whole: help, examples, order, exit codes, completion; `fiberpo report`."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import fiberpo
from fiberpo import cli
from fiberpo.cli import completion
from fiberpo.cli.app import ORDER, app
from fiberpo.recipes import RECIPES

ROOT = Path(__file__).resolve().parents[2]
PICTURE = ROOT / "docs" / "images" / "report.png"
COMMANDS = typer.main.get_command(app).commands


def run(*arguments: str, code: int = 0) -> tuple[str, str]:
    """Output and errors of ``fiberpo``, in this process, through its entry point."""
    done = CliRunner().invoke(app, list(arguments))
    assert done.exit_code == code, (done.output, done.exception)
    return done.stdout, done.stderr


def through_main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Any:
    """Exit code of `fiberpo.cli.main`."""
    monkeypatch.setattr(sys, "argv", ["fiberpo", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return end.value.code


def test_commands_stand_in_order() -> None:
    """As a user meets them; nothing is missing from the order."""
    text, _ = run("--help")
    listed = re.findall(r"^  (\w+) {2,}", text.partition("Commands:")[2], re.MULTILINE)
    assert listed == list(ORDER) == [name for name in ORDER if name in COMMANDS]
    assert set(COMMANDS) == set(ORDER)
    assert "..." not in text.replace("[OPTIONS] COMMAND [ARGS]...", "")


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_has_an_example_that_parses(name: str) -> None:
    epilog = COMMANDS[name].epilog or ""
    assert epilog.startswith(f"Example: fiberpo {name} ")
    words = shlex.split(epilog.removeprefix("Example: "))
    context = COMMANDS[name].make_context(name, words[2:])
    assert context.params
    text, _ = run(name, "--help")
    assert "Example: fiberpo" in text
    for option in COMMANDS[name].params:
        assert option.name in ("help", "tensorboard", "trackio") or option.help, option.name


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_the_page_of_the_docs_has_every_command(name: str) -> None:
    assert f"| `fiberpo {name}" in (ROOT / "docs" / "cli.md").read_text()


@pytest.mark.slow
def test_a_directory_as_configuration(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert through_main(monkeypatch, "train", "--config", "/") == 2
    assert capsys.readouterr().err == "fiberpo: /: Is a directory\n"


def test_version() -> None:
    assert run("--version")[0] == f"fiberpo {fiberpo.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "Did you mean 'train'?"),
        (["train", "--rollouts", "many"], "Invalid value for '--rollouts'"),
        (["report"], "Missing argument 'RUN'"),
        (["report", "/nowhere"], "/nowhere: no such run"),
        (["lab", "--seed", "-1"], "Invalid value for '--seed'"),
        (["report", __file__], "neither a run"),
        (["report", "/dev/null"], "neither a file nor a directory"),
        (["doctor", "/dev/null"], "neither a file nor a directory"),
        (["train", "--config", str(PICTURE)], "report.png is not YAML"),
        (["train", "--set", "tasks=["], "--set 'tasks=[': the value is not YAML"),
        (["bounds", "--length", "4", "--kl-max", "0.1", "--json", "/"], "--json /"),
    ],
)
def test_mistakes_end_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    assert through_main(monkeypatch, *arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    ("error", "code"),
    [(KeyboardInterrupt(), 130), (BrokenPipeError(32, "Broken pipe"), 141), (typer.Exit(1), 1)],
)
def test_exit_codes(monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("fiberpo.report.bounds.print_bounds", fail)
    monkeypatch.setattr(os, "dup2", lambda *_: None)
    assert through_main(monkeypatch, "bounds", "--length", "4", "--kl-max", "0.1") == code


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("fiberpo.report.bounds.print_bounds", fail)
    monkeypatch.setattr(sys, "argv", ["fiberpo", "bounds", "--length", "4", "--kl-max", "0.1"])
    with pytest.raises(ZeroDivisionError):
        cli.main()


# typer notices the one, nobody the other before the buffer is flushed
@pytest.mark.parametrize("words", ["--help", "bounds --length 4 --kl-max 0.1 --json -"])
def test_a_reader_that_goes_away(words: str) -> None:
    """``fiberpo ... | head -0``: no message, and the exit code that a signal would leave."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "fiberpo", *words.split()]
    env = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    done = subprocess.run(
        command, stdout=write, stderr=subprocess.PIPE, text=True, timeout=120, env=env
    )
    os.close(write)
    assert done.stderr == ""
    assert done.returncode == 141


def test_json_goes_to_a_file_or_alone_to_the_terminal(tmp_path: Path) -> None:
    words = ["bounds", "--length", "4", "--kl-max", "0.1", "--json"]
    alone, _ = run(*words, "-")
    target = tmp_path / "deep" / "bounds.json"
    beside, _ = run(*words, str(target))
    assert json.loads(alone) == json.loads(target.read_text())
    assert "Tightest" in beside


def test_names_that_the_shell_completes() -> None:
    assert tuple(RECIPES) == completion.OBJECTIVES
    assert completion.complete_objective("g") == ["grpo", "gspo", "gmpo"]


def test_runs_that_the_shell_completes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert completion.complete_run("") == []
    for name in ("runs/a", "runs/b", "runs/empty", ".hidden", "other"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("runs/a/metrics.jsonl", "runs/b/config.yaml", "other/summary.json"):
        (tmp_path / name).touch()
    assert completion.complete_run("") == ["runs/a", "runs/b"]
    assert completion.complete_run("r") == ["runs/"]
    assert completion.complete_run("runs/") == ["runs/a", "runs/b", "runs/empty/"]
    assert completion.complete_run("ot") == ["other"]
    assert completion.complete_run("absent/x") == []
    assert completion.complete_run(f"{tmp_path}/runs/a") == [f"{tmp_path}/runs/a"]


def test_completion_of_the_shell_is_light() -> None:
    """The tab key loads neither torch nor a plotting library."""
    code = (
        "import sys; sys.argv = ['fiberpo']\n"
        "from fiberpo.cli import main\n"
        "try:\n    main()\nfinally:\n"
        "    print(sorted({'torch', 'matplotlib'} & set(sys.modules)), file=sys.stderr)"
    )
    env = {
        **os.environ, "_FIBERPO_COMPLETE": "complete_bash",
        "COMP_WORDS": "fiberpo train --objective fiber", "COMP_CWORD": "3",
    }  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.stdout.split() == ["fiberpo", "fiberpo_domain", "fiberstop"]
    assert done.stderr.strip() == "[]"


def test_a_link_to_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "loop").symlink_to("loop")
    assert through_main(monkeypatch, "report", str(tmp_path / "loop")) == 2


def test_report_command(tmp_path: Path) -> None:
    """The page, its path on standard output, notes on the error stream; all of it as JSON."""
    pytest.importorskip("matplotlib")
    pytest.importorskip("plotly")
    from report.samples import make_run, record

    one = make_run(tmp_path / "one", ["token"], steps=4)
    record(one / "recording", steps=2)
    (one / "summary.json").unlink()
    out, errors = run("report", str(one))
    assert out == f"{one / 'report.html'}\n"
    assert "note: one: summary.json is missing" in errors
    two = make_run(tmp_path / "two", ["token"], steps=4)
    page = tmp_path / "both.html"
    found = json.loads(run("report", str(one), str(two), "--out", str(page), "--json", "-")[0])
    assert found["report"] == str(page)
    assert found["bytes"] == page.stat().st_size < 8_000_000
    assert [r["steps_read"] for r in found["runs"]] == [4, 4]
    assert found["runs"][0]["recording"]["steps"] == 2
    assert found["runs"][1]["recording"] is None
    assert {f["severity"] for f in found["runs"][0]["findings"]} <= {"error", "warning", "note"}
