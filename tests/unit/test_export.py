"""What an export takes from the student's own files."""

from pathlib import Path

import huggingface_hub
import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tiny import EOS_ID, load_tiny_model, make_tiny_model
from topd_ray.config.schema import StudentConfig
from topd_ray.demo.tokenizer import CHAT_TEMPLATE, build_tokenizer
from topd_ray.engines.export import copy_tokenizer, write_student

LIKE_LLAMA_2 = b'{"temperature": 0.6, "top_p": 0.9, "eos_token_id": 2}'
"""Loads with a warning, and is refused when transformers saves it: do_sample is not true."""


@pytest.fixture
def student(tmp_path: Path) -> Path:
    return make_tiny_model(tmp_path / "student", seed=0, tied=True)


@pytest.mark.parametrize("is_local", [True, False], ids=["folder", "hub"])
def test_the_generation_config_comes_as_it_was(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_local: bool
) -> None:
    (student / "generation_config.json").write_bytes(LIKE_LLAMA_2)
    asked: list[tuple[str, str, list[str]]] = []

    def download(name: str, *, revision: str, allow_patterns: list[str]) -> str:
        asked.append((name, revision, allow_patterns))
        return str(student)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    name = str(student) if is_local else "somebody/student"
    model, tensors = load_tiny_model(student), load_file(student / "model.safetensors")
    for _ in range(2):
        write_student(model, tensors, StudentConfig(model=name, revision="main"), tmp_path / "export")
    assert (tmp_path / "export" / "generation_config.json").read_bytes() == LIKE_LLAMA_2
    assert asked == ([] if is_local else [("somebody/student", "main", ["generation_config.json"])] * 2)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert exported.generation_config.temperature == 0.6


def test_a_student_without_one_gets_none(student: Path, tmp_path: Path) -> None:
    """Answers end at config.json's token then, as they did."""
    (student / "generation_config.json").unlink()
    tensors = load_file(student / "model.safetensors")
    write_student(load_tiny_model(student), tensors, StudentConfig(model=str(student)), tmp_path)
    assert not (tmp_path / "generation_config.json").exists()
    exported = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert exported.generation_config.eos_token_id == EOS_ID


def test_all_chat_templates_come(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = {"default": CHAT_TEMPLATE, "tool_use": "tools" + CHAT_TEMPLATE}
    tokenizer.save_pretrained(tmp_path / "student")
    (tmp_path / "export").mkdir()
    for _ in range(2):
        copy_tokenizer(str(tmp_path / "student"), None, tmp_path / "export")
    assert AutoTokenizer.from_pretrained(tmp_path / "export").chat_template == tokenizer.chat_template
