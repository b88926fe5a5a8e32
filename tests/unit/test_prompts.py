"""Prompts from every kind of source, and what every kind of malformed source is told."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerFast

from topd_ray.config.schema import ArithmeticConfig, DataConfig
from topd_ray.data.prompts import PromptSet, load_prompts
from topd_ray.demo.arithmetic import generate
from topd_ray.demo.tokenizer import build_tokenizer, render_prompt
from topd_ray.errors import DataError

ROWS = [
    {"prompt": "1+2", "answer": 3, "id": "first", "source": "ignored"},
    {"prompt": "4*5", "answer": "20"},
    {"messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "6-7"}], "answer": -1.0},
    {"prompt": "8", "answer": None},
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


def jsonl(folder: Path, rows: list[Any]) -> str:
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def saved_to_disk(folder: Path, tables: list[pa.Table]) -> str:
    """The layout of datasets.save_to_disk: Arrow streams, named in state.json."""
    folder.mkdir(parents=True)
    names = [f"data-{number:05d}-of-{len(tables):05d}.arrow" for number in range(len(tables))]
    for name, table in zip(names, tables, strict=True):
        with pa.OSFile(str(folder / name), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table)
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "x", "_split": "train"}
    (folder / "state.json").write_text(json.dumps(state))
    return str(folder)


def load(source: str, tokenizer: PreTrainedTokenizerFast, **config: Any) -> PromptSet:
    return load_prompts(source, DataConfig(**config), tokenizer, "train")


def error(source: str, tokenizer: PreTrainedTokenizerFast, **config: Any) -> str:
    with pytest.raises(DataError) as caught:
        load(source, tokenizer, **config)
    return str(caught.value)


def test_arithmetic(tokenizer: PreTrainedTokenizerFast) -> None:
    config = DataConfig(arithmetic=ArithmeticConfig(num_train=30, num_heldout=20, difficulty=3, seed=5))
    train = load_prompts("arithmetic", config, tokenizer, "train").prompts
    heldout = load_prompts("arithmetic", config, tokenizer, "heldout").prompts
    for prompts, problems in ((train, generate("train", 30, 3, 5)), (heldout, generate("heldout", 20, 3, 5))):
        assert [list(prompt.token_ids) for prompt in prompts] == [
            render_prompt(tokenizer, p.expression) for p in problems
        ]
        assert [prompt.answer for prompt in prompts] == [problem.answer for problem in problems]


def test_jsonl_rows(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    prompts = load(jsonl(tmp_path, ROWS), tokenizer).prompts
    assert [tokenizer.decode(prompt.token_ids) for prompt in prompts] == [
        "<|im_start|>user\n1+2<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>user\n4*5<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\n6-7<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>user\n8<|im_end|>\n<|im_start|>assistant\n",
    ]
    assert [prompt.answer for prompt in prompts] == ["3", "20", "-1", None]


def test_numbers_are_answers_as_they_are_written_out(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    written = {-0.5: "-0.5", 1.5e-05: "0.000015", 1e22: "10000000000000000000000", 10**400: "1" + "0" * 400, -0.0: "0"}
    source = jsonl(tmp_path, [{"prompt": "1", "answer": answer} for answer in written])
    assert [prompt.answer for prompt in load(source, tokenizer).prompts] == list(written.values())


def test_prompt_ids_are_stable_and_bound_to_the_content(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    first = load(jsonl(tmp_path, ROWS), tokenizer).prompts
    again = load(jsonl(tmp_path, ROWS), tokenizer).prompts
    assert first == again
    assert first[0].prompt_id == "first-43dbbae72e72"
    assert [prompt.prompt_id.partition("-")[0] for prompt in first] == ["first", "row2", "row3", "row4"]
    changed = load(jsonl(tmp_path, [{**ROWS[0], "answer": 4}, *ROWS[1:]]), tokenizer).prompts
    assert [a.prompt_id == b.prompt_id for a, b in zip(first, changed, strict=True)] == [False, True, True, True]


def test_all_formats_give_the_same_prompts(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"id": number, "prompt": f"{number}+1", "answer": str(number + 1)} for number in range(7)]
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, tmp_path / "prompts.parquet", row_group_size=3)
    folder = saved_to_disk(tmp_path / "saved", [table.slice(0, 4), table.slice(4)])
    expected = load(jsonl(tmp_path, rows), tokenizer)
    assert len(expected.prompts) == 7
    assert load(str(tmp_path / "prompts.parquet"), tokenizer) == expected
    assert load(folder, tokenizer) == expected


def test_messages_in_parquet(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [row for row in ROWS if "messages" in row]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "prompts.parquet")
    assert load(str(tmp_path / "prompts.parquet"), tokenizer) == load(jsonl(tmp_path, rows), tokenizer)


def test_columns_that_python_has_no_values_for_are_ignored(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = {"prompt": ["1", "2"], "answer": [1, None]}
    odd = {
        "nanoseconds": pa.array([1_700_000_000_000_000_001, None], pa.timestamp("ns")),
        "beyond year 9999": pa.array([10**18, None], pa.timestamp("us")),
        "no UTF-8": pa.array([b"\xff", None], pa.binary()).view(pa.string()),
    }
    for folder, columns in (("odd", odd | rows), ("same", rows)):
        table = pa.table(columns)
        saved_to_disk(tmp_path / folder, [table])
        pq.write_table(table, tmp_path / folder / "prompts.parquet")
    expected = load(str(tmp_path / "same"), tokenizer)
    assert load(str(tmp_path / "odd"), tokenizer) == expected
    assert load(str(tmp_path / "odd" / "prompts.parquet"), tokenizer) == expected


def test_folder_of_splits(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    table = pa.Table.from_pylist([{"prompt": "1"}])
    saved_to_disk(tmp_path / "all" / "train", [table])
    (tmp_path / "all" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert len(load(str(tmp_path / "all"), tokenizer).prompts) == 1
    with pytest.raises(DataError, match="found the splits train, test; name one"):
        load_prompts(str(tmp_path / "all"), DataConfig(), tokenizer, "heldout")


def test_system_prompt_goes_before_prompts_alone(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    prompts = load(jsonl(tmp_path, ROWS[1:3]), tokenizer, system_prompt="think").prompts
    texts = [tokenizer.decode(prompt.token_ids) for prompt in prompts]
    assert texts[0].startswith("<|im_start|>system\nthink<|im_end|>\n<|im_start|>user\n4*5<|im_end|>")
    assert texts[1].startswith("<|im_start|>system\nbe brief<|im_end|>")


def test_chat_template_kwargs(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}{% if enable_thinking %}?{% endif %}"
    source = jsonl(tmp_path, [{"prompt": "1"}])
    with_it = load(source, tokenizer, chat_template_kwargs={"enable_thinking": True}).prompts[0]
    without = load(source, tokenizer, chat_template_kwargs={"enable_thinking": False}).prompts[0]
    assert (tokenizer.decode(with_it.token_ids), tokenizer.decode(without.token_ids)) == ("1?", "1")
    assert "chat_template_kwargs.thinking: the chat template of the student never mentions it, right would be" in error(
        source, build_tokenizer(), chat_template_kwargs={"thinking": True}
    )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"answer": "1"}, "found no prompt, right would be a prompt (text) or messages (role and content)"),
        ({"prompt": None}, "found no prompt, right would be"),
        ({"prompt": 5}, "found a prompt that is 5, right would be text"),
        (
            {"prompt": []},
            "found a prompt that is a list of nothing, right would be text; a list of role and content goes",
        ),
        ({"prompt": " \n"}, "found an empty prompt, right would be some text"),
        ({"prompt": "1", "messages": []}, "found both prompt and messages, right would be one of them"),
        ({"messages": "1"}, "found messages that are text, right would be a list of objects with role and content"),
        ({"messages": []}, "found messages that are a list of nothing, right would be a list"),
        ({"messages": ["hi"]}, "found message 1 that is text, right would be a list of objects"),
        ({"messages": [{"role": "user"}]}, "found message 1 whose content is missing, right would be"),
        ({"messages": [{"role": 1, "content": "a"}]}, "found message 1 whose role is 1, right would be"),
        (
            {"messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]},
            "found a last message of the assistant, right would be to end before its answer",
        ),
        ({"prompt": "1", "answer": True}, "found an answer that is True, right would be text or a number"),
        ({"prompt": "1", "answer": ["2"]}, "found an answer that is a list, right would be text or a number"),
        ({"prompt": "1", "answer": float("nan")}, "found an answer that is nan, right would be text or a number"),
        ({"prompt": "1", "id": 1.5}, "found an id that is 1.5, right would be text or an integer"),
        ({"prompt": "1", "id": "a"}, "found the id a of "),
        ({"prompt": "1", "id": "\ud800"}, "found an id with a lone surrogate, right would be text that UTF-8 can hold"),
        (["1"], "found a list, right would be an object with prompt or messages"),
    ],
)
def test_malformed_rows(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, row: Any, message: str) -> None:
    source = jsonl(tmp_path, [{"prompt": "1", "id": "a"}, {"prompt": "2"}, row])
    assert error(source, tokenizer).startswith(f"{source}:3: {message}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", ": found no rows, right would be a prompt a row"),
        (b"\n\n", ": found no rows, right would be a prompt a row"),
        (b'{"prompt": "1"}\n{"prompt": \n', ":2: found no valid JSON ("),
        (b'{"prompt": ' + b"[" * 100_000 + b"\n", ":1: found no valid JSON (maximum recursion depth exceeded"),
        (b'{"prompt": "1"}\n{"prompt": "\xff"}\n', ":2: found bytes that are not UTF-8 text at byte 12"),
    ],
)
def test_malformed_jsonl(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, content: bytes, message: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(content)
    assert error(str(path), tokenizer).startswith(f"{path}{message}")


def test_malformed_parquet(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "prompts.parquet"
    path.write_bytes(b"PAR1 not really")
    assert error(str(path), tokenizer).startswith(f"{path}: found no valid Parquet: ")
    pq.write_table(pa.Table.from_pylist([{"prompt": "1"}, {"prompt": None}]), path)
    assert error(str(path), tokenizer).startswith(f"{path} row 2: found no prompt")
    pq.write_table(pa.Table.from_pylist([{"prompt": "1"}]).slice(0, 0), path)
    assert error(str(path), tokenizer) == f"{path}: found no rows, right would be a prompt a row"


def test_damaged_parquet(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Arrow raises OSError, not ArrowInvalid, for a page whose bytes are not what the compression left."""
    path = tmp_path / "prompts.parquet"
    pq.write_table(pa.table({"prompt": [f"{number}+1" for number in range(5000)]}), path, compression="zstd")
    whole = bytearray(path.read_bytes())
    whole[60:4000] = bytes(3940)
    path.write_bytes(whole)
    with pytest.raises(OSError):
        pq.read_table(path)
    assert error(str(path), tokenizer).startswith(f"{path}: found no valid Parquet: ")


