"""select_tokens: the entries of a row that pass a threshold, or the best `limit` of them, in order.

Grid (steps of a row, B), and nothing passes between programs: each counts what the steps before its own keep, and finds
the cut of a limit for itself, by radix selection, eight passes over the row with a histogram of the 16 values of four
bits. A row of 46080 scores is 180 KB: after the first pass it comes from the L2.
"""

import triton
import triton.language as tl


@triton.jit
def load_entries(scores, start, stride, count, threshold, THRESHOLD: tl.constexpr, LARGEST: tl.constexpr,
                 BLOCK: tl.constexpr):  # fmt: skip
    """Entries [start, start + BLOCK) of a row: bool whether they may be kept, uint32 keys in the order of the scores,
    the best highest."""
    i = start + tl.arange(0, BLOCK)
    x = tl.load(scores + i.to(tl.int64) * stride, mask=i < count, other=float("nan")).to(tl.float32)
    fits = x == x
    if THRESHOLD:
        fits = fits & ((x > threshold) if LARGEST else (x < threshold))
    # -0 is 0: their bits differ, and ties go to the lower entry
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    if not LARGEST:
        key = ~key
    return fits, key.to(tl.uint32, bitcast=True) ^ 0x80000000


@triton.jit
def find_cut(scores, stride, count, threshold, limit, THRESHOLD: tl.constexpr, LARGEST: tl.constexpr,
             BLOCK: tl.constexpr):  # fmt: skip
    """(cut, room): all keys above `cut` and the first `room` keys equal to it are the best `limit` entries."""
    value = tl.arange(0, 16)
    cut = tl.full([], 0, tl.uint32)
    room = limit
    for step in tl.static_range(8):
        histogram = tl.zeros([16], tl.int32)
        for start in tl.range(0, count, BLOCK):
            fits, key = load_entries(scores, start, stride, count, threshold, THRESHOLD, LARGEST, BLOCK)
            if step > 0:
                fits = fits & ((key >> (32 - 4 * step)) == cut)
            digits = ((key >> (28 - 4 * step)) & 15).to(tl.int32)
            histogram += tl.histogram(digits, 16, mask=fits)
        at_least = tl.cumsum(histogram, 0, reverse=True)
        digit = tl.max(tl.where(at_least >= room, value, 0), 0)
        room -= tl.sum(tl.where(value > digit, histogram, 0), 0)
        cut = cut * 16 + digit.to(tl.uint32)
    return cut, room


@triton.jit(do_not_specialize=["K", "limit", "width", "scores_b", "scores_k", "index_b", "index_k", "count_b"],
            do_not_specialize_on_alignment=["scores", "index", "count"])  # fmt: skip
def select_tokens_kernel(
    scores,  # [B, K]
    index,  # int32 [B, K]
    count,  # int32 [B]
    kept,  # int32 [B, width]
    kept_count,  # int32 [B]
    threshold, K, limit, width,
    scores_b, scores_k, index_b, index_k, count_b,
    THRESHOLD: tl.constexpr, LIMIT: tl.constexpr, LARGEST: tl.constexpr, HAS_INDEX: tl.constexpr,
    HAS_COUNT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    scores += b * scores_b
    index += b * index_b
    kept += b * width
    entries = K
    if HAS_COUNT:
        entries = tl.minimum(K, tl.load(count + b * count_b))
    if LIMIT:
        cut, room = find_cut(scores, scores_k, entries, threshold, limit, THRESHOLD, LARGEST, BLOCK)
    # what this program's step keeps stands behind what earlier ones keep, which it counts itself
    own = tl.program_id(0) * BLOCK
    over = tl.zeros([BLOCK], tl.int32)
    level = tl.zeros([BLOCK], tl.int32)
    for start in tl.range(0, tl.minimum(own, entries), BLOCK):
        fits, key = load_entries(scores, start, scores_k, entries, threshold, THRESHOLD, LARGEST, BLOCK)
        if LIMIT:
            over += (fits & (key > cut)).to(tl.int32)
            level += (fits & (key == cut)).to(tl.int32)
        else:
            over += fits.to(tl.int32)
    taken = tl.sum(over, 0)
    keep, key = load_entries(scores, own, scores_k, entries, threshold, THRESHOLD, LARGEST, BLOCK)
    if LIMIT:
        ties = tl.sum(level, 0)
        taken += tl.minimum(ties, room)
        tie = (keep & (key == cut)).to(tl.int32)
        keep = keep & ((key > cut) | ((tie > 0) & (ties + tl.cumsum(tie, 0) <= room)))
    i = own + tl.arange(0, BLOCK)
    name = i
    if HAS_INDEX:
        name = tl.load(index + i.to(tl.int64) * index_k, mask=keep, other=-1)
    ones = keep.to(tl.int32)
    tl.store(kept + taken + tl.cumsum(ones, 0) - 1, name, mask=keep)
    if tl.program_id(0) == tl.num_programs(0) - 1:
        taken += tl.sum(ones, 0)
        tl.store(kept_count + b, taken)
        for start in tl.range(taken, width, BLOCK):
            i = start + tl.arange(0, BLOCK)
            tl.store(kept + i, tl.full([BLOCK], -1, tl.int32), mask=i < width)
