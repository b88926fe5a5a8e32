"""Do student and teacher share a vocabulary?"""

import json
import shutil
from pathlib import Path
from typing import Any

import mistral_common
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers.integrations.mistral.tokenizer import convert_tekken_tokenizer

from topd_ray.config.schema import ModelConfig, TeacherConfig
from topd_ray.data.tokenizer import Vocabulary, check_same_vocabulary, load_tokenizer, read_vocabulary
from topd_ray.demo.tokenizer import build_tokenizer
from topd_ray.errors import ConfigError


def model(folder: Path, rows: int = 64, generation: dict[str, Any] | None = None, **changes: Any) -> TeacherConfig:
    """A model folder with the embedded tokenizer and no weights."""
    tokenizer = build_tokenizer()
    if "special" in changes:
        tokenizer.add_special_tokens({"additional_special_tokens": changes["special"]})
    if "tokens" in changes:
        tokenizer.add_tokens(changes["tokens"])
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(
        json.dumps({"model_type": "qwen3", "vocab_size": rows, "eos_token_id": changes.get("eos", 2)})
    )
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return TeacherConfig(model=str(folder))


def refusal(student: ModelConfig, teacher: TeacherConfig) -> str:
    with pytest.raises(ConfigError) as caught:
        check_same_vocabulary(student, teacher)
    return str(caught.value)


def test_padded_tails_may_differ(tmp_path: Path) -> None:
    student = model(tmp_path / "student", rows=72, generation={"eos_token_id": [2, 0]})
    teacher = model(tmp_path / "teacher", rows=64)
    check_same_vocabulary(student, teacher)
    assert read_vocabulary(student) == Vocabulary(size=64, rows=72, eos_ids=(0, 2))
    assert read_vocabulary(teacher) == Vocabulary(size=64, rows=64, eos_ids=(2,))


def test_a_config_that_names_no_end(tmp_path: Path) -> None:
    """transformers' class of it has a default, here 1, which another tokenizer has for any token."""
    silent = model(tmp_path, generation={"eos_token_id": [0]})
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3_text", "vocab_size": 64}))
    assert read_vocabulary(silent).eos_ids == (0, 2)
    text = {"model_type": "gemma3_text", "vocab_size": 64}
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "gemma3", "text_config": text, "eos_token_id": [5]})
    )
    assert read_vocabulary(silent).eos_ids == (0, 2, 5)


def test_other_ids_for_the_same_tokens(tmp_path: Path) -> None:
    student = model(tmp_path / "student", rows=80, tokens=["xx", "yy"])
    teacher = model(tmp_path / "teacher", rows=80, tokens=["yy", "xx", "zz"])
    assert refusal(student, teacher) == (
        f"the vocabularies of student.model={student.model} and teacher.model={teacher.model} differ in 3 tokens: "
        "'xx' is 64 in the student, 65 in the teacher; 'yy' is 65 in the student, 64 in the teacher; "
        "'zz' is missing in the student, 66 in the teacher. Right would be two models of one tokenizer"
    )


def test_a_token_that_is_special_in_one_only(tmp_path: Path) -> None:
    student = model(tmp_path / "student", rows=80, tokens=["<|x|>"])
    teacher = model(tmp_path / "teacher", rows=80, special=["<|x|>"])
    assert "token 64 ('<|x|>') is special only in teacher.model=" in refusal(student, teacher)


def test_fewer_rows_than_tokens(tmp_path: Path) -> None:
    student = model(tmp_path / "student")
    teacher = model(tmp_path / "teacher", rows=63)
    assert refusal(student, teacher) == (
        f"{teacher.model}: found an embedding of 63 rows (vocab_size in config.json) for a tokenizer of "
        "64 ids, right would be at least as many rows"
    )


def test_top_k_beyond_the_tokens_in_use(tmp_path: Path) -> None:
    student = model(tmp_path / "student", rows=80)
    teacher = model(tmp_path / "teacher", rows=80).model_copy(update={"top_k": 65})
    assert refusal(student, teacher) == "teacher.top_k: found 65, right would be at most the vocabulary of 64 (or full)"


def ending_with_endoftext(folder: Path, **kwargs: Any) -> TeacherConfig:
    """A model as base models are: its tokenizer ends a text, and knows of no turns."""
    found = model(folder, eos=0, **kwargs)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token": "<|endoftext|>"}))
    return found


def test_no_common_end(tmp_path: Path) -> None:
    student, teacher = model(tmp_path / "student"), ending_with_endoftext(tmp_path / "teacher")
    assert "stops at the tokens [2], teacher.model=" in refusal(student, teacher)


