"""The fused attention forward: unrotated q, k, v with cos, sin and the cache go to `incremental_prefill`, one op that
rotates, writes and attends. With it, an RMS norm is one operation where transformers makes eight.

A forward of ours takes the place of a module's `forward` on the instance, in its `__dict__`, so that classes and every
other model stay as they are and undoing is a deletion. What it replaces is known by its text: the attention's forward,
the two rotation functions it calls, the rotary module that makes cos and sin, and the norm's, as they are in the tested
releases. Anything else, a new release's rewrite as well as another library's replacement, is refused with the reason; a
norm that is not known keeps its own.
"""

from __future__ import annotations

import hashlib
import inspect
import textwrap
from collections.abc import Callable, Iterable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ...ops.incremental_prefill import incremental_prefill
from .attention import ROUTE, Route

# hashes of sources as they are in transformers 5.4, 5.17 and 5.23; `text_hash` makes them
FORWARDS = {
    "LlamaAttention": ("c0fd8e0b732ba611",),
    "Qwen2Attention": ("4015c9477db5adb7",),
    "Qwen3Attention": ("95140604894f7733",),
    "MistralAttention": ("8c961e165cda523c",),
    "Gemma2Attention": ("3c2d60bed5330c24",),
    "Phi3Attention": ("975f1916d08ccda6",),
    # 5.4; 5.17 and 5.23
    "Qwen2VLAttention": ("e6b440e830d5efe6", "6713b81e9a9d2b18"),
    "Qwen2_5_VLAttention": ("e6b440e830d5efe6", "6713b81e9a9d2b18"),
}
ROTATES = ("apply_multimodal_rotary_pos_emb", "apply_rotary_pos_emb")
# whole heads (5.4; 5.17 and 5.23, as Qwen2-VL has it), the first dims of each, and M-RoPE that the attention puts
# together itself (5.4)
ROTATIONS = ("e2975ea7060de677", "ea234325c15de475", "14ef8b572d9c0bd1", "0d2d41fdeedae17a", "d938838e202f69cb")
HALVES = ("f714a4b1160c694e",)
# 5.4 and in part 5.17; 5.17; 5.23
ANGLES = ("87d2b6f6ab3412f1", "36aa3216b1236e38", "2b71104c384d7ed6")
# M-RoPE of Qwen2-VL and Qwen2.5-VL in 5.4, 5.17 and 5.23, and what puts its axes together since 5.17
MROPE_ANGLES = (
    *("eb52ba11f38d9b3e", "71f21c741b424ebf", "7de72a27391ed6df"),
    *("161e2c22c3076317", "6a5804779477d1fe", "1206e7b396a38557"),
)
MROPE_JOINS = ("57a27d7421710f03",)
# x / rms(x) in fp32, rounded, times the weight
NORMS = ("d676bfe9af0e524d",)


def text_hash(function: Callable[..., Any]) -> str:
    """What a function is known by: 16 hex digits of its source's SHA-256. OSError where there is no source."""
    source = textwrap.dedent(inspect.getsource(function))
    return hashlib.sha256(source.encode()).hexdigest()[:16]


def why_not(base: Any) -> str | None:
    """Why the attention of `base` (a base model that `base_of` returned) cannot be fused; None if it can."""
    rotary = base.rotary_emb
    if "forward" in rotary.__dict__:
        return "the forward of the rotary module was replaced on the instance"
    known: dict[tuple[str, Any], tuple[str, ...]] = {}
    known[f"{type(rotary).__name__}.forward", type(rotary).forward] = ANGLES + MROPE_ANGLES
    join = getattr(type(rotary), "recomposition_frequencies", None)
    if join is not None:
        known["recomposition_frequencies", join] = MROPE_JOINS
    for index, layer in enumerate(base.layers):
        attention = layer.self_attn
        if "forward" in attention.__dict__:
            return f"the forward of layer {index}'s attention was replaced on the instance (by accelerate, say)"
        name = next(c.__name__ for c in type(attention).__mro__ if "forward" in c.__dict__)
        forward = inspect.unwrap(type(attention).forward)
        called = next((n for n in ROTATES if n in forward.__code__.co_names), "apply_rotary_pos_emb")
        rotate = forward.__globals__.get(called)
        half = getattr(inspect.unwrap(rotate), "__globals__", {}).get("rotate_half") if callable(rotate) else None
        known[f"{name}.forward", forward] = FORWARDS.get(name, ())
        known[called, rotate] = ROTATIONS
        known["rotate_half", half] = HALVES
    for (name, function), hashes in known.items():
        try:
            found = text_hash(function)
        except (OSError, TypeError):
            return f"{name} has no source to compare"
        if found not in hashes:
            return f"{name} is not the one of the tested releases (its source hashes to {found})"
    return None


def bind(modules: Iterable[Any], forward: Callable[..., Any]) -> list[nn.Module]:
    """Give these modules this forward; returns them, for `unbind`."""
    given = list(modules)
    for module in given:
        module.__dict__["forward"] = MethodType(forward, module)
    return given


def unbind(modules: Iterable[nn.Module], *forwards: Callable[..., Any]) -> None:
    """Take forwards back, where one of them still is what we gave."""
    for module in modules:
        if getattr(module.__dict__.get("forward"), "__func__", None) in forwards:
            del module.__dict__["forward"]


