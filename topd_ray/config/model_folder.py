"""What a model's folder in the Hugging Face layout says about the model, read without loading it."""

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from topd_ray.config.text import expanded, read_text
from topd_ray.errors import ConfigError

_TOKENIZERS = (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt"), ("vocab.txt",))
_LONG_ROPE = ("longrope", "su")
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """A model's sizes."""

    vocab_size: int | None
    """rows of the embedding, padding included"""
    max_positions: int | None
    """longest sequence the positions allow (tokens)"""
    short_positions: int | None = None
    """of a LongRoPE model: longest sequence for which its rotary factors are the short ones (tokens)"""
    num_parameters: int | None
    """None where they cannot be counted"""


def is_local(model: str) -> bool:
    """Whether `model` names a folder of this machine rather than a model of the hub."""
    path = Path(expanded(model))
    looks_local = model.startswith((".", "/", "~"))
    return looks_local or path.is_dir() or (len(path.parts) > 1 and Path(path.parts[0]).exists())


def inspect_folder(folder: Path) -> tuple[ModelFacts, list[str]]:
    """The model's sizes as far as they can be read, and one line for each thing that is missing or broken."""
    nothing = ModelFacts(vocab_size=None, max_positions=None, num_parameters=None)
    if not folder.is_dir():
        return nothing, ["found no such folder, right would be a model in the Hugging Face layout, or a hub name"]
    problems: list[str] = []
    config: Mapping[str, Any] = {}
    num_parameters = None
    try:
        config = _read_object(folder / "config.json")
    except ConfigError as error:
        problems.append(str(error))
    if not any(all((folder / name).is_file() for name in names) for names in _TOKENIZERS):
        problems.append(
            "found no tokenizer, right would be a tokenizer.json (or tokenizer.model, or vocab.json with merges.txt)"
        )
    try:
        num_parameters = _count_parameters(folder)
    except ConfigError as error:
        problems.append(str(error))
    text_config = config.get("text_config")
    config = text_config if isinstance(text_config, dict) else config
    facts = ModelFacts(
        vocab_size=_whole(config.get("vocab_size")),
        max_positions=_max_positions(config),
        short_positions=_short_positions(config),
        num_parameters=num_parameters,
    )
    return facts, problems


def _count_parameters(folder: Path) -> int:
    """Parameters in the folder's safetensors. Raises ConfigError for missing, torn or stand-in weights."""
    if (folder / _INDEX).is_file():
        weight_map = _read_object(folder / _INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ConfigError(f"{_INDEX}: found no weight_map")
        shards = sorted({str(name) for name in weight_map.values()})
        missing = [name for name in shards if not (folder / name).is_file()]
        if missing:
            raise ConfigError(f"found {_INDEX} without {len(missing)} of its {len(shards)} files: {', '.join(missing)}")
        return sum(_parameters_of_file(folder / name) for name in shards)
    if (folder / "model.safetensors").is_file():
        return _parameters_of_file(folder / "model.safetensors")
    if any(folder.glob("pytorch_model*.bin")):
        raise ConfigError(
            "found weights as pytorch_model*.bin only, right would be safetensors; to convert them: "
            "AutoModelForCausalLM.from_pretrained(folder, dtype='auto').save_pretrained(folder)"
        )
    raise ConfigError(f"found no weights, right would be model.safetensors, or {_INDEX} and its files")


def _parameters_of_file(path: Path) -> int:
    """Elements of all tensors of a safetensors file: 8 bytes of header length, a JSON header, the data."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if 8 + length > size:
            hint = " (a git-lfs pointer: fetch the file itself)" if start == b"version " else ""
            raise ConfigError(f"{path.name}: found {size} bytes that are no safetensors file{hint}")
        header = _object(file.read(length).decode("utf-8", "replace"), path.name)
    tensors = [tensor for name, tensor in header.items() if name != "__metadata__"]
    try:
        end = max((int(tensor["data_offsets"][1]) for tensor in tensors), default=0)
        count = sum(math.prod(int(size) for size in tensor["shape"]) for tensor in tensors)
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise ConfigError(f"{path.name}: found a header that is not of a safetensors file") from error
    if size != 8 + length + end:
        raise ConfigError(f"{path.name}: found {size} bytes, right would be {8 + length + end}: the file is torn")
    return count


def _max_positions(config: Mapping[str, Any]) -> int | None:
    """Longest sequence, the stretching of rotary positions included."""
    longest = _whole(config.get("max_position_embeddings"))
    kind, scaling = _rope(config)
    factor = scaling.get("factor")
    if longest is None or kind in ("default", "llama3", *_LONG_ROPE) or not isinstance(factor, (int, float)):
        return longest
    original = _whole(scaling.get("original_max_position_embeddings")) or longest
    return max(longest, int(original * factor))


def _short_positions(config: Mapping[str, Any]) -> int | None:
    kind, scaling = _rope(config)
    if kind not in _LONG_ROPE:
        return None
    original = "original_max_position_embeddings"
    return (
        _whole(scaling.get(original)) or _whole(config.get(original)) or _whole(config.get("max_position_embeddings"))
    )


def _rope(config: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """Kind and parameters of the rotary positions."""
    scaling = config.get("rope_parameters") or config.get("rope_scaling")
    if not isinstance(scaling, dict):
        return "default", {}
    return str(scaling.get("rope_type", scaling.get("type", "default"))), scaling


def _read_object(path: Path) -> dict[str, Any]:
    try:
        text = read_text(path)
    except ConfigError as error:
        raise ConfigError(str(error).replace(str(path), path.name)) from error
    return _object(text, path.name)


def _object(text: str, name: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{name}: found no valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{name}: found JSON that is not an object")
    return value


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None
