"""The embedded pairs' folders: they load, agree on one tokenizer, and are small."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import topd_ray.demo
from topd_ray.demo.arithmetic import generate
from topd_ray.demo.recipes import TASKS
from topd_ray.demo.tokenizer import ALPHABET, ROLES, SPECIALS, build_tokenizer, render_prompt

PAIR = Path(topd_ray.demo.__file__).parent / "pair"
PAIRS = {"plain": PAIR, "worded": PAIR.parent / "worded_pair"}
MODELS = ("teacher", "student")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
TURN = "<|im_start|>user\n(1+2)*3<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module", params=MODELS)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(PAIR / request.param)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("task", "num_tokens"), [("plain", 64), ("worded", 55)])
def test_models_load_and_give_finite_logits(task: str, num_tokens: int, name: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(PAIRS[task] / name)
    assert model.dtype == torch.float32
    assert model.config.model_type == "qwen3"
    assert model.config.vocab_size == num_tokens
    assert model.config.head_dim == 32
    assert model.config.max_position_embeddings == 512
    logits = model(torch.arange(num_tokens)[None]).logits
    assert logits.shape == (1, num_tokens, num_tokens)
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("task", PAIRS)
def test_one_model_ties_its_embeddings_and_the_other_does_not(task: str) -> None:
    configs = {name: json.loads((PAIRS[task] / name / "config.json").read_text()) for name in MODELS}
    assert {name: config["tie_word_embeddings"] for name, config in configs.items()} == {
        "teacher": False,
        "student": True,
    }


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("task", PAIRS)
def test_generation_ends_at_the_end_of_turn(task: str, name: str) -> None:
    generation = json.loads((PAIRS[task] / name / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [SPECIALS.index("<|im_end|>")]
    assert generation["pad_token_id"] == SPECIALS.index("<|endoftext|>")


@pytest.mark.parametrize("task", PAIRS)
def test_tokenizer_files_are_byte_identical(task: str, tmp_path: Path) -> None:
    TASKS[task].build_tokenizer().save_pretrained(tmp_path)
    for file in TOKENIZER_FILES:
        teacher, student = ((PAIRS[task] / name / file).read_bytes() for name in MODELS)
        assert teacher == student == (tmp_path / file).read_bytes(), file


@pytest.mark.parametrize("task", PAIRS)
def test_a_pair_is_at_most_ten_megabytes(task: str) -> None:
    sizes = [path.stat().st_size for path in PAIRS[task].rglob("*") if path.is_file()]
    assert 0 < sum(sizes) <= 10_000_000


def test_vocabulary(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer) == 64
    assert tokenizer.convert_ids_to_tokens(list(range(64))) == [*SPECIALS, *ROLES, *ALPHABET]
    assert tokenizer.pad_token == "<|endoftext|>"
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.unk_token == "<|unk|>"
    assert tokenizer.bos_token is None
    assert tokenizer.get_vocab() == build_tokenizer().get_vocab()


def test_one_character_is_one_token_and_nothing_is_lost(tokenizer: PreTrainedTokenizerFast) -> None:
    text = ALPHABET + "  1 + 2 \n\n ." + ALPHABET[::-1]
    ids = tokenizer.encode(text)
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text
    assert [tokenizer.decode([index]) for index in ids] == list(text)
    for problem in generate("heldout", 50, 5, seed=1):
        assert tokenizer.decode(tokenizer.encode(problem.solution)) == problem.solution


def test_unknown_characters_map_to_unk(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.encode("1é€2") == [8, 3, 3, 9]


def test_chat_template(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [{"role": "user", "content": "(1+2)*3"}]
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False) == TURN
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert ids == render_prompt(tokenizer, "(1+2)*3")
    assert len(ids) == len("(1+2)*3") + 8
    assert tokenizer.decode(ids) == TURN
    answered = [*messages, {"role": "assistant", "content": "#### 9"}]
    assert tokenizer.apply_chat_template(answered, tokenize=False) == TURN + "#### 9<|im_end|>\n"
