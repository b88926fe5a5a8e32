"""What can be read from a model's files without building the model."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from transformers import AutoConfig

from topd_ray.config.schema import ModelConfig
from topd_ray.errors import ConfigError
from topd_ray.types import Float32

INPUT_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "tok_embeddings.weight")
"""How the input embedding's name ends in the architectures we know."""


def checkpoint_folder(model: ModelConfig) -> Path:
    """The local folder of `model`, downloaded first where it is a hub name."""
    if Path(model.model).is_dir():
        return Path(model.model)
    return Path(snapshot_download(model.model, revision=model.revision, allow_patterns=["*.json", "*.safetensors"]))


def tensor_files(folder: Path) -> dict[str, Path]:
    """The safetensors file of every tensor name. Raises ConfigError where there is none."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return {name: folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
    single = folder / "model.safetensors"
    if not single.is_file():
        raise ConfigError(f"{folder} holds no model.safetensors and no index of shards: save the model as safetensors")
    with safe_open(single, "pt") as tensors:
        return dict.fromkeys(tensors.keys(), single)


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the checkpoint, from the files' headers."""
    files = tensor_files(folder)
    shapes: dict[str, tuple[int, ...]] = {}
    for file in sorted(set(files.values())):
        with safe_open(file, "pt") as tensors:
            shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    return shapes


def checkpoint_bytes(folder: Path) -> int:
    """Size of all weight files."""
    return sum(file.stat().st_size for file in set(tensor_files(folder).values()))


def head_is_tied(model: ModelConfig) -> bool:
    """Whether the output head is the input embedding."""
    config = AutoConfig.from_pretrained(model.model, revision=model.revision, trust_remote_code=model.trust_remote_code)
    return bool(config.get_text_config().tie_word_embeddings)


def read_embedding(model: ModelConfig, num_tokens: int) -> Float32:
    """The input embedding of the first `num_tokens` ids, float32 [num_tokens, D]. Raises ConfigError if not found."""
    folder = checkpoint_folder(model)
    files = tensor_files(folder)
    name = _embedding_name(files, folder)
    with safe_open(files[name], "pt") as tensors:
        rows = tensors.get_slice(name)
        if rows.get_shape()[0] < num_tokens:
            raise ConfigError(f"{name} in {folder} has {rows.get_shape()[0]} rows for {num_tokens} tokens")
        embedding: Float32 = rows[:num_tokens].to(torch.float32).numpy()
    return embedding


def _embedding_name(names: Mapping[str, Path], folder: Path) -> str:
    found = [name for name in names if name.endswith(INPUT_EMBEDDINGS)]
    if len(found) != 1:
        raise ConfigError(f"{folder} has {found or 'no'} input embeddings: want one name ending in {INPUT_EMBEDDINGS}")
    return found[0]
