"""The page of a study, its tables and files."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest

from fiberpo.errors import DataError
from fiberpo.study import markdown
from fiberpo.study.figures import curves, forest, looks, span_of
from fiberpo.study.measures import cell_measures
from fiberpo.study.page import declared, selected, write_study_report
from fiberpo.study.statistics import compare
from study.grids import DOMAINS, cell, failed, grid, realistic, table

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A study of two settings with one failed cell and cells left out."""
    out = tmp_path_factory.mktemp("study")
    study = grid(("grpo", "gspo", "fiberpo", "fiberpo_domain"), ("hot", "single"), (0, 1, 2))
    rows = realistic(study, evaluations=4)
    single = rows["setting"] == "single"
    rows.loc[single, [f"heldout/reward/domain={name}" for name in DOMAINS[1:]]] = np.nan
    rows = rows[~single | (rows["seed"] < 2)]
    rows = rows[~((rows["setting"] == "hot") & (rows["arm"] == "gspo") & (rows["seed"] == 2))]
    rows = table(rows, failed("hot", "gspo", 2, "<b>& out of memory</script>"))
    left = [f"single/{arm}-seed2" for arm in study.arms]
    selection = {"minutes": 5.0, "arms": None, "settings": None, "seeds": None, "left_out": left}
    (out / "study.json").write_text(json.dumps({"selection": selection}))
    page = write_study_report(out, rows, study)
    return page, rows, study


def test_files(made):
    page, rows, study = made
    assert page.name == "study.html"
    measures = pd.read_parquet(page.parent / "measures.parquet")
    assert len(measures) == 20
    assert (measures["status"] == "failed").sum() == 1
    comparisons = pd.read_parquet(page.parent / "comparisons.parquet")
    assert len(comparisons) == 3 * 4 * 3
    expected = compare(cell_measures(rows), study.pairs)
    np.testing.assert_allclose(
        sorted(comparisons["difference"]), sorted(expected["difference"]), rtol=1e-12
    )


def test_page_says_what_is_missing(made):
    page, _, _ = made
    text = page.read_text()
    assert "4 cells were left out, to fit into 5 minutes: single, seeds 2." in text
    assert "seed 2: failed: &lt;b&gt;&amp; out of memory&lt;/script&gt;" in text
    assert "<b>& out of memory" not in text
    assert "19 of 24" in text
    assert "1 of 3 not finished" in text
    assert "http" not in text.split('id="plotly"')[0].replace("http-equiv", "")
    tables = (page.parent / "study.md").read_text()
    assert "- hot, gspo, seed 2: failed: <b>& out of memory</script>" in tables
    assert "| fiberpo - grpo | hot | final | " in tables


def test_selection(tmp_path):
    assert selected(tmp_path) == []
    chosen = {"minutes": None, "arms": ["grpo"], "settings": None, "seeds": [0, 1], "left_out": []}
    (tmp_path / "study.json").write_text(json.dumps({"selection": chosen}))
    assert selected(tmp_path) == [
        "Only the arms grpo were asked for.", "Only the seeds 0, 1 were asked for."
    ]  # fmt: skip


def test_declared():
    study = grid(settings=("hot", "long"), seeds=(0, 1))
    assert len(declared(study)) == 8
    assert ("long", "gspo", 1) in declared(study)


def test_one_arm_one_seed(tmp_path):
    """The least there can be still gives a page: nothing to compare, no band."""
    study = grid(("grpo",), seeds=(0,))
    text = write_study_report(tmp_path, cell(), study).read_text()
    assert "Paired differences" not in text
    assert "all declared cells are finished" in text
    assert "0.500" in (tmp_path / "study.md").read_text()


def test_other_study(tmp_path):
    with pytest.raises(DataError, match="has the setting 'cold', the study has hot"):
        write_study_report(tmp_path, cell("cold"), grid())
    assert list(tmp_path.iterdir()) == []


def test_curve_is_median_in_band():
    rows = table(
        cell(seed=0, rewards=[0.1, 0.2]), cell(seed=1, rewards=[0.2, 0.9]),
        cell(seed=2, rewards=[0.9, 0.3], tokens=[0, 1100]),
    )  # fmt: skip
    panel = curves(rows, "heldout/reward", "hot", looks(["grpo"]), "reward")
    band, line = panel.figure["data"]
    assert line["y"] == [0.2, 0.3]
    assert line["x"] == [0, 900]
    assert band["y"] == [0.9, 0.9, 0.2, 0.1]
    assert panel.figure["updates"] == [[0, 8, 8, 0], [0, 8]]
    assert curves(rows, "entropy", "hot", looks(["grpo"]), "nats") is None


def test_looks_are_distinct():
    found = looks([f"arm{i}" for i in range(21)])
    assert len(set(found.values())) == 21


