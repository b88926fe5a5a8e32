"""The student with its loss inside its forward pass.

Axes: P positions of the trajectories of a micro-batch one after the other, N response tokens likewise, D width of the
model, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import nn

from topd_ray.config.schema import LearnerConfig, ObjectiveConfig, StudentConfig
from topd_ray.engines.attention import EAGER, choose_attention, row_arguments
from topd_ray.engines.collate import MicroBatch, TokenBatch
from topd_ray.errors import ConfigError
from topd_ray.objective.importance import prefix_weights
from topd_ray.objective.loss import LossBatch, LossMetrics, LossSpec, student_logprobs, topd_loss

PROBE_TOKENS = 8
NOISE = ("drop", "jitter")
"""In the names of numbers that say how much noise a module adds in training mode."""
BRANCH_FIGURES = ("guidance_kl",)
"""Those of `LossMetrics` that mean something where the teacher has scored nothing."""
Figures = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""as those of `LossMetrics`"""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchTotals:
    """Sums over the whole batch of an update, all ranks and micro-batches: what shares of the loss are divided by."""

    num_tokens: float
    """response tokens"""
    num_guided: float
    """(window, position) pairs"""
    num_trajectories: int


class LossHead(nn.Module):
    """Output layer and loss in one, so that no [N, V] tensor of logits ever exists.

    It owns the output layer's parameters as its own, tied or not: under ZeRO-3 the hooks of this module gather them
    before its forward and backward pass. Rows from `num_tokens` on pad the embedding and get no probability, as in the
    inference engines.
    """

    def __init__(self, head: nn.Linear, spec: LossSpec, num_tokens: int, importance_horizon: int) -> None:
        super().__init__()
        self.weight = head.weight
        self.bias = head.bias
        self.spec = spec
        self.num_vocabulary = min(num_tokens, head.out_features)
        self.importance_horizon = importance_horizon

    def forward(
        self, hidden_ND: torch.Tensor, batch: MicroBatch | TokenBatch, totals: BatchTotals | None
    ) -> tuple[torch.Tensor, LossMetrics | None]:
        if isinstance(batch, TokenBatch):
            return self._logprobs(hidden_ND, batch.sampled_ids_N), None
        assert totals is not None, "a loss needs the totals of its batch"
        loss_batch: LossBatch = batch.loss
        staleness: Figures = {}
        if batch.stale and self.importance_horizon:
            loss_batch, staleness = self._weighted(hidden_ND, batch)
        loss, metrics = topd_loss(
            hidden_ND,
            self.weight,
            loss_batch,
            self.spec,
            num_tokens=0.0 if batch.is_of_branches else totals.num_tokens,
            num_guided=totals.num_guided,
            num_trajectories=totals.num_trajectories,
            head_bias=self.bias,
            num_vocabulary=self.num_vocabulary,
            check_finite=False,  # the ranks have to agree on what to do
        )
        if batch.is_of_branches:
            return loss, LossMetrics(figures={key: metrics.figures[key] for key in BRANCH_FIGURES})
        return loss, LossMetrics(figures={**metrics.figures, **staleness}) if staleness else metrics

    @torch.no_grad()
    def _weighted(self, hidden_ND: torch.Tensor, batch: MicroBatch) -> tuple[LossBatch, Figures]:
        """The batch with the prefix weights of its stale trajectories, exactly 1 elsewhere, and the weights' figures.

        One more product with the output layer for the S stale tokens, and no second pass through the model.
        """
        lengths, spec = batch.tokens.num_response_tokens, self.spec
        starts = [*accumulate(lengths, initial=0)]
        spans = [torch.arange(starts[i], starts[i + 1], device=hidden_ND.device) for i in batch.stale]
        stale_S = torch.cat(spans)
        weight_S = prefix_weights(
            self._logprobs(hidden_ND[stale_S], batch.loss.sampled_ids[stale_S]),
            batch.loss.behaviour_logprobs[stale_S],
            [lengths[i] for i in batch.stale],
            clip=spec.importance_clip,
            horizon=self.importance_horizon,
            check_finite=False,
        )
        count = weight_S.new_tensor(float(len(weight_S)))
        figures = {
            "importance_weight": (weight_S.sum(), count),
            "importance_clipped": ((weight_S >= spec.importance_clip).sum().to(count), count),
        }
        weight_N = weight_S.new_ones(len(hidden_ND)).index_copy(0, stale_S, weight_S)
        return replace(batch.loss, weight_N=weight_N), figures

    def _logprobs(self, hidden_ND: torch.Tensor, token_ids_N: torch.Tensor) -> torch.Tensor:
        return student_logprobs(
            hidden_ND,
            self.weight,
            token_ids_N,
            self.spec.temperature,
            self.spec.chunk_tokens,
            logit_softcap=self.spec.logit_softcap,
            head_bias=self.bias,
            num_vocabulary=self.num_vocabulary,
        )


