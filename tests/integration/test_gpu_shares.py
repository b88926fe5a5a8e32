"""What Ray makes of the GPUs that workers ask for. It takes our word for how many there are."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from topd_ray.actors.cluster import worker_environment
from topd_ray.actors.placement import Need, cluster_nodes, needs, reserve
from topd_ray.config.load import load_config

DEMO = Path(__file__).parents[2] / "jobs" / "demo.yaml"


@pytest.fixture(autouse=True)
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    ray.init(address="local", num_cpus=4, num_gpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def place(*overrides: str) -> tuple[list[Need], PlacementGroup]:
    wanted = needs(load_config(DEMO, overrides), num_gpus=2)
    return wanted, reserve(wanted, cluster_nodes(), wait_seconds=0.0, check_interrupt=lambda: None)


def test_three_workers_share_two_gpus_and_one_that_asks_for_none_sees_none() -> None:
    wanted, group = place()
    assert [need.num_gpus for need in wanted] == [0.5] * 3
    ray.util.remove_placement_group(group)
    wanted, group = place("resources.gpus_per_teacher=0", "resources.gpus_per_rollout=0.5")
    look = ray.remote(lambda: os.environ["CUDA_VISIBLE_DEVICES"])
    seen = {
        need.role: look.options(
            num_cpus=need.num_cpus,
            num_gpus=need.num_gpus,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle),
            runtime_env={"env_vars": worker_environment(1, on_cpu=not need.num_gpus)},
        ).remote()
        for bundle, need in enumerate(wanted)
        if need.role != "learner"
    }
    assert ray.get(seen["teacher"]) == ""
    assert ray.get(seen["rollout"]) in ("0", "1")
