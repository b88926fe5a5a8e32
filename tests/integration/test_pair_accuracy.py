"""The embedded pair's pass@1 on held-out prompts: the teacher nearly perfect, the student with room to improve."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import topd_ray.demo
from topd_ray.demo.arithmetic import Problem, generate
from topd_ray.demo.generation import Graded, grade_model
from topd_ray.demo.make_pair import DEMO_DIFFICULTY, NUM_GRADED

PAIR = Path(topd_ray.demo.__file__).parent / "pair"


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def heldout() -> list[Problem]:
    return generate("heldout", NUM_GRADED, DEMO_DIFFICULTY, seed=0)


def graded(name: str, heldout: list[Problem], temperature: float) -> Graded:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(PAIR / name)
    tokenizer = AutoTokenizer.from_pretrained(PAIR / name)
    return grade_model(model, tokenizer, heldout, temperature=temperature)


def test_teacher_is_right_almost_always(heldout: list[Problem]) -> None:
    greedy = graded("teacher", heldout, 0.0)
    assert greedy.accuracy >= 0.97
    assert 20 <= greedy.mean_length <= 120
    assert graded("teacher", heldout, 1.0).accuracy >= 0.90


def test_student_is_right_sometimes(heldout: list[Problem]) -> None:
    greedy = graded("student", heldout, 0.0)
    assert 0.20 <= greedy.accuracy <= 0.50
    assert 20 <= greedy.mean_length <= 120
    assert graded("student", heldout, 1.0).accuracy >= 0.10
