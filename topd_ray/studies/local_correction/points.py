"""Real divergent points of student rollouts, each as a trajectory of its own: the prefix is its prompt, the window its
response. So the project's own losses and targets take a window as they take a rollout.

Axes: M candidates of one trajectory, K tokens of a window.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from topd_ray.config.schema import TopdConfig
from topd_ray.data.arrow import GUIDED_SCHEMA, batch_to_guided, guided_to_batch
from topd_ray.data.tokenizer import load_tokenizer
from topd_ray.engines.look_ahead import Asked, LookAhead
from topd_ray.engines.seeds import stable_seed
from topd_ray.engines.teacher import TeacherEngine
from topd_ray.errors import ConfigError
from topd_ray.objective import classify
from topd_ray.pipeline.plan import Say
from topd_ray.studies.futures import Distances, open_teacher
from topd_ray.studies.labelling import Labeller, find_labeller
from topd_ray.studies.rollouts import Rollouts, first_requests
from topd_ray.studies.statistics import Floats
from topd_ray.types import GuidedTrajectory, Int32, RolloutRequest, TeacherScores, Trajectory

GUIDES_ALWAYS = -1.0
"""Threshold that every distance is above."""
ROLLOUTS_A_PART = 64
COUNTS = b"topd_ray.counts"
EXTRA = ("distance", "teacher_again", "label")
"""What a point has besides its window."""
POINT_COLUMNS = (*GUIDED_SCHEMA.names, *EXTRA)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Point:
    """A divergent point, and what the student and the teacher wrote from there."""

    window: GuidedTrajectory
    """prompt: the prefix; response: the rollout's next tokens, at most K; targets: of the config's plan"""
    distance: float
    """of the rollout's own window to the teacher's"""
    teacher_again: float
    """mean distance of continuations that the teacher samples, to its own window: what a student that had become the
    teacher would have left"""
    label: str
    """what the mismatch means, where that is known by construction (`labelling`); else empty"""

    @property
    def name(self) -> str:
        return self.window.trajectory.trajectory_id

    @property
    def prefix_ids(self) -> Int32:
        return self.window.trajectory.prompt_ids

    @property
    def teacher_ids(self) -> Int32:
        """The teacher's window."""
        return self.window.windows.teacher_ids

    @property
    def lengths(self) -> str:
        """Whether the two windows have as many tokens, or which ends earlier."""
        student, teacher = self.window.trajectory.num_response_tokens, len(self.teacher_ids)
        if student == teacher:
            return "equal"
        return "the student's is shorter" if student < teacher else "the teacher's is shorter"


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """Where the points come from."""

    num_trajectories: int
    num_candidates: int
    num_cut: int
    """candidates left out, because the length limit cuts the rollout's window short"""
    threshold: float
    """distance above which a candidate is divergent"""


def point_requests(config: TopdConfig, say: Say) -> list[RolloutRequest]:
    """So many rollouts that one candidate each would give studies.local_correction.num_points divergent ones.

    Raises ConfigError where near_future.false_alarm_quantile is 1, and DataError as `first_requests` does.
    """
    study, quantile = config.studies.local_correction, config.near_future.false_alarm_quantile
    if quantile == 1.0:
        raise ConfigError(
            "near_future.false_alarm_quantile: found 1, which lets nothing diverge; right would be below 1"
        )
    num_rollouts = math.ceil(study.num_points / study.points_per_trajectory / (1.0 - quantile))
    return first_requests(config, load_tokenizer(config.student), num_rollouts, say)


def find_points(
    config: TopdConfig, requests: Sequence[RolloutRequest], folder: Path, say: Say
) -> tuple[list[Point], Counts]:
    """studies.local_correction.num_points points, in the order of their rollouts, or fewer if there are no more.

    Candidates are those of a training step. Divergent are those whose distance is above the quantile
    near_future.false_alarm_quantile of all candidates' distances; of a trajectory's, `points_per_trajectory` are drawn.
    The rollouts of `requests` are drawn into `folder`. The student's engine is gone by the time the teacher's opens.
    Raises ConfigError as `Rollouts.read` does.
    """
    study, quantile = config.studies.local_correction, config.near_future.false_alarm_quantile
    tokenizer = load_tokenizer(config.student)
    rollouts = Rollouts(folder, requests, ROLLOUTS_A_PART)
    rollouts.draw(config, say)
    trajectories = [one for part in range(rollouts.num_parts) for one in rollouts.read(part)]
    distances_of, labeller = Distances(config), find_labeller(config, tokenizer)
    say(f"loading {config.teacher.model}, which looks ahead")
    with open_teacher(config) as teacher:
        look_ahead = window_look_ahead(config, distances_of, teacher)
        asked = look_ahead.ask(trajectories)
        distances = [distances_of(_student_windows(config, one), one.continuations) for one in asked]
        threshold = float(np.quantile(np.concatenate(distances), quantile))
        cut = [_is_cut(config, one) for one in asked]
        chosen = [
            (one, m, float(distances_M[m]))
            for one, distances_M, cut_M in zip(asked, distances, cut, strict=True)
            for m in _choose(config, one.trajectory, np.flatnonzero(classify(distances_M, threshold) & ~cut_M))
        ][: study.num_points]
        windows = look_ahead.fold([_as_window(config, one, m) for one, m, _ in chosen], GUIDES_ALWAYS)
        again = _teacher_again(config, teacher, windows, distances_of)
    points = [
        Point(
            window=window,
            distance=distance,
            teacher_again=float(left),
            label=_label(labeller, one, m, window) if labeller else "",
        )
        for window, (one, m, distance), left in zip(windows, chosen, again, strict=True)
    ]
    return points, Counts(
        num_trajectories=len(trajectories),
        num_candidates=sum(map(len, distances)),
        num_cut=int(sum(cut_M.sum() for cut_M in cut)),
        threshold=threshold,
    )


