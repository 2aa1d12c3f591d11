"""span_attention forward: online softmax over the key tiles that a tile of rows touches.

Heads that share keys run together, and only so many key heads at a time as the L2 holds (`program_rows`). Later rows
see more under every causal-like mask, so the last row tiles start first. A pair of ATTEND slots is walked by one
counter in one software pipeline, masked and unmasked tiles alike: on an H200 separate loops for the two cost 13 % of
the forward at 8k tokens and 35 % at 2k, because an edge tile then waited for its own loads.
"""

import triton
import triton.language as tl

from ..device.classes import class_of, rules_towards
from ..device.softmax import LOWEST, cap, from_natural, natural_log, online_softmax, power
from ..device.spans import row_span, sees, slot_hull, solid_pair, walk_of
from .classes import attend_classes, landing_key

# a view of a longer list may begin anywhere: the alignment of these is no part of a compiled form
LISTS = [
    "bounds", "sink_key", "kept", "kept_count", "key_class", "row_class", "class_rules", "class_sink", "sink_logits",
]  # fmt: skip


@triton.jit
def load_tile(tensor, b, h, start, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """[BLOCK, BLOCK_D] of a descriptor over [B, heads, length, D]; zeros beyond length and D."""
    return tl.reshape(tensor.load([b, h, start, 0]), [BLOCK, BLOCK_D])


@triton.jit
def program_tile(length, BLOCK: tl.constexpr):
    """(head, tile, tiles) of a program on the grid (heads that run together * tiles, groups of such heads): the first
    tile of all heads of a group starts first."""
    tiles = tl.cdiv(length, BLOCK)
    together = tl.num_programs(0) // tiles
    return tl.program_id(1) * together + tl.program_id(0) % together, tl.program_id(0) // together, tiles


@triton.jit
def program_rows(H, T, BLOCK_T: tl.constexpr):
    """(b, h, tile of rows) of a program."""
    head, tile, tiles = program_tile(T, BLOCK_T)
    return head // H, head % H, tiles - 1 - tile


@triton.jit
def attend_slots(
    m, norm, acc, q, k, v, bounds, row_blocks, t, b, hk, block, blocks, inner, outer, T, S,
    SLOT: tl.constexpr, PAIR: tl.constexpr, WEIGHTS: tl.constexpr, N: tl.constexpr, SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Fold the keys of slot SLOT (and the next, if PAIR) into (m, norm, acc); without WEIGHTS only into (m, norm)."""
    solid, solids, loose, looses, begin, begin2, first, last, least, most, first2, last2, least2, most2 = walk_of(
        row_blocks, block, blocks, SLOT, PAIR, N, BLOCK_T, BLOCK_S
    )
    # not a bare loop: where it is not entered, registers of acc would be written after it and before the wait for the
    # products of its last step, and ptxas then makes every warpgroup product of the loop wait for the one before
    if solids > 0:
        for i in tl.range(0, solids):
            start, fresh, whole, slot = solid_pair(
                i, solid, first, last, least, most, first2, last2, least2, most2, SLOT, PAIR, BLOCK_T,
                BLOCK_S,
            )  # fmt: skip
            # k, v [BLOCK_S, BLOCK_D]
            keys = load_tile(k, b, hk, start, BLOCK_S, BLOCK_D)
            s = cap(tl.dot(q, keys.T, input_precision=PRECISION), inner, SOFTCAP)
            if not whole:
                low, high = row_span(bounds, t, T, S, slot, N)
                j = start + tl.arange(0, BLOCK_S)
                low = tl.maximum(low, fresh)
                s = tl.where(sees(low[:, None], high[:, None], j[None, :]), s, float("-inf"))
            m, norm, p, alpha = online_softmax(m, norm, s, outer, PRECISION, True)
            if WEIGHTS:
                values = load_tile(v, b, hk, start, BLOCK_S, BLOCK_D)
                acc = tl.dot(p.to(values.dtype), values, acc * alpha[:, None], input_precision=PRECISION)
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
        if WEIGHTS:
            # a value that no row sees may be NaN, and 0 * NaN is NaN; cleaned before s exists, or registers spill
            values = load_tile(v, b, hk, start, BLOCK_S, BLOCK_D)
            values = tl.where(used[:, None] > 0, values, 0.0)
        keys = load_tile(k, b, hk, start, BLOCK_S, BLOCK_D)
        s = cap(tl.dot(q, keys.T, input_precision=PRECISION), inner, SOFTCAP)
        s = tl.where(sees(low[:, None], high[:, None], j[None, :]), s, float("-inf"))
        m, norm, p, alpha = online_softmax(m, norm, s, outer, PRECISION, True)
        if WEIGHTS:
            acc = tl.dot(p.to(values.dtype), values, acc * alpha[:, None], input_precision=PRECISION)
    return m, norm, acc


@triton.jit
def attend_kept(
    m, norm, acc, q, k, v, kept, count, bounds, t, inner, outer, T, S, k_s, v_s,
    SLOT: tl.constexpr, N: tl.constexpr, D: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Fold the listed keys of a KEPT slot into (m, norm, acc), gathered by index: k, v point at one head's [S, D]."""
    begin, end = row_span(bounds, t, T, S, SLOT, N)
    d = tl.arange(0, BLOCK_D)
    for start in tl.range(0, count, BLOCK_S, num_stages=STAGES):
        i = start + tl.arange(0, BLOCK_S)
        j = tl.load(kept + i, mask=i < count, other=-1)
        j = tl.where(j < S, j, -1)
        used = tl.max(((j[:, None] >= 0) & sees(begin[None, :], end[None, :], j[:, None])).to(tl.int32), 1) > 0
        row = j.to(tl.int64)[:, None]
        mask = used[:, None] & (d < D)[None, :]
        values = tl.load(v + row * v_s + d[None, :], mask=mask, other=0.0)
        keys = tl.load(k + row * k_s + d[None, :], mask=mask, other=0.0)
        s = cap(tl.dot(q, keys.T, input_precision=PRECISION), inner, SOFTCAP)
        s = tl.where((j[None, :] >= 0) & sees(begin[:, None], end[:, None], j[None, :]), s, float("-inf"))
        m, norm, p, alpha = online_softmax(m, norm, s, outer, PRECISION)
        acc = tl.dot(p.to(values.dtype), values, acc * alpha[:, None], input_precision=PRECISION)
    return m, norm, acc


@triton.jit(do_not_specialize=["S", "K", "HK"], do_not_specialize_on_alignment=["kept", "kept_count"])
def gather_kept_kernel(
    k, v,  # [B, HK, S, D]
    kept, kept_count,  # int32 [B, HK, K], [B, HK]
    kept_k, kept_v,  # [B, HK, K, D]
    S, K, HK, k_b, k_h, k_s, v_b, v_h, v_s,
    D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The listed rows of k and v side by side, zeros behind them; grid (blocks of the list, B HK)."""
    head = tl.program_id(1).to(tl.int64)
    b, hk = head // HK, head % HK
    i = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    d = tl.arange(0, BLOCK_D)[None, :]
    j = tl.load(kept + head * K + i, mask=i < tl.minimum(tl.load(kept_count + head), K), other=-1)
    row = j.to(tl.int64)[:, None]
    mask = ((j >= 0) & (j < S))[:, None] & (d < D)
    keys = tl.load(k + b * k_b + hk * k_h + row * k_s + d, mask=mask, other=0.0)
    values = tl.load(v + b * v_b + hk * v_h + row * v_s + d, mask=mask, other=0.0)
    to = (head * K + i)[:, None] * D + d
    tl.store(kept_k + to, keys, mask=(i < K)[:, None] & (d < D))
    tl.store(kept_v + to, values, mask=(i < K)[:, None] & (d < D))


@triton.jit
def attend_gathered(
    m, norm, acc, q, kept_k, kept_v, count, b, hk, inner, outer,
    SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Fold the first `count` keys of kept_k, kept_v into (m, norm, acc): every row of the tile sees all of them."""
    # why not a bare loop: see attend_slots
    if count > 0:
        for start in tl.range(0, count, BLOCK_S):
            keys = load_tile(kept_k, b, hk, start, BLOCK_S, BLOCK_D)
            s = cap(tl.dot(q, keys.T, input_precision=PRECISION), inner, SOFTCAP)
            if start + BLOCK_S > count:
                s = tl.where((start + tl.arange(0, BLOCK_S) < count)[None, :], s, float("-inf"))
            m, norm, p, alpha = online_softmax(m, norm, s, outer, PRECISION)
            values = load_tile(kept_v, b, hk, start, BLOCK_S, BLOCK_D)
            acc = tl.dot(p.to(values.dtype), values, acc * alpha[:, None], input_precision=PRECISION)
    return m, norm, acc


@triton.jit
def join_mass(m, norm, acc, m_mass, norm_mass, PRECISION: tl.constexpr):
    """Join a slot whose values are dropped: its mass enters the denominator. Returns its share of the new norm too."""
    m_new = tl.maximum(m, m_mass)
    shift = tl.where(m_new == float("-inf"), 0.0, m_new)
    alpha = power(m - shift, PRECISION)
    mass = norm_mass * power(m_mass - shift, PRECISION)
    return m_new, norm * alpha + mass, acc * alpha[:, None], mass


@triton.jit(
    do_not_specialize=["T", "S", "H", "HK", "TB", "K", "RC", "KC"], do_not_specialize_on_alignment=LISTS
)  # fmt: skip
def span_attention_kernel(
    q, k, v,  # descriptors over [B, H, T, D], [B, HK, S, D] with tiles [1, 1, BLOCK, BLOCK_D]
    k_rows, v_rows,  # the same k, v as pointers, for rows that are gathered
    kept_k, kept_v,  # descriptors over the listed rows [B, HK, K, D], or None
    o,  # [B, H, T, D]
    lse,  # fp32 [B, H, T]
    bounds,  # int32 [B, T, N, 2]
    row_blocks,  # int32 [B, TB, N, 4]
    sink_key,  # int32 [B, N]
    kept, kept_count,  # int32 [B, HK, K], [B, HK]
    key_class, row_class,  # int8 [B, S], [B, T]
    class_rules,  # int8 [RC, KC]
    class_sink,  # int32 [B]
    sink_logits,  # [H]
    inner, outer, T, S, H, HK, TB, K, RC, KC,
    k_b, k_h, k_s, v_b, v_h, v_s, o_b, o_h, o_t,
    N: tl.constexpr, RULES: tl.constexpr, D: tl.constexpr, SOFTCAP: tl.constexpr, SINK_LOGITS: tl.constexpr,
    # 0: no classes, 1: at most 16 a side, 2: more
    CLASSES: tl.constexpr, CLASS_SINK: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    b, h, block = program_rows(H, T, BLOCK_T)
    hk = h // (H // HK)
    wide = b.to(tl.int64)
    t = block * BLOCK_T + tl.arange(0, BLOCK_T)
    bounds += wide * T * N * 2
    row_blocks += wide * TB * N * 4
    # [BLOCK_T, BLOCK_D]
    rows = load_tile(q, b, h, block * BLOCK_T, BLOCK_T, BLOCK_D)
    m = tl.full([BLOCK_T], LOWEST, tl.float32)
    norm = tl.zeros([BLOCK_T], tl.float32)
    acc = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    if CLASSES:
        own_class = class_of(row_class + wide * T, t, T, RC)
        rules = rules_towards(class_rules, own_class * KC, 1, KC, CLASSES == 1)
    for slot in tl.static_range(N):
        if CLASSES:
            count = tl.full([], 0, tl.int32)
            if (RULES >> (2 * slot)) & 3 == 3:
                count = tl.minimum(tl.load(kept_count + b * HK + hk), K)
            to = landing_key(sink_key, class_sink, b, slot, (RULES >> (2 * slot)) & 3, N, CLASS_SINK)
            m, norm, acc = attend_classes(
                m, norm, acc, rows, k_rows + wide * k_b + hk * k_h, v_rows + wide * v_b + hk * v_h,
                kept + (wide * HK + hk) * K, count, bounds, row_blocks, class_rules, rules, key_class + wide * S, to,
                t, block, TB, inner, outer, T, S, KC, k_s, v_s, slot, (RULES >> (2 * slot)) & 3, N, D, CLASSES == 1,
                SOFTCAP, PRECISION, BLOCK_T, BLOCK_S, BLOCK_D,
            )  # fmt: skip
        elif (RULES >> (2 * slot)) & 3 == 0:
            # an even slot takes an ATTEND neighbour along; the odd one then has nothing left to do
            if slot % 2 == 0 or (RULES >> (2 * slot - 2)) & 3 != 0:
                m, norm, acc = attend_slots(
                    m, norm, acc, rows, k, v, bounds, row_blocks, t, b, hk, block, TB, inner, outer, T, S,
                    slot, slot % 2 == 0 and slot + 1 < N and (RULES >> (2 * slot + 2)) & 3 == 0, True, N, SOFTCAP,
                    PRECISION, BLOCK_T, BLOCK_S, BLOCK_D,
                )  # fmt: skip
        elif (RULES >> (2 * slot)) & 3 == 3:
            count = tl.minimum(tl.load(kept_count + b * HK + hk), K)
            at = (wide * HK + hk) * K
            if kept_k is not None:
                # most rows see the whole list, which ascends
                low, length, most_begin, least_end = slot_hull(row_blocks, block, TB, slot, N, BLOCK_T)
                first = tl.load(kept + at, mask=count > 0, other=-1)
                last = tl.load(kept + at + count - 1, mask=count > 0, other=S)
                whole = (first >= most_begin) & (last < least_end)
                m, norm, acc = attend_gathered(
                    m, norm, acc, rows, kept_k, kept_v, tl.where(whole, count, 0), b, hk, inner, outer,
                    SOFTCAP, PRECISION, BLOCK_S, BLOCK_D,
                )  # fmt: skip
                count = tl.where(whole, 0, count)
            m, norm, acc = attend_kept(
                m, norm, acc, rows, k_rows + wide * k_b + hk * k_h, v_rows + wide * v_b + hk * v_h, kept + at, count,
                bounds, t, inner, outer, T, S, k_s, v_s, slot, N, D, SOFTCAP, PRECISION, BLOCK_S, BLOCK_D,
                None if kept_k is None else 1,
            )  # fmt: skip
        else:
            m_mass, norm_mass, _ = attend_slots(
                tl.full([BLOCK_T], LOWEST, tl.float32), tl.zeros([BLOCK_T], tl.float32), acc,
                rows, k, v, bounds, row_blocks, t, b, hk, block, TB, inner, outer, T, S,
                slot, False, False, N, SOFTCAP, PRECISION, BLOCK_T, BLOCK_S, BLOCK_D,
            )  # fmt: skip
            m, norm, acc, mass = join_mass(m, norm, acc, m_mass, norm_mass, PRECISION)
            if (RULES >> (2 * slot)) & 3 == 2:
                key = tl.load(sink_key + b * N + slot)
                d = tl.arange(0, BLOCK_D)
                there = (key >= 0) & (key < S) & (d < D)
                value = tl.load(v_rows + wide * v_b + hk * v_h + key.to(tl.int64) * v_s + d, mask=there, other=0.0).to(
                    tl.float32
                )
                acc += tl.where(mass[:, None] > 0, mass[:, None] * value[None, :], 0.0)
    nothing = norm == 0
    total = tl.where(nothing, 1.0, norm)
    if SINK_LOGITS:
        shift = tl.where(nothing, 0.0, m)
        total += power(from_natural(tl.load(sink_logits + h).to(tl.float32), PRECISION) - shift, PRECISION)
    d = tl.arange(0, BLOCK_D)[None, :]
    at = o + wide * o_b + h * o_h + t.to(tl.int64)[:, None] * o_t + d
    tl.store(at, (acc / total[:, None]).to(o.dtype.element_ty), mask=(t < T)[:, None] & (d < D))
    natural = tl.where(nothing, float("-inf"), natural_log(m, tl.where(nothing, 1.0, norm), PRECISION))
    tl.store(lse + (wide * H + h) * T + t, natural, mask=t < T)
