"""Every refusal of the library, under one root that is also a ``ValueError``.

A message quotes the caller's data (which token, which trajectory, which value) and names the
remedy. Nothing is silently clamped, dropped or renormalised.
"""

from __future__ import annotations


class FiberPOError(ValueError):
    """Root of all errors raised by fiberpo."""


class ShapeError(FiberPOError):
    """Tensors whose shapes, dtypes or devices do not fit together."""


class NonFiniteError(FiberPOError):
    """A NaN or an infinity on a loss token."""


class EmptyBatchError(FiberPOError):
    """A batch without a single loss token, where at least one is needed."""


class StrataError(FiberPOError):
    """Labels that do not form a forest of contexts, or strata that are missing."""


class BudgetError(FiberPOError):
    """A budget, epsilon or rollback count out of its range, or missing for a context."""


class ObjectiveError(FiberPOError):
    """A weights, gate-map or mask combination that has no meaning."""


class BoundError(FiberPOError):
    """A divergence, length or reward for which a bound has no meaning."""


class ConfigError(FiberPOError):
    """A setting of the command-line program or of a trainer that cannot work."""


class DataError(FiberPOError):
    """A file, data set or recording that cannot be used."""


class RecordingError(FiberPOError):
    """A recording of a training run that cannot be written, read or understood."""


class TheoryError(FiberPOError):
    """A problem of the laboratory that does not meet its own definition."""


class FiberPOWarning(UserWarning):
    """Something legal that is rarely meant."""