def norms_of(base: Any) -> list[nn.Module]:
    """The norms of a language model that `norm` can stand for: those of its layers and attentions, and the last one."""
    parts = [base, *(part for layer in base.layers for part in (layer, layer.self_attn))]
    found = [m for part in parts for m in part.children() if hasattr(m, "variance_epsilon") and hasattr(m, "weight")]
    known = {kind: known_as(kind, NORMS) for kind in {type(m) for m in found}}
    return [m for m in found if known[type(m)] and "forward" not in m.__dict__]


def known_as(kind: type, hashes: tuple[str, ...]) -> bool:
    """Whether the forward of a class has one of these texts."""
    try:
        return text_hash(inspect.unwrap(kind.forward)) in hashes  # type: ignore[attr-defined]
    except (OSError, TypeError):
        return False


def norm(self: Any, hidden_states: Tensor) -> Tensor:
    """An RMS norm as one operation, with one rounding less; as the class has it for autograd and torch.compile, which
    has its own way, for weights of another dtype and for fp64, which transformers rounds to fp32 here."""
    weight, dtype = self.weight, hidden_states.dtype
    differs = dtype != weight.dtype or dtype == torch.float64
    if differs or torch.is_grad_enabled() or torch.compiler.is_compiling():
        out: Tensor = type(self).forward(self, hidden_states)
        return out
    return torch.rms_norm(hidden_states, weight.shape, weight, self.variance_epsilon)


def attention(
    self: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """One layer's attention in a streaming step; every other call goes to the class's own forward."""
    route: Route | None = kwargs.get(ROUTE)
    if route is None or route.cache is None or position_embeddings is None:
        return type(self).forward(
            self,
            hidden_states,
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **kwargs,
        )
    o = attend(self, hidden_states, position_embeddings, route, kwargs)
    return linear(self.o_proj, o), None


def attend(
    module: Any, x: Tensor, angles: tuple[Tensor, Tensor], route: Route, options: dict[str, Any]
) -> Tensor:
    """One layer's attention in a streaming step, before its output projection: x [B, T, C] -> [B, T, H * D]."""
    shape, cache = x.shape[:-1], route.cache
    if cache is None:
        raise RuntimeError("streamkernels: a streaming step needs its cache")
    q, k, v = _project(module, x, (*shape, -1, module.head_dim))
    # norms with fp32 weights under autocast give q and k in fp32, but v in the autocast dtype
    q, k = q.to(v.dtype), k.to(v.dtype)
    cos, sin = _halves(route, angles, v.dtype)
    source_begin, target_begin = route.begins_on(route.windows[module.layer_idx], q.device)
    o: Any = incremental_prefill(
        q,
        k,
        v,
        cos,
        sin,
        cache.stream,
        module.layer_idx,
        role=options["role"],
        source_limit=options.get("source_limit"),
        source_begin=source_begin,
        target_begin=target_begin,
        scale=module.scaling,
        softcap=getattr(module, "attn_logit_softcapping", None),
    )
    made: Tensor = o.transpose(1, 2).reshape(*shape, -1)
    return made


def _project(module: Any, x: Tensor, heads: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """q [B, H, T, D], k and v [B, HK, T, D], as the model's own modules make them: adapters included."""
    if hasattr(module, "qkv_proj"):
        D, HK = module.head_dim, module.num_key_value_heads
        q, k, v = module.qkv_proj(x).split([module.config.num_attention_heads * D, HK * D, HK * D], dim=-1)
    else:
        q, k, v = (linear(projection, x) for projection in (module.q_proj, module.k_proj, module.v_proj))
    q, k, v = q.view(heads), k.view(heads), v.view(heads)
    if hasattr(module, "q_norm"):
        q, k = module.q_norm(q), module.k_norm(k)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def linear(projection: Any, x: Tensor) -> Tensor:
    """What a projection makes of x [B, T, C]: the module itself, adapters and hooks included; of a plain layer that
    nobody watches, the product alone.

    While torch.compile traces one token's step, a plain layer's bias is added apart from the product: inductor turns a
    product with one row into a reduction that reads the weights at full bandwidth and takes neighbours along (under
    `coordinate_descent_tuning`), but leaves one with a bias to cuBLAS, which is slow at small products of that kind."""
    if type(projection) is not nn.Linear or not untouched(projection):
        out: Tensor = projection(x)
        return out
    # Module.__getattr__ takes as long as the rest of this
    own: dict[str, Any] = projection._parameters
    weight, bias = own["weight"], own["bias"]
    if bias is not None and torch.compiler.is_compiling() and not torch.is_grad_enabled():
        if x.shape[0] * x.shape[1] == 1:
            return nn.functional.linear(x, weight) + bias
    return nn.functional.linear(x, weight, bias)


def untouched(module: Any, forward: Callable[..., Any] | None = None) -> bool:
    """Whether nobody's hook or forward sits on the module, but for this forward of ours."""
    given = module.__dict__.get("forward")
    mine = given is None if forward is None else getattr(given, "__func__", None) is forward
    return mine and not module._forward_pre_hooks and not module._forward_hooks


def _halves(route: Route, angles: tuple[Tensor, Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`half` of cos and sin, once for all layers that are given the same."""
    held = route.angles
    if held is not None and held[0] is angles and held[1] == dtype:
        return held[2]
    both = half(angles[0], dtype), half(angles[1], dtype)
    if not torch.compiler.is_compiling():
        route.angles = angles, dtype, both
    return both


def half(angles: Tensor, dtype: torch.dtype) -> Tensor:
    """[B or 1, T, rotary_dim / 2]: transformers repeats each angle's cosine and sine in the second half."""
    first = angles[..., : angles.shape[-1] // 2]
    return first if first.dtype in (torch.float32, dtype) else first.to(dtype)
