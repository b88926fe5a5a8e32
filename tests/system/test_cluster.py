"""A Ray cluster of four nodes with addresses of their own, tokens on: jobs, placement, and what cannot work.

The nodes share files as over a network file system, but for /tmp/ray, /dev/shm and `local`, which each has for itself.
"""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from tests.lan import Done, Host, lan

ROOT = Path(__file__).parents[2]
RAY_FOLDER = Path("/tmp/ray")
ROLES = {"learner-a": "learner", "learner-b": "learner", "rollout": "rollout", "teacher": "teacher"}
HEAD = "learner-a"
TOKEN = "0123456789abcdef" * 4
SMALL = (
    "run.steps=2",
    "run.deterministic=true",
    "rollout.prompts_per_step=8",
    "rollout.max_new_tokens=64",
    "learner.num_ranks=2",
    "data.arithmetic.num_heldout=16",
    "data.arithmetic.num_train=64",
    "evaluation.teacher=false",
)
WORKERS = ("rollout", "teacher", "learner")
BROADCAST = ("weights.channel=broadcast", "resources.gpus_per_learner=0", "resources.gpus_per_rollout=0")
STOP_ONCE_IT_WAITS = """
said=$(mktemp); "$@" > "$said" & run=$!
for _ in {1..1000}; do grep -q "starting the workers" "$said" && break; sleep 0.1; done
sleep 2; kill -TERM $run; wait $run; code=$?
cat "$said"; rm "$said"; exit $code
"""
PLACED = tuple(f"resources.{role}_nodes={{topd/role: {role}}}" for role in WORKERS)

pytestmark = [pytest.mark.slow, pytest.mark.lan]


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Nodes by name, and the files they see."""

    hosts: Mapping[str, Host]
    folder: Path
    """shared"""
    local: Path
    """on each node's own disk"""
    environment: Mapping[str, str]

    def on_head(self, *arguments: str, environment: Mapping[str, str] | None = None) -> Done:
        return self.hosts[HEAD].run(*arguments, env=environment or self.environment, cwd=ROOT, timeout=400)

    def start(self, name: str, *, labels: str, num_cpus: int = 1, environment: Mapping[str, str] | None = None) -> None:
        host = self.hosts[name]
        where = ["--head"] if name == HEAD else [f"--address={self.hosts[HEAD].address}:6379"]
        done = host.run(
            *("ray", "start", *where, f"--node-ip-address={host.address}", f"--labels={labels}"),
            *(f"--num-cpus={num_cpus}", "--object-store-memory=80000000", "--disable-usage-stats"),
            env=environment or self.environment,
            cwd=ROOT,
            timeout=250,
        )
        assert done.returncode == 0, done.stdout

    def submit(self, name: str, *overrides: str) -> list[str]:
        command = ["python", "-m", "topd_ray", "submit", "jobs/demo.yaml", *SMALL, *PLACED]
        return [*command, f"run.root={self.folder}", f"run.name={name}", *overrides]

    def command(self, name: str, *overrides: str) -> list[str]:
        """A driver on the head node, without a job."""
        pair = [f"{role}.model={ROOT}/topd_ray/demo/pair/{role}" for role in ("student", "teacher")]
        command = ["python", "-m", "topd_ray", "run", "jobs/demo.yaml", *SMALL, *pair, "resources.ray_address=auto"]
        return [*command, f"run.root={self.folder}", f"run.name={name}", *overrides]

    def run(self, name: str, *overrides: str, environment: Mapping[str, str] | None = None) -> Done:
        return self.on_head(*self.command(name, *overrides), environment=environment)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("shared")
    local = tmp_path_factory.mktemp("local")
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(TOKEN)
    RAY_FOLDER.mkdir(exist_ok=True)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    with lan([*ROLES, "odd"], local_disks=[RAY_FOLDER, local]) as hosts:
        made = Cluster(hosts=hosts, folder=folder, local=local, environment=environment)
        for name, role in ROLES.items():
            made.start(name, labels=f"topd/role={role}")
        yield made


