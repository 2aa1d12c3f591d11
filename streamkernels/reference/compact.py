"""Gather the listed rows of a tensor into a shorter one, and the transpose of that."""

from __future__ import annotations

import torch
from torch import Tensor


def compact(x: Tensor, index: Tensor, count: Tensor, dim: int) -> Tensor:
    """x [B, ..., S at dim, ...], index [B, K], count [B] -> the same with K at dim, 0 where nothing is listed."""
    rows = x.movedim(dim, 1)
    if rows.shape[1] == 0:
        out = rows.new_zeros((rows.shape[0], index.shape[1], *rows.shape[2:]))
    else:
        listed, at = _places(index, count, rows.shape[1])
        gathered = rows[torch.arange(rows.shape[0], device=x.device)[:, None], at]
        out = gathered.masked_fill(~listed.view(*listed.shape, *(1,) * (rows.dim() - 2)), 0)
    return out.movedim(1, dim).contiguous()


def compact_backward(dy: Tensor, index: Tensor, count: Tensor, S: int, dim: int) -> Tensor:
    """dy as the output of `compact` -> dx of the input's shape, S at dim; a row that is listed twice gets the sum."""
    rows = dy.movedim(dim, 1)
    listed, at = _places(index, count, S)
    wide = torch.float32 if dy.dtype in (torch.float16, torch.bfloat16) else dy.dtype
    out = torch.zeros((rows.shape[0], S, *rows.shape[2:]), dtype=wide, device=dy.device)
    if S:
        rows = rows.to(wide).masked_fill(~listed.view(*listed.shape, *(1,) * (rows.dim() - 2)), 0)
        out.index_put_((torch.arange(rows.shape[0], device=dy.device)[:, None], at), rows, accumulate=True)
    return out.to(dy.dtype).movedim(1, dim).contiguous()


def _places(index: Tensor, count: Tensor, S: int) -> tuple[Tensor, Tensor]:
    listed = (torch.arange(index.shape[1], device=index.device) < count[:, None]) & (index >= 0) & (index < S)
    return listed, index.long().masked_fill(~listed, 0)
