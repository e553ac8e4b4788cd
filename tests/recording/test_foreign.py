"""Files of other trainers: read as the batch that their rows describe, or refused in words."""

import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from fiberpo import RatioBatch, RecordingError
from fiberpo.recording import files, foreign, open_recording
from recording.samples import same

pytestmark = pytest.mark.filterwarnings("ignore::fiberpo.FiberPOWarning")

TRL = {
    "log_probs": "per_token_logps", "old_log_probs": "old_per_token_logps",
    "mask": "completion_mask", "advantages": "advantages", "token_ids": "completion_ids",
    "rewards": "reward", "domain": "task", "group": "prompt_id", "prompts": "prompt",
}  # fmt: skip
VERL = {
    "log_probs": "log_prob", "old_log_probs": "old_log_prob", "mask": "response_mask",
    "rollout_log_probs": "rollout_log_probs", "advantages": "advantages",
    "token_ids": "responses", "rewards": "score", "domain": "data_source", "group": "uid",
    "step": "global_step",
}  # fmt: skip
OURS = {name: name for name in (*VERL, "trajectory", "turn", "entropies", "prompts")}
KINDS = {"trl": TRL, "verl": VERL, "ours": OURS}


def make_rows(count=12, seed=0, masked=True):
    """Rows of Python values by our names; answers of 1 to 5 tokens, some masked."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        size = int(rng.integers(1, 6))
        old = rng.normal(-1, 0.3, size)
        mask = (rng.random(size) < 0.7).astype(int) if masked else np.ones(size, dtype=int)
        rows.append(
            {
                "log_probs": (old + rng.normal(0, 0.1, size)).tolist(),
                "old_log_probs": old.tolist(), "rollout_log_probs": (old - 0.01).tolist(),
                "mask": mask.tolist(), "advantages": float(rng.normal()),
                "token_ids": rng.integers(0, 99, size).tolist(), "rewards": float(i),
                "entropies": rng.random(size).tolist(), "turn": [t // 2 for t in range(size)],
                "domain": ("math", "code")[i // 4 % 2], "group": f"g{i // 2}",
                "trajectory": i, "prompts": f"prompt {i // 2}", "step": i // 4,
            }
        )  # fmt: skip
    return rows


def expected(rows, names):
    """The batch of some rows, with plain loops."""
    columns = {n: [] for n in ("log_probs", "old_log_probs", "rollout_log_probs", "turn", "ids")}
    lengths, kept = [], []
    for row in rows:
        places = [t for t, m in enumerate(row["mask"]) if m] if "mask" in names else range(
            len(row["log_probs"])
        )  # fmt: skip
        lengths.append(len(places))
        if places:
            kept.append(row)
        for name in columns:
            columns[name] += [row["token_ids" if name == "ids" else name][t] for t in places]
    tensors = {n: torch.tensor(v, dtype=torch.float64) for n, v in columns.items()}
    labels = {n: [row[n] for row in rows] for n in ("domain", "group", "trajectory") if n in names}
    if "turn" in names:
        labels["turn"] = tensors["turn"].long()
    rollout = tensors["rollout_log_probs"] if "rollout_log_probs" in names else None
    advantages = [row["advantages"] for row, n in zip(rows, lengths, strict=True) for _ in range(n)]
    batch = RatioBatch.from_packed(
        tensors["log_probs"], tensors["old_log_probs"],
        torch.tensor(advantages, dtype=torch.float64), lengths, labels=labels,
        rollout_log_probs=rollout,
    )  # fmt: skip
    return batch, tensors["ids"].tolist(), kept


def renamed(rows, names):
    return [{theirs: row[ours] for ours, theirs in names.items()} for row in rows]


def write(path, rows):
    """Parquet or JSONL, by the suffix."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=5)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def check(recording, rows, names):
    steps = sorted({row["step"] for row in rows}) if "step" in names else [0]
    assert recording.steps == steps
    items = list(recording.iterate())
    assert [item.step for item in items] == steps
    for item in items:
        mine = [row for row in rows if row["step"] == item.step] if "step" in names else rows
        batch, ids, kept = expected(mine, names)
        same(item.batch, batch)
        assert item.token_ids.tolist() == ids
        assert item.rewards.tolist() == [row["rewards"] for row in kept]
        if "prompts" in names:
            assert item.prompts == [row["prompts"] for row in kept]


