"""incremental_prefill backward: gradients of a chunk's own rows, with the joint lse and o; the keys of earlier calls
are constants.

`place_kernel` finds what each row sees and where each of the chunk's keys stands, `rotate_kernel` rotates q and k,
`row_statistics_kernel` gives the log of the whole denominator and delta. `dq_kernel` then walks the source, the target
and the chunk, its key tiles split over programs as in the forward, and `dkdv_kernel` the rows that may see a tile of
the chunk. With p = exp(s - total):  dS = p (do . v - delta),  dq = scale dS k,  dk = scale dS^T q,  dv = p^T do
(FlashAttention-2, arXiv 2307.08691, section 2.3.2), where delta = do . o - dlse / (1 - p_sink). `rotate_kernel` sums
dq's splits in their order and turns dq and dk back. Every output has one writer: deterministic without atomics.
"""

import triton
import triton.language as tl

from ..device.rope import rotate_halves, rotate_interleaved
from ..device.softmax import cap, from_natural, power
from .sight import (
    STEP,
    count_tiles,
    first_seen,
    hull,
    is_held,
    last_seen,
    lengths_after,
    lengths_before,
    locate_tile,
    rank_rows,
    sees_key,
)


@triton.jit(
    do_not_specialize=[
        "T", "source_capacity", "target_capacity", "length_b", "length_r", "role_b", "role_t", "limit_b", "limit_t",
        "source_begin_b", "source_begin_t", "target_begin_b", "target_begin_t",
    ]
)  # fmt: skip
def place_kernel(
    length, role, counts, source_limit, source_begin, target_begin,
    sight,  # int32 [B, T, 4]: begin and end of what each row sees of the source, and of the target
    placed,  # int32 [B, T, 2]: segment (-1: not held, so seen by none) and stream index of each of the chunk's keys
    kept,  # int32 [B, 2]: how many keys of earlier calls each segment holds
    T, source_capacity, target_capacity, length_b, length_r, role_b, role_t, limit_b, limit_t,
    source_begin_b, source_begin_t, target_begin_b, target_begin_t,
    HAS_ROLE: tl.constexpr, HAS_COUNTS: tl.constexpr, SEGMENT: tl.constexpr, HAS_LIMIT: tl.constexpr,
    HAS_SOURCE_BEGIN: tl.constexpr, HAS_TARGET_BEGIN: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = t < T
    role += b * role_b
    counts += b * tl.cdiv(T, STEP) * 2
    source_length, target_length = lengths_before(length + b * length_b, length_r, T)
    source_total, _ = lengths_after(
        source_length, target_length, role, counts, T, role_t, HAS_ROLE, HAS_COUNTS, SEGMENT
    )
    opened = tl.program_id(0) * BLOCK_T
    r, rank = rank_rows(role, counts, t, inside, inside, opened, role_t, HAS_ROLE, HAS_COUNTS, SEGMENT)
    index = rank + tl.where(r == 0, source_length, target_length)
    source_high, target_high = last_seen(r, index, source_limit + b * limit_b, t, limit_t, source_total, HAS_LIMIT)
    none = source_total * 0
    source_low = first_seen(
        source_begin + b * source_begin_b, t, inside, source_begin_t, source_high, 0, none, HAS_SOURCE_BEGIN, False
    )
    target_low = first_seen(
        target_begin + b * target_begin_b, t, inside, target_begin_t, target_high, 0, none, HAS_TARGET_BEGIN, False
    )
    at = sight + (b * T + t) * 4
    tl.store(at, source_low, mask=inside)
    tl.store(at + 1, source_high, mask=inside)
    tl.store(at + 2, target_low, mask=inside)
    tl.store(at + 3, target_high, mask=inside)
    held = is_held(index, source_total, tl.where(r == 0, source_capacity, target_capacity), 0, False)
    at = placed + (b * T + t) * 2
    tl.store(at, tl.where(held & ((r == 0) | (r == 1)), r, -1), mask=inside)
    tl.store(at + 1, index, mask=inside)
    if tl.program_id(0) == 0:
        tl.store(kept + 2 * b, tl.minimum(tl.maximum(source_length, 0), source_capacity))
        tl.store(kept + 2 * b + 1, tl.minimum(tl.maximum(target_length, 0), target_capacity))


@triton.jit(
    do_not_specialize=[
        "T",
        "parts",
        "x_p",
        "x_b",
        "x_h",
        "x_t",
        "y_b",
        "y_h",
        "y_t",
        "cos_b",
        "cos_t",
        "sin_b",
        "sin_t",
    ]
)
def rotate_kernel(
    x,  # [parts, B, heads, T, D]
    cos, sin,  # [B or 1, T, ROTARY / 2]
    y,  # [B, heads, T, D]
    T, parts, x_p, x_b, x_h, x_t, y_b, y_h, y_t, cos_b, cos_t, sin_b, sin_t,
    D: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, BACK: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """y = the sum of x's parts, rotated (BACK: by the negative angles); grid (tiles of T, heads, B)."""
    b = tl.program_id(2).to(tl.int64)
    h = tl.program_id(1).to(tl.int64)
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    row = t.to(tl.int64)[:, None]
    inside = (t < T)[:, None]
    HALF: tl.constexpr = BLOCK_D // 2
    half = tl.arange(0, HALF)[None, :]
    turns = inside & (half < ROTARY // 2)
    # dims in pairs: (first, second) hold (i, i + ROTARY / 2), or (2 i, 2 i + 1); what is not rotated follows behind
    REST: tl.constexpr = D - ROTARY
    from_x = x + b * x_b + h * x_h + row * x_t
    to = y + b * y_b + h * y_h + row * y_t
    c = tl.load(cos + b * cos_b + row * cos_t + half, mask=turns, other=1.0).to(tl.float32)
    s = tl.load(sin + b * sin_b + row * sin_t + half, mask=turns, other=0.0).to(tl.float32)
    s = -s if BACK else s
    if INTERLEAVED:
        d = tl.arange(0, BLOCK_D)[None, :]
        both = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
        for p in tl.range(0, parts):
            both += tl.load(from_x + p * x_p + d, mask=inside & (d < ROTARY), other=0.0).to(tl.float32)
        both = rotate_interleaved(both, c, s, BLOCK_T, HALF)
        tl.store(to + d, both.to(y.dtype.element_ty), mask=inside & (d < ROTARY))
    else:
        first = tl.zeros([BLOCK_T, HALF], tl.float32)
        second = tl.zeros([BLOCK_T, HALF], tl.float32)
        for p in tl.range(0, parts):
            first += tl.load(from_x + p * x_p + half, mask=turns, other=0.0).to(tl.float32)
            second += tl.load(from_x + p * x_p + half + ROTARY // 2, mask=turns, other=0.0).to(tl.float32)
        first, second = rotate_halves(first, second, c, s)
        tl.store(to + half, first.to(y.dtype.element_ty), mask=turns)
        tl.store(to + half + ROTARY // 2, second.to(y.dtype.element_ty), mask=turns)
    if REST > 0:
        d = ROTARY + tl.arange(0, BLOCK_D)[None, :]
        rest = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
        for p in tl.range(0, parts):
            rest += tl.load(from_x + p * x_p + d, mask=inside & (d < D), other=0.0).to(tl.float32)
        tl.store(to + d, rest.to(y.dtype.element_ty), mask=inside & (d < D))


@triton.jit(do_not_specialize=["T", "H", "o_b", "o_h", "o_t", "do_b", "do_h", "do_t", "dlse_b", "dlse_h", "dlse_t"])
def row_statistics_kernel(
    o, do,  # [B, H, T, D]
    lse, dlse,  # fp32 [B, H, T]
    sink_logits,  # [H]
    # fp32 [B, H, T]: log of the denominator in the unit of `power` (+inf where nothing is seen), delta, and each row's
    # share of d sink_logits
    total, delta, share,
    T, H, o_b, o_h, o_t, do_b, do_h, do_t, dlse_b, dlse_h, dlse_t,
    D: tl.constexpr, HAS_DLSE: tl.constexpr, SINK_LOGITS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    b = (tl.program_id(0) // H).to(tl.int64)
    h = (tl.program_id(0) % H).to(tl.int64)
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = t < T
    d = tl.arange(0, BLOCK_D)[None, :]
    row = t.to(tl.int64)[:, None]
    mask = inside[:, None] & (d < D)
    out = tl.load(o + b * o_b + h * o_h + row * o_t + d, mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(do + b * do_b + h * do_h + row * do_t + d, mask=mask, other=0.0).to(tl.float32)
    along = tl.sum(out * grad, 1)
    at = (b * H + h) * T + t
    log = tl.load(lse + at, mask=inside, other=float("-inf"))
    dlog = along * 0.0
    if HAS_DLSE:
        dlog = tl.load(dlse + b * dlse_b + h * dlse_h + t.to(tl.int64) * dlse_t, mask=inside, other=0.0)
    seen = log > float("-inf")
    log = tl.where(seen, log, 0.0)
    whole = log
    if SINK_LOGITS:
        sink = tl.load(sink_logits + h).to(tl.float32)
        top = tl.maximum(log, sink)
        whole = top + tl.log(tl.exp(log - top) + tl.exp(sink - top))
        tl.store(share + at, tl.where(seen, -tl.exp(sink - whole) * along, 0.0), mask=inside)
        along -= dlog * tl.exp(tl.minimum(whole - log, 80.0))
    else:
        along -= dlog
    tl.store(total + at, tl.where(seen, from_natural(whole, PRECISION), float("inf")), mask=inside)
    tl.store(delta + at, tl.where(seen, along, 0.0), mask=inside)


@triton.jit
def score_gradient(
    rows, grad, keys, values, seen, log, less, inner, outer, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr
):
    """p and dS [ROWS, KEYS] of rows against keys, 0 where unseen."""
    s = cap(tl.dot(rows, keys.T, input_precision=PRECISION), inner, SOFTCAP)
    p = tl.where(seen, power(s * outer - log[:, None], PRECISION), 0.0)
    # an unseen value may be NaN
    ds = tl.where(p > 0, p * (tl.dot(grad, values.T, input_precision=PRECISION) - less[:, None]), 0.0)
    if SOFTCAP:
        ds *= 1.0 - s * s
    return p, ds


@triton.jit
def load_sight(sight, t, inside):
    """begin, end of the source and of the target for rows t: sight int32 [T, 4] of one sample; none outside."""
    at = sight + t.to(tl.int64) * 4
    return (
        tl.load(at, mask=inside, other=0), tl.load(at + 1, mask=inside, other=0),
        tl.load(at + 2, mask=inside, other=0), tl.load(at + 3, mask=inside, other=0),
    )  # fmt: skip


@triton.jit
def sees_chunk(sight, segment, j, source_sinks, target_sinks, SINKS: tl.constexpr):
    """bool [ROWS, KEYS]: which keys of the chunk, by segment and stream index, rows see."""
    low, high, low2, high2 = sight
    source = sees_key(low[:, None], high[:, None], j[None, :], source_sinks, SINKS) & (segment == 0)[None, :]
    target = sees_key(low2[:, None], high2[:, None], j[None, :], target_sinks, SINKS) & (segment == 1)[None, :]
    return source | target


@triton.jit(
    do_not_specialize=[
        "T", "HK", "splits", "source_sinks", "target_sinks", "q_b", "q_h", "q_t", "k_b", "k_h", "k_t", "v_b", "v_h",
        "v_t", "do_b", "do_h", "do_t", "sk_b", "sk_h", "sk_t", "sv_b", "sv_h", "sv_t", "tk_b", "tk_h", "tk_t", "tv_b",
        "tv_h", "tv_t",
    ]
)  # fmt: skip
def dq_kernel(
    q, do,  # [B, H, T, D], q rotated
    k, v,  # [B, HK, T, D], k rotated
    source_k, source_v, target_k, target_v,  # [B, HK, capacity, D]
    total, delta,  # fp32 [B, H, T]
    sight, placed, kept,
    part_dq,  # fp32 [splits, B, T, H, D]
    inner, outer, scale, T, HK, splits, source_sinks, target_sinks,
    # strides in units of 8 elements
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, do_b, do_h, do_t,
    sk_b, sk_h, sk_t, sv_b, sv_h, sv_t, tk_b, tk_h, tk_t, tv_b, tv_h, tv_t,
    R: tl.constexpr, D: tl.constexpr, SINKS: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    hk = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    split = tl.program_id(0) % splits
    x = (tl.program_id(0) // splits) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = x < T * R
    t = tl.minimum(x // R, T - 1)
    h = hk * R + x % R
    d = tl.arange(0, BLOCK_D)
    sight_of = load_sight(sight + b * T * 4, t, inside)
    low, high, low2, high2 = sight_of
    at = (b * HK * R + h) * T + t
    log = tl.load(total + at, mask=inside, other=float("inf"))
    less = tl.load(delta + at, mask=inside, other=0.0)
    # padding may hold anything
    asks = log < float("inf")
    mask = asks[:, None] & (d < D)[None, :]
    row = t.to(tl.int64)[:, None]
    rows = tl.load(q + b * (q_b * 8) + h[:, None] * (q_h * 8) + row * (q_t * 8) + d[None, :], mask=mask, other=0.0)
    grad = tl.load(do + b * (do_b * 8) + h[:, None] * (do_h * 8) + row * (do_t * 8) + d[None, :], mask=mask, other=0.0)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    source_k += b * (sk_b * 8) + hk * (sk_h * 8)
    source_v += b * (sv_b * 8) + hk * (sv_h * 8)
    target_k += b * (tk_b * 8) + hk * (tk_h * 8)
    target_v += b * (tv_b * 8) + hk * (tv_h * 8)
    k += b * (k_b * 8) + hk * (k_h * 8)
    v += b * (v_b * 8) + hk * (v_h * 8)
    first_end, begin, end, _, _ = hull(low, high, asks, tl.load(kept + 2 * b), source_sinks, SINKS)
    first_end2, begin2, end2, _, _ = hull(low2, high2, asks, tl.load(kept + 2 * b + 1), target_sinks, SINKS)
    source_tiles = count_tiles(first_end, begin, end, BLOCK_S, SINKS)
    old_tiles = source_tiles + count_tiles(first_end2, begin2, end2, BLOCK_S, SINKS)
    tiles = old_tiles + tl.cdiv(T, BLOCK_S)
    share = tl.cdiv(tiles, splits)
    for i in tl.range(split * share, tl.minimum((split + 1) * share, tiles), num_stages=STAGES):
        second = i >= source_tiles
        fresh = i >= old_tiles
        start, stop = locate_tile(i, first_end, begin, end, BLOCK_S, SINKS)
        start2, stop2 = locate_tile(i - source_tiles, first_end2, begin2, end2, BLOCK_S, SINKS)
        start, stop = tl.where(second, start2, start), tl.where(second, stop2, stop)
        start, stop = tl.where(fresh, (i - old_tiles) * BLOCK_S, start), tl.where(fresh, T, stop)
        from_k = tl.where(fresh, k, tl.where(second, target_k, source_k))
        from_v = tl.where(fresh, v, tl.where(second, target_v, source_v))
        k_s = tl.where(fresh, k_t, tl.where(second, tk_t, sk_t))
        v_s = tl.where(fresh, v_t, tl.where(second, tv_t, sv_t))
        at_key = start + tl.arange(0, BLOCK_S)
        there = at_key < stop
        place = placed + (b * T + at_key) * 2
        segment = tl.where(fresh, tl.load(place, mask=fresh & there, other=-1), second.to(tl.int32))
        j = tl.where(fresh, tl.load(place + 1, mask=fresh & there, other=-1), at_key)
        seen = there[None, :] & sees_chunk(sight_of, segment, j, source_sinks, target_sinks, SINKS) & asks[:, None]
        there = tl.max(seen.to(tl.int32), 0) > 0
        mask_key = there[:, None] & (d < D)[None, :]
        # [BLOCK_S, BLOCK_D]
        row_key = at_key.to(tl.int64)[:, None]
        keys = tl.load(from_k + row_key * (k_s * 8) + d[None, :], mask=mask_key, other=0.0)
        values = tl.load(from_v + row_key * (v_s * 8) + d[None, :], mask=mask_key, other=0.0)
        p, ds = score_gradient(rows, grad, keys, values, seen, log, less, inner, outer, SOFTCAP, PRECISION)
        acc = tl.dot(ds.to(keys.dtype), keys, acc, input_precision=PRECISION)
    to = part_dq + (((split * tl.num_programs(2) + b) * T + row) * (HK * R) + h[:, None]) * D + d[None, :]
    tl.store(to, acc * scale, mask=inside[:, None] & (d < D)[None, :])


@triton.jit(
    do_not_specialize=[
        "T", "HK", "source_sinks", "target_sinks", "q_b", "q_h", "q_t", "k_b", "k_h", "k_t", "v_b", "v_h",
        "v_t", "do_b", "do_h", "do_t", "dk_b", "dk_h", "dk_t", "dv_b", "dv_h", "dv_t",
    ]
)  # fmt: skip
def dkdv_kernel(
    q, do,  # [B, H, T, D], q rotated
    k, v,  # [B, HK, T, D], k rotated
    total, delta,  # fp32 [B, H, T]
    sight, placed,
    dk,  # fp32 [B, HK, T, D], not yet turned back
    dv,  # [B, HK, T, D]
    inner, outer, scale, T, HK, source_sinks, target_sinks,
    # strides in units of 8 elements
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, do_b, do_h, do_t, dk_b, dk_h, dk_t, dv_b, dv_h, dv_t,
    R: tl.constexpr, D: tl.constexpr, HAS_ROLE: tl.constexpr, SINKS: tl.constexpr, SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    hk = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    tc = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    here = tc < T
    d = tl.arange(0, BLOCK_D)
    place = placed + (b * T + tc) * 2
    segment = tl.load(place, mask=here, other=-1)
    j = tl.load(place + 1, mask=here, other=-1)
    # [BLOCK_C, BLOCK_D]
    row_key = tc.to(tl.int64)[:, None]
    mask = (segment >= 0)[:, None] & (d < D)[None, :]
    keys = tl.load(k + b * (k_b * 8) + hk * (k_h * 8) + row_key * (k_t * 8) + d[None, :], mask=mask, other=0.0)
    values = tl.load(v + b * (v_b * 8) + hk * (v_h * 8) + row_key * (v_t * 8) + d[None, :], mask=mask, other=0.0)
    q += b * (q_b * 8)
    do += b * (do_b * 8)
    dk_acc = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
    dv_acc = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
    # rows of one role see nothing of the chunk behind themselves
    first = 0 if HAS_ROLE else (tl.program_id(0) * BLOCK_C * R) // BLOCK_M
    for i in tl.range(first, tl.cdiv(T * R, BLOCK_M), num_stages=STAGES):
        x = i * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = x < T * R
        t = tl.minimum(x // R, T - 1)
        h = hk * R + x % R
        at = (b * HK * R + h) * T + t
        log = tl.load(total + at, mask=inside, other=float("inf"))
        less = tl.load(delta + at, mask=inside, other=0.0)
        asks = log < float("inf")
        mask_row = asks[:, None] & (d < D)[None, :]
        row = t.to(tl.int64)[:, None]
        rows = tl.load(q + h[:, None] * (q_h * 8) + row * (q_t * 8) + d[None, :], mask=mask_row, other=0.0)
        grad = tl.load(do + h[:, None] * (do_h * 8) + row * (do_t * 8) + d[None, :], mask=mask_row, other=0.0)
        sight_of = load_sight(sight + b * T * 4, t, inside)
        seen = sees_chunk(sight_of, segment, j, source_sinks, target_sinks, SINKS)
        p, ds = score_gradient(rows, grad, keys, values, seen, log, less, inner, outer, SOFTCAP, PRECISION)
        dv_acc = tl.dot(p.to(grad.dtype).T, grad, dv_acc, input_precision=PRECISION)
        dk_acc = tl.dot(ds.to(rows.dtype).T, rows, dk_acc, input_precision=PRECISION)
    mask = here[:, None] & (d < D)[None, :]
    to = b * (dk_b * 8) + hk * (dk_h * 8) + row_key * (dk_t * 8) + d[None, :]
    tl.store(dk + to, dk_acc * scale, mask=mask)
    to = b * (dv_b * 8) + hk * (dv_h * 8) + row_key * (dv_t * 8) + d[None, :]
    tl.store(dv + to, dv_acc.to(dv.dtype.element_ty), mask=mask)