class StudentWithLoss(nn.Module):
    """A causal language model that returns a loss (or the sampled tokens' log-probabilities) instead of logits."""

    def __init__(self, model: Any, spec: LossSpec, num_tokens: int, *, importance_horizon: int) -> None:
        super().__init__()
        self.model = model
        self.head = LossHead(model.get_output_embeddings(), spec, num_tokens, importance_horizon)

    def forward(
        self, batch: MicroBatch | TokenBatch, totals: BatchTotals | None = None
    ) -> tuple[torch.Tensor, LossMetrics | None]:
        """(loss, metrics) of a MicroBatch, ([N] log-probabilities in nats, None) of a TokenBatch."""
        tokens = batch if isinstance(batch, TokenBatch) else batch.tokens
        hidden_ND = self.hidden_states(tokens).index_select(0, tokens.predictor_N)
        value, metrics = self.head(hidden_ND, batch, totals)
        return value, metrics

    def hidden_states(self, tokens: TokenBatch) -> torch.Tensor:
        """Of the last layer, at all positions: [P, D]."""
        arguments = row_arguments(self.model, tokens.segments)
        hidden_1PD = self.model.base_model(input_ids=tokens.input_ids_P[None], use_cache=False, **arguments)[0]
        return hidden_1PD.squeeze(0)


def load_student(student: StudentConfig, learner: LearnerConfig, device: torch.device) -> Any:
    """The student as a Hugging Face model in the learner's dtype, ready to train on packed rows.

    Raises ConfigError if it cannot be read, if its logits are not a linear layer of its last hidden state, or if the
    trajectories of a row would affect each other.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            student.model,
            revision=student.revision,
            dtype=getattr(torch, learner.dtype),
            attn_implementation=EAGER,
            use_safetensors=True,
            trust_remote_code=student.trust_remote_code,
        )
    except (OSError, ValueError) as error:
        raise ConfigError(f"student.model={student.model!r} cannot be loaded: {error}") from error
    model = model.to(device)
    model.eval()
    check_head(model)
    choose_attention(model, packs=learner.max_tokens_per_micro_batch != "one_trajectory")
    if learner.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        for module in checkpointed_modules(model):
            for name, value in vars(module).items():
                if isinstance(value, float) and any(part in name for part in NOISE):
                    setattr(module, name, 0.0)
    return model


def checkpointed_modules(model: Any) -> list[nn.Module]:
    """Those that checkpoint their activations, which they do in training mode only."""
    return [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]


def prepare_to_learn(model: Any) -> None:
    """Evaluation mode, but for the modules that checkpoint, which `load_student` has made the same in either mode.

    The policy that learns is then the one that wrote: without dropout, and without noise in routers.
    """
    model.eval()
    for module in checkpointed_modules(model):
        module.training = True  # not train(), which goes on to the modules inside


def loss_spec(model: Any, objective: ObjectiveConfig, learner: LearnerConfig, temperature: float) -> LossSpec:
    """The loss that the config asks for, of this model, at the rollout's temperature."""
    return LossSpec(
        method=objective.method,
        divergence=objective.divergence,
        jsd_beta=objective.jsd_beta,
        importance_clip=objective.importance_clip,
        kl_discount=objective.kl_discount,
        guidance_weight=objective.guidance_weight,
        guidance_reduction=objective.guidance_reduction,
        temperature=temperature,
        logit_softcap=logit_softcap(model),
        chunk_tokens=learner.logits_chunk_tokens,
        kernel=learner.loss_kernel,
    )


def logit_softcap(model: Any) -> float | None:
    """Bound of the logits (Gemma 2), if the model has one."""
    bound = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return None if bound is None else float(bound)


@torch.no_grad()
def check_head(model: Any) -> None:
    """Raise ConfigError unless output layer and softcap alone turn the last hidden state into the model's logits."""
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ConfigError(f"the student's output layer is {type(head).__name__}, and should be a torch.nn.Linear")
    ids = torch.arange(min(PROBE_TOKENS, head.out_features), device=head.weight.device)[None]
    theirs = model(input_ids=ids, use_cache=False).logits.float()
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    ours = head(hidden).float()
    softcap = logit_softcap(model)
    if softcap is not None:
        ours = softcap * torch.tanh(ours / softcap)
    if not torch.allclose(theirs, ours, rtol=1e-2, atol=1e-2):
        raise ConfigError(
            f"the logits of {type(model).__name__} are not its output layer applied to its last hidden state, they "
            f"differ by up to {(theirs - ours).abs().max():.3g}: a student with another kind of head is not supported"
        )


def layers_of(model: Any) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """Parameters and persistent buffers under their names in `model`, a layer at a time; of tied ones, the one kept.

    Under ZeRO-3 the tensors are empty until they are gathered.
    """
    skipped = set(getattr(model, "all_tied_weights_keys", None) or ())
    seen: set[int] = set()
    entries: list[tuple[str, torch.Tensor]] = []
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen and name not in skipped:
            seen.add(id(tensor))
            entries.append((name, tensor))
    for _, layer in groupby(entries, key=lambda entry: _layer_name(entry[0])):
        yield list(layer)


def to_hub_names(model: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`tensors` as the model's files would hold them: some classes rename or fuse weights (experts) when they load."""
    from transformers.core_model_loading import revert_weight_conversion

    converted: dict[str, torch.Tensor] = revert_weight_conversion(model, tensors)
    return converted


def _layer_name(name: str) -> str:
    """Up to the first number: `model.layers.3`, or the module's name outside of the layers."""
    parts = name.split(".")
    number = next((index for index, part in enumerate(parts) if part.isdigit()), None)
    return ".".join(parts[:-1] if number is None else parts[: number + 1])
