"""What a `Recorder` writes comes back, whole, joined over ranks, and continued after a resume."""

import dataclasses
import json
import math
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fiberpo
from fiberpo import RatioBatch, RecordingError, recipes
from fiberpo.masks import LengthNeutral, MaxDivergence, MeanDivergence
from fiberpo.recording import Recorder, open_recording
from fiberpo.recording.manifest import Manifest, describe
from fiberpo.stops import BudgetStop
from fiberpo.train.embedded import build_tokenizer
from recording.samples import SPECIFICATIONS, build, make, same, value_of

pytestmark = pytest.mark.filterwarnings("ignore::fiberpo.FiberPOWarning")


def read(path, **more):
    recording = open_recording(path)
    return {item.step: item for item in recording.iterate(**more)}


def write(path, steps=(1, 2, 3), **more):
    with Recorder(path, recipes.fiberpo(), **more) as recorder:
        for step in steps:
            recorder.record(step, make(step))
    return path


@given(specification=SPECIFICATIONS, more=st.booleans())
def test_everything_comes_back(tmp_path_factory, specification, more):
    """Columns, dtypes, labels, optional columns: bit for bit."""
    batch, path = build(**specification), tmp_path_factory.mktemp("recording")
    ids = torch.arange(len(batch)) + 2**20
    entropies, rewards = torch.arange(len(batch)) / 7, torch.arange(batch.rows) / 7
    prompts = [f"ü {i // 2}" for i in range(batch.rows)]
    with Recorder(path) as recorder:
        if more:
            recorder.record(
                7, batch, token_ids=ids, entropies=entropies, rewards=rewards, prompts=prompts
            )
        else:
            recorder.record(7, batch)
    recording = open_recording(path)
    assert (recording.steps, recording.tokens) == ([7], len(batch))
    assert recording.problems == []
    assert recording.manifest.complete
    (item,) = recording.iterate()
    same(item.batch, batch)
    if more:
        assert item.token_ids.tolist() == ids.tolist()
        assert item.entropies.tolist() == entropies.tolist()
        assert item.rewards.tolist() == rewards.tolist()
        assert item.prompts == prompts
    else:
        assert (item.token_ids, item.entropies, item.rewards, item.prompts) == (None,) * 4


@pytest.mark.parametrize("name", list(recipes.RECIPES))
def test_the_objective_comes_back(tmp_path, name):
    """Every recipe, with masks and corrections, says of the recorded batch what it said before."""
    needed = {"dr_grpo": {"length": 8}}
    objective = recipes.from_name(name, **needed.get(name, {}))
    batch = make(rollout_log_probs=make().old_log_probs - 0.02)
    for more in (
        {}, {"mask_max": 0.5}, {"mask_mean": 0.2, "correction": "tis"},
        {"correction": "tis", "correction_kwargs": {"limit": 5.0}},
    ):  # fmt: skip
        wanted = fiberpo.corrections.masked(objective, **more)
        with Recorder(tmp_path / str(len(more)), wanted, overwrite=True) as recorder:
            recorder.record(1, batch)
        recording = open_recording(tmp_path / str(len(more)))
        found = recording.objective()
        assert (found.name, found.gate_map, found.mask) == (name, wanted.gate_map, wanted.mask)
        assert (found.weights, found.factors) == (wanted.weights, wanted.factors)
        (item,) = recording.iterate()
        assert value_of(item.batch, found) == value_of(batch, wanted)


def test_parts_that_a_recipe_takes():
    """Masks combined, weights and budgets by name: through JSON and back."""
    mask = MaxDivergence(0.05) & MeanDivergence(0.001, "kl") & LengthNeutral(0.1, tv_max=0.5)
    objective = recipes.fiberpo_domain(
        {"domain": {"math": (0.2, math.inf), "*": (0.1, 0.05)}, "trajectory": (0.1, 0.05)},
        weights=fiberpo.Weights.domain_mean(), rollback={"domain": 3.0}, mask=mask,
    )  # fmt: skip
    text = json.dumps(describe(objective), allow_nan=False)
    assert Manifest(**json.loads(text)).build_objective() == objective


