"""Own models and own data: another architecture and tokenizer, JSONL and Parquet prompts, two learner ranks."""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).parents[2]
TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}<|assistant|>"
SPECIALS = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
QUESTIONS = [f"What is {a} plus {b}? Say only the number, please." for a in range(4) for b in range(6)]


def make_model(folder: Path, tokenizer: PreTrainedTokenizerFast, *, width: int, num_rows: int, seed: int) -> None:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=num_rows,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=width // 32,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=256,
        initializer_range=0.3,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a pair, prompts and a config that names them."""
    folder = tmp_path_factory.mktemp("own")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        QUESTIONS, trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIALS, initial_alphabet=alphabet)
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>", chat_template=TEMPLATE)
    make_model(folder / "student", tokenizer, width=32, num_rows=320, seed=0)
    make_model(folder / "teacher", tokenizer, width=64, num_rows=384, seed=1)
    rows = [{"prompt": question} for question in QUESTIONS]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    messages = [[{"role": "system", "content": "Be brief."}, {"role": "user", "content": q}] for q in QUESTIONS[:6]]
    pq.write_table(pa.table({"messages": messages, "answer": [str(n) for n in range(6)]}), folder / "heldout.parquet")
    config = {
        "run": {"name": "own", "root": str(folder / "runs"), "steps": 3},
        "data": {"train": str(folder / "train.jsonl"), "heldout": str(folder / "heldout.parquet")},
        "student": {"model": str(folder / "student"), "dtype": "float32"},
        "teacher": {
            "model": str(folder / "teacher"),
            "dtype": "float32",
            "top_k": "full",
            "enforce_eager": True,
            "kv_cache_bytes": 2**26,
        },
        "rollout": {
            "prompts_per_step": 4,
            "samples_per_prompt": 2,
            "temperature": 0.8,
            "max_new_tokens": 24,
            "enforce_eager": True,
            "kv_cache_bytes": 2**26,
        },
        "near_future": {"window": 6, "candidate_fraction": 0.2, "transport": "entropic", "teacher_decoding": "sample"},
        "learner": {
            "num_ranks": 2,
            "max_tokens_per_micro_batch": 128,
            "zero_stage": 3,
            "dtype": "float32",
            "learning_rate": 3e-3,
        },
        "evaluation": {"grader": "math", "num_runs": 2, "temperature": 1.0},
    }
    config["data"] |= {"max_prompt_tokens": 100}
    (folder / "job.yaml").write_text(json.dumps(config))
    return folder


def test_another_pair_trains_on_its_own_prompts(job: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "topd_ray", "run", str(job / "job.yaml")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    run = job / "runs" / "own"
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "loss/total" in record]
    assert [record["step"] for record in steps] == [1, 2, 3]
    preflight = next(record for record in records if "preflight/teacher_difference" in record)
    assert preflight["preflight/teacher_difference"] < 1e-3, "at temperature 0.8, top_k full"
    assert preflight["preflight/learner_difference"] < 1e-3
    assert abs(preflight["preflight/self_distillation_loss"]) < 1e-3
    assert all(record["mismatch/abs_logprob"] < 1e-3 for record in steps)
    assert all(record["near_future/divergent"] > 0.5 for record in steps), "two random models part at once"
    assert steps[-1]["loss/opd"] < steps[0]["loss/opd"]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["driver_payload_bytes"] == 0
    assert summary["num_prompts"] == 6
    exported = LlamaForCausalLM.from_pretrained(run / "export")
    assert exported.get_input_embeddings().weight.shape == (320, 32)


def test_a_teacher_of_another_vocabulary_is_refused_before_an_engine_loads(job: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "topd_ray", "run", str(job / "job.yaml"), "run.name=stranger"),
            "teacher.model=topd_ray/demo/pair/teacher",
            "teacher.top_k=8",
            "data.max_prompt_tokens=64",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert "the vocabularies of" in done.stderr and "differ" in done.stderr
    assert "starting the workers" not in done.stdout
    assert not (job / "runs" / "stranger").exists()
