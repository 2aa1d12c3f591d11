"""Writing a chunk of new rows behind what a cache holds: where each row goes, and the write itself.

Row t of batch row b with role r gets the stream index `length[b, r]` + the number of earlier rows of role r in the
call, and lives in slot `core.slots.slot(index)` of segment r. Placed with another role (padding) are written nowhere. A
row whose slot lies outside of its segment is dropped, and bit r of the status word is set.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.positions import apply_rotary
from ..core.slots import slot


@dataclass(frozen=True)
class Placed:
    """Where the T rows of a call stand.

    role: [B, T]. index: int64 [B, T], the row's stream index in the segment that its role names, -1 for padding. total:
    two int64 [B], the lengths of the source and the target segment with this call's rows.
    """

    role: Tensor
    index: Tensor
    total: tuple[Tensor, Tensor]


def place_rows(length: Tensor, role: Tensor | None, segment: int, T: int) -> Placed:
    """length: int32 [B, 2], the committed lengths; role: int8 [B, T], or None when every row has the role `segment`."""
    B = length.shape[0]
    if role is None:
        role = torch.full((B, T), segment, dtype=torch.int8, device=length.device)
    before = length.long().unbind(1)
    index = torch.full((B, T), -1, device=length.device)
    total = []
    for r in (0, 1):
        own = role == r
        index = torch.where(own, before[r][:, None] + own.cumsum(1) - 1, index)
        total.append(before[r] + own.sum(1))
    return Placed(role, index, (total[0], total[1]))


def rotate_append(
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
    sinks: int,
    bounded: bool,
    interleaved: bool,
) -> None:
    """Rotate k [B, HK, T, D] by cos, sin (None: already rotated) and write k, v behind the committed lengths. No
    synchronisation."""
    if k.numel() == 0:
        return
    if cos is not None and sin is not None:
        k = apply_rotary(k, cos, sin, interleaved)
    rows = place_rows(length, role, segment, k.shape[2])
    for r, buffers in enumerate(((source_k, source_v), (target_k, target_v))):
        if role is not None or r == segment:
            write_rows(buffers, (k, v), rows, r, status, sinks, bounded)


def write_rows(
    buffers: tuple[Tensor, Tensor],
    chunk: tuple[Tensor, Tensor],
    rows: Placed,
    r: int,
    status: Tensor,
    sinks: int,
    ring: bool,
) -> None:
    """Write the rows of role r of chunk (k, v) [B, HK, T, D] to one segment's (k, v) [B, HK, C, D]; `ring`: the
    segment is bounded."""
    C, T = buffers[0].shape[2], chunk[0].shape[2]
    at = slot(rows.index, C, sinks, ring)
    own = rows.role == r
    fits = own & (at >= 0) & (at < C)
    status.bitwise_or_((own & ~fits).any().to(status.dtype) << r)
    if C == 0:
        return
    # leaving rows out would need their number on the host: they repeat the write of a row that fits instead, and where
    # none does they write slot 0 back as it is
    some = fits.any(1, keepdim=True)
    t = torch.where(fits, torch.arange(T, device=at.device), fits.byte().argmax(1, keepdim=True))
    at = torch.where(some, at.gather(1, t), 0)
    b = torch.arange(at.shape[0], device=at.device)[:, None]
    for buffer, x in zip(buffers, chunk, strict=True):
        held = buffer.transpose(1, 2)  # [B, C, HK, D]
        new = torch.where(some[:, :, None, None], x.transpose(1, 2)[b, t], held[b, at])
        held.index_put_((b, at), new)
