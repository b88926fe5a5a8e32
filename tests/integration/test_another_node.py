"""A worker that comes back on a node that was not there at the start, on a Ray cluster of processes of this machine."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from tests.stand_ins import Orders
from topd_ray.actors.fleet import RayFleet
from topd_ray.config.load import load_config
from topd_ray.errors import RolloutError

ROOT = Path(__file__).parents[2]
LABELS = {"topd/role": "rollout"}


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    quick = {"health_check_period_ms": 500, "health_check_failure_threshold": 4, "health_check_initial_delay_ms": 0}
    made = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 3, "object_store_memory": 80_000_000, "_system_config": quick},
    )
    yield made
    ray.shutdown()
    made.shutdown()


def wait_until(fleet: RayFleet, is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not is_so():
        fleet.wait()
        assert time.monotonic() < deadline


def test_a_worker_is_set_up_on_another_node_only_if_that_fits(cluster: Cluster, orders: Orders, tmp_path: Path) -> None:
    (tmp_path / "pyarrow-1.0.dist-info").mkdir()
    (tmp_path / "pyarrow-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: pyarrow\nVersion: 1.0\n")
    first = cluster.add_node(num_cpus=1, labels=LABELS, object_store_memory=80_000_000)
    place = (f"resources.ray_address={cluster.address}", "resources.rollout_nodes={topd/role: rollout}")
    config = load_config(ROOT / "jobs" / "demo.yaml", (*place, f"run.root={tmp_path}"))
    fleet = RayFleet(config, total_updates=10)
    fleet.start()
    slot = fleet._rollouts[0]

    cluster.remove_node(first, allow_graceful=False)
    wait_until(fleet, lambda: not slot.is_ready)
    second = cluster.add_node(num_cpus=1, labels=LABELS, object_store_memory=80_000_000)
    wait_until(fleet, lambda: slot.is_ready)

    cluster.remove_node(second, allow_graceful=False)
    wait_until(fleet, lambda: not slot.is_ready)
    orders("rollout-setup", "raise RolloutError: it has been set up")
    odd = {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    cluster.add_node(num_cpus=1, labels=LABELS, object_store_memory=80_000_000, env_vars=odd)
    with pytest.raises(RolloutError, match=r"^rollout worker 0 is not back: the nodes of .* has pyarrow 1\.0 \(here "):
        wait_until(fleet, lambda: slot.is_ready)
