"""What new weights cost the link between two nodes, read from the counter of a network interface."""

import json
import os
import sys
from pathlib import Path

import pytest

from tests.lan import lan

ROOT = Path(__file__).parents[2]
RAY_FOLDER = Path("/tmp/ray")
STORE_BYTES = 80_000_000
MODEL_MIB = 24
NUM_VERSIONS = 6


@pytest.mark.lan
def test_a_node_fetches_a_version_once_and_old_versions_are_freed() -> None:
    RAY_FOLDER.mkdir(exist_ok=True)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": "0123456789abcdef" * 4,
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    with lan(["learner", "rollout"], local_disks=[RAY_FOLDER]) as hosts:
        for name, host in hosts.items():
            where = (
                ["--head", "--include-dashboard=false"]
                if name == "learner"
                else [f"--address={hosts['learner'].address}:6379"]
            )
            done = host.run(
                *("ray", "start", *where, f"--node-ip-address={host.address}", f"--labels=topd/role={name}"),
                *("--num-cpus=1", f"--object-store-memory={STORE_BYTES}"),
                env=environment,
                cwd=ROOT,
                timeout=250,
            )
            assert done.returncode == 0, done.stdout
        program = [sys.executable, "-m", "tests.system.weights_over_a_link", str(MODEL_MIB), str(NUM_VERSIONS)]
        done = hosts["learner"].run(*program, env=environment, cwd=ROOT, timeout=500)
        assert done.returncode == 0, done.stdout
        found = json.loads(done.stdout.splitlines()[-1])
        spilled = [
            host.run("sh", "-c", "ls -d /tmp/ray/session_*/*spill*/*", env=environment, cwd=ROOT, timeout=10)
            for host in hosts.values()
        ]
    assert len(found["versions"]) == NUM_VERSIONS
    for version in found["versions"]:
        assert version["model_bytes"] == MODEL_MIB * 2**20 and version["chunks"] == MODEL_MIB // 4
        assert version["agree"]
        assert 1.0 <= version["link_bytes"] / version["model_bytes"] < 1.1, "two workers, one copy over the link"
    assert found["anew"] == [NUM_VERSIONS, True]
    assert MODEL_MIB * 2**20 * NUM_VERSIONS > 1.8 * STORE_BYTES, "old versions would not fit"
    assert all(done.returncode != 0 for done in spilled), [done.stdout for done in spilled]
