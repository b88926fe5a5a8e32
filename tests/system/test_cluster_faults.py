"""A cluster that loses nodes and drivers while a run is on."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil
import pytest
from safetensors.numpy import load_file

from tests.lan import Host, lan
from topd_ray.pipeline.ledger import read_ledger

ROOT = Path(__file__).parents[2]
RAY_FOLDER = Path("/tmp/ray")
ROLES = {"head": "learner", "writer": "rollout", "teacher": "teacher"}
NUM_UPDATES = 12
SETTINGS = (
    f"run.steps={NUM_UPDATES}",
    "run.deterministic=true",
    "run.checkpoint_every=4",
    "rollout.prompts_per_step=8",
    "rollout.max_new_tokens=64",
    "data.heldout=null",
    "metrics.tensorboard=false",
    "teacher.verify=false",
    "resources.threads_per_learner=1",
    *(f"{role}.model={ROOT}/topd_ray/demo/pair/{role}" for role in ("student", "teacher")),
)
PLACED = tuple(f"resources.{role}_nodes={{topd/role: {role}}}" for role in ("rollout", "teacher", "learner"))

pytestmark = [pytest.mark.slow, pytest.mark.lan]


class Cluster:
    """Nodes that Ray gives up after three seconds of silence."""

    def __init__(self, hosts: Mapping[str, Host], folder: Path) -> None:
        self.hosts = hosts
        self.head = "head"
        self.folder = folder
        self._environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_health_check_period_ms": "1000",
            "RAY_health_check_timeout_ms": "1000",
            "RAY_health_check_failure_threshold": "3",
            "RAY_health_check_initial_delay_ms": "0",
        }

    def start(self, name: str, role: str) -> None:
        where = ["--head"] if name == self.head else [f"--address={self.hosts[self.head].address}:6379"]
        done = self.hosts[name].run(
            *("ray", "start", *where, f"--node-ip-address={self.hosts[name].address}"),
            *(f"--labels=topd/role={role}", "--num-cpus=1", "--object-store-memory=80000000", "--disable-usage-stats"),
            env=self._environment,
            cwd=ROOT,
            timeout=250,
        )
        assert done.returncode == 0, done.stdout

    def submit(self, name: str) -> subprocess.Popen[str]:
        command = ["python", "-m", "topd_ray", "submit", "jobs/demo.yaml", *SETTINGS, *PLACED]
        return subprocess.Popen(
            self.hosts[self.head].command(*command, f"run.root={self.folder}", f"run.name={name}", cwd=ROOT),
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def kill_driver(self, name: str) -> None:
        """SIGKILL `topd run`, which the job on the head node is."""
        drivers = [
            one
            for one in psutil.process_iter()
            if {"topd_ray", "run", f"run.root={self.folder}", f"run.name={name}"} <= set(_command_line(one))
        ]
        assert len(drivers) == 1, drivers
        drivers[0].kill()

    def wait_for_update(self, name: str, number: int, process: subprocess.Popen[str]) -> None:
        metrics = self.folder / name / "metrics.jsonl"
        deadline = time.monotonic() + 300
        while not (metrics.exists() and f'{{"step": {number},' in metrics.read_text()):
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
            time.sleep(0.05)

    def link(self, name: str, state: str) -> None:
        self.hosts[name].check("ip", "link", "set", "eth0", state)

    def stop_ray(self, name: str) -> None:
        self.hosts[name].run("ray", "stop", "--force", env=self._environment, cwd=ROOT, timeout=60)


@pytest.fixture
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("shared")
    (folder / "token").touch(mode=0o600)
    (folder / "token").write_text("0123456789abcdef" * 4)
    RAY_FOLDER.mkdir(exist_ok=True)
    with lan([*ROLES, "spare"], local_disks=[RAY_FOLDER]) as hosts:
        made = Cluster(hosts, folder)
        for name, role in ROLES.items():
            made.start(name, role)
        yield made


@pytest.fixture(scope="module")
def left_alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    root = tmp_path_factory.mktemp("alone")
    command = [sys.executable, "-m", "topd_ray", "run", "jobs/demo.yaml", "--inline", *SETTINGS]
    done = subprocess.run(
        [*command, f"run.root={root}", "run.name=a"], cwd=ROOT, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return weights(root / "a")


def weights(folder: Path) -> dict[str, bytes]:
    return {name: tensor.tobytes() for name, tensor in load_file(folder / "export" / "model.safetensors").items()}


def restarts(folder: Path, role: str) -> float:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return sum(row.get(f"faults/restarts_{role}", 0.0) for row in rows)


def test_nodes_and_the_driver_are_lost_and_the_run_comes_to_its_end(
    cluster: Cluster, left_alone: dict[str, bytes]
) -> None:
    """A node is pulled out and another joins; one is cut off the network, at first for a moment, which nobody notices,
    then until Ray and its own raylet have given it up, and comes back; the driver is killed, and submitted again."""
    process = cluster.submit("run")
    cluster.wait_for_update("run", 2, process)
    cluster.hosts["writer"].kill()
    time.sleep(3)
    cluster.start("spare", "rollout")

    cluster.wait_for_update("run", 4, process)
    cluster.link("teacher", "down")
    time.sleep(1)
    cluster.link("teacher", "up")
    cluster.wait_for_update("run", 6, process)
    cluster.link("teacher", "down")
    time.sleep(12)
    cluster.link("teacher", "up")
    cluster.stop_ray("teacher")
    cluster.start("teacher", "teacher")

    cluster.wait_for_update("run", 9, process)
    restarted = {role: restarts(cluster.folder / "run", role) for role in ("rollout", "teacher")}
    cluster.kill_driver("run")
    output, _ = process.communicate(timeout=150)
    assert process.returncode == 128 + 9, output
    assert min(restarted.values()) >= 1, output
    for worker in ("rollout worker 0", "teacher worker 0"):
        assert re.search(rf"{worker}.* is lost and made anew: ", output), output
        assert re.search(rf"{worker}.* is back after ", output), output
    assert "no node can hold teacher 0: 1 CPU, 0 GPU, a node labelled topd/role=teacher" in output, output

    process = cluster.submit("run")
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output
    assert f"resumed at update 8 of {NUM_UPDATES}" in output
    report = read_ledger(cluster.folder / "run" / "ledger.jsonl")
    assert (report.trained_once, report.lost, report.doubled, report.faults) == (NUM_UPDATES * 8, 0, 0, ())
    assert weights(cluster.folder / "run") == left_alone


@pytest.mark.long
def test_the_head_node_is_lost_and_the_run_goes_on_in_another_cluster(
    cluster: Cluster, left_alone: dict[str, bytes]
) -> None:
    process = cluster.submit("run")
    cluster.wait_for_update("run", 6, process)
    cluster.hosts["head"].kill()
    process.communicate(timeout=150)
    assert process.returncode
    cluster.head = "spare"
    cluster.start("spare", "learner")
    for name in ("writer", "teacher"):
        cluster.stop_ray(name)
        cluster.start(name, ROLES[name])

    process = cluster.submit("run")
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output
    assert f"resumed at update 4 of {NUM_UPDATES}" in output
    report = read_ledger(cluster.folder / "run" / "ledger.jsonl")
    assert (report.trained_once, report.lost, report.doubled, report.faults) == (NUM_UPDATES * 8, 0, 0, ())
    assert weights(cluster.folder / "run") == left_alone


def _command_line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []
