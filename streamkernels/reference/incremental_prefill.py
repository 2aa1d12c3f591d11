"""A chunk of new rows against everything that its session holds: rotate, write, attend over source and target, never
concatenated.

Row t has the role r and the stream index i of `rotate_append`. With `total` the source length including this call's
rows, it sees

    of the source: [source_begin, i + 1)                              if it is a source row
                   [source_begin, clip(source_limit, 0, total))       if it is a target row; the limit defaults to total
    of the target: [target_begin, i + 1)                              if it is a target row, nothing otherwise

and in both segments also `[0, sinks)`, clipped to the same end. All by stream index, and after this call's writes, so
that a target row also sees source rows of its own call, even those placed after it. In a segment with a window W a
begin is at least end - W, and only keys that the ring still holds after this call's writes are seen. Group position
encoding is what makes the two segments independent ("LLM as Effective Streaming Processor", arXiv 2505.16983): a row is
projected, rotated and written once, and never again.

The segments are attended one by one and joined by their lse (`merge_partials`). The backward runs per segment too, with
the joint lse and o: keys of earlier calls are constants, and this call's keys are a third set, taken from k and v
themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.positions import apply_rotary
from ..core.slots import stream_index
from .attend_rows import Visible, attend_rows, attend_rows_backward, sink_gate, sink_logits_gradient
from .merge_partials import merge_partials
from .rotate_append import Placed, place_rows, write_rows


@dataclass(frozen=True)
class Sight:
    """What the rows of a call see of one segment: stream indices [begin, end) and [0, min(sinks, end)); begin, end:
    int64 [B, T]."""

    begin: Tensor
    end: Tensor
    sinks: int

    def sees(self, index: Tensor, rows: slice) -> Tensor:
        """bool [B, c, S]: which of the keys with stream indices `index` [B, S] a slice of c rows sees; index -1 is no
        key."""
        index, begin, end = index[:, None, :], self.begin[:, rows, None], self.end[:, rows, None]
        return (index >= 0) & (index < end) & ((index >= begin) | (index < self.sinks))


def sights(
    rows: Placed,
    source_limit: Tensor | None,
    begins: tuple[Tensor | None, Tensor | None],
    sinks: tuple[int, int],
    windows: tuple[int, int] = (0, 0),
) -> tuple[Sight, Sight]:
    """What each row sees of the source and of the target segment; a window of 0 is none."""
    is_source, is_target = rows.role == 0, rows.role == 1
    total = rows.total[0][:, None]
    limit = total if source_limit is None else torch.minimum(source_limit.long().clamp(min=0), total)
    own = rows.index + 1
    ends = (torch.where(is_source, own, torch.where(is_target, limit, 0)), torch.where(is_target, own, 0))
    found = []
    for end, begin, first, window in zip(ends, begins, sinks, windows, strict=True):
        begin = torch.zeros_like(end) if begin is None else begin.long()
        found.append(Sight(torch.maximum(begin, end - window) if window else begin, end, first))
    return found[0], found[1]


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
    """q [B, H, T, D] over what its rows see -> o in q's dtype, stored [B, T, H, D], and lse [B, H, T] in fp32 (fp64).

    A segment is a ring behind `ring_sinks` slots if the cache is `bounded` and the segment has a window. Reads the
    lengths on a CPU, to attend over no more than is there; on other devices it masks the whole capacity and does not
    synchronise.
    """
    if cos is not None and sin is not None:
        q, k = apply_rotary(q, cos, sin, interleaved), apply_rotary(k, cos, sin, interleaved)
    rows = place_rows(length, role, segment, q.shape[2])
    windows = (source_window, target_window) if bounded else (0, 0)
    least = [max(n, ring_sinks if w else 0) for n, w in zip((source_sinks, target_sinks), windows, strict=True)]
    seen = sights(rows, source_limit, (source_begin, target_begin), (least[0], least[1]), windows)
    parts = []
    for r, buffers in enumerate(((source_k, source_v), (target_k, target_v))):
        C, ring = buffers[0].shape[2], windows[r] > 0
        if k.numel() and (role is not None or r == segment):
            write_rows(buffers, (k, v), rows, r, status, ring_sinks, ring)
        if role is None and segment == 0 and r == 1:
            continue
        S = _used(rows.total[r], C)
        index = stream_index(torch.arange(S, device=q.device), rows.total[r][:, None], C, ring_sinks, ring)

        def visible(chunk: slice, sight: Sight = seen[r], index: Tensor = index) -> Visible:
            return Visible(sight.sees(index, chunk).unsqueeze(1))

        parts.append((buffers, S, visible))
    # every write comes before the first read: target rows see source rows of this call, wherever they stand
    o, lse = merge_partials(
        [attend_rows(q, bk[:, :, :S], bv[:, :, :S], see, scale=scale, softcap=softcap) for (bk, bv), S, see in parts]
    )
    if sink_logits is not None:
        o = o * sink_gate(lse, sink_logits).unsqueeze(-1)
    return _rows_first(o.to(q.dtype)), lse


def incremental_prefill_backward(
    do: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    source_k: Tensor,
    source_v: Tensor,
    target_k: Tensor,
    target_v: Tensor,
    length: Tensor,
    role: Tensor | None,
    segment: int,
    source_limit: Tensor | None,
    source_begin: Tensor | None,
    target_begin: Tensor | None,
    source_sinks: int,
    target_sinks: int,
    scale: float,
    softcap: float,
    sink_logits: Tensor | None,
    interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of an unbounded `incremental_prefill` in this call's q, k, v (as they came, unrotated) and in
    sink_logits [H].

    `length` is that of the forward; of the segments only the rows before it are read, so later calls may have written
    behind them. dq, dk, dv have the dtypes of q, k, v and are stored [B, T, heads, D]; d sink_logits is empty without
    sink_logits.
    """
    dtypes = (q.dtype, k.dtype, v.dtype)
    if cos is not None and sin is not None:
        q, k = apply_rotary(q, cos, sin, interleaved), apply_rotary(k, cos, sin, interleaved)
    rows = place_rows(length, role, segment, q.shape[2])
    seen = sights(rows, source_limit, (source_begin, target_begin), (source_sinks, target_sinks))
    new, parts = [], []
    for r, (bk, bv) in enumerate(((source_k, source_v), (target_k, target_v))):
        before, C = length[:, r, None].long(), bk.shape[2]
        new.append(torch.where((rows.role == r) & (rows.index < C), rows.index, -1))
        S = _used(before, C)
        index = stream_index(torch.arange(S, device=q.device), before, C, 0, False)

        def old(chunk: slice, sight: Sight = seen[r], index: Tensor = index) -> Visible:
            return Visible(sight.sees(index, chunk).unsqueeze(1))

        parts.append((bk[:, :, :S], bv[:, :, :S], old))

    def fresh(chunk: slice) -> Visible:
        return Visible((seen[0].sees(new[0], chunk) | seen[1].sees(new[1], chunk)).unsqueeze(1))

    def share(keys: Tensor, values: Tensor, visible: Callable[[slice], Visible]) -> tuple[Tensor, Tensor, Tensor]:
        return attend_rows_backward(
            do, dlse, q, keys, values, o, lse, visible, scale=scale, softcap=softcap, sink_logits=sink_logits
        )

    dq, dk, dv = share(k, v, fresh)
    for part in parts:
        dq = dq + share(*part)[0]
    if cos is not None and sin is not None:
        dq, dk = apply_rotary(dq, cos, -sin, interleaved), apply_rotary(dk, cos, -sin, interleaved)
    dsink = q.new_empty(0)
    if sink_logits is not None:
        dsink = sink_logits_gradient(do, o, lse, sink_logits).to(sink_logits.dtype)
    grads = [_rows_first(x.to(dtype)) for x, dtype in zip((dq, dk, dv), dtypes, strict=True)]
    return grads[0], grads[1], grads[2], dsink


def _used(total: Tensor, capacity: int) -> int:
    # the slots that hold anything; reading a length is free on a CPU and a synchronisation elsewhere
    if total.device.type != "cpu" or total.numel() == 0:
        return capacity
    return min(capacity, max(0, int(total.max())))


def _rows_first(x: Tensor) -> Tensor:
    # [B, H, T, D], stored [B, T, H, D]
    return x.transpose(1, 2).contiguous().transpose(1, 2)
