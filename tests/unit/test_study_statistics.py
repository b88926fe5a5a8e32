"""Intervals hold what they promise, and the figures agree with their definitions."""

import math

import numpy as np
import pytest
from scipy import stats

from topd_ray.errors import DataError
from topd_ray.studies.statistics import (
    FEWEST,
    area_under_roc,
    bootstrap,
    pearson,
    spearman,
)


def mean(values: np.ndarray) -> float:
    return float(values.mean())


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    samples = [rng.exponential(1.0, 80) for _ in range(100)]
    found = [bootstrap(mean, sample) for sample in samples]
    held = sum(one.low <= 1.0 <= one.high for one in found if one.low is not None and one.high is not None)
    assert 87 <= held <= 99
    widths = [one.high - one.low for one in found if one.low is not None and one.high is not None]
    assert np.mean(widths) == pytest.approx(2 * 1.96 / math.sqrt(80), rel=0.1)


def test_rows_that_belong_together_are_drawn_together() -> None:
    """Each of 60 clusters holds the same value 10 times: 600 rows that say no more than 60."""
    values = np.random.default_rng(1).normal(size=60)
    rows, clusters = np.repeat(values, 10), np.repeat(np.arange(60), 10)
    order = np.random.default_rng(2).permutation(600)
    alone, together = bootstrap(mean, rows), bootstrap(mean, rows[order], clusters=clusters[order])
    assert alone.low is not None and alone.high is not None and together.low is not None and together.high is not None
    assert together.value == pytest.approx(alone.value) and together.n == 600
    assert (together.high - together.low) / (alone.high - alone.low) == pytest.approx(math.sqrt(10), rel=0.15)
    by_cluster = bootstrap(mean, values)
    assert (together.low, together.high) == pytest.approx((by_cluster.low, by_cluster.high), abs=1e-12)


def test_paired_rows_stay_paired() -> None:
    """y - x is 1 in every row, so no resample of pairs has another mean difference."""
    x = np.random.default_rng(3).normal(0.0, 10.0, 50)
    paired = bootstrap(lambda x, y: float((y - x).mean()), x, x + 1.0)
    assert (paired.value, paired.low, paired.high) == pytest.approx((1.0, 1.0, 1.0))
    apart = bootstrap(lambda x, y: float((y - x).mean()), x, np.roll(x, 1) + 1.0)
    assert apart.value == pytest.approx(1.0) and apart.low is not None and apart.low < 0.0


def test_too_few_observations_or_clusters_give_no_interval() -> None:
    few = bootstrap(mean, np.arange(FEWEST - 1))
    assert (few.value, few.low, few.high, few.n) == (9.0, None, None, FEWEST - 1)
    assert bootstrap(mean, np.arange(FEWEST)).low is not None
    assert bootstrap(mean, np.arange(100), clusters=np.arange(100) % (FEWEST - 1)).low is None


def test_a_statistic_that_is_nowhere_finite_gives_no_interval() -> None:
    constant = bootstrap(pearson, np.ones(40), np.arange(40))
    assert math.isnan(constant.value) and constant.low is None
    assert constant.to_json() == {"value": None, "low": None, "high": None, "n": 40}


def test_columns_that_do_not_fit_are_refused() -> None:
    with pytest.raises(DataError, match=r"\(3,\).*\(4,\)"):
        bootstrap(pearson, np.zeros(3), np.zeros(4))
    with pytest.raises(DataError, match="at least 1"):
        bootstrap(mean, [])
    with pytest.raises(DataError, match="one number for each of 3 rows"):
        bootstrap(mean, np.zeros(3), clusters=[0, 1])


def test_the_same_seed_gives_the_same_interval() -> None:
    values = np.random.default_rng(4).normal(size=30)
    assert bootstrap(mean, values, seed=5) == bootstrap(mean, values, seed=5) != bootstrap(mean, values, seed=6)


def test_correlations_are_those_of_scipy() -> None:
    rng = np.random.default_rng(5)
    x, y = rng.integers(0, 6, 50).astype(float), rng.normal(size=50)
    assert pearson(x, y) == pytest.approx(stats.pearsonr(x, y).statistic)
    assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)


def test_the_area_is_the_share_of_pairs_won() -> None:
    rng = np.random.default_rng(6)
    positive, negative = rng.integers(0, 8, 23).astype(float), rng.integers(0, 6, 31).astype(float)
    won = [1.0 if a > b else 0.5 if a == b else 0.0 for a in positive for b in negative]
    assert area_under_roc(positive, negative) == pytest.approx(np.mean(won))
    assert area_under_roc(np.array([2.0, 3.0]), np.array([0.0, 1.0])) == 1.0
