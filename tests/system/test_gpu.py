"""Whole runs on one GPU: its three workers share it, and the student's new weights go every way there is."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from safetensors.numpy import load_file

ROOT = Path(__file__).parents[2]
NUM_STEPS = 4
SMALL = (
    f"run.steps={NUM_STEPS}",
    "rollout.prompts_per_step=16",
    "rollout.max_new_tokens=64",
    "data.arithmetic.num_heldout=32",
    "data.arithmetic.num_train=256",
)
pytestmark = pytest.mark.gpu


def run(root: Path, name: str, *overrides: str) -> Path:
    command = [sys.executable, "-m", "topd_ray", "run", "jobs/demo.yaml", f"run.root={root}", f"run.name={name}"]
    done = subprocess.run([*command, *SMALL, *overrides], cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    return root / name


def gpus(amount: float) -> list[str]:
    return [f"resources.gpus_per_{role}={amount}" for role in ("rollout", "teacher", "learner")]


def steps(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss/total" in line]


def weights(folder: Path) -> dict[str, bytes]:
    return {name: tensor.tobytes() for name, tensor in load_file(folder / "export" / "model.safetensors").items()}


def check_on_policy(folder: Path) -> None:
    """The rollout engine and the learner agree on what was written: the engine has had every update's weights."""
    found = steps(folder)
    assert [one["run/policy_version"] for one in found] == list(range(1, NUM_STEPS + 1))
    assert max(one["mismatch/abs_logprob"] for one in found) < 5e-3


@pytest.fixture(scope="module")
def by_object_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("runs"), "store", "run.deterministic=true")


def test_weights_through_the_object_store(by_object_store: Path) -> None:
    check_on_policy(by_object_store)


def test_weights_in_the_memory_of_the_gpu(tmp_path: Path, by_object_store: Path) -> None:
    found = run(tmp_path, "ipc", "run.deterministic=true", "weights.channel=ipc", *gpus(0.3))
    check_on_policy(found)
    assert weights(found) == weights(by_object_store)


def test_cuda_graphs_follow_new_weights(tmp_path: Path) -> None:
    check_on_policy(run(tmp_path, "graphs", "rollout.enforce_eager=false", "teacher.enforce_eager=false"))


def test_half_precision_and_cuda_graphs_with_stale_weights(tmp_path: Path) -> None:
    dtypes = [f"{section}.dtype=bfloat16" for section in ("student", "teacher", "learner")]
    graphs = ("rollout.enforce_eager=false", "teacher.enforce_eager=false")
    found = run(tmp_path, "half", *dtypes, *graphs, "learner.zero_stage=2", "pipeline.max_staleness=2")
    first, *_, last = steps(found)
    assert first["staleness/mean"] == 0 and first["mismatch/abs_logprob"] < 0.05
    assert last["step"] == NUM_STEPS and last["staleness/mean"] > 0


def test_the_triton_loss_is_the_torch_loss(tmp_path: Path, by_object_store: Path) -> None:
    found = run(tmp_path, "triton", "run.deterministic=true", "learner.loss_kernel=triton", "run.steps=1")
    (mine,), (theirs, *_) = steps(found), steps(by_object_store)
    for key in ("loss/total", "learner/grad_norm"):
        assert mine[key] == pytest.approx(theirs[key], rel=1e-4)


@pytest.fixture
def three_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A Ray that takes the only GPU for three, and processes of which each poses as a host (tests/one_gpu.py)."""
    (tmp_path / "sitecustomize.py").write_text("from tests.one_gpu import pose_as_a_host\n\npose_as_a_host()\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}", prepend=os.pathsep)
    monkeypatch.setenv("RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES", "1")
    ray.init(address="local", num_cpus=6, num_gpus=3, include_dashboard=False, log_to_driver=False)
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


def test_weights_over_nccl(tmp_path: Path, three_gpus: str, by_object_store: Path) -> None:
    ways = ("weights.channel=broadcast", *gpus(1), f"resources.ray_address={three_gpus}")
    found = run(tmp_path, "nccl", "run.deterministic=true", *ways)
    check_on_policy(found)
    assert weights(found) == weights(by_object_store)
