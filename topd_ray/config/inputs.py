"""Does what a config names exist, and fit together? Looks at the file system, and loads no model."""

import os
import shutil
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from topd_ray.config import yaml12
from topd_ray.config.fields import fields
from topd_ray.config.model_folder import ModelFacts, inspect_folder, is_local
from topd_ray.config.schema import ModelConfig, TopdConfig
from topd_ray.config.text import expanded, read_text
from topd_ray.config.validate import report, shown, validated
from topd_ray.errors import ConfigError
from topd_ray.redaction import Redactor

HARMLESS = (
    "run.name",
    "run.root",
    "run.steps",
    "run.epochs",
    "run.resume",
    "run.checkpoint_every",
    "run.keep_checkpoints",
    "buffer.*",
    "weights.*",
    "evaluation.before",
    "evaluation.after",
    "evaluation.teacher",
    "evaluation.every",
    "metrics.*",
    "studies.*",
    "resources.*",
    "teacher.verify",
    "learner.num_ranks",
    "learner.zero_stage",
    "learner.offload_optimizer",
    *(
        f"{section}.{field}"
        for section in ("rollout", "teacher")
        for field in (
            "num_workers",
            "tensor_parallel_size",
            "gpu_memory_utilization",
            "kv_cache_bytes",
            "max_num_seqs",
            "max_batched_tokens",
            "enforce_eager",
        )
    ),
)
"""Fields that may change between two sessions of a run: they decide neither what is trained on what, nor
how it is graded."""

CHECKPOINT_BYTES_PER_PARAMETER = 12
"""Weights and AdamW's two moments, in float32."""
EXPORT_BYTES_PER_PARAMETER = 4
FREE_BYTES = 256 * 1024**2
"""Disk space for everything else a run writes."""


def check_inputs(config: TopdConfig, *, training: bool = True) -> None:
    """Check models, data files and, when `training`, the run folder and the space on its disk; refuse secrets.

    Raises ConfigError with a line for every problem: dotted key, what was found, what would be right.
    """
    if secrets := [*_secrets(config)]:
        raise report("config", secrets)
    student, student_problems = _model("student", config.student)
    teacher, teacher_problems = _model("teacher", config.teacher)
    problems = [
        *student_problems,
        *teacher_problems,
        *_vocabulary(config, teacher),
        *_lengths(config, student, teacher),
        *_data("data.train", config.data.train),
        *(_data("data.heldout", config.data.heldout) if config.data.heldout is not None else ()),
    ]
    if training:
        problems += [*_long_rope(config, student), *_run_folder(config), *_disk(config, student)]
    if problems:
        raise report("config", problems)


def _secrets(config: TopdConfig) -> Iterator[str]:
    """Whatever a config holds is written to the run folder, and shown in messages."""
    tree, redact = config.model_dump(mode="json"), Redactor({})
    for key in fields():
        value = yaml12.dump(_value(tree, key))
        if redact(value) != value:
            yield (
                f"{key}: found what looks like a secret, which the run folder would keep; right would be none, and "
                "tokens in the environment (docs/security.md)"
            )


def changed_keys(old: TopdConfig, new: TopdConfig) -> list[str]:
    """One line for each field, the harmless ones excepted, in which two configs differ."""
    before, now = old.model_dump(mode="json"), new.model_dump(mode="json")
    lines = []
    for key in fields():
        there, here = _value(before, key), _value(now, key)
        if there != here and not any(fnmatch(key, pattern) for pattern in HARMLESS):
            lines.append(f"{key}: {shown(there)} there, {shown(here)} now")
    return lines


def _model(role: str, model: ModelConfig) -> tuple[ModelFacts, list[str]]:
    if not is_local(model.model):
        return ModelFacts(vocab_size=None, max_positions=None, num_parameters=None), []
    facts, problems = inspect_folder(Path(expanded(model.model)))
    return facts, [f"{role}.model={model.model}: {problem}" for problem in problems]


def _vocabulary(config: TopdConfig, teacher: ModelFacts) -> Iterator[str]:
    top_k = config.teacher.top_k
    if top_k != "full" and teacher.vocab_size is not None and top_k > teacher.vocab_size:
        yield (
            f"teacher.top_k: found {top_k}, right would be at most the teacher's vocabulary of {teacher.vocab_size} "
            "(or full)"
        )


def _lengths(config: TopdConfig, student: ModelFacts, teacher: ModelFacts) -> Iterator[str]:
    for role, facts in (("student", student), ("teacher", teacher)):
        wanted, terms = _longest(config, role)
        if facts.max_positions is not None and wanted > facts.max_positions:
            yield (
                f"rollout.max_new_tokens: found {terms} = {wanted} tokens, right would be at most the {role}'s "
                f"{facts.max_positions} positions"
            )


