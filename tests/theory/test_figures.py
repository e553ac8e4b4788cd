"""Figures of the paper: the printed crossings, every array against loops, the files themselves."""

import math
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

import fiberpo
from core import oracle
from fiberpo import Regime, recipes
from fiberpo.cli import app, main
from fiberpo.errors import BudgetError, ConfigError, DataError, ObjectiveError, ShapeError
from fiberpo.theory import drawing, figures
from fiberpo.theory.comparison import (
    MOST,
    compare,
    default_objectives,
    parse_objective,
    positions,
    responses_of,
)
from fiberpo.theory.fibration import BUDGETS, draw_fibration, fibration, sample_batch
from fiberpo.theory.responses import (
    GLOBAL_REGIMES,
    LOCAL_REGIMES,
    base_map,
    crossings,
    one_token,
    response,
    straight,
    together,
)

DEVIATIONS = [0.030, 0.075, -0.012, -0.104, -0.039, -0.118, 0.039, 0.231, -0.044, -0.063]


def close(expected, tolerance=1e-12):
    return pytest.approx(np.asarray(expected), abs=tolerance)


# ------------------------------------------------------------------------ Figure 4's crossings


def line(t):
    """Log ratios at ``t``, in plain Python."""
    return [math.log(1 + t * d) for d in DEVIATIONS]


@pytest.fixture(scope="module")
def crossed():
    """Found once."""
    return figures.figure4_crossings()


@pytest.mark.parametrize(
    ("name", "printed"), [("C-", [-1.19, 1.24]), ("C+", [-3.61, 4.11]), ("epsilon", [-0.20, 0.21])]
)
def test_crossings_of_figure_4(crossed, name, printed):
    """To the printed digits. (The paper prints the clip's crossing for positive ``t`` only.)"""
    assert crossed[name].round(2).tolist() == printed


@pytest.mark.parametrize(("name", "channel", "budget"), [("C+", 0, 0.12), ("C-", 1, 0.05)])
def test_a_crossing_is_where_the_drift_meets_its_budget(crossed, name, channel, budget):
    for t in crossed[name]:
        assert oracle.aggregates_eq9(line(t))[channel] == pytest.approx(budget, abs=1e-12)


def test_the_first_clip_is_where_a_residual_meets_epsilon(crossed):
    """And no token is further out than epsilon between the two."""
    low, high = crossed["epsilon"]

    def largest(t):
        return max(abs(u) for u, _ in oracle.residuals_eqs14_15(line(t)))

    assert largest(low) == pytest.approx(0.04, abs=1e-12)
    assert largest(high) == pytest.approx(0.04, abs=1e-12)
    assert max(largest(t) for t in np.linspace(low + 1e-6, high - 1e-6, 101)) < 0.04


def test_log_ratios_on_a_straight_line_do_not_give_the_printed_crossings():
    """``l_i = t d_i``, the other simple reading, misses by more than 0.05."""

    def acts(t):
        return response(figures.TEN_TOKENS, np.outer(t, DEVIATIONS)).regimes["trajectory"][1] > 0

    found = crossings(acts, -4, 4)
    assert found.tolist() == close([-0.05 / 0.0375, 0.05 / 0.038])
    assert np.abs(np.abs(found) - [1.19, 1.24]).min() > 0.05


def test_figure_4_has_the_papers_parameters():
    assert list(figures.DEVIATIONS) == DEVIATIONS
    assert abs(sum(DEVIATIONS)) < 10 * 0.0005 + 1e-12  # 0 but for the rounding
    assert figures.TEN_TOKENS.parameters["budget"] == (0.12, 0.05)
    assert figures.TEN_TOKENS.parameters["epsilon"] == 0.04
    assert figures.TEN_TOKENS.parameters["rollback"] == 32


# ----------------------------------------------------------------------- arrays against loops


def same_as_loops(found, budget, epsilon, k=None):
    """Every array of a FiberPO response, position by position."""
    for p, row in enumerate(found.log_ratio.tolist()):
        gated = oracle.fiberpo_def51_eqs6_16(row, budget, epsilon, k)
        factor = [found.advantage] * len(row)
        assert found.log_gated_ratio[p] == close(gated)
        assert found.log_base[p] == close(oracle.log_base_eq8(row, budget, k))
        assert found.gradient[p] == close(
            oracle.fiberpo_gradient(row, budget, epsilon, factor, k), 1e-9
        )
        assert found.drift["trajectory"][:, p] == close(oracle.aggregates_eq9(row))
        assert GLOBAL_REGIMES[found.global_regime[p]] == oracle.global_regime(row, budget, k)
        assert LOCAL_REGIMES[found.local_regime[p]] == oracle.local_regime(row, epsilon)
        beyond = [abs(u) > epsilon for u, _ in oracle.residuals_eqs14_15(row)]
        assert found.clipped[p].tolist() == beyond


