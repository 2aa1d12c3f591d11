"""Summaries of spans: per block of 64 rows what its spans cover, per block of 64 keys which row blocks reach it.

A span that is empty after clipping to [0, S) counts as (S, 0): it widens no hull, and no tile of its row is full.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

BLOCK = 64
# pairs of (row block, key block) compared at once
PAIRS = 1 << 22


def prepare(bounds: Tensor, S: int) -> tuple[Tensor, Tensor]:
    """bounds int32 [B, T, N, 2] -> row_blocks int32 [B, TB, N, 4], key_blocks int32 [B, SB, N, 2], as `ops.prepare`."""
    B, T, N, _ = bounds.shape
    begin, end = bounds.clamp(0, S).unbind(-1)
    empty = end <= begin
    begin, end = begin.masked_fill(empty, S), end.masked_fill(empty, 0)
    least_begin = _blocks(begin, S).amin(2)
    most_begin = _blocks(begin, 0).amax(2)
    least_end = _blocks(end, S).amin(2)
    most_end = _blocks(end, 0).amax(2)
    row_blocks = torch.stack([least_begin, most_begin, least_end, most_end], -1)
    return row_blocks, _key_blocks(least_begin, most_end, S)


def _blocks(x: Tensor, neutral: int) -> Tensor:
    # [B, T, N] -> [B, TB, 64, N]; rows beyond T hold what changes no minimum or maximum
    T = x.shape[1]
    return pad(x, (0, 0, 0, -T % BLOCK), value=neutral).unflatten(1, (-(-T // BLOCK), BLOCK))


def _key_blocks(begin: Tensor, end: Tensor, S: int) -> Tensor:
    # begin, end [B, TB, N]: the hulls of the row blocks -> [B, SB, 4]: two runs of row blocks, split at the widest gap
    B, TB, _ = begin.shape
    first_key = torch.arange(0, S, BLOCK, dtype=torch.int32, device=begin.device)
    number = torch.arange(TB, dtype=torch.int32, device=begin.device)
    runs = begin.new_zeros((B, first_key.shape[0], 4))
    if TB == 0:
        return runs
    step = max(1, PAIRS // max(1, begin.numel()))
    for i in range(0, first_key.shape[0], step):
        start = first_key[i : i + step, None, None]
        reaches = ((begin[:, None] < start + BLOCK) & (end[:, None] > start)).any(-1)
        last_so_far = torch.where(reaches, number, -1).cummax(-1).values
        before = pad(last_so_far[..., :-1], (1, 0), value=-1)
        gap = torch.where(reaches & (before >= 0), number - before, 0)
        widest = gap.amax(-1)
        resumes = torch.where(gap == widest[..., None], number, TB).amin(-1)
        first, beyond = torch.where(reaches, number, TB).amin(-1), last_so_far[..., -1] + 1
        two = widest > 1
        none = torch.zeros_like(first)
        run = [
            first,
            torch.where(two, resumes - widest + 1, beyond),
            torch.where(two, resumes, 0),
            torch.where(two, beyond, 0),
        ]
        runs[:, i : i + step] = torch.stack([torch.where(beyond > 0, x, none) for x in run], -1)
    return runs
