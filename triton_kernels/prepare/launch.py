"""Launch prepare: two small kernels, no synchronisation."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from .forward import key_blocks_kernel, row_blocks_kernel

BLOCK = 64


def prepare(bounds: Tensor, S: int) -> tuple[Tensor, Tensor]:
    """`reference.prepare` in two launches."""
    B, T, N, _ = bounds.shape
    TB, SB = triton.cdiv(T, BLOCK), triton.cdiv(S, BLOCK)
    bounds = bounds.contiguous()
    row_blocks = bounds.new_empty((B, TB, N, 4))
    key_blocks = bounds.new_zeros((B, SB, 4)) if TB == 0 else bounds.new_empty((B, SB, 4))
    if B * TB:
        with torch.cuda.device_of(bounds):
            row_blocks_kernel[(TB, B)](bounds, row_blocks, T, S, TB, N=N, num_warps=1)
            if SB:
                key_blocks_kernel[(SB, B)](row_blocks, key_blocks, TB, SB, N=N, BLOCK=256, num_warps=4)
    return row_blocks, key_blocks
