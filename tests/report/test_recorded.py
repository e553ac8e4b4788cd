"""What the report takes from a recording, and several runs on one page."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("plotly")

from fiberpo import recipes  # noqa: E402
from fiberpo.errors import DataError  # noqa: E402
from fiberpo.recording import open_recording  # noqa: E402
from fiberpo.report import recorded as module  # noqa: E402
from fiberpo.report.page import render_html, write_report  # noqa: E402
from fiberpo.report.recorded import read_recorded, spread  # noqa: E402
from fiberpo.report.sources import read_sources  # noqa: E402
from report.samples import (  # noqa: E402
    GATED,
    HOSTILE,
    batch_of,
    checked,
    data_of,
    make_run,
    make_summary,
    record,
)  # fmt: skip


def response(trajectory: dict[str, Any], form: dict[str, Any]) -> list[float]:
    """Def. 6.4 with loops, from what the page holds of a trajectory."""
    contexts, own = trajectory["contexts"], []
    for c in contexts:
        above = {"p": 0.0, "m": 0.0} if c["up"] < 0 else contexts[c["up"]]
        k = form["strata"][c["s"]]["rollback"] or c["k"]
        value = 0.0
        for sign, name, budget in ((1, "p", c["c"][0]), (-1, "m", c["c"][1])):
            x = c[name] - above[name]
            if abs(x) <= budget:
                gated = x
            elif abs(x) < (1 + 1 / k) * budget:
                gated = math.copysign((k + 1) * budget, x) - k * x
            else:
                gated = 0.0
            value += sign * gated
        own.append(value + (0.0 if c["up"] < 0 else own[c["up"]]))
    found, leaf, e = [], trajectory["leaf"], form["epsilon"]
    for x in trajectory["l"]:
        u = max(x, 0.0) - contexts[leaf]["p"]
        v = max(-x, 0.0) - contexts[leaf]["m"]
        found.append(own[leaf] + min(max(u, -e), e) - min(max(v, -e), e))
    return found


def test_kept_trajectories_are_those_of_the_recording(tmp_path: Path) -> None:
    """Log ratios, contexts and changes agree with the objective, by an oracle with loops."""
    found = read_recorded(open_recording(record(tmp_path / "recording")))
    objective = recipes.fiberpo_domain(GATED, 0.2)
    assert found.own
    assert len(found.gated) == 4 * module.PER_STEP
    sizes = [row["mean_change"] for row in found.gated]
    assert sizes == sorted(sizes, reverse=True)
    assert len(found.metrics) == 4
    for row in [*found.gated, *found.others]:
        batch, _ = batch_of(row["step"])
        out = objective(batch)
        tokens = batch.row == row["row"]
        expected = (out.log_gated_ratio - batch.log_ratio)[tokens]
        # float32 log-probs and five digits stand between the two
        torch.testing.assert_close(
            torch.tensor(row["change"]).double(), expected, atol=2e-5, rtol=1e-4
        )
        mine = response(row, found.settings)
        torch.testing.assert_close(
            torch.tensor(mine).double(), out.log_gated_ratio[tokens], atol=1e-4, rtol=1e-3
        )
    best = max(
        float((objective(b).log_gated_ratio - b.log_ratio)[b.row == r].abs().mean())
        for b in [batch_of(step)[0] for step in range(1, 5)]
        for r in range(b.rows)
    )
    assert found.gated[0]["mean_change"] == pytest.approx(best, rel=1e-4)


def test_metrics_of_a_recording_are_those_of_the_objective(tmp_path: Path) -> None:
    found = read_recorded(open_recording(record(tmp_path / "recording", steps=2)))
    for line in found.metrics:
        expected = recipes.fiberpo_domain(GATED, 0.2)(batch_of(line["step"])[0]).metrics()
        assert {k: line[k] for k in expected} == pytest.approx(expected, abs=1e-6, nan_ok=True)
        assert line["entropy"] == 1.0
        assert line["reward"] == line["reward/domain=sum"] == 0.5
    assert {row["stratum"] for row in found.strata} == {*GATED, "token"}


def test_stops_have_a_table_and_charts(tmp_path: Path) -> None:
    """Budgets beside the drifts of the contexts, and tokens by the scale that stops them."""
    budgets = {"domain": (0.05, 0.05), "group": (0.06, 0.05), "trajectory": (0.1, 0.1)}
    objective = recipes.fiberstop(budgets, 0.15)
    record(tmp_path / "recording", objective)
    out = read_recorded(open_recording(tmp_path / "recording"))
    assert [row["stratum"] for row in out.strata] == [*budgets, "token"]
    for row, budget in zip(out.strata, [*budgets.values(), (0.15, 0.15)], strict=True):
        assert row["budget"] == list(budget)
        assert row["pass"] + row["zeroed"] == pytest.approx(1)
        assert row["drift_pos"]["max"] > 0
    assert sum(row["zeroed"] for row in out.strata) > 0
    for row in out.gated:
        batch, _ = batch_of(row["step"])
        here = batch.row == row["row"]
        lost = objective(batch).coefficients[here] == 0
        expected = torch.where(lost, -batch.log_ratio[here].double(), 0.0)
        change = torch.tensor(row["change"]).double()
        torch.testing.assert_close(change, expected, atol=2e-5, rtol=0)
    record(tmp_path / "b" / "recording")
    html = write_report(tmp_path, tmp_path / "one.html").read_text()
    checked(html)
    assert "Tokens stopped, by scale" in html
    assert "tokens left out" in html
    both = write_report([tmp_path, tmp_path / "b"], tmp_path / "both.html").read_text()
    assert "Tokens left out" in both


def test_another_form_is_shown_and_said(tmp_path: Path) -> None:
    path = record(tmp_path / "recording", recipes.grpo(0.1), steps=2, scale=0.2)
    found = read_recorded(open_recording(path))
    assert not found.own
    assert [s["name"] for s in found.settings["strata"]] == ["trajectory"]
    assert any("grpo is of another form" in note for note in found.notes)
    row = found.gated[0]
    batch, _ = batch_of(row["step"], scale=0.2)
    gated = recipes.grpo(0.1)(batch).gated
    expected = (gated.log_factor() - gated.log_ratio)[batch.row == row["row"]]
    torch.testing.assert_close(torch.tensor(row["change"]).double(), expected, atol=2e-5, rtol=1e-4)


def test_huge_recordings_are_thinned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert spread(list(range(1000)), 100) == [
        math.ceil((i + 1) * 1000 / 300) - 1 for i in range(300)
    ]
    assert spread([1, 2, 3], 10**12) == [3]
    recording = open_recording(record(tmp_path / "recording", steps=6))
    monkeypatch.setattr(module, "MOST_READ", recording.tokens // 3 + 1)
    monkeypatch.setattr(module, "MOST_TOKENS", 3)
    monkeypatch.setattr(module, "MOST_POINTS", 5)
    found = read_recorded(recording)
    assert [line["step"] for line in found.metrics] == [3, 6]
    assert any("2 of the 6 recorded steps" in note for note in found.notes)
    assert any("longer than 3 tokens" in note for note in found.notes)
    assert max(len(row["l"]) for row in found.gated) == 3
    assert max(row["length"] for row in found.gated) > 3
    assert [len(points) for points in found.points] == [4, 5, 5]


def test_recording_alone_makes_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of another trainer: curves, strata and trajectories come from the recording."""
    monkeypatch.chdir(tmp_path)
    page = write_report(record(tmp_path / "mine" / "recording"))
    assert page == Path("report.html")
    assert not (tmp_path / "mine" / "recording" / "report.html").exists()
    html = page.read_text()
    checked(html)
    assert "<h1>mine</h1>" in html
    assert "built from a recording alone (recorded by test)" in html
    titles = [panel["data"][0].get("name") for panel in data_of(html)["panels"]]
    assert len(titles) > 10
    assert html.count('<tr class="tokens">') == 8


