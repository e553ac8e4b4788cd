"""``fiberpo lab``: runs every claim, compares with the record, and prints what was found."""

from __future__ import annotations

import json
import math
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import ConfigError
from . import (
    claims_apc,
    claims_divergences,
    claims_domain,
    claims_fiberpo,
    claims_gates,
    claims_gating,
    claims_jacobian,
    claims_operators,
    claims_trm,
    claims_trpo,
)
from .claims import Claim, Finding, Verdict

SECTIONS: tuple[tuple[str, tuple[Claim, ...]], ...] = (
    ("Divergences", claims_divergences.CLAIMS),
    ("Ratio gating formalism", claims_gating.CLAIMS),
    ("TV-TRPO", claims_trpo.CLAIMS),
    ("APC-Obj", claims_apc.CLAIMS),
    ("Atomic gates", claims_gates.CLAIMS),
    ("FiberPO", claims_fiberpo.CLAIMS),
    ("Gradient of FiberPO", claims_jacobian.CLAIMS),
    ("Fiber bundle gating and hierarchies", claims_operators.CLAIMS),
    ("FiberPO-Domain and trees", claims_domain.CLAIMS),
    ("Trust Region Masking", claims_trm.CLAIMS),
)
"""Title and claims of every part of the table."""

CLAIMS: tuple[Claim, ...] = tuple(claim for _, claims in SECTIONS for claim in claims)


@dataclass(frozen=True)
class Result:
    """One claim, tried.

    Attributes:
        seconds: how long it took.
    """

    claim: Claim
    finding: Finding
    seconds: float

    @property
    def changed(self) -> bool:
        """Whether the verdict is not the recorded one."""
        return self.finding.verdict is not self.claim.recorded

    @property
    def change(self) -> str:
        """One line that says what changed."""
        return (
            f'"{self.claim.name}" ({self.claim.source}): recorded "{self.claim.recorded.value}", '
            f'found "{self.finding.verdict.value}" (worst {worst_error(self.finding.worst)}; '
            f"{self.finding.detail})"
        )

    @property
    def outcome(self) -> str:
        """Last column of the table: the worst error, or conditions and counterexample."""
        if self.finding.verdict is Verdict.HOLDS:
            error = f"worst {worst_error(self.finding.worst)}"
            return f"{error}; {self.finding.detail}" if self.finding.detail else error
        return self.finding.detail


def worst_error(value: float | None) -> str:
    """An error for a table: rounding errors as an upper bound, so that pages reproduce.

    >>> worst_error(2e-16), worst_error(4e-11), worst_error(0.1234), worst_error(None)
    ('< 1e-12', '< 1e-9', '0.12', '-')
    """
    if value is None:
        return "-"
    for bound in ("1e-12", "1e-9", "1e-5"):
        if value < float(bound):
            return f"< {bound}"
    return f"{value:.2g}"


def select(pattern: str | None, claims: Sequence[Claim] = CLAIMS) -> tuple[Claim, ...]:
    """The claims whose name or source contains the pattern, in whatever case.

    Raises:
        ConfigError: if there is none.
    """
    if pattern is None:
        return tuple(claims)
    wanted = pattern.lower()
    found = tuple(c for c in claims if wanted in f"{c.name} {c.source}".lower())
    if not found:
        raise ConfigError(
            f"no claim matches {pattern!r}; names are like {claims[0].name!r}, sources like "
            f"{claims[-1].source!r} (fiberpo lab prints all {len(claims)})"
        )
    return found


def run(
    claims: Sequence[Claim] = CLAIMS,
    *,
    seed: int = 0,
    progress: Callable[[Result], None] | None = None,
) -> list[Result]:
    """Try every claim; each has a generator of its own, from the seed and its name.

    Args:
        progress: called after every claim.
    """
    results = []
    for claim in claims:
        rng = np.random.default_rng([seed, zlib.crc32(claim.name.encode())])
        start = time.perf_counter()
        finding = claim.check(rng)
        results.append(Result(claim, finding, time.perf_counter() - start))
        if progress is not None:
            progress(results[-1])
    return results


def counts(results: Sequence[Result]) -> str:
    """How many of each verdict, in words.

    >>> counts([])
    '0 claims: 0 hold, 0 hold under conditions, 0 fail'
    """
    verdicts = [r.finding.verdict for r in results]
    hold, conditional, fail = (verdicts.count(v) for v in Verdict)
    return (
        f"{len(results)} claims: {hold} hold, {conditional} hold under conditions, {fail} fail"
    )  # fmt: skip


def _number(value: float | None) -> float | str | None:
    """JSON has no infinity."""
    return value if value is None or math.isfinite(value) else str(value)


def as_data(results: Sequence[Result], seed: int) -> dict[str, Any]:
    """Everything as plain data, for JSON."""
    return {
        "seed": seed,
        "claims": [
            {
                "claim": r.claim.name,
                "source": r.claim.source,
                "statement": r.claim.statement,
                "tried": r.finding.tried,
                "verdict": r.finding.verdict.value,
                "recorded": r.claim.recorded.value,
                "worst": _number(r.finding.worst),
                "detail": r.finding.detail,
                "seconds": round(r.seconds, 3),
            }
            for r in results
        ],
    }


def as_json(results: Sequence[Result], seed: int) -> str:
    """`as_data` as text; an error that is not finite is the string ``inf`` or ``nan``."""
    return json.dumps(as_data(results, seed), indent=1, allow_nan=False) + "\n"


__all__ = [
    "CLAIMS", "SECTIONS", "Result", "as_data", "as_json", "counts", "run", "select", "worst_error",
]  # fmt: skip
