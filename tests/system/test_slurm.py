"""cluster/slurm.sbatch on two hosts: everything real but Slurm, whose two commands are stood in for by this file."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil
import pytest

from tests.lan import Host, lan

ROOT = Path(__file__).parents[2]
JOB = 77
NODES = ("node1", "node2")
pytestmark = [pytest.mark.slow, pytest.mark.lan]

SRUN = """#!{python}
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({socket!r})
    server.sendall(json.dumps([sys.argv[1:], dict(os.environ)]).encode() + b"\\n")
    sys.exit(int(server.recv(16)))
"""
SCONTROL = """#!/bin/bash
case $1 in
    show) printf '%s\\n' {nodes} ;;
    requeue) echo "$@" >>{folder}/requeued ;;
esac
"""


class Srun(threading.Thread):
    """Runs a command on the host that --nodelist names, as srun does."""

    def __init__(self, hosts: Mapping[str, Host], address: Path) -> None:
        super().__init__(daemon=True)
        self._hosts = hosts
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(str(address))
        self._server.listen()

    def run(self) -> None:
        while True:
            caller, _ = self._server.accept()
            threading.Thread(target=self._serve, args=(caller,), daemon=True).start()

    def _serve(self, caller: socket.socket) -> None:
        arguments, environment = json.loads(caller.makefile().readline())
        options = dict(one[2:].split("=") for one in arguments if one.startswith("--n") or one.startswith("--output"))
        command = arguments[arguments.index("ray") :]
        with open(options["output"], "w") as output:
            done = subprocess.run(
                self._hosts[options["nodelist"]].command(*command), env=environment, stdout=output, stderr=output
            )
        with contextlib.suppress(BrokenPipeError):  # a caller that was killed
            caller.sendall(str(done.returncode).encode())


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[dict[str, Host]]:
    ray_folder = Path(f"/tmp/ray-{JOB}")
    ray_folder.mkdir(exist_ok=True)
    with lan(NODES, local_disks=[ray_folder]) as made:
        yield made
    ray_folder.rmdir()


@pytest.mark.long
def test_time_is_up(hosts: dict[str, Host], tmp_path: Path) -> None:
    """Two nodes start, the job runs on both, Slurm's signal stops it with a checkpoint, and it is requeued."""
    commands = {
        "srun": SRUN.format(python=sys.executable, socket=str(tmp_path / "srun.socket")),
        "scontrol": SCONTROL.format(nodes=" ".join(NODES), folder=tmp_path),
    }
    for name, text in commands.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    Srun(hosts, tmp_path / "srun.socket").start()
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "ROLES": "engines learner",
        "SLURM_JOB_ID": str(JOB),
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_CPUS_PER_TASK": "2",
    }
    overrides = [
        *("run.name=slurm", f"run.root={tmp_path}", "run.steps=500", "run.checkpoint_every=0"),
        *("rollout.prompts_per_step=8", "rollout.max_new_tokens=64"),
        *("data.heldout=null", "data.arithmetic.num_train=64", "resources.threads_per_learner=1"),
        *("resources.learner_nodes={topd/role: learner}", "resources.rollout_nodes={topd/role: engines}"),
    ]
    process = subprocess.Popen(
        hosts["node1"].command("bash", "cluster/slurm.sbatch", "jobs/demo.yaml", *overrides, cwd=ROOT),
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    metrics, deadline = tmp_path / "slurm" / "metrics.jsonl", time.monotonic() + 400
    while not (metrics.exists() and "loss/total" in metrics.read_text()):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.1)
    token = next(tmp_path.glob(".topd-*/token"))
    assert token.stat().st_mode & 0o077 == 0 and token.parent.stat().st_mode & 0o077 == 0
    secret = token.read_text()
    (script,) = (one for one in psutil.Process(process.pid).children() if "cluster/slurm.sbatch" in one.cmdline())
    script.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=200)
    assert "checkpoint of update" in output, output
    assert (tmp_path / "requeued").read_text() == f"requeue {JOB}\n"
    assert (tmp_path / "slurm" / "checkpoints" / "latest").exists()
    assert not token.exists()
    assert len(secret) == 64 and secret not in output
