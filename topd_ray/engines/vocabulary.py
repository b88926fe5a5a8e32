"""Which token ids a model may write, and which of them end an answer."""

from dataclasses import dataclass

from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from topd_ray.config.schema import ModelConfig
from topd_ray.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """Ids 0 .. size - 1 are tokens; rows above that pad the embedding and mean nothing."""

    size: int
    """len(tokenizer)"""
    eos_ids: tuple[int, ...]
    """tokens that end an answer, ascending"""


def read_vocabulary(model: ModelConfig) -> Vocabulary:
    """Read it from the model's files. Raises ConfigError where the embedding lacks rows or nothing ends an answer."""
    tokenizer = AutoTokenizer.from_pretrained(
        model.model, revision=model.revision, trust_remote_code=model.trust_remote_code
    )
    config = AutoConfig.from_pretrained(
        model.model, revision=model.revision, trust_remote_code=model.trust_remote_code
    ).get_text_config()
    if config.vocab_size < len(tokenizer):
        raise ConfigError(
            f"{model.model} has {config.vocab_size} embedding rows for {len(tokenizer)} tokens: "
            "the tokenizer belongs to another model"
        )
    sources = (tokenizer.eos_token_id, config.eos_token_id, _generation_eos(model))
    eos_ids = {token_id for source in sources for token_id in _as_list(source)}
    if not eos_ids:
        raise ConfigError(f"{model.model} names no end-of-sequence token: set eos_token_id in generation_config.json")
    return Vocabulary(size=len(tokenizer), eos_ids=tuple(sorted(eos_ids)))


def _generation_eos(model: ModelConfig) -> int | list[int] | None:
    try:
        found: int | list[int] | None = GenerationConfig.from_pretrained(
            model.model, revision=model.revision
        ).eos_token_id
    except OSError:
        return None
    return found


def _as_list(source: int | list[int] | None) -> list[int]:
    if source is None:
        return []
    return source if isinstance(source, list) else [source]