def weights(folder: Path) -> dict[str, bytes]:
    return {name: tensor.tobytes() for name, tensor in load_file(folder / "export" / "model.safetensors").items()}


def where_actors_are(cluster: Cluster) -> set[tuple[str, str]]:
    """(class, address) of every worker there has been."""
    asked = [cluster.on_head("ray", "list", what, "--format=json", "--limit=1000") for what in ("nodes", "actors")]
    nodes, actors = (json.loads(done.stdout[done.stdout.index('[{"') :]) for done in asked)
    addresses = {node["node_id"]: node["node_ip"] for node in nodes}
    return {(actor["class_name"], addresses[actor["node_id"]]) for actor in actors if "Worker" in actor["class_name"]}


def test_a_job_over_four_nodes_gives_the_bitwise_same_student_as_one_node(cluster: Cluster) -> None:
    """New weights go by broadcast there, and by way of the object store here."""
    done = cluster.on_head(*cluster.submit("many", *BROADCAST))
    assert done.returncode == 0, done.stdout
    assert "pass@1 of the student after" in done.stdout, "the job's output is followed"
    address = {name: host.address for name, host in cluster.hosts.items()}
    assert where_actors_are(cluster) == {
        ("LearnerWorker", address["learner-a"]),
        ("LearnerWorker", address["learner-b"]),
        ("RolloutWorker", address["rollout"]),
        ("TeacherWorker", address["teacher"]),
    }
    alone = [sys.executable, "-m", "topd_ray", "run", "jobs/demo.yaml", *SMALL, "run.name=one"]
    one = subprocess.run([*alone, f"run.root={cluster.folder}"], cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert one.returncode == 0, one.stdout + one.stderr
    assert weights(cluster.folder / "many") == weights(cluster.folder / "one")
    assert json.loads((cluster.folder / "many" / "summary.json").read_text())["driver_payload_bytes"] == 0
    assert TOKEN not in done.stdout
    written = [path for path in (cluster.folder / "many").rglob("*") if path.is_file()]
    assert len(written) > 5 and not [path for path in written if TOKEN.encode() in path.read_bytes()]


def test_ray_job_stop_leaves_a_checkpoint(cluster: Cluster) -> None:
    command = cluster.submit("stopped", "run.steps=500", "run.checkpoint_every=0", "evaluation.before=false")
    process = subprocess.Popen(
        cluster.hosts[HEAD].command(*command, cwd=ROOT),
        env=dict(cluster.environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    metrics = cluster.folder / "stopped" / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not (metrics.exists() and "loss/total" in metrics.read_text()):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.1)
    listed = cluster.on_head("ray", "list", "jobs", "--format=json", "--filter=status=RUNNING").stdout
    job = re.search(r'"submission_id": "(stopped-\w+)"', listed)
    assert job, listed
    stopped = cluster.on_head("ray", "job", "stop", job[1])
    output, _ = process.communicate(timeout=150)
    assert process.returncode == 128 + 15, output
    assert stopped.returncode == 0 and "checkpoint of update" in output, output
    step = int((cluster.folder / "stopped" / "checkpoints" / "latest").read_text().removeprefix("step-"))
    assert step >= 1


def test_the_exit_code_of_a_refused_job_is_passed_on(cluster: Cluster) -> None:
    done = cluster.on_head(*cluster.submit("refused", "data.train=/nowhere.jsonl"))
    assert done.returncode == 2, done.stdout
    assert "data.train=/nowhere.jsonl: found no such file" in done.stdout


def test_plain_ray_job_submit_with_a_run_folder_in_rays_copy_of_the_working_directory(cluster: Cluster) -> None:
    environment = json.dumps({"working_dir": str(ROOT), "excludes": [".venv", ".git"]})
    command = ["ray", "job", "submit", f"--runtime-env-json={environment}", "--", "python", "-m", "topd_ray", "run"]
    done = cluster.on_head(*command, "jobs/demo.yaml", "run.name=relative")
    assert done.returncode == 1, done.stdout
    assert "run.root: found runs, which is /tmp/ray/" in done.stdout and "exit code 2" in done.stdout, done.stdout


def test_a_run_folder_that_a_learner_node_does_not_see(cluster: Cluster) -> None:
    done = cluster.run("local", f"run.root={cluster.local}", "resources.learner_nodes={topd/role: learner}")
    assert done.returncode == 2, done.stdout
    assert f"does not see the run folder {cluster.local}/local" in done.stdout
    assert f"{cluster.hosts['learner-b'].address} does not see" in done.stdout


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("learner.num_ranks=4", "the run needs 6 CPUs, the cluster has 4"),
        (
            "resources.teacher_nodes={topd/role: oracle}",
            "no node can hold teacher 0: 1 CPU, 0 GPU, a node",
        ),
    ],
    ids=["CPUs", "labels"],
)
def test_a_cluster_that_is_too_small(cluster: Cluster, override: str, message: str) -> None:
    done = cluster.run("large", override)
    assert done.returncode == 2, done.stdout
    assert message in done.stdout
    assert f"{cluster.hosts['teacher'].address}: 1 CPU, 0 GPU, topd/role=teacher" in done.stdout


