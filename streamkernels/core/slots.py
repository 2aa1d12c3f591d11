"""Where a stream index lives in a segment's memory, and back.

A segment is a buffer of `capacity` slots. Unbounded, stream index i lives in slot i. Bounded, the first `sinks` slots
keep the first `sinks` keys for ever and the other `capacity - sinks` slots are a ring, so that the segment holds the
attention sinks and the most recent keys (Xiao et al., "Efficient Streaming Language Models with Attention Sinks", arXiv
2309.17453, section 3.2). Spans, begins and limits always count stream indices; only these two functions, and their
twins of the same name in the kernels, know about slots.
"""

from __future__ import annotations

import torch
from torch import Tensor


def slot(index: Tensor, capacity: int, sinks: int, bounded: bool) -> Tensor:
    """The slot of each stream index: `i` unless bounded and `i >= capacity`, then `sinks + (i - sinks) % (capacity -
    sinks)`.

    index: integers >= 0 of any shape. Returns the same shape and dtype. Unbounded, a result >= capacity means that the
    index does not fit: its write is dropped, and nothing can be read there.
    """
    if not bounded:
        return index
    return torch.where(index < capacity, index, sinks + (index - sinks) % max(capacity - sinks, 1))


def stream_index(slots: Tensor, total: Tensor | int, capacity: int, sinks: int, bounded: bool) -> Tensor:
    """The stream index that each slot holds once `[0, total)` were written in order; -1 for a slot never written.

    The inverse of `slot`: bounded, a ring slot holds the largest index below `total` that maps to it.
    slots: integers in `[0, capacity)`; total: int, or integers that broadcast against `slots` (for instance
    `length[:, role, None]` against `arange(capacity)`). Returns their broadcast shape in the dtype of `slots`.
    """
    index = slots
    if bounded:
        ring = max(capacity - sinks, 1)
        rounds = torch.div(total - 1 - slots, ring, rounding_mode="floor").clamp(min=0)
        index = torch.where(slots < sinks, slots, slots + ring * rounds)
    return torch.where(index < total, index, -1).to(slots.dtype)
