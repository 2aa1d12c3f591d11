"""token_scores: what each listed key contributes to one query row; every listed row of K and V is read once.

A program owns all heads of its keys, so that every sum over heads is its own: no partial results, no atomics, one order
of additions. Three sums per key, a = exp(s - lse), mass = sum a, d = sum a (o . v) and n = sum a^2 |v|^2, give

    norm = sqrt(n),   cosine = (|o|^2 - d) / (|o| |o - c|),   |o - c|^2 = |o|^2 - 2 d + n

Where |o - c|^2 is less than half of |o|^2 that difference loses digits. Such keys, of which few can be in a row, are
marked and done again as the reference does all: the contribution is subtracted first, then squared.
"""

import triton
import triton.language as tl

# |o - c| below this many ulps of |o| is rounding of exp(s - lse), not a direction
ROUNDING = tl.constexpr(64 * 2.0**-23)
# no cosine: the mark of a key that is done again
AGAIN = tl.constexpr(2.0)


@triton.jit
def capped(s, inner, outer, SOFTCAP: tl.constexpr):
    """outer * tanh(s * inner), or s without SOFTCAP. To the last digits, unlike the attention's: the thresholds of a
    selection are near 1, and a few ulps of a cosine decide."""
    if SOFTCAP:
        y = 2.0 * tl.abs(s * inner)
        # 1 - exp(-y), by its series where the difference would cancel: tanh = (1 - exp(-y)) / (1 + exp(-y))
        series = tl.full(y.shape, 1.0, tl.float32)
        for n in tl.static_range(11, 1, -1):
            series = 1.0 - series * y * (1.0 / n)
        t = tl.exp(-y)
        size = tl.where(y < 1.0, y * series, 1.0 - t) / (1.0 + t)
        return tl.where(s < 0, -outer, outer) * size
    else:
        return s


@triton.jit
def load_heads(x, head, stride, real, D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr):
    """fp32 [HEADS, BLOCK_K, BLOCK_D]: heads `head` of the query row x [H, D], the same for every key: in the layout of
    the keys, which costs fewer instructions than moving it there. Zeros where not `real` and beyond D."""
    d = tl.arange(0, BLOCK_D)[None, None, :]
    at = x + head.to(tl.int64)[:, None, None] * stride + tl.zeros([1, BLOCK_K, 1], tl.int32) + d
    return tl.load(at, mask=real[:, None, None] & (d < D), other=0.0).to(tl.float32)


