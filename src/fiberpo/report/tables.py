"""What the report's tables and sample cards show: rows from a summary, and how numbers look."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fiberpo.report.reader import Run, number

QUANTILES = ("p50", "p90", "p99", "max")
MINUS = "\N{MINUS SIGN}"
DASH = "\N{EN DASH}"

_MAX_SAMPLE_CHARACTERS = 4000


# --- numbers -----------------------------------------------------------------------------------


def format_reward(value: float | None) -> str:
    """A reward with three decimals; a dash where there is none.

    >>> format_reward(0.46251)
    '0.463'
    """
    return DASH if value is None else _minus(f"{value:.3f}")


def format_difference(value: float | None) -> str:
    """A difference of rewards with its sign.

    >>> format_difference(0.34)
    '+0.340'
    """
    return DASH if value is None else _minus(f"{value:+.3f}")


def format_drift(value: float | None) -> str:
    """A drift or a budget with three significant digits.

    >>> format_drift(0.01234), format_drift(0.2)
    ('0.0123', '0.2')
    """
    return DASH if value is None else _minus(f"{value:.3g}")


def format_percent(value: float | None) -> str:
    """A fraction in percent, so that only exact zeros and ones look like it.

    >>> format_percent(0.1), format_percent(0.0), format_percent(0.0002), format_percent(0.9999)
    ('10.0 %', '0 %', '< 0.1 %', '> 99.9 %')
    """
    if value is None:
        return DASH
    if 0 < value < 0.0005:
        return "< 0.1 %"
    if 0.9995 <= value < 1:
        return "> 99.9 %"
    return f"{100 * value:.0f} %" if value in (0.0, 1.0) else _minus(f"{100 * value:.1f} %")


def format_seconds(value: float | None) -> str:
    """A duration in the two largest units that fit.

    >>> format_seconds(171.2), format_seconds(8.4), format_seconds(7260)
    ('2 min 51 s', '8.4 s', '2 h 1 min')
    """
    if value is None or value < 0:
        return DASH
    if value < 59.95:
        return f"{value:.1f} s"
    whole = round(value)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    minutes = round(value / 60)
    return f"{minutes // 60} h {minutes % 60} min"


def plain_label(text: object, limit: int = 22) -> str:
    """``text`` on one line, without control characters, cut to ``limit`` characters."""
    cleaned = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    return cleaned if len(cleaned) <= limit else cleaned[: limit - 1] + "…"


def short(value: float) -> str:
    """Short decimal form for axis and line labels, without a needless exponent."""
    text = f"{value:.3g}"
    if "e" in text and 1e-5 <= abs(value) < 1e6:
        text = f"{value:.6f}".rstrip("0").rstrip(".") if abs(value) < 1 else f"{value:.0f}"
    return _minus(text)


def _minus(text: str) -> str:
    return text.replace("-", MINUS)


# --- gates by stratum --------------------------------------------------------------------------


@dataclass(frozen=True)
class ChannelRow:
    """Budget and drift quantiles of one channel of a stratum's context."""

    sign: str
    name: str
    budget: float | None
    quantiles: dict[str, float | None]

    def above(self, quantile: str) -> bool:
        """Whether the quantile of the drift lies above the budget."""
        value = self.quantiles[quantile]
        return value is not None and self.budget is not None and value > self.budget


@dataclass(frozen=True)
class StratumRow:
    """One context of a stratum: both channels, and the share of contexts in each regime."""

    stratum: str
    context: str
    channels: tuple[ChannelRow, ChannelRow]
    passed: float | None
    rollback: float | None
    zeroed: float | None


def stratum_rows(strata: Sequence[Mapping[str, Any]] | None) -> list[StratumRow]:
    """Rows of the stratum table, from the ``strata`` of a summary."""
    return [
        StratumRow(
            stratum=str(row.get("stratum", "?")),
            context=str(row.get("context") or "all"),
            channels=(_channel(row, 0), _channel(row, 1)),
            passed=number(row.get("pass")),
            rollback=number(row.get("rollback")),
            zeroed=number(row.get("zeroed")),
        )
        for row in strata or ()
    ]


def _channel(row: Mapping[str, Any], index: int) -> ChannelRow:
    key, sign, name = (("drift_pos", "+", "positive"), ("drift_neg", MINUS, "negative"))[index]
    drift, budget = row.get(key), row.get("budget")
    values = drift if isinstance(drift, Mapping) else {}
    limit = budget[index] if isinstance(budget, (list, tuple)) and len(budget) == 2 else None
    return ChannelRow(sign, name, number(limit), {q: number(values.get(q)) for q in QUANTILES})


