"""Launch rotate: one kernel, no synchronisation; a new length compiles nothing."""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from .forward import rotate_kernel

# of one program's rows, in bytes: as much in flight as rotate_append's tiles have
TILE_BYTES = 8192
WARPS = 4


def meta(D: int, rotary_dim: int, element_size: int) -> dict[str, int]:
    """The kernel's sizes as constants."""
    power = triton.next_power_of_2
    return {
        "D": D,
        "ROTARY": rotary_dim,
        "BLOCK_T": TILE_BYTES // (max(power(D), 16) * element_size),
        "BLOCK_HALF": power(rotary_dim // 2),
        "BLOCK_REST": power(max(D - rotary_dim, 1)),
    }


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x [B, H, T, D] rotated, contiguous; the op's raw arguments, already checked."""
    B, H, T, D = x.shape
    out = torch.empty((B, H, T, D), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    sizes = meta(D, 2 * cos.shape[2], x.element_size())
    angles = *_strides(cos, 0, 1), *_strides(sin, 0, 1)
    step = math.gcd(*angles, cos.shape[2], 16)
    with torch.cuda.device_of(x):
        rotate_kernel[(triton.cdiv(T, sizes["BLOCK_T"]) * H, B)](
            x, out, cos, sin, T, H, *_strides(x, 0, 1, 2), *_strides(out, 0, 1, 2),
            *(stride // step for stride in angles), STEP=step, INTERLEAVED=interleaved, **sizes, num_warps=WARPS,
        )  # fmt: skip
    return out


def _strides(x: Tensor, *dims: int) -> tuple[int, ...]:
    # that of a dim of size 1 is never used and may be anything; for angles it is the step to the batch, 0 if all share
    return tuple(x.stride(i) if x.shape[i] > 1 else 0 for i in dims)
