"""The main loop over the keys [0, end) of a segment of which each row sees a beginning."""

import triton
import triton.language as tl

from ..device.products import add_weighted, scores
from ..device.softmax import cap, online_softmax


@triton.jit
def load_box(tensor, b, hk, start, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr):
    """[BLOCK_S, BLOCK_D] of a descriptor over [B, HK, capacity, D]; zeros beyond capacity and D."""
    return tl.reshape(tensor.load([b, hk, start, 0]), [BLOCK_S, BLOCK_D])


@triton.jit
def attend_box(
    m, norm, acc, rows, k, v, b, hk, from_tile, to_tile, end, least_end, high, inner, outer,
    SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Fold the tiles [from_tile, to_tile) of the keys [0, end) into (m, norm, acc); nothing if they fill no tile.

    The last tile ends where the keys end, so that no tile holds a key that no row sees, whose value may be NaN; what it
    shares with the one before is masked. Row i sees the keys below high[i], and all rows those below least_end.
    """
    b = b.to(tl.int32)
    hk = hk.to(tl.int32)
    last = end - BLOCK_S
    unmasked = tl.minimum(least_end - BLOCK_S, last)
    # not a bare loop: see attend_slots of span_attention
    if (to_tile > from_tile) & (last >= 0):
        for i in tl.range(from_tile, to_tile, num_stages=STAGES):
            fresh = i * BLOCK_S
            start = tl.minimum(fresh, last)
            keys = load_box(k, b, hk, start, BLOCK_S, BLOCK_D)
            s = cap(scores(rows, keys, PRECISION), inner, SOFTCAP)
            if fresh > unmasked:
                j = start + tl.arange(0, BLOCK_S)
                s = tl.where((j >= fresh)[None, :] & (j[None, :] < high[:, None]), s, float("-inf"))
            m, norm, p, alpha = online_softmax(m, norm, s, outer, PRECISION, True)
            values = load_box(v, b, hk, start, BLOCK_S, BLOCK_D)
            acc = add_weighted(acc * alpha[:, None], p, values, PRECISION)
    return m, norm, acc


@triton.jit
def is_short(from_tile, to_tile, end, BLOCK_S: tl.constexpr):
    """1 if tile 0 is asked for and the keys [0, end) do not fill it, else 0."""
    return ((from_tile == 0) & (to_tile > 0) & (end < BLOCK_S)).to(tl.int32)


@triton.jit
def attend_short(
    m, norm, acc, rows, k, v, k_s, v_s, end, high, inner, outer,
    SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Fold keys [0, end) that fill no tile into (m, norm, acc): k, v point at one head's rows, whose strides come in
    units of 8 elements."""
    d = tl.arange(0, BLOCK_D)[None, :]
    j = tl.arange(0, BLOCK_S)
    row = j.to(tl.int64)[:, None]
    there = (j < end)[:, None] & (d < D)
    values = tl.load(v + row * (v_s * 8) + d, mask=there, other=0.0)
    keys = tl.load(k + row * (k_s * 8) + d, mask=there, other=0.0)
    s = cap(scores(rows, keys, PRECISION), inner, SOFTCAP)
    s = tl.where(j[None, :] < tl.minimum(high, end)[:, None], s, float("-inf"))
    m, norm, p, alpha = online_softmax(m, norm, s, outer, PRECISION, True)
    acc = add_weighted(acc * alpha[:, None], p, values, PRECISION)
    return m, norm, acc
