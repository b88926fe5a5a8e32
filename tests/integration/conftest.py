"""What the tests of engines share."""

from collections.abc import Iterator

import pytest
import ray
import torch
from ray.cluster_utils import Cluster

from tests.stand_ins import Orders, workers
from topd_ray.actors import crew


@pytest.fixture(scope="module")
def no_process_group_left() -> Iterator[None]:
    """The learner leaves its process group to the process; the tests of other modules share this one."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Of a Ray cluster on this machine."""
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 6, "include_dashboard": False, "object_store_memory": 80_000_000},
    )
    yield cluster.address
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture(scope="module")
def shared_orders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Orders]:
    """For workers without engines, which fleets have as long as this is in use."""
    orders = Orders(tmp_path_factory.mktemp("orders"))
    real = dict(crew.WORKERS)
    crew.WORKERS.update(workers(orders.folder))
    yield orders
    crew.WORKERS.update(real)


@pytest.fixture
def orders(shared_orders: Orders) -> Orders:
    shared_orders.clear()
    return shared_orders