@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
@pytest.mark.parametrize("kind", KINDS)
def test_one_row_a_trajectory(tmp_path, monkeypatch, kind, suffix, small):
    """List columns by the names of TRL, verl and ours; read at once or a few rows at a time."""
    if small:
        monkeypatch.setattr(files, "READ", 7)
        monkeypatch.setattr(files, "READ_BYTES", 700)
    rows = make_rows()
    path = write(tmp_path / f"run.{suffix}", renamed(rows, KINDS[kind]))
    recording = open_recording(path)
    check(recording, rows, KINDS[kind])
    assert recording.problems == []
    assert recording.objective() is None
    tokens = sum(len(row["log_probs"]) for row in rows)
    assert recording.tokens == pytest.approx(tokens, rel=0.01)
    assert recording.manifest.columns["log_probs"]["unit"] == "nats"
    assert "label.group" in recording.manifest.columns


@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_one_row_a_token(tmp_path, monkeypatch, suffix, small):
    """Runs of a trajectory id are rows, also where a read ends in the middle of one."""
    if small:
        monkeypatch.setattr(files, "READ", 4)
        monkeypatch.setattr(files, "READ_BYTES", 900)
    rows = make_rows()
    tokens = []
    for row in rows:
        for t in range(len(row["log_probs"])):
            tokens.append({n: v[t] if isinstance(v, list) else v for n, v in row.items()})
    recording = open_recording(write(tmp_path / f"run.{suffix}", renamed(tokens, OURS)))
    check(recording, rows, OURS)
    some = [item.step for item in recording.iterate(steps=[1])]
    assert some == [1]
    without = [{k: v for k, v in t.items() if k != "trajectory"} for t in tokens]
    with pytest.raises(RecordingError, match=r"which trajectory .* trajectory_id, rollout_id"):
        list(open_recording(write(tmp_path / f"b.{suffix}", without)).iterate())


def test_files_are_steps(tmp_path):
    """By the number in their names, or in the order of names; ranks of one step are joined."""
    rows = make_rows()
    numbered = tmp_path / "numbered"
    numbered.mkdir()
    for step, name in ((10, "step_10"), (9, "global_step_9"), (2, "2")):
        write(numbered / f"{name}.jsonl", renamed(rows[step : step + 2], TRL))
    recording = open_recording(numbered)
    assert recording.steps == [2, 9, 10]
    for item in recording.iterate():
        same(item.batch, expected(rows[item.step : item.step + 2], TRL)[0])
    named = tmp_path / "named"
    named.mkdir()
    for i, name in enumerate(("b", "a")):
        write(named / f"{name}.parquet", renamed(rows[i : i + 1], TRL))
    first, second = open_recording(named).iterate()
    assert (first.step, second.step) == (0, 1)
    same(first.batch, expected(rows[1:2], TRL)[0])


# ------------------------------------------------------------------------------------- prime-rl


def prime_rl(root, steps=2, ranks=2):
    """Files as its token exporter writes them: whole sequences, prompts included."""
    rng = np.random.default_rng(1)
    written = {}
    for step in range(steps):
        folder = root / "token_exports" / f"step_{step}"
        folder.mkdir(parents=True)
        (folder / "STABLE").touch()
        for rank in range(ranks):
            lines = []
            for i in range(3):
                size = int(rng.integers(3, 7))
                mask = [False, False] + [True] * (size - 2)
                logprobs = rng.normal(-1, 0.2, size).astype(np.float32).astype(float).tolist()
                lines.append(
                    {
                        "schema_version": 1, "step": step + 5, "export_step": step, "rank": rank,
                        "micro_step": 0, "micro_sequence_idx": i, "run_id": None,
                        "export_sequence_idx": i, "env_name": ("math", "code")[rank],
                        "token_ids": rng.integers(0, 99, size).tolist(),
                        "position_ids": list(range(size)), "loss_mask": mask,
                        "advantages": [float(i - 1)] * size, "rewards": [float(i)] * size,
                        "inference_logprobs": [x - 0.01 for x in logprobs],
                        "trainer_logprobs": [None, *logprobs[1:]], "entropy": [0.5] * size,
                        "mismatch_kl": [0.0] * size, "is_masked": [None] * size,
                    }
                )  # fmt: skip
            written[step, rank] = lines
            text = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines)
            (folder / f"rank_{rank}.jsonl").write_text(text)
    return written


