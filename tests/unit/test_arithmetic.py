"""The demo task: values, splits, grading, reproducibility."""

import ast
import hashlib
import os
import re
import subprocess
import sys
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from topd_ray.demo.arithmetic import MAX_DIFFICULTY, MAX_VALUE, generate, grade, problem_stream, split_of
from topd_ray.errors import DataError

DIGEST_SCRIPT = """
import hashlib
from topd_ray.demo.arithmetic import generate
print(hashlib.sha256(repr(generate("heldout", 200, 5, 7)).encode()).hexdigest())
"""


def evaluate(expression: str) -> int:
    """Value of an expression by Python's own parser, independent of the module under test."""

    def value(node: ast.expr) -> int:
        match node:
            case ast.Constant(value=int(number)):
                return number
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -value(operand)
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                return value(left) + value(right)
            case ast.BinOp(left=left, op=ast.Sub(), right=right):
                return value(left) - value(right)
            case ast.BinOp(left=left, op=ast.Mult(), right=right):
                return value(left) * value(right)
        raise AssertionError(f"unexpected node {ast.dump(node)}")

    return value(ast.parse(expression, mode="eval").body)


def num_operators(expression: str) -> int:
    return sum(isinstance(node, ast.BinOp) for node in ast.walk(ast.parse(expression, mode="eval")))


@pytest.mark.parametrize("difficulty", range(2, MAX_DIFFICULTY + 1))
def test_every_line_evaluates_to_the_answer_and_reduces_one_operation(difficulty: int) -> None:
    for problem in generate("train", 150, difficulty, seed=3):
        *steps, final = problem.solution.split("\n")
        assert final == f"#### {problem.answer}"
        lines = [problem.expression, *steps]
        assert [evaluate(line) for line in lines] == [int(problem.answer)] * len(lines)
        assert [num_operators(a) - num_operators(b) for a, b in pairwise(lines)] == [1] * len(steps)
        assert num_operators(problem.expression) == len(steps)
        assert (difficulty + 1) // 2 <= len(steps) <= difficulty
        assert steps[-1] == problem.answer
        assert all(int(number) <= MAX_VALUE for line in lines for number in re.findall(r"\d+", line))


def test_the_documented_solution() -> None:
    problem = next(p for p in problem_stream("train", 3, seed=0) if re.fullmatch(r"\(\d.\d\).\(\d.\d\)", p.expression))
    first, second, third, final = problem.solution.split("\n")
    left, right = problem.expression[:5], problem.expression[6:]
    sign = problem.expression[5]
    assert first == f"{evaluate(left)}{sign}{right}"
    assert second == f"{evaluate(left)}{sign}{evaluate(right)}"
    assert third == problem.answer
    assert final == f"#### {problem.answer}"


def test_every_number_of_operators_up_to_the_difficulty_occurs() -> None:
    counts = {num_operators(problem.expression) for problem in generate("heldout", 200, 5, seed=0)}
    assert counts == {3, 4, 5}


def test_splits_are_disjoint_and_heldout_holds_no_duplicates() -> None:
    heldout = [problem.expression for problem in generate("heldout", 2_000, 5, seed=0)]
    train = [problem.expression for problem in generate("train", 10_000, 5, seed=0)]
    assert len(set(heldout)) == 2_000
    assert not set(heldout) & set(train)
    assert {split_of(expression) for expression in heldout} == {"heldout"}
    assert {split_of(expression) for expression in train} == {"train"}


def test_split_is_a_digest_of_the_text() -> None:
    expression = "(1+2)*3"
    expected = "heldout" if hashlib.sha256(expression.encode()).digest()[0] % 8 == 0 else "train"
    assert split_of(expression) == expected


def test_the_same_arguments_give_the_same_problems_in_another_process() -> None:
    here = hashlib.sha256(repr(generate("heldout", 200, 5, 7)).encode()).hexdigest()
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        there = subprocess.run(
            [sys.executable, "-c", DIGEST_SCRIPT], env=environment, capture_output=True, text=True, check=True
        )
        assert there.stdout.strip() == here


def test_seeds_and_lengths() -> None:
    assert generate("train", 0, 5, seed=0) == []
    assert generate("train", 50, 5, seed=0) == generate("train", 80, 5, seed=0)[:50]
    assert generate("train", 50, 5, seed=0) != generate("train", 50, 5, seed=1)


@pytest.mark.parametrize("difficulty", [-1, 0, MAX_DIFFICULTY + 1])
def test_difficulty_out_of_range_is_refused(difficulty: int) -> None:
    with pytest.raises(DataError, match="difficulty"):
        generate("train", 1, difficulty, seed=0)


def test_counts_that_cannot_be_had_are_refused() -> None:
    with pytest.raises(DataError, match="-1"):
        generate("train", -1, 5, seed=0)
    with pytest.raises(DataError, match="distinct heldout problems of difficulty 1"):
        generate("heldout", 1_000, 1, seed=0)


def test_difficulty_one_yields_every_operation_on_two_digits() -> None:
    both = {p.expression for split in ("train", "heldout") for p in problem_stream(split, 1, seed=0)}
    assert both == {f"{a}{sign}{b}" for a in range(1, 10) for b in range(1, 10) for sign in "+-*"}


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(DataError, match="'test'"):
        generate("test", 1, 5, seed=0)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("response", "answer"),
    [("#### 49", "49"), ("7*7\n49\n#### 49", "49"), ("#### 1\n#### -3", "-3"), ("#### 0\n", "0"), ("#### 7  \n", "7")],
)
def test_right_answers(response: str, answer: str) -> None:
    assert grade(response, answer) is True


@pytest.mark.parametrize(
    "response",
    [
        "",
        "49",
        "####",
        "#### ",
        "####49",
        "#### 49\n#### 50",
        "#### 49\n####",
        "#### 049",
        "#### +49",
        "#### -49",
        "#### 49.0",
        "#### 49 50",
        "#### 49\n1+1 #### 2",
        "#### forty-nine",
        "#### 4 9",
        "####  49",
        " #### 49",
        "##### 49",
        "#### ٤٩",
        "#### 4",
        "#### 490",
    ],
)
def test_wrong_or_malformed_answers(response: str) -> None:
    assert grade(response, "49") is False


def test_negative_zero_is_malformed() -> None:
    assert grade("#### -0", "0") is False
    assert grade("#### -0", "-0") is False


@given(st.lists(st.sampled_from(["#### ", "####", "7", "07", "-", "\n", " ", "1+6"]), max_size=8).map("".join))
def test_grading_agrees_with_a_line_by_line_reading(response: str) -> None:
    marked = [line for line in response.rstrip().split("\n") if "####" in line]
    assert grade(response, "7") is bool(marked and marked[-1] == "#### 7")
