"""The CUDA kernels of span_attention: for few query rows, from tensors to pointers, and for many on Hopper, which reads
the tensors itself (csrc/span_attention/bind.h)."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import _ext
from ..triton_kernels.device.memory import Memory, packed, remembered, rows_first
from . import triton
from .room import Held
from .tensors import DTYPES, NO_ROWS, NO_TABLE, first_strides, needed_reader, reader, rows_of, stream_of

if TYPE_CHECKING:
    from .select import Call

MOST_ROWS = 64
HEAD_DIMS = (64, 96, 128, 256)
# the kernel for more rows
MANY_HEAD_DIMS, MANY_SLOTS = (64, 128), 2
MANY_PAIRS = 1 << 24
OPTIONS_OF_FEW = ("softcap", "mass", "sink", "kept")


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
    """o [B, H, T, D] stored [B, T, H, D] and lse fp32 [B, H, T]: one launch; for few rows one more to join splits."""
    if q.shape[2] > MOST_ROWS:
        return _many(q, k, v, bounds, sink_logits, scale)
    B, H, T, D = q.shape
    HK, S = k.shape[1:3]
    device = q.device
    o = torch.empty((B, T, H, D), dtype=q.dtype, device=device)
    lse = torch.empty((B, H, T), dtype=torch.float32, device=device)
    if B * H * T:
        (q, k, v), bounds = map(_on_borders, (q, k, v)), bounds.contiguous()
        sink_logits = None if sink_logits is None else sink_logits.contiguous()
        arguments = (
            rows_of(q), rows_of(k), rows_of(v), o.data_ptr(), lse.data_ptr(), bounds.data_ptr(),
            NO_TABLE if sink_key is None else first_strides(sink_key), NO_ROWS if kept is None else _lists(kept),
            NO_TABLE if kept_count is None else first_strides(kept_count), *_sinks(sink_logits),
            B, H, HK, T, S, D, bounds.shape[2], 0 if kept is None else kept.shape[2], tuple(rules), scale, softcap,
            DTYPES[q.dtype], device.index,
        )  # fmt: skip
        module, stream = _ext.load(), stream_of(device)
        splits = module.span_attention_splits(*arguments)
        room = None
        if splits > 1:
            # sums and (top, sum) of every split
            room = torch.empty(splits * B * H * T * (D + 2), dtype=torch.float32, device=device)
        module.span_attention(*arguments, 0 if room is None else room.data_ptr(), splits, stream)
    return o.transpose(1, 2), lse


def span_attention_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Triton's: what was written in CUDA was slower (bench/README.md)."""
    return triton.span_attention_backward(*arguments)  # type: ignore[no-any-return]


def _many(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, sink_logits: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """The kernel for many rows: a call like one before only makes its outputs and launches."""
    extension = needed_reader()
    make = functools.partial(_Many, extension, q, k, v, bounds, sink_logits)
    look = extension.signature(5, q, k, v, bounds, sink_logits)
    plan = make() if look is None else remembered(_plans, look, make)
    return plan.run(q, k, v, bounds, sink_logits, scale)


class _Many:
    """What calls of one look have in common."""

    def __init__(
        self, extension: Any, q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, sink_logits: Tensor | None
    ) -> None:
        B, H, T, D = q.shape
        self.launch, self.capture_id = extension.span_attention_many, extension.capture_id
        self.device, self.index, self.dtype = q.device, q.device.index, q.dtype
        self.o, self.lse = rows_first(B, H, T, D), packed(B, H, T)
        self.memory = Memory(q.device)
        self.empty, self.no_keys = B * H == 0, k.shape[2] == 0
        self.as_given = all(_for_maps(x) is x for x in (q, k, v))
        self.solid = bounds.is_contiguous() and (sink_logits is None or sink_logits.is_contiguous())

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, sink_logits: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        empty = self.memory.here()
        o, lse = empty(*self.o, self.dtype), empty(*self.lse, torch.float32)
        if self.no_keys:
            return o.zero_(), lse.fill_(-math.inf)
        if self.empty:
            return o, lse
        if not self.as_given:
            q, k, v = _for_maps(q), _for_maps(k), _for_maps(v)
        if not self.solid:
            bounds, sink_logits = bounds.contiguous(), None if sink_logits is None else sink_logits.contiguous()
        stream = stream_of(self.device)
        key = (self.index, stream, self.capture_id(stream))
        tickets = _tickets.get(key)
        if tickets is None:
            tickets = _tickets.keep(key, torch.zeros(2, dtype=torch.int32, device=self.device))
        self.launch(q, k, v, bounds, sink_logits, o, lse, tickets, scale, stream)
        return o, lse


# by the look of a call's tensors
_plans: dict[Any, _Many] = {}
# what the blocks of a launch draw their work by: two ints, zero between launches
_tickets: Held[Tensor] = Held()


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
        return f"its gradient is Triton's, and {why}"
    if not _has_many(call.device.index):
        return f"the CUDA kernel takes at most {MOST_ROWS} query rows but on Hopper, in a build for 90a"
    return None


def hands_over(call: Call) -> bool:
    """Where Triton was faster on an H200: more than 64 rows, but few pairs of rows and keys. 512 rows of as many keys
    took 5 % longer in 28 heads, 1024 in 8 heads 9 %, 128 in 28 a third; but 1024 in 28 heads 7 to 23 % less."""
    B, H, T, S = (call.sizes.get(x, 1) for x in ("B", "H", "T", "S"))
    return T > MOST_ROWS and B * H * T * S < MANY_PAIRS


def _has_many(index: int | None) -> bool:
    index = torch.cuda.current_device() if index is None else index
    return _ext.unavailable(index) is None and reader() is not None and _ext.load().span_attention_many_here(index)


# a constant to torch.compile, as in cuda.py
_has_many._dynamo_marked_constant = True  # type: ignore[attr-defined]


KERNELS: dict[str, Callable[[Call], str | None]] = {"span_attention": _takes_span_attention}
