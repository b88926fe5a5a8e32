"""The mathematics of Trajectory-aware on-policy distillation, in plain numpy, numba and torch.

Read in the order of the data's way: candidates, transport, targets, divergence, loss.
"""

from topd_ray.objective.candidates import select_candidates, token_loss
from topd_ray.objective.divergence import Support, divergence, sampled_policy_gradient
from topd_ray.objective.loss import LossBatch, LossMetrics, LossSpec, student_logprobs, topd_loss
from topd_ray.objective.targets import (
    RunningQuantile,
    cap_mask,
    classify,
    fold_windows,
    split_targets,
    unfold,
)
from topd_ray.objective.transport import (
    TransportResult,
    entropic_transport,
    exact_transport,
    ground_cost,
    pad_windows,
    solve_windows,
    unit_embeddings,
)

__all__ = [
    "LossBatch",
    "LossMetrics",
    "LossSpec",
    "RunningQuantile",
    "Support",
    "TransportResult",
    "cap_mask",
    "classify",
    "divergence",
    "entropic_transport",
    "exact_transport",
    "fold_windows",
    "ground_cost",
    "pad_windows",
    "sampled_policy_gradient",
    "select_candidates",
    "solve_windows",
    "split_targets",
    "student_logprobs",
    "token_loss",
    "topd_loss",
    "unfold",
    "unit_embeddings",
]
