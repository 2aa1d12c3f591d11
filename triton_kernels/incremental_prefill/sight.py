"""What the rows of a chunk see of the two segments, by stream index: the twin of `Sight` in
reference/incremental_prefill.py."""

import triton
import triton.language as tl

from ..device.cache import count_roles, slot

# roles counted at once, and how often that can be done in a call
STEP = tl.constexpr(1024)
MOST_CHUNKS = tl.constexpr(1024)
MANY = tl.constexpr(2147483647)


@triton.jit(do_not_specialize=["T", "chunks", "role_b", "role_t"])
def count_chunks_kernel(role, counts, T, chunks, role_b, role_t):
    """counts int32 [B, chunks, 2]: source and target rows of every STEP rows; grid (chunks, B)."""
    b = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0) * STEP
    sources, targets = count_roles(role + b * role_b, start, T, role_t, STEP)
    at = counts + (b * chunks + tl.program_id(0)) * 2
    tl.store(at, sources)
    tl.store(at + 1, targets)


@triton.jit
def count_until(role, counts, end, role_t, HAS_COUNTS: tl.constexpr):
    """Source rows and target rows among the first `end` rows of a chunk; of a chunk longer than STEP with the help of
    `counts` [chunks, 2]. No loop: behind one, triton 3.7.1 pipelines none of the kernel's loads."""
    if HAS_COUNTS:
        chunk = end // STEP
        sources, targets = count_roles(role, chunk * STEP, end, role_t, STEP)
        c = tl.arange(0, MOST_CHUNKS)
        sources += tl.sum(tl.load(counts + 2 * c, mask=c < chunk, other=0), 0)
        targets += tl.sum(tl.load(counts + 2 * c + 1, mask=c < chunk, other=0), 0)
    else:
        sources, targets = count_roles(role, end * 0, end, role_t, STEP)
    return sources, targets


@triton.jit
def rank_rows(
    role, counts, t, inside, opens, opened, role_t,
    HAS_ROLE: tl.constexpr, HAS_COUNTS: tl.constexpr, SEGMENT: tl.constexpr,
):  # fmt: skip
    """Role (-1: none) and rank in its role of each row t; rows may repeat.

    `opens` marks the first of equal rows, `opened` is how many rows opened before these.
    """
    if HAS_ROLE:
        r = tl.load(role + t.to(tl.int64) * role_t, mask=inside, other=-1).to(tl.int32)
        sources, targets = count_until(role, counts, opened, role_t, HAS_COUNTS)
        source_rank = sources + tl.cumsum(((r == 0) & opens).to(tl.int32), 0) - 1
        target_rank = targets + tl.cumsum(((r == 1) & opens).to(tl.int32), 0) - 1
        rank = tl.where(r == 0, source_rank, target_rank)
    else:
        r = tl.where(inside, SEGMENT, -1)
        rank = t
    return r, rank


@triton.jit
def lengths_before(length, length_r, T):
    """The committed lengths; garbage is clamped so far that no index overflows, which changes nothing that is seen."""
    most = MANY - 1024 - T
    source = tl.minimum(tl.maximum(tl.load(length), -T), most)
    target = tl.minimum(tl.maximum(tl.load(length + length_r), -T), most)
    return source, target


@triton.jit
def lengths_after(
    source, target, role, counts, T, role_t,
    HAS_ROLE: tl.constexpr, HAS_COUNTS: tl.constexpr, SEGMENT: tl.constexpr,
):  # fmt: skip
    """The lengths with this call's rows."""
    if HAS_ROLE:
        sources, targets = count_until(role, counts, T, role_t, HAS_COUNTS)
        return source + sources, target + targets
    else:
        return source + T * (SEGMENT == 0), target + T * (SEGMENT == 1)


@triton.jit
def oldest_held(total, capacity, ring_sinks, RING: tl.constexpr):
    """The least index behind the sinks that a segment of `total` rows still holds."""
    if RING:
        return tl.maximum(total - tl.maximum(capacity - ring_sinks, 1), 0)
    else:
        return total * 0