def _long_rope(config: TopdConfig, student: ModelFacts) -> Iterator[str]:
    """vLLM takes the long factors in an engine built for long sequences, the learner in a pass with a long one."""
    wanted, terms = _longest(config, "student")
    if student.short_positions is not None and wanted > student.short_positions:
        yield (
            f"rollout.max_new_tokens: found {terms} = {wanted} tokens, right would be at most the student's "
            f"{student.short_positions} original positions: beyond them vLLM and the learner differ in LongRoPE"
        )


def _longest(config: TopdConfig, role: str) -> tuple[int, str]:
    """Tokens of the longest sequence that engines of `role` are built for, and what they add up from.

    vLLM draws a token after whatever it scores: that is one more.
    """
    prompt = config.data.max_prompt_tokens
    answer = max(config.rollout.max_new_tokens, config.evaluation.max_new_tokens or 0)
    ahead = config.near_future.window if role == "teacher" or config.near_future.branches else 0
    terms = f"data.max_prompt_tokens {prompt} + longest response {answer} + 1"
    return prompt + answer + 1 + ahead, terms + (f" + near_future.window {ahead}" if ahead else "")


def _data(key: str, source: str) -> Iterator[str]:
    if source == "arithmetic":
        return
    path = Path(expanded(source))
    right = "right would be arithmetic, a .jsonl or .parquet file, or a folder written by datasets.save_to_disk"
    if not path.exists():
        yield f"{key}={source}: found no such file or folder, {right}"
    elif path.is_dir():
        if not (path / "state.json").is_file() and not (path / "dataset_dict.json").is_file():
            yield f"{key}={source}: found a folder without state.json, {right}"
    elif path.suffix not in (".jsonl", ".parquet"):
        yield f"{key}={source}: found a file of another kind, {right}"
    elif path.stat().st_size == 0:
        yield f"{key}={source}: found an empty file, right would be a prompt a row"


def _run_folder(config: TopdConfig) -> Iterator[str]:
    folder = config.run.folder
    if folder.exists() and not folder.is_dir():
        yield f"run.name: found a file at {folder}, right would be a name whose folder is free"
    elif (folder / "config.yaml").is_file() and _holds_results(folder):
        yield from _other_owner(config, folder)


def _holds_results(folder: Path) -> bool:
    """Whether a run got so far in `folder` that something would be lost; an attempt that failed before leaves none."""
    metrics = folder / "metrics.jsonl"
    return (metrics.is_file() and metrics.stat().st_size > 0) or any(
        (folder / name).exists() for name in ("checkpoints/latest", "export", "summary.json")
    )


def _other_owner(config: TopdConfig, folder: Path) -> Iterator[str]:
    path, name = folder / "config.yaml", f"run.name={config.run.name}"
    advice = "right would be another run.name, or the config as it was there"
    try:
        old, problems = validated(yaml12.parse(read_text(path), str(path)))
    except ConfigError as error:
        yield f"{name}: found a run in {folder} whose config cannot be read ({error}), {advice}"
        return
    if old is None:
        yield f"{name}: found a run in {folder} of another schema ({'; '.join(problems)}), {advice}"
    elif changed := changed_keys(old, config):
        yield f"{name}: found {folder} in use by a run of another config ({'; '.join(changed)}), {advice}"


def _disk(config: TopdConfig, student: ModelFacts) -> Iterator[str]:
    parent = config.run.folder.absolute()
    while not parent.exists():
        parent = parent.parent
    if parent.is_dir() and not os.access(parent, os.W_OK):
        yield f"run.root={config.run.root}: {parent} cannot be written to, right would be a folder that can"
        return
    parameters = student.num_parameters or 0
    kept = 1 + (config.run.keep_checkpoints if config.run.checkpoint_every else 1)
    needed = parameters * (kept * CHECKPOINT_BYTES_PER_PARAMETER + EXPORT_BYTES_PER_PARAMETER) + FREE_BYTES
    free = shutil.disk_usage(parent).free
    already = _bytes_below(config.run.folder / "checkpoints")  # pruned as new ones are written
    if free + already < needed:
        yield (
            f"run.root={config.run.root}: found {_gib(free)} free on the disk of {parent}, right would be "
            f"{_gib(needed)} for {kept} checkpoints and an export of {parameters:,} parameters"
        )


def _bytes_below(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 1024**3:.1f} GiB"


def _value(tree: dict[str, Any], key: str) -> Any:
    for part in key.split("."):
        tree = tree[part]
    return tree
