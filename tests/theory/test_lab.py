"""The laboratory itself: verdicts from evidence, changes that are seen, table, page, command."""

import io
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

import fiberpo
from fiberpo import gating, recipes
from fiberpo.cli import app
from fiberpo.errors import ConfigError
from fiberpo.theory import (
    apc,
    batches,
    divergences,
    gates,
    lab,
    operators,
    page,
    relaxations,
    trajectory,
    tvtrpo,
)  # fmt: skip
from fiberpo.theory.claims import Claim, Finding, Verdict, judge

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "lab.md"


def verdicts(name):
    return [r.finding.verdict for r in lab.run(lab.select(name))]


def test_judge():
    """Error first, then the case beside the conditions."""
    assert judge(1, 0.1, 0.1).verdict is Verdict.HOLDS
    assert judge(1, 0.2, 0.1).verdict is Verdict.FAILS
    assert judge(1, 0.2, 0.1, broken="x").verdict is Verdict.FAILS
    assert judge(1, math.nan, 0.1).verdict is Verdict.FAILS
    assert judge(1, math.inf, 0.1).verdict is Verdict.FAILS
    conditional = judge(3, 0.0, 0.1, broken="b", note="a")
    assert conditional == Finding(Verdict.CONDITIONAL, 3, 0.0, "a; b")


def test_names_are_unique_and_every_claim_has_a_place():
    names = [claim.name for claim in lab.CLAIMS]
    assert len(set(names)) == len(names)
    assert all(c.source and c.statement.endswith(".") for c in lab.CLAIMS)


QUICK = [
    c for c in lab.CLAIMS
    if not {"equivalence", "TV-TRPO", "largest", "radius", "hierarchy", "Jacobian", "identity"}
    & set(c.name.split())
]  # fmt: skip


@pytest.mark.parametrize("claim", QUICK, ids=lambda c: c.name)
def test_recorded_verdict(claim):
    """One by one, so that a change names itself."""
    (result,) = lab.run([claim])
    assert not result.changed, result.change


@pytest.mark.slow
def test_page_is_current_and_no_verdict_has_changed():
    """docs/lab.md is what ``fiberpo lab --markdown docs/lab.md`` writes today."""
    results = lab.run()
    assert [r.change for r in results if r.changed] == []
    assert page.markdown(results, 0) == PAGE.read_text()


@pytest.mark.slow
def test_verdicts_do_not_depend_on_the_seed():
    assert [r.change for r in lab.run(seed=7) if r.changed] == []


def test_same_seed_same_numbers():
    claims = lab.select("GSPO bounds")
    one, two, other = (lab.run(claims, seed=s) for s in (0, 0, 1))
    assert [r.finding for r in one] == [r.finding for r in two]
    assert [r.finding for r in one] != [r.finding for r in other]
    alone = lab.run(lab.select("GSPO bounds TV, one"))
    assert alone[0].finding == one[1].finding


# ------------------------------------------------------------------------------------- faults


def half_is_lost(ratio, *, half=True):
    return np.abs(ratio - 1) * 0.5


def rollback_too_flat(x, budget, k):
    size = np.abs(x)
    rolled = np.sign(x) * k * budget - (k - 1) * x
    outer = np.where(size < (1 + 1 / k) * budget, rolled, 0.0)
    return np.where(size <= budget, x, outer)


def own_copies_forgotten(state, deviation, delta):
    left = state.total * (delta - state.deviation(deviation))
    return apc.clip(deviation, left + state.multiplicity * np.abs(deviation))


def equal_shares(parent, measure):
    count = int(parent.max()) + 1
    kernel = np.zeros((len(parent), count))
    kernel[np.arange(len(parent)), parent] = 1.0
    return kernel


def arithmetic_mean(sample, low, high=None):
    s = sample.trajectory_mean(sample.ratio)
    a = sample.trajectory_mean(sample.advantage)
    return float(relaxations.one_sided(s, a, low, low if high is None else high).mean())


FAULTS = [
    (divergences, "tv_term", half_is_lost, "TV without the 1/2", Verdict.FAILS),
    (gates, "aggregate_gate", rollback_too_flat, "Eq. 10 aggregate gate", Verdict.FAILS),
    (trajectory, "aggregate_gate", rollback_too_flat, "FiberPO, two scales", Verdict.FAILS),
    (apc, "pair_form", own_copies_forgotten, "three forms", Verdict.FAILS),
    (tvtrpo, "largest_radius", lambda gamma: (1 - gamma) / gamma, "Eq. 76", Verdict.FAILS),
    pytest.param(
        tvtrpo, "radius", lambda problem: 0.05, "TV-TRPO maximizer", Verdict.FAILS,
        marks=pytest.mark.slow,
    ),
    (operators, "mass_weighted", equal_shares, "reflecting condition", Verdict.FAILS),
    (relaxations, "gspo", arithmetic_mean, "steps in the library", Verdict.FAILS),
    (
        trajectory, "log_gated_from_gated_aggregate", trajectory.log_gated,
        "gated aggregate", Verdict.HOLDS,
    ),
    (
        recipes, "fiberpo", lambda *a, **k: ORIGINAL(*a, **{**k, "pessimistic": True}),
        "rollback restores", Verdict.HOLDS,
    ),
    (
        gating, "lay_out", lambda *a, **k: LAY_OUT(*a, **{**k, "measure": "token"}),
        "Eqs. 30-32", Verdict.FAILS,
    ),
]  # fmt: skip
ORIGINAL = recipes.fiberpo
LAY_OUT = gating.lay_out