@triton.jit
def first_seen(begin, t, inside, begin_t, end, window, held, HAS_BEGIN: tl.constexpr, RING: tl.constexpr):
    """The least index that each row sees of a segment, sinks aside."""
    low = tl.where(inside, held, 0)
    if HAS_BEGIN:
        low = tl.maximum(low, tl.load(begin + t.to(tl.int64) * begin_t, mask=inside, other=0))
    if RING:
        low = tl.maximum(low, end - window)
    return low


@triton.jit
def last_seen(r, index, limit, t, limit_t, total, HAS_LIMIT: tl.constexpr):
    """(end in the source, end in the target) of what each row sees."""
    most = tl.maximum(total, 0)
    if HAS_LIMIT:
        limits = tl.load(limit + t.to(tl.int64) * limit_t, mask=r == 1, other=0)
        limits = tl.minimum(tl.maximum(limits, 0), most)
    else:
        limits = tl.where(r == 1, most, 0)
    source = tl.where(r == 0, index + 1, tl.where(r == 1, limits, 0))
    return source, tl.where(r == 1, index + 1, 0)


@triton.jit
def sees_key(low, high, j, sinks, SINKS: tl.constexpr):
    """Whether a row sees the key of stream index j: `Sight.sees`; arguments broadcast."""
    if SINKS:
        return (j < high) & ((j >= low) | (j < sinks))
    else:
        return (j < high) & (j >= low)


@triton.jit
def is_held(index, total, capacity, ring_sinks, RING: tl.constexpr):
    """Whether the segment holds the key of stream index `index` after this call's writes."""
    if RING:
        held = (index >= oldest_held(total, capacity, ring_sinks, RING)) | (index < ring_sinks)
        return (index >= 0) & held & (index < total)
    else:
        return (index >= 0) & (index < capacity)


@triton.jit
def hull(low, high, asks, kept, sinks, SINKS: tl.constexpr):
    """What rows see of the first `kept` keys of a segment: (sinks end, begin, end) with the keys [0, sinks end) and
    [begin, end), and the keys [most begin, least end) that every row sees. `asks` marks the rows that count."""
    end = tl.minimum(tl.max(tl.where(asks, high, 0), 0), kept)
    begin = tl.maximum(tl.min(tl.where(asks & (high > low), low, MANY), 0), 0)
    most_begin = tl.max(tl.where(asks, low, 0), 0)
    least_end = tl.min(tl.where(asks, high, MANY), 0)
    sinks_end = end * 0
    if SINKS:
        sinks_end = tl.where(begin > sinks, tl.maximum(tl.minimum(sinks, end), 0), 0)
        begin = tl.where(begin > sinks, begin, 0)
    return sinks_end, begin, tl.maximum(end, begin), most_begin, least_end


@triton.jit
def seen_from_begin(high, asks, kept):
    """What rows that see [0, high) each see of the first `kept` keys of a segment: (end, least end)."""
    end = tl.minimum(tl.max(tl.where(asks, high, 0), 0), kept)
    return end, tl.min(tl.where(asks, high, MANY), 0)


@triton.jit
def count_tiles(sinks_end, begin, end, BLOCK_S: tl.constexpr, SINKS: tl.constexpr):
    """Key tiles of a hull."""
    if SINKS:
        return tl.cdiv(sinks_end, BLOCK_S) + tl.cdiv(end - begin, BLOCK_S)
    else:
        return tl.cdiv(end - begin, BLOCK_S)


@triton.jit
def locate_tile(i, sinks_end, begin, end, BLOCK_S: tl.constexpr, SINKS: tl.constexpr):
    """Tile i of a hull: its first stream index, and where its keys stop."""
    if SINKS:
        first = tl.cdiv(sinks_end, BLOCK_S)
        return (
            tl.where(i < first, i * BLOCK_S, begin + (i - first) * BLOCK_S),
            tl.where(i < first, sinks_end, end),
        )
    else:
        return begin + i * BLOCK_S, end


@triton.jit
def slots_of(j, second, capacity, ring_sinks, RINGS: tl.constexpr):
    """The slots of stream indices j; bit r of RINGS: segment r is a ring. `second`: whether the target is meant."""
    if RINGS == 0:
        return j
    elif RINGS == 3:
        return slot(j, capacity, ring_sinks, True)
    else:
        return tl.where(second == (RINGS == 2), slot(j, capacity, ring_sinks, True), j)
