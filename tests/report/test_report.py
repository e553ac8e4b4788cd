"""The report of a run directory: one self-contained page, an overview image, terminal tables."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

matplotlib = pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")
np = pytest.importorskip("numpy")

from PIL import Image  # noqa: E402

from fiberpo.errors import DataError, FiberPOError  # noqa: E402
from fiberpo.report.page import render_html, write_report  # noqa: E402
from fiberpo.report.reader import read_metrics, read_run  # noqa: E402
from fiberpo.report.series import RunSeries  # noqa: E402
from fiberpo.report.sources import read_sources  # noqa: E402
from fiberpo.report.tables import (  # noqa: E402
    format_difference,
    format_drift,
    format_percent,
    format_reward,
    format_seconds,
)
from fiberpo.report.terminal import print_summary, summary_text  # noqa: E402
from report.samples import (  # noqa: E402
    BUDGETS,
    DOMAINS,
    Page,
    checked,
    make_run,
    make_summary,
    panel_count,
    stratum_row,
    train_line,
)  # fmt: skip


def report(run_dir: Path) -> tuple[str, Page]:
    settings = dict(matplotlib.rcParams)
    path = write_report(run_dir)
    assert path == run_dir / "report.html"
    assert dict(matplotlib.rcParams) == settings
    assert not list(run_dir.glob("*.partial"))
    with Image.open(run_dir / "report.png") as image:
        assert image.size > (800, 400)
        assert np.asarray(image.convert("L")).var() > 10
    html = path.read_text(encoding="utf-8")
    return html, checked(html)


def page_only(run_dir: Path) -> tuple[str, Page]:
    """As `report`, without drawing the overview image."""
    html = render_html(read_sources([run_dir]))
    return html, checked(html)


def test_full_run(tmp_path: Path) -> None:
    html, page = report(make_run(tmp_path / "run"))
    rewards, strata, _explorer = page.tables
    assert rewards == [
        ["domain", "before", "after", "difference"],
        ["sum", "0.301", "0.812", "+0.511"],
        ["sort", "0.620", "0.597", "−0.023"],  # noqa: RUF001
        ["mean", "0.461", "0.704", "+0.243"],
    ]
    cells = [cell for row in strata for cell in row]
    for stratum, budgets in BUDGETS.items():
        assert stratum in cells
        for budget in budgets:
            assert format_drift(budget) in cells
            assert format_drift(budget * 1.5) + "▲" in cells
            assert format_drift(budget * 2) + "▲" in cells
    for value in ("0.00311", "0.0122", "0.00233", "0.0111", "84.3 %", "0 %", "15.7 %"):
        assert cells.count(value) == len(BUDGETS)
    # reward, 4 regimes, 4 drifts, gate, ratio, KL, effective sample size, entropy, length
    assert panel_count(page) == 15
    labels = [a.get("aria-label") or "" for _, a in page.attributes if a.get("role") == "img"]
    charts = [label for label in labels if label != "above budget"]
    assert len(charts) == 15 + 3  # those of the explorer
    assert all(len(label) > 30 for label in charts)
    assert "fiberpo_domain(budgets=...)" in html
    assert "2 min 51 s" in html
    assert "Held-out prompts: 64 per domain." in html
    assert "torch 2.9.0" in html
    assert "objective: fiberpo_domain" in html
    assert html.count("✓") == 1
    assert html.count("incorrect</span>") == 1
    assert html.count("partly correct</span>") == 1
    assert "prefers-color-scheme: dark" in html
    assert "http://" not in html
    assert "https://" not in html


def test_token_only_run(tmp_path: Path) -> None:
    summary = make_summary(["token"], objective="grpo(epsilon=0.2)")
    summary["strata"][0]["budget"] = None
    html, page = page_only(make_run(tmp_path / "run", ["token"], summary))
    assert "grpo(epsilon=0.2)" in html
    assert panel_count(page) == 9
    assert [row[0] for row in page.tables[1][2:] if len(row) > 8] == ["token"]
    assert "above budget" not in html


def test_budget_per_context_draws_each_context(tmp_path: Path) -> None:
    summary = make_summary(["domain"])
    rows = [stratum_row("domain", name) for name in DOMAINS]
    rows[1]["budget"] = [0.05, 0.033]
    summary["strata"] = rows
    run_dir = make_run(tmp_path / "run", ["domain"], summary)
    lines, _ = read_metrics(run_dir / "metrics.jsonl")
    for line in lines:
        for channel in ("pos", "neg"):
            for name in DOMAINS:
                value = line.get(f"gate/domain/drift_{channel}/p90")
                line[f"gate/domain/drift_{channel}/p90/domain={name}"] = value
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    html, page = page_only(run_dir)
    assert "domain, sum" in html
    assert "domain, sort" in html
    assert "budget +0.05, −0.033" in html  # noqa: RUF001
    assert any("sort" in row for row in page.tables[1])


def test_interrupted_run(tmp_path: Path) -> None:
    strata = ("domain", "token")
    summary = make_summary(strata, interrupted=True, heldout_after=None, seconds=None, samples=[])
    summary["strata"][0] |= {"budget": None, "drift_neg": None, "pass": None}
    summary["strata"][1]["drift_pos"] = {"p50": None, "max": float("nan")}
    run_dir = make_run(tmp_path / "run", strata, summary, steps=23)
    lines, _ = read_metrics(run_dir / "metrics.jsonl")
    for line in lines[5:9]:
        line |= dict.fromkeys([key for key in line if "/" in key])
    lines[10] = {"kind": "train", "step": lines[10]["step"]}
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    html, page = page_only(run_dir)
    assert "interrupted after step 23" in html
    assert page.tables[0][0] == ["domain", "before", "step 20", "difference"]
    assert page.tables[0][-1] == ["mean", "0.461", "0.600", "+0.139"]
    assert "no evaluation of the final policy" in html
    assert "nan" not in " ".join(cell for row in page.tables[1] for cell in row).lower()


def test_torn_last_line_is_skipped_with_a_note(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run", ["token"], steps=8)
    metrics = run_dir / "metrics.jsonl"
    count = len(metrics.read_bytes().splitlines())
    with metrics.open("ab") as file:
        file.write('{"kind": "train", "step": 9, "note": "é'.encode()[:-1])
    run = read_run(run_dir)
    assert [line["step"] for line in run.train] == list(range(1, 9))
    html, _ = page_only(run_dir)
    assert f"Line {count + 1} of metrics.jsonl, the last, is cut short" in html


def test_malformed_line_in_the_middle_is_an_error(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run", ["token"], steps=8)
    metrics = run_dir / "metrics.jsonl"
    lines = metrics.read_text().splitlines()
    for bad in ('{"kind": "train", "st', "[1, 2]"):
        metrics.write_text("\n".join([*lines[:3], bad, *lines[3:]]) + "\n")
        with pytest.raises(DataError, match=r"metrics\.jsonl:4: .*" + re.escape(bad)):
            write_report(run_dir)
    assert not (run_dir / "report.html").exists()


@pytest.mark.parametrize("content", [b"\n", None])
def test_empty_or_missing_metrics(tmp_path: Path, content: bytes | None) -> None:
    run_dir = make_run(tmp_path / "run", ["token"])
    if content is None:
        (run_dir / "metrics.jsonl").unlink()
    else:
        (run_dir / "metrics.jsonl").write_bytes(content)
    html, page = page_only(run_dir)
    assert "so there are no figures" in html
    assert panel_count(page) == 0
    assert len(page.tables) == 3


def test_missing_summary_uses_the_metrics(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "finished-run", ["group"])
    (run_dir / "summary.json").unlink()
    html, page = page_only(run_dir)
    assert "summary.json is missing" in html
    assert "<h1>finished-run</h1>" in html
    assert page.tables[0][-1] == ["mean", "0.400", "0.800", "+0.400"]
    # Mean over the four updates of a rollout: 0, 5, 10 and 15 % zeroed.
    assert any("7.5 %" in row for row in page.tables[1])
    (run_dir / "summary.json").write_text('{"name": "quick')
    run = read_run(run_dir)
    assert run.summary is None
    assert any("summary.json is not complete JSON" in note for note in run.notes)


def test_only_a_configuration(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("steps: 40\n")
    html, page = report(tmp_path)
    assert "not evaluated" in html
    assert len(page.tables) == 1  # the explorer's


def test_single_step_and_extreme_values(tmp_path: Path) -> None:
    page_only(make_run(tmp_path / "one", ["group"], steps=1))
    run_dir = make_run(tmp_path / "diverged", ["domain", "group"], steps=12)
    lines, _ = read_metrics(run_dir / "metrics.jsonl")
    lines[-2] |= {
        "ratio/max": 3e38,
        "ratio/min": 0.0,
        "kl/k3": 3e38,
        "kl/k1": -1e30,
        "entropy": "much",
        "gate/domain/drift_pos/p90": 1e30,
        "gate/group/drift_pos/p90": float("inf"),
        "reward": -12.5,
        "gate/gradient_kept": 1.7,
    }
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    report(run_dir)


def test_hostile_strings_are_escaped(tmp_path: Path) -> None:
    attack = "<script>alert('x')</script>"
    link = '"><img src=x onerror=alert(1)> {{ 7*7 }} $x_$ &amp; \x00\ud800'
    domains = ("<b>sum</b>", "a=b/c $\\frac$")
    summary = make_summary(
        ["token"],
        name=attack,
        objective=link,
        model=attack,
        notes=[attack, link],
        versions={attack: link},
        heldout_before={domains[0]: 0.1, "mean": 0.1},
        heldout_after={domains[0]: 0.2, "mean": 0.2},
    )
    summary["strata"][0]["context"] = link
    summary["samples"] = [
        {"domain": link, "prompt": attack, "before": link, "after": attack, "answer": link}
    ] * 8
    run_dir = make_run(tmp_path / "run", ["token"], summary, domains=domains)
    (run_dir / "config.yaml").write_bytes(b"a: </pre><script>1</script>\xff\n")
    lines, _ = read_metrics(run_dir / "metrics.jsonl")
    lines[1] |= {f"gate/{attack}/pass_frac": 0.9, "gate/\"'><i>/drift_pos/p90": 0.1}
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    html, page = report(run_dir)
    assert "<script>alert" not in html
    assert "<script>1" not in html
    assert "<img" not in html
    assert "&lt;script&gt;" in html
    assert "{{ 7*7 }}" in html
    assert page.tags["b"] == page.tags["i"] == 0
    assert page.tables[0][1][0] == domains[0]
    text = summary_text(summary | {"name": "[bold]run[/bold]", "objective": None, "notes": []})
    assert "[bold]run[/bold]" in text


def test_long_samples_are_cut(tmp_path: Path) -> None:
    summary = make_summary(["token"])
    summary["samples"][0]["after"] = "y" * 50_000
    html, _ = page_only(make_run(tmp_path / "run", ["token"], summary, steps=4))
    assert "(46000 more characters)" in html
    assert "y" * 4001 not in html


def test_unusable_directories(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such run"):
        write_report(tmp_path / "absent")
    with pytest.raises(DataError, match="neither a run .* nor a recording"):
        write_report(tmp_path)
    (tmp_path / "summary.json").write_text("[]")
    with pytest.raises(DataError, match=r"summary\.json: expected a JSON object"):
        write_report(tmp_path)
    (tmp_path / "summary.json").write_text('{"strata": "none"}')
    with pytest.raises(DataError, match="'strata' must be a list of objects"):
        write_report(tmp_path)
    (tmp_path / "summary.json").write_text('{"heldout_before": [1]}')
    with pytest.raises(DataError, match="'heldout_before' must be an object"):
        write_report(tmp_path)


@pytest.mark.parametrize("module", ["matplotlib", "jinja2", "plotly.offline"])
def test_missing_dependency_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    run_dir = make_run(tmp_path / "run", steps=4)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(FiberPOError, match=r"pip install 'fiberpo\[report\]'"):
        write_report(run_dir)


def test_importing_the_report_leaves_optional_packages_alone() -> None:
    code = (
        "import sys, fiberpo.report.page, fiberpo.report.terminal\n"
        "print(sorted({'matplotlib', 'jinja2', 'plotly'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_pages_are_repeatable(tmp_path: Path) -> None:
    sources = read_sources([make_run(tmp_path / "run", ["token"], steps=8)])
    assert render_html(sources) == render_html(sources)


def test_series_take_the_later_line_of_a_resumed_step() -> None:
    lines = [{"step": s, "rollout": (s - 1) // 2, "entropy": float(s)} for s in (1, 2, 3, 4, 3)]
    lines[-1]["entropy"] = 7.0
    series = RunSeries(lines, [])
    steps, values = series.per_rollout("entropy")
    assert steps.tolist() == [1.5, 3.5]
    assert values.tolist() == [1.5, 5.5]
    assert series.per_rollout("entropy", "max")[1].tolist() == [2.0, 7.0]


def test_series_join_a_rollout_cut_short_to_the_one_before() -> None:
    lines = [{"step": s, "rollout": (s - 1) // 2, "entropy": float(s)} for s in range(1, 6)]
    assert RunSeries(lines, []).per_rollout("entropy")[1].tolist() == [1.5, 4.0]


def test_long_runs_are_thinned() -> None:
    lines = [train_line(step, ["token"], DOMAINS) for step in range(1, 4001)]
    series = RunSeries(lines, [])
    steps, values = series.per_rollout("ratio/max", "max")
    assert len(steps) == 200
    assert values.max() == pytest.approx(math.exp(1.5))


def test_regimes_of_a_stratum_sum_to_one() -> None:
    series = RunSeries([train_line(s, ["group", "token"], DOMAINS) for s in range(1, 21)], [])
    for stratum in ("group", "token"):
        _, shares = series.regimes(stratum)
        np.testing.assert_allclose(sum(shares.values()), 1.0)


def test_number_formats() -> None:
    assert format_reward(None) == format_percent(None) == "\N{EN DASH}"
    assert format_difference(-0.5) == "\N{MINUS SIGN}0.500"
    assert format_difference(0.0) == "+0.000"
    assert format_percent(1.0) == "100 %"
    assert format_seconds(59.97) == "1 min 0 s"
    assert format_seconds(7199.0) == "2 h 0 min"
    assert format_drift(0.0) == "0"


def test_terminal_tables() -> None:
    text = summary_text(make_summary(BUDGETS))
    for part in (
        "quickstart",
        "fiberpo_domain(budgets=...)",
        "0.301",
        "0.812",
        "+0.511",
        "\N{MINUS SIGN}0.023",
        "trajectory",
        "0.00311",
        "0.03*",
        "84.3 %",
        "2 min 51 s",
        "Note: Held-out prompts: 64 per domain.",
    ):
        assert part in text
    narrow = summary_text(make_summary(BUDGETS), width=80)
    assert max(len(line) for line in narrow.splitlines()) <= 80
    numbers = re.findall(r"[0-9][0-9.]*[*%]?", text)
    assert re.findall(r"[0-9][0-9.]*[*%]?", narrow) == numbers
    assert "\x1b" not in text


def test_terminal_tables_of_a_partial_summary(capsys: pytest.CaptureFixture[str]) -> None:
    assert "interrupted" in summary_text({"interrupted": True, "heldout_after": None})
    assert "No held-out evaluation" in summary_text({})
    summary = make_summary(["token"], heldout_after=None)
    summary["strata"][0] |= {"budget": None, "drift_pos": None}
    assert "0.301" in summary_text(summary)
    print_summary(summary)
    assert "Gates by stratum" in capsys.readouterr().out
