"""What the learner makes of trajectories that an older policy than its own wrote."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.integration.test_learner import STALENESS_KEYS, UNWEIGHTED, plain_loss, plain_weights
from tests.learner_case import assert_equal, assert_near, figures, make_batch, make_engine, totals, weights_of
from tests.tiny import NUM_TOKENS, load_tiny_model, make_tiny_model, plain_logprobs
from topd_ray.config.schema import ObjectiveConfig
from topd_ray.engines.learner import LearnerEngine
from topd_ray.errors import NonFiniteLossError
from topd_ray.types import Float32, GuidedTrajectory

pytestmark = pytest.mark.usefixtures("no_process_group_left")
NEAR = ObjectiveConfig(importance_clip=1.7, importance_horizon=3)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("student"), seed=0, tied=True)


def written(
    batch: Sequence[GuidedTrajectory], version: int, logprobs: Sequence[Float32] | None = None
) -> list[GuidedTrajectory]:
    """`batch` as written by this version, with these log-probs."""
    behaviour = logprobs or [one.trajectory.behaviour_logprobs for one in batch]
    return [
        replace(one, trajectory=replace(one.trajectory, policy_version=version, behaviour_logprobs=own))
        for one, own in zip(batch, behaviour, strict=True)
    ]


def updated(folder: Path, objective: ObjectiveConfig | None = None, **changes: object) -> LearnerEngine:
    """A learner at version 1."""
    engine = make_engine(folder, objective=objective, **changes)
    first = make_batch(3, top_k=6, seed=7)
    engine.learn(first, **totals(first))
    return engine


@pytest.mark.parametrize("budget", [40, "one_trajectory"])
def test_loss_and_gradient_are_those_of_the_plain_weighted_loss(
    student: Path, monkeypatch: pytest.MonkeyPatch, budget: int | str
) -> None:
    """Four of six trajectories are stale, and their log-probs are off by 0.5 at random."""
    batch, draw = make_batch(6, top_k=NUM_TOKENS), np.random.default_rng(0)
    engine = updated(student, NEAR, max_tokens_per_micro_batch=budget)
    logprobs = engine.logprobs([one.trajectory for one in batch])
    shifted = [(one + draw.normal(0.0, 0.5, len(one))).clip(max=-1e-3).astype(np.float32) for one in logprobs]
    batch = [
        one
        for start, stop, version in ((0, 2, 0), (2, 3, 1), (3, 5, 0), (5, 6, 1))
        for one in written(batch[start:stop], version, shifted[start:stop])
    ]
    model = load_tiny_model(student)
    model.load_state_dict(weights_of(engine), strict=False)
    model.tie_weights()
    gradients: dict[str, torch.Tensor] = {}

    def capture(self: LearnerEngine) -> float:
        gradients.update({name: one.grad.double() for name, one in self._model.named_parameters()})
        return 0.0

    before = engine.loss(batch, **totals(batch))
    monkeypatch.setattr(LearnerEngine, "_step", capture)
    found = figures(engine.learn(batch, **totals(batch)))
    engine.shutdown()

    loss = plain_loss(model.double(), batch, NEAR, policy_version=1)
    loss.backward()
    assert [before, found["loss/total"]] == pytest.approx([loss.item()] * 2, rel=1e-5)
    assert abs(plain_loss(model, batch, NEAR).item() / loss.item() - 1.0) > 0.05
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert (gradients[name] - parameter.grad).norm() / parameter.grad.norm() < 1e-4, name
    weights = []
    for one in (one.trajectory for one in batch if one.trajectory.policy_version == 0):
        student_TV = plain_logprobs(model, one.prompt_ids, one.response_ids, 0.7)
        weights += plain_weights(student_TV, one, NEAR)
    clipped = np.mean([weight == NEAR.importance_clip for weight in weights])
    assert 0.05 < clipped < 0.95
    assert found["staleness/importance_weight"] == pytest.approx(np.mean(weights), rel=1e-4)
    assert found["staleness/importance_clipped"] == pytest.approx(clipped)
    assert found["loss/total"] == pytest.approx(
        found["loss/opd"] + NEAR.guidance_weight * found["loss/guidance"], rel=1e-5
    )


@pytest.mark.parametrize("stage", [0, 3])
def test_an_older_policy_that_wrote_as_this_one_would_changes_nothing(student: Path, stage: int) -> None:
    """Up to the rounding of log-probs: sums of up to 14 differences of float32 values near -4, each within 2e-6."""
    batch = make_batch(5, top_k=6)
    after = []
    for version in (0, 1):
        engine = updated(student, zero_stage=stage)
        logprobs = engine.logprobs([one.trajectory for one in batch])
        mixed = [*written(batch[:3], version, logprobs[:3]), *written(batch[3:], 1, logprobs[3:])]
        after.append((figures(engine.learn(mixed, **totals(mixed))), weights_of(engine)))
        engine.shutdown()
    (stale, stale_weights), (fresh, fresh_weights) = after
    assert stale.pop("staleness/importance_weight") == pytest.approx(1.0, abs=3e-5)
    assert stale.pop("staleness/importance_clipped") == 0.0
    assert stale == pytest.approx(fresh, rel=3e-5, abs=1e-6)
    assert_near(stale_weights, fresh_weights)


def test_a_horizon_of_zero_trains_on_stale_tokens_as_on_new_ones(student: Path) -> None:
    """Bit by bit; and on new ones there are no weights, whatever the horizon."""
    batch = make_batch(4, top_k=6)
    after = []
    for version, objective in ((0, UNWEIGHTED), (1, UNWEIGHTED), (1, ObjectiveConfig())):
        engine = updated(student, objective)
        own = written(batch, version)
        after.append((figures(engine.learn(own, **totals(own))), weights_of(engine)))
        engine.shutdown()
    for metrics, weights in after:
        assert metrics == after[0][0] and not metrics.keys() & STALENESS_KEYS
        assert_equal(weights, after[0][1])


def test_a_student_of_nan_is_found_out_by_all_ranks_together(student: Path) -> None:
    """Not by the rank that weighs a stale trajectory, alone."""
    engine = updated(student)
    with torch.no_grad():
        engine._model.model.norm.weight.fill_(torch.nan)
    batch = make_batch(2, top_k=6)
    with pytest.raises(NonFiniteLossError, match="update 2: the loss is nan over the trajectories"):
        engine.learn(batch, **totals(batch))
    engine.shutdown()
