"""Labels of mismatches, against solutions whose differences are known by construction."""

import random
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from topd_ray.demo.arithmetic import Problem, generate, reductions
from topd_ray.demo.recipes import DEMO_DIFFICULTY, STUDENTS_HABITS, TEACHERS_HABITS
from topd_ray.demo.worded import FILLERS, LINKS, NOTATIONS, OPENINGS, line, pieces_of, write
from topd_ray.demo.worded_labels import label, meaning, slot

END = "<|im_end|>"
EXPRESSION = "((2+3)*4)-(6-9)"
PROBLEMS = generate("train", 300, DEMO_DIFFICULTY, seed=8)


@dataclass(frozen=True)
class Drawn:
    """Wordings and operations of one solution; `wordings` and `order` can be replaced one by one."""

    problem: Problem
    order: tuple[int, ...]
    wordings: tuple[tuple[str, str, str, str], ...]

    def text(self) -> str:
        expression, lines = self.problem.expression, []
        for index, (opening, filler, notation, link) in zip(self.order, self.wordings, strict=False):
            todo = reductions(expression)
            if not todo:
                break
            step = todo[index % len(todo)]
            lines.append(line(opening, filler, notation, step.operation, str(step.value), link, step.result))
            expression = step.result
        return "\n".join([*lines, f"#### {expression}{END}"])


wordings = st.tuples(*map(st.sampled_from, (OPENINGS, FILLERS, tuple(NOTATIONS), LINKS)))
all_wordings = st.lists(wordings, min_size=DEMO_DIFFICULTY, max_size=DEMO_DIFFICULTY).map(tuple)
orders = st.lists(st.integers(0, 5), min_size=DEMO_DIFFICULTY, max_size=DEMO_DIFFICULTY).map(tuple)
drawn = st.builds(Drawn, problem=st.sampled_from(PROBLEMS), order=orders, wordings=all_wordings)


def pieces(text: str) -> list[str]:
    body = text.removesuffix(END)
    return [*pieces_of(body), END] if body != text else pieces_of(body)


