"""Trajectories as Arrow record batches: how they travel, and how they are written to Parquet.

Arrays go in and come back as views of the same memory where Arrow allows it: always on the way back, and for a single
row on the way in. Views of a record batch are read-only. Booleans travel as bytes, since Arrow's own are bits.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import DTypeLike, NDArray

from topd_ray.errors import DataError
from topd_ray.types import GuidedTrajectory, SparseTargets, TeacherScores, Trajectory, Windows

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
}


def _schema(name: str, columns: dict[str, pa.DataType]) -> pa.Schema:
    return pa.schema(
        [pa.field(key, kind, nullable=False) for key, kind in columns.items()], metadata={VERSION_KEY: name}
    )


TRAJECTORY_SCHEMA = _schema("trajectory/1", _TRAJECTORY_COLUMNS)
GUIDED_SCHEMA = _schema("guided_trajectory/1", _GUIDED_COLUMNS)


def trajectories_to_batch(trajectories: Sequence[Trajectory]) -> pa.RecordBatch:
    """One row a trajectory. Raises DataError for an array of another type or length than its record says."""
    return _to_batch([_trajectory_cells(trajectory) for trajectory in trajectories], TRAJECTORY_SCHEMA)


def batch_to_trajectories(batch: pa.RecordBatch) -> list[Trajectory]:
    """Views of the rows of `batch`. Raises DataError for a batch of another schema."""
    _check_schema(batch, TRAJECTORY_SCHEMA)
    return [_trajectory(batch, row) for row in range(batch.num_rows)]


def guided_to_batch(guided: GuidedTrajectory) -> pa.RecordBatch:
    """One row, without a copy. Raises DataError for an array of another type or length than its record says."""
    scores, targets, windows = guided.scores, guided.targets, guided.windows
    num_tokens, num_windows = guided.trajectory.num_response_tokens, len(windows.positions)
    top_k = scores.topk_ids.shape[1] if scores.topk_ids.ndim == 2 else 0
    _check_shape("topk_ids", scores.topk_ids, (num_tokens, top_k))
    _check_shape("topk_logprobs", scores.topk_logprobs, (num_tokens, top_k))
    _check_shape("sampled_logprobs", scores.sampled_logprobs, (num_tokens,))
    _check_shape("targets.indptr", targets.indptr, (num_tokens + 1,))
    _check_shape("targets.entropy", targets.entropy, (num_tokens,))
    _check_shape("targets.weights", targets.weights, (len(targets.token_ids),))
    _check_shape("capped", guided.capped, (num_tokens,))
    _check_shape("windows.distances", windows.distances, (num_windows,))
    _check_shape("windows.divergent", windows.divergent, (num_windows,))
    _check_shape("windows.teacher_indptr", windows.teacher_indptr, (num_windows + 1,))
    cells = {
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
    }
    return _to_batch([cells], GUIDED_SCHEMA)


def batch_to_guided(batch: pa.RecordBatch, row: int = 0) -> GuidedTrajectory:
    """A view of one row of `batch`. Raises DataError for a batch of another schema."""
    _check_schema(batch, GUIDED_SCHEMA)
    top_k = batch.column("top_k")[row].as_py()
    topk_shape = (_length(batch, "response_ids", row), top_k)
    return GuidedTrajectory(
        trajectory=_trajectory(batch, row),
        scores=TeacherScores(
            topk_ids=_array(batch, "topk_ids", row).reshape(topk_shape),
            topk_logprobs=_array(batch, "topk_logprobs", row).reshape(topk_shape),
            sampled_logprobs=_array(batch, "sampled_logprobs", row),
        ),
        targets=SparseTargets(
            indptr=_array(batch, "target_indptr", row),
            token_ids=_array(batch, "target_ids", row),
            weights=_array(batch, "target_weights", row),
            entropy=_array(batch, "target_entropy", row),
        ),
        capped=_array(batch, "capped", row).view(np.bool_),
        windows=Windows(
            positions=_array(batch, "window_positions", row),
            distances=_array(batch, "window_distances", row),
            divergent=_array(batch, "window_divergent", row).view(np.bool_),
            teacher_indptr=_array(batch, "window_teacher_indptr", row),
            teacher_ids=_array(batch, "window_teacher_ids", row),
        ),
    )


def _trajectory_cells(trajectory: Trajectory) -> dict[str, Any]:
    _check_shape("prompt_ids", trajectory.prompt_ids, (trajectory.prompt_ids.size,))
    _check_shape("response_ids", trajectory.response_ids, (trajectory.response_ids.size,))
    _check_shape("behaviour_logprobs", trajectory.behaviour_logprobs, (trajectory.num_response_tokens,))
    return {key: getattr(trajectory, key) for key in _TRAJECTORY_COLUMNS}


def _trajectory(batch: pa.RecordBatch, row: int) -> Trajectory:
    cells: dict[str, Any] = {
        key: _array(batch, key, row) if pa.types.is_large_list(kind) else batch.column(key)[row].as_py()
        for key, kind in _TRAJECTORY_COLUMNS.items()
    }
    return Trajectory(**cells)


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


def _array(batch: pa.RecordBatch, name: str, row: int) -> NDArray[Any]:
    column = batch.column(name)
    start, stop = column.offsets[row].as_py(), column.offsets[row + 1].as_py()
    view: NDArray[Any] = column.values.slice(start, stop - start).to_numpy(zero_copy_only=True)
    return view


def _length(batch: pa.RecordBatch, name: str, row: int) -> int:
    offsets = batch.column(name).offsets
    return int(offsets[row + 1].as_py() - offsets[row].as_py())


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
