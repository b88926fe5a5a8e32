"""Attention of trajectories that lie end to end in one row, none of which sees another.

Axes: P positions of the row, H query heads, G key and value heads, D width of a head, B trajectories.
"""

import importlib.util
import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention

from topd_ray.errors import ConfigError

PACKED = "topd_packed"
"""Name of `packed_attention` among the attention implementations of transformers."""
FLASH = "flash_attention_2"
EAGER = "eager"
PACKABLE_LAYERS = {"full_attention", "sliding_attention"}
"""Layer types that look at nothing but distances inside of a trajectory. A recurrent layer would carry its state from
one trajectory into the next, and a chunked one counts its chunks from the start of the row."""
PROBE_LENGTHS = (5, 8, 3)
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}
"""Largest relative error of the hidden states that is put down to rounding. Seen in bfloat16: 0.012 with 24 layers, and
0.33 or more where trajectories see each other."""
ONE_EACH = "learner.max_tokens_per_micro_batch=one_trajectory gives every trajectory a forward pass of its own"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Segments:
    """Where the trajectories of a row begin and end."""

    lengths: tuple[int, ...]
    """[B] positions of each"""
    bounds: Tensor
    """[B + 1] int32, the lengths added up from 0"""
    position_ids_P: Tensor
    """0, 1, ... in each trajectory"""

    @classmethod
    def of(cls, lengths: tuple[int, ...], device: torch.device) -> "Segments":
        sizes = torch.tensor(lengths)
        bounds = torch.cat([torch.zeros(1, dtype=torch.long), sizes.cumsum(0)])
        positions_P = torch.arange(int(bounds[-1])) - bounds[:-1].repeat_interleave(sizes)
        return cls(lengths=lengths, bounds=bounds.to(device, torch.int32), position_ids_P=positions_P.to(device))


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    segments: Segments | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Causal softmax attention inside of each trajectory: [1, H, P, D], [1, G, P, D] twice -> ([1, P, H, D], None).

    Half precision on a GPU takes PyTorch's variable-length flash attention. All else goes trajectory by trajectory
    through `scaled_dot_product_attention`: nothing is padded, and on a CPU it is as fast as the best padded
    buckets of similar length (forward and backward of 64 trajectories of 30 to 150 tokens, 2 cores: 16 ms, as 4
    buckets; 1 bucket 27 ms, a block-diagonal mask 510 ms).

    Called by transformers through its attention interface. Raises NotImplementedError for anything but plain attention,
    with or without a sliding window, and if the model has not handed `segments` on.
    """
    extras = [name for name in ("softcap", "s_aux", "position_bias") if others.get(name) is not None]
    if extras or attention_mask is not None or segments is None or others.get("is_causal") is False:
        what = ", ".join(extras) or ("no segments" if segments is None else "a mask of its own")
        raise NotImplementedError(f"{type(module).__name__} asks for {what}: this is plain causal attention")
    window = sliding_window if sliding_window is not None and sliding_window < max(segments.lengths) else None
    if query.is_cuda and query.dtype != torch.float32 and dropout == 0.0:
        return _varlen(query, key, value, segments, scaling, window).unsqueeze(0), None
    outs = [
        scaled_dot_product_attention(
            query_HLD,
            key_GLD,
            value_GLD,
            attn_mask=None if window is None else _band(query_HLD.shape[2], window, query.device),
            is_causal=window is None,
            dropout_p=dropout,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        for query_HLD, key_GLD, value_GLD in zip(
            *(torch.split(one, list(segments.lengths), 2) for one in (query, key, value)), strict=True
        )
    ]
    return torch.cat(outs, 2).transpose(1, 2), None


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, scaling: float | None, window: int | None
) -> Tensor:
    """PyTorch's variable-length flash attention: [P, H, D]."""
    query_PHD, key_PGD, value_PGD = (one.squeeze(0).transpose(0, 1) for one in (query, key, value))
    longest = max(segments.lengths)
    out = varlen_attn(
        query_PHD,
        key_PGD,
        value_PGD,
        segments.bounds,
        segments.bounds,
        longest,
        longest,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(out, Tensor), "the logsumexp was not asked for"
    return out


def row_arguments(model: Any, segments: Segments) -> dict[str, Any]:
    """What the model's forward pass has to be told about a row. A single trajectory needs no explanation."""
    implementation = model.config._attn_implementation
    positions = {"position_ids": segments.position_ids_P[None]}
    if implementation == PACKED:
        return {**positions, "segments": segments}
    if len(segments.lengths) == 1:
        return {}
    if implementation == FLASH:
        longest = max(segments.lengths)
        bounds = {"cu_seq_lens_q": segments.bounds, "cu_seq_lens_k": segments.bounds}
        return {**positions, **bounds, "max_length_q": longest, "max_length_k": longest}
    return positions


@torch.no_grad()
def choose_attention(model: Any, *, packs: bool) -> None:
    """Set the fastest attention of `model` that does what its own code does, tried on a row of short trajectories.

    `packs` says whether rows will hold several trajectories. Candidates are flash-attn where it is installed, then
    `packed_attention` (unpacked: PyTorch's), then the model's own code with a mask over the whole row: right for
    softcaps and attention sinks, but its memory grows with the square of the row, which is logged. The model comes in
    `eager`. Raises ConfigError, with what to do, if trajectories affect each other under all of them.
    """
    _register()
    config = model.config.get_text_config()
    layers = set(getattr(config, "layer_types", None) or ())
    if packs and (odd := sorted(layers - PACKABLE_LAYERS)):
        raise ConfigError(f"layers of {type(model).__name__} are {', '.join(odd)}, and take no packed rows: {ONE_EACH}")
    weight = model.get_output_embeddings().weight
    lengths = PROBE_LENGTHS if packs else PROBE_LENGTHS[:1]
    flash = weight.is_cuda and weight.dtype == torch.bfloat16 and importlib.util.find_spec("flash_attn") is not None
    ids = [torch.arange(length, device=weight.device) * 7 % config.vocab_size for length in lengths]
    right_PD = torch.cat([_hidden(model, one[None]) for one in ids], 1)
    segments = Segments.of(lengths, weight.device)
    found = []
    for name in ([FLASH] if flash else []) + [PACKED if packs else "sdpa", EAGER]:
        try:
            model.set_attn_implementation(name)
            ours_PD = _hidden(model, torch.cat(ids)[None], **row_arguments(model, segments))
        except (ImportError, RuntimeError, TypeError, ValueError) as error:
            found.append(f"{name}: {error}")
            continue
        error_share = float((ours_PD - right_PD).norm() / right_PD.norm())
        if error_share <= TOLERANCE[weight.dtype]:
            if name == EAGER:
                _log.warning("%s needs a mask over the whole row (%s)", type(model).__name__, "; ".join(found))
            return
        found.append(f"{name}: hidden states are off by {error_share:.2g} of their norm")
    raise ConfigError(
        f"{type(model).__name__} does not compute the same for trajectories in one row as for each alone "
        f"({'; '.join(found)}): {ONE_EACH}"
        if packs
        else f"no attention implementation agrees with the code of {type(model).__name__}: {'; '.join(found)}"
    )


def _hidden(model: Any, ids: Tensor, **arguments: Any) -> Tensor:
    hidden: Tensor = model.base_model(input_ids=ids, use_cache=False, **arguments).last_hidden_state
    return hidden.float()


def _band(length: int, window: int, device: torch.device) -> Tensor:
    """Which of the last `window` positions, its own among them, each position sees: [length, length]."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril().triu(1 - window)


def _register() -> None:
    from transformers import AttentionInterface

    AttentionInterface.register(PACKED, packed_attention)
