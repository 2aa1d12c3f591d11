"""Launch token_scores: one kernel, no synchronisation; lengths are run-time values, so a new one compiles nothing."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
from torch import Tensor

from ..device.launch import Launch, on_device_of, signature
from ..device.memory import remembered
from . import tiles
from .forward import token_scores_kernel

# by the signature of a call
PLANS: dict[Any, Launch] = {}


def meta(HK: int, R: int, D: int, softcap: bool, element_size: int, few: bool) -> dict[str, Any]:
    """The kernel's sizes as constants."""
    choice = tiles.tile(HK, R, D, element_size, few)
    return {
        "R": R, "D": D, "SOFTCAP": softcap,
        "HEADS": choice.heads, "BLOCK_K": choice.block_k, "BLOCK_D": tiles.block_d(D),
        "num_warps": choice.num_warps,
    }  # fmt: skip


def token_scores(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, index: Tensor, count: Tensor, scale: float, softcap: float
) -> tuple[Tensor, Tensor, Tensor]:
    """cosine, norm, mass, fp32 [B, K] each; the op's raw arguments, already checked."""
    B, K = index.shape
    cosine, norm, mass = (torch.empty((B, K), dtype=torch.float32, device=q.device) for _ in range(3))
    if B * K:
        key = (scale, softcap, signature(q, k, v, o, lse, index, count))
        launch = remembered(PLANS, key, lambda: _plan(q, k, v, o, lse, index, count, scale, softcap))
        with on_device_of(q):
            launch(q, o, k, v, lse, index, count, cosine, norm, mass)
    return cosine, norm, mass


def _plan(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, index: Tensor, count: Tensor, scale: float, softcap: float
) -> Launch:
    B, H, _, D = q.shape
    HK, S = k.shape[1:3]
    K = index.shape[1]
    sizes = meta(HK, H // HK, D, softcap != 0.0, q.element_size(), tiles.few_rows(B * HK * K))
    steps = triton.cdiv(K, sizes["BLOCK_K"])
    programs = min(steps, triton.cdiv(tiles.PROGRAMS * _multiprocessors(q.device), B))
    numbers = (
        scale, 1.0 / softcap if softcap else 1.0, softcap or 1.0, S, K, HK,
        *_strides(q, 0, 1), *_strides(o, 0, 1), *_strides(k, 0, 1, 2), *_strides(v, 0, 1, 2),
        *_strides(lse, 0, 1), *_strides(index, 0, 1), *_strides(count, 0),
    )  # fmt: skip
    return Launch(token_scores_kernel, (programs, B), numbers, **sizes)


def _strides(x: Tensor, *dims: int) -> tuple[int, ...]:
    # that of a dim of size 1 is never used and may be anything: one value for all
    return tuple(x.stride(i) if x.shape[i] > 1 else 0 for i in dims)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
