"""The attention and mask functions that a patched model calls by the name `streamkernels`.

transformers calls the mask function once per forward and the attention function once per layer, after RoPE and after
`past_key_values.update` (transformers `AttentionInterface`). Visibility travels as keyword arguments of the model's
forward, never as a mask of T x S elements and never inside `position_ids`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from ...core.shapes import refuse
from ...core.spans import ATTEND, SKIP, Spans, bottom_right
from ...ops.incremental_prefill import incremental_prefill
from ...ops.prepare import prepare
from ...ops.span_attention import span_attention
from .cache import GroupedCache
from .windows import Begins, buffer_spans

NAME = "streamkernels"
_OP = "streamkernels attention"
Prepared = tuple[Spans, tuple[Tensor, Tensor]]
ROUTE = "streamkernels_route"  # the keyword that carries a Route from the pre-hook to every layer


@dataclass
class Route:
    """By what one forward attends; made by the pre-hook and shared by its layers.

    cache: the GroupedCache, or None for the routes over one buffer. windows: the sliding window of each layer of a
    streaming step, None for none. begins: per sliding window the first source and target key of each row of a streaming
    step. window: what a window means under declared spans. visible: the Spans of the routes over one buffer and what
    `prepare` makes of them, built by the first layer that needs them, per device, window and number of keys. angles:
    what the last fused layer was given as cos and sin, and what it made of them.
    """

    cache: GroupedCache | None = None
    windows: list[int | None] = field(default_factory=list)
    begins: dict[int, Begins] = field(default_factory=dict)
    window: str = "position"
    visible: dict[tuple[torch.device, int | None, int], Prepared] = field(default_factory=dict)
    angles: tuple[Any, torch.dtype, tuple[Tensor, Tensor]] | None = None

    def begins_on(self, window: int | None, device: torch.device) -> Begins | tuple[None, None]:
        """(source_begin, target_begin) of a layer with this window, on its device."""
        if window is None:
            return None, None
        source, target = self.begins[window]
        if source.device != device:
            source, target = self.begins[window] = (source.to(device), target.to(device))
        return source, target


def is_ours(module: Any, is_causal: bool | None = None) -> bool:
    """Whether an attention module is causal: a bidirectional one is left to PyTorch's own attention."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    return bool(causal) and bool(getattr(module.config, "is_causal", True))


def padding_mask(*_: Any, attention_mask: Tensor | None = None, **__: Any) -> Tensor | None:
    """The registered mask function: the 2-D padding mask (bool [B, S]) as it came, or None. Packing that transformers
    reads out of restarting `position_ids` is dropped here, on purpose."""
    return attention_mask


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    spans: Tensor | None = None,
    role: Tensor | int | None = None,
    source_limit: Tensor | None = None,
    position_ids: Tensor | None = None,
    streamkernels_route: Route | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer: `incremental_prefill` when the forward has a GroupedCache, else `span_attention` under
    the caller's `spans` or the causal rule.

    query [B, H, T, D], key and value [B, HK, S, D], rotated by the model. Returns ([B, T, H, D], None).
    """
    if not is_ours(module, is_causal):
        mask = attention_mask
        if mask is not None and mask.dim() == 2:
            mask = mask[:, None, None, :]
        options: dict[str, Any] = {"dropout": dropout, "scaling": scaling, "is_causal": False}
        return sdpa_attention_forward(module, query, key, value, mask, **options)
    if streamkernels_route is None:
        refuse(_OP, "model", "a forward of a model patched by streamkernels.patch", "none in progress")
    if dropout:
        refuse(_OP, "dropout", "0", dropout, NotImplementedError)
    # fp32 weights under autocast give q and k in fp32 (cos, sin are) but v in the autocast dtype
    query, key = query.to(value.dtype), key.to(value.dtype)
    if streamkernels_route.cache is not None:
        stream = streamkernels_route.cache.stream
        layer = module.layer_idx
        source_begin, target_begin = streamkernels_route.begins_on(sliding_window, query.device)
        options = {
            "role": role,
            "source_limit": source_limit,
            "source_begin": source_begin,
            "target_begin": target_begin,
            "scale": scaling,
            "softcap": softcap,
        }
        o: Any = incremental_prefill(query, key, value, None, None, stream, layer, **options)
    else:
        place = (sliding_window, position_ids)
        visible, prepared = _visible(streamkernels_route, query, key, attention_mask, spans, *place)
        o = span_attention(query, key, value, visible, scale=scaling, softcap=softcap, prepared=prepared)
    return o.transpose(1, 2), None


def _visible(
    route: Route,
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    spans: Tensor | None,
    window: int | None,
    positions: Tensor | None,
) -> Prepared:
    """The Spans of this forward on the device of `query`: the caller's, or causal, inside the layer's window if it has
    one, and what `prepare` makes of them; a key that the padding mask hides is in the class that every row skips."""
    B, T, S = query.shape[0], query.shape[2], key.shape[2]
    place = (query.device, window, S)
    if place not in route.visible:
        if window is not None:
            if positions is None:
                positions = torch.arange(T, device=query.device)[None]
            bounds = buffer_spans(spans, positions.to(query.device), window, route.window, (B, T, S))
        else:
            bounds = spans if spans is not None else bottom_right(T, S, B=B, device=query.device).bounds
        # a layer's cache may have dropped keys that no row sees any more
        hidden = None if mask is None else ~mask[:, -S:].bool()
        # one device read per forward, as transformers' own sdpa mask does, buys the plain path for a mask of ones
        if hidden is None or not (_traced() or hidden.any()):
            visible = Spans(bounds)
        else:
            visible = Spans(
                bounds,
                key_class=hidden.to(torch.int8),
                row_class=torch.zeros(B, T, dtype=torch.int8, device=query.device),
                class_rules=torch.tensor([[ATTEND, SKIP]], dtype=torch.int8, device=query.device),
            )
        route.visible[place] = visible, prepare(visible, S)
    return route.visible[place]


def _traced() -> bool:
    return torch.compiler.is_compiling() or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())


def register() -> None:
    """Tell transformers our name; done on import, harmless for models that do not use it, and never taken back, since a
    config that names it must stay readable."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, padding_mask)


register()
