"""Scoring, near futures and sparse targets of a real teacher engine, against a computation by hand."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from transformers import Qwen3ForCausalLM

from tests.tiny import EOS_ID, NUM_TOKENS, at, load_tiny_model, make_tiny_model, plain_greedy, plain_logprobs
from topd_ray.config.schema import NearFutureConfig, ObjectiveConfig, TeacherConfig
from topd_ray.engines.look_ahead import Asked, LookAhead
from topd_ray.engines.teacher import TeacherEngine
from topd_ray.objective.targets import unfold
from topd_ray.objective.transport import exact_transport, ground_cost, unit_embeddings
from topd_ray.types import GuidedTrajectory, SparseTargets, Trajectory

WINDOW = 6
TEMPERATURE = 0.8
NEAR_FUTURE = NearFutureConfig(window=WINDOW, candidate_fraction=0.2)


@dataclass(frozen=True)
class Teacher:
    engine: TeacherEngine
    model: Qwen3ForCausalLM


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Teacher]:
    folder: Path = make_tiny_model(tmp_path_factory.mktemp("teacher"), seed=4, num_rows=NUM_TOKENS)
    config = TeacherConfig(
        model=str(folder),
        dtype="float32",
        top_k="full",
        max_num_seqs=32,
        max_batched_tokens=128,
        kv_cache_bytes=8 * 1024**2,
        enforce_eager=True,
    )
    with TeacherEngine(config, temperature=TEMPERATURE, max_model_len=96, window=WINDOW, threads=1, seed=0) as engine:
        yield Teacher(engine, load_tiny_model(folder))


def make_trajectories(count: int) -> list[Trajectory]:
    draw = np.random.default_rng(5)
    trajectories = []
    for index in range(count):
        num_tokens = int(draw.integers(3, 40))
        response_ids = draw.integers(3, NUM_TOKENS, num_tokens).astype(np.int32)
        response_ids[-1] = EOS_ID
        trajectories.append(
            Trajectory(
                trajectory_id=f"p{index}/0/0",
                prompt_id=f"p{index}",
                sample_index=0,
                epoch=0,
                policy_version=0,
                finish_reason="stop",
                prompt_ids=draw.integers(3, NUM_TOKENS, 5).astype(np.int32),
                response_ids=response_ids,
                behaviour_logprobs=-draw.exponential(2.0, num_tokens).astype(np.float32),
            )
        )
    return trajectories


def look_ahead(teacher: Teacher, objective: ObjectiveConfig | None = None, **changes: object) -> LookAhead:
    near_future = NEAR_FUTURE.model_copy(update=changes)
    return LookAhead(near_future, objective or ObjectiveConfig(), teacher.engine.embedding(), teacher.engine, 0)


def guide(looking: LookAhead, trajectories: list[Trajectory], threshold: float = 0.0) -> list[GuidedTrajectory]:
    return looking.fold(looking.ask(trajectories), threshold)


def assert_same(one: GuidedTrajectory, other: GuidedTrajectory) -> None:
    for part in ("positions", "distances", "divergent", "teacher_indptr", "teacher_ids"):
        assert np.array_equal(getattr(one.windows, part), getattr(other.windows, part)), part
    for part in ("indptr", "token_ids", "weights", "entropy"):
        assert np.array_equal(getattr(one.targets, part), getattr(other.targets, part)), part
    assert np.array_equal(one.capped, other.capped)


def teacher_windows(guided: GuidedTrajectory) -> list[list[int]]:
    ends = guided.windows.teacher_indptr
    return [guided.windows.teacher_ids[start:end].tolist() for start, end in pairwise(ends)]


def median_distance(looking: LookAhead, pending: list[Asked]) -> float:
    return float(np.median(np.concatenate([one.windows.distances for one in looking.fold(pending, 0.0)])))


def branches_of(guided: GuidedTrajectory) -> list[list[int]]:
    return [guided.branches.token_ids[start:end].tolist() for start, end in pairwise(guided.branches.indptr)]


@pytest.mark.parametrize("ranking", ["teacher_nll", "sampled_kl"])
def test_windows_start_at_the_highest_losses_and_go_on_as_the_teacher_would(teacher, ranking):
    trajectories = make_trajectories(6)
    for trajectory, guided in zip(trajectories, guide(look_ahead(teacher, ranking=ranking), trajectories), strict=True):
        plain_TV = plain_logprobs(teacher.model, trajectory.prompt_ids, trajectory.response_ids, TEMPERATURE)
        plain_T = at(plain_TV, trajectory.response_ids)
        assert np.abs(guided.scores.sampled_logprobs - plain_T).max() < 1e-3
        losses_T = -plain_T if ranking == "teacher_nll" else trajectory.behaviour_logprobs - plain_T
        num_wanted = max(1, int(0.2 * trajectory.num_response_tokens + 0.5))
        assert guided.windows.positions.tolist() == sorted(np.argsort(-losses_T)[:num_wanted].tolist())
        prefixes = [
            [*trajectory.prompt_ids, *trajectory.response_ids[:position]] for position in guided.windows.positions
        ]
        assert teacher_windows(guided) == [plain_greedy(teacher.model, prefix, WINDOW) for prefix in prefixes]


def test_only_windows_further_apart_than_the_threshold_guide(teacher):
    trajectories = make_trajectories(6)
    looking = look_ahead(teacher)
    pending = looking.ask(trajectories)
    threshold = median_distance(looking, pending)
    embedding = unit_embeddings(torch.from_numpy(teacher.engine.embedding()))
    for guided in looking.fold(pending, threshold):
        response_ids = guided.trajectory.response_ids
        expected = [dict[int, float]() for _ in response_ids]
        for row, teacher_ids in enumerate(teacher_windows(guided)):
            start = guided.windows.positions[row]
            student_ids = response_ids[start : start + WINDOW]
            cost = ground_cost(student_ids[None], [teacher_ids], embedding)
            result = exact_transport(cost)
            plan = result.plan_MST[0]
            assert guided.windows.distances[row] == pytest.approx(result.distance_M.item(), abs=1e-6)
            assert guided.windows.divergent[row] == (guided.windows.distances[row] > threshold)
            for i in range(len(student_ids) if guided.windows.divergent[row] else 0):
                for j, token in enumerate(teacher_ids):
                    weights = expected[start + i]
                    weights[token] = weights.get(token, 0.0) + float(plan[i, j]) * len(student_ids)
        for found, weights in zip(unfold(guided.targets), expected, strict=True):
            nonzero = {token: weight for token, weight in weights.items() if weight > 1e-8}
            assert found == pytest.approx(nonzero, abs=1e-5)


def test_the_identity_plan_changes_targets_and_nothing_else(teacher):
    trajectories = make_trajectories(6)
    looking = look_ahead(teacher)
    pending = looking.ask(trajectories)
    threshold = median_distance(looking, pending)
    transported = looking.fold(pending, threshold)
    for guided, other in zip(look_ahead(teacher, plan="identity").fold(pending, threshold), transported, strict=True):
        assert_same(replace(guided, targets=other.targets), other)
        expected = [dict[int, float]() for _ in guided.trajectory.response_ids]
        for start, divergent, teacher_ids in zip(
            guided.windows.positions, guided.windows.divergent, teacher_windows(guided), strict=True
        ):
            for weights, token in zip(expected[start : start + WINDOW], teacher_ids if divergent else [], strict=False):
                weights[token] = weights.get(token, 0.0) + 1.0
        assert unfold(guided.targets) == expected
        assert not guided.targets.entropy.any()
    assert sum(one.targets.num_guided for one in transported) > 0


def test_in_the_teachers_context_its_window_is_learnt_on_a_branch(teacher):
    trajectories = make_trajectories(6)
    looking, beside = look_ahead(teacher), look_ahead(teacher, guidance_context="teacher")
    pending = looking.ask(trajectories)
    threshold = median_distance(looking, pending)
    transported = looking.fold(pending, threshold)
    for guided, other in zip(beside.fold(pending, threshold), transported, strict=True):
        empty = SparseTargets.empty(guided.trajectory.num_response_tokens)
        assert_same(guided, replace(other, targets=empty))
        windows = teacher_windows(guided)
        forks = [row for row, divergent in enumerate(guided.windows.divergent) if divergent]
        branches = guided.branches
        assert branches.positions.tolist() == guided.windows.positions[forks].tolist()
        assert branches_of(guided) == [windows[row] for row in forks]
        assert unfold(branches.targets) == [{token: 1.0} for row in forks for token in windows[row]]
        assert not branches.targets.entropy.any()
        assert len(other.branches.positions) == 0
    divergent = np.concatenate([one.windows.divergent for one in transported])
    assert divergent.any() and not divergent.all()


@pytest.mark.parametrize("plan", ["transport", "identity"])
def test_resampled_student_windows_are_guided_on_branches(teacher, plan):
    """Where the student draws the tokens it wrote before, all is as along the trajectory, window by window."""
    trajectories = make_trajectories(6)
    reusing, resampling = (look_ahead(teacher, plan=plan, student_window=one) for one in ("reuse", "resample"))
    pending = reusing.ask(trajectories)
    again = resampling.resample(pending, SameAgain(trajectories))
    threshold = median_distance(reusing, pending)
    for guided, other in zip(resampling.fold(again, threshold), reusing.fold(pending, threshold), strict=True):
        assert_same(guided, replace(other, targets=guided.targets))
        assert guided.targets.num_guided == 0.0
        response_ids = guided.trajectory.response_ids
        forks = guided.windows.positions[guided.windows.divergent]
        assert guided.branches.positions.tolist() == forks.tolist()
        folded = [dict[int, float]() for _ in response_ids]
        rows = iter(unfold(guided.branches.targets))
        for position, own in zip(forks, branches_of(guided), strict=True):
            assert own == response_ids[position : position + len(own)].tolist()
            for weights in folded[position : position + len(own)]:
                for token, weight in next(rows).items():
                    weights[token] = weights.get(token, 0.0) + weight
        for found, right in zip(folded, unfold(other.targets), strict=True):
            assert found == pytest.approx(right, abs=1e-6)
    drawn = resampling.resample(pending, Constant())
    assert [one.student_windows for one in drawn] == [((7, 8),) * len(one.positions) for one in pending]


class SameAgain:
    """A student that writes what it has written."""

    def __init__(self, trajectories: list[Trajectory]) -> None:
        self._written = [[*one.prompt_ids.tolist(), *one.response_ids.tolist()] for one in trajectories]

    def continue_prefixes(self, prefixes, num_tokens, *, seeds):
        assert len(set(seeds)) == len(prefixes)
        wholes = [next(ids for ids in self._written if ids[: len(prefix)] == prefix) for prefix in prefixes]
        return [
            np.array(ids[len(prefix) : len(prefix) + num_tokens], np.int32)
            for ids, prefix in zip(wholes, prefixes, strict=True)
        ]


class Constant:
    def continue_prefixes(self, prefixes, num_tokens, *, seeds):
        return [(7, 8) for _ in prefixes]


def test_random_candidates_depend_on_seed_and_trajectory_alone(teacher):
    trajectories = make_trajectories(6)
    looking = look_ahead(teacher, ranking="random")
    chosen = [one.positions.tolist() for one in looking.ask(trajectories)]
    ranked = [one.positions.tolist() for one in look_ahead(teacher).ask(trajectories)]
    assert chosen != ranked and [len(one) for one in chosen] == [len(one) for one in ranked]
    assert [one.positions.tolist() for one in look_ahead(teacher, ranking="random").ask(trajectories[::-1])] == (
        chosen[::-1]
    )


@pytest.mark.parametrize("decoding", ["greedy", "sample"])
def test_a_trajectory_is_guided_alone_as_in_company(teacher, decoding):
    trajectories = make_trajectories(5)
    looking = look_ahead(teacher, teacher_decoding=decoding)
    together = guide(looking, trajectories, 0.5)
    for trajectory, expected in zip(trajectories[::-1], together[::-1], strict=True):
        assert_same(guide(looking, [trajectory], 0.5)[0], expected)


def test_folding_may_run_beside_the_engine(teacher):
    looking = look_ahead(teacher)
    pending = looking.ask(make_trajectories(4))
    found: list[GuidedTrajectory] = []
    thread = Thread(target=lambda: found.extend(looking.fold(pending, 0.5)))
    thread.start()
    looking.ask(make_trajectories(4))
    thread.join()
    for one, other in zip(found, looking.fold(pending, 0.5), strict=True):
        assert_same(one, other)


def test_plain_distillation_asks_for_no_windows(teacher, monkeypatch):
    monkeypatch.setattr(teacher.engine, "continue_prefixes", lambda *_, **__: pytest.fail("nobody needs windows"))
    for guided in guide(look_ahead(teacher, ObjectiveConfig(method="opd")), make_trajectories(3)):
        assert len(guided.windows.positions) == 0 and len(guided.windows.teacher_indptr) == 1
        assert guided.targets.num_guided == 0 and not guided.capped.any()
        assert len(guided.targets.indptr) == guided.trajectory.num_response_tokens + 1
        assert guided.scores.topk_ids.shape[1] == NUM_TOKENS


@pytest.mark.parametrize("cap", ["low_ot", "matched_high_ot"])
def test_caps_look_ahead_without_guiding(teacher, cap):
    looking = look_ahead(teacher, ObjectiveConfig(method="opd", cap=cap))
    pending = looking.ask(make_trajectories(8))
    threshold = float(np.quantile(np.concatenate([one.windows.distances for one in looking.fold(pending, 0.0)]), 0.3))
    guided = looking.fold(pending, threshold)
    assert all(one.targets.num_guided == 0 for one in guided)
    for one in guided:
        low, high = one.windows.positions[~one.windows.divergent], one.windows.positions[one.windows.divergent]
        capped = np.flatnonzero(one.capped)
        if cap == "low_ot":
            assert capped.tolist() == low.tolist()
        else:
            assert set(capped) <= set(high) and len(capped) == min(len(low), len(high))
    assert sum(one.capped.sum() for one in guided) > 0
    for one, other in zip(guided, looking.fold(pending, threshold), strict=True):
        assert_same(one, other)
