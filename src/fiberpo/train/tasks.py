"""Procedural tasks with exact verifiers, for training without any download.

Four domains differ in difficulty, prompt length and completion length:

=======  =========================  =======================  ==================================
domain   prompt                     completion               what is asked
=======  =========================  =======================  ==================================
sum      ``sum 47+85:``             ``7+5=12;4+8+1=13#132``  a sum of two 2-digit numbers
sort     ``sort 830172:``           ``012378``               6 to 12 digits in ascending order
reverse  ``reverse karst:``         ``tsrak``                4 to 10 letters in reverse order
boolean  ``boolean T&F ~F|T T|T:``  ``FTT#T``                whether most of 3 clauses are true
=======  =========================  =======================  ==================================

The final answer of a completion is the text after its last ``#``, or the whole completion where
there is no ``#``. What precedes the ``#`` is a scratchpad that no verifier reads.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from fiberpo.errors import ConfigError

ANSWER_MARK = "#"
"""The character that separates the scratchpad from the final answer."""

HELD_OUT_ONE_IN = 8
"""One prompt in this many (chosen by a hash of its text) belongs to the held-out split."""

LETTERS = "abcdefghijklmnopqrstuvwxyz"
DIGITS = "0123456789"


@dataclass(frozen=True)
class Problem:
    """One problem: the prompt, the final answer, and an ideal completion (scratchpad included)."""

    prompt: str
    answer: str
    demonstration: str


@dataclass(frozen=True)
class Domain:
    """A family of problems.

    Attributes:
        name: Key of the domain in `DOMAINS`; every prompt of the domain starts with it.
        alphabet: The characters that a completion of this domain may hold.
        max_completion: Upper bound of the length of a demonstration, in characters.
        draw: Function that draws one problem with the random number generator it is given.
    """

    name: str
    alphabet: str
    max_completion: int
    draw: Callable[[random.Random], Problem]

    def sample(self, rng: random.Random) -> Problem:
        """Draw one problem from either split; all randomness comes from ``rng``."""
        return self.draw(rng)


def _draw_sum(rng: random.Random) -> Problem:
    a, b = rng.randint(10, 99), rng.randint(10, 99)
    units = a % 10 + b % 10
    carry = units // 10
    tens = a // 10 + b // 10 + carry
    scratchpad = f"{a % 10}+{b % 10}={units};{a // 10}+{b // 10}+{carry}={tens}"
    answer = str(a + b)
    return Problem(f"sum {a}+{b}:", answer, f"{scratchpad}{ANSWER_MARK}{answer}")


def _draw_sort(rng: random.Random) -> Problem:
    digits = rng.choices(DIGITS, k=rng.randint(6, 12))
    answer = "".join(sorted(digits))
    return Problem(f"sort {''.join(digits)}:", answer, answer)


def _draw_reverse(rng: random.Random) -> Problem:
    letters = "".join(rng.choices(LETTERS, k=rng.randint(4, 10)))
    answer = letters[::-1]
    return Problem(f"reverse {letters}:", answer, answer)


def _draw_operand(rng: random.Random) -> tuple[str, bool]:
    value = rng.random() < 0.5
    if rng.random() < 0.5:
        return ("T" if value else "F"), value
    return ("~F" if value else "~T"), value


def _draw_boolean(rng: random.Random) -> Problem:
    clauses, values = [], []
    for _ in range(3):
        left, left_value = _draw_operand(rng)
        right, right_value = _draw_operand(rng)
        operator = rng.choice("&|")
        clauses.append(left + operator + right)
        values.append(left_value and right_value if operator == "&" else left_value or right_value)
    answer = "T" if 2 * sum(values) > len(values) else "F"
    scratchpad = "".join("T" if value else "F" for value in values)
    return Problem(f"boolean {' '.join(clauses)}:", answer, f"{scratchpad}{ANSWER_MARK}{answer}")


DOMAINS: Mapping[str, Domain] = MappingProxyType(
    {
        "sum": Domain("sum", DIGITS + "+=;#", 20, _draw_sum),
        "sort": Domain("sort", DIGITS, 12, _draw_sort),
        "reverse": Domain("reverse", LETTERS, 10, _draw_reverse),
        "boolean": Domain("boolean", "TF#", 5, _draw_boolean),
    }
)
"""The four domains by name, in the order in which reports list them."""

MAX_COMPLETION_TOKENS = max(domain.max_completion for domain in DOMAINS.values()) + 1
"""Tokens that the longest demonstration takes, one per character and one for end of sequence."""


def get_domain(name: str) -> Domain:
    """Return the domain called ``name``; raise `ConfigError` where there is none."""
    if name not in DOMAINS:
        raise ConfigError(f"unknown domain {name!r}: use one of {', '.join(DOMAINS)}")
    return DOMAINS[name]


def is_held_out(prompt: str) -> bool:
    """Say whether a prompt belongs to the held-out split.

    The 8-byte BLAKE2b digest of the UTF-8 text, read as an integer, decides: the prompt is held
    out where that integer is divisible by `HELD_OUT_ONE_IN`. The answer is the same on every
    machine and in every process, so the two splits never share a prompt.
    """
    digest = hashlib.blake2b(prompt.encode("utf-8"), digest_size=8).digest()
    return int.from_bytes(digest, "big") % HELD_OUT_ONE_IN == 0


def make_problem(domain: str, seed: int, index: int, *, held_out: bool = False) -> Problem:
    """Return problem number ``index`` of a domain, a pure function of its arguments.

    Args:
        domain: Name of the domain, a key of `DOMAINS`.
        seed: Seed of the sequence of problems.
        index: Place in that sequence.
        held_out: Draw from the held-out split instead of the training split.

    Raises:
        ConfigError: The domain is unknown.
    """
    family = get_domain(domain)
    rng = random.Random(f"{domain}:{seed}:{index}")
    while True:
        problem = family.sample(rng)
        if is_held_out(problem.prompt) == held_out:
            return problem


def make_rows(
    domain: str, seed: int, count: int, *, held_out: bool = False
) -> list[dict[str, str]]:
    """Return ``count`` rows with the columns ``prompt``, ``answer`` and ``domain``.

    Row ``i`` depends on (domain, seed, i, held_out) alone, so a longer list starts with the shorter
    one. No prompt of a training list occurs in a held-out list, whatever the seeds. Within one list
    a prompt may repeat, seldom except in ``sum``, which has 8100 prompts.

    Raises:
        ConfigError: The domain is unknown or ``count`` is negative.
    """
    if count < 0:
        raise ConfigError(f"count must be 0 or more, got {count}: ask for at least 1 row")
    get_domain(domain)
    problems = (make_problem(domain, seed, i, held_out=held_out) for i in range(count))
    return [{"prompt": p.prompt, "answer": p.answer, "domain": domain} for p in problems]


def completion_text(completion: Any) -> str:
    """Return the text of a completion; ``""`` for what holds no text.

    A plain completion is a string. A chat completion is a sequence of ``{"role", "content"}``
    messages, of which the last one counts; its content is a string or a sequence of parts, of which
    those with a string under ``"text"`` are joined.
    """
    if isinstance(completion, str):
        return completion
    if not isinstance(completion, Sequence) or len(completion) == 0:
        return ""
    message = completion[-1]
    content = message.get("content") if isinstance(message, Mapping) else None
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        return ""
    parts = [part.get("text") for part in content if isinstance(part, Mapping)]
    return "".join(text for text in parts if isinstance(text, str))


def final_answer(completion: Any) -> str:
    """Return the text after the last ``#`` of a completion (all of it without ``#``), stripped."""
    return completion_text(completion).rsplit(ANSWER_MARK, 1)[-1].strip()


def exact_answer(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    answer: Sequence[str],
    domain: Sequence[str] | None = None,
    **columns: Any,
) -> list[float]:
    """Reward a completion with 1.0 where its final answer equals the expected one, else 0.0.

    The signature is that of a TRL reward function: every argument holds one entry per completion.
    A completion is a string or a list of chat messages; malformed ones score 0.0 and never raise.
    ``prompts``, ``domain`` and further columns are accepted and not read.
    """
    del prompts, domain, columns
    return [
        float(final_answer(completion) == str(expected))
        for completion, expected in zip(completions, answer, strict=True)
    ]
