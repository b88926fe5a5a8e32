"""Tokenizers, and the proof that student and teacher mean the same by a token id."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from topd_ray.config.model_folder import is_local
from topd_ray.config.schema import ModelConfig, TeacherConfig
from topd_ray.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATE_ERRORS = (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
"""What a chat template can raise: jinja2's own errors, and those of the expressions in it."""
_SHOWN = 3
_ONE_TOKENIZER = "Right would be two models of one tokenizer"


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """Which token ids a model may write, and which of them end an answer."""

    size: int
    """ids in use are 0 ... size - 1"""
    rows: int
    """rows of the embedding; those from `size` on are padding and mean nothing"""
    eos_ids: tuple[int, ...]
    """tokens that end an answer, ascending"""


def load_tokenizer(model: ModelConfig) -> "PreTrainedTokenizerBase":
    """The tokenizer of a local folder or a hub name. Raises ConfigError where there is none that loads."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        # Of Mistral's two formats tekken.json would be taken, without a chat template; it splits text as it should be.
        mistral = {"mistral_format": False, **({"fix_mistral_regex": True} if _file(model, "tekken.json") else {})}
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(model.model, **mistral, **_source(model))
        if _has_lost_bytes(tokenizer, model):
            tokenizer = PreTrainedTokenizerFast.from_pretrained(model.model, **_source(model))
    except Exception as error:  # the tokenizers library raises bare Exception for a malformed file
        raise ConfigError(_unloadable("tokenizer", model, error)) from error
    return tokenizer


def _has_lost_bytes(tokenizer: "PreTrainedTokenizerBase", model: ModelConfig) -> bool:
    """Whether transformers has put SentencePiece's parts in place of the byte-level ones of tokenizer.json.

    It does where a byte-level tokenizer says it is a LlamaTokenizer, as DeepSeek's do: spaces would be lost.
    """
    own = getattr(tokenizer, "backend_tokenizer", None)
    if own is None or "ByteLevel" in repr(own.decoder):
        return False
    path = _file(model, "tokenizer.json")
    return path is not None and "ByteLevel" in json.dumps(json.loads(path.read_bytes()).get("decoder"))


def _file(model: ModelConfig, name: str) -> Path | None:
    """A file of the model, if it has one of this name."""
    from transformers.utils import cached_file

    path = cached_file(
        model.model,
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **_source(model),
    )
    return None if path is None else Path(path)


def read_vocabulary(model: ModelConfig) -> Vocabulary:
    """Read it from the model's files, without loading a weight.

    An answer ends where the tokenizer, config.json or generation_config.json says so. Raises ConfigError for files that
    do not load, for fewer embedding rows than ids, and where nothing ends an answer.
    """
    return _vocabulary(model, load_tokenizer(model))


def _vocabulary(model: ModelConfig, tokenizer: "PreTrainedTokenizerBase") -> Vocabulary:
    config = _model_config(model)
    size = max(tokenizer.get_vocab().values()) + 1
    rows = int(config.vocab_size)
    if rows < size:
        raise ConfigError(
            f"{model.model}: found an embedding of {rows} rows (vocab_size in config.json) for a tokenizer of {size} "
            "ids, right would be at least as many rows"
        )
    declared = (tokenizer.eos_token_id, *_config_eos(model), _generation_eos(model))
    eos_ids = {token_id for source in declared for token_id in _as_list(source)}
    if not eos_ids:
        raise ConfigError(
            f"{model.model}: found no end-of-sequence token, right would be an eos_token_id in generation_config.json"
        )
    return Vocabulary(size=size, rows=rows, eos_ids=tuple(sorted(eos_ids)))


def check_same_vocabulary(student: ModelConfig, teacher: TeacherConfig) -> None:
    """Compare tokens, special tokens and embedding rows of two models, without loading a weight.

    Raises ConfigError with the first tokens that differ, for a teacher.top_k larger than the vocabulary, and for a
    student that does not stop where the teacher ends an answer.
    """
    student_tokenizer, teacher_tokenizer = load_tokenizer(student), load_tokenizer(teacher)
    if differences := _differences(student_tokenizer.get_vocab(), teacher_tokenizer.get_vocab()):
        shown = "; ".join(differences[:_SHOWN]) + (" ..." if len(differences) > _SHOWN else "")
        raise ConfigError(
            f"the vocabularies of student.model={student.model} and teacher.model={teacher.model} differ in "
            f"{len(differences)} tokens: {shown}. {_ONE_TOKENIZER}"
        )
    _check_specials(student, student_tokenizer, teacher, teacher_tokenizer)
    of_student, of_teacher = _vocabulary(student, student_tokenizer), _vocabulary(teacher, teacher_tokenizer)
    if teacher.top_k != "full" and teacher.top_k > of_student.size:
        raise ConfigError(
            f"teacher.top_k: found {teacher.top_k}, right would be at most the vocabulary of {of_student.size} "
            "(or full)"
        )
    ends = _ends_of_turns(teacher_tokenizer, of_teacher)
    if not {*ends} & {*of_student.eos_ids}:
        raise ConfigError(
            f"student.model={student.model} stops at the tokens {list(of_student.eos_ids)}, "
            f"teacher.model={teacher.model} ends an answer with {list(ends)}; right would be a token in common: "
            "eos_token_id in the generation_config.json of the student, or of a copy, may be a list"
        )


def _ends_of_turns(tokenizer: "PreTrainedTokenizerBase", vocabulary: Vocabulary) -> tuple[int, ...]:
    """The token that the chat template writes behind an answer; all that the model stops at where it has none."""
    question, answer = {"role": "user", "content": "1"}, {"role": "assistant", "content": "1"}
    try:
        asked = tokenizer.apply_chat_template([question], add_generation_prompt=True, return_dict=False)
        answered = tokenizer.apply_chat_template([question, answer], return_dict=False)
    except TEMPLATE_ERRORS:  # no template, or one that wants another conversation
        return vocabulary.eos_ids
    num_alike = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(asked, answered, strict=False)))
    ends = (token_id for token_id in answered[num_alike:] if token_id in vocabulary.eos_ids)
    return tuple(ends)[:1] or vocabulary.eos_ids


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


def _model_config(model: ModelConfig) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(model.model, **_source(model)).get_text_config()
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise ConfigError(_unloadable("config.json", model, error)) from error


def _config_eos(model: ModelConfig) -> tuple[Any, Any]:
    """What config.json itself says, of the whole model and of its text part; a class's default is no token of it."""
    from transformers import PretrainedConfig

    source = _source(model)
    del source["trust_remote_code"]  # it only reads
    written, _ = PretrainedConfig.get_config_dict(model.model, **source)
    return written.get("eos_token_id"), (written.get("text_config") or {}).get("eos_token_id")


def _generation_eos(model: ModelConfig) -> Any:
    from transformers import GenerationConfig

    local = is_local(model.model)
    try:
        return GenerationConfig.from_pretrained(
            model.model, revision=None if local else model.revision, local_files_only=local
        ).eos_token_id
    except OSError:
        return None


def _as_list(declared: Any) -> list[int]:
    if declared is None:
        return []
    return declared if isinstance(declared, list) else [declared]


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
