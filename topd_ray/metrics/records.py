"""Metric records, reduced once."""

from collections.abc import Iterable

from topd_ray.types import Metric


def reduce(metrics: Iterable[Metric]) -> dict[str, float]:
    """Sum of sums over sum of counts, by key, in the order of first appearance.

    A key that nothing was counted for is left out: there is no mean of nothing.
    """
    sums: dict[str, float] = {}
    counts: dict[str, float] = {}
    for metric in metrics:
        sums[metric.key] = sums.get(metric.key, 0.0) + metric.sum
        counts[metric.key] = counts.get(metric.key, 0.0) + metric.count
    return {key: float(sums[key] / counts[key]) for key in sums if counts[key] != 0}
