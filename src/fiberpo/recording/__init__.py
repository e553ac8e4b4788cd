"""Recordings: what a trainer optimised, step by step, kept for replay, diagnosis and reports.

    with Recorder("runs/mine/recording", objective) as recorder:
        recorder.record(step, batch)                       # one call per optimizer step

    for item in open_recording("runs/mine").iterate():
        item.step, item.batch                              # a RatioBatch again

Files are plain arrays and JSON, never pickle. The format is in ``docs/recording.md``.
"""

from .manifest import Manifest
from .reader import RUN_FOLDER, RecordedStep, Recording, open_recording
from .writer import Recorder

__all__ = [
    "RUN_FOLDER", "Manifest", "RecordedStep", "Recorder", "Recording", "open_recording",
]  # fmt: skip
