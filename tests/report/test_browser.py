"""The page in a headless Chromium: it draws, sliders redraw, nothing is loaded from elsewhere."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("plotly")
np = pytest.importorskip("numpy")
sync_api = pytest.importorskip("playwright.sync_api")

from PIL import Image  # noqa: E402

from fiberpo import RatioBatch, recipes  # noqa: E402
from fiberpo.gates import aggregate_gate, log_clip  # noqa: E402
from fiberpo.report.page import write_report  # noqa: E402
from fiberpo.report.recorded import _contexts, form  # noqa: E402
from report.samples import BUDGETS, GATED, HOSTILE, make_run, make_summary, record  # noqa: E402

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
ARGUMENTS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--no-first-run", "--disable-quic",
]  # fmt: skip

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: make browser"),
]


class Tab:
    """A page of the browser, with what it logged and asked for."""

    def __init__(self, browser: Any, path: Path, width: int) -> None:
        size = {"width": width, "height": 900}
        context = browser.new_context(viewport=size, color_scheme="light", offline=True)
        self.page = context.new_page()
        self.log: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.log.append(message.text))
        self.page.on("pageerror", lambda error: self.log.append(str(error)))
        self.page.on("dialog", lambda dialog: self.log.append(dialog.message))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())
        self.page.wait_for_selector("html[data-drawn]", timeout=60_000)
        self.quiet(path)

    def quiet(self, path: Path) -> None:
        """No message, no error, and nothing asked for but the file itself."""
        assert self.log == []
        assert [url for url in self.requests if not url.startswith("data:")] == [path.as_uri()]

    def shot(self, selector: str) -> Any:
        data = self.page.locator(selector).first.screenshot()
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)

    def shown(self, name: str) -> Any:
        return self.page.evaluate(f"fiberpo.shown.{name}")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield running
        running.close()


@pytest.fixture(scope="module")
def recorded(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Tab:
    """The page of a run with a recording, with hostile names in it."""
    run = make_run(
        tmp_path_factory.mktemp("browser") / "run",
        summary=make_summary(BUDGETS, name=HOSTILE, objective=HOSTILE),
    )
    record(run / "recording")
    return Tab(browser, write_report(run), 1280)


def test_page_is_drawn(recorded: Tab) -> None:
    """Every chart holds a drawing that is not blank."""
    page = recorded.page
    assert page.locator("h1").inner_text() == " ".join(HOSTILE.split())
    count = page.locator("[data-panel]").count()
    assert count == 15
    for i in range(count):
        plot = page.locator("[data-panel]").nth(i)
        assert plot.locator("svg.main-svg").count() > 0
        assert plot.locator("g.trace, path.js-line, path.js-fill").count() > 0
    for name in ("gate", "map", "response"):
        assert recorded.shot(f"#explorer-{name}").std() > 5
    assert page.locator("tr.tokens .token").count() > 20
    assert page.locator("script").count() == 5 + 1  # plotly, unpacked
    assert page.evaluate("document.documentElement.scrollWidth") <= 1280


def test_sliders_redraw(recorded: Tab) -> None:
    """Each control changes settings, drawing and answer; reset brings the first state back."""
    page = recorded.page
    page.locator("[data-explore]").first.click()
    before = {name: recorded.shot(f"#explorer-{name}") for name in ("gate", "map", "response")}
    answer = recorded.shown("result.tokens.map((t) => t.gated)")

    def differs(name: str) -> bool:
        now = recorded.shot(f"#explorer-{name}")
        return now.shape != before[name].shape or bool((np.abs(now - before[name]) > 30).any())

    page.locator("#explorer-stratum").select_option(label="trajectory")
    page.locator("#explorer-plus-number").fill("0.001")
    page.locator("#explorer-minus-number").fill("0.0005")
    assert recorded.shown("settings.budget[2]") == [0.001, 0.0005]
    assert float(page.locator("#explorer-plus").input_value()) == pytest.approx(-3, abs=0.01)
    assert recorded.shown("result.tokens.map((t) => t.gated)") != answer
    assert all(differs(name) for name in before)
    page.locator("#explorer-reset").click()
    assert recorded.shown("result.tokens.map((t) => t.gated)") == answer
    assert not any(differs(name) for name in before)
    page.locator("#explorer-rollback-number").fill("0.5")
    assert recorded.shown("settings.rollback[2]") == 0.5
    assert not page.locator("#explorer-tokens").is_checked()
    assert differs("gate")
    page.locator("#explorer-tokens").check()
    assert recorded.shown("settings.rollback[2]") is None
    page.locator("#explorer-epsilon-number").fill("0.0001")
    n = len(answer)
    assert page.locator("#explorer-status").inner_text().startswith(f"{n} of {n} tokens saturated")
    page.locator("#explorer-reset").click()


def test_keyboard_moves_a_slider(recorded: Tab) -> None:
    """Tab reaches a slider by its label, arrows move it, the value is spoken with its unit."""
    page = recorded.page
    slider = page.get_by_label("Budget C+", exact=True)
    page.locator("#explorer-stratum").focus()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "explorer-plus"
    start = float(page.locator("#explorer-plus-number").input_value())
    for _ in range(10):
        page.keyboard.press("ArrowRight")
    moved = float(page.locator("#explorer-plus-number").input_value())
    assert moved == pytest.approx(start * 10**0.1, rel=0.02)
    assert slider.get_attribute("aria-valuetext") == f"{moved:g} nats per token"
    assert recorded.shown("settings.budget[fiberpo.shown.stratum][0]") == moved
    page.locator("#explorer-reset").click()


def test_formulas_agree_with_the_library(recorded: Tab) -> None:
    """Gate and clip on a grid, whole trajectories at four strata: script and library are equal."""
    page = recorded.page
    x = torch.linspace(-0.5, 0.5, 41, dtype=torch.float64)
    cases = [(c, k) for c in (0.05, 0.2, 0.25, float("inf")) for k in (0.5, 1.0, 7.0, 1000.0)]
    grid = page.evaluate(
        "([xs, cases]) => cases.map(([c, k]) => xs.map((x) => "
        "Object.values(fiberpo.gates.gate(x, c === null ? Infinity : c, k))))",
        [x.tolist(), [(None if c == float("inf") else c, k) for c, k in cases]],
    )
    for (c, k), rows in zip(cases, grid, strict=True):
        found = torch.tensor(rows, dtype=torch.float64)
        gated = aggregate_gate(x, x.new_tensor(c), x.new_tensor(k))
        torch.testing.assert_close(found[:, 0], gated.value, atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(found[:, 1], gated.slope)
        assert found[:, 2].tolist() == gated.regime.tolist()
    clipped = page.evaluate("(xs) => xs.map((x) => fiberpo.gates.clip(x, 0.1))", x.tolist())
    torch.testing.assert_close(torch.tensor(clipped).double(), log_clip(x, 0.1).value)

    g = torch.Generator().manual_seed(0)
    lengths = torch.tensor([3, 8, 1, 12, 5, 7])
    log_ratio = 0.2 * torch.randn(36, generator=g, dtype=torch.float64)
    advantages = torch.randn(36, generator=g)
    batch = RatioBatch.from_packed(
        log_ratio, torch.zeros(36).double(), advantages, lengths,
        labels={"domain": [0, 0, 0, 1, 1, 1], "group": [0, 0, 1, 2, 2, 3],
                "turn": [i // 4 for n in lengths.tolist() for i in range(n)]},
    )  # fmt: skip
    four = {**GATED, "turn": (0.1, 0.05)}
    for more in ({}, {"rollback": 2.0}, {"pessimistic": True}, {"epsilon": 0.01}):
        objective = recipes.fiberpo_domain(**{"budgets": four, "epsilon": 0.04, **more})
        gated = objective(batch).gated
        settings = form(objective)
        settings["budget"] = [None] * 4
        settings["rollback"] = [s["rollback"] for s in settings["strata"]]
        for row in range(len(lengths)):
            end = int(lengths[: row + 1].sum())
            own = slice(end - int(lengths[row]), end)
            contexts, leaf = _contexts(gated, own)
            trajectory = {
                "l": log_ratio[own].tolist(), "a": advantages[own].tolist(), "leaf": leaf,
                "contexts": contexts,
            }  # fmt: skip
            found = page.evaluate(
                "([t, s]) => fiberpo.gates.respond(t, s).tokens.map((x) => x.gated)",
                [trajectory, settings],
            )
            expected = gated.log_factor()[own]
            torch.testing.assert_close(torch.tensor(found).double(), expected, atol=1e-7, rtol=1e-6)


def test_phone_and_no_recording(browser: Any, tmp_path: Path) -> None:
    """At 390 px nothing sticks out, light and dark; without a recording there is an example."""
    tab = Tab(browser, write_report(make_run(tmp_path / "run", steps=8)), 390)
    assert tab.page.evaluate("document.documentElement.scrollWidth") <= 390
    assert tab.page.locator("#explorer-tokens-text").inner_text().startswith("6+2=8")
    light = tab.shot("#explorer-map")
    tab.page.locator("#explorer-stratum").select_option(label="domain")
    tab.page.locator("#explorer-plus-number").fill("0.3")
    tab.page.emulate_media(color_scheme="dark")
    dark = tab.shot("#explorer-map")
    assert min(light.std(), dark.std()) > 10
    assert np.median(light) > 150 > 100 > np.median(dark)
    assert tab.log == []


def test_several_runs(browser: Any, tmp_path: Path) -> None:
    """Curves of all runs, and a choice of run in the explorer."""
    first, second = (make_run(tmp_path / name, steps=8) for name in ("one", "two"))
    record(second / "recording", steps=2)
    tab = Tab(browser, write_report([first, second], tmp_path / "both.html"), 1280)
    assert tab.page.evaluate("document.documentElement.scrollWidth") <= 1280
    assert tab.shown("trajectory.title").startswith("built-in example")
    tab.page.locator("#explorer-run").select_option(label="two")
    assert tab.shown("trajectory.title").startswith("step ")
    tab.page.emulate_media(color_scheme="dark")
    tab.page.pdf()
    assert tab.log == []
