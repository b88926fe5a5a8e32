"""Trajectories through Arrow and back, bit by bit."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from topd_ray.data.arrow import (
    GUIDED_SCHEMA,
    TRAJECTORY_SCHEMA,
    batch_to_guided,
    batch_to_trajectories,
    guided_to_batch,
    trajectories_to_batch,
)
from topd_ray.errors import DataError
from topd_ray.types import Branches, GuidedTrajectory, SparseTargets, TeacherScores, Trajectory, Windows

RECORDS = (Trajectory, TeacherScores, SparseTargets, Windows, Branches)
IDS = st.text(max_size=8)
TOKENS = st.integers(0, 2**31 - 1)
FLOATS = st.floats(width=32)


def array(draw: Any, dtype: Any, shape: Any, elements: Any = None) -> NDArray[Any]:
    drawn: NDArray[Any] = draw(arrays(dtype, shape, elements=elements))
    return drawn


@st.composite
def trajectories(draw: Any) -> Trajectory:
    num_tokens = draw(st.integers(0, 5))
    return Trajectory(
        trajectory_id=draw(IDS),
        prompt_id=draw(IDS),
        sample_index=draw(st.integers(0, 1000)),
        epoch=draw(st.integers(-1, 1000)),
        policy_version=draw(st.integers(0, 2**40)),
        finish_reason=draw(st.sampled_from(["stop", "length"])),
        prompt_ids=array(draw, np.int32, draw(st.integers(0, 4)), TOKENS),
        response_ids=array(draw, np.int32, num_tokens, TOKENS),
        behaviour_logprobs=array(draw, np.float32, num_tokens, FLOATS),
    )


@st.composite
def guided_trajectories(draw: Any) -> GuidedTrajectory:
    trajectory = draw(trajectories())
    num_tokens, top_k = trajectory.num_response_tokens, draw(st.integers(1, 4))
    num_windows, num_branches, num_own = (draw(st.integers(0, 3)) for _ in range(3))
    return GuidedTrajectory(
        trajectory=trajectory,
        scores=TeacherScores(
            topk_ids=array(draw, np.int32, (num_tokens, top_k), TOKENS),
            topk_logprobs=array(draw, np.float32, (num_tokens, top_k), FLOATS),
            sampled_logprobs=array(draw, np.float32, num_tokens, FLOATS),
        ),
        targets=sparse_targets(draw, num_tokens),
        capped=array(draw, np.bool_, num_tokens),
        windows=Windows(
            positions=array(draw, np.int32, num_windows, TOKENS),
            distances=array(draw, np.float32, num_windows, FLOATS),
            divergent=array(draw, np.bool_, num_windows),
            teacher_indptr=array(draw, np.int64, num_windows + 1),
            teacher_ids=array(draw, np.int32, draw(st.integers(0, 7)), TOKENS),
        ),
        branches=Branches(
            positions=array(draw, np.int32, num_branches, TOKENS),
            indptr=array(draw, np.int64, num_branches + 1),
            token_ids=array(draw, np.int32, num_own, TOKENS),
            targets=sparse_targets(draw, num_own),
        ),
    )


def sparse_targets(draw: Any, num_tokens: int) -> SparseTargets:
    num_targets = draw(st.integers(0, 6))
    return SparseTargets(
        indptr=array(draw, np.int64, num_tokens + 1),
        token_ids=array(draw, np.int32, num_targets, TOKENS),
        weights=array(draw, np.float32, num_targets, FLOATS),
        entropy=array(draw, np.float32, num_tokens, FLOATS),
    )


def assert_bitwise(one: Any, other: Any) -> None:
    """Equal records, arrays by type, shape and bytes (so that NaN equals NaN, and -0 is not 0)."""
    assert type(one) is type(other)
    for name in one.__dataclass_fields__:
        first, second = getattr(one, name), getattr(other, name)
        if isinstance(first, np.ndarray):
            assert (first.dtype, first.shape) == (second.dtype, second.shape), name
            assert first.tobytes() == second.tobytes(), name
        elif isinstance(first, RECORDS):
            assert_bitwise(first, second)
        else:
            assert first == second, name


def through_ipc(batch: pa.RecordBatch) -> pa.RecordBatch:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as stream:
        stream.write_batch(batch)
    return pa.ipc.open_stream(sink.getvalue()).read_next_batch()


def small_guided() -> GuidedTrajectory:
    return GuidedTrajectory(
        trajectory=small_trajectory(),
        scores=TeacherScores(
            topk_ids=np.array([[1, 2], [3, 4]], np.int32),
            topk_logprobs=np.array([[-0.5, -1.0], [-0.25, -2.0]], np.float32),
            sampled_logprobs=np.array([-0.5, -2.0], np.float32),
        ),
        targets=SparseTargets.empty(2),
        capped=np.array([True, False]),
        windows=Windows.empty(),
    )


def small_trajectory() -> Trajectory:
    return Trajectory(
        trajectory_id="a/0/0",
        prompt_id="a",
        sample_index=0,
        epoch=0,
        policy_version=3,
        finish_reason="stop",
        prompt_ids=np.array([5], np.int32),
        response_ids=np.array([1, 4], np.int32),
        behaviour_logprobs=np.array([-0.1, -0.2], np.float32),
    )


@settings(deadline=None)
@given(many=st.lists(trajectories(), max_size=4))
def test_trajectories_round_trip(many: list[Trajectory]) -> None:
    back = batch_to_trajectories(through_ipc(trajectories_to_batch(many)))
    assert len(back) == len(many)
    for one, other in zip(many, back, strict=True):
        assert_bitwise(one, other)


@settings(deadline=None)
@given(guided=guided_trajectories())
def test_guided_round_trip(guided: GuidedTrajectory) -> None:
    batch = guided_to_batch([guided, small_guided()])
    batch.validate(full=True)
    first, second = batch_to_guided(through_ipc(batch))
    assert_bitwise(guided, first)
    assert_bitwise(small_guided(), second)


def test_guided_round_trip_through_parquet(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_batches([guided_to_batch([small_guided()])] * 2), tmp_path / "batch.parquet")
    (batch,) = pq.read_table(tmp_path / "batch.parquet").combine_chunks().to_batches()
    assert batch.num_rows == 2
    for back in batch_to_guided(batch):
        assert_bitwise(small_guided(), back)


def test_a_slice_of_a_batch_gives_its_own_rows() -> None:
    batch = trajectories_to_batch([small_trajectory(), small_trajectory()]).slice(1, 1)
    (back,) = batch_to_trajectories(batch)
    assert_bitwise(small_trajectory(), back)


def test_views_share_memory_both_ways() -> None:
    guided = small_guided()
    (back,) = batch_to_guided(guided_to_batch([guided]))
    assert np.shares_memory(guided.scores.topk_logprobs, back.scores.topk_logprobs)
    assert np.shares_memory(guided.trajectory.response_ids, back.trajectory.response_ids)
    assert np.shares_memory(guided.capped, back.capped)
    assert not back.scores.topk_logprobs.flags.writeable


def test_schemas_carry_their_version() -> None:
    assert TRAJECTORY_SCHEMA.metadata == {b"topd_ray.schema": b"trajectory/1"}
    assert guided_to_batch([small_guided()]).schema.metadata == {b"topd_ray.schema": b"guided_trajectory/2"}


def test_foreign_schemas_are_refused() -> None:
    message = "a record batch of schema trajectory/1 was found where guided_trajectory/2 would be right"
    with pytest.raises(DataError, match=message):
        batch_to_guided(trajectories_to_batch([small_trajectory()]))
    with pytest.raises(DataError, match="a record batch of schema none was found where trajectory/1 would be right"):
        batch_to_trajectories(pa.RecordBatch.from_pylist([{"a": 1}]))
    later = guided_to_batch([small_guided()]).replace_schema_metadata({"topd_ray.schema": "guided_trajectory/3"})
    with pytest.raises(DataError, match="of schema guided_trajectory/3 was found"):
        batch_to_guided(later)
    torn = pa.RecordBatch.from_pylist([{"a": 1}]).replace_schema_metadata(GUIDED_SCHEMA.metadata)
    with pytest.raises(DataError, match=r"says it is guided_trajectory/2, but its columns differ \(a, behaviour"):
        batch_to_guided(torn)


def test_arrays_of_another_type_or_length_are_refused() -> None:
    def changed(**fields: Any) -> Trajectory:
        one = small_trajectory()
        return Trajectory(**{name: getattr(one, name) for name in one.__dataclass_fields__} | fields)

    with pytest.raises(DataError, match="response_ids: found an array of int64, right would be int32"):
        trajectories_to_batch([changed(response_ids=np.array([1, 4]))])
    with pytest.raises(DataError, match=r"behaviour_logprobs: found an array of shape \(1,\), right would be \(2,\)"):
        trajectories_to_batch([changed(behaviour_logprobs=np.zeros(1, np.float32))])
    guided = small_guided()
    wrong = GuidedTrajectory(
        trajectory=guided.trajectory, scores=guided.scores, targets=SparseTargets.empty(3), capped=guided.capped,
        windows=guided.windows,
    )  # fmt: skip
    with pytest.raises(DataError, match=r"targets.indptr: found an array of shape \(4,\), right would be \(3,\)"):
        guided_to_batch([wrong])