def test_files_that_cannot_be_opened(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(13, "Permission denied")

    lines, folder = jsonl(tmp_path, ROWS), saved_to_disk(tmp_path / "saved", [pa.Table.from_pylist([{"prompt": "1"}])])
    pq.write_table(pa.Table.from_pylist([{"prompt": "1"}]), tmp_path / "prompts.parquet")
    monkeypatch.setattr(pa, "memory_map", refuse)
    monkeypatch.setattr(pq, "ParquetFile", refuse)
    assert "data-00000-of-00001.arrow: found no valid Arrow stream: [Errno 13]" in error(folder, tokenizer)
    assert "prompts.parquet: found no valid Parquet: [Errno 13]" in error(str(tmp_path / "prompts.parquet"), tokenizer)
    monkeypatch.setattr(Path, "open", refuse)
    assert error(lines, tokenizer) == f"{lines}: cannot be read: Permission denied"


def test_malformed_folders(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    folder = tmp_path / "saved"
    saved_to_disk(folder, [pa.Table.from_pylist([{"prompt": "1"}]), pa.Table.from_pylist([{"prompt": 2}])])
    assert error(str(folder), tokenizer).startswith(f"{folder} row 2: found a prompt that is 2, right would be text")
    (folder / "data-00001-of-00002.arrow").write_bytes(b"no Arrow at all")
    assert "data-00001-of-00002.arrow: found no valid Arrow stream" in error(str(folder), tokenizer)
    (folder / "data-00001-of-00002.arrow").unlink()
    assert "data-00001-of-00002.arrow: found no such file, though " in error(str(folder), tokenizer)
    (folder / "state.json").write_text("{}")
    assert error(str(folder), tokenizer) == f"{folder}/state.json: found no list of data files"
    (folder / "state.json").unlink()
    assert "found no state.json, right would be a folder written by datasets.save_to_disk" in error(
        str(folder), tokenizer
    )


def test_sources_of_no_kind(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    assert error(str(tmp_path / "none.jsonl"), tokenizer) == f"{tmp_path}/none.jsonl: found no such file or folder"
    (tmp_path / "a.csv").write_text("prompt\n1\n")
    assert (
        error(str(tmp_path / "a.csv"), tokenizer)
        == f"{tmp_path}/a.csv: found a file that is neither .jsonl nor .parquet"
    )


def test_overlong_prompts_are_errors_or_counted(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    source = jsonl(tmp_path, [{"prompt": "1"}, {"prompt": "2" * 30}, {"prompt": "3" * 31}])
    assert error(source, tokenizer, max_prompt_tokens=20) == (
        f"{source}:2: found a prompt of 38 tokens, right would be at most data.max_prompt_tokens=20, a larger "
        "data.max_prompt_tokens, or data.overlong=skip; 2 of 3 rows are too long"
    )
    kept = load(source, tokenizer, max_prompt_tokens=20, overlong="skip")
    assert (len(kept.prompts), kept.num_skipped_overlong) == (1, 2)
    assert load(source, tokenizer, max_prompt_tokens=38, overlong="skip").num_skipped_overlong == 1
    assert "2 of 2 rows are too long" in error(
        jsonl(tmp_path, [{"prompt": "2" * 30}] * 2), tokenizer, max_prompt_tokens=20, overlong="skip"
    )


def test_chat_template_that_is_missing_or_fails(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    source = jsonl(tmp_path, [{"prompt": "1"}, {"prompt": "2", "id": "x"}])
    tokenizer.chat_template = "{% if '2' in messages[0]['content'] %}{{ raise_exception('no twos') }}{% endif %}1"
    assert error(source, tokenizer) == (
        f"{source}:2: the chat template of the student fails on this row (TemplateError: no twos), right would be "
        "messages that it takes, or another data.chat_template_kwargs"
    )
    tokenizer.chat_template = "{% if %}"
    assert error(source, tokenizer).startswith(
        f"{source}:1: the chat template of the student fails on this row (Template"
    )
    tokenizer.chat_template = "{{ messages[7]['content'] }}"
    assert f"{source}:1: the chat template of the student fails on this row (UndefinedError" in error(source, tokenizer)
    tokenizer.chat_template = "{{ '' }}"
    assert error(source, tokenizer) == f"{source}:1: found a chat template that leaves nothing of the messages"
    tokenizer.chat_template = None
    assert "found a tokenizer without a chat template, right would be a chat_template.jinja" in error(source, tokenizer)
