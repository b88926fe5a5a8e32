"""Trajectories as Arrow record batches: how they travel, and how they are written to Parquet.

Arrays go in and come back as views of the same memory where Arrow allows it: always on the way back, and for a single
row on the way in. Views of a record batch are read-only. Booleans travel as bytes, since Arrow's own are bits.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import DTypeLike, NDArray

from topd_ray.errors import DataError
from topd_ray.types import Branches, GuidedTrajectory, SparseTargets, TeacherScores, Trajectory, Windows

VERSION_KEY = b"topd_ray.schema"
_IDS = pa.large_list(pa.field("item", pa.int32(), nullable=False))
_POINTERS = pa.large_list(pa.field("item", pa.int64(), nullable=False))
_FLOATS = pa.large_list(pa.field("item", pa.float32(), nullable=False))
_FLAGS = pa.large_list(pa.field("item", pa.uint8(), nullable=False))

_TRAJECTORY_COLUMNS: dict[str, pa.DataType] = {
    "trajectory_id": pa.string(),
    "prompt_id": pa.string(),
    "sample_index": pa.int32(),
    "epoch": pa.int32(),
    "policy_version": pa.int64(),
    "finish_reason": pa.string(),
    "prompt_ids": _IDS,
    "response_ids": _IDS,
    "behaviour_logprobs": _FLOATS,
}
_GUIDED_COLUMNS: dict[str, pa.DataType] = {
    **_TRAJECTORY_COLUMNS,
    "top_k": pa.int32(),
    "topk_ids": _IDS,
    "topk_logprobs": _FLOATS,
    "sampled_logprobs": _FLOATS,
    "target_indptr": _POINTERS,
    "target_ids": _IDS,
    "target_weights": _FLOATS,
    "target_entropy": _FLOATS,
    "capped": _FLAGS,
    "window_positions": _IDS,
    "window_distances": _FLOATS,
    "window_divergent": _FLAGS,
    "window_teacher_indptr": _POINTERS,
    "window_teacher_ids": _IDS,
    "branch_positions": _IDS,
    "branch_indptr": _POINTERS,
    "branch_ids": _IDS,
    "branch_target_indptr": _POINTERS,
    "branch_target_ids": _IDS,
    "branch_target_weights": _FLOATS,
    "branch_target_entropy": _FLOATS,
}


def _schema(name: str, columns: dict[str, pa.DataType]) -> pa.Schema:
    return pa.schema(
        [pa.field(key, kind, nullable=False) for key, kind in columns.items()], metadata={VERSION_KEY: name}
    )


TRAJECTORY_SCHEMA = _schema("trajectory/1", _TRAJECTORY_COLUMNS)
GUIDED_SCHEMA = _schema("guided_trajectory/2", _GUIDED_COLUMNS)


def trajectories_to_batch(trajectories: Sequence[Trajectory]) -> pa.RecordBatch:
    """One row a trajectory. Raises DataError for an array of another type or length than its record says."""
    return _to_batch([_trajectory_cells(trajectory) for trajectory in trajectories], TRAJECTORY_SCHEMA)


def batch_to_trajectories(batch: pa.RecordBatch) -> list[Trajectory]:
    """Views of the rows of `batch`. Raises DataError for a batch of another schema."""
    return [_trajectory(cells) for cells in _rows(batch, TRAJECTORY_SCHEMA)]


def guided_to_batch(guided: Sequence[GuidedTrajectory]) -> pa.RecordBatch:
    """One row a trajectory; a single one without a copy. Raises DataError as `trajectories_to_batch` does."""
    return _to_batch([_guided_cells(one) for one in guided], GUIDED_SCHEMA)


def batch_to_guided(batch: pa.RecordBatch) -> list[GuidedTrajectory]:
    """Views of the rows of `batch`. Raises DataError for a batch of another schema."""
    return [_guided(cells) for cells in _rows(batch, GUIDED_SCHEMA)]


def _guided_cells(guided: GuidedTrajectory) -> dict[str, Any]:
    scores, targets, windows, branches = guided.scores, guided.targets, guided.windows, guided.branches
    num_tokens, num_windows = guided.trajectory.num_response_tokens, len(windows.positions)
    top_k = scores.topk_ids.shape[1] if scores.topk_ids.ndim == 2 else 0
    _check_shape("topk_ids", scores.topk_ids, (num_tokens, top_k))
    _check_shape("topk_logprobs", scores.topk_logprobs, (num_tokens, top_k))
    _check_shape("sampled_logprobs", scores.sampled_logprobs, (num_tokens,))
    for name, part, length in (
        ("targets", targets, num_tokens),
        ("branches.targets", branches.targets, len(branches.token_ids)),
    ):
        _check_shape(f"{name}.indptr", part.indptr, (length + 1,))
        _check_shape(f"{name}.entropy", part.entropy, (length,))
        _check_shape(f"{name}.weights", part.weights, (len(part.token_ids),))
    _check_shape("capped", guided.capped, (num_tokens,))
    _check_shape("windows.distances", windows.distances, (num_windows,))
    _check_shape("windows.divergent", windows.divergent, (num_windows,))
    _check_shape("windows.teacher_indptr", windows.teacher_indptr, (num_windows + 1,))
    _check_shape("branches.indptr", branches.indptr, (len(branches.positions) + 1,))
    return {
        **_trajectory_cells(guided.trajectory),
        "top_k": top_k,
        "topk_ids": scores.topk_ids,
        "topk_logprobs": scores.topk_logprobs,
        "sampled_logprobs": scores.sampled_logprobs,
        "target_indptr": targets.indptr,
        "target_ids": targets.token_ids,
        "target_weights": targets.weights,
        "target_entropy": targets.entropy,
        "capped": guided.capped,
        "window_positions": windows.positions,
        "window_distances": windows.distances,
        "window_divergent": windows.divergent,
        "window_teacher_indptr": windows.teacher_indptr,
        "window_teacher_ids": windows.teacher_ids,
        "branch_positions": branches.positions,
        "branch_indptr": branches.indptr,
        "branch_ids": branches.token_ids,
        "branch_target_indptr": branches.targets.indptr,
        "branch_target_ids": branches.targets.token_ids,
        "branch_target_weights": branches.targets.weights,
        "branch_target_entropy": branches.targets.entropy,
    }


def _guided(cells: dict[str, Any]) -> GuidedTrajectory:
    topk_shape = (len(cells["response_ids"]), cells["top_k"])
    return GuidedTrajectory(
        trajectory=_trajectory(cells),
        scores=TeacherScores(
            topk_ids=cells["topk_ids"].reshape(topk_shape),
            topk_logprobs=cells["topk_logprobs"].reshape(topk_shape),
            sampled_logprobs=cells["sampled_logprobs"],
        ),
        targets=SparseTargets(
            indptr=cells["target_indptr"],
            token_ids=cells["target_ids"],
            weights=cells["target_weights"],
            entropy=cells["target_entropy"],
        ),
        capped=cells["capped"].view(np.bool_),
        windows=Windows(
            positions=cells["window_positions"],
            distances=cells["window_distances"],
            divergent=cells["window_divergent"].view(np.bool_),
            teacher_indptr=cells["window_teacher_indptr"],
            teacher_ids=cells["window_teacher_ids"],
        ),
        branches=Branches(
            positions=cells["branch_positions"],
            indptr=cells["branch_indptr"],
            token_ids=cells["branch_ids"],
            targets=SparseTargets(
                indptr=cells["branch_target_indptr"],
                token_ids=cells["branch_target_ids"],
                weights=cells["branch_target_weights"],
                entropy=cells["branch_target_entropy"],
            ),
        ),
    )


def _trajectory_cells(trajectory: Trajectory) -> dict[str, Any]:
    _check_shape("prompt_ids", trajectory.prompt_ids, (trajectory.prompt_ids.size,))
    _check_shape("response_ids", trajectory.response_ids, (trajectory.response_ids.size,))
    _check_shape("behaviour_logprobs", trajectory.behaviour_logprobs, (trajectory.num_response_tokens,))
    return {key: getattr(trajectory, key) for key in _TRAJECTORY_COLUMNS}


def _trajectory(cells: dict[str, Any]) -> Trajectory:
    return Trajectory(**{key: cells[key] for key in _TRAJECTORY_COLUMNS})


def _to_batch(rows: Sequence[dict[str, Any]], schema: pa.Schema) -> pa.RecordBatch:
    columns = [_column(field, [row[field.name] for row in rows]) for field in schema]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _column(field: pa.Field, cells: list[Any]) -> pa.Array:
    if not pa.types.is_large_list(field.type):
        return pa.array(cells, field.type)
    item = field.type.value_type
    dtype = np.dtype(item.to_pandas_dtype())
    flat = [_flat(field.name, cell, dtype) for cell in cells]
    values = flat[0] if len(flat) == 1 else np.concatenate(flat) if flat else np.zeros(0, dtype)
    offsets = np.zeros(len(flat) + 1, np.int64)
    np.cumsum([len(one) for one in flat], out=offsets[1:])
    return pa.Array.from_buffers(
        field.type,
        len(flat),
        [None, pa.py_buffer(offsets)],
        children=[pa.Array.from_buffers(item, len(values), [None, pa.py_buffer(values)])],
    )


def _flat(name: str, array: NDArray[Any], dtype: DTypeLike) -> NDArray[Any]:
    if array.dtype == np.bool_ and dtype == np.uint8:
        array = array.view(np.uint8)
    if array.dtype != dtype:
        raise DataError(f"{name}: found an array of {array.dtype}, right would be {dtype}")
    return np.ascontiguousarray(array).reshape(-1)


def _rows(batch: pa.RecordBatch, schema: pa.Schema) -> Iterator[dict[str, Any]]:
    """The cells of every row by column: Python values, and views of arrays."""
    _check_schema(batch, schema)
    columns = [_cells(batch.column(field.name)) for field in schema]
    for cells in zip(*columns, strict=True):
        yield dict(zip(schema.names, cells, strict=True))


def _cells(column: pa.Array) -> list[Any]:
    if not pa.types.is_large_list(column.type):
        values: list[Any] = column.to_pylist()
        return values
    offsets = column.offsets.to_pylist()
    flat = column.values.to_numpy(zero_copy_only=True)
    return [flat[start:stop] for start, stop in pairwise(offsets)]


def _check_shape(name: str, array: NDArray[Any], shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise DataError(f"{name}: found an array of shape {array.shape}, right would be {shape}")


def _check_schema(batch: pa.RecordBatch, expected: pa.Schema) -> None:
    found = (batch.schema.metadata or {}).get(VERSION_KEY, b"none").decode(errors="replace")
    wanted = expected.metadata[VERSION_KEY].decode()
    if found != wanted:
        raise DataError(f"a record batch of schema {found} was found where {wanted} would be right")
    if not batch.schema.equals(expected):
        names = sorted({field.name for field in batch.schema} ^ {field.name for field in expected})
        raise DataError(f"a record batch says it is {wanted}, but its columns differ ({', '.join(names) or 'in type'})")
