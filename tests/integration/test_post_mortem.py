"""The bundle of a failed run: a real actor that fails, what is kept of it, and what is not."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from ray.cluster_utils import Cluster

from topd_ray.actors import worker_logs
from topd_ray.config.load import load_config
from topd_ray.config.schema import TopdConfig
from topd_ray.errors import RolloutError, RunInterrupted
from topd_ray.pipeline import post_mortem
from topd_ray.pipeline.post_mortem import write_post_mortem

ROOT = Path(__file__).parents[2]
SECRET = "s3cr3tValue0123456789"
OTHER = "other0secret0value"


def config_of(root: Path) -> TopdConfig:
    return load_config(ROOT / "jobs" / "debug.yaml", (f"run.root={root}", "run.name=failed"))


def everything_in(folder: Path) -> str:
    return "\n".join(path.read_text(errors="replace") for path in sorted(folder.rglob("*")) if path.is_file())


@pytest.fixture
def running_ray(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, object_store_memory=80_000_000)
    yield
    ray.shutdown()


def failure() -> RolloutError:
    """What the fleet raises when a worker fails."""

    class RolloutWorker:
        """Fails as an engine would: more words than anybody wants to read, and a traceback."""

        def write(self) -> None:
            print("an early line")
            for line in range(6000):
                print(f"line {line:5d} " + "." * 80)
            print(f"connecting with HF_TOKEN={SECRET} and Authorization: Bearer {OTHER}", flush=True)
            raise ValueError(f"engine broke at https://me:{OTHER}@hub.example")

    actor = ray.remote(RolloutWorker).options(num_cpus=1).remote()
    try:
        ray.get(actor.write.remote())
    except ValueError as cause:
        try:
            raise RolloutError("a rollout worker died") from cause
        except RolloutError as error:
            return error
    raise AssertionError("the actor did not fail")


def test_a_bundle_holds_what_is_needed_and_no_secret(tmp_path: Path, running_ray: None) -> None:
    config = config_of(tmp_path)
    run = config.run.folder
    (run / "failed_batch").mkdir(parents=True)
    table = pa.table({"token": [1, 2, 3]})
    pq.write_table(table, run / "failed_batch" / "version-000003-rank-0.parquet")
    (run / "metrics.jsonl").write_text("".join(json.dumps({"step": step}) + "\n" for step in range(1000)))
    (run / "ledger.jsonl").write_text('{"prompt": "a"}\n')
    (run / "quarantine.jsonl").write_text('{"step": 1, "prompt_id": "b"}\n')
    (run / "failed_batch" / "update-000004.jsonl").write_text('{"trajectory_id": "c/0/0"}\n')
    said: list[str] = []
    bundle = write_post_mortem(config, failure(), said.append)
    assert bundle is not None and bundle.parent == run.absolute() / "post-mortem"
    assert said == [f"what is needed to understand the failure is in {bundle}/"]

    error = (bundle / "error.txt").read_text()
    assert "RolloutError: a rollout worker died" in error and "engine broke at https://" in error
    assert load_config(bundle / "config.yaml") == config
    steps = [json.loads(line)["step"] for line in (bundle / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(800, 1000))
    assert (bundle / "ledger.jsonl").read_text() == '{"prompt": "a"}\n'
    assert (bundle / "quarantine.jsonl").read_text() == '{"step": 1, "prompt_id": "b"}\n'
    assert (bundle / "failed_batch" / "update-000004.jsonl").read_text() == '{"trajectory_id": "c/0/0"}\n'
    assert pq.read_table(bundle / "failed_batch" / "version-000003-rank-0.parquet").equals(table)

    (out,) = (bundle / "logs" / "driver-node").glob("RolloutWorker-*.out")
    lines = out.read_text().splitlines()
    assert lines[-1] == "connecting with HF_TOKEN=[redacted] and Authorization: [redacted]"
    assert lines[-2].startswith("line  5999 ") and lines[0].startswith("line ") and "an early line" not in lines
    assert worker_logs.FILE_BYTES * 0.99 < out.stat().st_size <= worker_logs.FILE_BYTES + 100

    about = json.loads((bundle / "about.json").read_text())
    assert about["run"] == "failed" and about["left_out"] == []
    assert about["versions"]["ray"] == ray.__version__ and about["environment"]["HF_TOKEN"] == "[redacted]"
    (node,) = about["nodes"]
    assert node["node_id"] == ray.get_runtime_context().get_node_id() and node["resources"]["CPU"] == 1.0
    text = everything_in(bundle)
    assert SECRET not in text and OTHER not in text
    token = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    assert not token.exists() or token.read_text().strip() not in text


def test_logs_of_another_node(tmp_path: Path) -> None:
    """Two nodes on one machine; Ray keeps their logs in one folder, so that only who was asked tells them apart."""
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        nodes.add_node(num_cpus=1, object_store_memory=80_000_000)
        ray.init(address=nodes.address, log_to_driver=False)
        bundle = write_post_mortem(config_of(tmp_path), failure(), print)
        assert bundle is not None
        about = json.loads((bundle / "about.json").read_text())
        assert about["left_out"] == [] and len(about["nodes"]) == 2
        folders = {path.parent.name for path in (bundle / "logs").rglob("RolloutWorker-*.out")}
        assert folders == {"driver-node", about["nodes"][0]["address"]}
    finally:
        ray.shutdown()
        nodes.shutdown()


def test_only_logs_of_this_jobs_workers(tmp_path: Path) -> None:
    header = ":job_id:02000000\n:actor_name:TeacherWorker\n"
    for name, text in {
        "worker-aa-ffffffff-11.err": header + "a warning\n",
        "worker-ab-02000000-12.out": header,
        "worker-ac-03000000-13.out": ":job_id:03000000\nof another job\n",
        "worker-ad-ffffffff-14.out": "of no job\n",
        "raylet.out": "of all jobs\n",
    }.items():
        (tmp_path / name).write_text(text)
    assert worker_logs.tails(tmp_path, "02000000").logs == {"TeacherWorker-11.err": "a warning\n"}


def test_many_logs_are_bounded_and_the_last_written_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_logs, "NODE_BYTES", 13_000)
    for index in range(4):
        path = tmp_path / f"worker-a{index}-02000000-{index}.out"
        path.write_text(":job_id:02000000\n" + "".join(f"{index} {line:5d}\n" for line in range(1000)))
        os.utime(path, ns=(index * 10**9, index * 10**9))
    found = worker_logs.tails(tmp_path, "02000000")
    assert list(found.logs) == ["worker-3.out", "worker-2.out"]
    assert found.logs["worker-3.out"].startswith("3     0\n")
    assert found.logs["worker-2.out"].startswith("2   376\n") and found.logs["worker-2.out"].endswith("2   999\n")
    assert found.left_out == ("worker-1.out", "worker-0.out")


def test_without_ray_and_with_a_broken_run_folder_the_rest_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(post_mortem, "BATCH_BYTES", 10)
    config = config_of(tmp_path)
    (config.run.folder / "failed_batch").mkdir(parents=True)
    (config.run.folder / "failed_batch" / "big.parquet").write_bytes(b"x" * 11)
    (config.run.folder / "ledger").mkdir()
    bundle = write_post_mortem(config, ValueError("broken"), print)
    assert bundle is not None
    left_out = json.loads((bundle / "about.json").read_text())["left_out"]
    assert left_out[0] == "logs: Ray does not run" and "big.parquet: 11 bytes, no room" in left_out[1]
    assert {path.name for path in bundle.iterdir()} == {"error.txt", "config.yaml", "about.json"}


def test_it_never_raises_over_the_error(tmp_path: Path) -> None:
    said: list[str] = []
    config = config_of(tmp_path)
    config.run.folder.mkdir()
    (config.run.folder / "post-mortem").write_text("in the way")
    assert write_post_mortem(config, ValueError("broken"), said.append) is None
    assert len(said) == 1 and said[0].startswith("no post-mortem bundle could be written: ")


def test_an_interrupt_is_no_failure(tmp_path: Path) -> None:
    for error in (RunInterrupted("stopped by SIGTERM"), KeyboardInterrupt()):
        assert write_post_mortem(config_of(tmp_path), error, print) is None
    assert list(tmp_path.iterdir()) == []


def test_the_last_bundles_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(post_mortem, "KEPT", 2)
    written = [write_post_mortem(config_of(tmp_path), ValueError(str(index)), print) for index in range(4)]
    assert sorted(path for path in written[0].parent.iterdir()) == written[2:]  # type: ignore[union-attr]


def test_a_cluster_that_never_answers(tmp_path: Path) -> None:
    with pytest.raises(TimeoutError, match=r"did not answer within 0\.1 s"):
        post_mortem._within(0.1, lambda: time.sleep(5))
    with pytest.raises(OSError, match="gone"):
        post_mortem._within(5.0, lambda: (_ for _ in ()).throw(OSError("gone")))