def num_shared(first: list[str], second: list[str]) -> int:
    return next(
        (n for n, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


def test_meaning_by_hand() -> None:
    assert meaning("now we do 6 minus 9 is -3 leaves (5*4)--3\nso #### 2") == "6-9=-3>(5*4)--3\n>#2"
    assert meaning(f"so of course 20 minus -3=23 which leaves us 23\n#### 23{END}7") == "20--3=23>23\n#23$"
    assert meaning("2 giving 3") == "2>3" != meaning("23")
    assert meaning("so x") == "?"


@given(drawn=drawn, other=all_wordings, window=st.integers(4, 24), data=st.data())
def test_other_wordings_are_harmless(drawn: Drawn, other: tuple[tuple[str, ...], ...], window: int, data) -> None:
    """From any shared prefix, a solution of the same operations in other words is never a fork."""
    first, second = pieces(drawn.text()), pieces(Drawn(drawn.problem, drawn.order, other).text())
    assert meaning("".join(first)) == meaning("".join(second))
    at = data.draw(st.integers(0, min(num_shared(first, second), len(first) - 1, len(second) - 1)))
    prefix = "".join(first[:at])
    student, teacher = ("".join(solution[at : at + window]) for solution in (first, second))
    says = [meaning(prefix + text)[len(meaning(prefix)) :] for text in (student, teacher)]
    assert label(drawn.problem.expression, prefix, student, teacher) == ("harmless" if all(says) else "undecided")


@given(drawn=drawn, other=all_wordings, data=st.data())
def test_another_operation_next_is_a_choice(drawn: Drawn, other: tuple[tuple[str, ...], ...], data) -> None:
    """Same prefix of full lines, then another operation in any words: a fork as soon as both windows show it."""
    expression, num_lines = drawn.problem.expression, data.draw(st.integers(0, 2))
    for index in drawn.order[:num_lines]:
        todo = reductions(expression)
        expression = todo[index % len(todo)].result if todo else expression
    operations = sorted({step.operation for step in reductions(expression)})
    if len(operations) < 2:
        return
    lines = drawn.text().split("\n")
    prefix = "".join(f"{text}\n" for text in lines[:num_lines])
    one, two = data.draw(st.permutations(operations))[:2]
    values = {step.operation: step for step in reductions(expression)}
    windows = []
    for operation, (opening, filler, notation, link) in zip((one, two), other, strict=False):
        step = values[operation]
        windows.append(line(opening, filler, notation, operation, str(step.value), link, step.result))
    assert label(drawn.problem.expression, prefix, *windows) == "choice"
    assert label(drawn.problem.expression, prefix, *windows[::-1]) == "choice"


@given(drawn=drawn, other=all_wordings, data=st.data())
def test_a_wrong_digit_is_an_error(drawn: Drawn, other: tuple[tuple[str, ...], ...], data) -> None:
    """One digit of a right solution changed, whichever it is, in whatever words both are written."""
    right = pieces(Drawn(drawn.problem, drawn.order, other).text())
    wrong = pieces(drawn.text())
    at = data.draw(st.sampled_from([n for n, piece in enumerate(wrong) if piece.isdigit()]))
    wrong[at] = data.draw(st.sampled_from([digit for digit in "0123456789" if digit != wrong[at]]))
    found = label(drawn.problem.expression, "", "".join(wrong), "".join(right))
    line_start = max((n for n in range(at) if wrong[n] == "\n"), default=-1) + 1
    before = meaning("".join(wrong[:line_start]))
    given_now = before[:-1].split("\n")[-1].partition(">")[2] if before else drawn.problem.expression
    operation = meaning("".join(wrong[line_start:])).partition("=")[0]
    became_another = operation in {step.operation for step in reductions(given_now)} and "=" not in meaning(
        "".join(wrong[line_start:at])
    )
    assert found == ("choice" if became_another else "error")


@given(drawn=drawn, other=all_wordings, data=st.data())
def test_a_copy_that_breaks_off_or_skips_is_an_error(drawn: Drawn, other: tuple[tuple[str, ...], ...], data) -> None:
    """One sign or line break of what is left over is missing, in whatever words both are written."""
    right = pieces(Drawn(drawn.problem, drawn.order, other).text())
    wrong = pieces(drawn.text())
    copied = [
        n
        for n, piece in enumerate(wrong)
        if piece in {*"()*+-", "\n"} and ">" in meaning("".join(wrong[:n])).split("\n")[-1]
    ]
    if not copied:
        return
    at = data.draw(st.sampled_from(copied))
    line_break = data.draw(st.booleans())
    if line_break and wrong[at] != "\n":
        wrong[at] = "\n"
    else:
        del wrong[at]
    if meaning("".join(wrong)) != meaning("".join(right)):
        assert label(drawn.problem.expression, "", "".join(wrong), "".join(right)) == "error"


@pytest.mark.parametrize(
    ("prefix", "student", "teacher", "expected"),
    [
        ("", "so 2+3=5", "first we take 2 plus 3 is ", "harmless"),
        ("so 2+3=5", " so we have (5*4)", " giving (5*4)-", "harmless"),
        ("so 2+3=5", " so we have ", " giving ", "harmless"),
        ("so 2+3=5", " so we have ", "1 giving ", "error"),
        ("", "so of course ", "then 2+3", "undecided"),
        ("", "so 6 minus 9", "so 2 plus 3", "choice"),
        ("", "so 6 minus 8", "so 2 plus 3", "error"),
        ("", "so 6 minus 9=8", "so 2 plus 3", "choice"),
        ("", "so 6", "so 2", "choice"),
        ("", "so 4", "so 2", "error"),
        ("so 2+3=", "6", "5", "error"),
        ("so 2+3=5 giving ", "(5*4)-(6-8)", "(5*4)-(6-9)", "error"),
        ("so 2+3=5 giving ", "(5*4)-\nso", "(5*4)-(6-9)", "error"),
        ("so 2+3=5 giving ", "(5*4)-(6-9)", "(5*4)-(6-9)\n", "harmless"),
        # After a wrong value, what follows from it is right.
        ("so 2+3=6 giving (6*4)-(6-9)\n", "so 6*4=24", "so 6-9=-3", "choice"),
        ("so 2+3=6 giving (6*4)-(6-9)\n", "so 5*4=24", "so 6-9=-3", "error"),
        ("so 2+3=6 nothing\n", "so 6*4=24", "so 6-9=-3", "error"),
        ("so 1=23 giving 23\n", f"#### 23{END}", "#### 23", "harmless"),
        ("so 1=23 giving 23\n", f"#### 23{END}", "#### 230", "error"),
        ("so 1=23 giving 23\n", "so #### 23", "#### 23", "error"),
    ],
)
def test_labels_by_hand(prefix: str, student: str, teacher: str, expected: str) -> None:
    assert label(EXPRESSION, prefix, student, teacher) == expected
    assert label(EXPRESSION, prefix, teacher, student) == expected


def test_one_of_two_equal_operations() -> None:
    expression, prefix = "(2+3)-(2+3)", "so 2+3=5 giving "
    assert label(expression, prefix, "5-(2+3)\n", "(2+3)-5\n") == "choice"
    assert label(expression, prefix, "5-(2+3)\n", "(2+3)-6\n") == "error"
    assert slot(expression, prefix, "(") == "choice"
    assert slot(expression, "so ", "2") == "copy"


def test_slots_by_hand() -> None:
    solution = pieces(f"so of course 6 minus 9=-3 leaves ((2+3)*4)--3\nso 2+3=5 giving (5*4)--3\n#### 23{END}")
    slots = [slot(EXPRESSION, "".join(solution[:n]), piece) for n, piece in enumerate(solution)]
    first = ["wording"] * 3 + ["choice", "wording", "copy", "wording", "value", "value", "wording"] + ["copy"] * 13
    second = ["wording", "copy", "wording", "copy", "wording", "value", "wording", *["copy"] * 9]
    assert slots == [*first, *second, "copy", "copy", "copy", "copy"]


@settings(max_examples=30)
@given(seed=st.integers(0, 10_000))
def test_two_writers_part_at_wordings_and_choices_only(seed: int) -> None:
    """Right solutions by both habits: the first piece they differ in lies in a slot of wording or of choice."""
    rng = random.Random(seed)
    problem = PROBLEMS[seed % len(PROBLEMS)]
    student, teacher = (pieces(write(problem, rng, habits) + END) for habits in (STUDENTS_HABITS, TEACHERS_HABITS))
    at = num_shared(student, teacher)
    if at == min(len(student), len(teacher)):
        return
    prefix = "".join(student[:at])
    where = {slot(problem.expression, prefix, solution[at]) for solution in (student, teacher)}
    found = label(problem.expression, prefix, "".join(student[at:]), "".join(teacher[at:]))
    assert found in ("harmless", "choice")
    assert where & {"wording", "choice"}
    if where == {"choice"}:
        assert found == "choice"
