"""The end of the forward: rows whose keys are all in, and the join of the parts that several programs have of them."""

import triton
import triton.language as tl

from ..device.softmax import LOWEST, from_natural, natural_log, power


@triton.jit
def finish_rows(acc, m, norm, sink_logits, h, SINK_LOGITS: tl.constexpr, PRECISION: tl.constexpr):
    """o and the natural lse of rows whose keys are all in: acc [ROWS, BLOCK_D], m and norm [ROWS], h their heads."""
    nothing = norm == 0
    total = tl.where(nothing, 1.0, norm)
    natural = tl.where(nothing, float("-inf"), natural_log(m, total, PRECISION))
    if SINK_LOGITS:
        shift = tl.where(nothing, 0.0, m)
        total += power(from_natural(tl.load(sink_logits + h).to(tl.float32), PRECISION) - shift, PRECISION)
    return acc / total[:, None], natural


@triton.jit(do_not_specialize=["T", "HK", "parts", "o_b", "o_h", "o_t"])
def merge_kernel(
    part_o, part_m, part_norm,  # fp32 [B, HK, T R, parts, D], and twice [B, HK, T R, parts]
    sink_logits,  # [H]
    o,  # [B, H, T, D]
    lse,  # fp32 [B, H, T]
    T, HK, parts, o_b, o_h, o_t,
    R: tl.constexpr, D: tl.constexpr, SINK_LOGITS: tl.constexpr, PRECISION: tl.constexpr, MOST: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Join the parts of one row, in their order; grid (T R, HK, B). MOST: the most parts that a launch may have."""
    x = tl.program_id(0)
    hk = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    h = hk * R + x % R
    t = x // R
    d = tl.arange(0, BLOCK_D)[None, :]
    part = ((b * HK + hk) * (T * R) + x) * parts
    all_parts = tl.arange(0, MOST)
    all_m = tl.load(part_m + part + all_parts, mask=all_parts < parts, other=float("-inf"))
    top = tl.max(all_m, 0)
    shift = tl.where(top == float("-inf"), 0.0, top)
    norm = tl.zeros([BLOCK_P], tl.float32)
    acc = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    for start in tl.range(0, parts, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        weight = power(tl.load(part_m + part + p, mask=p < parts, other=float("-inf")) - shift, PRECISION)
        share = tl.load(part_norm + part + p, mask=p < parts, other=0.0)
        norm += weight * share
        full = (share != 0)[:, None]
        rows = tl.load(part_o + (part + p)[:, None] * D + d, mask=full & (d < D), other=0.0)
        acc += weight[:, None] * rows
    one = tl.arange(0, 1)
    out, natural = finish_rows(
        tl.sum(acc, 0)[None, :], top + one * 0.0, tl.sum(norm, 0) + one * 0.0, sink_logits, h + one, SINK_LOGITS,
        PRECISION,
    )  # fmt: skip
    at = b * (o_b * 8) + h * (o_h * 8) + t.to(tl.int64) * (o_t * 8)
    tl.store(o + at + d, out.to(o.dtype.element_ty), mask=d < D)
    tl.store(lse + (b * HK * R + h) * T + t + one, natural)


@triton.jit(do_not_specialize=["T", "HK", "parts", "o_b", "o_h", "o_t"])
def merge_few_kernel(
    part_o, part_m, part_norm,  # fp32 [B, HK, T R, parts, D], and twice [B, HK, T R, parts]
    sink_logits,  # [H]
    o,  # [B, H, T, D]
    lse,  # fp32 [B, H, T]
    T, HK, parts, o_b, o_h, o_t,
    R: tl.constexpr, D: tl.constexpr, SINK_LOGITS: tl.constexpr, PRECISION: tl.constexpr, MOST: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Join at most MOST parts of BLOCK_P rows each; grid (tiles of T R, HK, B)."""
    x = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = x < T * R
    hk = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    h = hk * R + x % R
    t = (x // R).to(tl.int64)
    d = tl.arange(0, BLOCK_D)[None, :]
    at = ((b * HK + hk) * (T * R) + x) * parts
    top = tl.full([BLOCK_P], LOWEST, tl.float32)
    for p in tl.static_range(MOST):
        top = tl.maximum(top, tl.load(part_m + at + p, mask=inside & (p < parts), other=float("-inf")))
    norm = tl.zeros([BLOCK_P], tl.float32)
    acc = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    for p in tl.static_range(MOST):
        share = tl.load(part_norm + at + p, mask=inside & (p < parts), other=0.0)
        m = tl.load(part_m + at + p, mask=inside & (p < parts), other=float("-inf"))
        weight = power(m - top, PRECISION)
        norm += weight * share
        rows = tl.load(part_o + (at + p)[:, None] * D + d, mask=(share != 0)[:, None] & (d < D), other=0.0)
        acc += weight[:, None] * rows
    out, natural = finish_rows(acc, top, norm, sink_logits, h, SINK_LOGITS, PRECISION)
    to = b * (o_b * 8) + h * (o_h * 8) + t * (o_t * 8)
    tl.store(o + to[:, None] + d, out.to(o.dtype.element_ty), mask=inside[:, None] & (d < D))
    tl.store(lse + (b * HK * R + h) * T + t, natural, mask=inside)