def test_prime_rl(tmp_path):
    """Log-probs of trainer and engine, environments as domains; the anchor is the engine."""
    written = prime_rl(tmp_path)
    for path in (tmp_path, tmp_path / "token_exports"):
        recording = open_recording(path)
        assert recording.manifest.host == "prime-rl"
        assert recording.steps == [0, 1]
        (problem,) = recording.problems
        assert "'inference_logprobs') are taken for the anchor" in problem
        for item in recording.iterate():
            lines = written[item.step, 0] + written[item.step, 1]
            wanted = {
                name: [x for line in lines for x in line[name][2:]]
                for name in ("trainer_logprobs", "inference_logprobs", "token_ids", "advantages")
            }
            batch = item.batch
            assert batch.log_probs.tolist() == wanted["trainer_logprobs"]
            assert batch.old_log_probs.tolist() == wanted["inference_logprobs"]
            assert batch.rollout_log_probs.tolist() == wanted["inference_logprobs"]
            assert batch.advantages.tolist() == wanted["advantages"]
            assert item.token_ids.tolist() == wanted["token_ids"]
            assert item.rewards.tolist() == [line["rewards"][0] for line in lines]
            assert batch.labels["domain"].value_names() == ("code", "math")
            assert batch.rows == 6
    (tmp_path / "token_exports" / "step_1" / "STABLE").unlink()
    assert "step_1 has no STABLE marker" in open_recording(tmp_path).problems[-1]


def test_prime_rl_cut_short(tmp_path):
    """A rank that was killed while it wrote a line."""
    written = prime_rl(tmp_path)
    torn = tmp_path / "token_exports" / "step_1" / "rank_1.jsonl"
    torn.write_bytes(torn.read_bytes()[:-30])
    recording = open_recording(tmp_path)
    rows = {item.step: item.batch.rows for item in recording.iterate()}
    assert rows == {0: 6, 1: 5}
    assert "rank_1.jsonl: line 3, the last, is cut short and was skipped" in recording.problems
    torn.write_bytes(b"")
    recording = open_recording(tmp_path)
    assert {item.step: item.batch.rows for item in recording.iterate()} == {0: 6, 1: 3}
    assert any("has no row and was skipped" in p for p in recording.problems)
    assert len(written) == 4


# ---------------------------------------------------------------------------------- large steps


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_a_step_too_large_for_memory_comes_in_pieces(tmp_path, monkeypatch, suffix):
    """Cut between groups; nothing is lost, nothing comes twice."""
    monkeypatch.setattr(foreign, "CHUNK", 20)
    monkeypatch.setattr(files, "READ", 7)
    monkeypatch.setattr(files, "READ_BYTES", 500)
    rows = make_rows(40, masked=False)
    names = {k: v for k, v in OURS.items() if k != "step"}
    recording = open_recording(write(tmp_path / f"run.{suffix}", renamed(rows, names)))
    items = list(recording.iterate())
    assert len(items) > 4
    assert [item.chunk for item in items] == list(range(len(items)))
    assert {item.step for item in items} == {0}
    groups = [set(item.batch.labels["group"].value_names()) for item in items]
    assert sum(map(len, groups)) == len(set().union(*groups)) == 20
    whole, ids, _ = expected(rows, names)
    assert [x for i in items for x in i.batch.log_probs.tolist()] == whole.log_probs.tolist()
    assert [x for i in items for x in i.token_ids.tolist()] == ids
    assert "comes in pieces" in recording.problems[0]


# ------------------------------------------------------------------------------------- refusals


def test_columns_that_are_missing_or_double(tmp_path):
    """What was looked for, what is there, how to say it; and saying it."""
    rows = make_rows()
    for suffix in ("parquet", "jsonl"):
        for gone in ("log_probs", "old_log_probs", "advantages"):
            names = {k: v for k, v in TRL.items() if k != gone}
            path = write(tmp_path / f"{gone}.{suffix}", renamed(rows, names))
            with pytest.raises(RecordingError) as caught:
                open_recording(path)
            said = str(caught.value)
            assert f"no column for {gone}: looked for" in said
            assert TRL[gone] in said
            assert "prompt_id" in said
        names = {**TRL, "log_probs": "lp"}
        path = write(tmp_path / f"named.{suffix}", renamed(rows, names))
        check(open_recording(path, columns={"log_probs": "lp"}), rows, names)
        for columns, match in (
            ({"log_probs": "nope"}, "no column 'nope' for log_probs; it has"),
            ({"logprobs": "lp"}, "columns names 'logprobs'; it takes log_probs"),
        ):
            with pytest.raises(RecordingError, match=match):
                open_recording(path, columns=columns)
        both = [{**row, "data_source": "x"} for row in renamed(rows, TRL)]
        path = write(tmp_path / f"both.{suffix}", both)
        with pytest.raises(RecordingError, match=r"'data_source'.*'task'.*columns="):
            open_recording(path)
        check(open_recording(path, columns={"domain": "task"}), rows, TRL)


