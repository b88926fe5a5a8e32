"""Is an answer right?"""

from collections.abc import Callable
from typing import Literal

from topd_ray.demo import arithmetic
from topd_ray.evaluation.math_grader import MathGrader

Grader = Callable[[str, str], bool]
"""(response, expected answer) -> whether the response gives that answer"""


def grader(kind: Literal["arithmetic", "math"]) -> Grader:
    """`arithmetic` wants the exact integer after the answer marker, `math` an equal value by math-verify."""
    return arithmetic.grade if kind == "arithmetic" else MathGrader()
