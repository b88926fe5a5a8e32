"""The rows of a probe as columns."""

from dataclasses import dataclass, fields

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from topd_ray.studies.probe.rows import Kind
from topd_ray.studies.statistics import Floats

Bools = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Probed:
    """The rows of a probe as columns; see rows.SCHEMA."""

    trajectory: NDArray[np.str_]
    prompt: NDArray[np.int64]
    """numbers of prompts"""
    kind: NDArray[np.str_]
    position: NDArray[np.int64]
    num_response_tokens: NDArray[np.int64]
    was_cut: Bools
    """whether rollout.max_new_tokens ended the response"""
    loss: Floats
    distance: Floats
    position_cost: Floats
    has_equal_lengths: Bools
    """whether the two windows have as many tokens"""
    label: NDArray[np.str_]

    @classmethod
    def of(cls, rows: pa.Table) -> "Probed":
        columns = {name: rows.column(name).to_numpy(zero_copy_only=False) for name in rows.column_names}
        return cls(
            trajectory=columns["trajectory_id"].astype(np.str_),
            prompt=np.unique(columns["prompt_id"].astype(np.str_), return_inverse=True)[1],
            kind=columns["kind"].astype(np.str_),
            position=columns["position"].astype(np.int64),
            num_response_tokens=columns["num_response_tokens"].astype(np.int64),
            was_cut=columns["finish_reason"] == "length",
            loss=columns["loss"].astype(np.float64),
            distance=columns["distance"].astype(np.float64),
            position_cost=columns["position_cost"].astype(np.float64),
            has_equal_lengths=np.fromiter(map(len, columns["student_ids"]), np.int64)
            == np.fromiter(map(len, columns["teacher_ids"]), np.int64),
            label=columns["label"].astype(np.str_),
        )

    def where(self, rows: Bools) -> "Probed":
        """Only these rows."""
        return Probed(**{one.name: getattr(self, one.name)[rows] for one in fields(self)})

    def has_full_window(self, window: int) -> Bools:
        """Whether the response does not end within the `window` tokens from the position on."""
        full: Bools = self.num_response_tokens - self.position >= window
        return full

    def of_kind(self, kind: Kind) -> Bools:
        found: Bools = self.kind == kind
        return found

    def once(self) -> Bools:
        """One row for each position, whatever its kinds."""
        first = np.zeros(self.kind.size, np.bool_)
        _, numbers = np.unique(self.trajectory, return_inverse=True)
        first[np.unique(np.stack([numbers, self.position]), axis=1, return_index=True)[1]] = True
        return first
