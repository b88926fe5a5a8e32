"""Is an answer right?"""

from collections.abc import Callable
from typing import Literal

from topd_ray.demo import arithmetic
from topd_ray.evaluation.math_grader import MathGrader

Grader = Callable[[str, str], bool]
"""(response, expected answer) -> whether the response gives that answer"""
Kind = Literal["arithmetic", "math"]


def grader(kind: Kind) -> Grader:
    """`arithmetic` wants the exact integer after the answer marker, `math` an equal value by math-verify."""
    return arithmetic.grade if kind == "arithmetic" else MathGrader()


def is_gradable(kind: Kind, answer: str | None) -> bool:
    """Whether some response could be right against `answer`."""
    return answer is not None and answer.strip() != "" and (kind != "arithmetic" or arithmetic.is_answer(answer))
