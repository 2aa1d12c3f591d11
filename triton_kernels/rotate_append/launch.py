"""Launch rotate_append: no allocation, no synchronisation; lengths are read on the device, so a new length compiles
nothing."""

from __future__ import annotations

import torch
import triton

from . import tiles
from .forward import count_chunks_kernel, rotate_append_kernel


def meta(D: int, rotary_dim: int, choice: tiles.Tile) -> dict[str, int]:
    """The kernel's sizes as constants."""
    power = triton.next_power_of_2
    return {
        "D": D,
        "ROTARY": rotary_dim,
        "BLOCK_T": choice.block_t,
        "BLOCK_HALF": power(max(rotary_dim // 2, 1)),
        "BLOCK_REST": power(max(D - rotary_dim, 1)),
        "BLOCK_D": power(D),
        "COUNT": tiles.COUNT,
        "num_warps": choice.num_warps,
    }


def rotate_append(
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    source_k: torch.Tensor,
    source_v: torch.Tensor,
    target_k: torch.Tensor,
    target_v: torch.Tensor,
    length: torch.Tensor,
    status: torch.Tensor,
    role: torch.Tensor | None,
    segment: int,
    sinks: int,
    bounded: bool,
    interleaved: bool,
) -> None:
    """Rotate k and write k, v beyond the committed lengths; the op's raw arguments, already checked."""
    B, HK, T, D = k.shape
    if B * HK * T == 0:
        return
    rotary_dim = 0 if cos is None else 2 * cos.shape[-1]
    choice = tiles.tile(D * k.element_size())
    if cos is None or sin is None:
        cos = sin = k
        angle_strides = (0, 0, 0, 0)
    else:
        angle_strides = (
            cos.stride(0) if cos.shape[0] > 1 else 0, cos.stride(1),
            sin.stride(0) if sin.shape[0] > 1 else 0, sin.stride(1),
        )  # fmt: skip
    with torch.cuda.device_of(k):
        long = role is not None and T > tiles.COUNT
        counts = _count_chunks(role) if role is not None and long else status
        rotate_append_kernel[(triton.cdiv(T, choice.block_t) * HK, B)](
            k, v, cos, sin, source_k, source_v, target_k, target_v,
            length, status, status if role is None else role, counts,
            T, HK, source_k.shape[2], target_k.shape[2], sinks,
            *k.stride()[:3], *v.stride()[:3], *angle_strides,
            *source_k.stride()[:3], *source_v.stride()[:3], *target_k.stride()[:3], *target_v.stride()[:3],
            *length.stride(), *((0, 0) if role is None else role.stride()),
            INTERLEAVED=interleaved, BOUNDED=bounded, HAS_ROLE=role is not None, HAS_COUNTS=long,
            SEGMENT=segment if role is None else 0,
            **meta(D, rotary_dim, choice),
        )  # fmt: skip


def _count_chunks(role: torch.Tensor) -> torch.Tensor:
    B, T = role.shape
    chunks = triton.cdiv(T, tiles.COUNT)
    counts = torch.empty((B, chunks, 2), dtype=torch.int32, device=role.device)
    count_chunks_kernel[(chunks, B)](role, counts, T, chunks, *role.stride(), COUNT=tiles.COUNT, num_warps=4)
    return counts
