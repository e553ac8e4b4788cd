"""Killed at any moment, cut short, bits flipped: what is whole is read, the rest is named."""

import json
import os
import signal
import sys

import pytest

from fiberpo import RecordingError, recipes
from fiberpo.recording import Recorder, open_recording
from fiberpo.train.embedded import build_tokenizer
from recording.samples import make, same

pytestmark = pytest.mark.filterwarnings("ignore::fiberpo.FiberPOWarning")

TOKENIZER = build_tokenizer()
BATCHES = {step: make(step) for step in (1, 2, 3)}


def run(path, objective=None):
    """A short run that records."""
    with Recorder(path, objective or recipes.fiberpo(), tokenizer=TOKENIZER) as recorder:
        for step, batch in BATCHES.items():
            recorder.record(step, batch)


def killed(path, moment):
    """``run`` in a process that kills itself at its ``moment``-th call; whether it did."""
    child = os.fork()
    if child == 0:
        left = moment

        def count(frame, event, argument):
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        try:
            objective = recipes.fiberpo()
            sys.setprofile(count)  # calls of Python and of C: writes, syncs, renames
            run(path, objective)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # fork, from Python 3.12 on
def test_a_kill_at_any_moment_leaves_a_readable_recording(tmp_path):
    """Whole steps in front, nothing else; and the run can be resumed."""
    calls = 1
    while killed(tmp_path / f"size-{calls}", calls):
        calls *= 2
    found = set()
    for moment in range(1, calls, max(1, calls // 60)):
        path, steps = tmp_path / str(moment), []
        if not killed(path, moment):
            break
        try:
            recording = open_recording(path)
        except RecordingError:  # before its first step
            assert not list(path.glob("shards/step*"))
        else:
            steps = recording.steps
            for item in recording.iterate():
                same(item.batch, BATCHES[item.step])
            if not recording.manifest.complete:
                assert len(recording.problems) == 1
                assert "did not close" in recording.problems[0]
            else:
                assert (steps, recording.problems) == ([1, 2, 3], [])
        assert steps == list(range(1, len(steps) + 1))
        found.add(len(steps))
        with Recorder(path, recipes.fiberpo(), resume=True) as again:
            again.record(len(steps) + 1, BATCHES[1])
        assert open_recording(path).manifest.complete
        assert open_recording(path).steps == list(range(1, len(steps) + 2))
        assert not list(path.rglob(".*"))
    assert found == set(range(4))


@pytest.fixture
def whole(tmp_path):
    run(tmp_path)
    return tmp_path


def shard(path, step=2):
    return path / "shards" / f"step-{step:08d}.rank-0000.npz"


def test_a_flipped_bit_is_noticed_wherever_it_is(whole):
    """The step is skipped with a message, or not a single value has changed."""
    data = shard(whole).read_bytes()
    skipped = 0
    for place in range(0, len(data), 7):
        torn = bytearray(data)
        torn[place] ^= 1 << place % 8
        shard(whole).write_bytes(torn)
        recording = open_recording(whole)
        found = {item.step: item for item in recording.iterate(steps=[2])}
        for step, item in found.items():
            same(item.batch, make(step))
        if 2 not in found:
            skipped += 1
            assert "step-00000002.rank-0000.npz is torn" in recording.problems[-1]
            assert "was skipped" in recording.problems[-1]
    assert skipped > 0.7 * len(data) / 7


@pytest.mark.parametrize("index", [True, False])
def test_a_shard_that_is_cut_short(whole, index):
    """Known from its size in the index, or from the shard itself."""
    data = shard(whole).read_bytes()
    if not index:
        (whole / "index.rank-0000.jsonl").unlink()
    for size in [0, 1, *range(2, len(data), 211), len(data) - 1]:
        shard(whole).write_bytes(data[:size])
        recording = open_recording(whole)
        assert [item.step for item in recording.iterate()] == [1, 3]
        (problem,) = recording.problems
        assert "step-00000002.rank-0000.npz is torn" in problem
    assert recording.tokens == len(make(1)) + len(make(3))


def test_a_shard_that_is_gone(whole):
    """The index remembers it."""
    shard(whole).unlink()
    recording = open_recording(whole)
    assert recording.steps == [1, 3]
    assert recording.problems == [
        "step-00000002.rank-0000.npz is missing, though the index names it"
    ]


def test_an_index_that_is_torn(whole):
    """Shards speak for themselves."""
    index = whole / "index.rank-0000.jsonl"
    lines = index.read_bytes().splitlines()
    index.write_bytes(lines[0] + b'\n{"file": "step-0000\n[]\n' + lines[2][:20])
    recording = open_recording(whole)
    assert recording.steps == [1, 2, 3]
    assert recording.tokens == sum(len(make(s)) for s in (1, 2, 3))
    assert recording.problems == []


def test_leftovers_are_not_read(whole):
    """Temporary files, and files of ranks that the manifest does not know."""
    data = shard(whole).read_bytes()
    (whole / "shards" / ".step-00000009.rank-0000.npz.77.tmp").write_bytes(data)
    (whole / "shards" / "step-00000009.rank-0003.npz").write_bytes(data)
    assert open_recording(whole).steps == [1, 2, 3]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"", "is damaged"),
        (b'{"format": "fiberpo recording", "sch', "is damaged"),
        (b"\xff\xfe", "is damaged"),
        (b"[1]", "not the manifest of a recording"),
        (b'{"schema": 1}', "not the manifest of a recording"),
        (b'{"format": "fiberpo recording", "schema": "x"}', "schema 'x'"),
        (
            b'{"format": "fiberpo recording", "schema": 2, "fiberpo": "9.9"}',
            "schema 2, and this program reads up to 1: it was written by fiberpo 9.9; update",
        ),
        (b'{"format": "fiberpo recording", "schema": 1, "settings": 3}', "'settings' must be"),
    ],
)
def test_a_manifest_that_cannot_be_used(whole, text, said):
    """Damaged, foreign, or of a newer program."""
    (whole / "manifest.json").write_bytes(text)
    with pytest.raises(RecordingError, match=said):
        open_recording(whole)


