"""From rows to prompts: messages through the chat template to token ids."""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

from topd_ray.config.schema import DataConfig
from topd_ray.data.rows import Row, read_rows
from topd_ray.data.tokenizer import TEMPLATE_ERRORS
from topd_ray.demo.arithmetic import generate
from topd_ray.errors import DataError
from topd_ray.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Split = Literal["train", "heldout"]
Message = dict[str, Any]

_BATCH = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSet:
    """All prompts of a source, in its order."""

    prompts: tuple[Prompt, ...]
    num_skipped_overlong: int
    """rows left out because they are longer than data.max_prompt_tokens"""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Conversation:
    where: str
    row_id: str
    messages: list[Message]
    answer: str | None


def load_prompts(
    source: str,
    config: DataConfig,
    tokenizer: "PreTrainedTokenizerBase",
    split: Split,
    now: datetime | None = None,
) -> PromptSet:
    """Read `source` (`arithmetic`, or what `read_rows` reads) and apply the tokenizer's chat template to each row.

    A row has a `prompt` (text) or `messages` (a list of role and content), and may have an `answer` (text or number)
    and an `id` (text or integer); other columns are ignored. A prompt's id is its row's `id`, or number, and a digest
    of its token ids and answer, so it is the same in every run. Some templates write the date: that of `now`, or today.
    Raises DataError, with file and line, for whatever cannot be used.
    """
    _check_template(config, tokenizer)
    rows = _arithmetic_rows(config, split) if source == "arithmetic" else read_rows(source, split)
    prompts: list[Prompt] = []
    overlong: list[tuple[str, int]] = []
    arguments = {**config.chat_template_kwargs, "strftime_now": (now or datetime.now()).strftime}
    for conversation, token_ids in _tokenised(_conversations(rows, config), arguments, tokenizer):
        if len(token_ids) > config.max_prompt_tokens:
            overlong.append((conversation.where, len(token_ids)))
        else:
            prompts.append(_prompt(conversation, token_ids))
    _check_overlong(overlong, len(prompts), config)
    return PromptSet(prompts=tuple(prompts), num_skipped_overlong=len(overlong))


def _arithmetic_rows(config: DataConfig, split: Split) -> Iterator[Row]:
    task = config.arithmetic
    num = task.num_train if split == "train" else task.num_heldout
    for number, problem in enumerate(generate(split, num, task.difficulty, task.seed), start=1):
        yield f"arithmetic {split} problem {number}", {"prompt": problem.expression, "answer": problem.answer}


def _conversations(rows: Iterable[Row], config: DataConfig) -> Iterator[_Conversation]:
    seen: dict[str, str] = {}
    for number, (where, row) in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise DataError(f"{where}: found {_kind(row)}, right would be an object with prompt or messages")
        row_id = _row_id(row, where, number)
        if row_id in seen:
            raise DataError(f"{where}: found the id {row_id} of {seen[row_id]} again, right would be an id of its own")
        seen[row_id] = where
        yield _Conversation(
            where=where, row_id=row_id, messages=_messages(row, where, config), answer=_answer(row, where)
        )


def _row_id(row: dict[str, Any], where: str, number: int) -> str:
    given = row.get("id")
    if given is None:
        return f"row{number}"
    if isinstance(given, bool) or not isinstance(given, (str, int)) or given == "":
        raise DataError(f"{where}: found an id that is {_kind(given)}, right would be text or an integer")
    row_id = str(given)
    if any("\ud800" <= character <= "\udfff" for character in row_id):
        raise DataError(f"{where}: found an id with a lone surrogate, right would be text that UTF-8 can hold")
    return row_id


def _messages(row: dict[str, Any], where: str, config: DataConfig) -> list[Message]:
    prompt, messages = row.get("prompt"), row.get("messages")
    if prompt is not None and messages is not None:
        raise DataError(f"{where}: found both prompt and messages, right would be one of them")
    if messages is not None:
        return _checked_messages(messages, where)
    if prompt is None:
        raise DataError(f"{where}: found no prompt, right would be a prompt (text) or messages (role and content)")
    if not isinstance(prompt, str):
        hint = "; a list of role and content goes under messages" if isinstance(prompt, list) else ""
        raise DataError(f"{where}: found a prompt that is {_kind(prompt)}, right would be text{hint}")
    if not prompt.strip():
        raise DataError(f"{where}: found an empty prompt, right would be some text")
    system = [] if config.system_prompt is None else [{"role": "system", "content": config.system_prompt}]
    return [*system, {"role": "user", "content": prompt}]


