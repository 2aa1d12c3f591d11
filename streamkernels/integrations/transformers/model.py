"""Which models the integration knows, and what it must know of one: its attention modules, heads, devices."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaForCausalLM, LlamaModel
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2ForCausalLM, Qwen2Model

from ...core.shapes import MAX_HEAD_DIM, refuse
from ._release import check_release
from .rotary import check_rope

_FAMILIES: dict[type[nn.Module], type[nn.Module]] = {LlamaModel: LlamaAttention, Qwen2Model: Qwen2Attention}
_HEADS = (LlamaForCausalLM, Qwen2ForCausalLM)


def base_of(op: str, model: Any) -> Any:
    """The LlamaModel or Qwen2Model inside `model`, which may be that model itself, its CausalLM, or a wrapper of
    either that has `get_base_model()` (PEFT). Refuses everything else, and subclasses whose attention is their own."""
    inner = _inner(model)
    base = inner.model if isinstance(inner, _HEADS) else inner
    # FSDP changes the class to a subclass with the same forward; a subclass with another forward is not known to us
    family = next((f for f in _FAMILIES if isinstance(base, f) and type(base).forward is f.forward), None)
    if family is None:
        names = ", ".join(c.__name__ for c in (*_HEADS, *_FAMILIES))
        refuse(
            op,
            "model",
            f"one of {names}, or a wrapper of one with get_base_model()",
            type(inner).__name__,
            NotImplementedError,
        )
    check_release(op)
    attention = _FAMILIES[family]
    for index, layer in enumerate(base.layers):
        if not isinstance(layer.self_attn, attention) or type(layer.self_attn).forward is not attention.forward:
            got = f"{type(layer.self_attn).__name__} in layer {index}"
            refuse(op, "model", f"{attention.__name__} in every layer", got, NotImplementedError)
    return base


def causal_lm_of(op: str, model: Any) -> Any:
    """The LlamaForCausalLM or Qwen2ForCausalLM that `model` is or wraps."""
    base_of(op, model)
    inner = _inner(model)
    if not isinstance(inner, _HEADS):
        refuse(op, "model", f"a model with logits ({' or '.join(c.__name__ for c in _HEADS)})", type(inner).__name__)
    return inner


def _inner(model: Any) -> Any:
    return model.get_base_model() if callable(getattr(model, "get_base_model", None)) else model


def check_supported(op: str, base: Any) -> None:
    """Refuse what would make our attention differ from the model's: sliding windows, changing rope, odd head dims."""
    for index, layer in enumerate(base.layers):
        if getattr(layer.self_attn, "sliding_window", None) is not None:
            got = f"a window of {layer.self_attn.sliding_window} in layer {index}"
            refuse(
                op,
                "model",
                "full attention in every layer (sliding windows are not supported yet)",
                got,
                NotImplementedError,
            )
        D = layer.self_attn.head_dim
        if D % 8 or not 8 <= D <= MAX_HEAD_DIM:
            refuse(
                op, "model", f"a head dim that is a multiple of 8, at most {MAX_HEAD_DIM}", f"{D}", NotImplementedError
            )
    check_rope(op, base)


def devices(base: Any) -> list[torch.device]:
    """The device of each layer's attention."""
    return [next(layer.self_attn.parameters()).device for layer in base.layers]


def kv_heads(base: Any) -> list[int]:
    """The number of key/value heads of each layer."""
    return [layer.self_attn.config.num_key_value_heads for layer in base.layers]


def head_dims(base: Any) -> list[int]:
    """The head dim of each layer."""
    return [layer.self_attn.head_dim for layer in base.layers]
