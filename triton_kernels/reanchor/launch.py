"""Launch reanchor: one kernel, in place, no allocation, no synchronisation; a new length compiles nothing."""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from .forward import reanchor_kernel

# of what one program rotates, in bytes: as much in flight as rotate_append's tiles have
TILE_BYTES = 8192
WARPS = 4


def meta(rotary_dim: int, element_size: int) -> dict[str, int]:
    """The kernel's sizes as constants."""
    half = triton.next_power_of_2(rotary_dim // 2)
    return {"ROTARY": rotary_dim, "BLOCK_S": TILE_BYTES // (max(2 * half, 16) * element_size), "BLOCK_HALF": half}


def reanchor(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> None:
    """Rotate x [B, HK, S, D] in place; the op's raw arguments, already checked."""
    B, HK, S, _ = x.shape
    if x.numel() == 0:
        return
    sizes = meta(2 * cos.shape[2], x.element_size())
    angles = *_strides(cos, 0, 1), *_strides(sin, 0, 1)
    step = math.gcd(*angles, cos.shape[2], 16)
    with torch.cuda.device_of(x):
        reanchor_kernel[(triton.cdiv(S, sizes["BLOCK_S"]) * HK, B)](
            x, cos, sin, S, HK, *_strides(x, 0, 1, 2), *(stride // step for stride in angles),
            STEP=step, INTERLEAVED=interleaved, **sizes, num_warps=WARPS,
        )  # fmt: skip


def _strides(x: Tensor, *dims: int) -> tuple[int, ...]:
    # that of a dim of size 1 is never used and may be anything; for angles 0: one row or one sample serves all
    return tuple(x.stride(i) if x.shape[i] > 1 else 0 for i in dims)