def test_waiting_for_nodes_can_be_stopped(cluster: Cluster) -> None:
    said = [f"resources.gpus_per_{role}=0" for role in WORKERS]
    waiting = cluster.command("waits", *said, "resources.wait_seconds=600", "resources.teacher_nodes={topd/role: none}")
    done = cluster.on_head("bash", "-c", STOP_ONCE_IT_WAITS, "bash", *waiting)
    assert done.returncode == 128 + 15, done.stdout
    assert "starting the workers" in done.stdout and "stopped by SIGTERM" in done.stdout


def test_another_token_and_none(cluster: Cluster, tmp_path: Path) -> None:
    wrong = tmp_path / "token"
    wrong.write_text("fedcba9876543210" * 4)
    for name, environment in {
        "wrong": {**cluster.environment, "RAY_AUTH_TOKEN_PATH": str(wrong)},
        "none": {**cluster.environment, "RAY_AUTH_TOKEN_PATH": "", "HOME": str(tmp_path)},
    }.items():
        for done in (
            cluster.on_head(*cluster.submit(name), environment=environment),
            cluster.run(name, environment=environment),
        ):
            assert done.returncode == 2, done.stdout
            assert "token" in done.stdout and "right would be RAY_AUTH_MODE=token" in done.stdout
            assert "Traceback" not in done.stdout


def test_a_node_with_another_version(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "pyarrow-1.0.dist-info").mkdir()
    (tmp_path / "pyarrow-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: pyarrow\nVersion: 1.0\n")
    environment = {**cluster.environment, "PYTHONPATH": f"{tmp_path}:{cluster.environment.get('PYTHONPATH', '')}"}
    cluster.start("odd", labels="topd/role=odd", environment=environment)
    done = cluster.run("odd", "resources.rollout_nodes={topd/role: odd}")
    assert done.returncode == 2, done.stdout
    assert f"{cluster.hosts['odd'].address} has pyarrow 1.0 (here " in done.stdout
    cluster.hosts["odd"].kill()


def test_probes_answer_without_a_token_and_nothing_else_does(cluster: Cluster) -> None:
    """The paths and ports that the KubeRay files probe."""
    worker, head = cluster.hosts["rollout"].address, "127.0.0.1"
    asked = {
        f"http://{worker}:52365/api/local_raylet_healthz": "200",
        f"http://{head}:8265/api/gcs_healthz": "200",
        f"http://{head}:8265/api/jobs/": "401",
        f"http://{cluster.hosts[HEAD].address}:8265/api/gcs_healthz": "000",
    }
    for url, code in asked.items():
        done = cluster.on_head("curl", "--silent", "--output", "/dev/null", "--write-out", "%{http_code}", url)
        assert done.stdout == code, url


def test_a_port_that_is_taken(cluster: Cluster) -> None:
    done = cluster.on_head("ray", "start", "--head", f"--node-ip-address={cluster.hosts[HEAD].address}")
    assert done.returncode != 0 and "6379" in done.stdout, done.stdout