def test_curve_of_figure_2a():
    x, value = figures.gate_curve(points=201)
    assert len(x) == 205
    assert value == close([oracle.aggregate_gate_eq10(v, 0.15, 3) for v in x])


def test_plane_of_figure_2b():
    """Values and regimes of every field, on points off the borders."""
    plus, minus = np.linspace(0.003, 0.39, 14), np.linspace(0.002, 0.19, 13)
    plane = base_map(figures.BASE, plus, minus)
    assert plane.gated
    for row, b in enumerate(minus):
        for column, a in enumerate(plus):
            log_ratios = [2 * a, -2 * b]
            base = oracle.aggregate_gate_eq10(a, 0.20, 2) - oracle.aggregate_gate_eq10(b, 0.10, 2)
            assert plane.log_base[row, column] == close(base)
            regime = GLOBAL_REGIMES[plane.global_regime[row, column]]
            assert regime == oracle.global_regime(log_ratios, (0.20, 0.10), 2)
    assert set(np.unique(plane.global_regime)) == set(range(len(GLOBAL_REGIMES)))


def test_path_of_figure_3():
    at = np.linspace(-0.5, 0.8, 87)
    found = response(figures.THREE_TOKENS, one_token(at, figures.OTHERS))
    assert found.log_ratio[:, 1:].tolist() == [[0.05, -0.06]] * 87
    same_as_loops(found, (0.15, 0.09), 0.025)
    assert {Regime(int(r)) for r in found.regimes["trajectory"].ravel()} == set(Regime)


def test_path_of_figure_4():
    at = np.linspace(*figures.LINE, 61)
    found = figures.along_line(at)
    assert found.log_ratio.tolist() == [close(line(t)) for t in at]
    same_as_loops(found, (0.12, 0.05), 0.04, 32)


log_ratios = st.lists(st.floats(-0.6, 0.6), min_size=1, max_size=6)


@given(log_ratios, st.sampled_from([1.0, -1.0, 2.5]), st.sampled_from([None, 1, 32]))
def test_any_path_of_fiberpo(row, advantage, k):
    objective = recipes.fiberpo((0.12, 0.05), 0.04, rollback="tokens" if k is None else k)
    same_as_loops(response(objective, [row], advantage=advantage), (0.12, 0.05), 0.04, k)


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_pessimistic_factor(advantage):
    path = one_token(np.linspace(-0.7, 0.7, 43), [0.02, 0.0, -0.03])
    found = response(recipes.fiberpo(pessimistic=True), path, advantage=advantage)
    for p, row in enumerate(path.tolist()):
        gated = [math.exp(g) for g in oracle.fiberpo_def51_eqs6_16(row, (0.12, 0.05), 0.04)]
        expected = oracle.pessimistic(gated, row, [advantage] * 4)
        assert np.exp(found.log_factor[p]) == close(expected)


def factors(name, row, sign):
    """Gated ratios of one trajectory by the loops."""
    if name == "grpo":
        return oracle.ppo_app_c4(row, [sign] * len(row), 0.2, 0.2)
    if name == "gspo":
        return oracle.gspo_app_c4([row], [[sign] * len(row)], 3e-4, 4e-4)[0]
    gated = [math.exp(g) for g in oracle.fiberpo_def51_eqs6_16(row, (0.12, 0.05), 0.04)]
    return oracle.pessimistic(gated, row, [sign] * len(row)) if name == "pessimistic" else gated


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("index", range(4))
def test_responses_side_by_side(index, sign, alone):
    """Gated ratio and, off the kinks, gradient by central differences along the path."""
    name = ("grpo", "gspo", "fiberpo", "pessimistic")[index]
    objective = default_objectives()[index]
    found = responses_of(objective, alone=alone)[sign]
    at = positions()

    def row_at(x):
        return [x, 0.0, 0.0, 0.0] if alone else [x] * 4

    def value(x):
        return sign * sum(factors(name, row_at(x), sign))

    checked = 0
    for p in range(0, len(at), 25):
        assert np.exp(found.log_factor[p]) == close(factors(name, row_at(at[p]), sign), 1e-11)
        h = 1e-7
        left, right = value(at[p]) - value(at[p] - h), value(at[p] + h) - value(at[p])
        if abs(left - right) < 1e-9:  # not a kink
            moved = found.gradient[p, :1] if alone else found.gradient[p]
            assert moved.sum() == close((left + right) / (2 * h), 1e-5)
            checked += 1
    assert checked > 40


