"""The config of the paper's experiments: `topd probe` and `topd study`. Part of the schema of a run (schema.py)."""

from typing import Annotated

from pydantic import Field

from topd_ray.config.section import PositiveInt, Section


class ProbeConfig(Section):
    """`topd probe`: the near futures of high-loss, random and low-loss positions."""

    num_trajectories: PositiveInt = 256
    """Student rollouts to look at; of each, as many positions of every kind as it has candidates."""
    trajectories_per_part: PositiveInt = 32
    """Rollouts that are drawn, looked at and kept together; an interruption loses no more than one such part."""
    num_examples: PositiveInt = 8
    """Most striking false alarms, and real forks, written out to read; where it is known what a mismatch means, up to 3
    errors that the distance misses as well."""


class LocalCorrectionConfig(Section):
    """`topd study local-correction`: a few updates at one divergent point, then the continuation drawn again. The
    student is updated in the command's own process, in float32, which takes 20 bytes of memory a parameter."""

    num_points: PositiveInt = 200
    """Real divergent points, each corrected from the same weights."""
    points_per_trajectory: PositiveInt = 1
    """Points taken from one trajectory, at most. More need fewer rollouts, and tell less by themselves: intervals
    resample prompts, of which there are then fewer."""
    num_updates: PositiveInt = 5
    """Updates on the window of a point (the paper's M)."""
    num_redraws: PositiveInt = 4
    """Continuations drawn after the updates, whose distances to the teacher's are averaged."""
    redraw_window: bool = False
    """Draw the student's window anew before every update, from the policy as it then is, instead of learning M times
    from the rollout's own. The teacher's engine then stays open beside the student."""
    learning_rate: Annotated[float, Field(gt=0.0)] | None = None
    """AdamW's rate for these updates; unset: learner.learning_rate."""
    other_rates: tuple[Annotated[float, Field(gt=0.0)], ...] = (0.1, 0.3, 3.0)
    """Multiples of that rate at which everything is done as well: what is left depends on the rate."""


class ArmsConfig(Section):
    """`topd study ablation` and `topd study sweep`: whole runs that differ in a few fields, paired by seed."""

    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] = (0, 1, 2, 3, 4)
    """Values of run.seed; every arm is run with each."""
    only: tuple[str, ...] = ()
    """Names of the arms to run; empty: all. `opd`, which all are compared with, is always run."""
    more: dict[str, tuple[str, ...]] = {}
    """Arms of your own beside the built-in ones: name -> overrides, for instance `{wide: [near_future.window=100]}`."""
    runs_at_once: PositiveInt = 1
    """Runs at a time on this machine, each a process of its own; several run `--inline`, with one CPU thread each."""


class StudiesConfig(Section):
    """The paper's experiments on this pair. `topd run` does not read this section."""

    probe: ProbeConfig = ProbeConfig()
    local_correction: LocalCorrectionConfig = LocalCorrectionConfig()
    arms: ArmsConfig = ArmsConfig()
