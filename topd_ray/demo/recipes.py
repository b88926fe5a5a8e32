"""What each embedded pair is made of: the tasks, the models' sizes, and how they are trained."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from topd_ray.demo.arithmetic import Problem
from topd_ray.demo.tokenizer import build_tokenizer, build_worded_tokenizer
from topd_ray.demo.worded import Habits, write

DEMO_DIFFICULTY = 5
PLAIN_PAIR = Path(__file__).parent / "pair"

Writer = Callable[[Problem, random.Random], str]
"""Writes a right solution; whatever it is free in comes from the generator."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cycle:
    """One run of the optimizer: linear warm-up, plateau, linear decay to zero over the last `decay_steps`."""

    num_steps: int
    peak_lr: float
    difficulty: int
    """of the problems trained on"""
    warmup_steps: int = 50
    decay_steps: int = 0
    """0 stops on the plateau"""

    def lr_at(self, step: int) -> float:
        """Learning rate of the update `step`, counted from 0."""
        rising = (step + 1) / self.warmup_steps
        falling = (self.num_steps - step) / self.decay_steps if self.decay_steps else 1.0
        return self.peak_lr * min(1.0, rising, falling)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Size of one checkpoint, whose solutions it learns, and how it is trained."""

    name: str
    writer: Writer
    num_layers: int
    hidden_size: int
    tie_word_embeddings: bool
    cycles: tuple[Cycle, ...]
    batch_size: int = 64
    start_from: Path | None = None
    """checkpoint of the same layers to begin with, and the rows of the tokens that both vocabularies have"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One embedded task: its tokenizer and the recipes of its pair."""

    build_tokenizer: Callable[[], PreTrainedTokenizerFast]
    max_new_tokens: int
    """more than the longest solution has"""
    teacher: Recipe
    student: Recipe


def as_given(problem: Problem, rng: random.Random) -> str:
    return problem.solution


PLAIN_TEACHER = Recipe(
    name="teacher",
    writer=as_given,
    num_layers=4,
    hidden_size=128,
    tie_word_embeddings=False,
    cycles=(
        Cycle(num_steps=1500, peak_lr=2e-3, difficulty=DEMO_DIFFICULTY, decay_steps=750),
        Cycle(num_steps=700, peak_lr=1.5e-3, difficulty=DEMO_DIFFICULTY, decay_steps=600),
        Cycle(num_steps=500, peak_lr=1e-3, difficulty=DEMO_DIFFICULTY, decay_steps=450),
    ),
)
PLAIN_STUDENT = Recipe(
    name="student",
    writer=as_given,
    num_layers=2,
    hidden_size=128,
    tie_word_embeddings=True,
    cycles=(
        Cycle(num_steps=1400, peak_lr=2e-3, difficulty=3, decay_steps=600),
        Cycle(num_steps=160, peak_lr=1e-3, difficulty=DEMO_DIFFICULTY),
    ),
)

TEACHERS_HABITS = Habits(opening="so", filler="", notation="signs", link="giving", loyalty=0.87, leftmost=0.87)
STUDENTS_HABITS = Habits(
    opening="now we do", filler="of course", notation="is", link="so we have", loyalty=0.6, leftmost=None
)
WORDED_TEACHER = Recipe(
    name="teacher",
    writer=partial(write, habits=TEACHERS_HABITS),
    num_layers=4,
    hidden_size=128,
    tie_word_embeddings=False,
    cycles=(Cycle(num_steps=700, peak_lr=1.5e-3, difficulty=DEMO_DIFFICULTY, decay_steps=500),),
    start_from=PLAIN_PAIR / "teacher",
)
WORDED_STUDENT = Recipe(
    name="student",
    writer=partial(write, habits=STUDENTS_HABITS),
    num_layers=2,
    hidden_size=128,
    tie_word_embeddings=True,
    cycles=(
        Cycle(num_steps=1200, peak_lr=2e-3, difficulty=3, decay_steps=600),
        Cycle(num_steps=160, peak_lr=1e-3, difficulty=DEMO_DIFFICULTY),
    ),
)

TASKS = {
    "plain": Task(build_tokenizer=build_tokenizer, max_new_tokens=128, teacher=PLAIN_TEACHER, student=PLAIN_STUDENT),
    "worded": Task(
        build_tokenizer=build_worded_tokenizer, max_new_tokens=192, teacher=WORDED_TEACHER, student=WORDED_STUDENT
    ),
}
