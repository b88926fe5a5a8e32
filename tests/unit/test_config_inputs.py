"""Checks of what a config names: model folders, data files, the run folder, the disk."""

import json
import os
import shutil
import struct
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from topd_ray.config.load import check_inputs, dump_config
from topd_ray.config.model_folder import ModelFacts, inspect_folder
from topd_ray.config.schema import TopdConfig
from topd_ray.demo.arithmetic import MAX_DIFFICULTY
from topd_ray.errors import ConfigError

CONFIG = {"model_type": "qwen3", "vocab_size": 64, "max_position_embeddings": 512}


def safetensors(path: Path, shape: tuple[int, ...] = (4, 2)) -> None:
    num_bytes = 4 * shape[0] * shape[1]
    header = json.dumps({"w": {"dtype": "F32", "shape": shape, "data_offsets": [0, num_bytes]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(num_bytes))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_text("{}")
    safetensors(folder / "model.safetensors")
    return folder


def config_of(model: Path, **sections: dict[str, Any]) -> TopdConfig:
    tree: dict[str, dict[str, Any]] = {
        "run": {"root": str(model.parent / "runs")},
        "data": {"max_prompt_tokens": 48},
        "student": {"model": str(model)},
        "teacher": {"model": str(model)},
        "rollout": {"max_new_tokens": 128},
    }
    for name, section in sections.items():
        tree[name] = {**tree.get(name, {}), **section}
    return TopdConfig.model_validate(tree)


def problems(config: TopdConfig) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        check_inputs(config)
    return str(caught.value).split("\n  ")[1:]


def test_secrets_are_refused_and_not_shown(model: Path) -> None:
    """A run folder keeps its config."""
    config = config_of(
        model,
        student={"model": "https://me:hunter2hunter2@hub.example/model"},
        data={"train": "arithmetic", "system_prompt": "use hf_abcdefghijklmnopqrstuvwxyz012345 to log in"},
    )
    found = problems(config)
    assert [one.partition(":")[0] for one in found] == ["data.system_prompt", "student.model"]
    assert all("found what looks like a secret" in one for one in found)
    assert "hunter2" not in "".join(found) and "hf_" not in "".join(found)
    plain = {"train": "arithmetic", "system_prompt": "Say how many tokens: 12. No key is needed, and no password."}
    check_inputs(config_of(model, data=plain))


def test_nothing_to_say_about_a_good_config(model: Path) -> None:
    check_inputs(config_of(model))
    assert not (model.parent / "runs").exists()


def test_facts_of_a_folder(model: Path) -> None:
    facts, found = inspect_folder(model)
    assert facts == ModelFacts(vocab_size=64, max_positions=512, num_parameters=8)
    assert found == []


def test_everything_missing_is_named_at_once(model: Path) -> None:
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (model / name).unlink()
    student = [line for line in problems(config_of(model)) if line.startswith(f"student.model={model}: ")]
    assert [line.partition(f"{model}: ")[2] for line in student] == [
        "config.json: found no such file",
        "found no tokenizer, right would be a tokenizer.json (or tokenizer.model, or vocab.json with merges.txt)",
        "found no weights, right would be model.safetensors, or model.safetensors.index.json and its files",
    ]


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "tests/nowhere"])
def test_a_name_that_looks_local_must_be_there(model: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model.parent)
    (model.parent / "tests").mkdir()
    assert problems(config_of(model, student={"model": name})) == [
        f"student.model={name}: found no such folder, right would be a model in the Hugging Face layout, or a hub name"
    ]


def test_a_hub_name_is_left_to_the_hub(model: Path) -> None:
    check_inputs(config_of(model, student={"model": "Qwen/Qwen3-4B"}))