def _checked_messages(messages: Any, where: str) -> list[Message]:
    right = "right would be a list of objects with role and content, both text"
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: found messages that are {_kind(messages)}, {right}")
    checked: list[Message] = []
    for position, message in enumerate(messages, start=1):
        if not isinstance(message, dict):
            raise DataError(f"{where}: found message {position} that is {_kind(message)}, {right}")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise DataError(f"{where}: found message {position} whose {key} is {_kind(message.get(key))}, {right}")
        checked.append({key: value for key, value in message.items() if value is not None})
    if checked[-1]["role"] == "assistant":
        raise DataError(f"{where}: found a last message of the assistant, right would be to end before its answer")
    return checked


def _answer(row: dict[str, Any], where: str) -> str | None:
    answer = row.get("answer")
    if answer is None or isinstance(answer, str):
        return answer
    is_number = isinstance(answer, int) or (isinstance(answer, float) and math.isfinite(answer))
    if isinstance(answer, bool) or not is_number:
        raise DataError(f"{where}: found an answer that is {_kind(answer)}, right would be text or a number")
    whole = isinstance(answer, int) or answer.is_integer()
    return str(int(answer)) if whole else f"{Decimal(repr(answer)):f}"  # 1e-05 would be read as 1 times e minus 5


def _tokenised(
    conversations: Iterable[_Conversation], arguments: dict[str, Any], tokenizer: "PreTrainedTokenizerBase"
) -> Iterator[tuple[_Conversation, list[int]]]:
    iterator = iter(conversations)
    while batch := list(islice(iterator, _BATCH)):
        try:
            rendered = _apply_template([one.messages for one in batch], arguments, tokenizer)
        except TEMPLATE_ERRORS:
            rendered = [_apply_template_to_one(one, arguments, tokenizer) for one in batch]
        for conversation, token_ids in zip(batch, rendered, strict=True):
            if not token_ids:
                raise DataError(f"{conversation.where}: found a chat template that leaves nothing of the messages")
            yield conversation, token_ids


def _apply_template(
    conversations: Sequence[list[Message]], arguments: dict[str, Any], tokenizer: "PreTrainedTokenizerBase"
) -> list[list[int]]:
    token_ids: list[list[int]] = tokenizer.apply_chat_template(
        list(conversations),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=False,
        **arguments,
    )
    return token_ids


def _apply_template_to_one(
    conversation: _Conversation, arguments: dict[str, Any], tokenizer: "PreTrainedTokenizerBase"
) -> list[int]:
    try:
        return _apply_template([conversation.messages], arguments, tokenizer)[0]
    except TEMPLATE_ERRORS as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise DataError(
            f"{conversation.where}: the chat template of {tokenizer.name_or_path or 'the student'} fails on this row "
            f"({reason}), right would be messages that it takes, or another data.chat_template_kwargs"
        ) from error


def _check_template(config: DataConfig, tokenizer: "PreTrainedTokenizerBase") -> None:
    template: Any = tokenizer.chat_template
    name = tokenizer.name_or_path or "the student"
    if not template:
        raise DataError(
            f"{name}: found a tokenizer without a chat template, right would be a chat_template.jinja in its folder"
        )
    texts = list(template.values()) if isinstance(template, dict) else [template]
    for key in config.chat_template_kwargs:
        if not any(key in text for text in texts):
            raise DataError(
                f"data.chat_template_kwargs.{key}: the chat template of {name} never mentions it, right would be an "
                "argument that it reads"
            )


def _check_overlong(overlong: Sequence[tuple[str, int]], num_kept: int, config: DataConfig) -> None:
    if not overlong or (config.overlong == "skip" and num_kept):
        return
    where, length = overlong[0]
    others = f"; {len(overlong)} of {len(overlong) + num_kept} rows are too long" if len(overlong) > 1 else ""
    way_out = "a larger data.max_prompt_tokens" + ("" if config.overlong == "skip" else ", or data.overlong=skip")
    raise DataError(
        f"{where}: found a prompt of {length} tokens, right would be at most data.max_prompt_tokens="
        f"{config.max_prompt_tokens}, {way_out}{others}"
    )


def _prompt(conversation: _Conversation, token_ids: list[int]) -> Prompt:
    content = json.dumps([token_ids, conversation.answer]).encode()
    return Prompt(
        prompt_id=f"{conversation.row_id}-{hashlib.sha256(content).hexdigest()[:12]}",
        token_ids=tuple(token_ids),
        answer=conversation.answer,
    )


def _kind(value: Any) -> str:
    if value is None:
        return "missing"
    if isinstance(value, (bool, int, float)):
        return repr(value)
    names: dict[type, str] = {str: "text", list: "a list", dict: "an object"}
    kind = names.get(type(value), type(value).__name__)
    return f"{kind} of nothing" if value in ("", [], {}) else kind
