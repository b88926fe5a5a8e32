"""The pre-flight lets a sound fleet pass and stops one that scores wrongly, NaN included."""

from dataclasses import dataclass
from typing import Any

import pytest

from topd_ray.actors.messages import LearnerCheck
from topd_ray.config.schema import TopdConfig
from topd_ray.errors import LearnerError, TeacherError
from topd_ray.pipeline.preflight import preflight


@dataclass
class Scored:
    """What a fleet answers to the pre-flight's questions."""

    loss: float = 1e-8
    largest: float = 1e-5
    mean: float = 1e-6
    teacher: float | None = 1e-5

    def own_teacher(self, requests: Any) -> list[Any]:
        return []

    def preflight(self, items: Any) -> LearnerCheck:
        return LearnerCheck(loss=self.loss, largest_difference=self.largest, mean_difference=self.mean)

    def verify_teacher(self, requests: Any) -> float | None:
        return self.teacher


def config(dtype: str) -> TopdConfig:
    model = {"model": "m", "dtype": dtype}
    return TopdConfig.model_validate({"student": model, "teacher": model, "learner": {"dtype": dtype}})


def check(fleet: Scored, dtype: str = "float32") -> list[str]:
    said: list[str] = []
    preflight(fleet, config(dtype), [], said.append)  # type: ignore[arg-type]  # only what the pre-flight asks
    return said


def test_says_what_it_found() -> None:
    assert check(Scored()) == [
        "pre-flight: learner against rollout engine 1.0e-05 nats, self-distillation loss 1.0e-08, "
        "teacher engine against plain forward pass 1.0e-05 nats"
    ]
    assert "plain forward pass not compared" in check(Scored(teacher=None))[0]


@pytest.mark.parametrize("bad", [2e-3, float("nan"), float("inf")])
def test_float32_allows_a_thousandth_of_a_nat(bad: float) -> None:
    with pytest.raises(LearnerError, match="learner and the rollout engine disagree"):
        check(Scored(largest=bad))
    with pytest.raises(LearnerError, match="its own teacher the loss is"):
        check(Scored(loss=bad))
    with pytest.raises(TeacherError, match="teacher engine and a plain forward pass disagree"):
        check(Scored(teacher=bad))


def test_bfloat16_goes_by_the_mean() -> None:
    assert check(Scored(largest=0.8, mean=0.01, loss=1e-3, teacher=0.5), "bfloat16")
    with pytest.raises(LearnerError, match=r"disagree by 0\.06"):
        check(Scored(mean=0.06), "bfloat16")
