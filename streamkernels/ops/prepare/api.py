"""`prepare`: checks, the choice of a backend, and the call."""

from __future__ import annotations

import torch
from torch import Tensor

from ...backends.select import Call, choose
from ...core.shapes import Shapes, check_int
from ...core.spans import Spans
from .schema import OP


def prepare(spans: Spans | Tensor, S: int, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Summarise spans once per forward, for `span_attention(..., prepared=...)` in all layers that share them.

    Args:
        spans: a `Spans`, or its bounds int32 [B, T, N, 2].
        S: the number of keys in the buffer that they index.
        backend: "auto", "reference", "triton" or "cuda".

    Returns:
        row_blocks: int32 [B, ceil(T / 64), N, 4], per block of 64 rows and slot the smallest begin, largest begin,
            smallest end and largest end of the rows' spans, clipped to [0, S), an empty one as (S, 0). So the block
            touches no key outside [smallest begin, largest end), and all its rows see all of [largest begin, smallest
            end). In the last block only the rows below T count.
        key_blocks: int32 [B, ceil(S / 64), 4], per block of 64 keys two half-open ranges of row blocks, (first, end,
        first, end): together
            they hold every row block whose hull in any slot meets the keys. They are split at the widest gap (the first
            of several): under a streaming mask a source key is seen by later source rows and, after a gap, by later
            target rows. (0, 0, 0, 0) where no row block meets the keys, and the second range is (0, 0) where there is
            no gap. Row blocks within a range may not meet them.

    A kept list and classes hide keys of a span, so [largest begin, smallest end) is not full under them.

    Raises:
        TypeError, ValueError: spans of a wrong dtype or shape, S < 0. No value is read on the host, nothing is mutated.
    """
    shapes = Shapes(OP)
    bounds = spans.bounds if isinstance(spans, Spans) else spans
    shapes.tensor("spans", bounds, "B T N 2", dtype=torch.int32)
    check_int(OP, "S", S)
    call = Call(OP, bounds.device, bounds.dtype, {**shapes.sizes, "S": S})
    return torch.ops.streamkernels.prepare(bounds, S, choose(call, backend))