def test_pessimistic_form_can_amplify_when_one_token_moves():
    """Adverse cell (A = 1, token falls), in the rollback zone: the gradient pushes it further down.

    The other tokens keep their gated ratios below 1 there, so the min does not take their ratios.
    """
    row, h = [-0.205, 0.0, 0.0, 0.0], 1e-7

    def value(x):
        return sum(factors("pessimistic", [x, *row[1:]], 1.0))

    slope = (value(row[0] + h) - value(row[0] - h)) / (2 * h)
    found = response(recipes.fiberpo(pessimistic=True), [row])
    assert slope < -2
    assert found.gradient[0, 0] == pytest.approx(slope, abs=1e-5)


def test_map_of_gspo_is_its_clipped_mean():
    """One channel: the base is a function of ``S+ - S-``; no second channel can be zeroed."""
    plus, minus = np.linspace(0, 0.1, 6), np.linspace(0, 0.1, 5)
    plane = base_map(recipes.gspo(0.02), plus, minus, tokens=4)
    for row, b in enumerate(minus):
        for column, a in enumerate(plus):
            (gated,) = oracle.gspo_app_c4([[4 * a, -4 * b, 0.0, 0.0]], [[1.0] * 4], 0.02, 0.02)
            assert np.exp(plane.log_base[row, column]) == close(gated[0])
    assert plane.regimes.shape == (1, 5, 6)


def test_map_without_a_base_gate():
    plane = base_map(recipes.grpo(), [0.1, 0.2], [0.1])
    assert not plane.gated
    assert plane.log_base.tolist() == [[0.0, 0.0]]
    assert plane.global_regime.tolist() == [[0, 0]]


def test_a_trajectory_alone_in_a_hierarchy():
    """The domain carries the drift; group, trajectory and turn have no residual."""
    budgets = dict.fromkeys(("domain", "group", "trajectory", "turn"), (0.12, 0.05))
    path = together(np.linspace(-0.4, 0.4, 9), [0.1, 0.0, -0.2])
    found = response(recipes.fiberpo_domain(budgets, 0.04, weights="group_mean"), path)
    for p, row in enumerate(path.tolist()):
        assert found.log_gated_ratio[p] == close(
            oracle.fiberpo_def51_eqs6_16(row, (0.12, 0.05), 0.04)
        )
        assert found.gradient[p] == close(
            oracle.fiberpo_gradient(row, (0.12, 0.05), 0.04, [1.0] * 3), 1e-9
        )
    assert not found.regimes["group"].any()
    assert found.regimes["domain"].any()
    assert (found.base_regime == found.regimes["domain"]).all()
    assert {*found.regimes} == {"domain", "group", "trajectory", "turn", "token"}


def test_a_component_removed_by_construction_is_not_a_clip():
    found = response(recipes.gspo(0.02), [[0.3, -0.1]])
    assert (found.regimes["token"] == Regime.ZERO).all()
    assert not found.clipped.any()
    assert found.local_regime.tolist() == [0]


def test_masks_see_the_old_policy_as_the_rollout():
    masked = recipes.grpo(mask=fiberpo.MaxDivergence(0.02))
    found = response(masked, [[0.1, 0.0], [0.3, 0.0]])
    assert found.gradient.tolist() == close([[math.exp(0.1), 1.0], [0.0, 0.0]])


@given(st.lists(st.floats(-2.9, 2.9), min_size=1, max_size=4, unique=True).map(sorted))
def test_crossings_finds_every_change(places):
    places = [p for i, p in enumerate(places) if i == 0 or p - places[i - 1] > 0.01]
    found = crossings(lambda t: np.searchsorted(places, t, side="right") % 2 == 1, -3, 3)
    assert found.tolist() == close(places, 1e-12)


def test_no_crossing_is_an_empty_answer():
    assert len(crossings(lambda t: t > 5, -1, 1)) == 0


