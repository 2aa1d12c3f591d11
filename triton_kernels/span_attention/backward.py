"""span_attention backward: dq and what dk and dv need of each row, by tiles of rows; then dk and dv, by tiles of keys.

With p = exp(s - total), total the log of the whole denominator (the learned sink included), and do_j = do . (the value
that key j's mass lands on):  dS = p (do_j - delta),  dq = scale dS k,  dk = scale dS^T q,  dv = p^T do
(FlashAttention-2, arXiv 2307.08691, section 2.3.2), where delta = do . o - dlse / (1 - p_sink) carries the gradient
through lse. dq and dk, dv are two kernels, so that every output has one writer and a fixed order of additions:
deterministic. Where the heads that share a key are split over programs, a count tells which is the last to add them up.
"""

import triton
import triton.language as tl

from ..device.classes import class_of, rule_between, rules_towards
from ..device.softmax import cap, from_natural, power
from ..device.spans import (
    PREPARED_BLOCK,
    padded_rows,
    row_pair,
    row_runs,
    row_span,
    sees,
    solid_pair,
    tile_is_whole,
    times_seen,
    walk_of,
)
from .classes import dq_classes, landing_key, value_of
from .forward import LISTS, load_tile, program_rows, program_tile


@triton.jit
def row_statistics(
    do, o, log, dlog, sink_logits, sink_gradient, h, at, inside, SINK_LOGITS: tl.constexpr, PRECISION: tl.constexpr
):
    """Of rows of one head: the log of the denominator in the unit of `power` (+inf: nothing is seen), and delta.
    do, o [BLOCK_T, BLOCK_D], log and dlog [BLOCK_T]: lse and its gradient; what each row adds to d sink_logits goes to
    `sink_gradient` at `at`, for the rows that are `inside`."""
    along = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    seen = log > float("-inf")
    log = tl.where(seen, log, 0.0)
    whole = log
    if SINK_LOGITS:
        sink = tl.load(sink_logits + h).to(tl.float32)
        top = tl.maximum(log, sink)
        whole = top + tl.log(tl.exp(log - top) + tl.exp(sink - top))
        tl.store(sink_gradient + at, tl.where(seen, -tl.exp(sink - whole) * along, 0.0), mask=inside)
        along -= dlog * tl.exp(tl.minimum(whole - log, 80.0))
    else:
        along -= dlog
    return tl.where(seen, from_natural(whole, PRECISION), float("inf")), tl.where(seen, along, 0.0)


