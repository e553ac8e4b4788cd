"""The documentation is executed: code blocks, their printed output, examples, links, tables.

``python tests/docs/test_docs.py [PAGE ...]`` rewrites the output blocks of all pages, or of some,
and the defaults in train.md (read the diff).
"""

import contextlib
import dataclasses
import difflib
import functools
import inspect
import io
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import fiberpo
from fiberpo.recipes import RECIPES

ROOT = Path(__file__).resolve().parents[2]
DOCS, EXAMPLES = ROOT / "docs", ROOT / "examples"
BLOCK = re.compile(
    r"^```python(?P<no_run> no-run)?\n(?P<code>.*?)^```\n(?:\n*^```text\n(?P<out>.*?)^```$)?",
    re.MULTILINE | re.DOTALL,
)
HEAVY = ("integrations.trl", "fiberpo.train", "import trl", "transformers")


def pages():
    written = [p for p in DOCS.rglob("*.md") if "decisions" not in p.parts]
    return [ROOT / "README.md", *sorted(written)]


def blocks(page):
    """Code, expected output, first line and whether to run, of every block of a page."""
    text = page.read_text()
    for match in BLOCK.finditer(text):
        line = text.count("\n", 0, match.start()) + 2
        yield match["code"], match["out"], line, not match["no_run"], match


def run(page, visit):
    """Execute a page in one namespace; ``visit(printed, block)`` after every block."""
    namespace = {"__name__": "docs"}
    with torch.random.fork_rng(devices=[]):
        for code, expected, line, wanted, match in blocks(page):
            # leading newlines put the page's own line numbers into tracebacks
            compiled = compile("\n" * (line - 1) + code, str(page), "exec")
            printed = io.StringIO()
            if wanted:
                with contextlib.redirect_stdout(printed):
                    exec(compiled, namespace)
                visit(printed.getvalue(), expected, line, match)


def is_heavy(page):
    return any(word in code for code, _, _, wanted, _ in blocks(page) if wanted for word in HEAVY)


def page_cases():
    for page in pages():
        marks = [pytest.mark.slow] if is_heavy(page) else []
        yield pytest.param(page, id=str(page.relative_to(ROOT)), marks=marks)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("page", list(page_cases()))
def test_page(page):
    """Every block runs, and prints what the page says it prints."""

    def visit(printed, expected, line, match):
        where = f"{page.relative_to(ROOT)}:{line}"
        if expected is None:
            assert printed == "", f"{where} prints, but no output block follows it"
        else:
            assert printed == expected, where

    run(page, visit)


def test_every_block_is_seen():
    """A fence that the pattern overlooks would never be executed."""
    for page in pages():
        fences = re.findall(r"^```(\S.*)$", page.read_text(), re.MULTILINE)
        assert set(fences) <= {"python", "python no-run", "text", "bash", "diff", "yaml", "json"}
        assert sum(f.startswith("python") for f in fences) == len(list(blocks(page))), page


SLOW_EXAMPLES = {"trl_plain.py", "trl_script.py", "record_batch.py"}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(p.name, marks=[pytest.mark.slow] if p.name in SLOW_EXAMPLES else [])
        for p in sorted(EXAMPLES.glob("*.py"))
    ],
)
def test_example(name, tmp_path):
    """Every example runs by itself, from any directory, and prints something."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, EXAMPLES / name], capture_output=True, text=True, cwd=tmp_path, env=env,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout


def changes(old, new):
    """Removed and added lines between two scripts, without their docstrings and comments."""
    texts = [(EXAMPLES / name).read_text().split('"""', 2)[2] for name in (old, new)]
    lines = [re.sub(r"  # .*", "", text).splitlines() for text in texts]
    return [x for x in difflib.unified_diff(*lines, n=0, lineterm="") if re.match(r"[-+][^-+]", x)]


def test_a_trl_script_changes_in_four_lines():
    """The page shows them, and each carries a mark."""
    found = changes("trl_plain.py", "trl_script.py")
    assert 0 < sum(line.startswith("-") for line in found) <= 4
    assert sum(line.startswith("+") for line in found) == 4
    (shown,) = re.findall(r"^```diff\n(.*?)^```$", (DOCS / "trl.md").read_text(), re.M | re.S)
    assert shown.splitlines() == found
    marked = re.findall(r"^(.*\S)  # CHANGED", (EXAMPLES / "trl_script.py").read_text(), re.M)
    assert marked == [line[1:] for line in found if line.startswith("+")]


def test_trl_page_names_the_pinned_versions():
    """Tested with what constraints.txt installs."""
    (line,) = re.findall(r"^Tested with (.*)$", (DOCS / "trl.md").read_text(), re.M)
    pins = dict(x.split("==") for x in (ROOT / "constraints.txt").read_text().lower().split())
    named = re.findall(r"(\w+) ([\d.]+\d)", line.lower())
    assert len(named) == 5
    assert {name: pins[name] for name, _ in named} == dict(named)


