"""Training data: own files and data sets, reasoning-gym problems, held-out splits and mixing.

Every source gives rows with the columns ``prompt`` (a text or a list of chat messages) and
``domain`` (a text); the other columns are handed to the reward functions under their own names.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib
import importlib.util
import inspect
import io
import json
import logging
import math
import sys
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq

from fiberpo.errors import ConfigError, DataError
from fiberpo.integrations.columns import DOMAIN_ALIASES, find_column
from fiberpo.train.tasks import completion_text

__all__ = [
    "ReasoningGymReward",
    "load_data",
    "load_function",
    "mix_indices",
    "reasoning_gym_rows",
    "split_held_out",
]

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


# reasoning-gym ------------------------------------------------------------------------------------

_CHECKED_ITEMS = 3
_HELD_OUT_ONE_IN = 4
_entries: dict[str, tuple[Any, dict[str, Any]]] = {}  # problem_id -> (generator, entry)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Swallow what some generators and scorers print or warn about."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _generator(name: str, seed: int, size: int, options: Mapping[str, Any]) -> Any:
    try:
        from reasoning_gym.factory import DATASETS, create_dataset
    except ImportError as error:
        raise ConfigError(
            "reasoning-gym is not installed; run: pip install 'fiberpo[tasks]'"
        ) from error
    if name not in DATASETS:
        close = difflib.get_close_matches(name, DATASETS, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(DATASETS)}"
        raise ConfigError(f"unknown reasoning-gym domain {name!r}; {hint}")
    try:
        with _quiet():
            return create_dataset(name, seed=seed, size=size, **options)
    except Exception as error:
        raise ConfigError(
            f"reasoning-gym domain {name!r} cannot be made with the options {dict(options)}: "
            f"{type(error).__name__}: {error}"
        ) from error


def _entry(generator: Any, index: int) -> dict[str, Any]:
    with _quiet():
        entry: dict[str, Any] = generator[index]
    return entry


def _score(generator: Any, text: str, entry: dict[str, Any]) -> float:
    with _quiet():
        return float(generator.score_answer(text, entry))


def _check_domain(name: str, generator: Any) -> None:
    """Refuse a domain whose answers or scorer cannot be trusted, with the reason."""

    def refuse(reason: str) -> DataError:
        return DataError(f"reasoning-gym domain {name!r} is refused: {reason}; leave it out")

    checked = 0
    for index in range(len(generator)):
        entry = _entry(generator, index)
        gold = entry["answer"]
        if not isinstance(gold, str):
            raise refuse(f"item {index} has no answer (got {gold!r})")
        if not gold:
            continue  # an empty answer is no test of the scorer; the rows leave such items out
        checked += 1
        for text, right in ((gold, True), ("wrong", False), ("", False)):
            shown = f"the right answer {gold!r}" if right else f"the wrong answer {text!r}"
            try:
                score = _score(generator, text, entry)
            except Exception as error:
                raise refuse(
                    f"its scorer raises {type(error).__name__} ({error}) on {shown} of item {index}"
                ) from error
            if right != (score == 1.0):
                raise refuse(f"its scorer gives {score} to {shown} of item {index}")
        if checked == _CHECKED_ITEMS:
            return
    raise refuse(f"only {checked} of its first {len(generator)} items have an answer")


def reasoning_gym_rows(
    names: Sequence[str],
    seed: int,
    count_per_domain: int,
    held_out: bool = False,
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[dict[str, str]]:
    """Return ``count_per_domain`` distinct problems of every reasoning-gym generator in ``names``.

    A hash of the question decides whether a problem belongs to the held-out split (one in four), so
    no question of a training list occurs in a held-out list, whatever the seeds.

    Each domain is checked on a few items first: the right answer must score 1.0, the answers
    "wrong" and "" less, and none of them may raise. Single problems without an answer are left
    out and their number is logged.

    Columns: ``prompt`` (the question, a text), ``answer``, ``domain`` (the generator's name) and
    ``problem_id``, from which `ReasoningGymReward` finds the problem again. A few generators
    depend on Python's hash seed, so fix PYTHONHASHSEED to draw the same problems in
    another process.

    Args:
        names: names of generators.
        seed: seed of the sequence of problems.
        count_per_domain: rows of each domain.
        held_out: draw from the held-out split instead of the training split.
        options: options of the generators by name, for example their difficulty.

    Errors:
        ConfigError without reasoning-gym, for an unknown name (close matches are quoted), options
        that do not fit, or settings out of range; DataError for a domain that fails the check or
        has too few distinct problems.
    """
    if count_per_domain < 1 or seed < 0:
        raise ConfigError(f"reasoning-gym needs count_per_domain >= 1 and seed >= 0, got "
                          f"{count_per_domain} and {seed}")  # fmt: skip
    options = options or {}
    if unknown := sorted(set(options) - set(names)):
        raise ConfigError(f"options are given for {', '.join(unknown)}, which is not in {names}")
    rows = []
    for name in dict.fromkeys(names):
        chosen = dict(options.get(name, {}))
        # Generators take item i from seed + i: spread the seeds, or seeds 0 and 1 share problems.
        digest = hashlib.blake2b(f"{name}:{seed}:{held_out}".encode(), digest_size=4).digest()
        base = int.from_bytes(digest, "big") >> 2
        size = (16 if held_out else 4) * count_per_domain + 64
        generator = _generator(name, base, size, chosen)
        _check_domain(name, generator)
        seen: set[str] = set()
        empty = 0
        for index in range(size):
            if len(seen) == count_per_domain:
                break
            entry = _entry(generator, index)
            question, answer = entry["question"], entry["answer"]
            if not isinstance(answer, str) or not answer:
                empty += 1
                continue
            key = hashlib.blake2b(question.encode(), digest_size=8).digest()
            if question in seen or (key[0] % _HELD_OUT_ONE_IN == 0) != held_out:
                continue
            seen.add(question)
            problem_id = json.dumps([name, base, size, index, chosen, key.hex()])
            _entries[problem_id] = (generator, entry)
            rows.append({"prompt": question, "answer": answer, "domain": name,
                         "problem_id": problem_id})  # fmt: skip
        if empty:
            logger.info("reasoning-gym domain %r: left out %d problems without answer", name, empty)
        if len(seen) < count_per_domain:
            raise DataError(
                f"reasoning-gym domain {name!r} gave {len(seen)} distinct "
                f"{'held-out' if held_out else 'training'} problems in {size} draws, "
                f"{count_per_domain} were asked for; ask for fewer or raise its difficulty"
            )
    return rows


def _find_entry(problem_id: str) -> tuple[Any, dict[str, Any]]:
    if problem_id not in _entries:
        name, base, size, index, chosen, key = json.loads(problem_id)
        generator = _generator(name, base, size, chosen)
        entry = _entry(generator, index)
        if hashlib.blake2b(entry["question"].encode(), digest_size=8).hexdigest() != key:
            raise DataError(
                f"problem {index} of reasoning-gym domain {name!r} is another one in this process; "
                f"set PYTHONHASHSEED to the same number as where the rows were made"
            )
        _entries[problem_id] = (generator, entry)
    return _entries[problem_id]


class ReasoningGymReward:
    """A reward function, in TRL's signature, for the rows of `reasoning_gym_rows`.

    The text between the last ``<answer>`` and ``</answer>`` of a completion, or the whole
    completion without these marks, goes to the problem's own scorer. The reward is 1.0 for the
    score 1.0 and 0.0 for any other; with ``partial_credit`` it is the score. Rows without a
    ``problem_id`` get None, so that other reward functions can handle them.

    A scorer that raises, or gives a score outside [0, 1], earns the completion 0.0; it is counted
    in ``failures`` (by domain) and logged the first time it happens in a domain.
    """

    def __init__(self, partial_credit: bool = False) -> None:
        self.partial_credit = partial_credit
        self.failures: Counter[str] = Counter()
        self.__name__ = "reasoning_gym"

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        problem_id: Sequence[str | None],
        **columns: Any,
    ) -> list[float | None]:
        """Return the reward of every completion, None where ``problem_id`` is None."""
        return [
            None if key is None else self._reward(completion_text(completion), key)
            for completion, key in zip(completions, problem_id, strict=True)
        ]

    def _reward(self, text: str, problem_id: str) -> float:
        generator, entry = _find_entry(problem_id)
        if "</answer>" in text and "<answer>" in text:
            text = text.rpartition("</answer>")[0].rpartition("<answer>")[2]
        try:
            score = _score(generator, text.strip(), entry)
            if not 0.0 <= score <= 1.0:
                raise ValueError(f"the score {score} is outside [0, 1]")
        except Exception as error:
            domain = json.loads(problem_id)[0]
            self.failures[domain] += 1
            if self.failures[domain] == 1:
                what = f"{type(error).__name__}: {error}"
                logger.warning("the scorer of %r failed on %r (%s): reward 0; later failures of "
                               "this domain are only counted", domain, text, what)  # fmt: skip
            return 0.0
        return score if self.partial_credit else float(score == 1.0)


# Reward functions, splits, mixing -----------------------------------------------------------------


def load_function(spec: str) -> Callable[..., Any]:
    """Load a reward function from ``path/to/file.py:function`` or ``package.module:function``.

    It must have TRL's signature ``fn(prompts, completions, **columns) -> list[float | None]``.

    Errors:
        ConfigError where the file, module or function is missing, the import fails, or the
        function does not take ``prompts``, ``completions`` and any further keyword.
    """
    place, colon, name = spec.rpartition(":")
    if not colon or not place or not name:
        raise ConfigError(f"reward function {spec!r}: write path/to/file.py:function or "
                          f"package.module:function")  # fmt: skip
    module = _import_place(place, spec)
    function = getattr(module, name, None)
    if function is None:
        close = difflib.get_close_matches(name, [n for n in vars(module) if n[0] != "_"], n=3)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise ConfigError(f"reward function {spec!r}: {place} has no {name!r}{hint}")
    if not callable(function):
        raise ConfigError(f"reward function {spec!r}: {name} is a {type(function).__name__}, which "
                          f"cannot be called")  # fmt: skip
    try:
        inspect.signature(function).bind(prompts=[], completions=[], any_other_column=[], answer=[])
    except TypeError as error:
        raise ConfigError(
            f"reward function {spec!r}: {error}; it is called with prompts, completions and every "
            f"column of the data, so define it as def {name}(prompts, completions, **columns)"
        ) from error
    except ValueError:
        pass  # no signature to be had: a function of compiled code
    return function


def _import_place(place: str, spec: str) -> ModuleType:
    try:
        if not place.endswith(".py"):
            return importlib.import_module(place)
        path = Path(place).expanduser().resolve()
        if not path.is_file():
            raise ConfigError(f"reward function {spec!r}: no file {place}; check the path")
        name = f"fiberpo_user_{path.stem}_{zlib.crc32(str(path).encode()):08x}"
        found = importlib.util.spec_from_file_location(name, path)
        if found is None or found.loader is None:
            raise ConfigError(f"reward function {spec!r}: {place} cannot be imported")
        module = importlib.util.module_from_spec(found)
        sys.modules[name] = module  # dataclasses and pickle look the module up there
        found.loader.exec_module(module)
        return module
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"reward function {spec!r}: importing {place} failed: "
                          f"{type(error).__name__}: {error}") from error  # fmt: skip


def split_held_out(
    rows: Sequence[Mapping[str, Any]] | datasets.Dataset, per_domain: int, seed: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Split rows into ``(training, held out)`` with ``per_domain`` held-out rows of every domain.

    The held-out prompts of a domain are distinct and drawn at random by ``seed``. Other rows with
    the same prompt as a held-out one, in any domain, leave the training rows; their number is
    logged. Both lists keep the order of ``rows``.

    Errors:
        ConfigError for ``per_domain`` below 1; DataError for a domain that has too few distinct
        prompts to leave one for training.
    """
    if per_domain < 1:
        raise ConfigError(f"per_domain must be at least 1, got {per_domain}")
    listed = [dict(row) for row in rows]
    keys = [json.dumps(row["prompt"], sort_keys=True, default=str) for row in listed]
    first: dict[str, dict[str, int]] = {}  # domain -> prompt -> its first row
    for index, (row, key) in enumerate(zip(listed, keys, strict=True)):
        first.setdefault(row["domain"], {}).setdefault(key, index)
    chosen: set[int] = set()
    for domain, indices in first.items():
        if len(indices) <= per_domain:
            raise DataError(
                f"domain {domain!r} has {len(indices)} distinct prompts; holding out {per_domain} "
                f"needs at least {per_domain + 1}: add prompts or hold out fewer"
            )
        taken = {keys[i] for i in chosen}
        free = [i for key, i in indices.items() if key not in taken]
        if len(free) < per_domain:
            raise DataError(f"domain {domain!r} shares all but {len(free)} of its prompts with the "
                            f"held-out rows of other domains; hold out fewer")  # fmt: skip
        picks = _rng(seed, domain).permutation(len(free))[:per_domain]
        chosen.update(free[i] for i in picks)
    banned = {keys[i] for i in chosen}
    train = [row for row, key in zip(listed, keys, strict=True) if key not in banned]
    held_out = [listed[i] for i in sorted(chosen)]
    for domain in first:
        if not any(row["domain"] == domain for row in train):
            raise DataError(f"domain {domain!r} has no prompt left for training; hold out fewer")
    if repeated := len(listed) - len(train) - len(held_out):
        logger.warning("%d rows repeat a held-out prompt and were left out of training", repeated)
    return train, held_out


def mix_indices(
    sizes: Mapping[str, int], weights: Mapping[str, float] | None, count: int, seed: int
) -> list[tuple[str, int]]:
    """Plan the prompts of a whole run: ``count`` pairs ``(domain, index within the domain)``.

    The domain of prompt t is the one in whose share of [0, 1) the number ``(u + t * phi) mod 1``
    falls, with phi = (sqrt(5) - 1) / 2 and u drawn by ``seed``: every stretch of consecutive
    prompts has nearly the wanted shares. Within a domain, prompts come in a shuffled order, each
    once per epoch, with a new order in every epoch. A longer plan begins with the shorter one.

    Args:
        sizes: number of prompts of each domain.
        weights: relative share of each domain, 0 to leave it out; by default the square root of
            its size.
        count: number of prompts.
        seed: seed of the orders.

    Errors:
        ConfigError for a negative count, a domain that is unknown, has no weight or no prompts, and
        for weights that are negative, not finite or all zero.
    """
    if weights is None:
        weights = {domain: math.sqrt(size) for domain, size in sizes.items()}
    known = ", ".join(sizes)
    for domain, weight in weights.items():
        if domain not in sizes:
            raise ConfigError(f"a weight is given for {domain!r}; the domains are {known}")
        if not (math.isfinite(weight) and weight >= 0):
            raise ConfigError(f"the weight of {domain!r} is {weight}; use 0 or a positive number")
        if weight > 0 and sizes[domain] < 1:
            raise ConfigError(f"domain {domain!r} has {sizes[domain]} prompts; give it weight 0")
    if missing := [repr(domain) for domain in sizes if domain not in weights]:
        raise ConfigError(f"no weight for {', '.join(missing)}; give one (0 leaves a domain out)")
    if not any(weights.values()):
        raise ConfigError(f"all weights are 0 ({known}); give at least one domain a positive one")
    if count < 0:
        raise ConfigError(f"count must be 0 or more, got {count}")
    names = [domain for domain in sizes if weights[domain] > 0]
    shares = np.array([weights[domain] for domain in names], dtype=float)
    edges = np.cumsum(shares / shares.sum())[:-1]
    points = (_rng(seed, "").random() + np.arange(count) * (math.sqrt(5) - 1) / 2) % 1.0
    used = Counter[str]()
    orders: dict[str, list[int]] = {}
    plan: list[tuple[str, int]] = []
    for number in np.searchsorted(edges, points, side="right"):
        domain = names[number]
        epoch, place = divmod(used[domain], sizes[domain])
        if place == 0:
            orders[domain] = _rng(seed, domain, epoch).permutation(sizes[domain]).tolist()
        plan.append((domain, orders[domain][place]))
        used[domain] += 1
    return plan


def _rng(seed: int, domain: str, epoch: int = 0) -> np.random.Generator:
    if seed < 0:
        raise ConfigError(f"seed must be 0 or more, got {seed}")
    return np.random.default_rng([seed, zlib.crc32(domain.encode()), epoch])
