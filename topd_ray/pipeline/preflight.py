"""Checks before the first step, on real rollouts of the student: do all ways of scoring a token agree?"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from topd_ray.config.schema import TopdConfig
from topd_ray.errors import LearnerError, TeacherError
from topd_ray.pipeline.fleet import Fleet
from topd_ray.types import Metric, RolloutRequest

NUM_PROMPTS = 4
FP32_NATS = 1e-3
"""Largest difference of one token's log-prob, and largest loss of the student as its own teacher, in float32."""
BF16_MEAN_NATS = 0.05
"""Largest mean difference in bfloat16, whose 8 bits of mantissa let single rare tokens differ by much more."""
BF16_MAX_NATS = 1.0
"""Largest difference of one token's log-prob where the teacher's engine computes in bfloat16."""
BF16_LOSS = 0.02
"""Largest loss of the student as its own teacher in bfloat16 (nats per token)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PreflightReport:
    """What the checks found (nats)."""

    learner_difference: float
    """largest |learner - rollout engine| of a sampled token's log-prob"""
    self_distillation_loss: float
    """mean token loss with the student as its own teacher"""
    teacher_difference: float | None
    """largest |teacher engine - plain forward pass|; None where the teacher is too large to load twice"""

    def metrics(self) -> list[Metric]:
        found = {
            "preflight/learner_difference": self.learner_difference,
            "preflight/self_distillation_loss": self.self_distillation_loss,
            "preflight/teacher_difference": self.teacher_difference,
        }
        return [Metric(key=key, sum=value) for key, value in found.items() if value is not None]


def preflight(
    fleet: Fleet, config: TopdConfig, requests: Sequence[RolloutRequest], say: Callable[[str], None]
) -> PreflightReport:
    """Run all checks on `requests`. Raises LearnerError or TeacherError with the figure and what it may mean."""
    is_bf16 = "bfloat16" in (config.student.dtype, config.learner.dtype)
    found = fleet.preflight(fleet.own_teacher(requests))
    difference, bound = (found.mean_difference, BF16_MEAN_NATS) if is_bf16 else (found.largest_difference, FP32_NATS)
    if not difference <= bound:  # so that NaN fails as well
        raise LearnerError(
            f"the learner and the rollout engine disagree by {difference:.2g} nats on a token of the student, more "
            f"than {bound:g}: student.dtype, learner.dtype or the model's code differ between the two"
        )
    loss, loss_bound = found.loss, BF16_LOSS if is_bf16 else FP32_NATS
    if not abs(loss) <= loss_bound:
        raise LearnerError(
            f"with the student as its own teacher the loss is {loss:.2g} nats a token, more than {loss_bound:g}: "
            "scoring and learning do not see the same distribution"
        )
    teacher_difference = fleet.verify_teacher(requests) if config.teacher.verify else None
    teacher_bound = BF16_MAX_NATS if config.teacher.dtype == "bfloat16" else FP32_NATS
    if teacher_difference is not None and not teacher_difference <= teacher_bound:
        raise TeacherError(
            f"the teacher engine and a plain forward pass disagree by {teacher_difference:.2g} nats on a token, "
            f"more than {teacher_bound:g}: teacher.dtype or the model's implementation in vLLM is off"
        )
    checked = "not compared" if teacher_difference is None else f"{teacher_difference:.1e} nats"
    say(
        f"pre-flight: learner against rollout engine {found.largest_difference:.1e} nats, self-distillation loss "
        f"{loss:.1e}, teacher engine against plain forward pass {checked}"
    )
    return PreflightReport(
        learner_difference=found.largest_difference,
        self_distillation_loss=loss,
        teacher_difference=teacher_difference,
    )
