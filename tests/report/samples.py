"""Made-up runs and recordings for the tests of the report, and what a page holds."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import torch

from fiberpo import RatioBatch, recipes
from fiberpo.recording import Recorder

DOMAINS = ("sum", "sort")
BUDGETS = {
    "domain": (0.02, 0.015),
    "group": (0.041, 0.031),
    "trajectory": (0.08, 0.06),
    "token": (0.2, 0.21),
}
UPDATES = 4


def train_line(step: int, strata: Iterable[str], domains: Iterable[str]) -> dict[str, Any]:
    update = (step - 1) % UPDATES
    line: dict[str, Any] = {
        "kind": "train",
        "step": step,
        "rollout": (step - 1) // UPDATES,
        "reward": 0.4 + 0.005 * step,
        "entropy": 0.5 / step + 0.1,
        "completions/mean_length": 14.0 + 0.01 * step,
        "gate/active": 0.1 * update,
        "gate/gradient_kept": 1 - 0.05 * update,
        "gate/gradient_reversed": 0.01 * update,
        "ratio/mean": 1.0,
        "ratio/min": math.exp(-0.5 * update),
        "ratio/max": math.exp(0.5 * update),
        "ratio/ess": 0.98,
        "kl/k1": -0.0001 * update,
        "kl/k3": 0.0002 * update,
    }
    line |= {f"reward/domain={d}": 0.3 + 0.005 * step for d in domains}
    for stratum in strata:
        zeroed, rollback = 0.05 * update, 0.0 if stratum == "token" else 0.02 * update
        line[f"gate/{stratum}/pass_frac"] = 1 - zeroed - rollback
        line[f"gate/{stratum}/zeroed_frac"] = zeroed
        if stratum != "token":
            line[f"gate/{stratum}/rollback_frac"] = rollback
        for channel, budget in zip(("pos", "neg"), BUDGETS[stratum], strict=True):
            for name, scale in (("mean", 0.2), ("p90", 0.4), ("max", 0.8)):
                line[f"gate/{stratum}/drift_{channel}/{name}"] = budget * scale * update
    return line


def eval_line(step: int, domains: Iterable[str]) -> dict[str, Any]:
    value = 0.4 + 0.01 * step
    rewards = {f"heldout/reward/domain={d}": value for d in domains}
    return {"kind": "eval", "step": step, "heldout/reward": value, **rewards}


def stratum_row(stratum: str, context: str = "all") -> dict[str, Any]:
    pos, neg = BUDGETS[stratum]
    return {
        "stratum": stratum,
        "context": context,
        "budget": [pos, neg],
        "drift_pos": {"p50": 0.00311, "p90": 0.0122, "p99": pos * 1.5, "max": pos * 2},
        "drift_neg": {"p50": 0.00233, "p90": 0.0111, "p99": neg * 1.5, "max": neg * 2},
        "pass": 0.843,
        "rollback": 0.0,
        "zeroed": 0.157,
    }


def make_summary(strata: Iterable[str], **changes: Any) -> dict[str, Any]:
    return {
        "name": "quickstart",
        "objective": "fiberpo_domain(budgets=...)",
        "seed": 7,
        "steps": 40,
        "updates_per_rollout": UPDATES,
        "model": "embedded",
        "interrupted": False,
        "seconds": 171.2,
        "heldout_before": {"sum": 0.301, "sort": 0.62, "mean": 0.461},
        "heldout_after": {"sum": 0.812, "sort": 0.597, "mean": 0.704},
        "strata": [stratum_row(name) for name in strata],
        "samples": [
            {
                "domain": "sum",
                "prompt": "<|im_start|>sum 47+85:",
                "before": "#131",
                "reward_before": 0.0,
                "after": "#132",
                "reward_after": 1.0,
                "answer": "132",
            },
            {
                "domain": "sort",
                "prompt": "sort 31:",
                "before": "1",
                "reward_before": 0.5,
                "after": None,
                "reward_after": None,
                "answer": "13",
            },
        ],
        "notes": ["Held-out prompts: 64 per domain."],
        "versions": {"fiberpo": "0.1.0", "torch": "2.9.0"},
        **changes,
    }


def make_run(
    directory: Path,
    strata: Iterable[str] = tuple(BUDGETS),
    summary: dict[str, Any] | None = None,
    steps: int = 40,
    domains: Iterable[str] = DOMAINS,
) -> Path:
    directory.mkdir()
    lines = [eval_line(0, domains)]
    for step in range(1, steps + 1):
        lines.append(train_line(step, strata, domains))
        if step % 10 == 0:
            lines.append(eval_line(step, domains))
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (directory / "metrics.jsonl").write_text(text)
    (directory / "summary.json").write_text(json.dumps(summary or make_summary(strata)))
    (directory / "config.yaml").write_text("steps: 40\nobjective: fiberpo_domain\n")
    return directory


class Page(HTMLParser):
    """Elements, text of the tables cell by cell, and whether every tag is closed."""

    VOID = frozenset({"meta", "link", "br", "input"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.attributes: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[list[list[str]]] = []
        self.labels: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert not self._open

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes.append((tag, dict(attrs)))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes.append((tag, dict(attrs)))
        if tag in self.VOID:
            return
        self._open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "td" in self._open or "th" in self._open:
            self.tables[-1][-1][-1] += data.strip()

    @property
    def tags(self) -> Counter[str]:
        return Counter(tag for tag, _ in self.attributes)


def checked(html: str) -> Page:
    """A page that is closed, self-contained, and runs only its own scripts."""
    page = Page(html)
    # Nothing is loaded from elsewhere, and nothing runs but the page's own scripts.
    for tag, attributes in page.attributes:
        assert tag not in {"iframe", "object", "img", "image", "base", "form"}
        for name in ("src", "href", "xlink:href", "action", "srcset", "data"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:")), (tag, name, value)
        assert not any(name.startswith("on") for name in attributes)
    assert page.tags["script"] == 5
    assert not re.search(r"url\((?!#)", html)
    assert "@import" not in html
    ids = Counter(a.get("id") for _, a in page.attributes if a.get("id"))
    assert set(ids.values()) == {1}
    return page


def data_of(html: str) -> dict[str, Any]:
    """The data that the page's scripts draw."""
    found = re.search(r'id="fiberpo-data">(.*?)</script>', html, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def panel_count(page: Page) -> int:
    return sum("data-panel" in a for _, a in page.attributes)


GATED = {"domain": (0.02, 0.015), "group": (0.04, 0.03), "trajectory": (0.12, 0.05)}
HOSTILE = "</script><script>alert(1)</script><b>&amp;"


class Pieces:
    """A tokenizer of the slow kind: a list of pieces."""

    PIECES = ("<pad>", HOSTILE, " sum", "\n", "4")

    def get_vocab(self) -> dict[str, int]:
        return {piece: i for i, piece in enumerate(self.PIECES)}


def batch_of(step: int, rows: int = 16, scale: float = 0.05) -> tuple[RatioBatch, torch.Tensor]:
    g = torch.Generator().manual_seed(step)
    lengths = torch.randint(2, 12, (rows,), generator=g)
    n = int(lengths.sum())
    old = -torch.rand(n, generator=g) - 0.1
    log_ratio = (scale * step * torch.randn(n, generator=g)).round(decimals=6)
    labels = {
        "domain": [["sum", "sort"][i * 2 // rows] for i in range(rows)],
        "group": torch.arange(rows) // 4,
    }
    batch = RatioBatch.from_packed(
        old + log_ratio, old, torch.randn(rows, generator=g), lengths, labels=labels
    )
    return batch, torch.randint(1, len(Pieces.PIECES), (n,), generator=g)


def record(
    path: Path, objective: Any = None, steps: int = 4, scale: float = 0.05, **more: Any
) -> Path:
    objective = recipes.fiberpo_domain(GATED, 0.2) if objective is None else objective
    with Recorder(path, objective, host="test", tokenizer=Pieces()) as recorder:
        for step in range(1, steps + 1):
            batch, ids = batch_of(step, scale=scale)
            rewards = (torch.arange(batch.rows) % 2).float()
            recorder.record(
                step, batch, token_ids=ids, entropies=torch.ones(len(batch)), rewards=rewards,
                prompts=[HOSTILE] * batch.rows, **more,
            )  # fmt: skip
    return path