def refuse(tmp_path, change, said, names=TRL, suffix="parquet"):
    rows = make_rows()
    change(rows)
    path = write(tmp_path / f"x.{suffix}", renamed(rows, names))
    with pytest.raises(RecordingError, match=said):
        list(open_recording(path).iterate())


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_values_that_make_no_batch(tmp_path, suffix):
    """Each message names file, row or step, and the value."""

    def with_row(**values):
        return lambda rows: rows[3].update(values)

    refuse(
        tmp_path, with_row(old_log_probs=[0.0] * 9), "row 3: 'old_per_token_logps' has 9 values",
        suffix=suffix,
    )  # fmt: skip
    refuse(tmp_path, with_row(mask=[1] * 9), "row 3: the mask .* has 9 values", suffix=suffix)
    refuse(
        tmp_path, with_row(log_probs=[None, 1.0], mask=[1, 1], old_log_probs=[1.0, 1.0]),
        "step 0.*log_probs.*nan", suffix=suffix,
    )  # fmt: skip
    refuse(tmp_path, lambda rows: rows[5].update(group="g0"), "step 0: .*g0", suffix=suffix)
    refuse(
        tmp_path, lambda rows: [r.update(log_probs="x") for r in rows], "must be a list of numbers",
        suffix=suffix,
    )  # fmt: skip
    refuse(
        tmp_path, lambda rows: [r.update(old_log_probs=1.0) for r in rows],
        "holds double, but 'per_token_logps' is a list", suffix=suffix,
    )  # fmt: skip
    refuse(
        tmp_path, lambda rows: rows.reverse(), "step 1 comes after step 2; sort the rows by step",
        VERL, suffix,
    )  # fmt: skip


def test_ids_of_another_length_are_left_out(tmp_path):
    """Token ids with the prompt in front: said, and the rest is read."""
    rows = make_rows()
    for row in rows:
        row["token_ids"] = [1, 2, *row["token_ids"]]
    recording = open_recording(write(tmp_path / "x.parquet", renamed(rows, TRL)))
    (item,) = recording.iterate()
    assert item.token_ids is None
    same(item.batch, expected(rows, TRL)[0])
    assert "'completion_ids' is left out" in recording.problems[0]


def test_chats_are_prompts(tmp_path):
    """TRL's conversational prompts."""
    rows = make_rows(masked=False)
    for row in rows:
        row["prompts"] = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    for suffix in ("parquet", "jsonl"):
        recording = open_recording(write(tmp_path / f"x.{suffix}", renamed(rows, TRL)))
        assert next(recording.iterate()).prompts == ["s\nu"] * 12


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("x.parquet", b"", "is empty"),
        ("x.parquet", b"PAR1 and then nothing", "is not a whole parquet file"),
        ("x.jsonl", b"", "has no row"),
        ("x.jsonl", b"\n\n", "has no row"),
        ("x.jsonl", b"{}\n", "no column for log_probs.*it has none"),
        ("x.jsonl", b"[1, 2]\n", "line 1: not a JSON object: '.1, 2.'"),
        ("x.jsonl", b'{"a": 1\n{"a": 2}\n', "line 1: not a JSON object"),
        ("x.jsonl", b"\x80\x00\xff\n", "line 1: not a JSON object"),
        ("x.pt", b"\x80\x02", "Pickled files are never read"),
        ("x.csv", b"a,b\n", "files are read with the suffixes .parquet"),
    ],
)
def test_files_that_are_none(tmp_path, name, data, said):
    """Empty, cut short, foreign, pickled."""
    (tmp_path / name).write_bytes(data)
    with pytest.raises(RecordingError, match=said):
        open_recording(tmp_path / name)


def test_parquet_that_is_cut_short(tmp_path):
    """Alone it is refused; among others it is skipped with a message."""
    data = write(tmp_path / "a.parquet", renamed(make_rows(), TRL)).read_bytes()
    (tmp_path / "b.parquet").write_bytes(data[:-100])
    with pytest.raises(RecordingError, match=r"b\.parquet is not a whole parquet file"):
        open_recording(tmp_path / "b.parquet")
    recording = open_recording(tmp_path)
    assert len(list(recording.iterate())) == 1
    assert "b.parquet is not a whole parquet file" in recording.problems[0]
    assert "was skipped" in recording.problems[0]


def test_a_run_that_was_not_recorded(tmp_path):
    """Its metrics are no recording."""
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train"}\n')
    with pytest.raises(RecordingError, match="run without a recording; train with --record"):
        open_recording(tmp_path)
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "notes.txt").touch()
    with pytest.raises(RecordingError, match=r"it holds notes\.txt\. A recording is"):
        open_recording(tmp_path)