def test_fields_of_a_later_minor_version_are_ignored(whole):
    """Same schema, one more key."""
    values = json.loads((whole / "manifest.json").read_text())
    (whole / "manifest.json").write_text(json.dumps({**values, "later": 1}))
    assert open_recording(whole).steps == [1, 2, 3]


def test_ranks_that_do_not_go_together(tmp_path):
    """Integer groups on one rank, strings on the other."""
    from fiberpo import RatioBatch

    batch = make(labels=["group"])
    words = RatioBatch.from_packed(
        batch.log_probs, batch.old_log_probs, batch.advantages, batch.lengths,
        labels={"group": [f"g{i}" for i in range(batch.rows)]},
    )  # fmt: skip
    for rank, part in enumerate((batch, words)):
        with Recorder(tmp_path, rank=rank, ranks=2) as recorder:
            recorder.record(1, part)
    recording = open_recording(tmp_path)
    assert list(recording.iterate()) == []
    assert "ranks of step 1 do not go together" in recording.problems[0]


def test_nothing_there(tmp_path):
    """No path, an empty directory, a recording before its first step."""
    with pytest.raises(RecordingError, match="does not exist"):
        open_recording(tmp_path / "nowhere")
    with pytest.raises(RecordingError, match="holds nothing"):
        open_recording(tmp_path)
    Recorder(tmp_path).close(complete=False)
    with pytest.raises(RecordingError, match="no whole step yet"):
        open_recording(tmp_path)


def test_a_manifest_that_is_gone(whole):
    """Neither called an unrecorded run nor read as a foreign file of rows."""
    (whole / "manifest.json").unlink()
    with pytest.raises(RecordingError, match=r"shards of a recording, but no manifest\.json"):
        open_recording(whole)


def test_many_shards_that_are_gone(whole):
    """Three are named, the others counted."""
    for step in range(4, 9):
        with (whole / "index.rank-0000.jsonl").open("a") as file:
            name = f"step-{step:08d}.rank-0000.npz"
            entry = {"file": name, "step": step, "rows": 1, "tokens": 1, "bytes": 9}
            file.write(json.dumps(entry) + "\n")
    for shard in whole.rglob("*.npz"):
        shard.unlink()
    with pytest.raises(RecordingError, match=r"; and 5 more\)") as error:
        open_recording(whole)
    assert str(error.value).count("is missing") == 3


def test_a_directory_whose_name_is_not_utf8(tmp_path):
    """Its tokenizer is read all the same."""
    path = tmp_path / os.fsdecode(b"run-\xff")
    run(path)
    recording = open_recording(path)
    assert recording.problems == []
    assert next(recording.iterate()).batch.rows
