"""Learner ranks that cannot meet."""

import socket
from pathlib import Path

import pytest
import ray

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
