"""Graders, and pass@1 with its interval."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from topd_ray.errors import ConfigError, DataError
from topd_ray.evaluation import math_grader
from topd_ray.evaluation.grading import grader, is_gradable
from topd_ray.evaluation.math_grader import MathGrader
from topd_ray.evaluation.pass_at_1 import PassAt1, pass_at_1


@pytest.fixture(scope="module")
def math() -> Iterator[MathGrader]:
    grade = grader("math")
    assert isinstance(grade, MathGrader)
    yield grade
    grade.close()


def test_arithmetic() -> None:
    grade = grader("arithmetic")
    assert grade("(1+2)*3\n3*3\n9\n#### 9", "9")
    assert not grade("(1+2)*3\n3*3\n9\n#### 10", "9")


@pytest.mark.parametrize(
    ("response", "answer", "right"),
    [
        ("So it is \\boxed{\\frac{1}{2}}.", "0.5", True),
        ("The answer is $x = 3$", "3", True),
        ("\\boxed{\\frac{2}{2}}", "1", True),
        ("\\boxed{7}", "\\boxed{7}", True),
        ("\\boxed{(1, 2)}", "(1,2)", True),
        ("\\boxed{\\frac12}", "\\[ \\frac{1}{2} \\]", True),
        ("\\boxed{\\$32,348}", "\\$32,348", True),
        ("\\boxed{1.25}", "\\$1.25", True),
        ("\\boxed{1.26}", "\\$1.25", False),
        (
            "\\boxed{\\begin{pmatrix} 1 \\\\[4pt] 2 \\end{pmatrix}}",
            "\\begin{pmatrix} 1 \\\\[4pt] 2 \\end{pmatrix}",
            True,
        ),
        ("\\boxed{2}", "\\begin{pmatrix} 1 \\\\[4pt] 2 \\end{pmatrix}", False),
        ("\\boxed{8}", "7", False),
        ("I do not know", "7", False),
        ("", "7", False),
        ("\\boxed{7}", "", False),
        ("\\boxed{\\frac{1}{}", "7", False),
        ("line one\nline two: \\boxed{7}\n", "7", True),
        ("\\boxed{7} \x00 \u2028 \U0001f600", "7", True),
    ],
)
def test_math(math: MathGrader, response: str, answer: str, right: bool) -> None:
    assert math(response, answer) is right


@pytest.mark.parametrize("answer", [None, "", " \n"])
def test_answers_that_no_response_can_give(answer: str | None) -> None:
    assert not is_gradable("math", answer)
    assert not is_gradable("arithmetic", answer)


def test_math_works_in_other_threads(math: MathGrader) -> None:
    marks: list[bool] = []
    threads = [
        threading.Thread(target=lambda value=value: marks.append(math(f"\\boxed{{{value}}}", "1")))
        for value in (1, 2, 1)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(marks) == [False, True, True]


def test_an_answer_that_takes_too_long_is_wrong(math: MathGrader) -> None:
    started = time.monotonic()
    assert not math("\\boxed{10^{10^{10}}}", "1")
    assert time.monotonic() - started < 20
    assert math("\\boxed{1}", "1")


def test_a_dead_child_is_replaced() -> None:
    grade = MathGrader()
    assert grade("\\boxed{1}", "1")
    child = grade._child
    assert child is not None
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert grade("\\boxed{1}", "1")
    grade.close()
    with pytest.raises(ProcessLookupError):
        os.kill(child.pid, 0)


def test_a_child_that_cannot_import_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child = tmp_path / "child.py"
    monkeypatch.setattr(math_grader, "_CHILD", child)
    child.write_text("import no_such_grader\n")
    with pytest.raises(ConfigError, match=r"does not start \(ModuleNotFoundError: No module named 'no_such_grader'\)"):
        MathGrader()("\\boxed{1}", "1")
    child.write_text("raise SystemExit(3)")
    with pytest.raises(ConfigError, match=r"does not start \(exit status 3\); right would be an environment whose"):
        MathGrader()("\\boxed{1}", "1")


def test_the_child_ends_with_its_parent() -> None:
    program = (
        "from topd_ray.evaluation.math_grader import MathGrader\n"
        "import os\n"
        "grade = MathGrader()\n"
        "assert grade('\\\\boxed{1}', '1')\n"
        "print(grade._child.pid, flush=True)\n"
        "os._exit(0)"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    pid = int(ran.stdout)
    for _ in range(100):
        if not os.path.exists(f"/proc/{pid}"):
            return
        time.sleep(0.05)
    raise AssertionError(f"process {pid} outlived its parent")


def test_pass_at_1_of_one_run() -> None:
    correct = {f"p{number}": (number < 30,) for number in range(100)}
    found = pass_at_1(correct, seed=0)
    assert (found.mean, found.num_prompts, found.num_runs) == (0.3, 100, 1)
    normal = 1.96 * np.sqrt(0.3 * 0.7 / 100)
    assert found.low == pytest.approx(0.3 - normal, abs=0.015)
    assert found.high == pytest.approx(0.3 + normal, abs=0.015)
    assert pass_at_1(dict(reversed(correct.items())), seed=0) == found


def test_runs_of_one_prompt_are_not_independent() -> None:
    """Eight runs that agree tell no more than one."""
    once = pass_at_1({f"p{number}": (number < 30,) for number in range(100)})
    often = pass_at_1({f"p{number}": (number < 30,) * 8 for number in range(100)})
    assert often == PassAt1(mean=once.mean, low=once.low, high=once.high, num_prompts=100, num_runs=8)
    mixed = pass_at_1({f"p{number}": (True, False) for number in range(100)})
    assert (mixed.mean, mixed.low, mixed.high) == (0.5, 0.5, 0.5)


def test_all_right_or_all_wrong_is_not_certain() -> None:
    right = pass_at_1({f"p{number}": (True,) for number in range(100)})
    assert (right.mean, right.high) == (1.0, 1.0)
    assert right.low**100 == pytest.approx(0.025)
    wrong = pass_at_1({f"p{number}": (False,) for number in range(100)})
    assert (wrong.mean, wrong.low) == (0.0, 0.0)
    assert wrong.high == pytest.approx(1 - right.low)


@pytest.mark.parametrize("correct", [{}, {"a": ()}, {"a": (True,), "b": (True, False)}])
def test_nothing_to_average(correct: dict[str, tuple[bool, ...]]) -> None:
    with pytest.raises(DataError, match="right would be prompts with equally many answers, at least one"):
        pass_at_1(correct)
