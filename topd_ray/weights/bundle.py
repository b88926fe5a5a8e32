"""What a learner says of a policy version it offers, and what an engine says of the one it has taken."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from topd_ray.types import Metric
from topd_ray.weights.checksum import Fingerprint, WeightReceipt, fingerprint

Named = tuple[str, torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsBundle:
    """A policy version ready to be fetched by the rollout engines. It holds no weights itself."""

    version: int
    num_bytes: int
    """of all tensors in the rollout engines' dtype: the size of the model"""
    checksum: int
    """of all tensors (`checksum.Fingerprint`)"""
    content: Any
    """what the channel that made the bundle needs to fetch it"""
    metrics: tuple[Metric, ...] = ()
    """`weights/...`: seconds and bytes of the learner's side"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """Named tensors for an engine with the fingerprint of just these, so that nobody has to read them twice."""

    tensors: Sequence[Named]
    fingerprint: Fingerprint
    metrics: tuple[Metric, ...] = ()
    """`weights/...` of the way here"""

    @classmethod
    def of(cls, tensors: "Iterable[Named] | Delivery") -> "Delivery":
        """`tensors`, read once here if they are not a delivery yet."""
        if isinstance(tensors, Delivery):
            return tensors
        named = list(tensors)
        return cls(tensors=named, fingerprint=fingerprint(named))

    def named(self) -> Sequence[Named]:
        """Names and shapes, and here the values as well."""
        return self.tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class IpcDelivery:
    """Tensors that an engine reads out of its GPU's memory itself."""

    shapes: Mapping[str, tuple[int, ...]]
    fields: Mapping[str, Any]
    """of vLLM's IPCWeightTransferUpdateInfo"""
    expected: tuple[int, int]
    """number of bytes and checksum, known to hold only once all is read"""
    metrics: tuple[Metric, ...] = ()

    def named(self) -> Sequence[Named]:
        """Names and shapes, without values."""
        return [(name, torch.empty(shape, device="meta")) for name, shape in self.shapes.items()]


def timed(stage: str, seconds: float) -> tuple[Metric, ...]:
    """Seconds of a stage: pack, fetch or load."""
    return (Metric(key=f"weights/seconds_{stage}", sum=seconds),)


def weight_metrics(bundle: WeightsBundle, receipts: Iterable[WeightReceipt]) -> list[Metric]:
    """The figures of one publication, those of the engines as means over them."""
    metrics = [Metric(key="weights/bytes", sum=bundle.num_bytes), *bundle.metrics]
    return metrics + [metric for receipt in receipts for metric in receipt.metrics]
