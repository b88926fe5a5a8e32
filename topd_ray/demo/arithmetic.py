"""Procedurally generated arithmetic reasoning: an expression, a worked solution, and its grader.

A prompt is a nested integer expression over + - * with every inner operation in parentheses. The solution rewrites it
line by line, each time replacing the operation that the first closing parenthesis closes, and ends with the answer:

    ((2+3)*4)-(6-9)  ->  (5*4)-(6-9)
                         20-(6-9)
                         20--3
                         23
                         #### 23

`6--3` is 6 minus -3. No value met on the way exceeds MAX_VALUE in magnitude. Prompts of the two splits are disjoint by
construction: a digest of the expression's text decides to which split it belongs.
"""

import hashlib
import operator
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from topd_ray.errors import DataError

Split = Literal["train", "heldout"]

MAX_DIFFICULTY = 8
MAX_VALUE = 99
ANSWER_MARKER = "#### "

_OPERATIONS: dict[str, Callable[[int, int], int]] = {"+": operator.add, "-": operator.sub, "*": operator.mul}
_REDUCIBLE = re.compile(r"\((-?\d+)([+\-*])(-?\d+)\)")
_BARE = re.compile(r"(-?\d+)([+\-*])(-?\d+)")
_ANSWER = re.compile(r"-?(0|[1-9][0-9]*)", re.ASCII)
_HELDOUT_ONE_IN = 8
_MAX_DRAWS_IN_VAIN = 5_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A prompt, its worked solution (the last line holds the marker and the answer), and the answer alone."""

    expression: str
    solution: str
    answer: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Reduction:
    """One operation that can be done next, and what doing it leaves of the expression."""

    operation: str
    """as it stands in the expression, without parentheses: `2+3`"""
    value: int
    before: str
    after: str
    """what stands around the operation and its parentheses"""

    @property
    def result(self) -> str:
        """The expression with the operation and its parentheses replaced by its value."""
        return self.with_value(str(self.value))

    def with_value(self, value: str) -> str:
        """Likewise by `value`, right or wrong."""
        return self.before + value + self.after


def reductions(expression: str) -> list[Reduction]:
    """The innermost operations of `expression` from left to right; none for a bare number or what is no expression."""
    matches = list(_REDUCIBLE.finditer(expression))
    if not matches and (bare := _BARE.fullmatch(expression)):
        matches = [bare]
    return [_reduction(expression, match) for match in matches]


def _reduction(expression: str, match: re.Match[str]) -> Reduction:
    left, sign, right = match.groups()
    value = _OPERATIONS[sign](int(left), int(right))
    before, after = expression[: match.start()], expression[match.end() :]
    return Reduction(operation=left + sign + right, value=value, before=before, after=after)


def split_of(expression: str) -> Split:
    """The split that `expression` belongs to: one in eight is held out, by the SHA-256 of its text."""
    digest = hashlib.sha256(expression.encode()).digest()
    return "heldout" if digest[0] % _HELDOUT_ONE_IN == 0 else "train"


def generate(split: Split, num: int, difficulty: int, seed: int) -> list[Problem]:
    """The first `num` problems of a split's stream: distinct, and the same for the same arguments everywhere.

    The number of operators of each problem is uniform on [(difficulty + 1) // 2, difficulty].

    Raises:
        DataError: an unknown split, a negative `num`, a difficulty outside [1, MAX_DIFFICULTY], or fewer than `num`
            distinct problems found before 5,000 draws in a row brought nothing new.
    """
    if num < 0:
        raise DataError(f"num is {num}; the number of problems is at least 0")
    problems = problem_stream(split, difficulty, seed)
    found: list[Problem] = []
    for problem in problems:
        if len(found) == num:
            break
        found.append(problem)
    if len(found) < num:
        raise DataError(
            f"only {len(found)} distinct {split} problems of difficulty {difficulty} found, {num} asked for; "
            "ask for fewer or raise the difficulty"
        )
    return found


def problem_stream(split: Split, difficulty: int, seed: int) -> Iterator[Problem]:
    """Distinct problems of one split, until 5,000 draws in a row bring nothing new. Arguments as in `generate`."""
    if split not in ("train", "heldout"):
        raise DataError(f"split is {split!r}; it is 'train' or 'heldout'")
    if not 1 <= difficulty <= MAX_DIFFICULTY:
        raise DataError(f"difficulty is {difficulty}; it lies in [1, {MAX_DIFFICULTY}]")
    return _draw_problems(split, difficulty, random.Random(f"{split}/{difficulty}/{seed}"))


def grade(response: str, answer: str) -> bool:
    """Whether the last line with the answer marker holds exactly the integer `answer`.

    Strict: `#### 49` alone on its line, in canonical decimal form. Anything else (no marker, a second number, a leading
    zero or plus sign, text after the number) is wrong. White space at the end of the response is ignored.
    """
    marked = [line for line in response.rstrip().split("\n") if "####" in line]
    if not marked or not marked[-1].startswith(ANSWER_MARKER):
        return False
    given = marked[-1].removeprefix(ANSWER_MARKER)
    return is_answer(given) and given == answer


def is_answer(text: str) -> bool:
    """Whether `text` is an integer in canonical decimal form."""
    return _ANSWER.fullmatch(text) is not None and text != "-0"


def _draw_problems(split: Split, difficulty: int, rng: random.Random) -> Iterator[Problem]:
    seen: set[str] = set()
    draws_in_vain = 0
    while draws_in_vain < _MAX_DRAWS_IN_VAIN:
        num_operators = rng.randint((difficulty + 1) // 2, difficulty)
        expression = _draw_expression(rng, num_operators)
        draws_in_vain += 1
        if expression in seen or split_of(expression) != split:
            continue
        lines = _rewrite(expression)
        if lines is None:
            continue
        seen.add(expression)
        draws_in_vain = 0
        solution = "\n".join([*lines, ANSWER_MARKER + lines[-1]])
        yield Problem(expression=expression, solution=solution, answer=lines[-1])


def _draw_expression(rng: random.Random, num_operators: int) -> str:
    """A random expression; a fixed number of random draws a call, values not yet checked."""
    return _draw_subtree(rng, num_operators).removeprefix("(").removesuffix(")")


def _draw_subtree(rng: random.Random, num_operators: int) -> str:
    if num_operators == 0:
        return str(rng.randint(1, 9))
    num_left = rng.randrange(num_operators)
    left = _draw_subtree(rng, num_left)
    right = _draw_subtree(rng, num_operators - 1 - num_left)
    return f"({left}{rng.choice('+-*')}{right})"


def _rewrite(expression: str) -> list[str] | None:
    """The lines of the solution without the answer line; None if a value leaves [-MAX_VALUE, MAX_VALUE]."""
    lines: list[str] = []
    while todo := reductions(expression):
        if abs(todo[0].value) > MAX_VALUE:
            return None
        expression = todo[0].result
        lines.append(expression)
    return lines