@pytest.mark.parametrize("name", ["/dev/null", "pipe"])
def test_devices_and_pipes_are_none(tmp_path, name):
    """Neither is opened: a read of a pipe would wait for ever."""
    path = tmp_path / name
    if name == "pipe":
        os.mkfifo(path)
    with pytest.raises(RecordingError, match="neither a file nor a directory, but a device"):
        open_recording(path)


def test_steps_that_are_no_numbers(tmp_path):
    """The column is named."""
    rows = [{**row, "step": "first"} for row in renamed(make_rows(), TRL)]
    path = write(tmp_path / "x.jsonl", rows)
    with pytest.raises(RecordingError, match=r"x\.jsonl: column 'step' holds string, not numbers"):
        _ = open_recording(path).steps


@pytest.mark.parametrize("theirs", [TRL["advantages"], TRL["old_log_probs"]])
def test_text_where_numbers_belong(tmp_path, theirs):
    """File and column are named."""
    rows = renamed(make_rows(), TRL)
    for row in rows:
        row[theirs] = [str(x) for x in row[theirs]] if isinstance(row[theirs], list) else "x"
    path = write(tmp_path / "x.jsonl", rows)
    with pytest.raises(RecordingError, match=rf"x\.jsonl: column '{theirs}': it holds string"):
        list(open_recording(path).iterate())


def test_a_directory_of_runs(tmp_path):
    """The runs in it are named."""
    for name in ("b", "a"):
        (tmp_path / name / "recording").mkdir(parents=True)
        (tmp_path / name / "recording" / "manifest.json").touch()
        (tmp_path / name / "metrics.jsonl").touch()
    with pytest.raises(RecordingError, match="recorded runs; name one of them: a, b"):
        open_recording(tmp_path)


def test_files_in_folders(tmp_path):
    """One folder a step."""
    rows = make_rows(masked=False)
    for step in (3, 11):
        (tmp_path / f"step_{step}").mkdir()
        write(tmp_path / f"step_{step}" / "data.parquet", renamed(rows[step : step + 1], TRL))
    recording = open_recording(tmp_path)
    assert recording.steps == [3, 11]
    for item in recording.iterate():
        same(item.batch, expected(rows[item.step : item.step + 1], TRL)[0])


def test_without_pyarrow(tmp_path, monkeypatch):
    """The remedy is named."""
    path = write(tmp_path / "x.jsonl", renamed(make_rows(), TRL))
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(RecordingError, match="pip install pyarrow"):
        open_recording(path)


def test_a_line_longer_than_a_read(tmp_path, monkeypatch):
    """Reads are put together until a line ends; blank lines do not count."""
    monkeypatch.setattr(files, "READ_BYTES", 64)
    rows = make_rows()
    path = write(tmp_path / "x.jsonl", renamed(rows, TRL))
    path.write_text("\n" + path.read_text().replace("\n", "\n\n").rstrip("\n"))
    check(open_recording(path), rows, TRL)
    path.write_text(path.read_text() + "\n{\n{}")
    with pytest.raises(RecordingError, match="line 25: not a JSON object"):
        list(open_recording(path).iterate())


def test_log_probs_that_are_empty(tmp_path):
    """A column of nothing but nulls."""
    for suffix in ("parquet", "jsonl"):
        rows = [{**row, "log_probs": None} for row in make_rows()]
        path = write(tmp_path / f"x.{suffix}", renamed(rows, TRL))
        with pytest.raises(RecordingError, match="'per_token_logps' holds null"):
            list(open_recording(path).iterate())


def test_what_arrow_lends_is_copied(tmp_path):
    """One read of float32 without a mask: torch would warn of read-only memory."""
    rows = make_rows(masked=False)
    table = pa.Table.from_pylist(renamed(rows, {k: v for k, v in OURS.items() if k != "mask"}))
    lists = ("log_probs", "old_log_probs", "rollout_log_probs", "entropies")
    for name in lists:
        at = table.schema.get_field_index(name)
        table = table.set_column(at, name, table[name].cast(pa.list_(pa.float32())))
    pq.write_table(table.slice(0, 4), tmp_path / "x.parquet")
    (item,) = open_recording(tmp_path / "x.parquet").iterate()
    item.batch.log_probs.add_(1)
    assert item.batch.log_probs.dtype == torch.float32
    assert item.entropies.tolist() == pytest.approx(
        [e for row in rows[:4] for e in row["entropies"]]
    )
