"""Batches, engines and comparisons for the tests of the learner.

Axes: T tokens of a response, V vocabulary.
"""

import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch

from tests.tiny import NUM_TOKENS
from topd_ray.config.schema import LearnerConfig, ObjectiveConfig, StudentConfig
from topd_ray.engines.learner import LearnerEngine
from topd_ray.types import Branches, GuidedTrajectory, Metric, SparseTargets, TeacherScores, Trajectory, Windows

TEMPERATURE = 0.7
TOTAL_UPDATES = 10
# With so large an epsilon AdamW's update is nearly lr * gradient: a gradient of the wrong length shows in the weights.
PLAIN_STEPS: Mapping[str, Any] = {
    "learning_rate": 0.1,
    "adam_epsilon": 1.0,
    "gradient_clipping": 0.0,
    "warmup_fraction": 0.0,
    "dtype": "float32",
    "logits_chunk_tokens": 7,
}
LARGE_STEPS = {**PLAIN_STEPS, "learning_rate": 1e-2, "adam_epsilon": 1e-8, "gradient_clipping": 1.0}


def end_rank() -> NoReturn:
    """End the process of a rank that has done its work, together with the others.

    DeepSpeed holds on to the process group after it is destroyed, and an interpreter that goes while gloo's threads are
    there may abort. Ray ends the learner's processes like this as well.
    """
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)


def make_batch(num_trajectories: int, *, top_k: int, seed: int = 0) -> list[GuidedTrajectory]:
    """Random trajectories of 5 to 14 tokens, scored by a random teacher; about every second position is guided."""
    draw = np.random.default_rng(seed)
    return [_make_guided(draw, f"p{index}/0/0", top_k) for index in range(num_trajectories)]


def _make_guided(draw: np.random.Generator, name: str, top_k: int) -> GuidedTrajectory:
    num_tokens = int(draw.integers(5, 15))
    response_ids = draw.integers(0, NUM_TOKENS, num_tokens).astype(np.int32)
    logits_TV = draw.normal(0.0, 2.0, (num_tokens, NUM_TOKENS))
    logprobs_TV = (logits_TV - np.log(np.exp(logits_TV).sum(1, keepdims=True))).astype(np.float32)
    num_targets = draw.integers(0, 2, num_tokens) * 2
    targets = SparseTargets(
        indptr=np.concatenate([[0], np.cumsum(num_targets)]).astype(np.int64),
        token_ids=draw.integers(0, NUM_TOKENS, num_targets.sum()).astype(np.int32),
        weights=np.full(num_targets.sum(), 0.5, np.float32),
        entropy=np.where(num_targets > 0, np.log(2.0), 0.0).astype(np.float32),
    )
    trajectory = Trajectory(
        trajectory_id=name,
        prompt_id=name.split("/")[0],
        sample_index=0,
        epoch=0,
        policy_version=0,
        finish_reason="stop",
        prompt_ids=draw.integers(0, NUM_TOKENS, int(draw.integers(1, 7))).astype(np.int32),
        response_ids=response_ids,
        behaviour_logprobs=np.full(num_tokens, -1.5, np.float32),
    )
    return GuidedTrajectory(
        trajectory=trajectory,
        scores=scores_of(logprobs_TV, response_ids, top_k),
        targets=targets,
        capped=np.zeros(num_tokens, np.bool_),
        windows=Windows.empty(),
    )


def with_branches(guided: GuidedTrajectory, *, seed: int = 0) -> GuidedTrajectory:
    """Branches of 3 and 1 tokens at the first and the fourth position, every token but one guided."""
    draw = np.random.default_rng(seed)
    branches = Branches(
        positions=np.array([0, 3], np.int32),
        indptr=np.array([0, 3, 4], np.int64),
        token_ids=draw.integers(0, NUM_TOKENS, 4).astype(np.int32),
        targets=SparseTargets(
            indptr=np.array([0, 2, 2, 3, 4], np.int64),
            token_ids=draw.integers(0, NUM_TOKENS, 4).astype(np.int32),
            weights=np.array([0.25, 0.75, 1.0, 1.0], np.float32),
            entropy=np.array([-0.25 * np.log(0.25) - 0.75 * np.log(0.75), 0.0, 0.0, 0.0], np.float32),
        ),
    )
    return replace(guided, branches=branches)


def scores_of(logprobs_TV: np.ndarray, response_ids: np.ndarray, top_k: int) -> TeacherScores:
    topk_ids = np.argsort(-logprobs_TV, axis=1)[:, :top_k].astype(np.int32)
    return TeacherScores(
        topk_ids=topk_ids,
        topk_logprobs=np.take_along_axis(logprobs_TV, topk_ids, 1),
        sampled_logprobs=logprobs_TV[np.arange(len(response_ids)), response_ids],
    )


def totals(batch: Sequence[GuidedTrajectory]) -> dict[str, Any]:
    return {
        "num_tokens": float(sum(one.trajectory.num_response_tokens for one in batch)),
        "num_guided": sum(one.num_guided for one in batch),
        "num_trajectories": len(batch),
    }


def make_engine(
    folder: Path, *, steps: Mapping[str, Any] = PLAIN_STEPS, objective: ObjectiveConfig | None = None, **changes: Any
) -> LearnerEngine:
    keys = ("rank", "world_size", "init_method", "timeout_seconds")
    in_group = {key: changes.pop(key) for key in keys if key in changes}
    return LearnerEngine(
        StudentConfig(model=str(folder)),
        LearnerConfig(**{"zero_stage": 0, "max_tokens_per_micro_batch": 40, **steps, **changes}),
        objective or ObjectiveConfig(),
        temperature=TEMPERATURE,
        total_updates=TOTAL_UPDATES,
        threads=1,
        seed=0,
        deterministic=True,
        **in_group,
    )


def weights_of(engine: LearnerEngine) -> dict[str, torch.Tensor]:
    return dict(engine.state_tensors())


def figures(metrics: Sequence[Metric]) -> dict[str, float]:
    return {metric.key: metric.sum / metric.count for metric in metrics}


def assert_equal(found: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> None:
    assert found.keys() == right.keys()
    different = [name for name in right if not torch.equal(found[name], right[name])]
    assert not different


def assert_near(found: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> None:
    assert found.keys() == right.keys()
    for name, tensor in right.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=2e-6, msg=f"{name} differs")


def free_init_method() -> str:
    """An address at which ranks on this machine can meet."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{free.getsockname()[1]}"
