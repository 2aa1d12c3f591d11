"""Where a new row of a stream lives: its index in its segment, and the slot of that index."""

import triton
import triton.language as tl


@triton.jit
def count_roles(role, begin, end, stride_role_t, COUNT: tl.constexpr):
    """How many source rows and target rows stand in [begin, end), at most COUNT rows: role int8 [T] -> two int32
    scalars. Both counts in one sum, 16 bits each: COUNT is less than 65536."""
    t = begin + tl.arange(0, COUNT)
    r = tl.load(role + t.to(tl.int64) * stride_role_t, mask=t < end, other=-1)
    both = tl.sum(tl.where(r == 0, 1, tl.where(r == 1, 65536, 0)), 0)
    return both & 65535, both >> 16


@triton.jit
def sum_counts(counts, chunks, CHUNKS: tl.constexpr):
    """Source rows and target rows of the first `chunks` chunks: counts int32 [chunks, 2] -> two int32 scalars."""
    sources = tl.zeros([CHUNKS], tl.int32)
    targets = tl.zeros([CHUNKS], tl.int32)
    for start in range(0, chunks, CHUNKS):
        c = start + tl.arange(0, CHUNKS)
        sources += tl.load(counts + 2 * c, mask=c < chunks, other=0)
        targets += tl.load(counts + 2 * c + 1, mask=c < chunks, other=0)
    return tl.sum(sources, 0), tl.sum(targets, 0)


@triton.jit
def slot(index, capacity, sinks, BOUNDED: tl.constexpr):
    """The slot of stream index `index` in a segment of `capacity` slots (core/cache.py `slot`): a ring behind the
    sinks when bounded."""
    if BOUNDED:
        return tl.where(index < capacity, index, sinks + (index - sinks) % (capacity - sinks))
    else:
        return index