def anchors(page):
    """Fragment identifiers of a page's headings."""
    for heading in re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE):
        kept = re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower())
        yield kept.strip().replace(" ", "-")


@pytest.mark.parametrize("page", pages(), ids=lambda p: str(p.relative_to(ROOT)))
def test_links(page):
    """Relative links point to files that exist, fragments to headings that exist."""
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, fragment = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{page.name} links to {target}"
        if fragment and there.suffix == ".md":
            assert fragment in set(anchors(there)), f"{page.name} links to {target}"


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_has_a_page(name):
    """With a row for every parameter that states its default."""
    text = (DOCS / "objectives" / f"{name}.md").read_text()
    rows = {
        cells[0].strip("` "): cells
        for cells in (line.strip("| ").split(" | ") for line in text.splitlines())
        if len(cells) >= 3
    }
    assert f"recipes.{name}(" in text
    for parameter in inspect.signature(RECIPES[name]).parameters.values():
        cells = rows[parameter.name]
        if parameter.default is parameter.empty:
            assert "required" in cells[2]
        else:
            assert cells[2].strip("` ") == repr(parameter.default), (name, parameter.name)


def metric_rows():
    """Name pattern -> whether it also comes per domain, from the tables of metrics.md."""
    for line in (DOCS / "metrics.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("| ").split(" | ")]
        if line.startswith("| `"):
            for name in re.findall(r"`([^`]+)`", cells[0]):
                pattern = re.escape(name)
                pattern = re.sub(r"<[a-z ]+>", lambda _: "[^/]+", pattern.replace(r"\ ", " "))
                yield re.compile(pattern + "$"), cells[-1] == "yes"


def documented(key):
    stem, found, _ = key.partition("/domain=")
    return any(
        pattern.match(stem) and (per_domain or not found) or pattern.match(key)
        for pattern, per_domain in metric_rows()
    )


@pytest.mark.parametrize("name", RECIPES)
def test_every_metric_is_documented(name):
    """Each key of a batch with all labels is in metrics.md, and so is its domain variant."""
    generator = torch.Generator().manual_seed(0)
    old = -torch.rand(24, generator=generator)
    batch = fiberpo.RatioBatch.from_packed(
        old + 0.1 * torch.randn(24, generator=generator), old,
        torch.randn(8, generator=generator), [3] * 8,
        labels={"domain": list("aaaabbbb"), "group": [0, 0, 1, 1, 2, 2, 3, 3]},
        rollout_log_probs=old,
    )  # fmt: skip
    parameters = {"length": 4.0} if name == "dr_grpo" else {}
    metrics = RECIPES[name](**parameters)(batch).metrics()
    assert any("/domain=" in key for key in metrics)
    assert [key for key in metrics if not documented(key)] == []


def setting_defaults():
    """Name and default of every setting of ``fiberpo train``."""
    from fiberpo.train.config import TrainConfig

    for field in dataclasses.fields(TrainConfig):
        made = field.default is dataclasses.MISSING
        yield field.name, field.default_factory() if made else field.default


def test_settings_of_training_are_documented():
    """train.md has a row with the default for every setting, and every command-line option."""
    text = (DOCS / "train.md").read_text()
    for name, default in setting_defaults():
        assert f"| `{name}` | `{default!r}` |" in text, name
    from fiberpo.cli import train

    flags = {"set_": "--set", "json_": "--json"}
    for parameter in inspect.signature(train).parameters:
        assert f"`{flags.get(parameter, '--' + parameter.replace('_', '-'))}" in text, parameter


def test_pages_hold_no_machine_paths():
    """Nothing of the machine that the pages were written on."""
    for page in pages():
        assert not re.search(r"(?<![\w.])/(work|home|root|tmp)/", page.read_text()), page


def rewrite(page):
    """Put what the blocks print into the output blocks that follow them."""
    text, found = page.read_text(), []
    run(page, lambda printed, expected, line, match: found.append((match, printed)))
    for match, printed in reversed(found):
        start, end = match.end("code"), match.end()
        if printed or match["out"] is not None:
            after = f"```\n\n```text\n{printed}```" if printed else "```\n"
            text = text[:start] + after + ("" if match["out"] is not None else "\n") + text[end:]
    page.write_text(text)


if __name__ == "__main__":
    warnings.simplefilter("error")
    warnings.simplefilter("ignore", FutureWarning)
    warnings.simplefilter("ignore", DeprecationWarning)
    chosen = [Path(name).resolve() for name in sys.argv[1:]] or pages()
    for each in chosen:
        functools.partial(print, flush=True)(each.relative_to(ROOT))
        rewrite(each)
    table = DOCS / "train.md"
    for name, default in setting_defaults():
        row = re.compile(rf"^\| `{name}` \| `.*?` \|", re.MULTILINE)
        table.write_text(
            row.sub(lambda _, n=name, d=default: f"| `{n}` | `{d!r}` |", table.read_text())
        )