def strata_from_metrics(run: Run, names: Sequence[str]) -> list[dict[str, Any]]:
    """Stand-in for the ``strata`` of a summary: means of the fractions, largest drifts."""

    def values(key: str) -> list[float]:
        return [v for record in run.train if (v := number(record.get(key))) is not None]

    rows: list[dict[str, Any]] = []
    for name in names:
        row: dict[str, Any] = {"stratum": name}
        for regime in ("pass", "rollback", "zeroed"):
            seen = values(f"gate/{name}/{regime}_frac")
            row[regime] = sum(seen) / len(seen) if seen else None
        for channel in ("drift_pos", "drift_neg"):
            row[channel] = {"max": max(values(f"gate/{name}/{channel}/max"), default=None)}
        rows.append(row)
    return rows


# --- held-out reward ---------------------------------------------------------------------------


@dataclass(frozen=True)
class RewardRow:
    """Held-out reward of one domain, before and after training."""

    name: str
    before: float | None
    after: float | None

    @property
    def known(self) -> bool:
        """Whether there is any value to show."""
        return self.before is not None or self.after is not None

    @property
    def difference(self) -> float | None:
        """After minus before, where both are known."""
        if self.before is None or self.after is None:
            return None
        return self.after - self.before


def reward_rows(
    before: Mapping[str, Any] | None, after: Mapping[str, Any] | None
) -> tuple[list[RewardRow], RewardRow]:
    """Rows of the held-out table: one per domain, and the mean over all."""
    first, second = before or {}, after or {}
    names = dict.fromkeys([*first, *second, "mean"])
    rows = {n: RewardRow(n, number(first.get(n)), number(second.get(n))) for n in names}
    mean = rows.pop("mean")
    return list(rows.values()), mean


@dataclass(frozen=True)
class Heldout:
    """The held-out table, and what its last column stands for."""

    rows: list[RewardRow]
    mean: RewardRow
    after_label: str
    note: str | None

    @property
    def known(self) -> bool:
        """Whether there is any value to show."""
        return any(row.known for row in [*self.rows, self.mean])


def heldout_table(run: Run) -> Heldout:
    """Held-out rewards before and after; evaluations in the metrics fill in for a missing end."""
    summary = run.summary or {}
    before, after = summary.get("heldout_before"), summary.get("heldout_after")
    after_label, note = "after", None
    by_step = {s: r for r in run.evals if (s := number(r.get("step"))) is not None}
    last = max(by_step, default=0.0)
    if before is None and by_step and min(by_step) == 0:
        before = _heldout_of(by_step[0.0])
    if after is None and last > 0:
        after = _heldout_of(by_step[last])
        after_label = f"step {last:g}"
        note = (
            "There is no evaluation of the final policy: the second column is the last evaluation "
            f"during training, after {last:g} steps."
        )
    elif after is None:
        note = "There is no held-out evaluation after training."
    return Heldout(*reward_rows(before, after), after_label, note)


def _heldout_of(record: Mapping[str, Any]) -> dict[str, Any]:
    prefix = "heldout/reward/domain="
    found = {key[len(prefix) :]: v for key, v in record.items() if key.startswith(prefix)}
    return {**found, "mean": record.get("heldout/reward")}


# --- sample answers ----------------------------------------------------------------------------


def sample_cards(samples: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]]:
    """Prompt, expected answer, and the answers before and after with their verdicts."""
    cards = []
    for sample in samples or ():
        answers = [_answer(sample, when) for when in ("before", "after")]
        expected = sample.get("answer")
        cards.append(
            {
                "domain": str(sample.get("domain") or ""),
                "prompt": _shorten(sample.get("prompt")),
                "expected": None if expected is None else _shorten(expected),
                "answers": [answer for answer in answers if answer is not None],
            }
        )
    return cards


def _answer(sample: Mapping[str, Any], when: str) -> dict[str, str] | None:
    text, reward = sample.get(when), sample.get(f"reward_{when}")
    if text is None and reward is None:
        return None
    value = number(reward)
    if value is None:
        verdict, symbol = "not scored", "·"
    elif value >= 1:
        verdict, symbol = "correct", "✓"
    elif value > 0:
        verdict, symbol = "partly correct", "◐"
    else:
        verdict, symbol = "incorrect", "✗"
    shown = DASH if value is None else _minus(f"{value:g}")
    return {
        "when": when,
        "text": _shorten(text),
        "reward": shown,
        "verdict": verdict,
        "symbol": symbol,
    }


def _shorten(text: object) -> str:
    full = "" if text is None else str(text)
    left = len(full) - _MAX_SAMPLE_CHARACTERS
    return full if left <= 0 else f"{full[:-left]}… ({left} more characters)"
