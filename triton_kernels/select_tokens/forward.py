"""select_tokens: the entries of a row that pass a threshold, or the best `limit` of them, in order; one program a row.

The limit is found by radix selection, four passes over the row with a histogram of 256 values of one byte each, then
one pass writes what stands above the cut and the first of those on it. A row of 46080 scores is 180 KB: after the
first pass it comes from the L2.
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
    byte = tl.arange(0, 256)
    cut = tl.full([], 0, tl.uint32)
    room = limit
    for step in tl.static_range(4):
        histogram = tl.zeros([256], tl.int32)
        for start in tl.range(0, count, BLOCK):
            fits, key = load_entries(scores, start, stride, count, threshold, THRESHOLD, LARGEST, BLOCK)
            if step > 0:
                fits = fits & ((key >> (32 - 8 * step)) == cut)
            digits = ((key >> (24 - 8 * step)) & 255).to(tl.int32)
            histogram += tl.histogram(digits, 256, mask=fits)
        at_least = tl.cumsum(histogram, 0, reverse=True)
        digit = tl.max(tl.where(at_least >= room, byte, 0), 0)
        room -= tl.sum(tl.where(byte > digit, histogram, 0), 0)
        cut = cut * 256 + digit.to(tl.uint32)
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
    b = tl.program_id(0).to(tl.int64)
    scores += b * scores_b
    index += b * index_b
    kept += b * width
    entries = K
    if HAS_COUNT:
        entries = tl.minimum(K, tl.load(count + b * count_b))
    if LIMIT:
        cut, room = find_cut(scores, scores_k, entries, threshold, limit, THRESHOLD, LARGEST, BLOCK)
    taken = 0
    ties = 0
    for start in tl.range(0, entries, BLOCK):
        fits, key = load_entries(scores, start, scores_k, entries, threshold, THRESHOLD, LARGEST, BLOCK)
        keep = fits
        if LIMIT:
            tie = (fits & (key == cut)).to(tl.int32)
            keep = fits & ((key > cut) | ((tie > 0) & (ties + tl.cumsum(tie, 0) <= room)))
            ties += tl.sum(tie, 0)
        ones = keep.to(tl.int32)
        i = start + tl.arange(0, BLOCK)
        name = i
        if HAS_INDEX:
            name = tl.load(index + i.to(tl.int64) * index_k, mask=keep, other=-1)
        tl.store(kept + taken + tl.cumsum(ones, 0) - 1, name, mask=keep)
        taken += tl.sum(ones, 0)
    tl.store(kept_count + b, taken)
    for start in tl.range(taken, width, BLOCK):
        i = start + tl.arange(0, BLOCK)
        tl.store(kept + i, tl.full([BLOCK], -1, tl.int32), mask=i < width)
