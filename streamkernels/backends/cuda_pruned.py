"""The CUDA kernels of pruning, from tensors to pointers: token_scores, select_tokens, compact, rotate, reanchor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import _ext
from .tensors import DTYPES, NO_TABLE, first_strides, rows_of, stream_of, table_of

if TYPE_CHECKING:
    from .select import Call

# ops that move elements as bits
ANY_DTYPE = ("compact",)
# heads times head dim, padded, that leave room for keys in the shared memory of every GPU
MOST_QUERY_NUMBERS = 16384
# keys times numbers of q, where backends change places: see hands_over
FEW_NUMBERS, MANY_NUMBERS = 2**20, 2**25


def token_scores(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, index: Tensor, count: Tensor, scale: float, softcap: float
) -> tuple[Tensor, Tensor, Tensor]:
    """cosine, norm, mass, fp32 [B, K] each, in one launch."""
    B, H, _, D = q.shape
    HK, S = k.shape[1:3]
    K = index.shape[1]
    device = q.device
    cosine, norm, mass = (torch.empty((B, K), dtype=torch.float32, device=device) for _ in range(3))
    if B * K:
        _ext.load().token_scores(
            first_strides(q), first_strides(o), rows_of(k), rows_of(v), first_strides(lse), first_strides(index),
            first_strides(count), cosine.data_ptr(), norm.data_ptr(), mass.data_ptr(), B, H, HK, S, D, K, scale,
            softcap, DTYPES[q.dtype], device.index, stream_of(device),
        )  # fmt: skip
    return cosine, norm, mass


def select_tokens(
    scores: Tensor,
    index: Tensor | None,
    count: Tensor | None,
    threshold: float | None,
    limit: int,
    width: int,
    largest: bool,
) -> tuple[Tensor, Tensor]:
    """int32 [B, width] and int32 [B], in one launch: one block per row where the list is limited, else many."""
    B, K = scores.shape
    device = scores.device
    out = torch.empty((B, width), dtype=torch.int32, device=device)
    out_count = torch.empty((B,), dtype=torch.int32, device=device)
    if B:
        _ext.load().select_tokens(
            first_strides(scores), NO_TABLE if index is None else first_strides(index),
            NO_TABLE if count is None else first_strides(count), out.data_ptr(), out_count.data_ptr(),
            0.0 if threshold is None else threshold, threshold is not None, largest, B, K, limit, width,
            DTYPES[scores.dtype], device.index, stream_of(device),
        )  # fmt: skip
    return out, out_count


def compact(x: Tensor, index: Tensor, count: Tensor, dim: int) -> Tensor:
    """x [B, ..., S at dim, ...] -> the same with K at dim, contiguous, in one launch."""
    K = index.shape[1]
    y = torch.empty((*x.shape[:dim], K, *x.shape[dim + 1 :]), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    axes = _axes(x, dim)
    if axes is None:
        return compact(x.contiguous(), index, count, dim)
    (outer, outer_stride), (inner, inner_stride), (columns, column_stride) = axes
    _ext.load().compact(
        x.data_ptr(), x.stride(0), outer_stride, x.stride(dim), inner_stride, column_stride, y.data_ptr(),
        first_strides(index), first_strides(count), x.shape[0], outer, x.shape[dim], inner, columns, K,
        x.element_size(), x.device.index, stream_of(x.device),
    )  # fmt: skip
    return y


def _axes(x: Tensor, dim: int) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]] | None:
    """(length, stride) of what stands before the token axis, behind it, and innermost; None if that is too little to
    say how x lies."""
    outer = _merge(x.shape[1:dim], x.stride()[1:dim])
    inner = _merge(x.shape[dim + 1 :], x.stride()[dim + 1 :])
    if len(outer) > 1 or len(inner) > 2:
        return None
    one = (1, 1)
    columns = inner[-1] if inner else one
    return (outer[0] if outer else one), (inner[0] if len(inner) == 2 else one), columns


def _merge(sizes: Sequence[int], strides: Sequence[int]) -> list[tuple[int, int]]:
    # neighbouring axes that lie as one are one
    merged: list[tuple[int, int]] = []
    for size, stride in zip(sizes, strides, strict=True):
        if size == 1:
            continue
        if merged and merged[-1][1] == size * stride:
            merged[-1] = (merged[-1][0] * size, stride)
        else:
            merged.append((size, stride))
    return merged


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x [B, H, T, D] rotated, contiguous, in one launch."""
    B, H, T, D = x.shape
    y = torch.empty((B, H, T, D), dtype=x.dtype, device=x.device)
    if y.numel():
        _ext.load().rotate(
            rows_of(x), rows_of(y), table_of(cos), table_of(sin), B, H, T, D, 2 * cos.shape[2], interleaved,
            DTYPES[x.dtype], DTYPES[cos.dtype], x.device.index, stream_of(x.device),
        )  # fmt: skip
    return y


def reanchor(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> None:
    """Rotate x [B, HK, S, D] in place by cos, sin [B or 1, S or 1, rotary_dim / 2], in one launch."""
    B, HK, S, _ = x.shape
    if x.numel():
        _ext.load().reanchor(
            rows_of(x), _angles(cos), _angles(sin), B, HK, S, 2 * cos.shape[2], interleaved,
            DTYPES[x.dtype], DTYPES[cos.dtype], x.device.index, stream_of(x.device),
        )  # fmt: skip


def _angles(x: Tensor) -> tuple[int, int, int]:
    # one row of angles serves all keys
    address, batch, row = table_of(x)
    return address, batch, row if x.shape[1] > 1 else 0


def hands_over(call: Call) -> bool:
    """Where Triton was faster on an H200: token_scores in fp32; below 2^20 keys times numbers of q, 3.4 us for 4.3 at
    576 keys of 12 heads of 128; and above 2^25, 49 us for 54 at 11520 keys of 32 heads, where every query head has
    keys of its own. Between them those took 6.9 us for 7.3 at 576 keys, 31 for 33 at 5760. 28 heads that share the keys
    of 4 take 5.0 us for 7.2 at 576 keys and 39 for 82 at 46080."""
    if call.op != "token_scores":
        return False
    B, H, HK, K, D = (call.sizes.get(name, 1) for name in ("B", "H", "HK", "K", "D"))
    numbers = B * H * K * D
    return call.dtype == torch.float32 or numbers < FEW_NUMBERS or (H == HK and numbers > MANY_NUMBERS)


def _takes_head_dim(call: Call) -> str | None:
    D = call.sizes.get("D", 8)
    if D % 8 or not 8 <= D <= 256:
        return f"the CUDA kernel takes a head dim D that is a multiple of 8, at most 256, not {D}"
    return None


def _takes_heads(call: Call) -> str | None:
    D, H = call.sizes.get("D", 8), call.sizes.get("H", 1)
    padded = 64 if D <= 64 else 128 if D <= 128 else 256
    if D % 8 == 0 and call.dtype != torch.float32 and H * padded > MOST_QUERY_NUMBERS:
        return f"the CUDA kernel keeps all heads of q and o on chip, which have no room at H = {H}, D = {D}"
    return _takes_head_dim(call)


def _takes_compact(call: Call) -> str | None:
    return "the gradient of compact has no CUDA kernel" if "backward" in call.features else None


KERNELS: dict[str, Callable[[Call], str | None]] = {
    "token_scores": _takes_heads,
    "select_tokens": lambda call: None,
    "compact": _takes_compact,
    "rotate": _takes_head_dim,
    "reanchor": _takes_head_dim,
}
