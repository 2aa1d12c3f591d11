"""Spans on tiles: which key tiles a block of rows touches, which of them need no mask, and the mask of the others."""

import triton
import triton.language as tl

# rows and keys per block of what `prepare` returns
PREPARED_BLOCK = tl.constexpr(64)


@triton.jit
def sees(begin, end, j):
    """Whether a span shows key j: the predicate of core/spans.py; arguments broadcast."""
    return (j >= begin) & (j < end)


@triton.jit
def padded_rows(T):
    """T in whole blocks, so that a tile of what is stored per row is loaded without a mask."""
    return tl.cdiv(T, PREPARED_BLOCK) * PREPARED_BLOCK


@triton.jit
def row_pair(head, t, T):
    """Where the first of two numbers of row t of a head is stored, in [heads, padded rows / 64, 2, 64]; the second lies
    PREPARED_BLOCK behind it, a distance known to the compiler."""
    return head * (2 * padded_rows(T)) + t + t // PREPARED_BLOCK * PREPARED_BLOCK


@triton.jit
def row_span(bounds, t, T, S, slot, N: tl.constexpr):
    """begin, end [BLOCK_T] of one slot, end clipped to S: bounds int32 [T, N, 2] of one sample; rows beyond T are
    empty."""
    at = bounds + (t.to(tl.int64) * N + slot) * 2
    return tl.load(at, mask=t < T, other=0), tl.minimum(tl.load(at + 1, mask=t < T, other=0), S)


