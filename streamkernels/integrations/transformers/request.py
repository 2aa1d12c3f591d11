"""What one forward of a patched model was asked for, checked before anything runs: a refused call changes nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from ...core.cache import PADDING
from ...core.shapes import Shapes, check_int, refuse
from .attention import NAME, ROUTE, Route, is_ours
from .cache import GroupedCache
from .model import windows
from .windows import step_begins

_OP = "patched forward"
_PACKING = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


def admit(
    base: Any, kwargs: dict[str, Any], *, require_spans: bool = False, window: str = "position"
) -> dict[str, Any]:
    """The keyword arguments with which the base model's forward goes on: the caller's, checked, and a Route.

    base: a model that `base_of` returned. kwargs: all arguments of its forward by name. require_spans, window: see
    `patch`. Raises ValueError, TypeError or NotImplementedError with the reason; neither the model nor a cache has been
    touched then.
    """
    own = ("spans", "role", "source_limit")
    if not all(is_ours(layer.self_attn, kwargs.get("is_causal")) for layer in base.layers):
        used = [name for name in own if kwargs.get(name) is not None]
        if used or isinstance(kwargs.get("past_key_values"), GroupedCache):
            refuse(_OP, used[0] if used else "past_key_values", "a causal model", "one whose is_causal is False")
        return kwargs
    _check_model(base, kwargs)
    shapes = Shapes(_OP)
    tokens = kwargs.get("input_ids") if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
    if not isinstance(tokens, Tensor) or tokens.dim() < 2:
        return kwargs  # the model's own complaint is the right one
    shapes.sizes.update(B=tokens.shape[0], T=tokens.shape[1])
    mask = kwargs.get("attention_mask")
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
        expected = "a 2-D padding mask or None (declare any other visibility with spans=)"
        refuse(_OP, "attention_mask", expected, mask, NotImplementedError)
    _check_positions(shapes, kwargs.get("position_ids"))
    if isinstance(kwargs.get("past_key_values"), GroupedCache):
        return _grouped(base, shapes, kwargs, window)
    if require_spans and base.training and kwargs.get("spans") is None:
        expected = "spans= in training, as patch(model, require_spans=True) was asked to see to"
        got = "none (the Hugging Face Trainer drops them unless remove_unused_columns=False)"
        refuse(_OP, "spans", expected, got)
    return _one_buffer(base, shapes, kwargs, window)


def _check_model(base: Any, kwargs: dict[str, Any]) -> None:
    """What no route can do."""
    config = base.config
    for module in (base, *(layer.self_attn for layer in base.layers)):
        if module.config._attn_implementation != NAME:
            got = f"{module.config._attn_implementation!r}: undo the handle before choosing another"
            refuse(_OP, "attn_implementation", f"{NAME!r}, as patch set it", got)
    if kwargs.get("output_attentions", getattr(config, "output_attentions", False)):
        reason = "True: attention probabilities are never materialised here (undo the handle and use eager attention)"
        refuse(_OP, "output_attentions", "False", reason, NotImplementedError)
    packing = [name for name in _PACKING if kwargs.get(name) is not None]
    if packing:
        expected = "spans= (streamkernels.spans.packed) for packed documents"
        refuse(_OP, packing[0], expected, kwargs[packing[0]], NotImplementedError)
    for index, layer in enumerate(base.layers):
        if layer.self_attn.training and layer.self_attn.attention_dropout > 0:
            got = f"{layer.self_attn.attention_dropout} in layer {index}"
            refuse(_OP, "attention_dropout", "0 in training", got, NotImplementedError)


def _check_positions(shapes: Shapes, position_ids: Any) -> None:
    if position_ids is not None:
        # positions beyond 256 do not survive bf16, beyond 2048 fp16
        dtypes = (torch.int64, torch.int32, torch.float32, torch.float64)
        Shapes(_OP, **shapes.sizes).tensor("position_ids", position_ids, "1|B T", dtype=dtypes)


def _grouped(base: Any, shapes: Shapes, kwargs: dict[str, Any], window: str) -> dict[str, Any]:
    """The route of one streaming step over a GroupedCache."""
    cache: GroupedCache = kwargs["past_key_values"]
    stream, B, T = cache.stream, shapes["B"], shapes["T"]
    if kwargs.get("spans") is not None:
        refuse(_OP, "spans", "None with a GroupedCache (role= and source_limit= say what is seen)", kwargs["spans"])
    if kwargs.get("position_ids") is None:
        expected = "explicit positions with a GroupedCache, since source and target tokens are counted apart"
        refuse(_OP, "position_ids", expected, None)
    if stream.layers != len(base.layers) or stream.batch != B:
        got = f"a cache of {stream.layers} layers and {stream.batch} rows"
        refuse(_OP, "past_key_values", f"a cache of {len(base.layers)} layers and {B} rows", got)
    if base.training and any(getattr(layer, "gradient_checkpointing", False) for layer in base.layers):
        reason = "a GroupedCache: its layers would be replayed over a cache that has moved on (train with spans=)"
        refuse(_OP, "past_key_values", "no cache under gradient checkpointing in training", reason, NotImplementedError)
    role = kwargs.get("role")
    if role is None:
        refuse(_OP, "role", "SOURCE, TARGET or int8 [B, T] of them with a GroupedCache", None)
    if isinstance(role, Tensor):
        Shapes(_OP, B=B, T=T).tensor("role", role, "B T", dtype=torch.int8)
    else:
        check_int(_OP, "role", role, minimum=0, maximum=1)
    if kwargs.get("source_limit") is not None:
        Shapes(_OP, B=B, T=T).tensor("source_limit", kwargs["source_limit"], "B T", dtype=torch.int32)
    mask = kwargs.get("attention_mask")
    if mask is not None:
        Shapes(_OP, B=B, T=T).tensor("attention_mask", mask, "B T")
        if not isinstance(role, Tensor):
            role = torch.full((B, T), role, dtype=torch.int8, device=mask.device)
        role = role.masked_fill(mask.to(role.device) == 0, PADDING)
    route = Route(cache=cache, windows=windows(base), window=window)
    sliding = {w for w in route.windows if w is not None}
    if sliding:
        keys = cache.key_positions() if window == "position" else None
        limit = kwargs.get("source_limit")
        route.begins = step_begins(keys, stream, kwargs["position_ids"], role, limit, sliding)
    cache.grant(len(base.layers))
    return {**kwargs, "attention_mask": None, "role": role, ROUTE: route}


def _one_buffer(base: Any, shapes: Shapes, kwargs: dict[str, Any], window: str) -> dict[str, Any]:
    """The routes over one buffer of keys: declared spans, or plain causal."""
    for name in ("role", "source_limit"):
        if kwargs.get(name) is not None:
            refuse(_OP, name, "None unless past_key_values is a GroupedCache", kwargs[name])
    past = kwargs.get("past_key_values")
    if past is not None and not _is_plain(past):
        expected = "None, a DynamicCache of ordinary layers, or a GroupedCache"
        got = f"{type(past).__name__}, whose key tensors need not end at the last valid key"
        refuse(_OP, "past_key_values", expected, got, NotImplementedError)
    seen = past.get_seq_length() if past is not None else 0
    mask = kwargs.get("attention_mask")
    if mask is not None:
        Shapes(_OP, B=shapes["B"], S=seen + shapes["T"]).tensor("attention_mask", mask, "B S")
    spans = kwargs.get("spans")
    if spans is not None:
        Shapes(_OP, B=shapes["B"], T=shapes["T"]).tensor("spans", spans, "B T N 2", dtype=torch.int32)
        if spans.shape[2] not in (1, 2, 4, 8):
            refuse(_OP, "spans", "1, 2, 4 or 8 slots", f"{spans.shape[2]} slots")
        if seen and any(w is not None for w in windows(base)):
            expected = "no cached keys beside spans in a model with sliding windows"
            refuse(_OP, "past_key_values", expected, f"{seen} keys", NotImplementedError)
    return {**kwargs, ROUTE: Route(window=window)}


def _is_plain(cache: Any) -> bool:
    """A DynamicCache whose every layer hands over exactly the valid keys, or the last of them, as many as its window
    shows."""
    plain = (DynamicLayer, DynamicSlidingWindowLayer)
    return type(cache) is DynamicCache and all(type(layer) in plain for layer in cache.layers)
