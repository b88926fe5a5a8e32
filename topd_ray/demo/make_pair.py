"""Make an embedded pair: `python -m topd_ray.demo.make_pair --out DIR [--task plain|worded] [--seed N]`.

Both models are Qwen3 of hidden size 128 and head size 32 in float32: the teacher of 4 layers (untied embeddings), the
student of 2 (tied). Both learn by next-token cross-entropy on the solution's tokens, the prompt masked: AdamW, batches
of 64, gradient norm clipped at 1, one thread. A cycle is one run of a fresh optimizer on fresh problems.

A student learns short expressions (difficulty 3) thoroughly and the demo's (difficulty 5) only for 160 steps, so it
knows its arithmetic and loses its way in long expressions: what distillation on its own rollouts can mend.

pass@1 on 500 held-out prompts of difficulty 5, seed 0 (the last cycle's row is what the pair in `pair/` holds):

    model    cycle  difficulty  steps  peak lr  greedy  sampled at temperature 1
    teacher  1      5           1500   2e-3     0.944   0.902
    teacher  2      5            700   1.5e-3   0.966   0.954
    teacher  3      5            500   1e-3     0.976   0.968
    student  1      3           1400   2e-3     0.336   0.328
    student  2      5            160   1e-3     0.342   0.224

The mean response is 38 tokens for both. Weights are the same from run to run on one machine with the same torch;
another processor rounds differently. On a 2-core AMD EPYC the whole took 15 minutes and gave a teacher of 0.974 greedy
and 0.958 sampled, and a student of 0.334 and 0.248.

The worded pair, in `worded_pair/`, solves the same expressions in many wordings and orders (worded.py). The teacher
starts from the plain pair's, whose arithmetic it keeps; the student starts from random weights. Each writer has habits
of its own (recipes.py): the teacher sticks to its favourites 87 % of the time and prefers the leftmost operation as
often, the student has other favourites at 60 % and takes any operation.

    model    cycle  difficulty  steps  peak lr  greedy  sampled  mean response, greedy and sampled
    teacher  1      5            700   1.5e-3   0.978   0.906    66.6  68.9 tokens
    student  1      3           1200   2e-3
    student  2      5            160   1e-3     0.422   0.278    85.3  81.7 tokens

Side by side on two cores that were busy with other work, the teacher took 10 minutes and the student 11.
"""

import argparse
import random
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from topd_ray.demo.arithmetic import Problem, generate, problem_stream
from topd_ray.demo.generation import grade_model
from topd_ray.demo.recipes import DEMO_DIFFICULTY, TASKS, Cycle, Recipe, Task, Writer
from topd_ray.demo.tokenizer import MAX_TOKENS, render_prompt

NUM_GRADED = 500
IGNORED = -100
_BATCHES_SORTED_TOGETHER = 16
_REPORT_EVERY = 100
_PROBE_SEED = 1_000_003


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """A Qwen3 model with random weights from torch's global generator, save for what `recipe.start_from` gives."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        intermediate_size=3 * recipe.hidden_size,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=recipe.hidden_size // 32,
        num_key_value_heads=recipe.hidden_size // 64,
        head_dim=32,
        max_position_embeddings=MAX_TOKENS,
        tie_word_embeddings=recipe.tie_word_embeddings,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(
        eos_token_id=[tokenizer.eos_token_id],
        pad_token_id=tokenizer.pad_token_id,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
    )
    if recipe.start_from is not None:
        _take_over(model, tokenizer, recipe.start_from)
    return model


@torch.no_grad()
def _take_over(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """The checkpoint's layers as they are; of its embeddings and head, the rows of the tokens that both have."""
    vocabulary, theirs = tokenizer.get_vocab(), AutoTokenizer.from_pretrained(folder).get_vocab()
    shared = sorted(vocabulary.keys() & theirs.keys())
    rows, their_rows = ([ids[token] for token in shared] for ids in (vocabulary, theirs))
    weights = model.state_dict()
    for name, tensor in Qwen3ForCausalLM.from_pretrained(folder).state_dict().items():
        if weights[name].shape == tensor.shape:
            weights[name].copy_(tensor)
        else:
            weights[name][rows] = tensor[their_rows]


def encode(tokenizer: PreTrainedTokenizerFast, problem: Problem, solution: str) -> tuple[list[int], int]:
    """Token ids of prompt, solution and end-of-sequence token; and how many of them are the prompt."""
    prompt = render_prompt(tokenizer, problem.expression)
    return [*prompt, *tokenizer.encode(solution, add_special_tokens=False), tokenizer.eos_token_id], len(prompt)


