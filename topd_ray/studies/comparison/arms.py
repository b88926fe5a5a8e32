"""What the ablation and the sweep compare: arms, each the same run with a few fields set.

Every arm is listed here, and nowhere else. Fields that an arm does not set are those of the config.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from topd_ray.config.schema import TopdConfig
from topd_ray.config.study_schema import ArmsConfig
from topd_ray.errors import ConfigError

START, OPD, TOPD = "start", "opd", "topd"
"""The student before its first update (no arm: every run evaluates it), and the two arms that all are held against."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """Runs that differ from the others in `overrides`."""

    name: str
    text: str
    """what it is, for a table"""
    overrides: tuple[str, ...]
    """over the config, as on the command line"""


def _arm(name: str, text: str, *overrides: str) -> Arm:
    return Arm(name=name, text=text, overrides=overrides)


_OPD = ("objective.method=opd", "objective.cap=none")
_TOPD = ("objective.method=topd", "objective.cap=none")
_POLICY_GRADIENT = ("objective.divergence=sampled_pg", "objective.kl_discount=0.0")
_DISCOUNT = "objective.kl_discount=0.95"
_TEACHER_CONTEXT = "near_future.guidance_context=teacher"
_IDENTITY = "near_future.plan=identity"
_RANDOM = "near_future.ranking=random"
_ALL = "near_future.false_alarm_quantile=0"

ABLATION = (
    _arm(OPD, "per-token distillation", *_OPD),
    _arm("opd-low-cap", "OPD, false alarms capped", "objective.method=opd", "objective.cap=low_ot"),
    _arm("opd-high-cap", "OPD, real forks capped instead", "objective.method=opd", "objective.cap=matched_high_ot"),
    _arm(TOPD, "trajectory-aware", *_TOPD),
    _arm("topd-low-cap", "TOPD, false alarms capped", "objective.method=topd", "objective.cap=low_ot"),
    _arm("topd-high-cap", "TOPD, real forks capped instead", "objective.method=topd", "objective.cap=matched_high_ot"),
)
"""Tables 1 and 2 of the paper, and TOPD with both caps."""

RESERVED = {
    *("run.seed", "run.name", "run.root", "run.resume", "run.steps"),
    *(f"evaluation.{field}" for field in ("before", "after", "teacher", "every", "sampled_runs")),
}
"""Fields that a study sets for every run, or that all runs must share."""

PAPER = {START: 38.9, OPD: 47.8, "opd-low-cap": 48.2, "opd-high-cap": 42.1, TOPD: 52.2}
"""pass@1 of the paper, average of three benchmarks (%)."""
PAPER_COST = 1.41
"""Training time of TOPD over OPD's in the paper."""


def sweep(config: TopdConfig) -> tuple[Arm, ...]:
    """OPD and TOPD as configured, TOPD with one field changed, and rivals that cost less or as much.

    Numbers are multiples of the config's own, so that the sweep makes sense on any pair: lambda x 1/10, 1/3, 10/3; the
    window x 1/2, 2, 4, and x 1/2, 2 with the identity as plan; the share of candidates x 1/2, 2, 4.
    """
    arms = (
        _arm(OPD, "per-token distillation", *_OPD),
        _arm(TOPD, "as configured", *_TOPD),
        *_numbers(config),
        _topd("sampled-windows", "teacher windows drawn", "near_future.teacher_decoding=sample"),
        _topd("entropic", "entropic plans", "near_future.transport=entropic"),
        _topd("sum", "L_traj summed, not averaged", "objective.guidance_reduction=sum"),
        _topd("identity-plan", "position i learns the teacher's i-th token", _IDENTITY),
        *_identity_windows(config),
        _topd("random-candidates", "windows at random positions", _RANDOM),
        _topd("all-candidates", "no false alarms left out", _ALL),
        _topd("resampled-windows", "the student continues anew", "near_future.student_window=resample"),
        _topd("teacher-context", "the teacher's window after its own tokens", _TEACHER_CONTEXT),
        _topd("teacher-context-random", "the same at random positions", _TEACHER_CONTEXT, _RANDOM),
        _topd("teacher-context-all", "the same, no false alarms left out", _TEACHER_CONTEXT, _ALL),
        _topd("teacher-context-anywhere", "the same, nothing selected at all", _TEACHER_CONTEXT, _RANDOM, _ALL),
        _more_rollouts(config),
        _opd("policy-gradient", "policy gradient on the sampled token", *_POLICY_GRADIENT),
        _opd("discounted-kl", "the same, with the later tokens' advantage", *_POLICY_GRADIENT, _DISCOUNT),
    )
    return tuple({arm.name: arm for arm in arms}.values())  # multiples of a small or large number may be the same