@triton.jit
def times_seen(
    bounds, t, T, S, j, kept, N: tl.constexpr, RULES: tl.constexpr, RULE: tl.constexpr, OR_RULE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """fp32 [BLOCK_S, BLOCK_T]: in how many slots of one of two rules each row sees each key."""
    times = tl.zeros([BLOCK_S, BLOCK_T], tl.float32)
    for slot in tl.static_range(N):
        if (RULES >> (2 * slot)) & 3 == RULE or (RULES >> (2 * slot)) & 3 == OR_RULE:
            low, high = row_span(bounds, t, T, S, slot, N)
            here = sees(low[None, :], high[None, :], j[:, None])
            if (RULES >> (2 * slot)) & 3 == 3:
                here = here & kept[:, None]
            times += here.to(tl.float32)
    return times


@triton.jit
def slot_hull(row_blocks, block, blocks, SLOT: tl.constexpr, N: tl.constexpr, BLOCK_T: tl.constexpr):
    """What one slot shows to a tile of rows: (begin, length) of the hull, and most begin, least end of the rows' spans.

    row_blocks int32 [TB, N, 4] of one sample: least begin, most begin, least end, most end of 64 rows. `block` counts
    tiles of
    BLOCK_T rows, `blocks` is TB.
    """
    first = block * BLOCK_T // PREPARED_BLOCK
    at = row_blocks + (first * N + SLOT) * 4
    least_begin, most_begin = tl.load(at), tl.load(at + 1)
    least_end, most_end = tl.load(at + 2), tl.load(at + 3)
    for more in tl.static_range(1, BLOCK_T // PREPARED_BLOCK):
        there = first + more < blocks
        at += N * 4
        least_begin = tl.minimum(least_begin, tl.load(at, mask=there, other=2147483647))
        most_begin = tl.maximum(most_begin, tl.load(at + 1, mask=there, other=0))
        least_end = tl.minimum(least_end, tl.load(at + 2, mask=there, other=2147483647))
        most_end = tl.maximum(most_end, tl.load(at + 3, mask=there, other=0))
    return least_begin, tl.maximum(most_end - least_begin, 0), most_begin, least_end


@triton.jit
def hull_tiles(length, most_begin, least_end, BLOCK_S: tl.constexpr):
    """How many key tiles a hull has as (tiles of used keys only, tiles that may hold keys which no row sees): one of
    them is 0.

    Spans that all share a point have no hole between them, so every key of their hull is seen by some row, and the last
    tile can end where the hull ends. Such tiles need no care for what unseen keys hold.
    """
    tiles = tl.cdiv(length, BLOCK_S)
    solid = (most_begin <= least_end) & (length >= BLOCK_S)
    return tl.where(solid, tiles, 0), tl.where(solid, 0, tiles)


@triton.jit
def solid_run(begin, length, most_begin, least_end, before, BLOCK_S: tl.constexpr):
    """What `solid_pair` asks of a hull without holes whose tiles come after `before` others: (where tile 0 of the walk
    would begin, the begin of the last tile, the least and the greatest begin of a tile that every row sees all of)."""
    last = begin + length - BLOCK_S
    return begin - before * BLOCK_S, last, most_begin, tl.minimum(least_end - BLOCK_S, last)


@triton.jit
def walk_of(
    row_blocks, block, blocks, SLOT: tl.constexpr, PAIR: tl.constexpr, N: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
):  # fmt: skip
    """The tiles of slot SLOT (and of the next, if PAIR) for a tile of rows: how many of SLOT and of both are solid, how
    many of them loose (`hull_tiles`), where the hulls begin, and the `solid_run` of each."""
    begin, length, most_begin, least_end = slot_hull(row_blocks, block, blocks, SLOT, N, BLOCK_T)
    solid, loose = hull_tiles(length, most_begin, least_end, BLOCK_S)
    first, last, least, most = solid_run(begin, length, most_begin, least_end, 0, BLOCK_S)
    solids = solid
    looses = loose
    begin2 = begin
    first2, last2, least2, most2 = first, last, least, most
    if PAIR:
        begin2, length2, most_begin2, least_end2 = slot_hull(row_blocks, block, blocks, SLOT + 1, N, BLOCK_T)
        solid2, loose2 = hull_tiles(length2, most_begin2, least_end2, BLOCK_S)
        first2, last2, least2, most2 = solid_run(begin2, length2, most_begin2, least_end2, solid, BLOCK_S)
        solids += solid2
        looses += loose2
    return solid, solids, loose, looses, begin, begin2, first, last, least, most, first2, last2, least2, most2


@triton.jit
def solid_pair(
    i, solid, begin, last, least, most, begin2, last2, least2, most2,
    SLOT: tl.constexpr, PAIR: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Tile i of the hulls without holes of slot SLOT, `solid` tiles, and behind them (PAIR) of the next slot, each as
    `solid_run` has it: (its first key, the first key that no earlier tile had, whether every row sees all of it, the
    slot)."""
    slot = SLOT
    if PAIR:
        slot = tl.where(i < solid, SLOT, SLOT + 1)
        # choosing the hull first takes fewer instructions, which 128 rows at the limit of the GPU's power feel (0.5 %
        # of 32768 tokens on an H200); 64 rows lose more to the uniform registers that the choice then takes (1 % of
        # 8192)
        if BLOCK_T > 64:
            begin = tl.where(i < solid, begin, begin2)
            last = tl.where(i < solid, last, last2)
            least = tl.where(i < solid, least, least2)
            most = tl.where(i < solid, most, most2)
    fresh = begin + i * BLOCK_S
    start = tl.minimum(fresh, last)
    whole = (fresh >= least) & (fresh <= most)
    if PAIR and BLOCK_T <= 64:
        fresh2 = begin2 + i * BLOCK_S
        start = tl.where(i < solid, start, tl.minimum(fresh2, last2))
        whole = tl.where(i < solid, whole, (fresh2 >= least2) & (fresh2 <= most2))
        fresh = tl.where(i < solid, fresh, fresh2)
    return start, fresh, whole, slot


@triton.jit
def tile_is_whole(row_blocks, block, start, there, N: tl.constexpr, RULES: tl.constexpr, BLOCK_S: tl.constexpr):
    """Whether all 64 rows of `block` see all keys [start, start + BLOCK_S) through one ATTEND slot and nothing of them
    through another; False where not `there`."""
    touching = 0
    covering = 0
    for slot in tl.static_range(N):
        at = row_blocks + (block * N + slot) * 4
        least_begin = tl.load(at, mask=there, other=0)
        most_end = tl.load(at + 3, mask=there, other=0)
        touching += ((least_begin < start + BLOCK_S) & (most_end > start)).to(tl.int32)
        if (RULES >> (2 * slot)) & 3 == 0:
            most_begin = tl.load(at + 1, mask=there, other=2147483647)
            least_end = tl.load(at + 2, mask=there, other=0)
            covering += ((start >= most_begin) & (start + BLOCK_S <= least_end)).to(tl.int32)
    return (covering == 1) & (touching == 1)


@triton.jit
def row_runs(key_blocks, block, blocks, BLOCK_S: tl.constexpr):
    """The two runs of 64-row blocks that touch a tile of BLOCK_S keys: (begin, length) each, disjoint.

    key_blocks int32 [SB, 4] of one sample: (begin, end) of two runs per 64 keys. `block` counts tiles of BLOCK_S
    keys, `blocks` is SB.
    """
    first = block * BLOCK_S // PREPARED_BLOCK
    at = key_blocks + first * 4
    begin, end, begin2, end2 = tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)
    for more in tl.static_range(1, BLOCK_S // PREPARED_BLOCK):
        there = first + more < blocks
        at += 4
        low, high = tl.load(at, mask=there, other=0), tl.load(at + 1, mask=there, other=0)
        low2, high2 = tl.load(at + 2, mask=there, other=0), tl.load(at + 3, mask=there, other=0)
        begin = tl.where(high > low, tl.where(end > begin, tl.minimum(begin, low), low), begin)
        end = tl.where(high > low, tl.maximum(end, high), end)
        begin2 = tl.where(high2 > low2, tl.where(end2 > begin2, tl.minimum(begin2, low2), low2), begin2)
        end2 = tl.where(high2 > low2, tl.maximum(end2, high2), end2)
        # where the joined runs meet, one run that holds both
        meet = (end2 > begin2) & (begin2 <= end)
        begin = tl.where(meet, tl.minimum(begin, begin2), begin)
        end = tl.where(meet, tl.maximum(end, end2), end)
        end2 = tl.where(meet, begin2, end2)
    return begin, tl.maximum(end - begin, 0), begin2, tl.maximum(end2 - begin2, 0)
