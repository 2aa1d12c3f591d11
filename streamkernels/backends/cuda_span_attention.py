"""The CUDA kernel of span_attention for few query rows, from tensors to pointers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import _ext
from .tensors import DTYPES, NO_ROWS, NO_TABLE, first_strides, rows_of, stream_of

if TYPE_CHECKING:
    from .select import Call

MOST_ROWS = 64
HEAD_DIMS = (64, 96, 128, 256)


def span_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: Tensor,
    rules: Sequence[int],
    sink_key: Tensor | None,
    kept: Tensor | None,
    kept_count: Tensor | None,
    key_class: Tensor | None,
    row_class: Tensor | None,
    class_rules: Tensor | None,
    class_sink: Tensor | None,
    sink_logits: Tensor | None,
    row_blocks: Tensor | None,
    key_blocks: Tensor | None,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """o [B, H, T, D] stored [B, T, H, D] and lse fp32 [B, H, T]: one launch, and one to join the splits."""
    B, H, T, D = q.shape
    HK, S = k.shape[1:3]
    device = q.device
    o = torch.empty((B, T, H, D), dtype=q.dtype, device=device)
    lse = torch.empty((B, H, T), dtype=torch.float32, device=device)
    if B * H * T:
        q, k, v, bounds = _on_borders(q), _on_borders(k), _on_borders(v), bounds.contiguous()
        sinks = (0, False) if sink_logits is None else (sink_logits.data_ptr(), sink_logits.dtype == torch.float32)
        arguments = (
            rows_of(q), rows_of(k), rows_of(v), o.data_ptr(), lse.data_ptr(), bounds.data_ptr(),
            NO_TABLE if sink_key is None else first_strides(sink_key), NO_ROWS if kept is None else _lists(kept),
            NO_TABLE if kept_count is None else first_strides(kept_count), *sinks,
            B, H, HK, T, S, D, bounds.shape[2], 0 if kept is None else kept.shape[2], tuple(rules), scale, softcap,
            DTYPES[q.dtype], device.index,
        )  # fmt: skip
        module = _ext.load()
        splits = module.span_attention_splits(*arguments)
        room = None
        if splits > 1:
            # sums and (top, sum) of every split
            room = torch.empty(splits * B * H * T * (D + 2), dtype=torch.float32, device=device)
        module.span_attention(*arguments, 0 if room is None else room.data_ptr(), splits, stream_of(device))
    return o.transpose(1, 2), lse


def _on_borders(x: Tensor) -> Tensor:
    """x itself when every row lies on a 16-byte border, else a copy."""
    batch, head, row, last = x.stride()
    return x if (x.data_ptr() % 16, batch % 8, head % 8, row % 8, last) == (0, 0, 0, 0, 1) else x.contiguous()


def _lists(kept: Tensor) -> tuple[int, int, int, int]:
    batch, head, entry = kept.stride()
    return kept.data_ptr(), batch, head, entry


def _takes_span_attention(call: Call) -> str | None:
    sizes, features = call.sizes, call.features
    if sizes.get("T", 1) > MOST_ROWS:
        # without the number: a length that becomes text would compile anew for every length
        return f"the CUDA kernel takes at most {MOST_ROWS} query rows"
    if sizes.get("D", 64) not in HEAD_DIMS:
        return f"the CUDA kernel takes a head dim D of 64, 96, 128 or 256, not {sizes['D']}"
    if call.dtype == torch.float32:
        return "the CUDA kernel takes float16 and bfloat16, not float32"
    if "backward" in features:
        return "the CUDA kernel has no backward"
    if "classes" in features:
        return "the CUDA kernel has no class table"
    if "scale" in features:
        return "the CUDA kernel needs a scale > 0"
    return None


KERNELS: dict[str, Callable[[Call], str | None]] = {"span_attention": _takes_span_attention}
