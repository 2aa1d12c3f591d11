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

from ..device.launch import Box, Launch, on_device_of, signature
from ..device.memory import Memory, packed, remembered
from . import tiles
from .forward import attend_kernel
from .merge import merge_few_kernel, merge_kernel
from .sight import STEP, count_chunks_kernel

LONG_CHUNK = tiles.LONG_CHUNK
LOG2E = 1.4426950408889634
# by the signature of a call
PLANS: dict[Any, _Forward] = {}


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
    if q.numel() == 0:
        B, H, T, D = q.shape
        o = q.new_empty((B, T, H, D)).transpose(1, 2)
        return o, torch.full((B, H, T), -math.inf, dtype=torch.float32, device=q.device)
    segments = (source_k, source_v, target_k, target_v)
    rest = (length, status, role, source_limit, source_begin, target_begin, sink_logits)
    windows = (source_window, target_window) if bounded else (0, 0)
    sinks = [max(n, ring_sinks if w else 0) for n, w in zip((source_sinks, target_sinks), windows, strict=True)]
    numbers = (*sinks, ring_sinks, *windows)
    key = (segment, numbers, scale, softcap, interleaved, written, signature(q, k, v, cos, sin, *segments, *rest))

    def make() -> _Forward:
        meta = constants(q, q.shape[1] // k.shape[1], cos, interleaved, role, segment, source_limit,
                         (source_begin, target_begin), sinks)  # fmt: skip
        return _Forward((q, k, v), (cos, sin), segments, rest, numbers, scale, softcap, meta, written)

    plan = remembered(PLANS, key, make)
    if not plan.as_given:
        q, k, v = aligned(q), aligned(k), aligned(v)
    empty = plan.memory.here()
    o, lse = empty(*plan.o, q.dtype), empty(*plan.lse, torch.float32)
    parts: tuple[Tensor, ...] = (lse, lse, lse)
    with on_device_of(q):
        if plan.merge is not None:
            parts = empty(*plan.parts, torch.float32).split(plan.pieces)
        logits = lse if sink_logits is None else sink_logits.contiguous()
        plan.attend(
            *(segments if plan.boxes else (None, None, None, None)),
            q, k, v, *((q, q) if cos is None or sin is None else (cos, sin)), *segments, length, status,
            *present(status, role, count_chunks(role), source_limit, source_begin, target_begin),
            logits, o, lse, *parts,
        )  # fmt: skip
        if plan.merge is not None:
            plan.merge(*parts, logits, o, lse)
    return o, lse


class _Forward:
    """What calls of one signature have in common: their launches, and the sizes of what they allocate."""

    def __init__(
        self, rows: tuple[Tensor, ...], angles: tuple[Tensor | None, ...], segments: tuple[Tensor, ...],
        rest: tuple[Tensor | None, ...], numbers: tuple[int, ...], scale: float, softcap: float, meta: dict[str, Any],
        written: bool,
    ) -> None:  # fmt: skip
        q, k, v = (aligned(x) for x in rows)
        self.as_given = q is rows[0] and k is rows[1] and v is rows[2]
        length, _, role, source_limit, source_begin, target_begin, sink_logits = rest
        B, H, T, D = q.shape
        HK, R = k.shape[1], meta["R"]
        self.o, self.lse = ((B, H, T, D), (T * H * D, D, H * D, 1)), packed(B, H, T)
        self.memory = Memory(q.device)
        holes = source_begin is not None or target_begin is not None or max(numbers) > 0
        place = capability(q.device)
        choice = tiles.tile(tiles.forward_kind(T * R), place, D, q.element_size(), holes)
        self.boxes = choice.boxes and not holes and all(x.data_ptr() % 16 == 0 for x in segments)
        columns = tiles.block_d(D)
        boxes = tuple(Box(x, choice.block_s, columns) if self.boxes else None for x in segments)
        capacities = (segments[0].shape[2], segments[2].shape[2])
        items = triton.cdiv(T * R, choice.block_m) * HK * B
        keys = sum(capacities) + (0 if written else T)
        shared = share_out(q.device, items, choice, keys)
        parts = -(-shared[2] // shared[1])
        through = self.boxes and (written or keys >= tiles.FAR * choice.block_s * parts)
        self.attend = Launch(
            attend_kernel, (items * parts,),
            (
                *factors(scale, softcap, q.dtype), T, HK, HK * B, *shared, *capacities, *numbers,
                *eighths(q), *eighths(k), *eighths(v), *angle_strides(*angles),
                *(n for x in segments for n in eighths(x)), self.o[1][0] // 8, self.o[1][1] // 8, self.o[1][2] // 8,
                *length.stride(), *strides(role), *strides(source_limit), *strides(source_begin),
                *strides(target_begin),
            ),
            boxes, RINGS=(numbers[3] > 0) + 2 * (numbers[4] > 0), SOFTCAP=softcap != 0.0,
            SINK_LOGITS=sink_logits is not None, CHUNK=not written, SPLIT=parts > 1, BOXES=self.boxes,
            THROUGH_MEMORY=through, **meta, **shape(choice, D),
        )  # fmt: skip
        self.merge = None
        if parts > 1:
            count = B * HK * T * R
            # as many numbers as keep every piece aligned
            scalars = triton.cdiv(count * parts, 4) * 4
            self.pieces = [count * parts * D, scalars, scalars]
            self.parts = packed(sum(self.pieces))
            few = parts <= tiles.FEW_PARTS
            rows_at_once = 8 if few else 1
            self.merge = Launch(
                merge_few_kernel if few else merge_kernel, (triton.cdiv(T * R, rows_at_once), HK, B),
                (T, HK, parts, self.o[1][0] // 8, self.o[1][1] // 8, self.o[1][2] // 8),
                R=R, D=D, SINK_LOGITS=sink_logits is not None, PRECISION=meta["PRECISION"],
                MOST=tiles.FEW_PARTS if few else tiles.MOST_SPLITS, BLOCK_P=rows_at_once if few else 16,
                BLOCK_D=columns, num_warps=4,
            )  # fmt: skip


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


def share_out(device: torch.device, items: int, choice: tiles.Tile, keys: int) -> tuple[int, int, int]:
    """How the keys of `items` row tiles are cut so that programs fill the GPU: (even parts, shares of each, shares in
    all). What the even parts leave is one more part of each item, for the multiprocessors that the even ones leave.
    """
    slots = multiprocessors(device) * choice.resident
    tiles_of_keys = triton.cdiv(keys, choice.block_s)
    even = max(1, min(slots // items, tiles.MOST_SPLITS - 1, triton.cdiv(tiles_of_keys, 2)))
    idle = -even * items % slots
    if idle == 0 or (even == 1 and keys < tiles.WORTH_CUTTING):
        return even, 1, even
    # so many of the small parts one after another take as long as an even part
    weight = triton.cdiv(items, idle)
    shares = even * weight + 1
    # a twentieth of the time, and a few tiles in the small part
    if shares > 20 or tiles_of_keys < 4 * shares:
        return even, 1, even
    return even, weight, shares


def far_capacity(device: torch.device, H: int) -> int:
    """Keys of a segment from which a chunk just not written first has many key tiles per program (`tiles.FAR`)."""
    return triton.cdiv(tiles.FAR * 64 * 2 * multiprocessors(device), 2 * H)


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


@functools.cache
def multiprocessors(device: torch.device) -> int:
    # as if on a small GPU: the interpreter then runs the splits too
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


@functools.cache
def capability(device: torch.device) -> int:
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
