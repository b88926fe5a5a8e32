"""Writing the student in the Hugging Face layout, which transformers, vLLM and lm-evaluation-harness read as it is."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from topd_ray.config.schema import StudentConfig
from topd_ray.errors import CheckpointError

TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template*",
    "additional_chat_templates/*.jinja",
    "tokenization_*.py",
)
"""Copied byte by byte: loading and saving a tokenizer may change it."""
GENERATION_FILE = "generation_config.json"
"""Copied as well, where the student has one: transformers refuses to save some that it loads."""


def write_student(model: Any, tensors: dict[str, torch.Tensor], student: StudentConfig, folder: Path) -> None:
    """config.json, generation_config.json and safetensors; `tensors` are full weights under hub names."""
    from transformers import GenerationConfig

    model.generation_config = GenerationConfig()  # can be saved
    model.save_pretrained(folder, state_dict=tensors, save_original_format=False)
    (folder / GENERATION_FILE).unlink(missing_ok=True)
    own = _local(student.model, student.revision, [GENERATION_FILE]) / GENERATION_FILE
    if own.is_file():
        shutil.copyfile(own, folder / GENERATION_FILE)


def copy_tokenizer(source: str, revision: str | None, folder: Path) -> None:
    """Copy the tokenizer's files from a local folder or, by hub name, from the local cache (or the hub).

    Raises CheckpointError if there are none.
    """
    found = _local(source, revision, TOKENIZER_FILES)
    paths = {path for pattern in TOKENIZER_FILES for path in found.glob(pattern) if path.is_file()}
    if not paths:
        raise CheckpointError(f"no tokenizer files in {found}: an export needs at least one of {TOKENIZER_FILES}")
    for path in sorted(paths):
        copy = folder / path.relative_to(found)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copy)


def _local(source: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """The folder with the files of a model that have such names."""
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(source, revision=revision, allow_patterns=list(patterns)))
