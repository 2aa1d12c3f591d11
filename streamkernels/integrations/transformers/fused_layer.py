"""A decoder layer of few rows outside of autograd, where the host takes longer than the GPU: the same operations in the
same order, without the calls of modules around them that do nothing else.

Layers and MLPs are known by their text, as the attention is (`fused.py`). Whatever somebody else put on a module or in
its place (hooks, forwards, adapters) is called as ever.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks
from transformers.activations import SiLUActivation

from .attention import ROUTE, Route
from .fused import attend, attention, known_as, linear, norm, untouched

# norm, attention, sum, norm, MLP, sum: Llama, Mistral, Qwen2 and Qwen3; Qwen2-VL and 2.5-VL in 5.4 and 5.17; in 5.23
LAYERS = ("461ed20abeb521a9", "b860cc97dd455811", "651797337a0460a9")
# down(act(gate(x)) * up(x))
MLPS = ("b4e9c2637c7f1172",)


def layers_of(base: Any) -> list[nn.Module]:
    """The layers of a language model that `through` knows."""
    kinds = {(type(layer), type(layer.mlp)) for layer in base.layers}
    known = {pair: known_as(pair[0], LAYERS) and known_as(pair[1], MLPS) for pair in kinds}
    return [layer for layer in base.layers if known[type(layer), type(layer.mlp)] and "forward" not in layer.__dict__]


def through(
    layer: Any, hidden: Tensor, attend: Callable[[Any, Tensor], Tensor], forward: Callable[..., Any]
) -> Tensor | None:
    """hidden [B, T, C] through a layer that `layers_of` returned, with `attend(module, x)` for the attention before its
    output projection. None, and nothing done, if that is not the attention's own: somebody watches it or the MLP, or
    its forward is no longer `forward`."""
    parts = layer._modules
    own, mlp = parts["self_attn"], parts["mlp"]
    watched = _global_forward_hooks or _global_forward_pre_hooks
    if watched or not untouched(own, forward) or not untouched(mlp):
        return None
    x = attend(own, _normed(parts["input_layernorm"], hidden))
    hidden = hidden + linear(own._modules["o_proj"], x)
    x = _normed(parts["post_attention_layernorm"], hidden)
    inner = mlp._modules
    gate = _activated(inner["act_fn"], linear(inner["gate_proj"], x))
    return hidden + linear(inner["down_proj"], gate * linear(inner["up_proj"], x))


def layer(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    """The forward of a patched model's decoder layer: a streaming step goes `through`."""
    route: Route | None = kwargs.get(ROUTE)
    angles = kwargs.get("position_embeddings")
    usual = args or torch.is_grad_enabled() or torch.compiler.is_compiling()
    if route is not None and route.cache is not None and angles is not None and not usual:
        out = through(self, hidden_states, lambda own, x: attend(own, x, angles, route, kwargs), attention)
        if out is not None:
            return out
    return type(self).forward(self, hidden_states, *args, **kwargs)


def _normed(module: Any, x: Tensor) -> Tensor:
    out: Tensor = norm(module, x) if untouched(module, norm) else module(x)
    return out


def _activated(module: Any, x: Tensor) -> Tensor:
    if type(module) in (SiLUActivation, nn.SiLU) and untouched(module):
        return nn.functional.silu(x)
    out: Tensor = module(x)
    return out
