"""Tokenizers, and the proof that student and teacher mean the same by a token id."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from topd_ray.config.model_folder import is_local
from topd_ray.config.schema import ModelConfig, TeacherConfig
from topd_ray.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SHOWN = 3
_ONE_TOKENIZER = "Right would be two models of one tokenizer"


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """What student and teacher agree on."""

    size: int
    """ids in use are 0 ... size - 1; embedding rows from there on are padding"""
    eos_ids: tuple[int, ...]
    """tokens at which the student stops, ascending"""
    student_rows: int
    """rows of the student's embedding"""
    teacher_rows: int
    """rows of the teacher's embedding"""


def load_tokenizer(model: ModelConfig) -> "PreTrainedTokenizerBase":
    """The tokenizer of a local folder or a hub name. Raises ConfigError where there is none that loads."""
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(model.model, **_source(model))
    except Exception as error:  # the tokenizers library raises bare Exception for a malformed file
        raise ConfigError(_unloadable("tokenizer", model, error)) from error
    return tokenizer


def check_same_vocabulary(student: ModelConfig, teacher: TeacherConfig) -> Vocabulary:
    """Compare tokens, special tokens and embedding rows of two models, without loading a weight.

    Raises ConfigError with the first tokens that differ, and for a teacher.top_k larger than the vocabulary.
    """
    student_tokenizer, teacher_tokenizer = load_tokenizer(student), load_tokenizer(teacher)
    student_ids, teacher_ids = student_tokenizer.get_vocab(), teacher_tokenizer.get_vocab()
    if differences := _differences(student_ids, teacher_ids):
        shown = "; ".join(differences[:_SHOWN]) + (" ..." if len(differences) > _SHOWN else "")
        raise ConfigError(
            f"the vocabularies of student.model={student.model} and teacher.model={teacher.model} differ in "
            f"{len(differences)} tokens: {shown}. {_ONE_TOKENIZER}"
        )
    _check_specials(student, student_tokenizer, teacher, teacher_tokenizer)
    size = max(student_ids.values()) + 1
    if teacher.top_k != "full" and teacher.top_k > size:
        raise ConfigError(
            f"teacher.top_k: found {teacher.top_k}, right would be at most the vocabulary of {size} (or full)"
        )
    student_config, teacher_config = _model_config(student), _model_config(teacher)
    rows = {
        role: _check_rows(role, model, config, size)
        for role, model, config in (("student", student, student_config), ("teacher", teacher, teacher_config))
    }
    eos_ids = _eos_ids(student, student_config, student_tokenizer)
    teacher_eos_ids = _eos_ids(teacher, teacher_config, teacher_tokenizer)
    if not eos_ids & teacher_eos_ids:
        raise ConfigError(
            f"student.model={student.model} stops at the tokens {sorted(eos_ids)}, teacher.model={teacher.model} at "
            f"{sorted(teacher_eos_ids)}; right would be a token in common, so that both can end an answer alike"
        )
    return Vocabulary(
        size=size, eos_ids=tuple(sorted(eos_ids)), student_rows=rows["student"], teacher_rows=rows["teacher"]
    )


def _differences(student: Mapping[str, int], teacher: Mapping[str, int]) -> list[str]:
    """One line for each token whose ids differ, by the smaller of its ids."""
    differing = [token for token in {*student, *teacher} if student.get(token) != teacher.get(token)]
    differing.sort(key=lambda token: (min(ids[token] for ids in (student, teacher) if token in ids), token))
    return [
        f"{token!r} is {student.get(token, 'missing')} in the student, {teacher.get(token, 'missing')} in the teacher"
        for token in differing
    ]


def _check_specials(
    student: ModelConfig,
    student_tokenizer: "PreTrainedTokenizerBase",
    teacher: ModelConfig,
    teacher_tokenizer: "PreTrainedTokenizerBase",
) -> None:
    found = [
        {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
        for tokenizer in (student_tokenizer, teacher_tokenizer)
    ]
    if found[0] != found[1]:
        index = min(found[0] ^ found[1])
        token = student_tokenizer.convert_ids_to_tokens(index)
        only, model = ("student", student.model) if index in found[0] else ("teacher", teacher.model)
        raise ConfigError(f"token {index} ({token!r}) is special only in {only}.model={model}. {_ONE_TOKENIZER}")


def _check_rows(role: str, model: ModelConfig, config: Any, size: int) -> int:
    rows = int(config.get_text_config().vocab_size)
    if rows < size:
        raise ConfigError(
            f"{role}.model={model.model}: found an embedding of {rows} rows (vocab_size in config.json) for a "
            f"tokenizer of {size} ids, right would be at least as many rows"
        )
    return rows


def _model_config(model: ModelConfig) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(model.model, **_source(model))
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise ConfigError(_unloadable("config.json", model, error)) from error


def _eos_ids(model: ModelConfig, config: Any, tokenizer: "PreTrainedTokenizerBase") -> set[int]:
    """Where generation stops: whatever the tokenizer, config.json and generation_config.json name.

    Raises ConfigError where none of them names a token.
    """
    ids: set[int] = set()
    for declared in (tokenizer.eos_token_id, config.get_text_config().eos_token_id, _generation_eos(model)):
        ids.update(declared if isinstance(declared, (list, tuple)) else [] if declared is None else [declared])
    if not ids:
        raise ConfigError(
            f"{model.model}: found no end-of-sequence token, right would be an eos_token_id in generation_config.json"
        )
    return ids


def _generation_eos(model: ModelConfig) -> Any:
    from transformers import GenerationConfig

    local = is_local(model.model)
    try:
        return GenerationConfig.from_pretrained(
            model.model, revision=None if local else model.revision, local_files_only=local
        ).eos_token_id
    except OSError:
        return None


def _source(model: ModelConfig) -> dict[str, Any]:
    local = is_local(model.model)
    return {
        "revision": None if local else model.revision,
        "local_files_only": local,
        "trust_remote_code": model.trust_remote_code,
    }


def _unloadable(part: str, model: ModelConfig, error: Exception) -> str:
    reason = " ".join(str(error).split())[:300]
    return (
        f"the {part} of {model.model} cannot be loaded ({type(error).__name__}: {reason}); right would be a folder in "
        "the Hugging Face layout, or a hub name that this machine can reach"
    )
