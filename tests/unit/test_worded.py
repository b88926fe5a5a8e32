"""Worded arithmetic: right solutions in many wordings, cut into tokens without loss."""

import random
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from topd_ray.demo.arithmetic import MAX_DIFFICULTY, generate, grade, reductions, split_of
from topd_ray.demo.make_pair import build_model
from topd_ray.demo.recipes import DEMO_DIFFICULTY, PLAIN_PAIR, STUDENTS_HABITS, TASKS, TEACHERS_HABITS
from topd_ray.demo.tokenizer import ROLES, SPECIALS, build_tokenizer, build_worded_tokenizer, render_prompt
from topd_ray.demo.worded import FILLERS, LINKS, NOTATIONS, OPENINGS, PIECES, Habits, line, pieces_of, write

HABITS = {"teacher": TEACHERS_HABITS, "student": STUDENTS_HABITS}
UNKNOWN = SPECIALS.index("<|unk|>")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_worded_tokenizer()


@pytest.mark.parametrize("name", HABITS)
@pytest.mark.parametrize("difficulty", [3, DEMO_DIFFICULTY, MAX_DIFFICULTY])
def test_every_solution_is_right_and_survives_the_tokenizer(
    tokenizer: PreTrainedTokenizerFast, name: str, difficulty: int
) -> None:
    rng = random.Random(difficulty)
    for split in ("train", "heldout"):
        for problem in generate(split, 100, difficulty, seed=2):
            assert split_of(problem.expression) == split
            solution = write(problem, rng, HABITS[name])
            assert grade(solution, problem.answer)
            ids = tokenizer.encode(solution)
            assert UNKNOWN not in ids
            assert tokenizer.decode(ids) == solution
            assert tokenizer.convert_ids_to_tokens(ids) == pieces_of(solution)
            assert tokenizer.decode(render_prompt(tokenizer, problem.expression)).startswith(
                f"<|im_start|>user\n{problem.expression}<|im_end|>"
            )


@given(pieces=st.lists(st.sampled_from(PIECES), max_size=30))
def test_any_sequence_of_tokens_is_cut_into_the_same_again(pieces: list[str]) -> None:
    assert pieces_of("".join(pieces)) == pieces


def test_vocabulary(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.convert_ids_to_tokens(list(range(len(tokenizer)))) == [*SPECIALS, *ROLES, *PIECES]
    assert len(tokenizer) == 55
    assert tokenizer.encode("so x2") == [*tokenizer.encode("so "), UNKNOWN, *tokenizer.encode("2")]


def test_wordings_are_of_one_to_four_tokens() -> None:
    lengths = {words: len(pieces_of(f"{words} ")) for words in (*OPENINGS, *FILLERS[1:], *LINKS)}
    assert set(lengths.values()) == {1, 2, 3, 4}
    assert all(len(pieces_of(f"2{word}3")) == 3 for words in NOTATIONS.values() for word in words.values())


def test_each_line_does_one_operation_that_can_be_done() -> None:
    rng = random.Random(1)
    for problem in generate("train", 100, DEMO_DIFFICULTY, seed=5):
        expression = problem.expression
        *lines, last = write(problem, rng, STUDENTS_HABITS).split("\n")
        for written in lines:
            fitting = {
                step.result
                for step in reductions(expression)
                for opening in OPENINGS
                for filler in FILLERS
                for notation in NOTATIONS
                for link in LINKS
                if line(opening, filler, notation, step.operation, str(step.value), link, step.result) == written
            }
            assert len(fitting) == 1, written
            expression = fitting.pop()
        assert last == f"#### {expression}"
        assert expression == problem.answer


def test_habits_are_kept_as_often_as_they_say() -> None:
    rng = random.Random(3)
    leftmost: Counter[bool] = Counter()
    openings: Counter[bool] = Counter()
    signs: Counter[bool] = Counter()
    for problem in generate("train", 600, DEMO_DIFFICULTY, seed=4):
        first = write(problem, rng, TEACHERS_HABITS).split("\n")[0]
        steps = reductions(problem.expression)
        openings[first.startswith("so ")] += 1
        signs["=" in first] += 1
        if len({step.result for step in steps}) > 1:
            leftmost[first.endswith(" " + steps[0].result)] += 1
    for counts in (leftmost, openings, signs):
        assert counts[True] / counts.total() == pytest.approx(0.87, abs=0.05)


def test_without_a_preference_all_operations_are_alike() -> None:
    rng = random.Random(3)
    habits = Habits(opening="so", filler="", notation="signs", link="giving", loyalty=1.0, leftmost=None)
    problem = next(p for p in generate("train", 99, DEMO_DIFFICULTY, seed=4) if len(reductions(p.expression)) == 2)
    firsts = Counter(write(problem, rng, habits).split("\n")[0] for _ in range(400))
    assert set(firsts) == {
        f"so {step.operation}={step.value} giving {step.result}" for step in reductions(problem.expression)
    }
    assert max(firsts.values()) / 400 == pytest.approx(0.5, abs=0.1)


def test_no_solution_is_longer_than_what_is_generated() -> None:
    rng = random.Random(0)
    problems = generate("train", 500, DEMO_DIFFICULTY, seed=0)
    longest = max(len(pieces_of(write(problem, rng, STUDENTS_HABITS))) for problem in problems)
    assert longest < TASKS["worded"].max_new_tokens


def test_the_teacher_starts_with_what_the_plain_one_knows(tokenizer: PreTrainedTokenizerFast) -> None:
    model = build_model(TASKS["worded"].teacher, tokenizer)
    plain = AutoModelForCausalLM.from_pretrained(PLAIN_PAIR / "teacher")
    for mine, theirs in zip(model.model.layers.parameters(), plain.model.layers.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    seven, opening = tokenizer.get_vocab()["7"], tokenizer.get_vocab()["so "]
    theirs_of = build_tokenizer().get_vocab()
    for mine, theirs in ((model.model.embed_tokens, plain.model.embed_tokens), (model.lm_head, plain.lm_head)):
        assert torch.equal(mine.weight[seven], theirs.weight[theirs_of["7"]])
        assert not (mine.weight[opening] == theirs.weight).all(-1).any()


def test_an_operation_that_is_none() -> None:
    with pytest.raises(ValueError, match="operation is '2\\+'; it is two integers"):
        line("so", "", "signs", "2+", "5", "giving", "5")
