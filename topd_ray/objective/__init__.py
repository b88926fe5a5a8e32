"""The mathematics of Trajectory-aware on-policy distillation, in plain numpy, numba and torch.

Read in the order of the data's way: candidates, transport, targets, divergence, loss. Nothing here needs Ray, vLLM or
DeepSpeed. This is all of the public API; each name's docstring gives formula, shapes, units, errors and source.

| name | what it is |
| --- | --- |
| `token_loss` | loss of each sampled token that ranks candidates |
| `select_candidates` | the positions of highest loss |
| `random_candidates` | as many positions at random |
| `unit_embeddings` | embeddings of unit length |
| `pad_windows` | windows of different lengths as one array |
| `ground_cost` | 1 - cosine of all pairs of tokens, for all pairs of windows |
| `exact_transport` | plans and distances of all pairs of windows |
| `entropic_transport` | the same with entropic regularisation |
| `solve_windows` | either |
| `TransportResult` | plans and distances |
| `classify` | which candidates are real divergent points |
| `RunningQuantile` | the threshold of that over recent steps |
| `cap_mask` | the tokens whose loss is capped (ablations) |
| `identity_plans` | plans that pair tokens by their place, to compare transport with |
| `fold_windows` | all windows of a trajectory as one sparse target per position |
| `split_targets` | folded targets of trajectories laid end to end, each on its own |
| `unfold` | folded targets in readable form |
| `full_divergence` | reverse KL, forward KL or JSD over the whole vocabulary, from logits |
| `topk_divergence` | the same on the teacher's top-k and one tail |
| `sampled_divergence` | the same on the sampled token and all others |
| `divergence` | the same from log-probs on any common columns |
| `Support` | the columns of top-k, sampled token and tail |
| `sampled_policy_gradient` | the sampled-token estimate of the reverse KL's gradient |
| `discounted_advantages` | its advantages with the discounted future of each token in them |
| `topd_loss` | L_OPD + lambda * L_traj from hidden states and the head's weight |
| `LossSpec` | how it is put together |
| `LossBatch` | what the teacher said about the tokens |
| `LossMetrics` | its figures |
| `token_losses` | the losses of single tokens that caps are measured by |
| `trajectory_medians` | their medians over trajectories, also over parts of these |
| `student_logprobs` | log-probs of given tokens under the student |
| `prefix_weights` | importance weights of positions whose prefix an older policy wrote |
| `SparseTargets` | what `fold_windows` returns: weights of tokens, one row a position |
| `DataError` | raised for arguments that cannot be right |
| `NonFiniteLossError` | raised for a loss that is NaN or infinite |
"""

from topd_ray.errors import DataError, NonFiniteLossError
from topd_ray.objective.candidates import random_candidates, select_candidates, token_loss
from topd_ray.objective.divergence import (
    Support,
    discounted_advantages,
    divergence,
    full_divergence,
    sampled_divergence,
    sampled_policy_gradient,
    topk_divergence,
)
from topd_ray.objective.importance import prefix_weights
from topd_ray.objective.loss import (
    LossBatch,
    LossMetrics,
    LossSpec,
    student_logprobs,
    token_losses,
    topd_loss,
    trajectory_medians,
)
from topd_ray.objective.targets import (
    RunningQuantile,
    cap_mask,
    classify,
    fold_windows,
    identity_plans,
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
from topd_ray.types import SparseTargets

__all__ = [
    "DataError",
    "LossBatch",
    "LossMetrics",
    "LossSpec",
    "NonFiniteLossError",
    "RunningQuantile",
    "SparseTargets",
    "Support",
    "TransportResult",
    "cap_mask",
    "classify",
    "discounted_advantages",
    "divergence",
    "entropic_transport",
    "exact_transport",
    "fold_windows",
    "full_divergence",
    "ground_cost",
    "identity_plans",
    "pad_windows",
    "prefix_weights",
    "random_candidates",
    "sampled_divergence",
    "sampled_policy_gradient",
    "select_candidates",
    "solve_windows",
    "split_targets",
    "student_logprobs",
    "token_loss",
    "token_losses",
    "topd_loss",
    "topk_divergence",
    "trajectory_medians",
    "unfold",
    "unit_embeddings",
]
