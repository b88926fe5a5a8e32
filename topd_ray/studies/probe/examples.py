"""The most striking false alarms and real forks of a probe, to read; and errors that the distance misses."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from scipy.stats import rankdata

from topd_ray.demo.worded_labels import FORKS
from topd_ray.studies.probe.columns import Bools, Probed
from topd_ray.studies.probe.detection import HARMLESS
from topd_ray.studies.statistics import Floats
from topd_ray.types import Trajectory

PREFIX_TOKENS = 48
MOST_MISSED = 3
Sort = Literal["false alarm", "real fork", "missed error"]
PARTS: Mapping[Sort, tuple[str, str]] = {
    "false alarm": ("False alarms", "High loss, and futures that stay near."),
    "real fork": ("Real forks", "High loss, and futures that part."),
    "missed error": (
        "Where the distance is wrong",
        "High loss, near by distance, and an error all the same: training would leave these out as false alarms.",
    ),
}
"""Heading of each sort, and what it shows."""
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

    Where labels are known, only false alarms that are harmless, and only real forks that are choices or errors, half of
    the places kept for choices; and up to 3 `missed error`s, labelled `error` where the distance says false alarm.
    """
    high = np.flatnonzero(probed.of_kind("high"))
    loss_rank, distance_rank = rankdata(probed.loss[high]), rankdata(probed.distance[high])
    is_alarm = probed.distance[high] <= np.quantile(probed.distance[high], quantile)
    label, prompt = probed.label[high], probed.prompt[high]
    of_alarm, of_fork = loss_rank - distance_rank, loss_rank + distance_rank
    chosen: dict[Sort, list[int]]
    if np.any(label != ""):
        choices = _best(of_fork, ~is_alarm & (label == "choice"), prompt, num // 2)
        others = np.isin(label, FORKS) & ~np.isin(prompt, prompt[choices])
        forks = [*choices, *_best(of_fork, ~is_alarm & others, prompt, num - len(choices))]
        chosen = {
            "false alarm": _best(of_alarm, is_alarm & (label == HARMLESS), prompt, num),
            "real fork": sorted(forks, key=lambda index: -of_fork[index]),
            "missed error": _best(of_alarm, is_alarm & (label == "error"), prompt, min(num, MOST_MISSED)),
        }
    else:
        chosen = {
            "false alarm": _best(of_alarm, is_alarm, prompt, num),
            "real fork": _best(of_fork, ~is_alarm, prompt, num),
        }
    return [
        _example(sort, rows.slice(int(high[index]), 1).to_pylist()[0], trajectory_of, decode)
        for sort, indices in chosen.items()
        for index in indices
    ]


def examples_page(examples: Sequence[Example]) -> str:
    """Markdown."""
    parts = ["# Near futures to read", ""]
    for number, one in enumerate(examples, start=1):
        if number == 1 or one.sort != examples[number - 2].sort:
            heading, shows = PARTS[one.sort]
            parts += [f"## {heading}", "", shows, ""]
        label = f", labelled {one.label}" if one.label else ""
        parts += [
            f"### {number}. {one.sort.capitalize()}: loss {one.loss:.2f} nats, distance {one.distance:.3f}{label}",
            "",
            f"Rollout `{one.trajectory_id}`, token {one.position}.",
            "",
        ]
        for title, text in (("prefix", one.prefix), ("student", one.student), ("teacher", one.teacher)):
            fence = "~" * max(3, 1 + _longest_run(text))
            parts += [f"{title}:", "", f"{fence}text", text, fence, ""]
    return "\n".join(parts)


def _best(score: Floats, rows: Bools, prompt: NDArray[np.int64], num: int) -> list[int]:
    """Those of `rows` with the largest scores, one a prompt."""
    found: dict[int, int] = {}
    for index in np.argsort(-score, kind="stable").tolist():
        if len(found) == num:
            break
        if rows[index]:
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