def test_forest():
    finals = {"a": [0.5, 0.7, 0.8], "b": [0.1, 0.2, 0.3], "c": [0.5, 0.7, 0.8]}
    rows = table(
        *(cell("hot", a, s, [0.5, v]) for a, found in finals.items() for s, v in enumerate(found))
    )
    found = compare(cell_measures(rows), [("a", "b"), ("b", "a"), ("a", "c")], ["final"])
    panel = forest(found, span_of(found))
    seeds, *marks = panel.figure["data"]
    assert len(seeds["x"]) == 9
    colors = [m["marker"]["color"] for m in marks if m["mode"] == "markers"]
    assert colors == ["var(--green)", "var(--vermillion)", "var(--grey)"]
    assert sum(m["mode"] == "lines" for m in marks) == 2  # no interval where all are equal
    low, high = span_of(found)
    assert low < found["low"].min() < found["high"].max() < high


def test_main_table():
    rows = table(
        *(cell("hot", "grpo", s, [0.5, v, v]) for s, v in enumerate([0.1, 0.6, 0.3])),
        *(cell("hot", "gspo", s, [0.5, v, v]) for s, v in enumerate([0.7, 0.8])),
        failed("hot", "gspo", 2), cell("long", "gspo", 0, [0.5, 0.9]),
    )  # fmt: skip
    study = grid(settings=("hot", "long", "never"))
    assert markdown.main_table(cell_measures(rows), study).splitlines()[2:] == [
        "| grpo | 0.300 (0.100 to 0.600)<br>mean 0.333 [-0.292, 0.958]<br>1 of 3 collapsed | - |",
        "| gspo | 0.750 (0.700 to 0.800)<br>mean 0.750 [0.115, 1.385]<br>1 of 3 not finished "
        "| 0.900 |",
    ]
    assert markdown.collapse_table(cell_measures(rows), study).splitlines()[2] == (
        "| grpo | 1 of 3 [6 %, 79 %] | - | 1 of 3 [6 %, 79 %] |"
    )


def test_marks_are_filled(made):
    _, rows, study = made
    found = markdown.blocks(cell_measures(rows), study)
    text = (
        "a\n<!-- study:small:main -->\nold\n<!-- end -->\nb <!-- study:other:main -->x<!-- end -->"
    )
    filled = markdown.fill_page(text, found)
    assert filled.startswith("a\n<!-- study:small:main -->\n| arm | hot | single |\n")
    assert filled.endswith("\n<!-- end -->\nb <!-- study:other:main -->x<!-- end -->")
    assert markdown.fill_page(filled, found) == filled
    with pytest.raises(DataError, match="nothing for the mark 'study:small:mian'"):
        markdown.fill_page("<!-- study:small:mian --><!-- end -->", found)
    with pytest.raises(DataError, match="small:main --> has no <!-- end -->"):
        markdown.fill_page("<!-- study:small:main --> <!-- study:small:auc --><!-- end -->", found)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: make browser")
def test_in_a_browser(made):
    """Drawn at both widths without a message; arms, axis and bands can be chosen."""
    sync_api = pytest.importorskip("playwright.sync_api")
    page_file, _, study = made
    arguments = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        page = browser.new_context(viewport={"width": 390, "height": 900}, offline=True).new_page()
        log = []
        page.on("console", lambda message: log.append(message.text))
        page.on("pageerror", lambda error: log.append(str(error)))
        page.goto(page_file.as_uri())
        page.wait_for_selector("html[data-drawn]", timeout=60_000)
        for width in (390, 1280):
            page.set_viewport_size({"width": width, "height": 900})
            assert page.evaluate("document.documentElement.scrollWidth") <= width
        first = page.locator("[data-panel='0']")
        shown = "(e) => e.data.filter((t) => t.visible !== false).length"
        last = "(e) => Math.max(...e.data.at(-1).x)"
        arms = len(study.arms)
        assert first.evaluate(shown) == 2 * arms
        tokens = first.evaluate(last)
        page.get_by_label("updates").check()
        assert first.evaluate(last) == 24 < tokens
        page.get_by_label("bands").uncheck()
        assert first.evaluate(shown) == arms
        page.locator("[data-arm=grpo]").uncheck()
        assert first.evaluate(shown) == arms - 1
        page.locator("#all-arms").click()
        assert first.evaluate(shown) == arms
        closed = page.locator("details:has(summary:text-is('By domain, hot'))")
        assert closed.locator("svg.main-svg").count() == 0
        closed.locator("summary").click()
        closed.locator("svg.main-svg").first.wait_for()
        closed.locator("summary").click()
        page.get_by_label("tokens").check()  # drawn while it has no width
        closed.locator("summary").click()
        chart = closed.locator("[data-panel]").first
        width = chart.bounding_box()["width"]
        page.wait_for_function(
            "([e, w]) => e._fullLayout.width === w", arg=[chart.element_handle(), width]
        )
        assert width > 300
        assert log == []
        browser.close()