@triton.jit
def dq_slots(
    acc, mass, q, do, k, v, bounds, row_blocks, total, delta, sunk, t, b, hk, block, blocks, inner, outer, T, S,
    SLOT: tl.constexpr, PAIR: tl.constexpr, RULE: tl.constexpr, N: tl.constexpr, SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dq's share of slot SLOT (and the next, if PAIR), and the slot's mass per row. `sunk` [BLOCK_T]: do . (value of
    the slot's sink)."""
    solid, solids, loose, looses, begin, begin2, first, last, least, most, first2, last2, least2, most2 = walk_of(
        row_blocks, block, blocks, SLOT, PAIR, N, BLOCK_T, BLOCK_S
    )
    # not a bare loop: see attend_slots
    if solids > 0:
        for i in tl.range(0, solids):
            start, fresh, whole, slot = solid_pair(
                i, solid, first, last, least, most, first2, last2, least2, most2, SLOT, PAIR, BLOCK_T,
                BLOCK_S,
            )  # fmt: skip
            keys = load_tile(k, b, hk, start, BLOCK_S, BLOCK_D)
            s = cap(tl.dot(q, keys.T, input_precision=PRECISION), inner, SOFTCAP)
            p = power(s * outer - total[:, None], PRECISION)
            if not whole:
                low, high = row_span(bounds, t, T, S, slot, N)
                j = start + tl.arange(0, BLOCK_S)
                low = tl.maximum(low, fresh)
                p = tl.where(sees(low[:, None], high[:, None], j[None, :]), p, 0.0)
            if RULE == 0:
                values = load_tile(v, b, hk, start, BLOCK_S, BLOCK_D)
                ds = p * (tl.dot(do, values.T, input_precision=PRECISION) - delta[:, None])
            else:
                # the sink's value may be NaN for rows that do not use it
                ds = tl.where(p > 0, p * (sunk - delta)[:, None], 0.0)
                mass += tl.sum(p, 1)
            if SOFTCAP:
                ds *= 1.0 - s * s
            acc = tl.dot(ds.to(keys.dtype), keys, acc, input_precision=PRECISION)
    # one stage: such tiles are few, and more buffers would keep larger tiles out
    for i in tl.range(0, looses, num_stages=1):
        start = begin + i * BLOCK_S
        slot = SLOT
        if PAIR:
            start = tl.where(i < loose, start, begin2 + (i - loose) * BLOCK_S)
            slot = tl.where(i < loose, SLOT, SLOT + 1)
        low, high = row_span(bounds, t, T, S, slot, N)
        j = start + tl.arange(0, BLOCK_S)
        used = tl.max(sees(low[None, :], high[None, :], j[:, None]).to(tl.int32), 1)
        keys = load_tile(k, b, hk, start, BLOCK_S, BLOCK_D)
        keys = tl.where(used[:, None] > 0, keys, 0.0)
        s = cap(tl.dot(q, keys.T, input_precision=PRECISION), inner, SOFTCAP)
        p = power(s * outer - total[:, None], PRECISION)
        p = tl.where(sees(low[:, None], high[:, None], j[None, :]), p, 0.0)
        if RULE == 0:
            values = load_tile(v, b, hk, start, BLOCK_S, BLOCK_D)
            ds = p * (tl.dot(do, values.T, input_precision=PRECISION) - delta[:, None])
            # the value of an unseen key may be NaN
            ds = tl.where(p > 0, ds, 0.0)
        else:
            # the sink's value may be NaN for rows that do not use it
            ds = tl.where(p > 0, p * (sunk - delta)[:, None], 0.0)
            mass += tl.sum(p, 1)
        if SOFTCAP:
            ds *= 1.0 - s * s
        acc = tl.dot(ds.to(keys.dtype), keys, acc, input_precision=PRECISION)
    return acc, mass


@triton.jit
def dq_kept(
    acc, q, do, k, v, kept, count, bounds, total, delta, t, inner, outer, T, S, k_s, v_s,
    SLOT: tl.constexpr, N: tl.constexpr, D: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dq's share of a KEPT slot, its keys gathered by index."""
    begin, end = row_span(bounds, t, T, S, SLOT, N)
    d = tl.arange(0, BLOCK_D)
    for start in tl.range(0, count, BLOCK_S):
        i = start + tl.arange(0, BLOCK_S)
        j = tl.load(kept + i, mask=i < count, other=-1)
        j = tl.where(j < S, j, -1)
        used = tl.max(((j[:, None] >= 0) & sees(begin[None, :], end[None, :], j[:, None])).to(tl.int32), 1) > 0
        row = j.to(tl.int64)[:, None]
        mask = used[:, None] & (d < D)[None, :]
        keys = tl.load(k + row * k_s + d[None, :], mask=mask, other=0.0)
        values = tl.load(v + row * v_s + d[None, :], mask=mask, other=0.0)
        s = cap(tl.dot(q, keys.T, input_precision=PRECISION), inner, SOFTCAP)
        p = power(s * outer - total[:, None], PRECISION)
        p = tl.where((j[None, :] >= 0) & sees(begin[:, None], end[:, None], j[None, :]), p, 0.0)
        ds = p * (tl.dot(do, values.T, input_precision=PRECISION) - delta[:, None])
        ds = tl.where(p > 0, ds, 0.0)
        if SOFTCAP:
            ds *= 1.0 - s * s
        acc = tl.dot(ds.to(keys.dtype), keys, acc, input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=["T", "S", "H", "HK", "TB", "K", "RC", "KC", "mass_n", "rows_n", "tiles_n",
                               "dlse_b", "dlse_h", "dlse_t", "has_dlse"],
            do_not_specialize_on_alignment=["lse", "dlse", "sink_gradient", *LISTS])  # fmt: skip
def dq_kernel(
    q, k, v, do,  # descriptors over [B, H or HK, T or S, D]
    k_rows, v_rows,
    o,  # [B, H, T, D]
    lse, dlse,  # fp32 [B, H, T]
    dq,  # [B, H, T, D]
    work,  # fp32: rows_n numbers, total and delta by `row_pair`, then tiles_n, `arrived` of `join_parts`
    sink_gradient,  # fp32 [B, H, T]
    mass,  # fp32 [N + 1, B, H, T]: what each SINK slot moved to its sink key, and last what classes moved to theirs
    bounds, row_blocks, sink_key, kept, kept_count, key_class, row_class, class_rules, class_sink, sink_logits,
    inner, outer, scale, T, S, H, HK, TB, K, RC, KC,
    k_b, k_h, k_s, v_b, v_h, v_s, o_b, o_h, o_t, dlse_b, dlse_h, dlse_t, dq_b, dq_h, dq_t, mass_n, rows_n, tiles_n,
    has_dlse,  # 0: dlse is zeros and not read
    N: tl.constexpr, RULES: tl.constexpr, D: tl.constexpr, SOFTCAP: tl.constexpr, SINK_LOGITS: tl.constexpr,
    CLASSES: tl.constexpr, CLASS_SINK: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # whole blocks of rows: all of total and delta is written
    b, h, block = program_rows(H, padded_rows(T), BLOCK_T)
    # nothing has arrived yet
    programs = tl.num_programs(0) * tl.num_programs(1)
    for i in tl.range(tl.program_id(1) * tl.num_programs(0) + tl.program_id(0), tiles_n, programs):
        tl.store(work + rows_n.to(tl.int64) + i, 0.0)
    hk = h // (H // HK)
    wide = b.to(tl.int64)
    t = block * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.arange(0, BLOCK_D)
    bounds += wide * T * N * 2
    row_blocks += wide * TB * N * 4
    # asked for before the copies of q and do, which are waited for one by one
    row = t.to(tl.int64)
    at = (wide * H + h) * T + t
    log = tl.load(lse + at, mask=t < T, other=float("-inf"))
    dlog = tl.load(dlse + wide * dlse_b + h * dlse_h + row * dlse_t, mask=(t < T) & (has_dlse != 0), other=0.0)
    inside = (t < T)[:, None] & (d < D)[None, :]
    out = tl.load(o + wide * o_b + h * o_h + row[:, None] * o_t + d[None, :], mask=inside, other=0.0)
    rows = load_tile(q, b, h, block * BLOCK_T, BLOCK_T, BLOCK_D)
    grad = load_tile(do, b, h, block * BLOCK_T, BLOCK_T, BLOCK_D)
    log, less = row_statistics(grad, out, log, dlog, sink_logits, sink_gradient, h, at, t < T, SINK_LOGITS, PRECISION)
    pair = work + row_pair(wide * H + h, t, T)
    tl.store(pair, log, mask=t < padded_rows(T))
    tl.store(pair + PREPARED_BLOCK, less, mask=t < padded_rows(T))
    acc = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    none = tl.zeros([BLOCK_T], tl.float32)
    if CLASSES:
        own_class = class_of(row_class + wide * T, t, T, RC)
        rules = rules_towards(class_rules, own_class * KC, 1, KC, CLASSES == 1)
        by_class = none
    for slot in tl.static_range(N):
        if CLASSES:
            count = tl.full([], 0, tl.int32)
            if (RULES >> (2 * slot)) & 3 == 3:
                count = tl.minimum(tl.load(kept_count + b * HK + hk), K)
            to = landing_key(sink_key, class_sink, b, slot, (RULES >> (2 * slot)) & 3, N, CLASS_SINK)
            acc, moved = dq_classes(
                acc, rows, grad, k_rows + wide * k_b + hk * k_h, v_rows + wide * v_b + hk * v_h,
                kept + (wide * HK + hk) * K, count, bounds, row_blocks, class_rules, rules, key_class + wide * S, to,
                log, less, t, block, TB, inner, outer, T, S, KC, k_s, v_s, slot, (RULES >> (2 * slot)) & 3, N, D,
                CLASSES == 1, SOFTCAP, PRECISION, BLOCK_T, BLOCK_S, BLOCK_D,
            )  # fmt: skip
            if (RULES >> (2 * slot)) & 3 == 2:
                tl.store(mass + slot * mass_n.to(tl.int64) + at, moved, mask=t < T)
            else:
                by_class += moved
        elif (RULES >> (2 * slot)) & 3 == 0:
            if slot % 2 == 0 or (RULES >> (2 * slot - 2)) & 3 != 0:
                acc, _ = dq_slots(
                    acc, none, rows, grad, k, v, bounds, row_blocks, log, less, none, t, b, hk, block, TB, inner,
                    outer, T, S,
                    slot, slot % 2 == 0 and slot + 1 < N and (RULES >> (2 * slot + 2)) & 3 == 0, 0, N, SOFTCAP,
                    PRECISION, BLOCK_T, BLOCK_S, BLOCK_D,
                )  # fmt: skip
        elif (RULES >> (2 * slot)) & 3 == 3:
            count = tl.minimum(tl.load(kept_count + b * HK + hk), K)
            acc = dq_kept(
                acc, rows, grad, k_rows + wide * k_b + hk * k_h, v_rows + wide * v_b + hk * v_h,
                kept + (wide * HK + hk) * K, count,
                bounds, log, less, t, inner, outer, T, S, k_s, v_s, slot, N, D, SOFTCAP, PRECISION, BLOCK_S, BLOCK_D,
            )  # fmt: skip
        else:
            sunk = none
            if (RULES >> (2 * slot)) & 3 == 2:
                key = tl.load(sink_key + b * N + slot)
                there = (key >= 0) & (key < S) & (d < D)
                value = tl.load(v_rows + wide * v_b + hk * v_h + key.to(tl.int64) * v_s + d, mask=there, other=0.0).to(
                    tl.float32
                )
                sunk = tl.sum(grad.to(tl.float32) * value[None, :], 1)
            acc, moved = dq_slots(
                acc, none, rows, grad, k, v, bounds, row_blocks, log, less, sunk, t, b, hk, block, TB, inner, outer,
                T, S, slot, False, (RULES >> (2 * slot)) & 3, N, SOFTCAP, PRECISION, BLOCK_T, BLOCK_S, BLOCK_D,
            )  # fmt: skip
            if (RULES >> (2 * slot)) & 3 == 2:
                tl.store(mass + slot * mass_n.to(tl.int64) + at, moved, mask=t < T)
    if CLASS_SINK:
        tl.store(mass + N * mass_n.to(tl.int64) + at, by_class, mask=t < T)
    to = dq + wide * dq_b + h * dq_h + row[:, None] * dq_t + d[None, :]
    tl.store(to, (acc * scale).to(dq.dtype.element_ty), mask=inside)


@triton.jit
def join_parts(dk, dv, dk_acc, dv_acc, to, mask, arrived, sums, part, parts):
    """dk and dv of a tile of keys from the sums of `parts` programs, of which this is one: the last to arrive adds all
    up, part by part, so that the order of additions is fixed. arrived, fp32: how many did; sums, fp32 [parts, 2,
    BLOCK_S, BLOCK_D]."""
    BLOCK_S: tl.constexpr = dk_acc.shape[0]
    BLOCK_D: tl.constexpr = dk_acc.shape[1]
    i = tl.arange(0, BLOCK_S)[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    own = sums + part * (2 * BLOCK_S * BLOCK_D)
    tl.store(own + i, dk_acc)
    tl.store(own + BLOCK_S * BLOCK_D + i, dv_acc)
    # all threads have stored before one of them tells
    tl.debug_barrier()
    if tl.atomic_add(arrived, 1.0, sem="acq_rel", scope="gpu") == parts - 1:
        for half in tl.static_range(2):
            acc = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
            for each in range(parts):
                acc += tl.load(sums + (2 * each + half) * (BLOCK_S * BLOCK_D) + i, cache_modifier=".cg")
            target = dv if half else dk
            tl.store(target + to, acc.to(target.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["T", "S", "H", "HK", "TB", "SB", "heads", "RC", "KC", "rows_n", "tiles_n"],
            do_not_specialize_on_alignment=["listed", "bounds", "sink_key", *LISTS[4:-1]])  # fmt: skip
def dkdv_kernel(
    q, k, v, do,  # descriptors over [B, H or HK, T or S, D]
    v_rows,
    dk, dv,  # [B, HK, S, D]
    work,  # fp32: the same, then `sums` of `join_parts`
    bounds, row_blocks,
    key_blocks,  # int32 [B, SB, 4]
    sink_key,  # int32 [B, N]
    listed,  # int8 [B, HK, S]: whether a key is in the kept list
    key_class, row_class, class_rules, class_sink,
    inner, outer, scale, T, S, H, HK, TB, SB, heads, RC, KC,
    v_b, v_h, v_s, dk_b, dk_h, dk_s, rows_n, tiles_n,
    N: tl.constexpr, RULES: tl.constexpr, HAS_KEPT: tl.constexpr, D: tl.constexpr, SOFTCAP: tl.constexpr,
    CLASSES: tl.constexpr, CLASS_SINK: tl.constexpr, JOIN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # earlier keys are seen by more rows under every causal-like mask: they start first, those of all heads
    head, tile, tiles = program_tile(S, BLOCK_S)
    parts = tl.cdiv(H // HK, heads)
    hk = head % HK
    part = head // HK % parts
    b = head // (HK * parts)
    PER: tl.constexpr = PREPARED_BLOCK // BLOCK_T
    wide = b.to(tl.int64)
    start = tile * BLOCK_S
    j = start + tl.arange(0, BLOCK_S)
    d = tl.arange(0, BLOCK_D)
    bounds += wide * T * N * 2
    row_blocks += wide * TB * N * 4
    # [BLOCK_S, BLOCK_D]
    keys = load_tile(k, b, hk, start, BLOCK_S, BLOCK_D)
    values = load_tile(v, b, hk, start, BLOCK_S, BLOCK_D)
    begin, length, begin2, length2 = row_runs(key_blocks + wide * SB * 4, tile, SB, BLOCK_S)
    # runs count blocks of 64 rows, the loop tiles of BLOCK_T
    begin, length, begin2, length2 = begin * PER, length * PER, begin2 * PER, length2 * PER
    both = length + length2
    first = hk * (H // HK) + part * heads
    last = tl.minimum(first + heads, (hk + 1) * (H // HK))
    steps = tl.maximum(last - first, 0) * both
    # [BLOCK_S]: whether a KEPT slot shows the key
    kept = j < S
    if HAS_KEPT:
        kept = tl.load(listed + (wide * HK + hk) * S + j, mask=kept, other=0) > 0
    if CLASSES:
        rules = rules_towards(class_rules, class_of(key_class + wide * S, j, S, KC), KC, RC, CLASSES == 1)
    dk_acc = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    dv_acc = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    # what is too small for the pipeliner is loaded one step ahead: row statistics, and whether the tile needs a mask
    h, n, ahead = first, 0, tl.arange(0, BLOCK_T)
    block = tl.where(length > 0, begin, begin2)
    t = block * BLOCK_T + ahead
    at = tl.where(steps > 0, row_pair(wide * H + h, block * BLOCK_T, T), 0)
    log = tl.load(work + at + ahead)
    less = tl.load(work + at + PREPARED_BLOCK + ahead)
    whole = tile_is_whole(row_blocks, block // PER, start, steps > 0, N, RULES, BLOCK_S)
    # why not a bare loop: see attend_slots; this one is compiled well where nothing but ATTEND is in it
    entered = steps > 0 if RULES != 0 or CLASSES else True
    if entered:
        for i in tl.range(0, steps):
            rows = load_tile(q, b, h, block * BLOCK_T, BLOCK_T, BLOCK_D)
            s = cap(tl.dot(keys, rows.T, input_precision=PRECISION), inner, SOFTCAP)
            # [BLOCK_S, BLOCK_T]
            p = power(s * outer - log[None, :], PRECISION)
            grad = load_tile(do, b, h, block * BLOCK_T, BLOCK_T, BLOCK_D)
            if RULES == 0 and not CLASSES:
                if not whole:
                    times = times_seen(bounds, t, T, S, j, kept, N, RULES, 0, 0, BLOCK_T, BLOCK_S)
                    p = tl.where(times > 0, p * times, 0.0)
                dv_acc = tl.dot(p.to(grad.dtype), grad, dv_acc, input_precision=PRECISION)
                dp = tl.dot(values, grad.T, input_precision=PRECISION)
                # a value that no row sees may be NaN
                ds = tl.where(p > 0, p * (dp - less[None, :]), 0.0)
            else:
                own = times_seen(bounds, t, T, S, j, kept, N, RULES, 0, 3, BLOCK_T, BLOCK_S)
                dropped = times_seen(bounds, t, T, S, j, kept, N, RULES, 1, 2, BLOCK_T, BLOCK_S)
                if CLASSES:
                    others = class_of(row_class + wide * T, t, T, RC)
                    rule = rule_between(class_rules, rules[:, None], others[None, :], KC, CLASSES == 1)
                    sunk_times = tl.where(rule == 2, own, 0.0)
                    dropped = tl.where(rule == 3, 0.0, tl.where(rule == 0, dropped, dropped + own))
                    own = tl.where(rule == 0, own, 0.0)
                weights = tl.where(own > 0, p * own, 0.0)
                dv_acc = tl.dot(weights.to(grad.dtype), grad, dv_acc, input_precision=PRECISION)
                dp = tl.dot(values, grad.T, input_precision=PRECISION)
                ds = tl.where(own > 0, weights * (dp - less[None, :]), 0.0)
                ds -= tl.where(dropped > 0, p * dropped * less[None, :], 0.0)
                for slot in tl.static_range(N):
                    if (RULES >> (2 * slot)) & 3 == 2:
                        sink = tl.load(sink_key + b * N + slot)
                        value = value_of(v_rows + wide * v_b + hk * v_h, sink, v_s, S, D, BLOCK_D)
                        sunk = tl.sum(grad.to(tl.float32) * value[None, :], 1)
                        low, high = row_span(bounds, t, T, S, slot, N)
                        moved = sees(low[None, :], high[None, :], j[:, None])
                        if CLASSES:
                            moved = moved & ((rule == 0) | (rule == 2))
                        ds += tl.where(moved, p * sunk[None, :], 0.0)
                if CLASS_SINK:
                    value = value_of(v_rows + wide * v_b + hk * v_h, tl.load(class_sink + b), v_s, S, D, BLOCK_D)
                    sunk = tl.sum(grad.to(tl.float32) * value[None, :], 1)
                    ds += tl.where(sunk_times > 0, p * sunk_times * sunk[None, :], 0.0)
            if SOFTCAP:
                # the slope of a key that no row sees may be NaN
                ds = tl.where(ds == 0.0, 0.0, ds * (1.0 - s * s))
            dk_acc = tl.dot(ds.to(rows.dtype), rows, dk_acc, input_precision=PRECISION)
            n += 1
            h += (n == both).to(tl.int32)
            n = tl.where(n == both, 0, n)
            block = tl.where(n < length, begin + n, begin2 + n - length)
            t = block * BLOCK_T + ahead
            more = i + 1 < steps
            at = tl.where(more, row_pair(wide * H + h, block * BLOCK_T, T), 0)
            log = tl.load(work + at + ahead)
            less = tl.load(work + at + PREPARED_BLOCK + ahead)
            whole = tile_is_whole(row_blocks, block // PER, start, more, N, RULES, BLOCK_S)
    to = wide * dk_b + hk * dk_h + j.to(tl.int64)[:, None] * dk_s + d[None, :]
    mask = (j < S)[:, None] & (d < D)[None, :]
    dk_acc *= scale
    if JOIN:
        arrived = work + tl.multiple_of(rows_n.to(tl.int64), 64)
        place = (wide * HK + hk) * tiles + tile
        sums = arrived + tl.multiple_of(tiles_n.to(tl.int64), 64) + place * parts * (2 * BLOCK_S * BLOCK_D)
        join_parts(dk, dv, dk_acc, dv_acc, to, mask, arrived + place, sums, part, parts)
    else:
        tl.store(dk + to, dk_acc.to(dk.dtype.element_ty), mask=mask)
        tl.store(dv + to, dv_acc.to(dv.dtype.element_ty), mask=mask)
