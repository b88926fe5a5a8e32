"""What runs inside vLLM's workers, which import this module by name (`worker_extension_cls`)."""

import inspect
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine
from vllm.model_executor.layers.attention import is_deferred_attention_layer
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm.platforms import current_platform
from vllm.v1.sample import sampler

import topd_ray.engines.cpu_norms  # noqa: F401  (registers them)
from topd_ray.engines.process import finish_on_gpu
from topd_ray.errors import WeightSyncError
from topd_ray.weights.checksum import Fingerprint, fingerprint

WEIGHT_BACKEND = "topd_memory"


class WorkerExtension:
    """Methods vLLM mixes into its worker class."""

    model_runner: Any
    weight_transfer_engine: Any
    use_v2_model_runner: bool

    def shape_logits(self, temperature: float, vocabulary_size: int) -> int:
        """Make the model's logits float32, divided by `temperature`, and -inf above `vocabulary_size`.

        Sampling and scoring then see one distribution, the one at the rollout's temperature over real tokens. Returns
        how many logits processors the model has: 1 where this can work.
        """
        found = [module for module in self.model_runner.get_model().modules() if isinstance(module, LogitsProcessor)]

        def shape(_module: nn.Module, _inputs: Any, logits_NV: torch.Tensor | None) -> torch.Tensor | None:
            if logits_NV is None:
                return None
            shaped_NV = logits_NV.float()
            if temperature != 1.0:
                shaped_NV /= temperature
            shaped_NV[..., vocabulary_size:] = -torch.inf
            return shaped_NV

        for processor in found:
            processor.register_forward_hook(shape)
        return len(found)

    def received_weights(self) -> Fingerprint:
        """See MemoryTransfer.received."""
        return self.weight_transfer_engine.received

    def keep_seeds_while_prefilling(self) -> None:
        """Let a seeded request on a CPU draw nothing before its prompt is whole.

        vLLM samples after every chunk of a prompt, throws the token away, and winds the request's generator back by an
        offset, which only GPU generators have: a seeded request with a chunked prompt would end the engine.
        """
        runner = self.model_runner
        if not current_platform.is_cpu() or self.use_v2_model_runner:
            return
        sample_tokens = runner.sample_tokens

        def sample_finished_prompts(grammar_output: Any) -> Any:
            generators = runner.input_batch.generators
            is_partial = runner.discard_request_mask.np[: runner.input_batch.num_reqs]
            kept = {row: generators.pop(row) for row in list(generators) if is_partial[row]}
            try:
                return sample_tokens(grammar_output)
            finally:
                generators.update(kept)

        runner.sample_tokens = sample_finished_prompts

    def count_ranks_uncompiled(self) -> None:
        """Let an eager engine on a CPU count the ranks of tokens without torch.compile.

        vLLM compiles that one line whatever `enforce_eager` says, and a call then costs more than the counting: 3 % of
        a small model's decoding.
        """
        if current_platform.is_cpu() and self.model_runner.model_config.enforce_eager:
            sampler.batched_count_greater_than = inspect.unwrap(sampler.batched_count_greater_than)


@dataclass
class MemoryInit(WeightTransferInitInfo):
    """Nothing to agree on."""


@dataclass
class MemoryUpdate(WeightTransferUpdateInfo):
    """A part of a policy, one or the other."""

    weights: list[tuple[str, torch.Tensor]] = field(default_factory=list)
    """Hugging Face names and tensors, on any device"""
    ipc: dict[str, Any] | None = None
    """fields of vLLM's own IPCWeightTransferUpdateInfo: where the tensors are in the memory of this worker's GPU"""


class MemoryTransfer(WeightTransferEngine[MemoryInit, MemoryUpdate]):
    """Weights that are in this process's memory already, come with the call, or are in the memory of this GPU."""

    init_info_cls = MemoryInit
    update_info_cls = MemoryUpdate
    received = Fingerprint()
    """of what vLLM's IPC engine has handed to the model since the update started"""

    def init_transfer_engine(self, init_info: MemoryInit) -> None:
        """Nothing to connect."""

    def start_weight_update(self) -> None:
        self.received = Fingerprint()
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: MemoryUpdate) -> None:
        if update_info.ipc is None:
            self.model.load_weights(update_info.weights)
            return
        through = IPCWeightTransferEngine(self.config, self.vllm_config, self.device, cast(nn.Module, self))
        through.receive_weights(through.parse_update_info(update_info.ipc))
        through.shutdown()

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """What vLLM's engine calls instead of the model's own, so that the receipt is of what the model gets."""
        named = list(weights)
        self.received += fingerprint(named)
        self.model.load_weights(named)

    def finish_weight_update(self) -> None:
        if untouched := untouched_parameters(self.model):
            raise WeightSyncError(
                f"an update does not reach {len(untouched)} parameters of {type(self.model).__name__} in vLLM "
                f"({', '.join(untouched[:5])}), which would serve old weights beside new ones; right would be a "
                "student of another architecture"
            )
        finalize_layerwise_reload(self.model, self.model_config)
        finish_on_gpu()  # before the learner hears of it, and may write over what was read
        if current_platform.is_cpu():
            repack(self.model)

    def shutdown(self) -> None:
        """Nothing to disconnect."""


def untouched_parameters(model: nn.Module) -> list[str]:
    """Those that vLLM's reload, which is not finalised yet, has brought nothing for.

    A loader that writes by itself instead of calling a parameter's own (experts and sinks of gpt-oss) writes into what
    the reload throws away. Parameters that share memory with another, as a tied head does, follow that one; those of
    attention layers are scales, which vLLM sets itself.
    """
    touched: set[int] = set()
    others: dict[str, torch.Tensor] = {}
    for prefix, layer in model.named_modules():
        info = get_layerwise_info(layer)
        if not info.can_load():  # all of it came, and is in its place
            touched |= {parameter.data_ptr() for parameter in layer.parameters(recurse=False)}
            continue
        assert info.kernel_tensors is not None, "the reload has put them aside"
        came = {name for name, _ in info.loaded_weights}
        for name, parameter in info.kernel_tensors[0].items():
            if name in came:
                touched.add(parameter.data_ptr())
            elif name in info.restore_metadata[0] and not is_deferred_attention_layer(layer):  # else made of others
                others[f"{prefix}.{name}"] = parameter
    return [name for name, parameter in others.items() if parameter.data_ptr() not in touched]


def repack(model: nn.Module) -> None:
    """Let CPU heads and experts follow their weights.

    vLLM's CPU kernels multiply with a packed copy. A tied head loads no weight of its own, so that vLLM's reload leaves
    its packed copy as it was: the model would go on with the old head and the new embedding. Experts are packed when
    they are first loaded and never again: the kernel would read new ones in the wrong order.
    """
    for module in model.modules():
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)
        elif isinstance(module, RoutedExperts) and isinstance(module.quant_method, UnquantizedFusedMoEMethod):
            assert module.quant_method.moe_kernel is not None, "made when the experts were first loaded"
            module.quant_method.moe_kernel.fused_experts.process_weights_after_loading(module)


WeightTransferEngineFactory.register_engine(WEIGHT_BACKEND, MemoryTransfer)