@triton.jit
def load_rows(x, h, real, stride_h, rows, listed, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """fp32 [HEADS, BLOCK_K, BLOCK_D] of k or v of one sample, zeros where not `listed`; `rows` [BLOCK_K] offsets."""
    d = tl.arange(0, BLOCK_D)[None, None, :]
    at = x + h.to(tl.int64)[:, None, None] * stride_h + rows[None, :, None] + d
    return tl.load(at, mask=real[:, None, None] & listed[None, :, None] & (d < D), other=0.0).to(tl.float32)


@triton.jit
def probability(keys, query, lse, head, real, lse_h, scale, inner, outer, SOFTCAP: tl.constexpr):
    """a [HEADS, BLOCK_K] = exp(s - lse) of query heads `head` [HEADS]."""
    s = capped(tl.sum(keys * query, 2) * scale, inner, outer, SOFTCAP)
    log = tl.load(lse + head.to(tl.int64) * lse_h, mask=real, other=float("inf"))
    # a row that saw nothing has no probabilities
    log = tl.where(log == float("-inf"), float("inf"), log)
    return tl.exp(s - log[:, None])


@triton.jit
def squared_length(o, stride, H, D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """|o|^2 over all heads, o [H, D]."""
    d = tl.arange(0, BLOCK_D)[None, :]
    squares = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for first in tl.range(0, H, ROWS):
        head = first + tl.arange(0, ROWS)[:, None]
        x = tl.load(o + head.to(tl.int64) * stride + d, mask=(head < H) & (d < D), other=0.0).to(tl.float32)
        squares += x * x
    return tl.sum(squares)


@triton.jit(do_not_specialize=["S", "K", "HK", "lse_b", "lse_h", "index_b", "index_k", "count_b"],
            do_not_specialize_on_alignment=["lse", "index", "count"])  # fmt: skip
def token_scores_kernel(
    q, o,  # [B, H, 1, D]
    k, v,  # [B, HK, S, D]
    lse,  # fp32 [B, H, 1]
    index,  # int32 [B, K]
    count,  # int32 [B]
    cosine, norm, mass,  # fp32 [B, K]
    scale, inner, outer, S, K, HK,
    q_b, q_h, o_b, o_h, k_b, k_h, k_s, v_b, v_h, v_s, lse_b, lse_h, index_b, index_k, count_b,
    R: tl.constexpr, D: tl.constexpr, SOFTCAP: tl.constexpr,
    HEADS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    q += b * q_b
    o += b * o_b
    k += b * k_b
    v += b * v_b
    lse += b * lse_b
    index += b * index_b
    cosine += b * K
    norm += b * K
    mass += b * K
    entries = tl.minimum(tl.load(count + b * count_b), K)
    again = tl.zeros([BLOCK_K], tl.int32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(K, BLOCK_K), tl.num_programs(0)):
        i = tile * BLOCK_K + tl.arange(0, BLOCK_K)
        j = tl.load(index + i.to(tl.int64) * index_k, mask=i < entries, other=-1)
        listed = (j >= 0) & (j < S)
        j = tl.where(listed, j, 0).to(tl.int64)
        n = tl.zeros([HEADS, BLOCK_K], tl.float32)
        along = tl.zeros([HEADS, BLOCK_K], tl.float32)
        total = tl.zeros([HEADS, BLOCK_K], tl.float32)
        for first in tl.range(0, HK, HEADS):
            h = first + tl.arange(0, HEADS)
            real = h < HK
            keys = load_rows(k, h, real, k_h, j * k_s, listed, D, BLOCK_D)
            values = load_rows(v, h, real, v_h, j * v_s, listed, D, BLOCK_D)
            weight = tl.zeros([HEADS, BLOCK_K], tl.float32)
            for r in tl.static_range(R):
                query = load_heads(q, h * R + r, q_h, real, D, BLOCK_K, BLOCK_D)
                a = probability(keys, query, lse, h * R + r, real, lse_h, scale, inner, outer, SOFTCAP)
                out = load_heads(o, h * R + r, o_h, real, D, BLOCK_K, BLOCK_D)
                along += a * tl.sum(values * out, 2)
                weight += a * a
                total += a
            n += weight * tl.sum(values * values, 2)
        # behind the keys, whose loads are far away: o is near by now
        whole = squared_length(o, o_h, HK * R, D, 8, BLOCK_D)
        n = tl.sum(n, 0)
        along = tl.sum(along, 0)
        total = tl.sum(total, 0)
        left = whole - 2.0 * along + n
        marked = listed & (left < 0.5 * whole)
        again = tl.maximum(again, marked.to(tl.int32))
        x = (whole - along) / tl.sqrt(tl.where(marked, 1.0, left * whole))
        # not minimum and maximum, which lose NaN
        x = tl.where(x > 1.0, 1.0, tl.where(x < -1.0, -1.0, x))
        x = tl.where(whole == 0.0, 1.0, tl.where(marked, AGAIN, x))
        tl.store(cosine + i, tl.where(listed, x, 1.0), mask=i < K)
        tl.store(norm + i, tl.where(listed, tl.sqrt(n), 0.0), mask=i < K)
        tl.store(mass + i, tl.where(listed, total, 0.0), mask=i < K)
    if tl.max(again, 0) > 0:
        # what other threads of this program have marked
        tl.debug_barrier()
        whole = squared_length(o, o_h, HK * R, D, 8, BLOCK_D)
        for tile in tl.range(tl.program_id(0), tl.cdiv(K, BLOCK_K), tl.num_programs(0)):
            i = tile * BLOCK_K + tl.arange(0, BLOCK_K)
            marked = tl.load(cosine + i, mask=i < K, other=1.0) == AGAIN
            if tl.max(marked.to(tl.int32), 0) > 0:
                j = tl.load(index + i.to(tl.int64) * index_k, mask=marked, other=0).to(tl.int64)
                x = subtracted(
                    q, o, k, v, lse, j, marked, whole, scale, inner, outer, HK, q_h, o_h, k_h, k_s, v_h, v_s, lse_h,
                    R, D, SOFTCAP, HEADS, BLOCK_K, BLOCK_D,
                )  # fmt: skip
                tl.store(cosine + i, x, mask=marked)


@triton.jit
def subtracted(
    q, o, k, v, lse, j, listed, whole, scale, inner, outer, HK, q_h, o_h, k_h, k_s, v_h, v_s, lse_h,
    R: tl.constexpr, D: tl.constexpr, SOFTCAP: tl.constexpr,
    HEADS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The cosines [BLOCK_K] of keys j with every contribution subtracted from o before it is squared."""
    left = tl.zeros([HEADS, BLOCK_K], tl.float32)
    along = tl.zeros([HEADS, BLOCK_K], tl.float32)
    for first in tl.range(0, HK, HEADS):
        h = first + tl.arange(0, HEADS)
        real = h < HK
        keys = load_rows(k, h, real, k_h, j * k_s, listed, D, BLOCK_D)
        values = load_rows(v, h, real, v_h, j * v_s, listed, D, BLOCK_D)
        for r in tl.static_range(R):
            query = load_heads(q, h * R + r, q_h, real, D, BLOCK_K, BLOCK_D)
            a = probability(keys, query, lse, h * R + r, real, lse_h, scale, inner, outer, SOFTCAP)
            out = load_heads(o, h * R + r, o_h, real, D, BLOCK_K, BLOCK_D)
            rest = out - a[:, :, None] * values
            left += tl.sum(rest * rest, 2)
            along += tl.sum(rest * out, 2)
    length = tl.sqrt(whole)
    remains = tl.sqrt(tl.sum(left, 0))
    nothing = remains <= length * ROUNDING
    x = tl.sum(along, 0) / tl.where(nothing, 1.0, remains * length)
    x = tl.where(x > 1.0, 1.0, tl.where(x < -1.0, -1.0, x))
    return tl.where(nothing, 0.0, x)
