"""`Finding`: one thing that the doctor saw, what it means, and what to change."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from ..errors import ConfigError

Severity = Literal["error", "warning", "note"]

SEVERITIES: tuple[Severity, ...] = get_args(Severity)
"""Worst first."""


@dataclass(frozen=True)
class Finding:
    """What was seen, in numbers; what it means; what to change.

    Attributes:
        code: what it is, stable for programs (``docs/doctor.md`` lists all).
        severity: ``"error"``: the method does not do what it is there for; ``"warning"``: rarely
            meant; ``"note"``: worth knowing.
        seen, means, change: for people, a sentence or two each.
        numbers: the numbers behind ``seen``.
    """

    code: str
    severity: Severity
    seen: str
    means: str
    change: str
    numbers: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.severity not in SEVERITIES:
            raise ConfigError(f"severity is {self.severity!r}; it is one of {SEVERITIES}")

    def as_dict(self) -> dict[str, Any]:
        """In plain types, ready for JSON."""
        return dict(vars(self))

    def __str__(self) -> str:
        return f"{self.code}: {self.seen} {self.means} {self.change}"


def ranked(findings: Iterable[Finding]) -> list[Finding]:
    """Errors first, then warnings, then notes; the order within is kept."""
    return sorted(findings, key=lambda f: SEVERITIES.index(f.severity))


def exit_code(findings: Sequence[Finding], *, strict: bool = False) -> int:
    """1 where there is an error (``strict``: or a warning), else 0.

    >>> exit_code([Finding("x", "warning", "", "", "")])
    0
    >>> exit_code([Finding("x", "warning", "", "", "")], strict=True)
    1
    """
    bad = {"error", "warning"} if strict else {"error"}
    return int(any(finding.severity in bad for finding in findings))