def test_stops_come_back():
    """Budgets per context, a pair of epsilons with one side open; a stop beside another recipe."""
    budgets = {"domain": {"math": (math.inf, 0.05), "*": (0.1, 0.05)}, "trajectory": (0.1, 0.05)}
    own = recipes.fiberstop(budgets, (0.2, math.inf), measure="token", weights="token_mean")
    beside = dataclasses.replace(recipes.grpo(), factors=(BudgetStop(budgets, (0.3, 0.2)),))
    for objective in (own, recipes.fiberstop(), beside):
        text = json.dumps(describe(objective), allow_nan=False)
        found = Manifest(**json.loads(text)).build_objective()
        assert found.factors == objective.factors
        assert (found.name, found.gate_map) == (objective.name, objective.gate_map)
        assert found.weights == objective.weights


def test_an_objective_of_its_own_is_named_and_not_rebuilt(tmp_path):
    """Not a recipe, or a parameter without a plain form."""
    plain = recipes.ppo()
    odd = fiberpo.Objective(plain.weights, plain.gate_map, name="mine", parameters={"x": object()})
    with Recorder(tmp_path, odd) as recorder:
        recorder.record(1, make())
    recording = open_recording(tmp_path)
    assert recording.manifest.objective == "mine"
    assert recording.objective() is None
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest.update(objective="ppo", parameters={"epsilon": -1})
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(RecordingError, match="epsilon"):
        open_recording(tmp_path).objective()


def test_micro_batches_and_padding(tmp_path):
    """Parts are one step; token columns may come as ``[B, T]`` rows with padding."""
    mask = torch.tensor([[True, True, False], [True, False, False]])
    rows = torch.arange(6.0).reshape(2, 3) / 10
    parts = [
        RatioBatch.from_padded(rows - 1, rows - 1.1, torch.ones(2), mask, labels={"group": [k, k]})
        for k in (1, 2)
    ]
    ids = torch.arange(6).reshape(2, 3)
    with Recorder(tmp_path) as recorder:
        recorder.record(
            1, parts, token_ids=[ids, ids + 10], entropies=[rows, rows], rewards=[[1, 2], [3, 4]]
        )
        recorder.record(2, parts[0], token_ids=ids)
    found = read(tmp_path)
    assert found[1].token_ids.tolist() == [0, 1, 3, 10, 11, 13]
    assert found[1].rewards.tolist() == [1, 2, 3, 4]
    assert found[1].batch.labels["group"].value_names() == ("1", "2")
    torch.testing.assert_close(found[1].entropies, torch.tensor([0, 0.1, 0.3] * 2))
    assert found[2].token_ids.tolist() == [0, 1, 3]


def test_what_takes_no_space(tmp_path):
    """Advantages constant on rows are kept per row; equal log-probs once."""
    batch = make(rows=400, rollout_log_probs=None)
    twin = RatioBatch.from_packed(
        batch.log_probs, batch.log_probs, batch.advantages, batch.lengths,
        rollout_log_probs=batch.log_probs,
    )  # fmt: skip
    sizes = {}
    for name, each in (("apart", batch), ("twin", twin)):
        with Recorder(tmp_path / name) as recorder:
            recorder.record(1, each)
        (shard,) = (tmp_path / name / "shards").iterdir()
        sizes[name] = {
            i.filename: i.file_size for i in zipfile.ZipFile(shard).infolist()
        }  # fmt: skip
    assert {"log_probs.npy", "old_log_probs.npy"} <= set(sizes["apart"])
    assert set(sizes["twin"]) == {"lengths.npy", "log_probs.npy", "advantages.npy", "header.npy"}
    assert sizes["twin"]["advantages.npy"] == 128 + 4 * batch.rows
    same(read(tmp_path / "twin")[1].batch, twin)


def test_shards_are_plain_npz(tmp_path):
    """numpy alone reads them, without pickle."""
    write(tmp_path, [5])
    with np.load(tmp_path / "shards" / "step-00000005.rank-0000.npz", allow_pickle=False) as found:
        np.testing.assert_array_equal(found["log_probs"], make(5).log_probs.numpy())
    columns = json.loads((tmp_path / "manifest.json").read_text())["columns"]
    assert columns["log_probs"] == {"dtype": "float32", "unit": "nats", "per": "token"}
    assert columns["label.group"]["per"] == "row"


def test_ranks_are_joined(tmp_path):
    """Rows of all ranks, contexts by their own ids; a rank may be empty."""
    whole = make(3, rows=6)
    parts = [whole.select(torch.arange(0, 3)), whole.select(torch.arange(3, 6))]
    for rank, part in enumerate(parts):
        recorder = Recorder(tmp_path, rank=rank, ranks=2)
        recorder.record(1, part)
        recorder.close()
    same(read(tmp_path)[1].batch, RatioBatch.concatenate(parts))
    assert read(tmp_path)[1].batch.labels["group"].count == 3
    assert open_recording(tmp_path).problems == []
    (tmp_path / "shards" / "step-00000001.rank-0001.npz").unlink()
    recording = open_recording(tmp_path)
    assert "shards of 1 of 2 ranks" in recording.problems[-1]
    assert [len(i.batch) for i in recording.iterate()] == [len(parts[0])]