def batches(
    tokenizer: PreTrainedTokenizerFast, writer: Writer, difficulty: int, batch_size: int, seed: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Token ids and next-token targets, [batch_size, longest]; prompts and padding are IGNORED in the targets.

    Problems of like length share a batch, so that little is padded.
    """
    rng = random.Random(f"batches/{seed}")
    writers_rng = random.Random(f"writer/{seed}")
    problems = problem_stream("train", difficulty, seed)
    while pool := list(islice(problems, batch_size * _BATCHES_SORTED_TOGETHER)):
        encoded = [encode(tokenizer, problem, writer(problem, writers_rng)) for problem in pool]
        encoded.sort(key=lambda pair: len(pair[0]))
        starts = list(range(0, len(encoded), batch_size))
        rng.shuffle(starts)
        for start in starts:
            yield _collate(encoded[start : start + batch_size], tokenizer.pad_token_id)


def _collate(encoded: list[tuple[list[int], int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(len(token_ids) for token_ids, _ in encoded)
    inputs = torch.full((len(encoded), width - 1), pad)
    targets = torch.full((len(encoded), width - 1), IGNORED)
    for row, (token_ids, num_prompt) in enumerate(encoded):
        ids = torch.tensor(token_ids)
        inputs[row, : len(ids) - 1] = ids[:-1]
        targets[row, num_prompt - 1 : len(ids) - 1] = ids[num_prompt:]
    return inputs, targets


def train(recipe: Recipe, task: Task, tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen3ForCausalLM:
    """Supervised next-token cross-entropy on solution tokens; every cycle has a fresh optimizer and fresh problems."""
    torch.manual_seed(seed)
    model = build_model(recipe, tokenizer)
    probe = generate("train", 100, DEMO_DIFFICULTY, seed=_PROBE_SEED)
    started = time.monotonic()

    def report(step: int, loss: float) -> None:
        accuracy = grade_model(model, tokenizer, probe, max_new_tokens=task.max_new_tokens).accuracy
        seconds = time.monotonic() - started
        print(f"step {step} loss {loss:.4f} probe {accuracy:.2f} after {seconds:.0f} s", flush=True)

    for index, cycle in enumerate(recipe.cycles):
        print(f"{recipe.name}: cycle {index + 1} of {len(recipe.cycles)}", flush=True)
        data = batches(tokenizer, recipe.writer, cycle.difficulty, recipe.batch_size, seed + 1_000 * index)
        train_cycle(model, cycle, data, report)
    return model


def train_cycle(
    model: Qwen3ForCausalLM,
    cycle: Cycle,
    data: Iterator[tuple[torch.Tensor, torch.Tensor]],
    report: Callable[[int, float], None],
) -> None:
    """AdamW over one cycle, in place; hands the step and its loss (nats a token) to `report` every 100 steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=cycle.peak_lr, betas=(0.9, 0.98), weight_decay=0.01)
    for step, (inputs, targets) in enumerate(islice(data, cycle.num_steps)):
        for group in optimizer.param_groups:
            group["lr"] = cycle.lr_at(step)
        model.train()
        # Padding stands on the right, so the causal mask alone keeps it out of every supervised position.
        logits = model(input_ids=inputs, use_cache=False).logits
        loss = cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % _REPORT_EVERY == 0:
            report(step + 1, loss.item())


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the tokenizer and both checkpoints of an embedded pair.")
    parser.add_argument("--out", type=Path, required=True, help="folder to hold teacher/ and student/")
    parser.add_argument("--task", choices=sorted(TASKS), default="plain", help="what the pair writes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=["teacher", "student"], help="make just one of the two")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    task = TASKS[arguments.task]
    tokenizer = task.build_tokenizer()
    heldout = generate("heldout", NUM_GRADED, DEMO_DIFFICULTY, arguments.seed)
    for recipe in (task.teacher, task.student):
        if arguments.only not in (None, recipe.name):
            continue
        model = train(recipe, task, tokenizer, arguments.seed)
        folder = arguments.out / recipe.name
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        greedy = grade_model(model, tokenizer, heldout, max_new_tokens=task.max_new_tokens)
        sampled = grade_model(model, tokenizer, heldout, temperature=1.0, max_new_tokens=task.max_new_tokens)
        print(
            f"{recipe.name}: held-out pass@1 greedy {greedy.accuracy:.3f} sampled {sampled.accuracy:.3f}, "
            f"mean response greedy {greedy.mean_length:.1f} sampled {sampled.mean_length:.1f} tokens"
        )


if __name__ == "__main__":
    main()