# ----------------------------------------------------------------------------------- Figure 1


def test_fibration_of_the_sample():
    """Residual drifts, regimes and fibers against loops over the recorded batch."""
    batch = sample_batch()
    found = fibration(batch, recipes.fiberpo_domain(BUDGETS, epsilon=0.2))
    domains = [batch.labels["domain"].value(c) for c in batch.labels["domain"].codes.tolist()]
    groups = [batch.labels["group"].value(c) for c in batch.labels["group"].codes.tolist()]
    flat, lengths = batch.log_ratio.tolist(), batch.lengths.tolist()
    rows = [flat[sum(lengths[:t]) : sum(lengths[: t + 1])] for t in range(len(lengths))]
    members = {("domain", d): [t for t, x in enumerate(domains) if x == d] for d in domains}
    members |= {("group", g): [t for t, x in enumerate(groups) if x == g] for g in groups}
    members |= {("trajectory", str(t)): [t] for t in range(16)}
    assert found.levels == ("domain", "group", "trajectory")
    assert {(n.stratum, n.name) for n in found.nodes} == set(members)

    def drift(key, channel):
        return np.mean([oracle.aggregates_eq9(rows[t])[channel] for t in members[key]])

    places = found.columns.tolist()
    seen = set()
    for node in found.nodes:
        key, above = (node.stratum, node.name), None
        if node.parent is not None:
            parent = found.nodes[node.parent]
            above = (parent.stratum, parent.name)
            assert set(members[key]) <= set(members[above])
            assert parent.level == node.level - 1
        assert node.tokens == sum(lengths[t] for t in members[key])
        below = sorted(places.index(t) for t in members[key])
        assert below == list(range(below[0], below[0] + len(below)))  # side by side
        assert node.x == np.mean(below)
        for channel in (0, 1):
            x = drift(key, channel) - (drift(above, channel) if above else 0.0)
            slope = oracle.aggregate_gate_slope_eq10(x, BUDGETS[node.stratum][channel], node.tokens)
            assert node.residual[channel] == pytest.approx(x, abs=1e-12)
            expected = Regime.PASS if slope == 1 else Regime.ROLLBACK if slope else Regime.ZERO
            assert node.regimes[channel] == expected
            seen.add(node.regimes[channel])
    assert seen == set(Regime)
    for column, t in enumerate(found.columns):
        fiber = found.log_ratio[:, column]
        assert fiber[~np.isnan(fiber)].tolist() == rows[t]
        beyond = [abs(u) > 0.2 for u, _ in oracle.residuals_eqs14_15(rows[t])]
        assert found.clipped[: lengths[t], column].tolist() == beyond
        hangs_on = found.nodes[found.above[column]]
        assert (hangs_on.stratum, hangs_on.name) == ("trajectory", str(t))


def test_the_sample_is_a_real_update():
    """Every group has answers of one prompt; advantages of a group add up to 0; ratios moved."""
    batch = sample_batch()
    first = torch.cumsum(batch.lengths, 0) - batch.lengths
    for code in range(4):
        rows = (batch.labels["group"].codes == code).nonzero().flatten()
        assert len(rows) == 4
        assert batch.advantages[first[rows]].sum().abs() < 1e-3
    assert batch.log_ratio.abs().max() > 0.1
    assert batch.log_probs.max() <= 0


def tree_batch():
    """Six trajectories, two of them without a domain, with turns."""
    lengths = [4, 3, 5, 2, 4, 3]
    tokens = sum(lengths)
    generator = torch.Generator().manual_seed(0)
    values = 0.1 * torch.randn(tokens, generator=generator)
    return fiberpo.RatioBatch.from_packed(
        values, torch.zeros(tokens), torch.ones(6), lengths,
        labels={
            "domain": ["math", "math", "math", "math", None, None],
            "group": [0, 0, 1, 1, 2, 2],
            "turn": [int(i > 0) for n in lengths for i in range(n)],
        },
    )  # fmt: skip


def test_branches_of_different_depth():
    """A group without a domain is a root; turns are gated but not drawn."""
    budgets = dict.fromkeys(("domain", "group", "turn"), (0.05, 0.05))
    found = fibration(tree_batch(), recipes.fiberpo_domain(budgets))
    assert found.levels == ("domain", "group")
    assert {n.name: n.parent for n in found.nodes} == {"math": None, "0": 0, "1": 0, "2": None}
    names = [found.nodes[c].name for c in found.above]
    assert sorted(names) == ["0", "0", "1", "1", "2", "2"]
    assert found.log_ratio.shape == (5, 6)