def test_a_rank_may_hold_nothing(tmp_path):
    """An empty shard beside a full one; a step with nothing at all is skipped with a note."""
    nothing = RatioBatch.from_packed(
        torch.zeros(0), torch.zeros(0), torch.zeros(0), [], labels={"group": []}, allow_empty=True
    )
    batch = make(labels=["group"])
    for rank, parts in enumerate(([batch, nothing], [nothing, nothing])):
        with Recorder(tmp_path, rank=rank, ranks=2) as recorder:
            for step, part in enumerate(parts):
                recorder.record(step, part)
    recording = open_recording(tmp_path)
    (item,) = recording.iterate()
    same(item.batch, batch)
    assert recording.problems == ["step 1 has no loss token and was skipped"]


def test_text(tmp_path):
    """Token ids become text with the tokenizer that was recorded, without any other file."""
    tokenizer = build_tokenizer()
    batch = make(rows=2)
    ids = tokenizer("sum 12+3=")["input_ids"]
    ids = torch.tensor((ids * len(batch))[: len(batch)])
    for name, kept in (("fast", tokenizer), ("none", None), ("slow", _Slow(tokenizer))):
        with Recorder(tmp_path / name, tokenizer=kept) as recorder:
            recorder.record(1, batch, token_ids=ids)
    first = int(batch.lengths[0])
    item = read(tmp_path / "fast")[1]
    assert item.text(0) == [tokenizer.decode([i]) for i in ids[:first].tolist()]
    assert item.text(1) == [tokenizer.decode([i]) for i in ids[first:].tolist()]
    assert read(tmp_path / "none")[1].text(0) is None
    assert read(tmp_path / "slow")[1].text(0) == [
        tokenizer.convert_ids_to_tokens(i) for i in ids[:first].tolist()
    ]
    with pytest.raises(RecordingError, match="row 2 of 2"):
        item.text(2)
    (tmp_path / "fast" / "tokenizer.json").write_text("{")
    recording = open_recording(tmp_path / "fast")
    assert next(recording.iterate()).text(0) is None
    assert "tokenizer.json cannot be read" in recording.problems[0]


class _Slow:
    """A tokenizer of Python alone."""

    def __init__(self, tokenizer):
        self.get_vocab = tokenizer.get_vocab


# ------------------------------------------------------------------------- resume and refusals


def test_resume_replaces_what_came_after_the_checkpoint(tmp_path):
    """Killed after step 5, resumed from the checkpoint of step 3."""
    recorder = Recorder(tmp_path, recipes.fiberpo())
    for step in range(1, 6):
        recorder.record(step, make(step))
    again = Recorder(tmp_path, recipes.fiberpo())
    again.record(4, make(40))
    assert open_recording(tmp_path).steps == [1, 2, 3, 4]
    again.record(5, make(50))
    again.close()
    found = read(tmp_path)
    assert open_recording(tmp_path).manifest.complete
    for step, seed in ((3, 3), (4, 40), (5, 50)):
        same(found[step].batch, make(seed))
    marker = json.loads((tmp_path / "complete.rank-0000.json").read_text())
    assert marker["steps"] == 5
    with Recorder(tmp_path, recipes.fiberpo(), resume=True) as more:
        more.record(6, make(6))
    assert open_recording(tmp_path).steps == [1, 2, 3, 4, 5, 6]


def test_overwrite(tmp_path):
    """A run of fewer ranks replaces one of more; nothing of it is left."""
    for rank in (0, 1):
        with Recorder(tmp_path, rank=rank, ranks=2) as recorder:
            recorder.record(8, make(rank))
    with Recorder(tmp_path, recipes.ppo(), overwrite=True) as recorder:
        recorder.record(1, make(5))
    recording = open_recording(tmp_path)
    assert (recording.steps, recording.problems) == ([1], [])
    assert recording.manifest.objective == "ppo"


