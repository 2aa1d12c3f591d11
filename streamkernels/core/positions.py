"""The home of positions: which number each token hands to RoPE, and nothing else.

No position says who sees whom, what is packed or where a key is stored: ids may repeat, leave gaps and go in any order.
Buffers are laid out as [source | target] per sample: the target begins at the sample's own source length, padding comes
last and continues the target's count. Ids are int64, since trainers cast floating inputs to bf16, which cannot hold
positions; a fractional part of the offset phi travels beside them as one number for `Rotary.cos_sin`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from .ragged import batch_size, listed, nested, same_batch, samples, sizes
from .rotary import Rotary, apply_rotary
from .shapes import check_int, check_number, refuse

__all__ = [
    "SCHEMES",
    "Positions",
    "Rotary",
    "apply_rotary",
    "grouped_positions",
    "interleaved_positions",
    "mrope_positions",
]

SCHEMES = ("group", "overlap", "gap", "slots", "sequential")


class Positions(NamedTuple):
    """ids: int64 [B, T], or [3, B, T] (t, h, w). offset: what is left to add to the ids of target rows, in [0, 1).
    target_rows: bool [B, T], true from each sample's first target row on. Goes into `rotary.cos_sin(p.ids,
    offset=p.offset, target_rows=p.target_rows)`."""

    ids: Tensor
    offset: float
    target_rows: Tensor


def grouped_positions(
    source_lengths: Sequence[int] | Sequence[Sequence[int]],
    target_lengths: Sequence[int] | Sequence[Sequence[int]],
    *,
    scheme: str = "group",
    offset: float = 0,
    gap: int = 10000,
    slot: int = 16,
    lead: int = 1,
    T: int | None = None,
    device: torch.device | str | None = None,
) -> Positions:
    """Positions of a source and a target that are written while the source is read.

    source_lengths, target_lengths: segment lengths in tokens, a list for one sample or one list per sample; segments
    only matter to "overlap" and "slots". With S the source length, i a source token and j a target token:

    - "group" (group position encoding, arXiv 2505.16983; GDPE in arXiv 2601.06843): source i, target offset
      + j. The offset phi is any number, 0.5 for instance; the target's positions never depend on S.
    - "gap" (GIPE, arXiv 2601.06843): as "group" with phi = `gap`, 10000 as in EIT-NLP/Speak-While-Watching.
    - "overlap" (OSPE, arXiv 2601.06843): the first `lead` source segments are read one after the other. Then each round
      lets the next target segment and the next source segment start at the same position; the next round starts after
      the longer of the two.
    - "slots" (ExPosST, arXiv 2603.14903): `slot` positions (L_slot) behind the first source segment, the prompt, are
      reserved for the rest of the source; the target starts at slot_start + L_slot. One slot per sample: refused when
      the source needs more.
    - "sequential": target S + j. Batch mode; also what re-encoding gives to everything read and written so far.

    T: rows of the batch, default the longest sample. Returns int64 ids [B, T]; see `Positions`. Raises TypeError or
    ValueError.

    >>> grouped_positions([2, 1], [3]).ids.tolist()
    [[0, 1, 2, 0, 1, 2]]
    """
    op = "grouped_positions"
    sources, targets = samples(op, "source_lengths", source_lengths), samples(op, "target_lengths", target_lengths)
    blocks = [[_text(n, 1) for n in lengths] for lengths in sources]
    whole, rest = _offset(op, scheme, offset, gap)
    ids, target_rows = _fill(op, blocks, targets, (scheme, whole, slot, lead), 1, T)
    return Positions(ids[0].to(device), rest, target_rows.to(device))


def mrope_positions(
    source: Sequence[object],
    target_lengths: Sequence[int] | Sequence[Sequence[int]],
    *,
    scheme: str = "group",
    offset: float = 0,
    gap: int = 10000,
    slot: int = 16,
    lead: int = 1,
    temporal_step: float = 1.0,
    advance: str = "largest",
    T: int | None = None,
    device: torch.device | str | None = None,
) -> Positions:
    """Positions on three axes (temporal, height, width) of a source with images or video frames, and a target of text.

    source: a list of segments, each an int (text tokens) or a tuple (frames, height, width) of merged vision patches;
    or a list of such lists, one per sample. Multimodal RoPE (Qwen2-VL, arXiv 2409.12191, section 2.1): text token i has
    t = h = w = base + i; patch (f, y, x) has t = base + floor(temporal_step * f), h = base + y, w = base + x; base is
    one more than the largest position before the segment. temporal_step is the positions from one frame to the next: 1
    in Qwen2-VL, tokens per second times seconds per frame in Qwen2.5-VL (arXiv 2502.13923, section 2.1.3), 2 in
    EIT-NLP/StreamingLLM TaYS. advance="spatial" lets the segment behind a video start max(height, width) positions
    after the video did, as transformers 5 does; the same for images, not for a video of more frames than patches a
    side.

    The target starts, on all three axes, where `scheme` says (see `grouped_positions`; a segment counts as long as its
    largest position on any axis): with "group" at offset, as TaYS does ("Think-as-You-See", arXiv 2603.02872: the
    target group restarts at 0); with "sequential" after everything before it, as the unmodified models do.
    target_lengths as in `grouped_positions`.

    Returns int64 ids [3, B, T]; see `Positions`. Raises TypeError or ValueError.

    >>> mrope_positions([1, (1, 2, 2), 1], [2]).ids[:, 0].tolist()
    [[0, 1, 1, 1, 1, 3, 0, 1], [0, 1, 1, 2, 2, 3, 0, 1], [0, 1, 2, 1, 2, 3, 0, 1]]
    """
    op = "mrope_positions"
    check_number(op, "temporal_step", temporal_step, minimum=0)
    if advance not in ("largest", "spatial"):
        refuse(op, "advance", "largest or spatial", advance)
    timed = advance == "largest"
    batch = listed(op, "source", source)
    if not any(isinstance(sample, list) for sample in batch):
        batch = [batch]
    blocks = [
        [_block(op, f"source[{b}]", x, temporal_step, timed) for x in listed(op, "source", row)]
        for b, row in enumerate(batch)
    ]
    targets = samples(op, "target_lengths", target_lengths)
    whole, rest = _offset(op, scheme, offset, gap)
    ids, target_rows = _fill(op, blocks, targets, (scheme, whole, slot, lead), 3, T)
    return Positions(ids.to(device), rest, target_rows.to(device))


def interleaved_positions(
    limits: Sequence[int] | Sequence[Sequence[int]],
    source_length: int | Sequence[int],
    *,
    T: int | None = None,
    device: torch.device | str | None = None,
) -> Positions:
    """Positions in the order of arrival: one count over source and target, as interleaved streaming has (arXiv
    2505.16983).

    limits: per target token, the source tokens that had been read when it was written, never decreasing; one list, or
    one per sample. source_length: int or one per sample. Source token i has position i + the targets written before it,
    target token j has position limits[j] + j. The keys stay in [source | target] order; see
    `streamkernels.spans.interleaved` for who sees whom.

    >>> interleaved_positions([1, 1, 2], 3).ids.tolist()
    [[0, 3, 5, 1, 2, 4]]
    """
    op = "interleaved_positions"
    rows = samples(op, "limits", limits)
    lengths = sizes(op, "source_length", source_length, len(rows))
    for b, (row, S) in enumerate(zip(rows, lengths, strict=True)):
        if any(after < before for before, after in zip(row, row[1:], strict=False)) or (row and row[-1] > S):
            where = f"limits[{b}]" if nested(limits) else "limits"
            refuse(op, where, f"limits that never decrease, at most source_length {S}", f"{row[:16]}")
    total = batch_size(op, "T", T, [S + len(row) for S, row in zip(lengths, rows, strict=True)])
    ids = torch.empty(len(rows), total, dtype=torch.int64)
    for b, (row, S) in enumerate(zip(rows, lengths, strict=True)):
        limit, i = torch.tensor(row, dtype=torch.int64), torch.arange(S)
        ids[b, :S] = i + torch.searchsorted(limit, i, right=True)
        # padding arrives after everything
        ids[b, S:] = torch.cat([limit, torch.full((total - S - len(row),), S)]) + torch.arange(total - S)
    return Positions(ids.to(device), 0.0, _target_rows(lengths, total).to(device))


class _Block(NamedTuple):
    """One segment: ids [axes, n] relative to its start, and the positions that it takes up."""

    ids: Tensor
    extent: int


def _text(n: int, axes: int) -> _Block:
    return _Block(torch.arange(n).expand(axes, n), n)


def _block(op: str, name: str, x: object, temporal_step: float, timed: bool) -> _Block:
    if not isinstance(x, tuple):
        return _text(check_int(op, name, x), 3)
    if len(x) != 3:
        refuse(op, name, "an int (text) or a tuple (frames, height, width)", x)
    frames, height, width = (check_int(op, name, n, minimum=1) for n in x)
    when = torch.tensor([math.floor(temporal_step * f) for f in range(frames)])
    axes = torch.meshgrid(when, torch.arange(height), torch.arange(width), indexing="ij")
    return _Block(torch.stack([a.flatten() for a in axes]), max(int(when[-1]) + 1 if timed else 0, height, width))


def _offset(op: str, scheme: str, offset: float, gap: int) -> tuple[int, float]:
    """The whole and the fractional part of phi."""
    if scheme not in SCHEMES:
        refuse(op, "scheme", f"one of {', '.join(SCHEMES)}", scheme)
    check_number(op, "offset", offset)
    if scheme == "gap":
        offset += check_int(op, "gap", gap)
    elif scheme != "group" and offset:
        refuse(op, "offset", f"0 under the scheme {scheme!r}", offset)
    return math.floor(offset), float(offset - math.floor(offset))


def _starts(
    op: str, extents: list[int], targets: list[int], rule: tuple[str, int, int, int]
) -> tuple[list[int], list[int]]:
    """The first position of every source and every target segment of one sample."""
    scheme, offset, slot, lead = rule
    source = [0, *accumulate(extents)]
    end = source.pop()
    written = list(accumulate(targets, initial=0))[:-1]
    if scheme == "overlap":
        return _rounds(extents, targets, check_int(op, "lead", lead, minimum=1))
    if scheme == "slots":
        head = extents[0] if extents else 0
        check_int(op, "slot", slot, minimum=1)
        if end - head > slot:
            refuse(op, "slot", f"at least the {end - head} positions of the source behind its first segment", slot)
        offset = head + slot
    elif scheme == "sequential":
        offset = end
    return source, [offset + n for n in written]


def _rounds(extents: list[int], targets: list[int], lead: int) -> tuple[list[int], list[int]]:
    source, target = [0, *accumulate(extents[:lead])], []
    at = source.pop()
    for r in range(max(len(targets), len(extents) - lead)):
        longest = 0
        if r < len(targets):
            target.append(at)
            longest = targets[r]
        if lead + r < len(extents):
            source.append(at)
            longest = max(longest, extents[lead + r])
        at += longest
    return source, target


def _fill(
    op: str,
    blocks: list[list[_Block]],
    targets: list[list[int]],
    rule: tuple[str, int, int, int],
    axes: int,
    T: int | None,
) -> tuple[Tensor, Tensor]:
    """ids [axes, B, T] and target_rows [B, T]."""
    same_batch(op, "target_lengths", targets, "source", blocks)
    lengths = [sum(block.ids.shape[1] for block in row) for row in blocks]
    total = batch_size(op, "T", T, [S + sum(t) for S, t in zip(lengths, targets, strict=True)])
    ids = torch.empty(axes, len(blocks), total, dtype=torch.int64)
    for b, (row, target) in enumerate(zip(blocks, targets, strict=True)):
        # the padding continues the target's last segment; an empty target still has a start
        padded = [*target[:-1], (target[-1] if target else 0) + total - lengths[b] - sum(target)]
        source_starts, target_starts = _starts(op, [block.extent for block in row], target or [0], rule)
        parts = [block.ids + start for block, start in zip(row, source_starts, strict=True)]
        parts += [
            torch.arange(start, start + n).expand(axes, n) for start, n in zip(target_starts, padded, strict=True)
        ]
        ids[:, b] = torch.cat(parts, dim=1)
    return ids, _target_rows(lengths, total)


def _target_rows(lengths: Sequence[int], total: int) -> Tensor:
    return torch.arange(total) >= torch.tensor(lengths)[:, None]
