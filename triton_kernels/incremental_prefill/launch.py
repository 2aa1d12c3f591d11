"""Launch incremental_prefill: one launch, and one that joins the splits where there are any; no synchronisation.

The number of splits follows from the shapes and the capacities, never from a length: a CUDA graph that was captured
on an almost empty cache serves a full one.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import triton
from torch import Tensor

from . import tiles
from .forward import attend_kernel, merge_kernel
from .sight import STEP, count_chunks_kernel

LONG_CHUNK = tiles.LONG_CHUNK
LOG2E = 1.4426950408889634


def incremental_prefill(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor | None, sin: Tensor | None,
    source_k: Tensor, source_v: Tensor, target_k: Tensor, target_v: Tensor,
    length: Tensor, status: Tensor, role: Tensor | None, segment: int,
    source_limit: Tensor | None, source_begin: Tensor | None, target_begin: Tensor | None,
    source_sinks: int, target_sinks: int, ring_sinks: int, bounded: bool, source_window: int, target_window: int,
    scale: float, softcap: float, sink_logits: Tensor | None, interleaved: bool, written: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """o [B, H, T, D] stored [B, T, H, D], lse fp32 [B, H, T]; the op's raw arguments, already checked.

    `written`: the chunk lies in the segments already, so it is read there.
    """
    B, H, T, D = q.shape
    HK = k.shape[1]
    o = q.new_empty((B, T, H, D)).transpose(1, 2)
    lse = torch.empty((B, H, T), dtype=torch.float32, device=q.device)
    if o.numel() == 0:
        return o, lse.fill_(-math.inf)
    q, k, v = aligned(q), aligned(k), aligned(v)
    capacities = (source_k.shape[2], target_k.shape[2])
    windows = (source_window, target_window) if bounded else (0, 0)
    sinks = [max(n, ring_sinks if w else 0) for n, w in zip((source_sinks, target_sinks), windows, strict=True)]
    rows = T * (H // HK)
    holes = source_begin is not None or target_begin is not None or max(*sinks, *windows) > 0
    choice = tiles.tile(tiles.forward_kind(rows), capability(q.device), D, q.element_size(), holes)
    row_tiles = triton.cdiv(rows, choice.block_m)
    splits = count_splits(q.device, row_tiles * HK * B, choice, sum(capacities) + (0 if written else T))
    parts = _parts(B * HK * rows, splits, D, q.device) if splits > 1 else (lse, lse, lse)
    logits = lse if sink_logits is None else sink_logits
    meta = constants(q, H // HK, cos, interleaved, role, segment, source_limit, (source_begin, target_begin), sinks)
    with torch.cuda.device_of(q):
        attend_kernel[(row_tiles * splits, HK, B)](
            q, k, v, *((q, q) if cos is None or sin is None else (cos, sin)),
            source_k, source_v, target_k, target_v, length, status,
            *present(status, role, count_chunks(role), source_limit, source_begin, target_begin),
            logits, o, lse, *parts,
            *factors(scale, softcap, q.dtype), T, HK, splits, *capacities, *sinks, ring_sinks, *windows,
            *eighths(q), *eighths(k), *eighths(v), *angle_strides(cos, sin),
            *eighths(source_k), *eighths(source_v), *eighths(target_k), *eighths(target_v), *eighths(o),
            *length.stride(), *strides(role), *strides(source_limit), *strides(source_begin), *strides(target_begin),
            RINGS=(windows[0] > 0) + 2 * (windows[1] > 0), SOFTCAP=softcap != 0.0, SINK_LOGITS=sink_logits is not None,
            CHUNK=not written, SPLIT=splits > 1, **meta, **shape(choice, D),
        )  # fmt: skip
        if splits > 1:
            merge_kernel[(rows, HK, B)](
                *parts, logits, o, lse, T, HK, splits, *eighths(o),
                R=H // HK, D=D, SINK_LOGITS=sink_logits is not None, PRECISION=meta["PRECISION"],
                MOST=tiles.MOST_SPLITS, BLOCK_P=16, BLOCK_D=tiles.block_d(D), num_warps=4,
            )  # fmt: skip
    return o, lse


def constants(
    q: Tensor, R: int, cos: Tensor | None, interleaved: bool, role: Tensor | None, segment: int, limit: Tensor | None,
    begins: tuple[Tensor | None, Tensor | None], sinks: list[int],
) -> dict[str, Any]:  # fmt: skip
    """What every kernel is compiled for beside its tile."""
    return {
        "R": R, "D": q.shape[3], "ROTARY": 0 if cos is None else 2 * cos.shape[2], "INTERLEAVED": interleaved,
        "HAS_ROLE": role is not None,
        "HAS_COUNTS": role is not None and role.shape[1] > STEP.value, "SEGMENT": segment if role is None else 0,
        "HAS_LIMIT": limit is not None,
        "HAS_SOURCE_BEGIN": begins[0] is not None, "HAS_TARGET_BEGIN": begins[1] is not None, "SINKS": max(sinks) > 0,
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
    }  # fmt: skip


def shape(choice: tiles.Tile, D: int) -> dict[str, int]:
    """A tile as the kernels take it."""
    return {
        "BLOCK_M": choice.block_m, "BLOCK_S": choice.block_s, "BLOCK_C": choice.block_c, "BLOCK_D": tiles.block_d(D),
        "STAGES": choice.num_stages, "num_warps": choice.num_warps,
    }  # fmt: skip


def count_splits(device: torch.device, programs: int, choice: tiles.Tile, keys: int) -> int:
    """Over how many programs the keys of a row tile are spread: what fills the GPU, and not more than there can be
    pairs of tiles."""
    slots = multiprocessors(device) * choice.resident
    once, twice = slots // programs, 2 * slots // programs
    # a second wave where one would leave many multiprocessors idle
    room = twice if twice > 2.16 * once else once
    return max(1, min(room, tiles.MOST_SPLITS, triton.cdiv(keys, 2 * choice.block_s)))


def factors(scale: float, softcap: float, dtype: torch.dtype) -> tuple[float, float]:
    """What is applied inside the tanh, and what scales the result to the exponent's unit."""
    unit = 1.0 if dtype == torch.float32 else LOG2E
    return (scale / softcap, softcap * unit) if softcap else (1.0, scale * unit)


