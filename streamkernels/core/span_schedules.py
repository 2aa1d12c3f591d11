"""Who has read what when a row is computed: wait-k and any other schedule phi(t), for training and for sessions.

One sample is two lists of token counts. Source segments are [prompt, word 1, ..., word n, end tokens], target
segments [header, word 1, ..., word m, end tokens]; any cut into segments will do, and a segment may be empty. A
schedule says how many source segments each target segment has read. Buffers are laid out as [source | target] per
sample: the target begins at the sample's own source length, padding comes last.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from .ragged import batch_size, integers, nested, same_batch, samples, sizes
from .shapes import check_int, refuse
from .span_builders import Lengths, Nested, from_columns, up_to_itself
from .span_table import Spans


def visible_segments(target_segment: int, k: int | None, segments: int) -> int:
    """How many of `segments` source segments a target segment has read: `min(k + target_segment, segments)`.

    The wait-k schedule (Ma et al., ACL 2019, arXiv 1810.08398; as trained by EIT-NLP/StreamingLLM, arXiv 2505.16983):
    the prompt counts as one source segment and the header is target segment 0, so the first word that is written has
    read the prompt and k words, `visible_segments(1, k, segments) = k + 1`. `k=None` reads everything first (batch
    mode). Raises ValueError for k < 1.
    """
    check_int("visible_segments", "target_segment", target_segment)
    check_int("visible_segments", "segments", segments)
    return segments if k is None else min(check_int("visible_segments", "k", k, minimum=1) + target_segment, segments)


def limits_from_visible(
    source_lengths: Sequence[int], target_lengths: Sequence[int], visible: Callable[[int], int], *, shift: bool = True
) -> list[int]:
    """One limit per target row, for any schedule: how many source tokens the row sees.

    `visible(s)` is the number of source segments that target segment s has read (clipped to those there are; called
    once per target segment, in order). With base(n) = the tokens of the first n source segments, and s(r) the segment
    of target row r,

        limit[r] = base(visible(s(r + 1))),   the last row: base(visible(s(last)))

    because row r predicts token r + 1: the last row of a segment already sees what the next segment has read. That is
    the one-row shift of the training mask in EIT-NLP/StreamingLLM (StreamingLLM_GPE, `qwen_streaming.py`), taken as
    exactly one row. `shift=False` gives limit[r] = base(visible(s(r))): what had been read when token r itself was
    written.

    Limits need not increase unless `visible` does. Raises TypeError or ValueError for lengths that are no ints >= 0 and
    for a `visible` that returns something else.
    """
    op = "limits_from_visible"
    source = integers(op, "source_lengths", source_lengths)
    target = integers(op, "target_lengths", target_lengths)
    base = [0, *accumulate(source)]
    limits: list[int] = []
    for s, n in enumerate(target):
        read = visible(s)
        if type(read) is not int or read < 0:
            check_int(op, f"visible({s})", read)
        limits += [base[min(read, len(source))]] * n
    # by rows, not by segments: an empty segment has no row that could be shifted
    return limits[1:] + limits[-1:] if shift else limits


def wait_k_limits(
    source_lengths: Sequence[int], target_lengths: Sequence[int], k: int | None, *, shift: bool = True
) -> list[int]:
    """One limit per target row under wait-k: `limits_from_visible` with `visible_segments`. `k=None` reads everything.

    >>> wait_k_limits([10, 1, 2, 1, 3, 2], [3, 2, 1, 2, 2], 3)
    [13, 13, 14, 14, 17, 19, 19, 19, 19, 19]
    """
    source = integers("wait_k", "source_lengths", source_lengths)
    if k is not None:
        check_int("wait_k", "k", k, minimum=1)
    return limits_from_visible(source, target_lengths, lambda s: visible_segments(s, k, len(source)), shift=shift)


def wait_k(
    source_lengths: Nested,
    target_lengths: Nested,
    k: int | None | Sequence[int | None],
    *,
    T: int | None = None,
    device: torch.device | str | None = None,
) -> Spans:
    """Group streaming under wait-k: the training mask of "LLM as Effective Streaming Processor" (arXiv 2505.16983).

    `source_lengths` and `target_lengths` are segment lengths in tokens, one list each or one per sample (see the
    module). `k` is one int, None (read all), or one of these per sample. Rows as in `from_limits`, limits of
    `wait_k_limits`. Raises TypeError or ValueError for k < 1, lengths that are no ints >= 0, and batches that differ.
    """
    op = "wait_k"
    sources, targets = samples(op, "source_lengths", source_lengths), samples(op, "target_lengths", target_lengths)
    same_batch(op, "target_lengths", targets, "source_lengths", sources)
    ks: list[Any] = list(k) if isinstance(k, (list, tuple)) else [k] * len(sources)
    same_batch(op, "k", ks, "source_lengths", sources)
    limits = [wait_k_limits(s, t, one) for s, t, one in zip(sources, targets, ks, strict=True)]
    return from_limits(limits, list(map(sum, sources)), T=T, device=device)


def _limits(op: str, limits: Nested, source_length: Lengths) -> tuple[list[Tensor], list[int]]:
    batch: list[Any] = samples(op, "limits", limits)
    lengths = sizes(op, "source_length", source_length, len(batch) if isinstance(source_length, int) else None)
    same_batch(op, "source_length", lengths, "limits", batch)
    for b, (row, S) in enumerate(zip(batch, lengths, strict=True)):
        if row and max(row) > S:
            name = f"limits[{b}]" if nested(limits) else "limits"
            refuse(op, name, f"limits <= source_length {S}", f"{max(row)} at row {row.index(max(row))}")
    return [torch.tensor(row, dtype=torch.long) for row in batch], lengths


def _grouped(
    limits: Sequence[Tensor],
    lengths: Sequence[int],
    written: Sequence[Tensor] | None,
    T: int,
    device: torch.device | str | None,
) -> Spans:
    # slot 0 is the source's part of the buffer, slot 1 the target's; source row i sees written[b][i] target tokens
    source_end = torch.zeros(len(limits), T, dtype=torch.long)
    target_begin, target_end = torch.zeros_like(source_end), torch.zeros_like(source_end)
    for b, (limit, S) in enumerate(zip(limits, lengths, strict=True)):
        n = S + len(limit)
        source_end[b, :n] = torch.cat([torch.arange(1, S + 1), limit])
        target_begin[b, :n] = S
        own = torch.arange(S + 1, n + 1)
        target_end[b, :n] = torch.cat([torch.zeros(S, dtype=torch.long) if written is None else S + written[b], own])
    return from_columns([(torch.zeros_like(source_end), source_end), (target_begin, target_end)], device=device)


def from_limits(
    limits: Nested, source_length: Lengths, *, T: int | None = None, device: torch.device | str | None = None
) -> Spans:
    """Group streaming under any schedule: one limit per target row, the number of source tokens it sees.

    `limits` is one int per target row (or one such list per sample), `source_length` an int or one per sample. In each
    sample's buffer [source | target], with S its source length: source row i sees `[0, i + 1)`; target row j sees
    `[0, limits[j])` and `[S, S + j + 1)`. Two slots. The batch has `T` rows, default the longest sample.
    Limits need not increase. Raises ValueError for a limit outside `[0, S]`, TypeError for limits that are no ints.
    """
    rows, lengths = _limits("from_limits", limits, source_length)
    total = batch_size("from_limits", "T", T, [S + len(row) for S, row in zip(lengths, rows, strict=True)])
    return _grouped(rows, lengths, None, total, device)


def interleaved(
    limits: Nested, source_length: Lengths, *, T: int | None = None, device: torch.device | str | None = None
) -> Spans:
    """Interleaved streaming: as `from_limits`, and a source row also sees the targets written before it arrived.

    Target row j was written when `limits[j]` source tokens had been read, so it came before source row i iff
    `limits[j] <= i`: source row i sees `[0, i + 1)` and `[S, S + number of such j)`. This is causal attention over
    the tokens in the order of `arrival_order`, with the keys left in [source | target] order (positions are data, and
    go with the tokens). Two slots. For the interleaved baseline of arXiv 2505.16983 take the limits with
    `shift=False`: there the row that predicts a segment's first token is the source token read just before; with
    `shift=True` a segment's last token comes after what is read next, and every target token is predicted by a target
    row, as in group streaming.

    Raises ValueError if limits decrease within a sample (no order of arrival then), else as `from_limits`.
    """
    rows, lengths = _limits("interleaved", limits, source_length)
    written = [_written("interleaved", row, S) for row, S in zip(rows, lengths, strict=True)]
    total = batch_size("interleaved", "T", T, [S + len(row) for S, row in zip(lengths, rows, strict=True)])
    return _grouped(rows, lengths, written, total, device)


def _written(op: str, limits: Tensor, S: int) -> Tensor:
    falls = (limits[1:] < limits[:-1]).nonzero()
    if len(falls):
        at = int(falls[0])
        pair = f"{int(limits[at])} then {int(limits[at + 1])} at row {at + 1}"
        refuse(op, "limits", "limits that never decrease", pair)
    return torch.searchsorted(limits, torch.arange(S), right=True)


def arrival_order(limits: Sequence[int] | Tensor, source_length: int) -> list[int]:
    """The rows of one sample's buffer [source | target] in the order in which they arrive under `interleaved`.

    Element n is the buffer row of the n-th token of the stream; its position in interleaved streaming is n.

    >>> arrival_order([1, 1, 2], 3)
    [0, 3, 4, 1, 5, 2]
    """
    (row,), (S,) = _limits("arrival_order", limits, source_length)
    when = torch.cat([_written("arrival_order", row, S) + torch.arange(S), row + torch.arange(len(row))])
    order: list[int] = when.argsort().tolist()
    return order


def re_encoded(
    source_length: Lengths, target_length: Lengths, *, T: int | None = None, device: torch.device | str | None = None
) -> Spans:
    """Re-encoded (batch) streaming: the forward that one reading step repeats over all it has read and written.

    `source_length`: source tokens read so far, `target_length`: target tokens written so far, ints or one per sample.
    Every target row, also one written long ago, sees all source read so far and the target up to itself; a source row
    sees the source up to itself. In the buffer [source | target] that is causal attention, with the re-encoded
    positions 0, 1, 2, ... = the buffer index (the target moves on by what was read). One slot. It is the costly
    scheme of arXiv 2603.04592 ("re-encoded") that group streaming replaces, and the one-shot reference for it. Raises
    TypeError or ValueError for lengths that are no ints >= 0 and for batches that differ.
    """
    op = "re_encoded"
    B = None
    for name, x in (("source_length", source_length), ("target_length", target_length)):
        B = B if isinstance(x, int) else len(sizes(op, name, x, B))
    source, target = sizes(op, "source_length", source_length, B), sizes(op, "target_length", target_length, B)
    totals = [s + t for s, t in zip(source, target, strict=True)]
    return up_to_itself(totals, totals, batch_size(op, "T", T, totals), device)
