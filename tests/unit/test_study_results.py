"""A study's folder is one config's, and its results say where they come from."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from topd_ray.config.load import dump_config, load_config
from topd_ray.config.schema import TopdConfig
from topd_ray.data.arrow import trajectories_to_batch
from topd_ray.data.schedule import rollout_requests
from topd_ray.errors import ConfigError
from topd_ray.provenance import UNKNOWN, commit
from topd_ray.studies.parts import Parts
from topd_ray.studies.results import CONFIG, Results, claim_folder, load_results, save_results
from topd_ray.studies.rollouts import Rollouts
from topd_ray.studies.statistics import Interval
from topd_ray.types import Prompt, Trajectory


def demo(*overrides: str) -> TopdConfig:
    return load_config(Path("jobs/demo.yaml"), overrides)


def test_a_folder_goes_on_with_its_own_config_and_refuses_another(tmp_path: Path) -> None:
    claim_folder(tmp_path / "new", "probe", demo())
    written = (tmp_path / "new" / CONFIG).read_text()
    claim_folder(tmp_path / "new", "probe", demo())
    with pytest.raises(ConfigError) as refused:
        claim_folder(tmp_path / "new", "probe", demo("run.seed=3", "near_future.window=9"))
    message = str(refused.value)
    assert "near_future.window: 8 there, 9 here" in message and "run.seed: 0 there, 3 here" in message
    assert "right would be an empty folder" in message and "more" not in message
    assert (tmp_path / "new" / CONFIG).read_text() == written


def test_fields_that_do_not_matter_may_differ(tmp_path: Path) -> None:
    claim_folder(tmp_path, "probe", demo())
    claim_folder(tmp_path, "probe", demo("learner.learning_rate=1e-5", "run.name=other"), ("learner", "run.name"))
    with pytest.raises(ConfigError, match=r"run\.name"):
        claim_folder(tmp_path, "probe", demo("run.name=other"), ("run.nam",))


def test_many_differences_are_counted(tmp_path: Path) -> None:
    claim_folder(tmp_path, "probe", demo())
    overrides = [f"rollout.{key}=3" for key in ("prompts_per_step", "samples_per_prompt", "max_new_tokens")]
    more = [f"learner.{key}=3" for key in ("max_tokens_per_micro_batch", "learning_rate", "gradient_clipping")]
    with pytest.raises(ConfigError, match="and 3 more"):
        other = demo(*overrides, *more[1:], "run.seed=3", "near_future.window=9", "data.shuffle=false")
        claim_folder(tmp_path, "probe", other)


def test_results_are_read_as_they_were_written_with_their_origin(tmp_path: Path) -> None:
    median = Interval(value=0.5, low=0.4, high=0.6, n=30)
    save_results(
        tmp_path / "study",
        Results(
            study="probe",
            command="topd probe jobs/demo.yaml",
            seeds=[0],
            seconds=1.5,
            commits={"abc"},
            figures={"median": median.to_json()},
            notes=["one"],
            config=dump_config(demo()),
        ),
    )
    found = load_results(tmp_path / "study")
    assert found["figures"]["median"] == {"value": 0.5, "low": 0.4, "high": 0.6, "n": 30}
    assert (found["study"], found["seeds"], found["seconds"], found["notes"]) == ("probe", [0], 1.5, ["one"])
    assert set(found["machine"]) >= {"cpu", "cores"} and found["versions"]["python"]
    assert load_config_text(found["config"], tmp_path) == demo()


def load_config_text(text: str, folder: Path) -> TopdConfig:
    (folder / "again.yaml").write_text(text)
    return load_config(folder / "again.yaml")


def test_results_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="right would be a folder in which a study ended"):
        load_results(tmp_path)
    (tmp_path / "results.json").write_text(json.dumps({"study": "probe"})[:-1])
    with pytest.raises(ConfigError, match="cannot be read"):
        load_results(tmp_path)
    for other in ({"study": "probe"}, []):
        (tmp_path / "results.json").write_text(json.dumps(other))
        with pytest.raises(ConfigError, match=r"found no .*tables"):
            load_results(tmp_path)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match=r"cannot be written .* right would be another folder \(--out\)"):
            claim_folder(folder, "probe", demo())


def table(value: int) -> pa.Table:
    return pa.table({"value": pa.array([value, value], pa.int32())}).replace_schema_metadata({"kind": "a test"})


def test_parts_are_whole_or_missing(tmp_path: Path) -> None:
    parts = Parts(tmp_path / "rows", "numbers", 3, ["value"])
    assert parts.missing() == [0, 1, 2]
    parts.write(1, table(1))
    (tmp_path / "rows" / ".numbers-00000.parquet.tmp").write_bytes(b"half of a part")
    again = Parts(tmp_path / "rows", "numbers", 3, ["value"])
    assert again.missing() == [0, 2]
    again.write(0, table(0))
    again.write(2, table(2))
    assert again.read(1).equals(table(1), check_metadata=True)
    assert again.read_all().column("value").to_pylist() == [0, 0, 1, 1, 2, 2]
    assert 0.0 <= again.seconds() < 5.0
    assert again.commits() == {commit() or UNKNOWN}


def test_a_torn_part_is_named(tmp_path: Path) -> None:
    parts = Parts(tmp_path, "numbers", 1, ["value"])
    (tmp_path / "numbers-00000.parquet").write_bytes(b"PAR1")
    with pytest.raises(ConfigError, match=r"numbers-00000\.parquet cannot be read .* delete it"):
        parts.read(0)


def test_rollouts_of_fewer_prompts_than_are_asked_for_are_refused(tmp_path: Path) -> None:
    ids = np.array([5, 6], np.int32)
    drawn = Trajectory(
        trajectory_id="p0/0/0",
        prompt_id="p0",
        sample_index=0,
        epoch=0,
        policy_version=0,
        finish_reason="stop",
        prompt_ids=ids,
        response_ids=ids,
        behaviour_logprobs=np.array([-0.5, -0.5], np.float32),
    )
    prompts = [Prompt(prompt_id=name, token_ids=(5, 6), answer=None) for name in ("p0", "p1")]
    requests = rollout_requests([(0, prompt) for prompt in prompts], samples=[0], run_seed=0)
    assert requests[0].trajectory_id == drawn.trajectory_id
    batch = trajectories_to_batch([drawn])
    Parts(tmp_path, "rollouts", 1, batch.schema.names).write(0, pa.Table.from_batches([batch]))
    with pytest.raises(ConfigError, match="found none where p1/0/0 is asked for"):
        Rollouts(tmp_path, requests, 2).read(0)


def test_a_part_of_another_schema_is_named(tmp_path: Path) -> None:
    Parts(tmp_path, "numbers", 1, ["value"]).write(0, table(0))
    with pytest.raises(
        ConfigError, match=r"numbers-00000\.parquet: found columns value .* right would be value, unit;"
    ):
        Parts(tmp_path, "numbers", 1, ["value", "unit"]).read(0)
    pq.write_table(table(0), tmp_path / "numbers-00000.parquet")
    with pytest.raises(ConfigError, match="of another version or program"):
        Parts(tmp_path, "numbers", 1, ["value"]).read(0)


def test_a_folder_of_another_study_or_model_is_refused(tmp_path: Path) -> None:
    student = tmp_path / "student"
    shutil.copytree(demo().student.model, student)
    claim_folder(tmp_path / "out", "ablation", demo(f"student.model={student}"))
    claim_folder(tmp_path / "out", "ablation", demo(f"student.model={student}"))
    with pytest.raises(ConfigError, match="study: 'ablation' there, 'sweep' here"):
        claim_folder(tmp_path / "out", "sweep", demo(f"student.model={student}"))
    weights = student / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(ConfigError, match=r"another config[^\n]*\n  student: "):
        claim_folder(tmp_path / "out", "ablation", demo(f"student.model={student}"))
    (tmp_path / "out" / "owner.json").write_text("{")
    with pytest.raises(ConfigError, match="is torn"):
        claim_folder(tmp_path / "out", "ablation", demo(f"student.model={student}"))
