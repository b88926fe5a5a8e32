"""What vLLM is built with, and where it is not."""

from contextlib import nullcontext
from importlib import metadata
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.engine import arg_utils
from vllm.platforms import current_platform
from vllm.v1.engine.llm_engine import LLMEngine

from topd_ray.actors.fleet import RayFleet
from topd_ray.config.load import load_config
from topd_ray.config.schema import RolloutConfig, StudentConfig
from topd_ray.engines import vllm_engine
from topd_ray.errors import ConfigError
from topd_ray.pipeline.inline import InlineFleet

DEMO = Path(__file__).parents[2] / "jobs" / "demo.yaml"
STUDENT = StudentConfig(model="s")


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A vLLM for GPUs whose engines are their arguments."""
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(arg_utils, "EngineArgs", SimpleNamespace)
    monkeypatch.setattr(LLMEngine, "from_engine_args", lambda arguments: arguments)
    return monkeypatch


def build(**fields: Any) -> Any:
    return vllm_engine._build(STUDENT, RolloutConfig(gpu_memory_utilization=0.5, **fields), 8, 0)


@pytest.mark.usefixtures("on_gpu")
def test_a_cache_of_a_given_size_claims_no_share_of_the_memory() -> None:
    measured, given = build(), build(kv_cache_bytes=2**30)
    assert (measured.kv_cache_memory_bytes, measured.gpu_memory_utilization) == (None, 0.5)
    assert (given.kv_cache_memory_bytes, given.gpu_memory_utilization) == (2**30, vllm_engine.SMALL_MEMORY_SHARE)


def test_a_worker_without_a_gpu_cannot_run_the_build_for_gpus(on_gpu: pytest.MonkeyPatch) -> None:
    on_gpu.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"cannot run s: it is built for GPUs.*gpus_per_rollout and gpus_per_teacher"):
        build()


@pytest.mark.parametrize(
    ("installed", "num_gpus", "is_refused"),
    [({"vllm": "0.32.0"}, 0, True), ({"vllm": "0.32.0"}, 1, False), ({"vllm": "0.32.0+cpu"}, 0, False), ({}, 0, False)],
)
def test_a_machine_without_a_gpu_is_told_before_anything_loads(
    monkeypatch: pytest.MonkeyPatch, installed: dict[str, str], num_gpus: int, is_refused: bool
) -> None:
    def version(name: str) -> str:
        if name not in installed:
            raise PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    monkeypatch.setattr(metadata, "version", version)
    config = load_config(DEMO, ["resources.ray_address=null"])
    for check in (RayFleet.check, InlineFleet.check):
        with pytest.raises(ConfigError, match="no GPU is visible") if is_refused else nullcontext():
            check(config)