def chosen(arms: Sequence[Arm], settings: ArmsConfig) -> tuple[Arm, ...]:
    """The built-in `arms` and the config's own, less those that `only` leaves out.

    Raises ConfigError for a name that is none, or is taken.
    """
    names = [arm.name for arm in arms]
    if taken := sorted({*names, START} & {*settings.more}):
        raise ConfigError(f"studies.arms.more: found {', '.join(taken)}, right would be names other than the built-in")
    for name, overrides in settings.more.items():
        if owned := sorted({one.partition("=")[0].strip() for one in overrides} & RESERVED):
            raise ConfigError(
                f"studies.arms.more.{name}: found {', '.join(owned)}, which the study sets itself; right would be "
                "fields that arms may differ in"
            )
    every = [*arms, *(_arm(name, "", *overrides) for name, overrides in settings.more.items())]
    known = [arm.name for arm in every]
    if strangers := sorted({*settings.only} - {*known, START}):
        raise ConfigError(
            f"studies.arms.only: found {', '.join(strangers)}, right would be some of {', '.join([START, *known])}"
        )
    return tuple(arm for arm in every if not settings.only or arm.name in (OPD, *settings.only))


def _opd(name: str, text: str, *overrides: str) -> Arm:
    return _arm(name, text, *_OPD, *overrides)


def _topd(name: str, text: str, *overrides: str) -> Arm:
    return _arm(name, text, *_TOPD, *overrides)


def _numbers(config: TopdConfig) -> Iterator[Arm]:
    near_future = config.near_future
    for factor in (0.1, 1 / 3, 10 / 3):
        value = f"{config.objective.guidance_weight * factor:.3g}"
        yield _topd(f"lambda-{value}", "weight of the guidance", f"objective.guidance_weight={value}")
    for factor in (0.5, 2.0, 4.0):
        window = _window(config, factor)
        yield _topd(f"window-{window}", "tokens of a window (K)", f"near_future.window={window}")
    for factor in (0.5, 2.0, 4.0):
        value = f"{min(1.0, near_future.candidate_fraction * factor):.3g}"
        yield _topd(f"candidates-{value}", "share of candidates", f"near_future.candidate_fraction={value}")


def _identity_windows(config: TopdConfig) -> Iterator[Arm]:
    """What transport adds may depend on the length of the windows."""
    for factor in (0.5, 2.0):
        window = _window(config, factor)
        overrides = (_IDENTITY, f"near_future.window={window}")
        yield _topd(f"identity-window-{window}", "the identity, another K", *overrides)


def _window(config: TopdConfig, factor: float) -> int:
    return max(1, round(config.near_future.window * factor))


def _more_rollouts(config: TopdConfig) -> Arm:
    """OPD that spends TOPD's extra teacher tokens on more prompts an update.

    Per response token OPD's teacher scores one, TOPD's also continues candidate_fraction prefixes by up to K tokens:
    1 + candidate_fraction x K times the work (a bound: windows end with the sequence).
    """
    factor = 1.0 + config.near_future.candidate_fraction * config.near_future.window
    prompts = round(config.rollout.prompts_per_step * factor)
    return _opd(
        "opd-more-rollouts", f"OPD with x {factor:.2f} prompts an update", f"rollout.prompts_per_step={prompts}"
    )
