"""Worded arithmetic: the same expressions and answers as `arithmetic.py`, with many right ways to write a solution.

Each line does one operation, says its value, and writes the expression that is left; the last line is the answer:

    ((2+3)*4)-(6-9)  ->  so 2+3=5 giving (5*4)-(6-9)
                         now we do 6 minus 9 is -3 leaves (5*4)--3
                         then of course 5*4=20 so we have 20--3
                         so 20--3=23 giving 23
                         #### 23

What a writer is free in:
- wording, harmless: the opening, an optional filler, the operation in signs or in words, and the link. They are of one
  to four tokens, so two wordings of the same step shift all that follows.
- the choice of the operation, a real fork: any innermost one may be next.

A word and the space behind it are one piece; a space before it belongs to it as well where a number precedes.
"""

import random
import re
from collections.abc import Iterable
from dataclasses import dataclass

from topd_ray.demo.arithmetic import ANSWER_MARKER, Problem, reductions

OPENINGS = ("so", "then", "now", "next", "first we take", "now we do", "let us take", "here we work out")
FILLERS = ("", "simply", "just", "of course")
LINKS = ("giving", "leaves", "so we have", "and we get", "which leaves us")
SIGNS = {"+": "+", "-": "-", "*": "*", "=": "="}
IN_WORDS = {"+": " plus ", "-": " minus ", "*": " times ", "=": " is "}
NOTATIONS = {"signs": SIGNS, "is": IN_WORDS, "makes": {**IN_WORDS, "=": " makes "}}

PIECE = r"#### | ?[a-z]+ |[\s\S]"
"""One token of a solution as a regular expression, for Python and for Hugging Face tokenizers alike."""
_OPERATION = re.compile(r"(-?\d+)([+\-*])(-?\d+)")


def pieces_of(text: str) -> list[str]:
    """`text` cut into tokens; joined they are `text` again."""
    return re.findall(PIECE, text)


def _in_order(texts: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(piece for text in texts for piece in pieces_of(text)))


PIECES = _in_order(
    [
        "0123456789+-*()=\n",
        ANSWER_MARKER,
        *(f"{words} " for words in (*OPENINGS, *FILLERS) if words),
        *(f" {words} " for words in LINKS),
        *(word for notation in NOTATIONS.values() for word in notation.values()),
    ]
)
"""The vocabulary of prompts and solutions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Habits:
    """How a writer fills each place: its favourite with probability `loyalty`, else one of the others, all alike."""

    opening: str
    filler: str
    notation: str
    link: str
    loyalty: float
    leftmost: float | None
    """probability of doing the leftmost operation next where there are several; None chooses among all alike"""


def write(problem: Problem, rng: random.Random, habits: Habits) -> str:
    """One right solution of `problem`, every choice drawn anew by `habits`."""
    lines: list[str] = []
    expression = problem.expression
    while todo := reductions(expression):
        if habits.leftmost is None or len(todo) == 1:
            step = rng.choice(todo)
        else:
            step = todo[0] if rng.random() < habits.leftmost else rng.choice(todo[1:])
        opening = _pick(habits.opening, OPENINGS, habits, rng)
        filler = _pick(habits.filler, FILLERS, habits, rng)
        notation = _pick(habits.notation, tuple(NOTATIONS), habits, rng)
        link = _pick(habits.link, LINKS, habits, rng)
        lines.append(line(opening, filler, notation, step.operation, str(step.value), link, step.result))
        expression = step.result
    return "\n".join([*lines, ANSWER_MARKER + problem.answer])


def line(opening: str, filler: str, notation: str, operation: str, value: str, link: str, result: str) -> str:
    """One line of a solution; `operation`, `value` and `result` are written whether right or wrong."""
    match = _OPERATION.fullmatch(operation)
    if match is None:
        raise ValueError(f"operation is {operation!r}; it is two integers around +, - or *")
    left, sign, right = match.groups()
    said = NOTATIONS[notation]
    start = f"{opening} {filler} " if filler else f"{opening} "
    return f"{start}{left}{said[sign]}{right}{said['=']}{value} {link} {result}"


def _pick(favourite: str, options: tuple[str, ...], habits: Habits, rng: random.Random) -> str:
    if rng.random() < habits.loyalty:
        return favourite
    return rng.choice([option for option in options if option != favourite])
