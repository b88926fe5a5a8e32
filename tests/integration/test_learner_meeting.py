"""Learner ranks that cannot meet, and how long they wait for each other."""

import socket
from pathlib import Path

import pytest
import ray
import torch.distributed as dist

from tests.learner_case import make_engine
from tests.tiny import make_tiny_model
from topd_ray.actors.learner import LearnerWorker
from topd_ray.actors.parts import learner_part
from topd_ray.actors.store import LocalStore
from topd_ray.config.load import load_config
from topd_ray.errors import LearnerError

DEMO = Path(__file__).parents[2] / "jobs" / "demo.yaml"


def test_a_taken_port_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    config = load_config(DEMO, ["learner.num_ranks=2", "rollout.samples_per_prompt=2"])
    worker = LearnerWorker(**learner_part(config, rank=0, total_updates=1), store=LocalStore())
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(LearnerError, match=rf"rank 0 cannot meet the others at tcp://127\.0\.0\.1:{port}.*in use"):
            worker.setup(f"tcp://127.0.0.1:{port}")


@pytest.mark.parametrize(("stall", "replace"), [(1000, 2000), (2000, 1000)])
def test_ranks_wait_as_long_as_the_run_waits_for_them(stall: int, replace: int) -> None:
    config = load_config(DEMO, [f"faults.stall_seconds={stall}", f"faults.replace_seconds={replace}"])
    assert learner_part(config, rank=0, total_updates=1)["timeout_seconds"] == 2000


@pytest.mark.usefixtures("no_process_group_left")
def test_the_groups_have_the_timeout_that_was_asked_for(tmp_path: Path) -> None:
    """Also DeepSpeed's own, in which the ranks meet first after they have loaded the student."""
    engine = make_engine(make_tiny_model(tmp_path, seed=0), timeout_seconds=1234.0)
    groups = {dist.group.WORLD, engine._engine.seq_data_parallel_group}
    waits = [group._get_backend(engine._device).options._timeout for group in groups]
    assert [wait.total_seconds() for wait in waits] == [1234.0, 1234.0]
    engine.shutdown()