@pytest.mark.parametrize("name", ["grpo", "gspo", "fiberpo_domain"])
def test_fibration_of_any_objective_is_drawn(name, tmp_path, coarse):
    """No context, one channel, and a tree with a label that is not mathematics."""
    batch, objective = tree_batch(), parse_objective(name)
    if name == "fiberpo_domain":
        labels = {"domain": ["$x_{$ \n" + "long" * 20] * 3 + ["b"] * 3, "group": [0, 0, 1, 2, 2, 3]}
        batch = fiberpo.RatioBatch.from_packed(
            batch.log_probs, batch.old_log_probs, batch.advantages, batch.lengths, labels=labels
        )
    found = fibration(batch, objective)
    assert {n.stratum for n in found.nodes} == set(objective.gate_map.gates)
    if name == "gspo":
        assert not found.clipped.any()  # a component removed by construction is not a clip
    (path,) = drawing.save(draw_fibration(batch, objective), tmp_path, name, ["png"])
    is_picture(path)


# -------------------------------------------------------------------------------------- files


@pytest.fixture
def coarse(monkeypatch):
    """PNG files with few dots, for speed."""
    monkeypatch.setattr(drawing, "RESOLUTION", 50)


def is_picture(path, least_ink=0.02):
    """Many colours, and not all white."""
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    ink = (pixels.sum(axis=2) < 3 * 245).mean()
    assert least_ink < ink < 0.9
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 30
    quarters = [q for half in np.array_split(pixels, 2) for q in np.array_split(half, 2, axis=1)]
    assert all(q.std() > 5 for q in quarters)
    return pixels.shape


DRAWN = {
    "figure1": draw_fibration,
    "figure2": figures.figure2,
    "figure3": figures.figure3,
    "figure4": figures.figure4,
}


@pytest.mark.parametrize("name", DRAWN)
def test_figures_of_the_paper_are_drawn(name, tmp_path, coarse):
    """A picture of the right size, and an SVG of vectors alone."""
    figure = DRAWN[name]()
    png, svg = drawing.save(figure, tmp_path, name, ["png", "svg"])
    width, height = figure.get_size_inches()
    assert is_picture(png)[:2] == pytest.approx((50 * height, 50 * width), abs=1)
    assert width in (drawing.COLUMN, drawing.PAGE)
    root = ElementTree.parse(svg).getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert len(root.findall(".//{http://www.w3.org/2000/svg}path")) > 50
    assert not root.findall(".//{http://www.w3.org/2000/svg}image")  # vectors throughout
    assert root.get("width") == f"{72 * width:g}pt"


@pytest.mark.parametrize("name", ["figure1", "figure3"])
def test_drawn_again_a_figure_has_the_same_bytes(name, tmp_path, coarse):
    """Whatever formats were written before."""
    first = drawing.save(DRAWN[name](), tmp_path / "a", name, ["png", "svg"])
    again = drawing.save(DRAWN[name](), tmp_path / "b", name, ["svg", "png"])
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in reversed(again)]


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_every_recipe_can_be_drawn(name, tmp_path, coarse):
    figure = compare([parse_objective(name)])
    assert figure.axes[0].get_title(loc="left") == name
    (path,) = drawing.save(figure, tmp_path, name, ["png"])
    is_picture(path)


def test_columns_stand_side_by_side(tmp_path, coarse):
    figure = compare()
    titles = [ax.get_title(loc="left") for ax in figure.axes]
    assert [t for t in titles if t] == ["grpo", "gspo", "fiberpo", "fiberpo, pessimistic"]
    (path,) = drawing.save(figure, tmp_path, "objectives", ["png"])
    is_picture(path)


def test_pdf(tmp_path, coarse):
    (path,) = drawing.save(figures.figure3(), tmp_path / "deep" / "folder", "f", ["pdf"])
    assert path.read_bytes().startswith(b"%PDF")


def test_global_settings_are_left_alone():
    with matplotlib.rc_context({"font.size": 3.0}):
        figures.figure3()
        assert matplotlib.rcParams["font.size"] == 3.0


def test_pictures_of_the_documentation_are_small():
    folder = Path(__file__).resolve().parents[2] / "docs" / "images"
    for name in (*DRAWN, "objectives"):
        assert 10_000 < (folder / f"{name}.png").stat().st_size < 200_000