def test_refusals_of_a_recorder(tmp_path):
    """Each says what is there and what to do."""
    write(tmp_path / "a")
    (tmp_path / "file").write_text("x")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("x")
    for path, more, said in (
        (tmp_path / "a", {}, "steps 1 to 3.*overwrite=True.*resume=True"),
        (tmp_path / "a", {"host": "elsewhere"}, "another run.*host"),
        (tmp_path / "file", {}, "is a file"),
        (tmp_path / "other", {}, "not empty"),
        (tmp_path / "b", {"rank": 2, "ranks": 2}, "rank is 2 of 2"),
    ):
        with pytest.raises(RecordingError, match=said):
            Recorder(path, recipes.fiberpo(), **more)
    with pytest.raises(RecordingError, match="objective was 'fiberpo' and is 'ppo'"):
        Recorder(tmp_path / "a", recipes.ppo(), resume=True)
    unfinished = Recorder(tmp_path / "c")
    unfinished.record(3, make())
    with pytest.raises(RecordingError, match="steps 3 to 3"):
        Recorder(tmp_path / "c", resume=False)
    with pytest.raises(RecordingError, match="would replace them all"):
        Recorder(tmp_path / "c").record(3, make())


@pytest.mark.parametrize(
    ("step", "more", "said"),
    [
        (3, {}, "step 3 comes after step 3"),
        (2, {}, "step 2 comes after step 3"),
        (-1, {}, "step is -1"),
        (4.0, {}, "step is 4.0"),
        (4, {"token_ids": torch.zeros(2)}, "token_ids has 2 values for the 15 loss tokens"),
        (4, {"rewards": torch.zeros(7)}, "rewards has 7 values for the 6 rows with a loss token"),
        (4, {"prompts": ["a"]}, "1 prompts for the 6 rows"),
    ],
)
def test_refusals_of_record(tmp_path, step, more, said):
    """Nothing is written."""
    recorder = Recorder(tmp_path)
    recorder.record(3, make())
    assert len(make()) == 15
    with pytest.raises(RecordingError, match=said):
        recorder.record(step, make(), **more)
    assert open_recording(tmp_path).steps == [3]
    recorder.close()
    with pytest.raises(RecordingError, match="closed"):
        recorder.record(9, make())


def test_nothing_of_no_batch(tmp_path):
    """An empty list of parts."""
    with pytest.raises(RecordingError, match="step 1 has no batch"):
        Recorder(tmp_path).record(1, [])


def test_an_exception_leaves_no_completion_marker(tmp_path):
    """The block was left by an error: what is there is readable, and said to be unfinished."""

    def broken():
        with Recorder(tmp_path) as recorder:
            recorder.record(1, make())
            raise KeyError

    with pytest.raises(KeyError):
        broken()
    recording = open_recording(tmp_path)
    assert not recording.manifest.complete
    assert "did not close" in recording.problems[0]


def test_steps_can_be_chosen(tmp_path):
    """In rising order; one that is not there is refused."""
    write(tmp_path, range(5, 9))
    assert list(read(tmp_path, steps=[8, 6])) == [6, 8]
    with pytest.raises(RecordingError, match="no step 9; it has 4 steps, 5 to 8"):
        read(tmp_path, steps=[9])


def test_a_run_directory_leads_to_its_recording(tmp_path):
    """``open_recording(RUN)`` and the manifest itself."""
    write(tmp_path / "recording")
    for path in (tmp_path, str(tmp_path), tmp_path / "recording" / "manifest.json"):
        assert open_recording(path).steps == [1, 2, 3]


def test_attempt_warns_and_goes_on(tmp_path, caplog, monkeypatch):
    """A step that cannot be recorded is left out; a full disk ends the recording."""
    recorder = Recorder(tmp_path)
    recorder.attempt(1, lambda: {"batch": make(1)})
    recorder.attempt(2, lambda: {"batch": []})
    recorder.attempt(3, lambda: {"batch": make(3)})
    assert "step 2 is not in the recording: step 2 has no batch" in caplog.text

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    recorder.attempt(4, lambda: {"batch": make(4)})
    assert "RECORDING STOPPED at step 4" in caplog.text
    monkeypatch.undo()
    recorder.attempt(5, lambda: {"batch": make(5)})
    assert open_recording(tmp_path).steps == [1, 3]


def test_columns_of_a_native_recording_are_known(tmp_path):
    """Names for them are refused, not ignored."""
    write(tmp_path / "a")
    with pytest.raises(RecordingError, match="was written by fiberpo, whose columns are known"):
        open_recording(tmp_path / "a", columns={"domain": "task"})