def window_look_ahead(config: TopdConfig, distances_of: Distances, teacher: TeacherEngine) -> LookAhead:
    """Looks ahead, and folds targets of transport plans along the student's window, whatever the config trains with."""
    objective = config.objective.model_copy(update={"method": "topd", "cap": "none"})
    along = {"plan": "transport", "student_window": "reuse", "guidance_context": "student"}
    near_future = config.near_future.model_copy(update=along)
    return LookAhead(near_future, objective, distances_of.embedding_VD, teacher, config.run.seed)


def points_to_table(points: Sequence[Point], counts: Counts) -> pa.Table:
    """One row a point; the counts are in the metadata."""
    table = pa.Table.from_batches([guided_to_batch([point.window for point in points])])
    for name in EXTRA:
        table = table.append_column(name, pa.array([getattr(point, name) for point in points]))
    return table.replace_schema_metadata({**table.schema.metadata, COUNTS: json.dumps(asdict(counts)).encode()})


def table_to_points(table: pa.Table) -> tuple[list[Point], Counts]:
    """What `points_to_table` was given."""
    (batch,) = table.combine_chunks().to_batches()
    windows = batch_to_guided(
        pa.RecordBatch.from_arrays([batch[name] for name in GUIDED_SCHEMA.names], schema=GUIDED_SCHEMA)
    )
    more = zip(*(batch[name].to_pylist() for name in EXTRA), strict=True)
    points = [
        Point(window=window, **dict(zip(EXTRA, values, strict=True)))
        for window, values in zip(windows, more, strict=True)
    ]
    return points, Counts(**json.loads(table.schema.metadata[COUNTS]))


def _student_windows(config: TopdConfig, asked: Asked) -> list[Int32]:
    return [asked.trajectory.response_ids[t : t + config.near_future.window] for t in asked.positions.tolist()]


def _is_cut(config: TopdConfig, asked: Asked) -> np.ndarray:
    """[M], true where the rollout's window would have gone on beyond the length limit."""
    reaches_over_M = asked.positions + config.near_future.window > asked.trajectory.num_response_tokens
    return reaches_over_M & (asked.trajectory.finish_reason == "length")


def _choose(config: TopdConfig, trajectory: Trajectory, divergent: np.ndarray) -> list[int]:
    rng = np.random.default_rng(stable_seed(config.run.seed, "point", trajectory.trajectory_id))
    num_chosen = min(config.studies.local_correction.points_per_trajectory, divergent.size)
    return sorted(rng.choice(divergent, num_chosen, replace=False).tolist()) if num_chosen else []


def _as_window(config: TopdConfig, asked: Asked, m: int) -> Asked:
    """Candidate m as a trajectory of its own."""
    start, whole = int(asked.positions[m]), asked.trajectory
    rows = slice(start, start + config.near_future.window)
    return as_asked(
        Trajectory(
            trajectory_id=f"{whole.trajectory_id}@{start}",
            prompt_id=whole.prompt_id,
            sample_index=whole.sample_index,
            epoch=whole.epoch,
            policy_version=whole.policy_version,
            finish_reason=whole.finish_reason if rows.stop >= whole.num_response_tokens else "length",
            prompt_ids=np.concatenate([whole.prompt_ids, whole.response_ids[:start]]),
            response_ids=whole.response_ids[rows],
            behaviour_logprobs=whole.behaviour_logprobs[rows],
        ),
        TeacherScores(
            topk_ids=asked.scores.topk_ids[rows],
            topk_logprobs=asked.scores.topk_logprobs[rows],
            sampled_logprobs=asked.scores.sampled_logprobs[rows],
        ),
        asked.continuations[m],
    )


def as_asked(window: Trajectory, scores: TeacherScores, teacher_ids: Int32) -> Asked:
    """A trajectory that is one window, with the teacher's window after the same prefix."""
    return Asked(
        trajectory=window,
        scores=scores,
        positions=np.zeros(1, np.int32),
        continuations=(teacher_ids,),
        student_windows=(window.response_ids,),
    )


def _label(labeller: Labeller, asked: Asked, m: int, window: GuidedTrajectory) -> str:
    student_ids, teacher_ids = window.trajectory.response_ids, asked.continuations[m]
    return labeller(asked.trajectory, int(asked.positions[m]), student_ids.tolist(), teacher_ids.tolist())


def _teacher_again(
    config: TopdConfig, teacher: TeacherEngine, windows: Sequence[GuidedTrajectory], distances_of: Distances
) -> Floats:
    """[points], the mean distance of `num_redraws` continuations that the teacher samples, to its own window."""
    num_redraws = config.studies.local_correction.num_redraws
    repeated = [window for window in windows for _ in range(num_redraws)]
    seeds = [
        stable_seed(config.run.seed, "teacher again", window.trajectory.trajectory_id, index % num_redraws)
        for index, window in enumerate(repeated)
    ]
    drawn = teacher.continue_prefixes(
        [window.trajectory.prompt_ids for window in repeated],
        config.near_future.window,
        decoding="sample",
        seeds=seeds,
    )
    distances = distances_of(drawn, [window.windows.teacher_ids for window in repeated])
    means: Floats = distances.reshape(-1, num_redraws).mean(1)
    return means