# -------------------------------------------------------------------------------- command line


@pytest.mark.slow
def test_command_writes_all_figures(tmp_path):
    """Every file that it names is there, at full resolution."""
    result = CliRunner().invoke(
        app, ["figures", "--out", str(tmp_path / "f"), "--objective", "gspo(epsilon=0.02)"]
    )
    assert result.exit_code == 0, result.output
    written = [Path(text) for text in result.output.split()]
    names = {"objectives", *DRAWN}
    assert {p.name for p in written} == {f"{n}.{s}" for n in names for s in ("png", "svg")}
    for path in written:
        if path.suffix == ".png":
            assert is_picture(path)[1] >= 900
        else:
            ElementTree.parse(path)


LISTED = ", ".join(recipes.RECIPES)


def test_help_has_an_example():
    result = CliRunner().invoke(app, ["figures", "--help"])
    assert result.exit_code == 0
    assert "Example: fiberpo figures" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--objective", "nosuch"], f"unknown objective 'nosuch'; there are {LISTED}"),
        (["--objective", "grpo(epsilon=)"], "cannot read the objective 'grpo(epsilon=)'"),
        (["--objective", "grpo(0.1)"], "cannot read the objective"),
        (["--objective", "grpo(epsilon=open)"], "cannot read the objective"),
        (["--objective", "grpo(espilon=0.1)"], "grpo has no parameter 'espilon'"),
        (["--format", "gif"], "format 'gif' is not drawn here; there are png, svg, pdf"),
        (["--objective", "grpo"] * 7, f"7 objectives; 1 to {MOST} fit side by side"),
    ],
)  # fmt: skip
def test_mistakes_on_the_command_line(arguments, message, monkeypatch, capsys, tmp_path):
    """One line on stderr, exit code 2, nothing written."""
    monkeypatch.setattr(
        sys, "argv", ["fiberpo", "figures", "--out", str(tmp_path / "f"), *arguments]
    )
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert len(shown.err.splitlines()) == 1
    assert shown.out == ""
    assert not (tmp_path / "f").exists()


def test_parameters_reach_the_recipe():
    objective = parse_objective(" fiberpo(budget=(0.2, 0.1), pessimistic=True) ")
    assert objective.gate_map.pessimistic
    assert objective.parameters["budget"] == (0.2, 0.1)
    assert parse_objective("dr_grpo(length=9)").parameters["length"] == 9


# ------------------------------------------------------------------------------------ refusals


def test_refusals(tmp_path):
    with pytest.raises(ShapeError, match=r"log_ratio has shape \(3,\); a path is"):
        response(recipes.grpo(), [0.1, 0.2, 0.3])
    with pytest.raises(ShapeError, match=r"shape \(0, 2\)"):
        response(recipes.grpo(), np.zeros((0, 2)))
    with pytest.raises(fiberpo.NonFiniteError, match="nan"):
        response(recipes.grpo(), [[math.nan]])
    with pytest.raises(BudgetError, match='no budget for the trajectory "0"'):
        response(recipes.fiberpo({"5": (0.1, 0.1)}), [[0.1]])
    with pytest.raises(DataError, match=r"t = 9 gives token 1 the ratio -0.8; .* for t < 5.000"):
        straight([0.0, 9.0], [0.1, -0.2])
    with pytest.raises(DataError, match=r"is positive for t > -4.329"):
        straight([-4.33], DEVIATIONS)
    with pytest.raises(ShapeError, match="tokens is 1; S\\+ and S- need a token each"):
        base_map(recipes.grpo(), [0.1], [0.1], tokens=1)
    with pytest.raises(DataError, match=r"negative holds -0.1"):
        base_map(recipes.grpo(), [0.1], [0.2, -0.1])
    with pytest.raises(ObjectiveError, match="0 objectives"):
        compare([])
    many = fiberpo.RatioBatch.from_packed(
        torch.zeros(65), torch.zeros(65), torch.ones(65), [1] * 65
    )
    with pytest.raises(ShapeError, match="65 trajectories do not fit on a page; draw at most 64"):
        draw_fibration(many, recipes.grpo())
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write figures to"):
        drawing.save(figures.figure3(), tmp_path / "file", "f", ["png"])
    with pytest.raises(ConfigError, match="no format is given"):
        drawing.save(figures.figure3(), tmp_path, "f", [])