def test_hostile_tokens_are_escaped(tmp_path: Path) -> None:
    html = render_html(read_sources([record(tmp_path / "recording")]))
    page = checked(html)
    assert page.tags["script"] == 5
    assert page.tags["b"] == 0
    assert "<script>alert" not in html
    assert "&lt;/script&gt;" in html
    data = html.partition('id="fiberpo-data">')[2].partition("</script>")[0]
    assert "<" not in data  # "<!--<script " would swallow the rest of the page
    texts = [t for row in data_of(html)["explorer"][0]["trajectories"] for t in row["text"]]
    assert HOSTILE[:60] in texts
    assert "\n" in texts


def test_torn_and_foreign_recordings_are_said(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", ["token"], steps=8)
    recording = record(run / "recording")
    shard = sorted(recording.rglob("*.npz"))[0]
    shard.write_bytes(shard.read_bytes()[:100])
    html = render_html(read_sources([run]))
    assert "is torn" in html
    shutil.rmtree(recording)
    recording.mkdir()
    (recording / "notes.txt").write_text("nothing")
    html = render_html(read_sources([run]))
    assert "The recording of this run could not be used" in html
    assert "built-in example" in html
    foreign = tmp_path / "foreign.bin"
    foreign.write_bytes(b"\x00" * 100)
    with pytest.raises(DataError, match="neither a run .* nor a recording"):
        read_sources([foreign])


def test_several_runs_are_compared(tmp_path: Path) -> None:
    first = make_run(tmp_path / "one", ["group", "token"], make_summary(["group"], name="first"))
    second = make_run(tmp_path / "two", ["token"], make_summary(["token"], name="<b>second"))
    (second / "config.yaml").write_text("steps: 50\nobjective: grpo\nobjective_kwargs: {a: 1}\n")
    (first / "config.yaml").write_text("steps: 40\nobjective: grpo\nobjective_kwargs: {}\nseed: 1")
    out = write_report([first, second], tmp_path / "both.html")
    html = out.read_text()
    page = checked(html)
    outcome, settings, *_ = page.tables
    assert [row[0] for row in outcome] == ["run", "first", "<b>second"]
    assert outcome[1][4:7] == ["0.461", "0.704", "+0.243"]
    # a setting that one of them lacks as a whole is no difference
    assert settings[1:] == [["objective_kwargs.a", "–", "1"], ["steps", "40", "50"]]
    assert not (tmp_path / "both.png").exists()
    panels = data_of(html)["panels"]
    drawn = [{trace["name"] for trace in panel["data"] if trace.get("name")} for panel in panels]
    assert {"first", "&lt;b&gt;second"} in drawn
    assert len(data_of(html)["explorer"]) == 2
    with pytest.raises(DataError, match="given twice"):
        write_report([first, tmp_path / "two" / ".." / "one"])
    with pytest.raises(DataError, match="more than one page can tell apart"):
        write_report([first] * 30)


def test_same_names_are_told_apart(tmp_path: Path) -> None:
    for seed in ("a", "b"):
        (tmp_path / seed).mkdir()
        make_run(tmp_path / seed / "run", ["token"], steps=4)
    sources = read_sources([tmp_path / "a" / "run", tmp_path / "b" / "run"])
    assert [source.label for source in sources] == ["a/run", "b/run"]


def test_only_reports_are_overwritten(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", ["token"], steps=4)
    mine = tmp_path / "mine.html"
    mine.write_text("<p>my own page</p>")
    with pytest.raises(DataError, match="not a report of this program"):
        write_report(run, mine)
    with pytest.raises(DataError, match="is a directory"):
        write_report(run, tmp_path)
    with pytest.raises(DataError, match=r"does not end in \.html"):
        write_report(run, tmp_path / "report.txt")
    assert mine.read_text() == "<p>my own page</p>"
    out = tmp_path / "deep" / "report.html"
    assert write_report(run, out) == write_report(run, out)


def test_large_metrics_are_thinned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fiberpo.report import reader

    run = make_run(tmp_path / "run", ["token"], steps=40)
    size = (run / "metrics.jsonl").stat().st_size
    monkeypatch.setattr(reader, "LARGE", size // 3)
    lines, notes = reader.read_metrics(run / "metrics.jsonl")
    assert 10 <= sum(line["kind"] == "train" for line in lines) <= 14
    assert sum(line["kind"] == "eval" for line in lines) == 5
    assert "one in 4" in notes[0]


def test_figures_are_what_plotly_knows(tmp_path: Path) -> None:
    """Every panel passes plotly's own validation; colours are checked as the page paints them."""
    import plotly.graph_objects as go

    runs = [make_run(tmp_path / name, steps=8) for name in ("one", "two")]
    for chosen in (runs[:1], runs):
        for figure in data_of(render_html(read_sources(chosen)))["panels"]:
            painted = re.sub(r'"var\(--\w+\)( [\d.]+)?"', '"#123456"', json.dumps(figure))
            go.Figure(json.loads(painted))


def test_progress_of_reading(tmp_path: Path) -> None:
    """After every step, up to the tokens that were to be read; of each recording for itself."""
    paths = [make_run(tmp_path / name, ["token"], steps=4) for name in ("a", "b")]
    for path in paths:
        record(path / "recording", steps=3)
    seen: list[tuple[int, int]] = []
    read_sources(paths, lambda done, total: seen.append((done, total)))
    total = open_recording(paths[0]).tokens
    assert [at for _, at in seen] == [total] * 6
    done = [at for at, _ in seen]
    assert 0 < done[0] < done[1] < done[2] == total
    assert done[3:] == done[:3]
