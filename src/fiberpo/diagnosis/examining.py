"""The doctor: findings of a live step, of a recording, of a run's directory."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from ..batch import RatioBatch
from ..errors import ConfigError, DataError, FiberPOError, FiberPOWarning, StrataError
from ..exact import Window
from ..objective import Objective, Surrogate
from ..recording import open_recording
from .checks import budget_findings, check
from .evidence import Drift, Evidence
from .findings import Finding, ranked
from .settings import HostSettings, examine_config

MOST_STEPS = 64
"""Steps of a recording that are looked at, spread evenly over it."""

OF_SETTINGS = ("cut-groups", "local-aggregates", "double-division")
"""What the settings of a recorded run show better than its steps."""

CONFIG_FILE, SUMMARY_FILE, METRICS_FILE = "config.yaml", "summary.json", "metrics.jsonl"


def examine_batch(
    objective: Objective,
    batch: RatioBatch,
    *,
    settings: Mapping[str, Any] | None = None,
    first_update: bool = False,
    gradient: Tensor | None = None,
) -> list[Finding]:
    """Findings of one optimizer step.

    Args:
        objective: what is optimised.
        batch: all its tokens.
        settings: of the host, where they are at hand.
        first_update: the step is the first after a rollout, so log ratios of 0 are right.
        gradient: ``[N]`` what reached the log-probs (``log_probs.grad``, summed over micro-batches
            and ranks as the engine does it): compared with that of the objective.

    Raises:
        ObjectiveError, StrataError: from the objective.
    """
    evidence = Evidence(objective)
    surrogate = _quietly(objective, batch)
    host = HostSettings.read(settings or {})
    evidence.add([batch], [surrogate], generations=host.generations)
    found = check(evidence, host, first_step=first_update)
    if evidence.fresh == evidence.steps and not first_update and not _told(found):
        found.append(_all_zero(host))
    if gradient is not None:
        found += _scaled(surrogate, gradient)
    return ranked(found)


def examine_window(
    window: Window, *, settings: Mapping[str, Any] | None = None, first_update: bool = False
) -> list[Finding]:
    """Findings of one optimizer step of `fiberpo.exact`, this rank's part; once it is evaluated.

    Args:
        window: after its `Window.loss` calls.
        settings, first_update: as in `examine_batch`.
    """
    evidence = Evidence(window.stepper.objective)
    host = HostSettings.read(settings or {})
    surrogates = window.surrogates
    evidence.add([s.batch for s in surrogates], surrogates, generations=host.generations)
    return check(evidence, host, first_step=first_update)


def _quietly(objective: Objective, batch: RatioBatch) -> Surrogate:
    """What an objective warns of is among the findings."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", FiberPOWarning)
        return objective(batch)


def _told(found: Sequence[Finding]) -> bool:
    return any(f.code in ("inert-gates", "old-equals-current") for f in found)


def _all_zero(host: HostSettings) -> Finding:
    return Finding(
        "old-equals-current", "error", "Every log ratio of this step is 0.",
        "Old and current log-probs are the same numbers: no gate can act. That is right on the "
        "first update after a rollout (first_update=True), and on no other.",
        "Score the rollout once, before its first update, and keep those log-probs.",
        {"updates_per_rollout": host.updates},
    )  # fmt: skip


def _scaled(surrogate: Surrogate, gradient: Tensor) -> list[Finding]:
    """Whether the gradient that arrived is a multiple of the objective's."""
    expected = -surrogate.coefficients.cpu().numpy()
    arrived = gradient.detach().double().cpu().numpy().reshape(-1)
    if arrived.shape != expected.shape:
        raise DataError(
            f"gradient has {arrived.size} entries, the batch {expected.size} tokens; pass the "
            "packed gradient of the log-probs"
        )
    used = np.abs(expected) > 1e-6 * np.abs(expected).max(initial=0.0)
    if not used.any():
        return []
    factor = arrived[used] / expected[used]
    middle, spread = float(np.median(factor)), float(np.ptp(factor))
    if abs(middle - 1) < 1e-3 and spread < 1e-2:
        return []
    one = spread < 1e-2 * abs(middle)
    seen = f"The gradient that reached the log-probs is {middle:.4g} times that of the objective"
    if not one:
        seen += f" in the middle, {factor.min():.3g} to {factor.max():.3g} times at single tokens"
    return [
        Finding(
            "double-division", "error", f"{seen}.",
            "The host multiplies or divides once more than the weights of the objective do: by the "
            "number of micro-batches, ranks or its own count of tokens."
            if one else
            "A count of a part (a micro-batch, a rank) stands where that of the optimizer step "
            "belongs, or gates above the trajectory were given a part.",
            "Find the factor in docs/troubleshooting.md; fiberpo.exact.Stepper takes the counts of "
            "the whole step.",
            {"factor": middle, "smallest": float(factor.min()), "largest": float(factor.max())},
        )
    ]  # fmt: skip


