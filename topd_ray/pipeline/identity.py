"""What makes a checkpoint one of this run: the student's architecture, its vocabulary, and the seed.

The prompts are compared by the schedule, the rest of the config by the run folder's config.yaml.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from topd_ray.config.schema import TopdConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNIMPORTANT = ("_name_or_path", "_commit_hash", "transformers_version", "torch_dtype", "dtype")
"""Of a model's config.json: where it came from, and how it was stored."""


def run_identity(config: TopdConfig, tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
    """The student's config.json with dotted keys, a digest of the vocabulary, and run.seed. JSON only."""
    from transformers import PretrainedConfig

    architecture, _ = PretrainedConfig.get_config_dict(config.student.model, revision=config.student.revision)
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items())).encode()
    return {
        **dict(_flat("student", {key: value for key, value in architecture.items() if key not in UNIMPORTANT})),
        "vocabulary": hashlib.sha256(vocabulary).hexdigest()[:16],
        "run.seed": config.run.seed,
    }


def _flat(prefix: str, tree: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(f"{prefix}.{key}", value)
        else:
            yield f"{prefix}.{key}", value