def test_a_base_student_that_would_write_on_after_the_teachers_end(tmp_path: Path) -> None:
    teacher = model(tmp_path / "teacher", generation={"eos_token_id": [2, 0]})
    student = ending_with_endoftext(tmp_path / "student", generation={"eos_token_id": 0})
    assert refusal(student, teacher) == (
        f"student.model={student.model} stops at the tokens [0], teacher.model={teacher.model} ends an answer with [2]"
        "; right would be a token in common: eos_token_id in the generation_config.json of the student, or of a copy, "
        "may be a list"
    )
    check_same_vocabulary(ending_with_endoftext(tmp_path / "told", generation={"eos_token_id": [0, 2]}), teacher)
    check_same_vocabulary(teacher, student)


def test_a_teacher_whose_texts_end_otherwise_than_its_turns(tmp_path: Path) -> None:
    """As those of Gemma do."""
    teacher = ending_with_endoftext(tmp_path / "teacher", generation={"eos_token_id": [0, 2]})
    check_same_vocabulary(model(tmp_path / "student"), teacher)
    assert "ends an answer with [2]" in refusal(ending_with_endoftext(tmp_path / "base"), teacher)
    (tmp_path / "teacher" / "chat_template.jinja").write_text("{{ raise_exception('no template') }}")
    check_same_vocabulary(ending_with_endoftext(tmp_path / "other"), teacher)


def test_folders_without_a_tokenizer_or_a_config(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"the tokenizer of .*empty cannot be loaded .* right would be a folder"):
        load_tokenizer(ModelConfig(model=str(tmp_path / "empty")))
    student, teacher = model(tmp_path / "student"), model(tmp_path / "teacher")
    (tmp_path / "teacher" / "tokenizer.json").write_text('{"broken": 1}')
    assert f"the tokenizer of {teacher.model} cannot be loaded" in refusal(student, teacher)


def test_loading_needs_no_network_for_a_folder(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(model(tmp_path / "student").model_copy(update={"revision": "main"}))
    assert tokenizer.decode([25, 8, 17, 9]) == "\n1+2"


def test_a_byte_level_tokenizer_that_says_it_is_a_llama_tokenizer(tmp_path: Path) -> None:
    """As DeepSeek's distilled Llamas do; transformers 5 would give it SentencePiece's parts, and lose all spaces."""
    text = "The sum of 12 and 345 is 357.\n"
    written = Tokenizer(models.BPE())
    written.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    written.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|end|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    written.train_from_iterator([text] * 2, trainer)
    written.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "LlamaTokenizerFast", "eos_token": "<|end|>"})
    )
    config = {"model_type": "llama", "vocab_size": written.get_vocab_size(), "eos_token_id": 0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(ModelConfig(model=str(tmp_path)))
    token_ids = written.encode(text).ids
    assert tokenizer.encode(text, add_special_tokens=False) == token_ids
    assert tokenizer.decode([*token_ids, 0], skip_special_tokens=True) == text
    assert read_vocabulary(ModelConfig(model=str(tmp_path))).size == written.get_vocab_size()


def test_a_mistral_in_both_formats(tmp_path: Path) -> None:
    """As Mistral publishes its models: mistral-common, which comes with vLLM, would read tekken.json."""
    both = model(tmp_path)
    shutil.copy(Path(mistral_common.__file__).parent / "data" / "tekken_240911.json", tmp_path / "tekken.json")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "mistral"}))
    check_same_vocabulary(both, both.model_copy(update={"top_k": 8}))
    assert load_tokenizer(both).get_vocab() == build_tokenizer().get_vocab()
    assert load_tokenizer(both).chat_template


def test_a_mistral_whose_tokenizer_json_splits_text_wrongly(tmp_path: Path) -> None:
    """As those of Mistral do that transformers warns of; tekken.json beside it knows better."""
    source = Path(mistral_common.__file__).parent / "data" / "tekken_240911.json"
    converted = convert_tekken_tokenizer(str(source), chat_template="{{ messages }}")
    split = converted.backend_tokenizer.pre_tokenizer.pre_tokenize_str("fooBar 123")
    converted.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "tokenizer.json").read_text())
    written["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": r" ?\p{L}+|\p{N}{1,3}|\s+"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(written))
    shutil.copy(source, tmp_path / "tekken.json")
    config = {"model_type": "mistral", "vocab_size": len(converted), "transformers_version": "4.50.0"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded: Any = load_tokenizer(ModelConfig(model=str(tmp_path)))
    assert [part for part, _ in split] == ["foo", "Bar", "Ġ", "1", "2", "3"]
    assert loaded.backend_tokenizer.pre_tokenizer.pre_tokenize_str("fooBar 123") == split
