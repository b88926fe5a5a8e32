"""How well distance and loss tell real forks from harmless mismatches, where labels say what a mismatch means.

Each figure is of the rows that are given alone, its threshold and quartile too. Intervals resample prompts.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from topd_ray.demo.worded_labels import FORKS
from topd_ray.studies.probe.columns import Bools, Probed
from topd_ray.studies.statistics import Floats, Interval, area_under_roc, bootstrap

QUARTILE = 0.75
HARMLESS, UNDECIDED = "harmless", "undecided"
DECIDED = (HARMLESS, *FORKS)
CODES: Mapping[str, float] = {label: float(code) for code, label in enumerate(DECIDED)}
"""Labels as a bootstrap takes them: harmless is 0, forks are above, whatever is undecided or unlabelled is -1."""
SCORES = ("distance", "loss", "position_cost")
"""What is compared as a detector of forks."""
SCORES_BY_LABEL = ("distance", "loss")
LOSS_QUANTILES = (0.05, 0.5, 0.95)


def detect(probed: Probed, quantile: float) -> dict[str, Any] | None:
    """How well the distance tells real forks (labels `choice` and `error`) from harmless mismatches; None unlabelled.

    The threshold is the `quantile` of all high-loss distances; above it, a position is taken for a fork. Precision:
    share of forks among those taken for one; recall: share of the forks that are. Undecided ones count for the
    threshold and nowhere else. AUC: probability that a fork has the larger score than a harmless mismatch; `auc_of`:
    the same of the forks of one label. `false_alarms` (by the paper's definition) and `unguided` (at or below the
    threshold: training caps them, or leaves them unguided): their labels, and the share of harmless ones.
    `loss_quantiles` (nats) by label: order statistics, so that an infinite loss counts.
    """
    high = probed.of_kind("high")
    if not np.any(probed.label[high] != ""):
        return None
    of_high = probed.where(high)
    distance, code = of_high.distance, _codes(of_high.label)
    contrast = probed.where(high | probed.of_kind("low"))
    alarms = is_false_alarm(contrast.distance, contrast.of_kind("high"))

    def over(statistic: Callable[..., float], *columns: NDArray[Any], of: Probed = of_high) -> Interval:
        return bootstrap(statistic, *columns, clusters=of.prompt)

    def is_above(distance: Floats) -> Bools:
        above: Bools = distance > np.quantile(distance, quantile)
        return above

    def fork_share(code: Floats) -> float:
        return share(code[code >= 0] > 0)

    return {
        "prompts": int(np.unique(of_high.prompt).size),
        "labels": _counts(of_high.label),
        "threshold": float(np.quantile(distance, quantile)),
        "fork_share": over(fork_share, code),
        "precision": over(lambda distance, code: fork_share(code[is_above(distance)]), distance, code),
        "recall": over(lambda distance, code: share(is_above(distance)[code > 0]), distance, code),
        "auc": {score: over(_area, getattr(of_high, score), code) for score in SCORES},
        "auc_of": {fork: _areas(of_high, fork) for fork in FORKS},
        "false_alarms": {
            "labels": _counts(contrast.label[alarms]),
            "harmless": over(
                lambda distance, is_high, code: _harmless_share(code[is_false_alarm(distance, is_high > 0)]),
                *(contrast.distance, contrast.of_kind("high"), _codes(contrast.label)),
                of=contrast,
            ),
        },
        "unguided": {
            "labels": _counts(of_high.label[~is_above(distance)]),
            "harmless": over(lambda distance, code: _harmless_share(code[~is_above(distance)]), distance, code),
        },
        "loss_quantiles": {label: _loss_quantiles(of_high, label) for label in DECIDED},
    }


def is_false_alarm(distance: Floats, is_high: Bools) -> Bools:
    """The high-loss distances below the upper quartile of the others, the low-loss ones; none where there are none."""
    low = distance[~is_high]
    alarms: Bools = is_high & (distance < (np.quantile(low, QUARTILE) if low.size else -np.inf))
    return alarms


def share(marks: Bools) -> float:
    """Of those that are marked; NaN of none."""
    return float(marks.mean()) if marks.size else float("nan")


def _codes(label: NDArray[np.str_]) -> Floats:
    return np.select([label == one for one in CODES], list(CODES.values()), -1.0)


def _counts(label: NDArray[np.str_]) -> dict[str, int]:
    return {name: int((label == name).sum()) for name in (*DECIDED, UNDECIDED)}


def _harmless_share(code: Floats) -> float:
    return share(code[code >= 0] == CODES[HARMLESS])


def _area(score: Floats, code: Floats) -> float:
    """NaN where there are no forks or nothing harmless."""
    fork, harmless = score[code > 0], score[code == CODES[HARMLESS]]
    return area_under_roc(fork, harmless) if fork.size and harmless.size else float("nan")


def _areas(of_high: Probed, fork: str) -> dict[str, Interval]:
    """Of the forks of one label against all harmless mismatches, by score."""
    code = _codes(np.where(np.isin(of_high.label, (fork, HARMLESS)), of_high.label, UNDECIDED))
    return {
        score: bootstrap(_area, getattr(of_high, score), code, clusters=of_high.prompt) for score in SCORES_BY_LABEL
    }


def _loss_quantiles(of_high: Probed, label: str) -> dict[str, Interval]:
    """By quantile; none where no position has the label."""
    own = of_high.where(of_high.label == label)
    if not own.loss.size:
        return {}
    return {f"{one:g}": bootstrap(_order_statistic(one), own.loss, clusters=own.prompt) for one in LOSS_QUANTILES}


def _order_statistic(quantile: float) -> Callable[[Floats], float]:
    return lambda values: float(np.quantile(values, quantile, method="inverted_cdf"))