def examine(
    path: str | Path | Any,
    *,
    settings: Mapping[str, Any] | None = None,
    objective: Objective | None = None,
) -> list[Finding]:
    """Findings of a run.

    Args:
        path: a recording (opened, or its directory), or the directory of a run of ``fiberpo
            train``, recorded or not: without a recording its settings and its summary are read.
        settings: of the host, where they are better known than the run tells.
        objective: likewise.

    Raises:
        DataError, ConfigError, RecordingError: where there is nothing to look at.
    """  # fmt: skip
    if not isinstance(path, (str, Path)):
        return _examine_recording(path, settings, objective)
    folder = Path(path)
    if not folder.exists():
        raise DataError(f"{folder} does not exist; name a run, a recording or a file of settings")
    found: list[Finding] = []
    config = folder / CONFIG_FILE
    if config.is_file():
        settings = {**read_settings(config), **(settings or {})}
        found += examine_config(settings, objective=objective)
    if (folder / "recording").is_dir() or not _is_run(folder):
        try:
            found += _examine_recording(open_recording(folder), settings, objective)
        except StrataError as error:
            found.append(_not_nested(error))
    else:
        found += _examine_files(folder)
    return ranked(_once(found))


def read_settings(path: Path) -> dict[str, Any]:
    """Settings by name from a YAML or JSON file.

    Raises:
        ConfigError: if it holds anything else.
    """
    try:
        found = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(found, dict) or not found:
        what = "nothing" if not found else f"a {type(found).__name__}"
        raise ConfigError(f"{path} holds {what}, not settings by name")
    return {str(k): v for k, v in found.items()}


def _is_run(folder: Path) -> bool:
    names = (CONFIG_FILE, SUMMARY_FILE, METRICS_FILE)
    return folder.is_dir() and any((folder / name).is_file() for name in names)


def _once(found: Sequence[Finding]) -> list[Finding]:
    """Settings and steps may show the same thing; the first says it."""
    seen: dict[tuple[str, Any], Finding] = {}
    for finding in found:
        place = (finding.numbers.get("stratum"), finding.numbers.get("context", "all"))
        seen.setdefault((finding.code, place), finding)
    return list(seen.values())


def _not_nested(error: StrataError) -> Finding:
    return Finding(
        "ids-do-not-nest", "error", str(error),
        "A context lies in two parents, so its drift belongs to neither.",
        "Make ids unique over the whole step, and shuffle them together with their rows.",
    )  # fmt: skip


def _examine_recording(
    recording: Any, settings: Mapping[str, Any] | None, objective: Objective | None
) -> list[Finding]:
    found: list[Finding] = []
    if objective is None:
        try:
            objective = recording.objective()
        except FiberPOError as error:
            found.append(
                Finding(
                    "objective-refused", "warning", str(error),
                    "Drifts are shown against no budget.", "Name the objective.",
                )
            )  # fmt: skip
    known = {**recording.manifest.settings, **(settings or {})}
    host = HostSettings.read(known)
    if host.host:
        found += [f for f in examine_config(known, objective=objective) if f.code in OF_SETTINGS]
    evidence, refused = Evidence(objective), None
    for item in recording.iterate(_spread(recording.steps)):
        surrogates = []
        if objective is not None and refused is None:
            try:
                surrogates = [_quietly(objective, item.batch)]
            except FiberPOError as error:
                refused = error
                found.append(_unfit(error))
        evidence.add([item.batch], surrogates, prompts=item.prompts, generations=host.generations)
    if recording.problems:
        found.append(
            Finding(
                "recording-incomplete", "note", "; ".join(recording.problems[:3]) + ".",
                "Numbers here are those of the steps that could be read.",
                "Nothing, if the run was stopped; else look at the disk.",
                {"problems": list(recording.problems)},
            )
        )  # fmt: skip
    return ranked(_once([*found, *check(evidence, host)]))


def _unfit(error: FiberPOError) -> Finding:
    return Finding(
        "objective-refused", "error", str(error),
        "The objective cannot be evaluated on these steps: they lack what it looks at.",
        "Record the labels that it needs, or name another objective.",
    )  # fmt: skip


def _spread(steps: Sequence[int]) -> list[int]:
    """At most `MOST_STEPS` of them, first and last included, in runs of neighbours."""
    if len(steps) <= MOST_STEPS:
        return list(steps)
    # an odd stride, so that every place within a rollout comes up
    stride = -(-len(steps) // MOST_STEPS) | 1
    return sorted({*steps[::stride], steps[-1]})


def _examine_files(folder: Path) -> list[Finding]:
    """Of a run without a recording: what its metrics and its summary say."""
    found: list[Finding] = []
    try:
        text = (folder / SUMMARY_FILE).read_text()
        summary = json.loads(text)
        rows = summary.get("strata") or []
        found += budget_findings([_drift_row(row) for row in rows if row.get("budget")], set())
    except FileNotFoundError:
        found.append(
            Finding(
                "recording-incomplete", "note", f"{folder} has neither a recording nor a summary.",
                "Only its settings were looked at.", "Let the run end, or record it.",
            )
        )  # fmt: skip
    except (ValueError, AttributeError, TypeError, KeyError) as error:
        raise DataError(f"{folder / SUMMARY_FILE} is no summary of a run: {error!r}") from error
    return found


def _drift_row(row: Mapping[str, Any]) -> Drift:
    p90 = [float((row.get(c) or {}).get("p90") or 0.0) for c in ("drift_pos", "drift_neg")]
    limit = [float(x) for x in row["budget"]]
    return Drift(row["stratum"], row["context"], limit, (p90[0], p90[1]), 1 - float(row["pass"]))