def test_every_shard_must_be_there(model: Path) -> None:
    (model / "model.safetensors").unlink()
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-3.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    safetensors(model / "model-1.safetensors")
    _, found = inspect_folder(model)
    assert found == [
        "found model.safetensors.index.json without 2 of its 3 files: model-2.safetensors, model-3.safetensors"
    ]
    safetensors(model / "model-2.safetensors", (3, 3))
    safetensors(model / "model-3.safetensors")
    facts, found = inspect_folder(model)
    assert (facts.num_parameters, found) == (8 + 9 + 8, [])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "that are no safetensors file (a git-lfs pointer"),
        (b"", "found 0 bytes that are no safetensors file"),
        (struct.pack("<Q", 2) + b"[]", "model.safetensors: found JSON that is not an object"),
        (struct.pack("<Q", 12) + b'{"w": {}}   ', "found a header that is not of a safetensors file"),
    ],
)
def test_weights_that_are_none(model: Path, content: bytes, message: str) -> None:
    (model / "model.safetensors").write_bytes(content)
    assert message in inspect_folder(model)[1][0]


def test_torn_weights(model: Path) -> None:
    whole = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(whole[:-5])
    assert inspect_folder(model)[1] == [
        f"model.safetensors: found {len(whole) - 5} bytes, right would be {len(whole)}: the file is torn"
    ]


def test_weights_that_are_not_safetensors(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    assert inspect_folder(model)[1] == [
        "found weights as pytorch_model*.bin only, right would be safetensors; to convert them: "
        "AutoModelForCausalLM.from_pretrained(folder, dtype='auto').save_pretrained(folder)"
    ]


def test_config_json_that_is_no_json(model: Path) -> None:
    (model / "config.json").write_text("{,")
    assert inspect_folder(model)[1][0].startswith("config.json: found no valid JSON: ")


def test_yarn_stretches_positions(model: Path) -> None:
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    (model / "config.json").write_text(json.dumps({**CONFIG, "rope_parameters": rope}))
    assert inspect_folder(model)[0].max_positions == 2048


ROPE = {"type": "su", "short_factor": [1.0], "long_factor": [4.0]}


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": ROPE, "original_max_position_embeddings": 177},
        {"rope_parameters": {**ROPE, "rope_type": "longrope", "original_max_position_embeddings": 177}},
    ],
    ids=["Phi-3", "transformers 5"],
)
def test_a_student_with_long_rope_keeps_to_its_short_factors(model: Path, changes: dict[str, Any]) -> None:
    """A teacher does not, nor a student that is only evaluated: all that they do is done in vLLM."""
    teacher = model.parent / "teacher"
    shutil.copytree(model, teacher)
    for folder in (model, teacher):
        (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    sections = {"teacher": {"model": str(teacher)}, "near_future": {"window": 20}}
    check_inputs(config_of(model, **sections))
    longer = config_of(model, **sections, rollout={"max_new_tokens": 129})
    assert problems(longer) == [
        "rollout.max_new_tokens: found data.max_prompt_tokens 48 + longest response 129 + 1 = 178 tokens, right would "
        "be at most the student's 177 original positions: beyond them vLLM and the learner differ in LongRoPE"
    ]
    check_inputs(longer, training=False)
    beside = config_of(model, **{**sections, "near_future": {"window": 20, "guidance_context": "teacher"}})
    assert "longest response 128 + 1 + near_future.window 20 = 197 tokens" in problems(beside)[0]


def test_top_k_beyond_the_vocabulary(model: Path) -> None:
    assert problems(config_of(model, teacher={"top_k": 65})) == [
        "teacher.top_k: found 65, right would be at most the teacher's vocabulary of 64 (or full)"
    ]


@pytest.mark.parametrize(("num_new", "student_fits"), [(463, True), (464, False)])
def test_sequences_longer_than_the_positions(model: Path, num_new: int, student_fits: bool) -> None:
    """The engines are built for one token more: the one vLLM draws after a sequence it scores."""
    terms = f"rollout.max_new_tokens: found data.max_prompt_tokens 48 + longest response {num_new} + 1"
    of_student = f"{terms} = {num_new + 49} tokens, right would be at most the student's 512 positions"
    of_teacher = (
        f"{terms} + near_future.window 1 = {num_new + 50} tokens, right would be at most the teacher's 512 positions"
    )
    found = problems(config_of(model, rollout={"max_new_tokens": num_new}, near_future={"window": 1}))
    assert found == ([of_teacher] if student_fits else [of_student, of_teacher])
    check_inputs(config_of(model, rollout={"max_new_tokens": 462}, near_future={"window": 1}))
    beside = problems(
        config_of(model, rollout={"max_new_tokens": 463}, near_future={"window": 1, "guidance_context": "teacher"})
    )
    assert [line.rpartition("the ")[2] for line in beside] == ["student's 512 positions", "teacher's 512 positions"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.jsonl", "found no such file or folder, right would be arithmetic, a .jsonl or .parquet file"),
        ("empty.jsonl", "found an empty file, right would be a prompt a row"),
        ("prompts.csv", "found a file of another kind, right would be arithmetic, a .jsonl"),
        ("folder", "found a folder without state.json, right would be"),
        ("aritmetic", "found no such file or folder"),
    ],
)
def test_data_files(model: Path, name: str, message: str) -> None:
    (model.parent / "empty.jsonl").touch()
    (model.parent / "prompts.csv").write_text("prompt\n")
    (model.parent / "folder").mkdir()
    source = str(model.parent / name)
    lines = problems(config_of(model, data={"train": source, "heldout": source}))
    assert [line.partition("=")[0] for line in lines] == ["data.train", "data.heldout"]
    assert all(f"{source}: {message}" in line for line in lines)


