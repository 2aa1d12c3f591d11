"""`incremental_prefill` on the CUDA kernel: outputs, room for partial results, and the call of the extension, which
reads the tensors itself (csrc/incremental_prefill/bind.h)."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..triton_kernels.device.memory import Memory, packed
from .room import Held
from .tensors import DTYPES, needed_reader, stream_of

if TYPE_CHECKING:
    from .select import Call

HEAD_DIMS = (64, 96, 128, 256)
MAX_ROWS, MAX_SESSIONS = 512, 1024
DECODE_ROWS, MANY_SESSIONS = 16, 8
PLAIN_HEAD_DIMS, PLAIN_ROWS = (64, 128, 256), 64


def reason(call: Call) -> str | None:
    """None if the kernel can run `call`, else one sentence why not."""
    sizes = call.sizes
    if call.dtype not in (torch.float16, torch.bfloat16):
        return f"the CUDA kernel takes float16 and bfloat16, not {str(call.dtype).removeprefix('torch.')}"
    if sizes.get("D", 64) not in HEAD_DIMS:
        return f"the CUDA kernel takes a head dim D of 64, 96, 128 or 256, not {sizes['D']}"
    if sizes.get("T", 1) > MAX_ROWS:
        return f"the CUDA kernel takes at most {MAX_ROWS} rows T, not {sizes['T']}"
    if sizes.get("B", 1) > MAX_SESSIONS:
        return f"the CUDA kernel takes at most {MAX_SESSIONS} sessions B, not {sizes['B']}"
    return None


def hands_over(call: Call) -> bool:
    """Where Triton was faster on an H200: many rows per key head in few sessions (one of 32 rows and 7 query heads per
    key head: 10 to 30 % up to 64k keys; but 20 to 50 % slower in ragged batches of 8 to 64 sessions), unless the
    kernel for plain sessions runs (csrc/incremental_prefill/plain: 5 to 50 % faster than Triton's up to 64 rows)."""
    sizes = call.sizes
    rows = sizes.get("T", 1) * (sizes.get("H", 1) // sizes.get("HK", 1))
    return rows > DECODE_ROWS and sizes.get("B", 1) < MANY_SESSIONS and not _is_plain(call)


def _is_plain(call: Call) -> bool:
    """Whether one session's rows all see every key before them, on Hopper."""
    sizes = call.sizes
    if sizes.get("B", 1) > 1 or sizes.get("T", 1) > PLAIN_ROWS or sizes.get("D", 64) not in PLAIN_HEAD_DIMS:
        return False
    return call.features.isdisjoint(("roles", "limits", "begins", "bounded")) and _is_hopper(call.device)


def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


# a constant to torch.compile, as in cuda.py
_is_hopper._dynamo_marked_constant = True  # type: ignore[attr-defined]


def incremental_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    source_k: Tensor,
    source_v: Tensor,
    target_k: Tensor,
    target_v: Tensor,
    length: Tensor,
    status: Tensor,
    role: Tensor | None,
    segment: int,
    source_limit: Tensor | None,
    source_begin: Tensor | None,
    target_begin: Tensor | None,
    source_sinks: int,
    target_sinks: int,
    ring_sinks: int,
    bounded: bool,
    source_window: int,
    target_window: int,
    scale: float,
    softcap: float,
    sink_logits: Tensor | None,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    """`reference.incremental_prefill` with the same raw arguments, as one launch on torch's current stream."""
    B, H, T, D = q.shape
    if q.numel() == 0:
        return q.new_empty((B, T, H, D)).transpose(1, 2), q.new_empty((B, H, T), dtype=torch.float32)
    plan = plan_of(B, H, k.shape[1], T, D, q.dtype, q.device)
    return plan.run(
        (
            q, k, v, cos, sin, source_k, source_v, target_k, target_v, length, status, role,
            source_limit, source_begin, target_begin, None if sink_logits is None else sink_logits.contiguous(),
        ),
        (
            segment, source_sinks, target_sinks, ring_sinks, bounded, source_window, target_window,
            scale, softcap, interleaved,
        ),
    )  # fmt: skip


@functools.lru_cache(maxsize=4096)
def plan_of(B: int, H: int, HK: int, T: int, D: int, dtype: torch.dtype, device: torch.device) -> Plan:
    """What calls of these sizes, of which none is 0, have in common."""
    return Plan(B, H, HK, T, D, dtype, device)


class Plan:
    """The outputs of a call, and what its launch needs besides."""

    def __init__(self, B: int, H: int, HK: int, T: int, D: int, dtype: torch.dtype, device: torch.device) -> None:
        extension = needed_reader()
        self.launch, self.capture_id = extension.incremental_prefill, extension.capture_id
        self.dtype, self.device, self.index = dtype, device, device.index
        # o [B, H, T, D] stored [B, T, H, D]
        self.o = (B, H, T, D), (T * H * D, D, H * D, 1)
        self.lse = packed(B, H, T)
        sizes = extension.incremental_prefill_workspace(B, H, HK, T, D, DTYPES[dtype], device.index or 0)
        self.needs = (*sizes, B * H * T)
        self.memory = Memory(device)

    def run(
        self, tensors: tuple[Tensor | None, ...], numbers: tuple[float, ...], with_lse: bool = True
    ) -> tuple[Tensor, Tensor]:
        """o and lse, or whatever in its place, of the call's tensors and numbers in the op's order, as one launch."""
        stream = stream_of(self.device)
        key = (self.index, stream, self.capture_id(stream))
        room = _held.get(key)
        if room is None or not room.holds(*self.needs):
            room = _held.keep(key, _room(room, self.device, *self.needs))
        empty = self.memory.here()
        o = empty(*self.o, self.dtype)
        lse = empty(*self.lse, torch.float32) if with_lse else room.lse
        self.launch(*tensors, o, lse, room.counters, room.partials, *numbers, stream)
        return o, lse


def gradient(dtype: torch.dtype, scale: float) -> str:
    """The backend that computes the gradient of a call that ran here: Triton where its kernel can, else the
    reference."""
    from . import triton

    able = dtype in (torch.float16, torch.bfloat16) and scale > 0 and triton._missing() is None
    return "triton" if able and "incremental_prefill" in triton.OPS else "reference"


class Room(NamedTuple):
    """What a launch needs besides its outputs: zero counters, room for partial results, and for an lse that nobody
    asked for."""

    counters: Tensor
    partials: Tensor
    lse: Tensor
    sizes: tuple[int, int, int]

    def holds(self, counters: int, partials: int, rows: int) -> bool:
        sizes = self.sizes
        return counters <= sizes[0] and partials <= sizes[1] and rows <= sizes[2]


_held: Held[Room] = Held()


def _room(before: Room | None, device: torch.device, counters: int, partials: int, rows: int) -> Room:
    """Room for that much, and for what was needed before."""
    # powers of two: growing costs a fill
    sizes = (max(1024, 1 << (counters - 1).bit_length()), partials, max(1024, 1 << (rows - 1).bit_length()))
    if before is not None:
        sizes = (max(sizes[0], before.sizes[0]), max(partials, before.sizes[1]), max(sizes[2], before.sizes[2]))
    return Room(
        torch.zeros(sizes[0], dtype=torch.int32, device=device),
        torch.empty(sizes[1], dtype=torch.uint8, device=device),
        torch.empty(sizes[2], dtype=torch.float32, device=device),
        sizes,
    )
