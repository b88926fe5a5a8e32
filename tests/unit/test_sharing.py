"""How work is shared out, what a driver message weighs, and what does not fit a machine."""

import itertools
import random
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from topd_ray.actors.messages import GuidedItem, Normalisers
from topd_ray.actors.placement import check_local_fit, needs
from topd_ray.actors.sharing import balance_ranks, check_receipt, split_requests
from topd_ray.actors.traffic import Traffic
from topd_ray.config.schema import TopdConfig
from topd_ray.engines.packing import cost
from topd_ray.errors import ConfigError, WeightSyncError
from topd_ray.types import Prompt, RolloutRequest
from topd_ray.weights.bundle import WeightsBundle
from topd_ray.weights.checksum import WeightReceipt


def item(index: int, num_tokens: int) -> GuidedItem:
    return GuidedItem(
        handle=None,
        row=0,
        trajectory_id=f"{index:04d}",
        policy_version=0,
        num_tokens=num_tokens,
        num_sequence_tokens=num_tokens + 10,
        num_guided=2.0,
        num_bytes=1,
        distances=(),
    )


@given(
    lengths=st.lists(st.integers(1, 20_000), min_size=1, max_size=40), num_ranks=st.integers(1, 6), seed=st.randoms()
)
def test_ranks_differ_by_less_than_one_trajectory(lengths: list[int], num_ranks: int, seed: random.Random) -> None:
    items = [item(i, length) for i, length in enumerate(lengths)]
    shares = balance_ranks(items, num_ranks)
    assert sorted(one.trajectory_id for share in shares for one in share) == [one.trajectory_id for one in items]
    loads = [sum(cost(one.num_sequence_tokens) for one in share) for share in shares]
    longest = max(cost(one.num_sequence_tokens) for one in items)
    assert max(loads) - min(loads) <= longest * (1 + 1e-9)
    assert min(len(share) for share in shares) >= min(1, len(items) // num_ranks)
    seed.shuffle(items)
    assert balance_ranks(items, num_ranks) == shares


@given(lengths=st.lists(st.integers(1, 20_000), min_size=1, max_size=6), num_ranks=st.integers(1, 3))
def test_the_largest_share_is_at_most_four_thirds_of_the_best_possible_one(lengths: list[int], num_ranks: int) -> None:
    items = [item(i, length) for i, length in enumerate(lengths)]
    costs = [cost(one.num_sequence_tokens) for one in items]
    largest = max(sum(cost(one.num_sequence_tokens) for one in share) for share in balance_ranks(items, num_ranks))
    best = min(
        max(sum(one for one, rank in zip(costs, ranks, strict=True) if rank == mine) for mine in range(num_ranks))
        for ranks in itertools.product(range(num_ranks), repeat=len(items))
    )
    assert largest <= 4 / 3 * best * (1 + 1e-9)


def test_one_long_trajectory_outweighs_many_short_ones() -> None:
    shares = balance_ranks([item(0, 8000), *(item(i, 500) for i in range(1, 25))], 2)
    assert [len(share) for share in shares] == [3, 22]
    assert sum(one.num_tokens for one in shares[0]) < sum(one.num_tokens for one in shares[1]) - 1000


def test_samples_of_a_prompt_stay_on_one_worker() -> None:
    requests = [
        RolloutRequest(prompt=Prompt(prompt_id=name, token_ids=(1,)), sample_index=sample, epoch=0, seed=0)
        for name in "abc"
        for sample in range(2)
    ]
    shares = split_requests(requests, 2)
    assert [[request.prompt.prompt_id for request in share] for share in shares] == [["a", "a", "c", "c"], ["b", "b"]]
    assert split_requests(requests[:2], 2) == [requests[:2]]


def test_normalisers_are_sums_over_the_whole_batch() -> None:
    assert Normalisers.of([item(0, 3), item(1, 5)]) == Normalisers(num_tokens=8.0, num_guided=4.0, num_trajectories=2)


def test_an_engine_that_serves_other_weights_is_an_error() -> None:
    bundle = WeightsBundle(version=3, num_bytes=8, checksum=7, content=None)
    good = WeightReceipt(version=3, num_tensors=1, num_bytes=8, checksum=7)
    late = WeightReceipt(version=2, num_tensors=1, num_bytes=8, checksum=5)
    assert check_receipt(1, [bundle], good) == 3
    with pytest.raises(WeightSyncError, match=r"rollout worker 1 serves version 2 .* published version 3"):
        check_receipt(1, [bundle], late)
    overtaken = WeightsBundle(version=2, num_bytes=8, checksum=5, content=None)
    assert check_receipt(1, [overtaken, bundle], good) == 3


def test_traffic_tells_payload_from_messages() -> None:
    traffic = Traffic()
    traffic.count({"ids": ("a", "b"), "count": 3})
    assert traffic.payload_bytes == 0
    assert 0 < traffic.message_bytes < 200
    traffic.count([np.zeros(1000, np.float32), pa.record_batch({"ids": pa.array(range(100), pa.int32())})])
    assert traffic.payload_bytes == 4400


def config(**sections: dict[str, Any]) -> TopdConfig:
    teacher = {"model": "t", **sections.pop("teacher", {})}
    return TopdConfig.model_validate({"student": {"model": "s"}, "teacher": teacher, **sections})


def test_what_does_not_fit_is_said_before_anything_loads() -> None:
    check_local_fit(config(), num_cores=2, num_gpus=0)
    check_local_fit(config(), num_cores=2, num_gpus=3)
    with pytest.raises(ConfigError, match="4 threads at once, of 2 cores"):
        check_local_fit(config(rollout={"num_workers": 3}), num_cores=2, num_gpus=0)
    cache = {"kv_cache_bytes": 1}
    triton = config(learner={"loss_kernel": "triton"}, rollout=cache, teacher=cache)
    check_local_fit(triton, num_cores=2, num_gpus=1)
    with pytest.raises(ConfigError, match=r"learner.loss_kernel: found triton, and no GPU for the learner"):
        check_local_fit(triton, num_cores=2, num_gpus=0)
    with pytest.raises(ConfigError, match=r"6 GPUs, of 4 .*teacher 0: 1 CPU, 4 GPU"):
        check_local_fit(config(teacher={"tensor_parallel_size": 4}), num_cores=2, num_gpus=4)


def test_deterministic_runs_use_one_thread_each() -> None:
    threaded: dict[str, Any] = {"threads_per_learner": 2}
    assert [need.num_cpus for need in needs(config(resources=threaded), num_gpus=0)] == [1, 1, 2]
    fixed = config(resources=threaded, run={"deterministic": True})
    assert [need.num_cpus for need in needs(fixed, num_gpus=0)] == [1, 1, 1]
