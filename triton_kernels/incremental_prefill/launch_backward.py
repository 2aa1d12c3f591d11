"""Launch the backward of incremental_prefill: allocation of outputs and statistics only, no synchronisation."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from . import tiles
from .backward import dkdv_kernel, dq_kernel, place_kernel, rotate_kernel, row_statistics_kernel
from .launch import (
    aligned,
    angle_strides,
    capability,
    constants,
    count_chunks,
    count_splits,
    eighths,
    factors,
    present,
    shape,
    strides,
)


def incremental_prefill_backward(
    do: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor,
    cos: Tensor | None, sin: Tensor | None,
    source_k: Tensor, source_v: Tensor, target_k: Tensor, target_v: Tensor, length: Tensor,
    role: Tensor | None, segment: int, source_limit: Tensor | None, source_begin: Tensor | None,
    target_begin: Tensor | None, source_sinks: int, target_sinks: int,
    scale: float, softcap: float, sink_logits: Tensor | None, interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv as q, k, v (stored rows first), d sink_logits [H] (empty without)."""
    B, H, T, D = q.shape
    HK = k.shape[1]
    R = H // HK
    grads = [x.new_empty((B, T, x.shape[1], D)).transpose(1, 2) for x in (q, k, v)]
    dsink = q.new_empty(0) if sink_logits is None else torch.zeros_like(sink_logits)
    if q.numel() == 0:
        return grads[0], grads[1], grads[2], dsink
    sinks = [source_sinks, target_sinks]
    meta = constants(q, R, cos, interleaved, role, segment, source_limit, (source_begin, target_begin), sinks)
    with torch.cuda.device_of(q):
        places = _places(length, role, segment, source_limit, source_begin, target_begin, source_k, target_k, T, meta)
        turned = q, k
        if cos is not None and sin is not None:
            turned = _rotate(q, cos, sin, meta), _rotate(k, cos, sin, meta)
        q, k, v, do = aligned(turned[0]), aligned(turned[1]), aligned(v), aligned(do.to(q.dtype))
        total, delta, share = (torch.empty_like(lse) for _ in range(3))
        logits = lse if sink_logits is None else sink_logits.contiguous()
        row_statistics_kernel[(B * H, triton.cdiv(T, 32))](
            o, do, lse, lse if dlse is None else dlse, logits, total, delta, share,
            T, H, *o.stride()[:3], *do.stride()[:3], *(lse if dlse is None else dlse).stride(),
            D=D, HAS_DLSE=dlse is not None, SINK_LOGITS=sink_logits is not None, PRECISION=meta["PRECISION"],
            BLOCK_T=32, BLOCK_D=tiles.block_d(D), num_warps=4,
        )  # fmt: skip
        common = {"R": R, "D": D, "SINKS": meta["SINKS"], "SOFTCAP": softcap != 0.0, "PRECISION": meta["PRECISION"]}
        scales = (*factors(scale, softcap, q.dtype), scale)
        rows = (*eighths(q), *eighths(k), *eighths(v), *eighths(do))

        choice = tiles.tile("dq", capability(q.device), D, q.element_size())
        row_tiles = triton.cdiv(T * R, choice.block_m)
        splits = count_splits(q.device, row_tiles * HK * B, choice, source_k.shape[2] + target_k.shape[2] + T)
        parts = torch.empty((splits, B, T, H, D), dtype=torch.float32, device=q.device).transpose(2, 3)
        dq_kernel[(row_tiles * splits, HK, B)](
            q, do, k, v, source_k, source_v, target_k, target_v, total, delta, *places, parts,
            *scales, T, HK, splits, *sinks, *rows,
            *eighths(source_k), *eighths(source_v), *eighths(target_k), *eighths(target_v),
            **common, **shape(choice, D),
        )  # fmt: skip
        _rotate(parts, cos, sin, meta, grads[0])

        choice = tiles.tile("dkdv", capability(q.device), D, q.element_size())
        dk = torch.empty((B, T, HK, D), dtype=torch.float32, device=q.device).transpose(1, 2)
        meta_tile = shape(choice, D)
        del meta_tile["BLOCK_S"]
        dkdv_kernel[(triton.cdiv(T, choice.block_c), HK, B)](
            q, do, k, v, total, delta, places[0], places[1], dk, grads[2],
            *scales, T, HK, *sinks, *rows, *eighths(dk), *eighths(grads[2]),
            HAS_ROLE=role is not None, **common, **meta_tile,
        )  # fmt: skip
        _rotate(dk, cos, sin, meta, grads[1])
    if sink_logits is not None:
        dsink = share.sum((0, 2)).to(sink_logits.dtype)
    return grads[0], grads[1], grads[2], dsink


def _places(
    length: Tensor, role: Tensor | None, segment: int, limit: Tensor | None, source_begin: Tensor | None,
    target_begin: Tensor | None, source_k: Tensor, target_k: Tensor, T: int, meta: dict[str, Any],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """What rows see and where keys stand: sight [B, T, 4], placed [B, T, 2], kept [B, 2]."""
    B = length.shape[0]
    sight, placed, kept = (
        torch.empty(n, dtype=torch.int32, device=length.device) for n in (B * T * 4, B * T * 2, B * 2)
    )
    given = present(length, role, count_chunks(role), limit, source_begin, target_begin)
    names = ("HAS_ROLE", "HAS_COUNTS", "SEGMENT", "HAS_LIMIT", "HAS_SOURCE_BEGIN", "HAS_TARGET_BEGIN")
    place_kernel[(triton.cdiv(T, 128), B)](
        length, *given, sight, placed, kept, T, source_k.shape[2], target_k.shape[2],
        *length.stride(), *strides(role), *strides(limit), *strides(source_begin), *strides(target_begin),
        **{name: meta[name] for name in names}, BLOCK_T=128, num_warps=4,
    )  # fmt: skip
    return sight, placed, kept


def _rotate(
    x: Tensor, cos: Tensor | None, sin: Tensor | None, meta: dict[str, Any], to: Tensor | None = None
) -> Tensor:
    """x [B, heads, T, D] rotated, or, into `to`, the sum of x [parts, B, heads, T, D] or of one part turned back."""
    back = to is not None
    if to is None:
        to = x.new_empty((x.shape[0], x.shape[2], x.shape[1], x.shape[3])).transpose(1, 2)
    parts = x if x.dim() == 5 else x[None]
    B, heads, T, D = to.shape
    rotary = meta["ROTARY"]
    angles = (to, to) if cos is None or sin is None else (cos, sin)
    rotate_kernel[(triton.cdiv(T, 16), heads, B)](
        parts, *angles, to, T, parts.shape[0], *parts.stride()[:4], *to.stride()[:3], *angle_strides(cos, sin),
        D=D, ROTARY=rotary, INTERLEAVED=meta["INTERLEAVED"] and rotary > 0, BACK=back, BLOCK_T=16,
        BLOCK_D=tiles.block_d(D), num_warps=4,
    )  # fmt: skip
    return to