@pytest.mark.parametrize(
    ("place", "name", "fault", "pattern", "found"),
    FAULTS,
    ids=[(getattr(f, "values", f))[1] for f in FAULTS],
)
def test_a_fault_changes_the_verdict(monkeypatch, place, name, fault, pattern, found):
    """A broken equation (here or in the engine) is seen as a changed verdict."""
    claims = [c for c in lab.CLAIMS if pattern in f"{c.source} {c.name}"]
    claim = claims[0]
    assert not lab.run([claim])[0].changed
    monkeypatch.setattr(place, name, fault)
    (result,) = lab.run([claim])
    assert result.changed
    assert result.finding.verdict is found
    assert claim.name in result.change
    assert f'recorded "{claim.recorded.value}"' in result.change


# -------------------------------------------------------------------------------- table and page


def result(verdict=Verdict.FAILS, worst=0.5, detail="|x| = 2 [a]", name="a * b_c"):
    claim = Claim(name, "Paper, Eq. 1", "x < y.", lambda rng: None, Verdict.FAILS)
    return lab.Result(claim, Finding(verdict, 7, worst, detail), 0.1)


def test_markdown_escapes():
    row = page.markdown([result()], 3, [("Part", (result().claim,))])
    assert "## Part" in row
    assert "1 claims: 0 hold, 0 hold under conditions, 1 fail (seed 3)." in row
    line = next(text for text in row.splitlines() if "Eq. 1" in text)
    assert line == (
        r"| **a \* b\_c**: x &lt; y. | Paper, Eq. 1 | 7 | fails | \|x\| = 2 \[a\] |"
    )  # fmt: skip


def test_outcome():
    assert result(Verdict.HOLDS, 1e-15, "").outcome == "worst < 1e-12"
    assert result(Verdict.HOLDS, 2.5, "note").outcome == "worst 2.5; note"
    assert result(Verdict.FAILS).outcome == "|x| = 2 [a]"


def test_terminal_table():
    console = Console(width=100, record=True, file=io.StringIO())
    page.print_table([result(), result(Verdict.HOLDS, 1e-11, "note")], console)
    text = console.export_text()
    assert "|x| = 2 [a]" in text
    assert "< 1e-9" in text
    assert "note" not in text
    assert "2 claims: 1 hold, 0 hold under conditions, 1 fail" in text


def test_json_has_everything():
    text = lab.as_json([result(worst=math.inf), result(worst=None)], 5)
    data = json.loads(text)
    assert data["seed"] == 5
    first = data["claims"][0]
    assert [first[k] for k in ("claim", "worst", "tried")] == ["a * b_c", "inf", 7]
    assert [first[k] for k in ("verdict", "recorded")] == ["fails", "fails"]
    assert data["claims"][1]["worst"] is None


def test_select():
    assert {c.name for c in lab.select("eq. 76")} == {"TRPO's radius"}
    assert lab.select(None) == lab.CLAIMS
    with pytest.raises(ConfigError, match="no claim matches 'nothing of the kind'"):
        lab.select("nothing of the kind")


# -------------------------------------------------------------------------------------- command


def test_command(tmp_path):
    out = tmp_path / "deep" / "lab.json"
    done = CliRunner().invoke(app, ["lab", "--only", "gated aggregate", "--json", str(out)])
    assert done.exit_code == 0, done.output
    assert "1 claims: 0 hold" in done.output
    assert "1/1 residual from the gated aggregate: fails" in done.output
    assert json.loads(out.read_text())["claims"][0]["verdict"] == "fails"


def test_command_says_which_verdict_changed(monkeypatch):
    monkeypatch.setattr(trajectory, "log_gated_from_gated_aggregate", trajectory.log_gated)
    done = CliRunner().invoke(app, ["lab", "--only", "gated aggregate"])
    assert done.exit_code == 1
    assert (
        'verdict changed: "residual from the gated aggregate" (FiberPO, Eqs. 14 and 15): recorded '
        '"fails", found "holds"'
    ) in done.output


def test_command_has_no_page_of_a_part(tmp_path):
    done = CliRunner().invoke(
        app, ["lab", "--only", "GSPO", "--markdown", str(tmp_path / "lab.md")]
    )  # fmt: skip
    assert isinstance(done.exception, ConfigError)
    assert "leave out --only" in str(done.exception)


def test_help_has_an_example():
    done = CliRunner().invoke(app, ["lab", "--help"])
    assert "Example: fiberpo lab --only" in done.output


def test_laboratory_is_not_imported_with_the_package():
    code = "import fiberpo, sys; print('fiberpo.theory' in sys.modules, 'scipy' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["False", "False"]


def test_random_batches_reach_the_engine():
    """Two domains of two groups, one trajectory at least in each."""
    for seed in range(20):
        case = batches.random_case(np.random.default_rng(seed))
        assert set(case.labels["group"].tolist()) == {0, 1, 2, 3}
        assert isinstance(case.batch(), fiberpo.RatioBatch)
        assert np.concatenate(case.split(case.log_ratio)).tolist() == case.log_ratio.tolist()
