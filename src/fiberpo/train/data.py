"""Own training data: files, directories and data sets of the hub, in the forms of TRL and verl.

They give rows with the columns ``prompt`` (a text or a list of chat messages) and
``domain`` (a text); the other columns are handed to the reward functions under their own names.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq

from fiberpo.columns import DOMAIN_ALIASES, find_column
from fiberpo.errors import DataError

logger = logging.getLogger(__name__)

ANSWER_ALIASES = ("answer", "ground_truth", "reward_model.ground_truth")
"""Where the expected answer may be; the last one is the field of verl's ``reward_model``."""

_FILE_TYPES = (".jsonl", ".json", ".parquet")


def load_data(
    source: str | Path,
    *,
    split: str = "train",
    domain_column: str | None = None,
    need_answer: bool = False,
) -> datasets.Dataset:
    """Load prompts from a file, a directory or the hub.

    TRL's form (``prompt`` and any other columns) and verl's form (``data_source``, ``prompt``,
    ``reward_model.ground_truth``, ``extra_info``) load unchanged; all columns are kept.

    Args:
        source: a ``.jsonl``, ``.json`` or ``.parquet`` file, a directory (written by
            ``Dataset.save_to_disk`` or readable by ``datasets.load_dataset``) or a hub id.
        split: the split to take where the source has several.
        domain_column: the column with the domain; by default the one of `DOMAIN_ALIASES` that is
            there. Without any, every row gets the domain ``"all"`` and a message is logged.
        need_answer: also require the expected answer and add it as the text column ``answer``;
            it is read from ``answer``, ``ground_truth`` or ``reward_model.ground_truth``.

    Returns:
        The rows with the columns ``prompt``, ``domain`` (text) and all columns of the source.

    Errors:
        DataError for a source that cannot be read, has no rows, no ``prompt`` column, an empty or
        malformed prompt, two columns that could hold the same thing, or a missing domain or answer.
    """
    data = _read(str(source), split)
    columns = list(data.column_names)
    listing = f"{source} has the columns {', '.join(columns) or '(none)'}"
    if not len(data):
        raise DataError(f"{source} has no rows; training needs at least one prompt")
    if "prompt" not in columns:
        raise DataError(f"{listing}, but no 'prompt'; rename the one with the prompts")
    for index, prompt in enumerate(data["prompt"]):
        _check_prompt(prompt, f"{source}, row {index}")
    if domain_column is not None and domain_column not in columns:
        raise DataError(f"{listing}, but no {domain_column!r} for the domain")
    if domain_column is None:
        domain_column = find_column(columns, DOMAIN_ALIASES, "the domain")
    if domain_column is None:
        logger.info("%s has no domain column (%s): all rows get the domain 'all'",
                    source, ", ".join(DOMAIN_ALIASES))  # fmt: skip
        domains = ["all"] * len(data)
    else:
        values = list(data[domain_column])
        domains = [_as_text(v, f"{source}, row {i}: the domain") for i, v in enumerate(values)]
    data = _set_column(data, "domain", domains)
    return _set_column(data, "answer", _answers(data, source)) if need_answer else data


def _set_column(data: datasets.Dataset, name: str, values: list[str]) -> datasets.Dataset:
    if name in data.column_names:
        data = data.remove_columns(name)
    return data.add_column(name, values)


def _read(source: str, split: str) -> datasets.Dataset:
    path = Path(source)
    try:
        if path.is_file():
            if path.suffix == ".parquet":
                return datasets.Dataset(pq.read_table(path))
            if path.suffix in _FILE_TYPES:
                return datasets.Dataset.from_list(_read_json(path))
            raise DataError(f"{path} is not one of {', '.join(_FILE_TYPES)}; convert the file")
        if path.suffix in _FILE_TYPES or (source[0] in "./~" and not path.is_dir()):
            raise DataError(f"no data file or directory at {source}; check the path")
        if any((path / n).is_file() for n in ("dataset_dict.json", "state.json")):
            data = datasets.load_from_disk(source)
            if isinstance(data, datasets.DatasetDict):
                if split not in data:
                    raise DataError(f"{source} has no split {split!r}; it has {', '.join(data)}")
                data = data[split]
            return data
        return datasets.load_dataset(source, split=split)
    except DataError:
        raise
    except Exception as error:  # many kinds: files, Arrow types, the hub, the network
        kind = f"{type(error).__name__}: {error}"
        hint = "" if path.exists() else " (it is no local path, so it was taken for a hub id)"
        raise DataError(f"cannot load {source}{hint}: {kind}") from error


def _read_json(path: Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8")
    rows: list[Any] = []
    if path.suffix == ".json":
        try:
            value = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(f"{path} is not JSON: {error}; give lines a .jsonl file") from error
        if not isinstance(value, list):
            raise DataError(f"{path} holds a {type(value).__name__}; use a list of objects")
        rows = value
    else:
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                try:
                    rows.append(json.loads(line))
                except json.JSONDecodeError as error:
                    raise DataError(f"{path}, line {number} is not JSON: {error}") from error
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            raise DataError(f"{path}, row {index} is {row!r}; every row must be an object")
    # Every key of every row becomes a column; Dataset.from_list looks at the first row only.
    keys = {key: None for row in rows for key in row}
    return [{key: row.get(key) for key in keys} for row in rows]


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and "role" in value and "content" in value


def _check_prompt(prompt: Any, where: str) -> None:
    if isinstance(prompt, str) and prompt:
        return
    if isinstance(prompt, list) and prompt and all(map(_is_message, prompt)):
        return
    raise DataError(
        f"{where}: the prompt {prompt!r} is neither a text nor a list of messages with 'role' and "
        f"'content'; correct or remove the row"
    )


def _as_text(value: Any, what: str) -> str:
    if isinstance(value, (str, int, float)) and not isinstance(value, bool) and value != "":
        return str(value)
    raise DataError(f"{what} is {value!r}; it must be a text or a number")


def _answers(data: datasets.Dataset, source: str | Path) -> list[str]:
    names = list(data.column_names)
    nested = "reward_model" in names and isinstance(data[0]["reward_model"], Mapping)
    if nested:
        names += [f"reward_model.{key}" for key in data[0]["reward_model"]]
    name = find_column(names, ANSWER_ALIASES, "the expected answer")
    if name is None:
        raise DataError(f"{source} has the columns {', '.join(names)}, but none of "
                        f"{', '.join(ANSWER_ALIASES)} with the expected answer; add one or use "
                        f"another reward function")  # fmt: skip
    if name.startswith("reward_model."):
        values = [(row or {}).get("ground_truth") for row in data["reward_model"]]
    else:
        values = list(data[name])
    return [_as_text(v, f"{source}, row {i}: {name}") for i, v in enumerate(values)]
