"""The CUDA kernels of span_attention, for few query rows and for many on Hopper, from tensors to pointers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import _ext
from . import triton
from .room import Held
from .tensors import DTYPES, NO_ROWS, NO_TABLE, first_strides, rows_of, stream_of

if TYPE_CHECKING:
    from .select import Call

MOST_ROWS = 64
HEAD_DIMS = (64, 96, 128, 256)
# the kernel for more rows
MANY_HEAD_DIMS, MANY_SLOTS = (64, 128), 2
OPTIONS_OF_FEW = ("softcap", "mass", "sink", "kept")

# what the blocks of a launch draw their work by: two ints, zero between launches; in a backward also what they join
# parts of dk and dv by
_tickets: Held[Tensor] = Held()
TICKETS, SOME_COUNTERS = 2, 1022


def span_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: Tensor,
    rules: Sequence[int],
    sink_key: Tensor | None,
    kept: Tensor | None,
    kept_count: Tensor | None,
    key_class: Tensor | None,
    row_class: Tensor | None,
    class_rules: Tensor | None,
    class_sink: Tensor | None,
    sink_logits: Tensor | None,
    row_blocks: Tensor | None,
    key_blocks: Tensor | None,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """o [B, H, T, D] stored [B, T, H, D] and lse fp32 [B, H, T]: one launch, and one more to join splits."""
    B, H, T, D = q.shape
    HK, S = k.shape[1:3]
    device = q.device
    o = torch.empty((B, T, H, D), dtype=q.dtype, device=device)
    lse = torch.empty((B, H, T), dtype=torch.float32, device=device)
    if T > MOST_ROWS and S == 0:
        return o.zero_().transpose(1, 2), lse.fill_(-math.inf)
    if B * H * T:
        (q, k, v), bounds = map(_for_maps if T > MOST_ROWS else _on_borders, (q, k, v)), bounds.contiguous()
        sink_logits = None if sink_logits is None else sink_logits.contiguous()
        arguments = (
            rows_of(q), rows_of(k), rows_of(v), o.data_ptr(), lse.data_ptr(), bounds.data_ptr(),
            NO_TABLE if sink_key is None else first_strides(sink_key), NO_ROWS if kept is None else _lists(kept),
            NO_TABLE if kept_count is None else first_strides(kept_count), *_sinks(sink_logits),
            B, H, HK, T, S, D, bounds.shape[2], 0 if kept is None else kept.shape[2], tuple(rules), scale, softcap,
            DTYPES[q.dtype], device.index,
        )  # fmt: skip
        module, stream = _ext.load(), stream_of(device)
        if T > MOST_ROWS:
            module.span_attention_many(*arguments, _counters(module, device, stream, 0).data_ptr(), stream)
        else:
            splits = module.span_attention_splits(*arguments)
            room = None
            if splits > 1:
                # sums and (top, sum) of every split
                room = torch.empty(splits * B * H * T * (D + 2), dtype=torch.float32, device=device)
            module.span_attention(*arguments, 0 if room is None else room.data_ptr(), splits, stream)
    return o.transpose(1, 2), lse


def span_attention_backward(
    do: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """dq, dk, dv as q, k, v (stored rows first), d sink_logits [H] (None without): two launches on Hopper where the
    forward was its kernel for many rows, else Triton's."""
    bounds, rules, *_, sink_logits, row_blocks, key_blocks, scale, softcap = options
    B, H, T, D = q.shape
    HK, S = k.shape[1:3]
    device = q.device
    if T <= MOST_ROWS or B * S == 0 or not _has_many(device.index):
        return triton.span_attention_backward(do, dlse, q, k, v, o, lse, *options)
    if row_blocks is None:
        row_blocks, key_blocks = triton.prepare(bounds, S)
    q, k, v, o, do = map(_for_maps, (q, k, v, o, do))
    bounds, row_blocks, key_blocks, lse = (x.contiguous() for x in (bounds, row_blocks, key_blocks, lse))
    dlse = None if dlse is None else dlse.contiguous()
    # what each row adds to d sink_logits
    share = None if sink_logits is None else torch.empty_like(lse)
    sink_logits = None if sink_logits is None else sink_logits.contiguous()
    dq, (dk, dv) = q.new_empty((B, T, H, D)), (k.new_empty((B, S, HK, D)) for _ in "kv")
    module, stream = _ext.load(), stream_of(device)
    floats, counters = module.span_attention_many_work(B, H, HK, T, S, D, device.index)
    work = torch.empty(floats, dtype=torch.float32, device=device)
    tickets = _counters(module, device, stream, counters).data_ptr()
    module.span_attention_many_backward(
        *map(rows_of, (q, k, v, o, do)), lse.data_ptr(), 0 if dlse is None else dlse.data_ptr(),
        *(x.data_ptr() for x in (bounds, row_blocks, key_blocks)), *_sinks(sink_logits),
        *(x.data_ptr() for x in (dq, dk, dv)), 0 if share is None else share.data_ptr(),
        B, H, HK, T, S, D, bounds.shape[2], tuple(rules), scale, softcap, DTYPES[q.dtype], device.index,
        work.data_ptr(), tickets, tickets + 4 * TICKETS, stream,
    )  # fmt: skip
    dsink = None if share is None or sink_logits is None else share.sum((0, 2)).to(sink_logits.dtype)
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2), dsink


