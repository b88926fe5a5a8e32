"""What both sides have in common: the tasks, the files they are read from, the optimiser, and the grading."""

import json
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from topd_ray.demo.arithmetic import Split, generate, grade

PAIR = Path("topd_ray/demo/pair")
PROMPTS_PER_UPDATE = 64
THREADS = 2
BETAS, ADAM_EPSILON, WEIGHT_DECAY, GRADIENT_CLIPPING = (0.9, 0.999), 1e-8, 0.0, 1.0
DIFFICULTY = 5
MAX_POSITIONS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One comparison. Prompts are chains of expressions; `chain_weights` are the odds of 1, 2, ... in a prompt."""

    name: str
    chain_weights: tuple[float, ...]
    max_prompt_tokens: int
    max_new_tokens: int
    learning_rate: float
    num_turns: int
    updates_per_turn: int
    warmup_updates: int
    num_heldout: int
    methods: tuple[str, ...]
    """our objectives; TRL's does what `opd` does, `topd` does more and is measured for information"""
    goal: float
    """ratio of trained tokens per second, ours over TRL's, that is aimed at"""


CASES = {
    case.name: case
    for case in (
        Case(
            name="short",
            chain_weights=(1.0,),
            max_prompt_tokens=48,
            max_new_tokens=64,
            learning_rate=1e-3,
            num_turns=5,
            updates_per_turn=5,
            warmup_updates=5,
            num_heldout=300,
            methods=("opd", "topd"),
            goal=1.0,
        ),
        # The student gets lost in chains it was not trained on and writes on to the cap. The teacher does not, and soon
        # teaches that: a learning rate that keeps the long tail for as long as it is measured.
        Case(
            name="long",
            chain_weights=(0.85, 0.10, 0.05),
            max_prompt_tokens=88,
            max_new_tokens=512,
            learning_rate=1e-5,
            num_turns=3,
            updates_per_turn=2,
            warmup_updates=2,
            num_heldout=100,
            methods=("opd",),
            goal=1.5,
        ),
    )
}


def write_files(case: Case, num_updates: int, folder: Path) -> None:
    """`train.jsonl`, one prompt a rollout in the order of training, `heldout.jsonl`, and the pair.

    The pair's files say 512 positions, a prompt and the cap are longer: rotary positions have no table, so the copies
    say more.
    """
    counts: dict[Split, int] = {"train": num_updates * PROMPTS_PER_UPDATE, "heldout": case.num_heldout}
    for split, num in counts.items():
        rows = [{"prompt": prompt, "answer": answer} for prompt, answer in _chains(split, num, case.chain_weights)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("student", "teacher"):
        shutil.copytree(PAIR / name, folder / name)
        file = folder / name / "config.json"
        config = json.loads(file.read_text()) | {"max_position_embeddings": MAX_POSITIONS}
        file.write_text(json.dumps(config))


def _chains(split: Split, num: int, weights: tuple[float, ...]) -> Iterator[tuple[str, str]]:
    """Prompts `(a)+(b)-(c)` and their answers; a chain of one is the expression itself."""
    rng = random.Random(f"{split}/{num}")
    lengths = rng.choices(range(1, len(weights) + 1), weights, k=num)
    problems = iter(generate(split, sum(lengths), DIFFICULTY, seed=0))
    for length in lengths:
        first = next(problems)
        prompt, answer = first.expression, int(first.answer)
        for _ in range(length - 1):
            operator, problem = rng.choice("+-"), next(problems)
            prompt = f"({prompt}){operator}({problem.expression})"
            answer += int(problem.answer) if operator == "+" else -int(problem.answer)
        yield prompt, str(answer)


def read_rows(file: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def accuracy(model: Any, tokenizer: Any, folder: Path, max_new_tokens: int) -> float:
    """Share of the held-out prompts that greedy decoding answers rightly; the same code for both sides."""
    from topd_ray.demo.generation import respond
    from topd_ray.demo.tokenizer import render_prompt

    rows = read_rows(folder / "heldout.jsonl")
    prompts = [render_prompt(tokenizer, row["prompt"]) for row in rows]
    answers = respond(model, tokenizer, prompts, max_new_tokens=max_new_tokens)
    texts = [str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in answers]
    return sum(grade(text, row["answer"]) for text, row in zip(texts, rows, strict=True)) / len(rows)
