"""Problems of reasoning-gym as domains, with guarded scorers."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import io
import json
import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fiberpo.errors import ConfigError, DataError
from fiberpo.train.tasks import completion_text

logger = logging.getLogger(__name__)

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
