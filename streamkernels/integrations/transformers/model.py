"""Which models the integration knows, and what it must know of one: its attention modules, heads, windows, devices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2Attention, Gemma2ForCausalLM, Gemma2Model
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaForCausalLM, LlamaModel
from transformers.models.mistral.modeling_mistral import MistralAttention, MistralForCausalLM, MistralModel
from transformers.models.phi3.modeling_phi3 import Phi3Attention, Phi3ForCausalLM, Phi3Model
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2ForCausalLM, Qwen2Model
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3ForCausalLM, Qwen3Model

from ...core.cache import StreamCache
from ...core.shapes import MAX_HEAD_DIM, refuse
from ._release import check_release
from .rotary import check_rope


@dataclass(frozen=True)
class Family:
    """One architecture as its own file in transformers defines it.

    window: where a sliding window is kept: None for none, "layer" on each attention module (None there is full
    attention), "config" for all layers alike. partial: whether its rotation may leave the last dims of a head alone.
    """

    base: type[nn.Module]
    attention: type[nn.Module]
    lm: type[nn.Module]
    window: str | None = None
    partial: bool = False


FAMILIES = (
    Family(LlamaModel, LlamaAttention, LlamaForCausalLM),
    Family(Qwen2Model, Qwen2Attention, Qwen2ForCausalLM, window="layer"),
    Family(Qwen3Model, Qwen3Attention, Qwen3ForCausalLM, window="layer"),
    Family(MistralModel, MistralAttention, MistralForCausalLM, window="config"),
    Family(Gemma2Model, Gemma2Attention, Gemma2ForCausalLM, window="layer"),
    Family(Phi3Model, Phi3Attention, Phi3ForCausalLM, window="config", partial=True),
)
_HEADS = tuple(f.lm for f in FAMILIES)


def base_of(op: str, model: Any) -> Any:
    """The base model (LlamaModel, ...) inside `model`, which may be that model itself, its CausalLM, or a wrapper of
    either that has `get_base_model()` (PEFT). Refuses everything else, and subclasses whose attention is their own."""
    inner = _inner(model)
    base: Any = inner.model if isinstance(inner, _HEADS) else inner
    family = _family(base)
    if family is None:
        refuse(
            op,
            "model",
            f"one of {', '.join(c.__name__ for c in _HEADS)}, its base model, or a wrapper with get_base_model()",
            type(inner).__name__,
            NotImplementedError,
        )
    check_release(op)
    attention = family.attention
    for index, layer in enumerate(base.layers):
        if not isinstance(layer.self_attn, attention) or type(layer.self_attn).forward is not attention.forward:
            got = f"{type(layer.self_attn).__name__} in layer {index}"
            refuse(op, "model", f"{attention.__name__} in every layer", got, NotImplementedError)
    return base


def _family(base: Any) -> Family | None:
    # FSDP changes the class to a subclass with the same forward; a subclass with another forward is not known to us
    same = (f for f in FAMILIES if isinstance(base, f.base) and type(base).forward is f.base.forward)
    return next(same, None)


def family_of(base: Any) -> Family:
    """The family of a base model that `base_of` returned."""
    family = _family(base)
    if family is None:
        refuse("family_of", "base", "a base model of a known family", type(base).__name__, NotImplementedError)
    return family


def causal_lm_of(op: str, model: Any) -> Any:
    """The CausalLM that `model` is or wraps."""
    base_of(op, model)
    inner = _inner(model)
    if not isinstance(inner, _HEADS):
        refuse(op, "model", f"a model with logits ({' or '.join(c.__name__ for c in _HEADS)})", type(inner).__name__)
    return inner


def forward_of(op: str, model: Any, stream: StreamCache) -> Any:
    """What a session over this cache calls for logits: `model` itself if it is what torch.compile returned, else its
    CausalLM. Refuses a cache that grows beside a compiled model, which would be compiled anew for every size."""
    lm = causal_lm_of(op, model)
    if not is_compiled(model):
        return lm
    if not (stream.fixed or stream.bounded):
        expected = "a fixed cache for a compiled model (GroupedCache.for_model(..., fixed=True))"
        refuse(op, "cache", expected, "one that grows")
    return model


def is_compiled(model: Any) -> bool:
    """Whether `model` is what torch.compile returned for a module."""
    return isinstance(getattr(model, "_orig_mod", None), nn.Module)


def _inner(model: Any) -> Any:
    if is_compiled(model):
        model = model._orig_mod
    return model.get_base_model() if callable(getattr(model, "get_base_model", None)) else model


def check_supported(op: str, base: Any) -> None:
    """Refuse what would make our attention differ from the model's: changing or odd rope, odd head dims."""
    for layer in base.layers:
        D = layer.self_attn.head_dim
        if D % 8 or not 8 <= D <= MAX_HEAD_DIM:
            refuse(
                op, "model", f"a head dim that is a multiple of 8, at most {MAX_HEAD_DIM}", f"{D}", NotImplementedError
            )
    check_rope(op, base, partial=family_of(base).partial)


def windows(base: Any) -> list[int | None]:
    """The sliding window of each layer, in keys, its own included; None for full attention."""
    kept = family_of(base).window
    if kept is None:
        return [None] * len(base.layers)
    places = [layer.self_attn if kept == "layer" else layer.self_attn.config for layer in base.layers]
    return [getattr(place, "sliding_window", None) for place in places]


def devices(base: Any) -> list[torch.device]:
    """The device of each layer's attention."""
    return [next(layer.self_attn.parameters()).device for layer in base.layers]


def kv_heads(base: Any) -> list[int]:
    """The number of key/value heads of each layer."""
    return [layer.self_attn.config.num_key_value_heads for layer in base.layers]


def head_dims(base: Any) -> list[int]:
    """The head dim of each layer."""
    return [layer.self_attn.head_dim for layer in base.layers]
