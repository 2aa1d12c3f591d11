"""The attention that a pruned model's layers call, and the hooks around them that need no handle."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from ...core.shapes import refuse
from .prune_forward import Pass
from .prune_models import OP

NAME = "streamkernels_pruned"
PASS = "streamkernels_pass"  # the keyword that carries a Pass from the language model's hook to every layer


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    streamkernels_pass: Pass | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """What the layers of a pruned model call after RoPE and the cache: query [B, H, T, D] -> ([B, T, H, D], None)."""
    if streamkernels_pass is None:
        refuse(OP, "model", "a forward of a model that is pruned by streamkernels.prune_vision", "none in progress")
    if dropout:
        refuse(OP, "dropout", "0", dropout, NotImplementedError)
    if query.dtype != value.dtype:
        query, key = query.to(value.dtype), key.to(value.dtype)
    o = streamkernels_pass.attend(module.layer_idx, query, key, value, scaling)
    return o.transpose(1, 2), None


def padding_mask(*_: Any, attention_mask: Tensor | None = None, **__: Any) -> Tensor | None:
    """The mask function beside it: the 2-D padding mask as it came."""
    return attention_mask


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, padding_mask)


def before_layer(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Before one decoder layer: its rows, and the tables for them. The changed arguments, or None if they stay."""
    step: Pass | None = kwargs.get(PASS)
    if step is None:
        return None
    if index == 0:
        step.open(kwargs.get("past_key_values"))
    if step.passes_through:
        return None
    hidden = args[0] if args else kwargs["hidden_states"]
    tables, positions = kwargs["position_embeddings"], kwargs.get("position_ids")
    moved, changed = step.before(index, hidden, tables, positions)
    if moved is hidden and changed is tables:
        return None
    rest = {name: x for name, x in kwargs.items() if name != "hidden_states"}
    return (moved, *args[1:]), {**rest, "position_embeddings": changed}


class LayerHook:
    """`before_layer` as a hook."""

    def __init__(self, index: int) -> None:
        self.index = index

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return before_layer(self.index, args, kwargs)


def before_head(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before the model with logits: labels are refused."""
    if kwargs.get("labels") is not None:
        got = "labels: dropped tokens have no logits to learn from"
        refuse(OP, "labels", "None (pruning is for inference)", got, NotImplementedError)


def after_text(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
    """After the language model: its rows back in their places."""
    step: Pass | None = kwargs.get(PASS)
    if step is None:
        return output
    if isinstance(output, tuple):
        return (step.close(output[0]), *output[1:])
    output.last_hidden_state = step.close(output.last_hidden_state)
    return output


def real_rows(mask: Any, T: int) -> Tensor | None:
    """bool [B, T]: which rows of this call are no padding, from the mask that came, of any form but 4-D."""
    if isinstance(mask, dict):
        mask = mask.get("full_attention")
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[1] < T:
        expected = f"a 2-D padding mask [B, at least {T}]"
        refuse(OP, "attention_mask", expected, mask, NotImplementedError)
    return mask[:, -T:].bool()


def empty(cache: Any) -> bool:
    """Whether a cache is known to hold nothing, without reading the device."""
    length = 0 if cache is None else cache.get_seq_length()
    return not isinstance(length, Tensor) and length == 0


def frozen() -> bool:
    """Whether nothing may be read: a graph is being captured or traced."""
    return torch.compiler.is_compiling() or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())
