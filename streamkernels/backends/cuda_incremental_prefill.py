"""`incremental_prefill` on the CUDA kernel: packs a call into words, which csrc/incremental_prefill/call.cpp reads."""

from __future__ import annotations

import functools
import struct
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import _ext
from .tensors import DTYPES, rows_of, stream_of, table_of

if TYPE_CHECKING:
    from .select import Call

HEAD_DIMS = (64, 96, 128, 256)
MAX_ROWS, MAX_SESSIONS = 512, 1024
DECODE_ROWS, MANY_SESSIONS = 16, 8
PLAIN_HEAD_DIMS, PLAIN_ROWS = (64, 128, 256), 64
_WORDS = struct.Struct("<70q2d6q")


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
    HK = k.shape[1]
    o = q.new_empty((B, T, H, D))
    lse = q.new_empty((B, H, T), dtype=torch.float32)
    if o.numel() == 0:
        return o.transpose(1, 2), lse
    code, index = DTYPES[q.dtype], q.device.index
    stream = stream_of(q.device)
    extension = _ext.load()
    counters, partials = _workspace(extension, B, H, HK, T, D, code, index, stream)
    if cos is None or sin is None:
        angles, rotary_dim, angles_code = _NO_ANGLES, 0, code
    else:
        angles, rotary_dim, angles_code = (*table_of(cos), *table_of(sin)), 2 * cos.shape[2], DTYPES[cos.dtype]
    words = _WORDS.pack(
        *rows_of(q), *rows_of(k), *rows_of(v), *angles,
        *rows_of(source_k), *rows_of(source_v), source_k.shape[2],
        *rows_of(target_k), *rows_of(target_v), target_k.shape[2],
        length.data_ptr(), *length.stride(), status.data_ptr(),
        *_column(role), *_column(source_limit), *_column(source_begin), *_column(target_begin),
        0 if sink_logits is None else sink_logits.data_ptr(), o.data_ptr(), lse.data_ptr(),
        counters.data_ptr(), partials.data_ptr(),
        B, H, HK, T, D, rotary_dim, segment, source_sinks, target_sinks, ring_sinks, bounded,
        source_window, target_window, scale, softcap, interleaved,
        code, angles_code, code if sink_logits is None else DTYPES[sink_logits.dtype], index, stream,
    )  # fmt: skip
    extension.incremental_prefill(words)
    return o.transpose(1, 2), lse


def gradient(dtype: torch.dtype, scale: float) -> str:
    """The backend that computes the gradient of a call that ran here: Triton where its kernel can, else the
    reference."""
    from . import triton

    able = dtype in (torch.float16, torch.bfloat16) and scale > 0 and triton._missing() is None
    return "triton" if able and "incremental_prefill" in triton.OPS else "reference"


_NO_ANGLES = (0,) * 6
# per (device, stream, capture): zero counters, and room for partial results
_held: dict[tuple[int, int, int], tuple[Tensor, Tensor]] = {}


@functools.lru_cache(maxsize=4096)
def _sizes(extension: Any, B: int, H: int, HK: int, T: int, D: int, code: int, index: int) -> tuple[int, int]:
    counters, partials = extension.incremental_prefill_workspace(B, H, HK, T, D, code, index)
    return counters, partials


def _workspace(
    extension: Any, B: int, H: int, HK: int, T: int, D: int, code: int, index: int, stream: int
) -> tuple[Tensor, Tensor]:
    """Counters and room for partial results that no other launch can be using: one set per stream, and one per stream
    of a graph capture, zeroed by the graph itself, since a graph may run beside anything."""
    counters, partials = _sizes(extension, B, H, HK, T, D, code, index)
    capture = extension.capture_id(stream)
    held = _held.get((index, stream, capture))
    if held is None or held[0].numel() < counters or held[1].numel() < partials:
        for key in [key for key in _held if key[:2] == (index, stream) and key[2] not in (0, capture)]:
            # of a capture that has ended: its graph keeps the memory
            del _held[key]
        device = torch.device("cuda", index)
        if held is not None:
            counters, partials = max(counters, held[0].numel()), max(partials, held[1].numel())
        # a power of two: growing costs a fill
        counters = max(1024, 1 << (counters - 1).bit_length())
        held = (
            torch.zeros(counters, dtype=torch.int32, device=device),
            torch.empty(partials, dtype=torch.uint8, device=device),
        )
        _held[index, stream, capture] = held
    return held


def _column(x: Tensor | None) -> tuple[int, int, int]:
    """Address and strides of [B, T]."""
    if x is None:
        return 0, 0, 0
    batch, row = x.stride()
    return x.data_ptr(), batch, row
