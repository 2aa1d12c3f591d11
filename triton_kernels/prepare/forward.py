"""prepare: what blocks of 64 rows cover and which of them reach a block of 64 keys; see ops/prepare for the definition.

Two small launches per forward, shared by all layers and by the backward: O(T N) reads, and (T / 64) (S / 64)
comparisons in registers.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["T", "S", "TB"], do_not_specialize_on_alignment=["bounds"])
def row_blocks_kernel(bounds, row_blocks, T, S, TB, N: tl.constexpr):
    """bounds int32 [B, T, N, 2] -> row_blocks int32 [B, TB, N, 4]; grid (TB, B)."""
    block = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    t = block * 64 + tl.arange(0, 64)
    n = tl.arange(0, N)
    at = bounds + ((b * T + t[:, None]) * N + n[None, :]) * 2
    inside = (t < T)[:, None] & (n < N)[None, :]
    begin = tl.minimum(tl.maximum(tl.load(at, mask=inside, other=0), 0), S)
    end = tl.minimum(tl.maximum(tl.load(at + 1, mask=inside, other=0), 0), S)
    empty = end <= begin
    begin = tl.where(empty, S, begin)
    end = tl.where(empty, 0, end)
    to = row_blocks + ((b * TB + block) * N + n) * 4
    # rows beyond T hold what changes no minimum or maximum
    tl.store(to, tl.min(tl.where(inside, begin, S), 0))
    tl.store(to + 1, tl.max(tl.where(inside, begin, 0), 0))
    tl.store(to + 2, tl.min(tl.where(inside, end, S), 0))
    tl.store(to + 3, tl.max(tl.where(inside, end, 0), 0))


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _reaches(row_blocks, i, TB, start, N: tl.constexpr, BLOCK: tl.constexpr):
    # bool [BLOCK]: whether row block i meets the keys [start, start + 64)
    met = tl.zeros([BLOCK], tl.int32)
    there = (i >= 0) & (i < TB)
    for slot in tl.static_range(N):
        at = row_blocks + (i.to(tl.int64) * N + slot) * 4
        low = tl.load(at, mask=there, other=2147483647)
        high = tl.load(at + 3, mask=there, other=0)
        met |= ((low < start + 64) & (high > start)).to(tl.int32)
    return met > 0


@triton.jit(do_not_specialize=["TB", "SB"])
def key_blocks_kernel(row_blocks, key_blocks, TB, SB, N: tl.constexpr, BLOCK: tl.constexpr):
    """row_blocks int32 [B, TB, N, 4] -> key_blocks int32 [B, SB, 4]: two runs of row blocks, split at the widest gap;
    grid (SB, B)."""
    b = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0) * 64
    row_blocks += b * TB * N * 4
    first = TB
    last = -1
    widest = 0
    resumes = 0
    for chunk in tl.range(0, TB, BLOCK):
        i = chunk + tl.arange(0, BLOCK)
        met = _reaches(row_blocks, i, TB, start, N, BLOCK)
        met_before = (i > chunk) & _reaches(row_blocks, i - 1, TB, start, N, BLOCK)
        # the last block before i that meets the keys, in this chunk or an earlier one
        previous = tl.maximum(tl.associative_scan(tl.where(met_before, i - 1, -1), 0, _larger), last)
        gap = tl.where(met & (previous >= 0), i - previous, 0)
        most = tl.max(gap, 0)
        at = tl.min(tl.where((gap == most) & (gap > 0), i, 2147483647), 0)
        resumes = tl.where(most > widest, at, resumes)
        widest = tl.maximum(most, widest)
        first = tl.minimum(first, tl.min(tl.where(met, i, TB), 0))
        last = tl.maximum(last, tl.max(tl.where(met, i, -1), 0))
    none = last < 0
    two = widest > 1
    to = key_blocks + (b * SB + tl.program_id(0)) * 4
    tl.store(to, tl.where(none, 0, first))
    tl.store(to + 1, tl.where(none, 0, tl.where(two, resumes - widest + 1, last + 1)))
    tl.store(to + 2, tl.where(two, resumes, 0))
    tl.store(to + 3, tl.where(two, last + 1, 0))
