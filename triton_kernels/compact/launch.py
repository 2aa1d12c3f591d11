"""Launch compact: one kernel, no synchronisation."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor

from ..device.launch import Launch, on_device_of, signature
from ..device.memory import remembered
from .forward import compact_kernel

# element size -> the integer that rows are copied as
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# widest row -> (BLOCK_K, BLOCK_Q): numbers per token (positions), heads of a cache, hidden states
TILES = {8: (256, 8), 128: (32, 128), 2**63: (4, 1024)}
WARPS = 4

# by the signature of a call
PLANS: dict[Any, Launch] = {}


def tile(Q: int) -> tuple[int, int]:
    """(BLOCK_K, BLOCK_Q) for rows of Q elements."""
    return next(choice for widest, choice in TILES.items() if Q <= widest)


def compact(x: Tensor, index: Tensor, count: Tensor, dim: int) -> Tensor:
    """x with the K listed tokens along `dim`, contiguous; the op's raw arguments, already checked."""
    B, S, K = x.shape[0], x.shape[dim], index.shape[1]
    out = x.new_empty((*x.shape[:dim], K, *x.shape[dim + 1 :]))
    if out.numel() == 0:
        return out
    if S == 0:
        return out.zero_()
    P, Q = math.prod(x.shape[1:dim]), math.prod(x.shape[dim + 1 :])
    rows = x.reshape(B, P, S, Q)
    if Q > 1 and rows.stride(3) != 1:
        rows = rows.contiguous()
    number = INTEGERS[x.element_size()]
    launch = remembered(PLANS, signature(rows, index, count), lambda: _plan(rows, index, count))
    with on_device_of(x):
        launch(rows.view(number), index, count, out.view(number))
    return out


def _plan(rows: Tensor, index: Tensor, count: Tensor) -> Launch:
    B, P, S, Q = rows.shape
    K = index.shape[1]
    strides = [rows.stride(i) if rows.shape[i] > 1 else 0 for i in range(3)]
    step = math.gcd(*strides, Q, 16)
    block_k, block_q = tile(Q)
    numbers = (P, S, K, Q // step, *(stride // step for stride in strides), *index.stride(), count.stride(0))
    return Launch(
        compact_kernel, (triton.cdiv(K, block_k) * triton.cdiv(Q, block_q) * P, B), numbers,
        STEP=step, BLOCK_K=block_k, BLOCK_Q=block_q, num_warps=WARPS,
    )  # fmt: skip
