"""Builders of spans that need no schedule: causal, chunks, windows, packed documents.

Vectorised over rows; Python loops only over samples. Rows are query rows in buffer order, padding comes last in every
sample: padded rows have empty spans, padded keys lie in no span. `causal`, `bottom_right` and `sliding_window` of one
length for all samples are built on `device` without a copy from the host, so a traced or captured forward may call
them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .ragged import batch_size, nested, same_batch, samples, sizes
from .shapes import FLOATS, Shapes, check_int, check_number, refuse
from .span_table import SLOTS, Spans

NUMBERS = (*FLOATS, torch.int32, torch.int64)

Lengths = int | Sequence[int] | Tensor
Nested = Sequence[int] | Sequence[Sequence[int]] | Tensor


def stack_slots(columns: Sequence[tuple[Tensor, Tensor]], device: torch.device | str | None = None) -> Tensor:
    """Bounds int32 `[B, T, N, 2]` from one (begin `[1 | B, T]`, end `[B, T]`) pair per slot.

    Empty slots fill up to N = 1, 2, 4 or 8. An interval that ends before it begins becomes an empty one.
    """
    pairs = [torch.stack((begin.expand_as(end), torch.maximum(begin, end)), -1) for begin, end in columns]
    N = next(n for n in SLOTS if n >= len(pairs))
    pairs += [torch.zeros_like(pairs[0])] * (N - len(pairs))
    return torch.stack(pairs, 2).to(device=device, dtype=torch.int32)


def from_columns(columns: Sequence[tuple[Tensor, Tensor]], device: torch.device | str | None = None) -> Spans:
    """`Spans` of ATTEND slots from one (begin, end) pair per slot."""
    return Spans(stack_slots(columns, device))


def grid(rows: Sequence[int], T: int, device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
    """Row numbers `[1, T]`, and bool `[B, T]`: which rows of the padded batch are real."""
    i = torch.arange(T, device=device)[None]
    return i, (i < per_sample(rows, device)).expand(len(rows), T)


def per_sample(values: Sequence[int], device: torch.device | str | None = None) -> Tensor | int:
    """`[B, 1]`, or an int if all samples agree: no copy to the device then, so that a CUDA graph may be captured."""
    first = values[0]
    return first if all(v == first for v in values) else torch.tensor(values, device=device)[:, None]


def causal(T: Lengths, *, B: int | None = None, device: torch.device | str | None = None) -> Spans:
    """Row i sees `[0, i + 1)`: ordinary causal attention, batch mode.

    `T` is the number of rows (of each of `B` samples, default 1), or one length per sample; the batch is as long as
    the longest. One slot. Raises TypeError or ValueError for lengths that are no ints >= 0.
    """
    rows = sizes("causal", "T", T, B)
    return up_to_itself(rows, rows, max(rows), device)


def up_to_itself(rows: Sequence[int], keys: Sequence[int], T: int, device: torch.device | str | None) -> Spans:
    """Causal attention of the last `rows` of `keys`, in a batch of `T` rows."""
    end = ends(rows, keys, T, device)
    return from_columns([(torch.zeros_like(end), end)], device)


def ends(rows: Sequence[int], keys: Sequence[int], T: int, device: torch.device | str | None = None) -> Tensor:
    """`[B, T]`: where causality ends each row if the rows are the last of the keys; 0 for padded rows."""
    i, real = grid(rows, T, device)
    before = per_sample([s - t for s, t in zip(keys, rows, strict=True)], device)
    return torch.where(real, i + 1 + before, 0).clamp(min=0)


def bottom_right(T: Lengths, S: Lengths, *, B: int | None = None, device: torch.device | str | None = None) -> Spans:
    """Row i of T sees `[0, S - T + i + 1)`: the last T rows of a causal sequence of S keys (chunked prefill).

    `T` and `S` are ints or one per sample. Where T > S the first T - S rows see nothing. One slot. Raises TypeError or
    ValueError for lengths that are no ints >= 0 and for batches that differ.
    """
    rows, keys = _rows_and_keys("bottom_right", T, S, B)
    return up_to_itself(rows, keys, max(rows), device)


def _rows_and_keys(op: str, T: Lengths, S: Lengths, B: int | None) -> tuple[list[int], list[int]]:
    # whatever names one length per sample fixes the batch; a plain int then counts for every sample
    for name, x in (("T", T), ("S", S)):
        if not isinstance(x, int):
            B = len(sizes(op, name, x, B))
    return sizes(op, "T", T, B), sizes(op, "S", S, B)


def packed(document_lengths: Nested, *, T: int | None = None, device: torch.device | str | None = None) -> Spans:
    """Documents packed one behind the other: row i of a document sees `[begin of its document, i + 1)`.

    `document_lengths`: the lengths of a sample's documents, or one such list per sample; rows after the last document
    are padding, up to `T` if it is given. Visibility comes from these lengths only, never from positions. One slot.
    """
    batch = samples("packed", "document_lengths", document_lengths)
    totals = [sum(documents) for documents in batch]
    i, real = grid(totals, batch_size("packed", "T", T, totals))
    begin = torch.zeros(real.shape, dtype=torch.long)
    for b, documents in enumerate(batch):
        each = torch.tensor(documents, dtype=torch.long)
        begin[b, : totals[b]] = torch.repeat_interleave(each.cumsum(0) - each, each)
    return from_columns([(begin, torch.where(real, i + 1, 0))], device=device)


def _window(end: Tensor, begin: Tensor, sinks: int, device: torch.device | str | None) -> Spans:
    # the sink prefix ends where the window begins, so that no key lies in both
    begin = torch.minimum(begin, end)
    if not sinks:
        return from_columns([(begin, end)], device=device)
    return from_columns([(torch.zeros_like(begin), begin.clamp(max=sinks)), (begin, end)], device=device)


def sliding_window(
    T: Lengths,
    window: int,
    *,
    sinks: int = 0,
    S: Lengths | None = None,
    B: int | None = None,
    device: torch.device | str | None = None,
) -> Spans:
    """Sliding window by index: row i sees `[i + 1 - window, i + 1)`, the last keys up to itself, and `[0, sinks)`.

    The window counts the row's own key. `S` (default T) is the number of keys as in `bottom_right`: row i then stands
    at key S - T + i. One slot without sinks, two with. Attention sinks: Xiao et al., arXiv 2309.17453.
    Raises TypeError or ValueError for a window < 1, sinks < 0 and bad lengths.
    """
    op = "sliding_window"
    check_int(op, "window", window, minimum=1)
    check_int(op, "sinks", sinks)
    rows, keys = _rows_and_keys(op, T, T if S is None else S, B)
    end = ends(rows, keys, max(rows), device)
    return _window(end, (end - window).clamp(min=0), sinks, device)


def _positions(op: str, name: str, x: object) -> list[Tensor]:
    # one 1-D tensor of positions per sample
    if isinstance(x, Tensor) and x.dim() not in (1, 2):
        refuse(op, name, "positions [T] or [B, T] of one axis (a window over M-RoPE positions is not defined)", x)
    batch = list(x) if nested(x) else [x]  # type: ignore[call-overload]
    out = []
    for row in batch:
        if not isinstance(row, (Tensor, Sequence)) or isinstance(row, (str, bytes)):
            refuse(op, name, "a sequence of positions, or one per sample", row, TypeError)
        values = torch.as_tensor(row).cpu()
        if values.dim() != 1 or values.dtype == torch.bool or values.is_complex():
            refuse(op, name, "a sequence of positions, or one per sample", values, TypeError)
        if values.is_floating_point() and not bool(values.isfinite().all()):
            refuse(op, name, "finite positions", "NaN or infinity")
        out.append(values)
    return out


def _increasing(op: str, name: str, positions: Tensor) -> None:
    falls = (positions[1:] <= positions[:-1]).nonzero()
    if len(falls):
        at = int(falls[0])
        pair = f"{positions[at].item()} then {positions[at + 1].item()} at key {at + 1}"
        refuse(op, name, "positions that increase from key to key (else a window is no index range)", pair)


def sliding_window_by_position(
    q_positions: object, k_positions: object, window: float, *, sinks: int = 0, device: torch.device | str | None = None
) -> Spans:
    """Sliding window by position over one segment: a row sees keys with `q_pos - k_pos < window`, and `[0, sinks)`.

    `q_positions` `[T]` or `[B, T]`, `k_positions` `[S]` or `[B, S]` (tensors of ints or floats, or nested sequences
    with one list per sample, ragged or not). The rows are the last T of the S keys, in buffer order: causality is by
    index, row i sees no key after S - T + i, whatever the positions say. With positions 0, 1, 2, ... it equals
    `sliding_window`; where positions have gaps it shows fewer keys. One slot without sinks, two with.

    Raises ValueError if a sample's `k_positions` do not increase strictly, because then the window is no interval of
    keys; `q_positions` may come in any order. Positions of more than one axis are refused. Copies to the host.
    """
    op = "sliding_window_by_position"
    check_number(op, "window", window, positive=True)
    check_int(op, "sinks", sinks)
    q_batch, k_batch = _positions(op, "q_positions", q_positions), _positions(op, "k_positions", k_positions)
    same_batch(op, "k_positions", k_batch, "q_positions", q_batch)
    begin = torch.zeros(len(q_batch), max(map(len, q_batch)), dtype=torch.long)
    end = torch.zeros_like(begin)
    for b, (q, k) in enumerate(zip(q_batch, k_batch, strict=True)):
        _increasing(op, "k_positions", k)
        end[b, : len(q)] = (torch.arange(len(q)) + 1 + len(k) - len(q)).clamp(min=0)
        begin[b, : len(q)] = _first_inside(q, k, window)
    return _window(end, begin, sinks, device)


def _first_inside(q: Tensor, k: Tensor, window: float) -> Tensor:
    # q - k < window holds from the first k > q - window on; ints stay ints, so that no large position is rounded
    whole = not (q.is_floating_point() or k.is_floating_point() or isinstance(window, float))
    dtype = torch.long if whole else torch.float64
    return torch.searchsorted(k.to(dtype).contiguous(), (q.to(dtype) - window).contiguous(), right=True)


def window_begins(
    q_positions: Tensor, k_positions: Tensor, window: float, *, k_count: Tensor | None = None, check: bool = True
) -> Tensor:
    """int32 `[B, T]`: the first key of one segment with `q_pos - k_pos < window`, for `incremental_prefill`'s begins.

    `q_positions` `[B, T]`, `k_positions` `[B, S]`, ints or floats, on one device; `k_count` int32 `[B]`: keys of each
    sample that exist, the rest of `k_positions` is ignored. Call it once with the source's positions (`source_begin`)
    and once with the target's (`target_begin`). Distance in position ids is what a grouped stream means by a window:
    it does not change when more source arrives, whereas an index distance over [source | target] does
    (`window_begins_by_index`). The result is a begin only; where a row ends stays the row's own limit.

    Raises ValueError if `k_positions` do not increase strictly; `check=False` skips that test, which synchronises.
    """
    op, shapes = "window_begins", Shapes("window_begins")
    check_number(op, "window", window, positive=True)
    shapes.tensor("q_positions", q_positions, "B T", dtype=NUMBERS)
    shapes.tensor("k_positions", k_positions, "B S", dtype=NUMBERS)
    if k_count is not None:
        shapes.tensor("k_count", k_count, "B", dtype=(torch.int32, torch.int64))
        beyond = torch.arange(shapes["S"], device=k_positions.device) >= k_count[:, None]
        top = float("inf") if k_positions.is_floating_point() else torch.iinfo(torch.long).max
        k_positions = (k_positions if k_positions.is_floating_point() else k_positions.long()).masked_fill(beyond, top)
    if check:
        for b in range(shapes["B"]):
            _increasing(op, "k_positions", k_positions[b, : None if k_count is None else int(k_count[b])])
    return _first_inside(q_positions, k_positions, window).to(torch.int32)


def window_begins_by_index(target_index: Tensor, source_limit: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """int32 `[B, T]` each, (source_begin, target_begin): a window by index over [visible source | target].

    The opt-in other meaning, that of a model that is handed the two segments as one sequence: target row j that sees
    `source_limit` source keys stands at index `source_limit + j`, and sees the last `window` keys up to itself.
    `target_index` and `source_limit` are ints `[B, T]`. When more source arrives, earlier target keys keep their
    distance and the source moves away.
    """
    op, shapes = "window_begins_by_index", Shapes("window_begins_by_index")
    check_int(op, "window", window, minimum=1)
    shapes.tensor("target_index", target_index, "B T", dtype=(torch.int32, torch.int64))
    shapes.tensor("source_limit", source_limit, "B T", dtype=(torch.int32, torch.int64))
    target_begin = (target_index + 1 - window).clamp(min=0)
    source_begin = (source_limit + target_index + 1 - window).clamp(min=0)
    return torch.minimum(source_begin, source_limit).to(torch.int32), target_begin.to(torch.int32)
