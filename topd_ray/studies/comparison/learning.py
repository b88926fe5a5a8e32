"""What a finished run learnt: its answers at every evaluation, placed on updates, trained tokens and seconds.

Legend of axis suffixes: P held-out prompts, R runs over them.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from topd_ray.errors import DataError
from topd_ray.metrics.step_lines import read_lines
from topd_ray.provenance import UNKNOWN

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One evaluation of a student on its way."""

    step: int
    tokens: int
    """trained on by then"""
    seconds: float
    """of updates by then: evaluations, checkpoints and the start of the workers are left out"""
    marks_P: Floats
    """share of right answers to each held-out prompt"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Learning:
    """A finished run."""

    curve: tuple[Point, ...]
    """before, on the way, after"""
    sampled_before_P: Floats
    sampled_after_P: Floats
    """as `marks_P`, of answers drawn as rollouts are"""
    teacher: float | None
    """its pass@1, where the run evaluated it"""
    seconds: float
    """of the run, evaluations included"""
    commit: str
    """of the source that ended it"""
    scored_tokens: int
    """by the teacher"""
    num_windows: int
    """that the teacher continued"""
    capped: float
    """share of trained tokens that a cap was meant for, in 0..1"""

    def at(self, tokens: float) -> Floats | None:
        """`marks_P` at a number of trained tokens, linear between the evaluations around it.

        None before the first evaluation on the way: from the untrained student on, its bend is not known.
        """
        if not self.curve[0].tokens <= tokens <= self.curve[-1].tokens:
            raise DataError(
                f"found {tokens:g} trained tokens, right would be {self.curve[0].tokens} to {self.curve[-1].tokens}"
            )
        index = next(index for index, point in enumerate(self.curve) if point.tokens >= tokens)
        right = self.curve[index]
        if right.tokens == tokens:
            return right.marks_P
        if index == 1:
            return None
        left = self.curve[index - 1]
        share = (tokens - left.tokens) / (right.tokens - left.tokens)
        return (1.0 - share) * left.marks_P + share * right.marks_P


def read_learning(folder: Path) -> Learning:
    """What the run in `folder` wrote. Raises DataError where its files do not fit together."""
    try:
        return _read(folder)
    except KeyError as error:
        raise DataError(f"{folder}: found no {error} in what the run wrote, right would be a run of a study") from error


def _read(folder: Path) -> Learning:
    summary = json.loads((folder / "summary.json").read_text())
    updates = [line for line in read_lines(folder / "metrics.jsonl") if "run/trained_tokens" in line]
    steps = [line["step"] for line in updates]
    if steps != list(range(1, summary["steps"] + 1)):
        raise DataError(f"{folder}/metrics.jsonl: found {len(steps)} updates, right would be 1 to {summary['steps']}")
    answers = {(line["key"], line["step"]): _marks(line["correct"]) for line in read_lines(folder / "answers.jsonl")}
    tokens = [0, *(int(line["run/trained_tokens"]) for line in updates)]
    seconds = np.cumsum([0.0, *(line["seconds/step"] for line in updates)])
    evaluated = {
        step: marks_P for (key, step), marks_P in answers.items() if key in ("before", "after", f"step_{step}")
    }
    sampled = {key: marks_P for (key, _), marks_P in answers.items() if key.endswith("_sampled")}
    return Learning(
        curve=tuple(
            Point(step=step, tokens=tokens[step], seconds=float(seconds[step]), marks_P=evaluated[step])
            for step in sorted(evaluated)
        ),
        sampled_before_P=sampled["before_sampled"],
        sampled_after_P=sampled["after_sampled"],
        teacher=summary["accuracy"].get("teacher"),
        seconds=summary["seconds"],
        commit=summary.get("commit") or UNKNOWN,
        scored_tokens=int(_total(updates, "teacher/tokens")),
        num_windows=round(_windows(updates)),
        capped=_capped(updates),
    )


def _marks(texts_R: Sequence[str]) -> Floats:
    marks_RP = np.array([[int(mark) for mark in text_P] for text_P in texts_R], np.float64)
    return np.asarray(marks_RP.mean(0))


def _total(updates: Sequence[dict[str, Any]], key: str) -> float:
    return float(sum(line[key] for line in updates))


def _windows(updates: Sequence[dict[str, Any]]) -> float:
    """near_future/windows is a mean over trajectories guided meanwhile, rollout/response_tokens their mean length."""
    guided = [line for line in updates if line.get("near_future/windows")]
    windows = (one["near_future/windows"] * one["teacher/tokens"] / one["rollout/response_tokens"] for one in guided)
    return float(sum(windows))


def _capped(updates: Sequence[dict[str, Any]]) -> float:
    tokens = np.diff([0, *(line["run/trained_tokens"] for line in updates)])
    return float(np.average([line.get("near_future/capped_tokens", 0.0) for line in updates], weights=tokens))
