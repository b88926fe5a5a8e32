"""pass@1 averaged over runs, with a 95 % confidence interval."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from topd_ray.errors import DataError

_RESAMPLES = 2000
_TAIL = 0.025


@dataclass(frozen=True, slots=True, kw_only=True)
class PassAt1:
    """Share of right answers, in 0..1."""

    mean: float
    low: float
    high: float
    num_prompts: int
    num_runs: int


def pass_at_1(correct: Mapping[str, tuple[bool, ...]], *, seed: int = 0) -> PassAt1:
    """mean = average over prompts of the prompt's share of right answers.

    The interval holds the middle 95 % of 2,000 bootstrap means over prompts: answers to one prompt are not independent,
    so prompts are drawn again, each with all of its runs. Where every answer is right (or wrong) all means are the
    same, and the bound is the exact one for n prompts: 0.025^(1/n), or 1 - 0.025^(1/n).
    Raises DataError without prompts, or where prompts differ in their number of runs.
    """
    num_runs = {len(marks) for marks in correct.values()}
    if len(num_runs) != 1 or 0 in num_runs:
        raise DataError(
            f"found {len(correct)} graded prompts with {sorted(num_runs)} answers each, right would be prompts with "
            "equally many answers, at least one"
        )
    shares = np.array([np.mean(correct[prompt_id]) for prompt_id in sorted(correct)])
    low, high = _interval(shares, seed)
    return PassAt1(mean=float(shares.mean()), low=low, high=high, num_prompts=len(shares), num_runs=num_runs.pop())


def _interval(shares: np.ndarray[tuple[int], np.dtype[np.float64]], seed: int) -> tuple[float, float]:
    edge = float(_TAIL ** (1 / len(shares)))
    if np.all(shares == 1.0):
        return edge, 1.0
    if np.all(shares == 0.0):
        return 0.0, 1.0 - edge
    rng = np.random.default_rng(seed)
    means = [float(rng.choice(shares, len(shares)).mean()) for _ in range(_RESAMPLES)]
    low, high = np.quantile(means, [_TAIL, 1 - _TAIL])
    return float(low), float(high)
