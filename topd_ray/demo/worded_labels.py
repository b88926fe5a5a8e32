"""What a mismatch between two continuations of a worded solution means, known by construction.

A text's meaning is a stream of symbols without its wording: operators in words become signs, the words that open a line
vanish, and those between a value and what is left become one `>`:

    now we do 6 minus 9 is -3 leaves (5*4)--3   ->   6-9=-3>(5*4)--3
    #### 17<|im_end|>                           ->   #17$

Two continuations of one prefix agree if their meanings do, as far as both go. Where they first differ, both may be
right (another operation is done next), or at least one of them is wrong.

A solution goes on from the expression that its last line left, right or wrong; after a line that leaves none, nothing
is right any more.
"""

import re
from typing import Literal

from topd_ray.demo.arithmetic import ANSWER_MARKER, is_answer, reductions
from topd_ray.demo.worded import FILLERS, LINKS, NOTATIONS, OPENINGS, PIECE, pieces_of

Label = Literal["harmless", "choice", "error", "undecided"]
Slot = Literal["wording", "choice", "value", "copy"]

FORKS: tuple[Label, ...] = ("choice", "error")

_END = "<|im_end|>"
_PIECE_OR_END = re.compile(re.escape(_END) + "|" + PIECE)
_LINK, _ANSWER, _STOP, _UNKNOWN = ">", "#", "$", "?"
_SYMBOLS = {
    **{symbol: symbol for symbol in "0123456789+-*()=\n"},
    **{word: sign for notation in NOTATIONS.values() for sign, word in notation.items()},
    ANSWER_MARKER: _ANSWER,
    _END: _STOP,
}
_HARMLESS = {piece.strip() for words in (*OPENINGS, *FILLERS, *LINKS) if words for piece in pieces_of(f"{words} ")}


def meaning(text: str) -> str:
    """The symbols of `text` without its wording. The meaning of a text's beginning is a beginning of its meaning.

    An opening before the answer line is no wording, since the grader refuses it: it shows as `>`. What is no piece of
    the vocabulary shows as `?`; what stands behind the end of the turn does not show.
    """
    symbols: list[str] = []
    opened = False
    for piece in _PIECE_OR_END.findall(text):
        starts_line = not symbols or symbols[-1] == "\n"
        if _is_harmless(piece):
            opened = starts_line
            if not starts_line and symbols[-1] != _LINK:
                symbols.append(_LINK)
            continue
        symbol = _SYMBOLS.get(piece, _UNKNOWN)
        if symbol == _ANSWER and starts_line and opened:
            symbols.append(_LINK)
        symbols.append(symbol)
        opened = False
        if symbol == _STOP:
            break
    return "".join(symbols)


def label(expression: str, prefix: str, student: str, teacher: str) -> Label:
    """What it means that student and teacher go on from `prefix` as they do.

    `harmless`: the meanings agree as far as both go, and both say something; `undecided`: they agree, but at least one
    is nothing but wording; `choice`: where they first differ, both do an operation that can be done next; `error`:
    where they first differ, at least one of them is wrong.

    Args:
        expression: the prompt's.
        prefix: what both have before them of the response, as decoded; may be empty.
        student: its window, as decoded, the end of the turn included (`<|im_end|>`).
        teacher: likewise.
    """
    before = meaning(prefix)
    students, teachers = (meaning(prefix + window) for window in (student, teacher))
    common = _num_common(students, teachers)
    if common == min(len(students), len(teachers)):
        return "harmless" if common > len(before) else "undecided"
    start = students[:common].rfind("\n") + 1
    given = _expression_before(expression, students[:start])
    lines = [_first_line(stream[start:]) for stream in (students, teachers)]
    same = students[start:common]
    if same.startswith(_ANSWER) or ("=" in same and _LINK not in same):
        return "error"
    return "choice" if all(_is_possible(given, line, same) for line in lines) else "error"


def slot(expression: str, prefix: str, piece: str) -> Slot:
    """What `piece` decides where it stands, behind `prefix` in a response to `expression`.

    `wording`: nothing that matters; `choice`: which operation is done next; `value`: the result of the operation;
    `copy`: nothing, it repeats what is given.
    """
    if _is_harmless(piece):
        return "wording"
    stream = meaning(prefix)
    start = stream.rfind("\n") + 1
    line = stream[start:]
    if "=" in line and _LINK not in line:
        return "value"
    rest = _possible_lines(_expression_before(expression, stream[:start]), line)
    nexts = {possible[len(line) : len(line) + 1] for possible in rest}
    if len(nexts) > 1:
        return "choice"
    return "wording" if "=" not in line and _SYMBOLS.get(piece) in nexts and _has_synonym(piece, line) else "copy"


def _has_synonym(piece: str, line: str) -> bool:
    """Whether `piece` is an operator or equals sign behind `line`, not the sign of a number."""
    return _SYMBOLS[piece] in "+-*=" and line[-1:].isdigit()


def _is_harmless(piece: str) -> bool:
    return piece.strip() in _HARMLESS


def _num_common(first: str, second: str) -> int:
    pairs = zip(first, second, strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def _first_line(stream: str) -> str:
    """With its line break, if it has ended: one that ends early is wrong."""
    first, line_break, _ = stream.partition("\n")
    return first + line_break


def _expression_before(expression: str, lines: str) -> str:
    """What the last of the full `lines` (meanings) leaves; the prompt's expression if there are none."""
    if not lines:
        return expression
    return lines.removesuffix("\n").split("\n")[-1].partition(_LINK)[2]


def _is_possible(given: str, line: str, same: str) -> bool:
    """Whether `line` does an operation of `given`, as far as it goes; behind the link, whether it copies well.

    `same` is how far two lines agree: where they part before `=`, what stands behind it is not looked at.
    """
    if _LINK not in same:
        operation, equals, _ = line.partition("=")
        line = operation + equals
    return bool(_possible_lines(given, line))


def _possible_lines(given: str, line: str) -> set[str]:
    """All right lines (meanings) on `given` that begin with `line`; a value that `line` holds is taken as it is."""
    if is_answer(given):
        right = {f"{_ANSWER}{given}{_STOP}"}
    else:
        right = set()
        for step in reductions(given):
            said = line.partition(_LINK)[0].partition("=")[2] if _LINK in line else str(step.value)
            right.add(f"{step.operation}={said}{_LINK}{step.with_value(said)}\n")
    return {possible for possible in right if possible.startswith(line)}
