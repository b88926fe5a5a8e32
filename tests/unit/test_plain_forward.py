"""The plain forward pass an engine's scores are held against."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from topd_ray.config.schema import ModelConfig
from topd_ray.engines import plain_forward
from topd_ray.types import TeacherScores


class UniformNetwork:
    """Every token of four is as likely as any other."""

    def eval(self) -> "UniformNetwork":
        return self

    def __call__(self, ids: torch.Tensor, logits_to_keep: int) -> SimpleNamespace:
        return SimpleNamespace(logits=torch.zeros(1, logits_to_keep, 4))


@pytest.fixture(autouse=True)
def uniform(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain_forward.AutoModelForCausalLM, "from_pretrained", lambda *args, **kwargs: UniformNetwork())


def difference(sampled: list[float], topk: list[list[float]]) -> float:
    scores = TeacherScores(
        topk_ids=np.zeros((len(topk), 1), np.int32),
        topk_logprobs=np.array(topk, np.float32),
        sampled_logprobs=np.array(sampled, np.float32),
    )
    even = np.full(2, -np.log(4.0), np.float32)
    agreeing = TeacherScores(topk_ids=np.zeros((2, 1), np.int32), topk_logprobs=even[:, None], sampled_logprobs=even)
    pairs = [([0, 1], [2, 3])] * 3
    return plain_forward.largest_difference(ModelConfig(model="m"), pairs, [agreeing, scores, agreeing], 1.0, 4)


def test_the_largest_difference_is_found() -> None:
    even = -float(np.log(4.0))
    assert difference([even, even], [[even], [even]]) == pytest.approx(0.0, abs=1e-6)
    assert difference([even, even - 0.5], [[even], [even]]) == pytest.approx(0.5, abs=1e-6)
    assert difference([even, even], [[even + 0.25], [even]]) == pytest.approx(0.25, abs=1e-6)


@pytest.mark.parametrize(("sampled", "topk"), [(float("nan"), -1.0), (-1.0, float("nan"))])
def test_nan_is_not_hidden(sampled: float, topk: float) -> None:
    assert np.isnan(difference([-1.0, sampled], [[-1.0], [topk]]))