def test_run_folder_of_another_config(model: Path) -> None:
    config = config_of(model)
    folder = config.run.folder
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_config(config))
    changed = config_of(model, learner={"learning_rate": 0.5}, rollout={"temperature": 0.5}, run={"steps": 3})
    (folder / "metrics.jsonl").touch()
    check_inputs(changed)
    (folder / "metrics.jsonl").write_text("{}\n")
    check_inputs(config)
    assert problems(changed) == [
        f"run.name=run: found {folder} in use by a run of another config (rollout.temperature: 1.0 (a number) there, "
        "0.5 (a number) now; learner.learning_rate: 2e-06 (a number) there, 0.5 (a number) now), right would be "
        "another run.name, or the config as it was there"
    ]
    check_inputs(changed, training=False)
    check_inputs(
        config_of(
            model,
            run={"steps": 9, "epochs": 2, "checkpoint_every": 1, "keep_checkpoints": 3, "resume": "must"},
            evaluation={"every": 2, "teacher": False},
            metrics={"tensorboard": False},
            resources={"threads_per_learner": 2},
            rollout={"num_workers": 2},
            learner={"num_ranks": 2, "zero_stage": 3, "offload_optimizer": True},
        )
    )


def test_run_folder_whose_config_cannot_be_read(model: Path) -> None:
    config = config_of(model)
    config.run.folder.mkdir(parents=True)
    (config.run.folder / "metrics.jsonl").write_text("{}\n")
    (config.run.folder / "config.yaml").write_text("run: [")
    assert "whose config cannot be read" in problems(config)[0]
    (config.run.folder / "config.yaml").write_text("run: {colour: red}")
    assert "of another schema (run.colour: unknown key" in problems(config)[0]


def test_full_disk(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", ["total", "used", "free"])
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(2**40, 2**40 - 2**27, 2**27))
    assert problems(config_of(model)) == [
        f"run.root={model.parent / 'runs'}: found 0.1 GiB free on the disk of {model.parent}, right would be 0.3 GiB "
        "for 3 checkpoints and an export of 8 parameters"
    ]


def test_what_a_run_has_written_already_counts_as_room(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", ["total", "used", "free"])
    config = config_of(model)
    written = config.run.folder / "checkpoints" / "step-000001"
    written.mkdir(parents=True)
    (written / "optimizer.pt").write_bytes(bytes(100))
    wanted = 8 * (3 * 12 + 4) + 256 * 1024**2
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(2**40, 0, wanted - 100))
    check_inputs(config)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(2**40, 0, wanted - 101))
    assert len(problems(config)) == 1


def test_run_folder_that_cannot_be_written(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert "cannot be written to, right would be a folder that can" in problems(config_of(model))[0]


def test_a_file_where_the_run_folder_would_be(model: Path) -> None:
    config = config_of(model)
    config.run.folder.parent.mkdir()
    config.run.folder.touch()
    assert problems(config)[0].startswith(f"run.name: found a file at {config.run.folder}")


def test_difficulty_bound_is_the_generators() -> None:
    bound = TopdConfig.model_json_schema()["$defs"]["ArithmeticConfig"]["properties"]["difficulty"]["maximum"]
    assert bound == MAX_DIFFICULTY
