"""What a worker waits for that is lost with its node, on a Ray cluster whose nodes are processes of this machine."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from topd_ray.actors.absence import FIRST_SECONDS, Absence
from topd_ray.actors.crew import Slot
from topd_ray.actors.nodes import check_place, look_at_place
from topd_ray.actors.placement import cluster_nodes, reserve
from topd_ray.actors.restarts import RestartBudget
from topd_ray.actors.room import Need
from topd_ray.config.load import load_config
from topd_ray.config.schema import FaultsConfig
from topd_ray.errors import ConfigError

ROOT = Path(__file__).parents[2]

LABELS = {"topd/role": "rollout"}
NEED = Need(role="rollout", index=0, num_cpus=1, num_gpus=0, labels=LABELS)


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    quick = {"health_check_period_ms": 500, "health_check_failure_threshold": 4, "health_check_initial_delay_ms": 0}
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "_system_config": quick})
    try:
        ray.init(address=made.address, log_to_driver=False)
        yield made
    finally:
        ray.shutdown()
        made.shutdown()


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_worker_comes_back_on_another_node_with_its_labels(cluster: Cluster) -> None:
    node = cluster.add_node(num_cpus=1, labels=LABELS)
    group = reserve([NEED], cluster_nodes(), wait_seconds=0, check_interrupt=lambda: None)
    slot = Slot(role="rollout", index=0, need=NEED, bundle=0, budget=RestartBudget(FaultsConfig()))
    now, said = [0.0], list[str]()
    absence = Absence(group, said.append, clock=lambda: now[0])
    absence.end(slot)
    absence.look()
    assert not said, "it has never been away"
    assert "starts and loads its model on" in absence.waits_for(slot)

    cluster.remove_node(node, allow_graceful=False)
    wait_until(lambda: len(cluster_nodes()) == 1)
    absence.begin(slot)
    for seconds in (FIRST_SECONDS - 1, FIRST_SECONDS, FIRST_SECONDS + 1, 2 * FIRST_SECONDS):
        now[0] = seconds
        absence.look()
    lacks = "no node can hold rollout 0: 1 CPU, 0 GPU, a node labelled topd/role=rollout. The nodes there are: "
    assert [line.partition(lacks)[0] for line in said] == [
        f"rollout worker 0 has been away for {seconds} s: " for seconds in (10, 20)
    ]

    joined = cluster.add_node(num_cpus=1, labels=LABELS)
    place = PlacementGroupSchedulingStrategy(placement_group=group, placement_group_bundle_index=0)
    ask = ray.remote(num_cpus=1, scheduling_strategy=place)(lambda: ray.get_runtime_context().get_node_id())
    assert ray.get(ask.remote(), timeout=60) == joined.node_id
    assert "starts and loads its model on" in absence.waits_for(slot)
    absence.end(slot)
    assert said[-1] == "rollout worker 0 is back after 20 s"


def test_the_node_that_a_place_moves_to_is_looked_at(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "pyarrow-1.0.dist-info").mkdir()
    (tmp_path / "pyarrow-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: pyarrow\nVersion: 1.0\n")
    config = load_config(ROOT / "jobs" / "demo.yaml")
    node = cluster.add_node(num_cpus=1, labels=LABELS)
    group = reserve([NEED], cluster_nodes(), wait_seconds=0, check_interrupt=lambda: None)
    check_place(config, "rollout", group, 0, ray.get(look_at_place(config, "rollout", group, 0), timeout=60))
    cluster.remove_node(node, allow_graceful=False)
    facts = look_at_place(config, "rollout", group, 0)
    cluster.add_node(num_cpus=1, labels=LABELS, env_vars={"PYTHONPATH": f"{tmp_path}:{ROOT}"})
    with pytest.raises(ConfigError, match=r"do not fit together:\n  [\d.]+ has pyarrow 1\.0 \(here "):
        check_place(config, "rollout", group, 0, ray.get(facts, timeout=120))


def test_nodes_that_are_full(cluster: Cluster) -> None:
    need = Need(role="teacher", index=0, num_cpus=1, num_gpus=0)
    first = reserve([need], cluster_nodes(), wait_seconds=0, check_interrupt=lambda: None)
    slot = Slot(role="teacher", index=0, need=need, bundle=0, budget=RestartBudget(FaultsConfig()))
    second = ray.util.placement_group([need.bundle])
    assert not second.wait(1)
    assert Absence(second, print).waits_for(slot) == "the nodes that can hold teacher 0: 1 CPU, 0 GPU are full"
    ray.util.remove_placement_group(first)
