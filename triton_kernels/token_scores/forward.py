"""token_scores: what each listed key contributes to one query row; every listed row of K and V is read once.

A program owns BLOCK_K keys and all heads of them, so that every sum over heads is its own: no partial results, no
atomics, one order of additions. As in the reference, a contribution is subtracted before it is squared: |o|^2 - 2 d + n
would lose the digits of a key that is most of the output, and reads no less.
"""

import triton
import triton.language as tl

# |o - c| below this many ulps of |o| is rounding of exp(s - lse), not a direction
ROUNDING = tl.constexpr(64 * 2.0**-23)


@triton.jit
def load_heads(x, row, head_stride, h, d, HK_ROWS, D: tl.constexpr):
    """fp32 [HEADS, BLOCK_D] of one query row: x at head `row` for each of h, zeros beyond HK_ROWS heads and D."""
    at = x + row.to(tl.int64)[:, None] * head_stride + d[None, :]
    return tl.load(at, mask=(h < HK_ROWS)[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)


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


@triton.jit(do_not_specialize=["S", "K", "lse_b", "lse_h", "index_b", "index_k", "count_b"],
            do_not_specialize_on_alignment=["lse", "index", "count"])  # fmt: skip
def token_scores_kernel(
    q, o,  # [B, H, 1, D]
    k, v,  # [B, HK, S, D]
    lse,  # fp32 [B, H, 1]
    index,  # int32 [B, K]
    count,  # int32 [B]
    cosine, norm, mass,  # fp32 [B, K]
    scale, inner, outer, S, K,
    q_b, q_h, o_b, o_h, k_b, k_h, k_s, v_b, v_h, v_s, lse_b, lse_h, index_b, index_k, count_b,
    HK: tl.constexpr, R: tl.constexpr, D: tl.constexpr, SOFTCAP: tl.constexpr,
    HEADS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    wide = d[None, None, :]
    q += b * q_b
    o += b * o_b
    lse += b * lse_b
    squares = tl.zeros([HEADS, BLOCK_D], tl.float32)
    for first in tl.static_range(0, HK, HEADS):
        h = first + tl.arange(0, HEADS)
        for r in tl.static_range(R):
            part = load_heads(o, h * R + r, o_h, h, d, HK, D)
            squares += part * part
    length = tl.sqrt(tl.sum(squares))
    listed_keys = tl.minimum(tl.load(count + b * count_b), K)
    for tile in tl.range(tl.program_id(0), tl.cdiv(K, BLOCK_K), tl.num_programs(0), num_stages=STAGES):
        i = tile * BLOCK_K + tl.arange(0, BLOCK_K)
        j = tl.load(index + b * index_b + i.to(tl.int64) * index_k, mask=i < listed_keys, other=-1)
        listed = (j >= 0) & (j < S)
        row = tl.where(listed, j, 0).to(tl.int64)[None, :, None]
        # [HEADS, BLOCK_K]
        own = tl.zeros([HEADS, BLOCK_K], tl.float32)
        left = tl.zeros([HEADS, BLOCK_K], tl.float32)
        along = tl.zeros([HEADS, BLOCK_K], tl.float32)
        total = tl.zeros([HEADS, BLOCK_K], tl.float32)
        for first in tl.static_range(0, HK, HEADS):
            h = first + tl.arange(0, HEADS)
            mask = (h < HK)[:, None, None] & listed[None, :, None] & (wide < D)
            head = h.to(tl.int64)[:, None, None]
            # [HEADS, BLOCK_K, BLOCK_D]
            keys = tl.load(k + b * k_b + head * k_h + row * k_s + wide, mask=mask, other=0.0)
            values = tl.load(v + b * v_b + head * v_h + row * v_s + wide, mask=mask, other=0.0)
            for r in tl.static_range(R):
                query = load_heads(q, h * R + r, q_h, h, d, HK, D)
                out = load_heads(o, h * R + r, o_h, h, d, HK, D)[:, None, :]
                log = tl.load(lse + (h * R + r).to(tl.int64) * lse_h, mask=h < HK, other=float("inf"))
                # a row that saw nothing has no probabilities
                log = tl.where(log == float("-inf"), float("inf"), log)
                s = capped(tl.sum(keys.to(tl.float32) * query[:, None, :], 2) * scale, inner, outer, SOFTCAP)
                a = tl.exp(s - log[:, None])
                contribution = a[:, :, None] * values.to(tl.float32)
                rest = out - contribution
                own += tl.sum(contribution * contribution, 2)
                left += tl.sum(rest * rest, 2)
                along += tl.sum(rest * out, 2)
                total += a
        inside = i < K
        remains = tl.sqrt(tl.sum(left, 0))
        nothing = remains <= length * ROUNDING
        x = tl.sum(along, 0) / tl.where(nothing, 1.0, remains * length)
        # not minimum and maximum, which lose NaN
        x = tl.where(x > 1.0, 1.0, tl.where(x < -1.0, -1.0, x))
        x = tl.where(length == 0, 1.0, tl.where(nothing, 0.0, x))
        tl.store(cosine + b * K + i, tl.where(listed, x, 1.0), mask=inside)
        tl.store(norm + b * K + i, tl.where(listed, tl.sqrt(tl.sum(own, 0)), 0.0), mask=inside)
        tl.store(mass + b * K + i, tl.where(listed, tl.sum(total, 0), 0.0), mask=inside)
