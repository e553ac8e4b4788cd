"""Studies with known results, without training anything."""

from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pandas as pd

DOMAINS = ("sum", "sort", "reverse", "boolean")


@dataclass
class Grid:
    """What the numbers and the page read of a study."""

    arms: dict
    settings: dict
    seeds: tuple
    pairs: list
    name: str = "small"
    about: str = "A study without training"
    base: dict = field(default_factory=lambda: {"model": "embedded", "prompts": 16})

    @property
    def plan(self):
        return [SimpleNamespace(settings=tuple(self.settings), arms=tuple(self.arms))]

    def seeds_of(self, block, setting, arm):
        return self.seeds


def grid(arms=("grpo", "gspo"), settings=("hot",), seeds=(0, 1, 2), pairs=None, families=None):
    """A grid by names; arms may share families."""
    families = families or {}
    return Grid(
        {
            a: SimpleNamespace(
                about=f"arm {a}", config={"objective": a, "objective_kwargs": {"epsilon": 0.2}},
                family=families.get(a, a),
            )
            for a in arms
        },
        {s: SimpleNamespace(about=f"setting {s}", config={"learning_rate": 1}) for s in settings},
        tuple(seeds),
        [(a, arms[0]) for a in arms[1:]] if pairs is None else pairs,
    )  # fmt: skip


def cell(setting="hot", arm="grpo", seed=0, rewards=(0.5, 0.4, 0.6), family=None, **columns):
    """Rows of a finished cell; ``rewards`` is a list, or one for each domain by name."""
    domains = rewards if isinstance(rewards, dict) else {"sum": rewards}
    count = len(next(iter(domains.values())))
    steps = np.arange(count) * 8
    rows = pd.DataFrame({
        "study": "small", "setting": setting, "arm": arm, "family": family or arm, "seed": seed,
        "objective": arm, "status": "finished", "error": "", "cell_seconds": 20.0,
        "digest": f"{setting}{arm}{seed}", "step": steps, "rollout": steps // 4,
        "answers": steps * 32, "tokens": steps * 100,
        "heldout/reward": np.mean([*domains.values()], axis=0),
    })  # fmt: skip
    for name, values in domains.items():
        rows[f"heldout/reward/domain={name}"] = np.asarray(values, float)
    return rows.assign(**columns)


def failed(setting="hot", arm="grpo", seed=0, error="NonFiniteError: loss is nan"):
    """The row of a cell that failed before its first evaluation."""
    row = cell(setting, arm, seed, rewards=[np.nan], status="failed", error=error)
    return row.assign(step=np.nan, tokens=np.nan)


def table(*cells):
    return pd.concat(cells, ignore_index=True)


def realistic(study, evaluations=7):
    """Curves with noise, drifts and norms, of every cell of a grid."""
    rng = np.random.default_rng(0)
    cells = []
    for s, setting in enumerate(study.settings):
        for a, arm in enumerate(study.arms):
            for seed in study.seeds:
                luck = np.random.default_rng(seed).normal(0, 0.03)
                rewards = {}
                for d, name in enumerate(DOMAINS):
                    end = 0.75 - 0.06 * s + 0.02 * a + 0.05 * d + luck + rng.normal(0, 0.03)
                    if s == 1 and a in (0, 3) and d == 0 and rng.random() < 0.6:
                        end = 0.05
                    t = 1 - np.exp(-np.arange(evaluations) / 2)
                    start = 0.45 + luck / 2
                    curve = start + (end - start) * t + rng.normal(0, 0.02, evaluations)
                    rewards[name] = np.clip(curve, 0, 1)
                t = np.arange(evaluations) / evaluations
                none = np.where(np.arange(evaluations) == 0, np.nan, 1.0)
                more = {
                    "entropy": 0.4 * np.exp(-2 * t) + 0.02 * a,
                    "ratio/mean": 1 + 0.002 * (a - 3) * t,
                    "grad_norm": (1 + a * t) * rng.lognormal(0, 0.3, evaluations),
                    "grad_norm/max": 3 * (1 + a * t) * rng.lognormal(0, 0.3, evaluations),
                    "completions/mean_length": 6 + t + rng.normal(0, 0.2, evaluations),
                }
                strata = ("domain", "group", "trajectory", "token") if a > 2 else ("token",)
                for k, stratum in enumerate(strata):
                    for channel in ("drift_pos", "drift_neg"):
                        noise = rng.lognormal(0, 0.2, evaluations)
                        more[f"gate/{stratum}/{channel}/p90"] = 0.01 * (k + 1) * (1 + t) * noise
                rows = cell(setting, arm, seed, rewards, family=study.arms[arm].family)
                rows["tokens"] = (rows["tokens"] * (5 + s + rng.normal(0, 0.1))).round()
                cells.append(rows.assign(**{k: v * none for k, v in more.items()}))
    return table(*cells)
