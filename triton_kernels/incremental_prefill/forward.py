"""incremental_prefill forward: one launch that rotates, writes and attends, and a small one that joins its splits.

A program takes BLOCK_M rows of one key head, T rows times R query heads packed so that they share its keys, and its
part of the key tiles that these rows see, computed from the lengths in device memory: the same grid serves every
length. The first part also takes the chunk itself, rotated on the way; the other programs read only keys of earlier
calls, so that no program waits for another, and the last row tile writes the chunk. A long chunk is written by
`rotate_append` before (CHUNK off): its keys are then found in the segments.

Where nothing hides keys from rows that see later ones, keys and values come through descriptors (BOXES, `walk.py`),
else by their addresses.
"""

import triton
import triton.language as tl

from ..device.products import add_weighted, scores
from ..device.rope import load_rotated
from ..device.softmax import LOWEST, cap, online_softmax
from .merge import finish_rows
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
    oldest_held,
    rank_rows,
    seen_from_begin,
    sees_key,
    slots_of,
)
from .walk import attend_box, attend_short, is_short


@triton.jit
def program_part(even, weight, shares):
    """(item, part, parts, items) of a program, an item being a row tile of one key head: the even parts of all items
    start first, and what is left of each then fills the multiprocessors that would stand idle."""
    parts = even + (shares > even * weight).to(tl.int32)
    items = tl.num_programs(0) // parts
    i = tl.program_id(0)
    left = i >= items * even
    return tl.where(left, i - items * even, i // even), tl.where(left, even, i % even), parts, items


@triton.jit
def part_begin(part, total, weight, shares):
    """The first of `total` key tiles that belongs to a part."""
    return tl.minimum(part * weight, shares) * total // shares


@triton.jit
def through_memory(rows, part_o, part_at, o, o_at, inside, D: tl.constexpr, SPLIT: tl.constexpr):
    """rows [BLOCK_M, BLOCK_D], stored where this program's result will stand and loaded again: a product takes what was
    loaded from shared memory, and what was computed from registers, which it then fills anew for every tile of keys."""
    d = tl.arange(0, rows.shape[1])[None, :]
    if SPLIT:
        at = part_o.to(tl.pointer_type(rows.dtype)) + part_at[:, None] * (2 * D) + d
    else:
        at = o + o_at[:, None] + d
    tl.store(at, rows, mask=inside[:, None] & (d < D))
    tl.debug_barrier()
    return tl.load(at, mask=inside[:, None] & (d < D), other=0.0)


@triton.jit
def place_chunk(
    role, tc, T, role_t, sources, targets, source_length, target_length, source_total, target_total, source_capacity,
    target_capacity, ring_sinks,
    HAS_ROLE: tl.constexpr, SEGMENT: tl.constexpr, RINGS: tl.constexpr,
):  # fmt: skip
    """Where rows tc of the chunk stand: (whether it is a row of the source, of the target, and held; its stream index;
    sources, targets with these rows; the bits of the status word that rows without a slot set)."""
    here = tc < T
    if HAS_ROLE:
        r = tl.load(role + tc.to(tl.int64) * role_t, mask=here, other=-1).to(tl.int32)
        of_source, of_target = r == 0, r == 1
        source_rank = sources + tl.cumsum(of_source.to(tl.int32), 0) - 1
        target_rank = targets + tl.cumsum(of_target.to(tl.int32), 0) - 1
        sources += tl.sum(of_source.to(tl.int32), 0)
        targets += tl.sum(of_target.to(tl.int32), 0)
        j = tl.where(of_source, source_length + source_rank, target_length + target_rank)
    else:
        of_source, of_target = here & (SEGMENT == 0), here & (SEGMENT == 1)
        j = tc + (source_length if SEGMENT == 0 else target_length)
    held = tl.where(
        of_source,
        is_held(j, source_total, source_capacity, ring_sinks, RINGS % 2 == 1),
        is_held(j, target_total, target_capacity, ring_sinks, RINGS >= 2),
    )
    # a ring drops no row: the next of its rows overwrites it
    no_source = of_source & ((j < 0) | (RINGS % 2 == 0) & (j >= source_capacity))
    no_target = of_target & ((j < 0) | (RINGS < 2) & (j >= target_capacity))
    full = tl.max(no_source.to(tl.int32), 0) + 2 * tl.max(no_target.to(tl.int32), 0)
    return of_source, of_target, held, j, sources, targets, full


@triton.jit
def write_rows(to_k, to_v, slots, keys, values, mask, k_s, v_s, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows [BLOCK_C, BLOCK_D] to their slots of one segment of one head; strides in units of 8 elements."""
    d = tl.arange(0, BLOCK_D)[None, :]
    row = slots.to(tl.int64)[:, None]
    mask = mask[:, None] & (d < D)
    tl.store(to_k + row * (k_s * 8) + d, keys, mask=mask)
    tl.store(to_v + row * (v_s * 8) + d, values, mask=mask)


@triton.jit(
    do_not_specialize=[
        "T", "HK", "heads", "even", "weight", "shares", "source_capacity", "target_capacity", "source_sinks",
        "target_sinks", "ring_sinks", "source_window", "target_window",
        "q_b", "q_h", "q_t", "k_b", "k_h", "k_t", "v_b", "v_h", "v_t", "cos_b", "cos_t", "sin_b", "sin_t",
        "sk_b", "sk_h", "sk_t", "sv_b", "sv_h", "sv_t", "tk_b", "tk_h", "tk_t", "tv_b", "tv_h", "tv_t",
        "o_b", "o_h", "o_t", "length_b", "length_r", "role_b", "role_t", "limit_b", "limit_t",
        "source_begin_b", "source_begin_t", "target_begin_b", "target_begin_t",
    ]
)  # fmt: skip
def attend_kernel(
    # descriptors over the segments with tiles [1, 1, BLOCK_S, BLOCK_D], or None
    source_k_box, source_v_box, target_k_box, target_v_box,
    q,  # [B, H, T, D]
    k, v,  # [B, HK, T, D]
    cos, sin,  # [B or 1, T, ROTARY / 2]
    source_k, source_v, target_k, target_v,  # [B, HK, capacity, D]
    length,  # int32 [B, 2]
    status,  # int32 [1]
    role,  # int8 [B, T]
    counts,  # int32 [B, ceil(T / STEP), 2], for mixed calls longer than STEP
    source_limit, source_begin, target_begin,  # int32 [B, T]
    sink_logits,  # [H]
    o,  # [B, H, T, D]
    lse,  # fp32 [B, H, T]
    # fp32 [B, HK, T R, parts, D], and twice [B, HK, T R, parts]
    part_o, part_m, part_norm,
    # the keys of a row tile are cut into `shares`: `even` parts of `weight` of them, and one of what is left, if any
    inner, outer, T, HK, heads, even, weight, shares, source_capacity, target_capacity, source_sinks, target_sinks,
    ring_sinks, source_window, target_window,
    # strides of rows of D come in units of 8 elements: their alignment is then known without compiling for it
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, cos_b, cos_t, sin_b, sin_t,
    sk_b, sk_h, sk_t, sv_b, sv_h, sv_t, tk_b, tk_h, tk_t, tv_b, tv_h, tv_t, o_b, o_h, o_t,
    length_b, length_r, role_b, role_t, limit_b, limit_t, source_begin_b, source_begin_t, target_begin_b,
    target_begin_t,
    R: tl.constexpr, D: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, HAS_ROLE: tl.constexpr,
    HAS_COUNTS: tl.constexpr, SEGMENT: tl.constexpr, HAS_LIMIT: tl.constexpr, HAS_SOURCE_BEGIN: tl.constexpr,
    HAS_TARGET_BEGIN: tl.constexpr, SINKS: tl.constexpr, RINGS: tl.constexpr, SOFTCAP: tl.constexpr,
    SINK_LOGITS: tl.constexpr, CHUNK: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr, BOXES: tl.constexpr, THROUGH_MEMORY: tl.constexpr,
):  # fmt: skip
    # keys between what rows see exist only where something hides them
    HOLES: tl.constexpr = HAS_SOURCE_BEGIN or HAS_TARGET_BEGIN or SINKS or RINGS > 0
    BOTH: tl.constexpr = HAS_ROLE or SEGMENT == 1
    item, part, parts, items = program_part(even, weight, shares)
    hk = (item % HK).to(tl.int64)
    b = (item % heads // HK).to(tl.int64)
    # later rows see more: they start first
    tiles = items // heads
    tile = tiles - 1 - item // heads
    x = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = x < T * R
    t = tl.minimum(x // R, T - 1)
    h = (hk * R).to(tl.int32) + x % R
    d = tl.arange(0, BLOCK_D)
    first_row = tile * BLOCK_M // R
    last_row = tl.minimum(((tile + 1) * BLOCK_M - 1) // R, T - 1)
    role += b * role_b
    counts += b * tl.cdiv(T, STEP) * 2

    # what each row sees
    source_length, target_length = lengths_before(length + b * length_b, length_r, T)
    source_total, target_total = lengths_after(
        source_length, target_length, role, counts, T, role_t, HAS_ROLE, HAS_COUNTS, SEGMENT
    )
    opened = tl.cdiv(tile * BLOCK_M, R)
    r, rank = rank_rows(role, counts, t, inside, inside & (x % R == 0), opened, role_t, HAS_ROLE, HAS_COUNTS, SEGMENT)
    asks = (r == 0) | (r == 1)
    index = rank + tl.where(r == 0, source_length, target_length)
    source_high, target_high = last_seen(r, index, source_limit + b * limit_b, t, limit_t, source_total, HAS_LIMIT)
    source_held = oldest_held(source_total, source_capacity, ring_sinks, RINGS % 2 == 1)
    target_held = oldest_held(target_total, target_capacity, ring_sinks, RINGS >= 2)
    source_low = first_seen(
        source_begin + b * source_begin_b, t, inside, source_begin_t, source_high, source_window, source_held,
        HAS_SOURCE_BEGIN, RINGS % 2 == 1,
    )  # fmt: skip
    target_low = first_seen(
        target_begin + b * target_begin_b, t, inside, target_begin_t, target_high, target_window, target_held,
        HAS_TARGET_BEGIN, RINGS >= 2,
    )  # fmt: skip

    # [BLOCK_M, BLOCK_D]
    at = b * (q_b * 8) + h.to(tl.int64) * (q_h * 8) + t.to(tl.int64) * (q_t * 8)
    o_at = b * (o_b * 8) + h.to(tl.int64) * (o_h * 8) + t.to(tl.int64) * (o_t * 8)
    angle = (b * cos_b + t.to(tl.int64) * cos_t)[:, None]
    angle_sin = (b * sin_b + t.to(tl.int64) * sin_t)[:, None]
    rows = load_rotated(
        q + at[:, None], cos + angle, sin + angle_sin, asks[:, None], D, ROTARY, INTERLEAVED, BLOCK_D, False
    )
    rows = rows.to(q.dtype.element_ty)
    if THROUGH_MEMORY:
        rows = through_memory(rows, part_o, ((b * HK + hk) * (T * R) + x) * parts + part, o, o_at, inside, D, SPLIT)
    m = tl.full([BLOCK_M], LOWEST, tl.float32)
    norm = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    source_k += b * (sk_b * 8) + hk * (sk_h * 8)
    source_v += b * (sv_b * 8) + hk * (sv_h * 8)
    target_k += b * (tk_b * 8) + hk * (tk_h * 8)
    target_v += b * (tv_b * 8) + hk * (tv_h * 8)

    # this call's keys
    chunk_tiles = 0
    if CHUNK:
        writes = tile == tiles - 1
        chunk_tiles = tl.cdiv(T, BLOCK_C)
        if not HAS_ROLE:
            # rows of one role see nothing of the chunk behind themselves
            chunk_tiles = tl.cdiv(last_row + 1, BLOCK_C)
        sources = 0
        targets = 0
        for c in tl.range(0, tl.where(part == 0, chunk_tiles, 0), num_stages=1):
            tc = c * BLOCK_C + tl.arange(0, BLOCK_C)
            of_source, of_target, held, j, sources, targets, full = place_chunk(
                role, tc, T, role_t, sources, targets, source_length, target_length, source_total, target_total,
                source_capacity, target_capacity, ring_sinks, HAS_ROLE, SEGMENT, RINGS,
            )  # fmt: skip
            here = (of_source | of_target)[:, None]
            row = tc.to(tl.int64)[:, None]
            # [BLOCK_C, BLOCK_D]
            keys = load_rotated(
                k + b * (k_b * 8) + hk * (k_h * 8) + row * (k_t * 8), cos + b * cos_b + row * cos_t,
                sin + b * sin_b + row * sin_t, here, D, ROTARY, INTERLEAVED, BLOCK_D, False,
            ).to(k.dtype.element_ty)  # fmt: skip
            from_v = v + b * (v_b * 8) + hk * (v_h * 8) + row * (v_t * 8)
            values = tl.load(from_v + d[None, :], mask=here & (d < D)[None, :], other=0.0)
            of_source &= held
            of_target &= held
            if HAS_ROLE or SEGMENT == 0:
                to = slots_of(j, False, source_capacity, ring_sinks, RINGS % 2 * 3)
                write_rows(source_k, source_v, to, keys, values, of_source & writes, sk_t, sv_t, D, BLOCK_D)
            if BOTH:
                to = slots_of(j, True, target_capacity, ring_sinks, RINGS // 2 * 3)
                write_rows(target_k, target_v, to, keys, values, of_target & writes, tk_t, tv_t, D, BLOCK_D)
            if writes & (full > 0):
                tl.atomic_or(status, full)
            if BOXES and not HAS_ROLE:
                # rows of one role see themselves and those before
                used = (of_source | of_target) & (tc <= last_row)
                seen = used[None, :] & (tc[None, :] <= t[:, None])
            else:
                seen = of_source[None, :] & sees_key(
                    source_low[:, None], source_high[:, None], j[None, :], source_sinks, SINKS
                )
                if BOTH:
                    seen |= of_target[None, :] & sees_key(
                        target_low[:, None], target_high[:, None], j[None, :], target_sinks, SINKS
                    )
                used = tl.max((seen & asks[:, None]).to(tl.int32), 0) > 0
            values = tl.where(used[:, None], values, 0.0)
            s = cap(scores(rows, keys, PRECISION), inner, SOFTCAP)
            s = tl.where(seen, s, float("-inf"))
            m, norm, p, alpha = online_softmax(m, norm, s, outer, PRECISION, True)
            acc = add_weighted(acc * alpha[:, None], p, values, PRECISION)

    # this program's part of the segments' tiles
    source_kept = tl.maximum(source_length if CHUNK else source_total, 0)
    target_kept = tl.maximum(target_length if CHUNK else target_total, 0)
    if RINGS % 2 == 0:
        source_kept = tl.minimum(source_kept, source_capacity)
    if RINGS < 2:
        target_kept = tl.minimum(target_kept, target_capacity)
    if BOXES:
        # every row that sees anything of a segment sees its first key
        if HAS_ROLE or HAS_LIMIT:
            end, least_end = seen_from_begin(source_high, asks, source_kept)
        elif SEGMENT == 0:
            end, least_end = tl.minimum(source_length + last_row + 1, source_kept), source_length + first_row + 1
        else:
            end, least_end = source_kept, source_kept
        if HAS_ROLE:
            end2, least_end2 = seen_from_begin(target_high, asks, target_kept)
        else:
            end2, least_end2 = tl.minimum(target_length + last_row + 1, target_kept), target_length + first_row + 1
        end, end2 = tl.maximum(end, 0), tl.maximum(end2, 0)
        source_tiles = tl.cdiv(end, BLOCK_S)
        both_tiles = source_tiles
        if BOTH:
            both_tiles += tl.cdiv(end2, BLOCK_S)
    else:
        first_end, begin, end, most_begin, least_end = hull(
            source_low, source_high, asks, source_kept, source_sinks, SINKS
        )
        source_tiles = count_tiles(first_end, begin, end, BLOCK_S, SINKS)
        both_tiles = source_tiles
        if BOTH:
            first_end2, begin2, end2, most_begin2, least_end2 = hull(
                target_low, target_high, asks, target_kept, target_sinks, SINKS
            )
            both_tiles += count_tiles(first_end2, begin2, end2, BLOCK_S, SINKS)
    # the chunk counts as tiles of the first part
    from_tile = tl.maximum(part_begin(part, both_tiles + chunk_tiles, weight, shares) - chunk_tiles, 0)
    to_tile = tl.maximum(part_begin(part + 1, both_tiles + chunk_tiles, weight, shares) - chunk_tiles, 0)
    if BOXES:
        to_source = tl.minimum(to_tile, source_tiles)
        m, norm, acc = attend_box(
            m, norm, acc, rows, source_k_box, source_v_box, b, hk, from_tile, to_source, end, least_end, source_high,
            inner, outer, SOFTCAP, PRECISION, BLOCK_S, BLOCK_D, STAGES,
        )  # fmt: skip
        first_short = is_short(from_tile, to_source, end, BLOCK_S)
        second_short = 0
        if BOTH:
            from_target = tl.maximum(from_tile - source_tiles, 0)
            m, norm, acc = attend_box(
                m, norm, acc, rows, target_k_box, target_v_box, b, hk, from_target, to_tile - source_tiles, end2,
                least_end2, target_high, inner, outer, SOFTCAP, PRECISION, BLOCK_S, BLOCK_D, STAGES,
            )  # fmt: skip
            second_short = is_short(from_target, to_tile - source_tiles, end2, BLOCK_S)
        for i in tl.range(1 - first_short, 1 + second_short, num_stages=1):
            stop, high, from_k, from_v, k_s, v_s = end, source_high, source_k, source_v, sk_t, sv_t
            if BOTH:
                stop, high = tl.where(i > 0, end2, end), tl.where(i > 0, target_high, source_high)
                from_k, from_v = tl.where(i > 0, target_k, source_k), tl.where(i > 0, target_v, source_v)
                k_s, v_s = tl.where(i > 0, tk_t, sk_t), tl.where(i > 0, tv_t, sv_t)
            m, norm, acc = attend_short(
                m, norm, acc, rows, from_k, from_v, k_s, v_s, stop, high, inner, outer, SOFTCAP, PRECISION, D, BLOCK_S,
                BLOCK_D,
            )  # fmt: skip
    # not a bare loop: see attend_slots of span_attention
    elif to_tile > from_tile:
        for i in tl.range(from_tile, to_tile, num_stages=STAGES):
            start, stop = locate_tile(i, first_end, begin, end, BLOCK_S, SINKS)
            low, high, most, least = source_low, source_high, most_begin, least_end
            second = False
            sinks, capacity, from_k, from_v, k_s, v_s = source_sinks, source_capacity, source_k, source_v, sk_t, sv_t
            if BOTH:
                second = i >= source_tiles
                start2, stop2 = locate_tile(i - source_tiles, first_end2, begin2, end2, BLOCK_S, SINKS)
                start, stop = tl.where(second, start2, start), tl.where(second, stop2, stop)
                low, high = tl.where(second, target_low, low), tl.where(second, target_high, high)
                most, least = tl.where(second, most_begin2, most), tl.where(second, least_end2, least)
                sinks, capacity = tl.where(second, target_sinks, sinks), tl.where(second, target_capacity, capacity)
                from_k, from_v = tl.where(second, target_k, from_k), tl.where(second, target_v, from_v)
                k_s, v_s = tl.where(second, tk_t, k_s), tl.where(second, tv_t, v_s)
            j = start + tl.arange(0, BLOCK_S)
            row = slots_of(j, second, capacity, ring_sinks, RINGS).to(tl.int64)[:, None]
            there = j < stop
            # [BLOCK_S, BLOCK_D]
            keys = tl.load(from_k + row * (k_s * 8) + d[None, :], mask=there[:, None] & (d < D)[None, :], other=0.0)
            s = cap(scores(rows, keys, PRECISION), inner, SOFTCAP)
            whole = (start >= most) & (start + BLOCK_S <= tl.minimum(least, stop))
            if HOLES:
                # a value that no row sees may be NaN, and 0 * NaN is NaN
                seen = there[None, :] & sees_key(low[:, None], high[:, None], j[None, :], sinks, SINKS)
                there = tl.max((seen & asks[:, None]).to(tl.int32), 0) > 0
                s = tl.where(seen, s, float("-inf"))
            elif not whole:
                s = tl.where(j[None, :] < tl.minimum(high, stop)[:, None], s, float("-inf"))
            m, norm, p, alpha = online_softmax(m, norm, s, outer, PRECISION, True)
            values = tl.load(from_v + row * (v_s * 8) + d[None, :], mask=there[:, None] & (d < D)[None, :], other=0.0)
            acc = add_weighted(acc * alpha[:, None], p, values, PRECISION)

    # padding has seen garbage
    norm = tl.where(asks, norm, 0.0)
    acc = tl.where(asks[:, None], acc, 0.0)
    if SPLIT:
        m = tl.where(norm == 0, float("-inf"), m)
        at = ((b * HK + hk) * (T * R) + x) * parts + part
        tl.store(part_m + at, m, mask=inside)
        tl.store(part_norm + at, norm, mask=inside)
        tl.store(part_o + at[:, None] * D + d[None, :], acc, mask=(inside & (norm != 0))[:, None] & (d < D)[None, :])
    else:
        out, natural = finish_rows(acc, m, norm, sink_logits, h, SINK_LOGITS, PRECISION)
        tl.store(o + o_at[:, None] + d[None, :], out.to(o.dtype.element_ty), mask=inside[:, None] & (d < D)[None, :])
        tl.store(lse + (b * HK * R + h) * T + t, natural, mask=inside)
