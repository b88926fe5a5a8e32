"""The embedded pairs' pass@1 on held-out prompts: the teacher nearly perfect, the student with room to improve."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import topd_ray.demo
from topd_ray.demo.arithmetic import Problem, generate
from topd_ray.demo.generation import Graded, grade_model
from topd_ray.demo.make_pair import NUM_GRADED
from topd_ray.demo.recipes import DEMO_DIFFICULTY, TASKS

DEMO = Path(topd_ray.demo.__file__).parent


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def heldout() -> list[Problem]:
    return generate("heldout", NUM_GRADED, DEMO_DIFFICULTY, seed=0)


def graded(folder: str, problems: list[Problem], temperature: float) -> Graded:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(DEMO / folder)
    tokenizer = AutoTokenizer.from_pretrained(DEMO / folder)
    longest = TASKS["worded" if folder.startswith("worded") else "plain"].max_new_tokens
    return grade_model(model, tokenizer, problems, temperature=temperature, max_new_tokens=longest)


def test_teacher_is_right_almost_always(heldout: list[Problem]) -> None:
    greedy = graded("pair/teacher", heldout, 0.0)
    assert greedy.accuracy >= 0.97
    assert 20 <= greedy.mean_length <= 120
    assert graded("pair/teacher", heldout, 1.0).accuracy >= 0.90


def test_student_is_right_sometimes(heldout: list[Problem]) -> None:
    greedy = graded("pair/student", heldout, 0.0)
    assert 0.20 <= greedy.accuracy <= 0.50
    assert 20 <= greedy.mean_length <= 120
    assert graded("pair/student", heldout, 1.0).accuracy >= 0.10


def test_worded_teacher_is_right_almost_always(heldout: list[Problem]) -> None:
    greedy = graded("worded_pair/teacher", heldout[:200], 0.0)
    assert greedy.accuracy >= 0.93
    assert graded("worded_pair/teacher", heldout[:200], 1.0).accuracy >= 0.88


def test_worded_student_is_right_sometimes(heldout: list[Problem]) -> None:
    greedy = graded("worded_pair/student", heldout[:200], 0.0)
    assert 0.15 <= greedy.accuracy <= 0.55
    sampled = graded("worded_pair/student", heldout[:200], 1.0)
    assert sampled.accuracy >= 0.10
    assert 60 <= sampled.mean_length <= 100
