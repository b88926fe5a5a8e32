"""Frozen records that cross rooms.

Axes: T response tokens of one trajectory, K top teacher tokens, P guided positions, M windows, B branches.
Log-probabilities are natural (nats), float32, of the distribution at the rollout's temperature.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Literal

import numpy as np
from numpy.typing import NDArray

FinishReason = Literal["stop", "length"]
Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]
Float32 = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One prompt as token ids, the chat template already applied."""

    prompt_id: str
    token_ids: tuple[int, ...]
    answer: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutRequest:
    """One sample to draw: the seed is bound to (run seed, prompt, sample, epoch)."""

    prompt: Prompt
    sample_index: int
    epoch: int
    seed: int

    @property
    def trajectory_id(self) -> str:
        return f"{self.prompt.prompt_id}/{self.epoch}/{self.sample_index}"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trajectory:
    """What the student wrote after one prompt."""

    trajectory_id: str
    prompt_id: str
    sample_index: int
    epoch: int
    policy_version: int
    """of the oldest token: where generation was interrupted for new weights, later tokens are of later versions"""
    finish_reason: FinishReason
    prompt_ids: Int32
    """[prompt tokens]"""
    response_ids: Int32
    """[T], the end-of-sequence token included only if the student wrote it"""
    behaviour_logprobs: Float32
    """[T], of the sampled tokens, each under the policy that drew it (nats)"""

    @property
    def num_response_tokens(self) -> int:
        return len(self.response_ids)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TeacherScores:
    """The teacher's distribution at every response position, cut to its top K tokens."""

    topk_ids: Int32
    """[T, K], most likely first"""
    topk_logprobs: Float32
    """[T, K] (nats)"""
    sampled_logprobs: Float32
    """[T], of the student's token (nats)"""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SparseTargets:
    """All windows of one trajectory, folded into one sparse target per response position (CSR).

    Position p learns w_p(v) = sum over the windows covering p of y~(v); `entropy` keeps what the cross-entropy with w
    lacks to be the sum of the windows' KL divergences.
    """

    indptr: Int64
    """[T + 1], row pointers into token_ids and weights"""
    token_ids: Int32
    """[nonzeros]"""
    weights: Float32
    """[nonzeros]; the weights of row p sum to the number of windows covering p"""
    entropy: Float32
    """[T], sum over the windows covering p of the entropy of y~ (nats)"""

    @property
    def num_guided(self) -> float:
        """How many (window, position) pairs the targets hold: the sum of all weights."""
        return float(self.weights.sum(dtype=np.float64))

    @classmethod
    def empty(cls, num_tokens: int) -> "SparseTargets":
        """Targets that guide no position of a response of `num_tokens` tokens."""
        return cls(
            indptr=np.zeros(num_tokens + 1, np.int64),
            token_ids=np.zeros(0, np.int32),
            weights=np.zeros(0, np.float32),
            entropy=np.zeros(num_tokens, np.float32),
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Windows:
    """The near futures looked at along one trajectory, one row per candidate position."""

    positions: Int32
    """[M], response positions where the windows start, ascending"""
    distances: Float32
    """[M], optimal-transport distance between teacher and student window"""
    divergent: NDArray[np.bool_]
    """[M], true where the futures really part"""
    teacher_indptr: Int64
    """[M + 1], row pointers into teacher_ids"""
    teacher_ids: Int32
    """the teacher's continuations, one after the other"""

    @classmethod
    def empty(cls) -> "Windows":
        return cls(
            positions=np.zeros(0, np.int32),
            distances=np.zeros(0, np.float32),
            divergent=np.zeros(0, np.bool_),
            teacher_indptr=np.zeros(1, np.int64),
            teacher_ids=np.zeros(0, np.int32),
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Branches:
    """Near futures that the learner guides in a context of their own: a prefix of the trajectory, then other tokens.

    Only the guidance applies there; the distillation of the trajectory does not.
    """

    positions: Int32
    """[B], response positions at which the branches leave the trajectory, ascending"""
    indptr: Int64
    """[B + 1], row pointers into token_ids"""
    token_ids: Int32
    """the branches' own tokens, one after the other, at least one each"""
    targets: SparseTargets
    """over all of token_ids"""

    @classmethod
    def empty(cls) -> "Branches":
        return cls(
            positions=np.zeros(0, np.int32),
            indptr=np.zeros(1, np.int64),
            token_ids=np.zeros(0, np.int32),
            targets=SparseTargets.empty(0),
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GuidedTrajectory:
    """A trajectory with all that the learner needs from the teacher."""

    trajectory: Trajectory
    scores: TeacherScores
    targets: SparseTargets
    capped: NDArray[np.bool_]
    """[T], true where the token's loss is capped at the trajectory's median (the paper's ablation)"""
    windows: Windows
    branches: Branches = field(default_factory=Branches.empty)

    @property
    def num_guided(self) -> float:
        """(window, position) pairs that the teacher guides, along the trajectory and on its branches."""
        return self.targets.num_guided + self.branches.targets.num_guided

    @property
    def num_branch_tokens(self) -> int:
        """Tokens that the learner's forward passes over the branches take, their prefixes included."""
        num_branches = len(self.branches.positions)
        prefixes = num_branches * len(self.trajectory.prompt_ids) + int(self.branches.positions.sum(dtype=np.int64))
        return prefixes + len(self.branches.token_ids)

    @property
    def num_bytes(self) -> int:
        """Bytes of all arrays together."""
        parts = (self.trajectory, self.scores, self.targets, self.windows, self.branches, self.branches.targets)
        values = [getattr(part, one.name) for part in parts for one in fields(part)]
        return self.capped.nbytes + sum(value.nbytes for value in values if isinstance(value, np.ndarray))


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """A figure as sum and count, so that reducing over workers is a weighted mean and never a mean of means."""

    key: str
    sum: float
    count: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateReport:
    """What one learner update did."""

    policy_version: int
    metrics: Sequence[Metric]


@dataclass(frozen=True, slots=True, kw_only=True)
class Completions:
    """Graded answers of an evaluation: correct[prompt_id] holds one entry a run."""

    correct: Mapping[str, tuple[bool, ...]]
    num_tokens: int
    num_cut: int
    """answers cut by the length limit"""