def _counters(module: ModuleType, device: torch.device, stream: int, needed: int) -> Tensor:
    """Tickets, and at least so many counters behind them."""
    key = (device.index, stream, module.capture_id(stream))
    held = _tickets.get(key)
    if held is None or held.shape[0] < TICKETS + needed:
        # powers of two: growing costs a fill
        size = TICKETS + max(SOME_COUNTERS, 1 << (needed - 1).bit_length() if needed else 0)
        held = _tickets.keep(key, torch.zeros(size, dtype=torch.int32, device=device))
    return held


def _on_borders(x: Tensor) -> Tensor:
    """x itself when every row lies on a 16-byte border, else a copy."""
    batch, head, row, last = x.stride()
    return x if (x.data_ptr() % 16, batch % 8, head % 8, row % 8, last) == (0, 0, 0, 0, 1) else x.contiguous()


def _for_maps(x: Tensor) -> Tensor:
    """x itself when tensor maps can describe it, whose strides are positive besides, else a copy."""
    rows = _on_borders(x)
    expanded = any(stride <= 0 and size > 1 for stride, size in zip(rows.stride(), rows.shape, strict=True))
    return rows.clone(memory_format=torch.contiguous_format) if expanded else rows


def _sinks(sink_logits: Tensor | None) -> tuple[int, bool]:
    """The address of contiguous sink logits, and whether they are fp32."""
    return (0, False) if sink_logits is None else (sink_logits.data_ptr(), sink_logits.dtype == torch.float32)


def _lists(kept: Tensor) -> tuple[int, int, int, int]:
    batch, head, entry = kept.stride()
    return kept.data_ptr(), batch, head, entry


def _takes_span_attention(call: Call) -> str | None:
    if call.dtype == torch.float32:
        return "the CUDA kernel takes float16 and bfloat16, not float32"
    if "classes" in call.features:
        return "the CUDA kernel has no class table"
    if "scale" in call.features:
        return "the CUDA kernel needs a scale > 0"
    return _takes_many(call) if call.sizes.get("T", 1) > MOST_ROWS else _takes_few(call)


def _takes_few(call: Call) -> str | None:
    if call.sizes.get("D", 64) not in HEAD_DIMS:
        return f"the CUDA kernel takes a head dim D of 64, 96, 128 or 256, not {call.sizes['D']}"
    if "backward" in call.features:
        return "the CUDA kernel has no backward"
    return None


def _takes_many(call: Call) -> str | None:
    # without lengths: one that becomes text would compile anew for every length
    where = f"with more than {MOST_ROWS} query rows"
    if call.sizes.get("D", 64) not in MANY_HEAD_DIMS:
        return f"{where} the CUDA kernel takes a head dim D of 64 or 128, not {call.sizes['D']}"
    if call.sizes.get("N", 1) > MANY_SLOTS:
        return f"{where} the CUDA kernel takes at most {MANY_SLOTS} slots"
    for option in OPTIONS_OF_FEW:
        if option in call.features:
            return f"{where} the CUDA kernel has no {option if option == 'softcap' else option.upper()}"
    if "backward" in call.features and (why := triton._missing()):
        return f"its gradient needs what Triton's kernels prepare, and {why}"
    if not _has_many(call.device.index):
        return f"the CUDA kernel takes at most {MOST_ROWS} query rows but on Hopper, in a build for 90a"
    return None


def by_name(call: Call) -> str | None:
    """Why `auto` leaves a call: the kernels for many rows have not been tested and timed on a GPU."""
    return None if call.sizes.get("T", 1) <= MOST_ROWS else "its kernel for many rows is to be asked for by name"


def _has_many(index: int | None) -> bool:
    index = torch.cuda.current_device() if index is None else index
    return _ext.unavailable(index) is None and _ext.load().span_attention_many_here(index)


# a constant to torch.compile, as in cuda.py
_has_many._dynamo_marked_constant = True  # type: ignore[attr-defined]


KERNELS: dict[str, Callable[[Call], str | None]] = {"span_attention": _takes_span_attention}
