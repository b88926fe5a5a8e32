"""The most striking false alarms and real forks of a probe, to read."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from scipy.stats import rankdata

from topd_ray.studies.probe.columns import Probed
from topd_ray.studies.statistics import Floats
from topd_ray.types import Trajectory

PREFIX_TOKENS = 48
Sort = Literal["false alarm", "real fork"]
Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One high-loss position, its near futures as text."""

    sort: Sort
    trajectory_id: str
    position: int
    loss: float
    """nats"""
    distance: float
    label: str
    """what the mismatch means, where that is known; else empty"""
    prefix: str
    """the last 48 tokens before the position, those of the prompt included"""
    student: str
    teacher: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def find_examples(
    rows: pa.Table,
    probed: Probed,
    quantile: float,
    num: int,
    trajectory_of: Mapping[str, Trajectory],
    decode: Decode,
) -> list[Example]:
    """`num` high-loss positions of either sort, at most one of a prompt, the most striking first.

    False alarms, as in training the distances up to their `quantile`: the largest rank of loss minus rank of distance.
    Real forks, all others: the largest sum of both ranks. Ranks are among all high-loss positions.
    """
    high = np.flatnonzero(probed.of_kind("high"))
    loss_rank, distance_rank = rankdata(probed.loss[high]), rankdata(probed.distance[high])
    is_alarm = probed.distance[high] <= np.quantile(probed.distance[high], quantile)
    sorts: tuple[tuple[Sort, Floats], ...] = (
        ("false alarm", np.where(is_alarm, loss_rank - distance_rank, -np.inf)),
        ("real fork", np.where(is_alarm, -np.inf, loss_rank + distance_rank)),
    )
    return [
        _example(sort, rows.slice(int(high[index]), 1).to_pylist()[0], trajectory_of, decode)
        for sort, score in sorts
        for index in _best(score, probed.prompt[high], num)
    ]


def examples_page(examples: Sequence[Example]) -> str:
    """Markdown."""
    parts = ["# Near futures to read", ""]
    for number, one in enumerate(examples, start=1):
        label = f", labelled {one.label}" if one.label else ""
        parts += [
            f"## {number}. {one.sort.capitalize()}: loss {one.loss:.2f} nats, distance {one.distance:.3f}{label}",
            "",
            f"Rollout `{one.trajectory_id}`, token {one.position}.",
            "",
        ]
        for title, text in (("prefix", one.prefix), ("student", one.student), ("teacher", one.teacher)):
            fence = "~" * max(3, 1 + _longest_run(text))
            parts += [f"{title}:", "", f"{fence}text", text, fence, ""]
    return "\n".join(parts)


def _best(score: Floats, prompt: Any, num: int) -> list[int]:
    """Rows of the largest finite scores, one a prompt."""
    found: dict[int, int] = {}
    for index in np.argsort(-score, kind="stable").tolist():
        if len(found) == num or not np.isfinite(score[index]):
            break
        found.setdefault(int(prompt[index]), index)
    return list(found.values())


def _example(sort: Sort, row: dict[str, Any], trajectory_of: Mapping[str, Trajectory], decode: Decode) -> Example:
    trajectory = trajectory_of[row["trajectory_id"]]
    before = [*trajectory.prompt_ids.tolist(), *trajectory.response_ids[: row["position"]].tolist()]
    return Example(
        sort=sort,
        trajectory_id=row["trajectory_id"],
        position=row["position"],
        loss=row["loss"],
        distance=row["distance"],
        label=row["label"],
        prefix=decode(before[-PREFIX_TOKENS:]),
        student=decode(row["student_ids"]),
        teacher=decode(row["teacher_ids"]),
    )


def _longest_run(text: str) -> int:
    """Of tildes."""
    longest = 0
    while "~" * (longest + 1) in text:
        longest += 1
    return longest