def aligned(x: Tensor) -> Tensor:
    """x [B, heads, T, D] with strides that are multiples of 8 elements; models hand over nothing else."""
    if x.stride(3) == 1 and all(s % 8 == 0 or n == 1 for s, n in zip(x.stride()[:3], x.shape[:3], strict=True)):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def eighths(x: Tensor) -> tuple[int, int, int]:
    """Strides of [B, heads, rows, D] in units of 8 elements; that of a dim of size 1 is never used."""
    batch, head, row, _ = x.stride()
    return batch // 8, head // 8, row // 8


def angle_strides(cos: Tensor | None, sin: Tensor | None) -> tuple[int, int, int, int]:
    """Strides of cos and sin [B or 1, T, ROTARY / 2]; a batch of one serves all."""
    if cos is None or sin is None:
        return 0, 0, 0, 0
    batches = [x.stride(0) if x.shape[0] > 1 else 0 for x in (cos, sin)]
    return batches[0], cos.stride(1), batches[1], sin.stride(1)


def strides(x: Tensor | None) -> tuple[int, ...]:
    """Strides of [B, T]."""
    return (0, 0) if x is None else x.stride()


def count_chunks(role: Tensor | None) -> Tensor | None:
    """Source and target rows of every STEP rows of a longer chunk, int32 [B, chunks, 2]."""
    if role is None or role.shape[1] <= STEP.value:
        return None
    B, T = role.shape
    chunks = triton.cdiv(T, STEP.value)
    counts = torch.empty((B, chunks, 2), dtype=torch.int32, device=role.device)
    count_chunks_kernel[(chunks, B)](role, counts, T, chunks, *role.stride(), num_warps=4)
    return counts


def present(absent: Tensor, *given: Tensor | None) -> list[Tensor]:
    """Tensors that are not there are stood for by one that is never read."""
    return [absent if x is None else x for x in given]


def _parts(rows: int, splits: int, D: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    memory = torch.empty(rows * splits * (D + 2), dtype=torch.float32, device=device)
    o, m, norm = memory.split([rows * splits * D, rows * splits, rows * splits])
    return o, m, norm


@functools.cache
def multiprocessors(device: torch.device) -> int:
    # as if on a small GPU: the interpreter then runs the splits too
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


@functools.cache
def capability(device: torch.device) -> int:
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
