"""span_attention under a class table: every tile needs a mask, so one plain loop serves spans and kept lists alike.

A slot and a class each say what becomes of a key: the table of core/span_table.py. Keys are read by pointers, and only
those that some row of the tile needs, so that keys and values which nobody sees may hold anything.
"""

import triton
import triton.language as tl

from ..device.classes import class_of, rule_between
from ..device.softmax import cap, online_softmax, power
from ..device.spans import row_span, sees, slot_hull


@triton.jit
def landing_key(sink_key, class_sink, b, SLOT: tl.constexpr, RULE: tl.constexpr, N: tl.constexpr,
                CLASS_SINK: tl.constexpr):  # fmt: skip
    """The key that a slot's moved mass lands on, or -1: its own sink in a SINK slot, the classes' where keys attend."""
    key = tl.full([], -1, tl.int32)
    if RULE == 2:
        key = tl.load(sink_key + b * N + SLOT)
    elif RULE != 1 and CLASS_SINK:
        key = tl.load(class_sink + b)
    return key


@triton.jit
def value_of(v, key, v_s, S, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """fp32 [BLOCK_D]: the value of one key of one head v [S, D], 0 for a key outside."""
    d = tl.arange(0, BLOCK_D)
    there = (key >= 0) & (key < S) & (d < D)
    return tl.load(v + key.to(tl.int64) * v_s + d, mask=there, other=0.0).to(tl.float32)


@triton.jit
def slot_keys(kept, count, row_blocks, block, blocks, SLOT: tl.constexpr, RULE: tl.constexpr, N: tl.constexpr,
              BLOCK_T: tl.constexpr):  # fmt: skip
    """(first key, number of keys or list entries) that a slot may show to a tile of rows."""
    if RULE == 3:
        return tl.full([], 0, tl.int32), count
    else:
        begin, length, _, _ = slot_hull(row_blocks, block, blocks, SLOT, N, BLOCK_T)
        return begin, length


@triton.jit
def key_tile(kept, count, begin, start, S, RULE: tl.constexpr, BLOCK_S: tl.constexpr):
    """int32 [BLOCK_S]: the keys of one step, -1 where there is none."""
    i = start + tl.arange(0, BLOCK_S)
    if RULE == 3:
        j = tl.load(kept + i, mask=i < count, other=-1)
    else:
        j = begin + i
    return tl.where(j < S, j, -1)


@triton.jit
def moves(rule, RULE: tl.constexpr):
    """Whether a visible key's mass goes to the key of `landing_key`: never from a MASS slot."""
    if RULE == 2:
        return rule != 1
    elif RULE == 1:
        return rule > 3
    else:
        return rule == 2


@triton.jit
def attend_classes(
    m, norm, acc, q, k, v, kept, count, bounds, row_blocks, class_rules, rules, key_class, to,
    t, block, blocks, inner, outer, T, S, KC, k_s, v_s,
    SLOT: tl.constexpr, RULE: tl.constexpr, N: tl.constexpr, D: tl.constexpr, PACKED: tl.constexpr,
    SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Fold the keys of slot SLOT into (m, norm, acc): k, v, kept point at one head; `rules` [BLOCK_T] of the rows
    towards classes of keys; `to`: the key that moved mass lands on."""
    begin, length = slot_keys(kept, count, row_blocks, block, blocks, SLOT, RULE, N, BLOCK_T)
    low, high = row_span(bounds, t, T, S, SLOT, N)
    d = tl.arange(0, BLOCK_D)
    moved = tl.zeros([BLOCK_T], tl.float32)
    for start in tl.range(0, length, BLOCK_S):
        j = key_tile(kept, count, begin, start, S, RULE, BLOCK_S)
        other = class_of(key_class, j, S, KC)
        row = j.to(tl.int64)[:, None]
        if RULE == 0 or RULE == 3:
            own = rule_between(class_rules, rules[None, :], other[:, None], 1, PACKED) == 0
            own = own & (j >= 0)[:, None] & sees(low[None, :], high[None, :], j[:, None])
            mask = (tl.max(own.to(tl.int32), 1) > 0)[:, None] & (d < D)[None, :]
            values = tl.load(v + row * v_s + d[None, :], mask=mask, other=0.0)
        keys = tl.load(k + row * k_s + d[None, :], mask=(j >= 0)[:, None] & (d < D)[None, :], other=0.0)
        s = cap(tl.dot(q, keys.T, input_precision=PRECISION), inner, SOFTCAP)
        rule = rule_between(class_rules, rules[:, None], other[None, :], 1, PACKED)
        seen = (rule != 3) & (j >= 0)[None, :] & sees(low[:, None], high[:, None], j[None, :])
        m, norm, p, alpha = online_softmax(m, norm, tl.where(seen, s, float("-inf")), outer, PRECISION)
        acc *= alpha[:, None]
        moved = moved * alpha + tl.sum(tl.where(moves(rule, RULE), p, 0.0), 1)
        if RULE == 0 or RULE == 3:
            p = tl.where(rule == 0, p, 0.0)
            acc = tl.dot(p.to(values.dtype), values, acc, input_precision=PRECISION)
    value = value_of(v, to, v_s, S, D, BLOCK_D)
    return m, norm, acc + tl.where(moved[:, None] > 0, moved[:, None] * value[None, :], 0.0)


@triton.jit
def dq_classes(
    acc, q, do, k, v, kept, count, bounds, row_blocks, class_rules, rules, key_class, to, total, delta,
    t, block, blocks, inner, outer, T, S, KC, k_s, v_s,
    SLOT: tl.constexpr, RULE: tl.constexpr, N: tl.constexpr, D: tl.constexpr, PACKED: tl.constexpr,
    SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dq's share of slot SLOT, and the mass [BLOCK_T] that it moved to the key `to`."""
    begin, length = slot_keys(kept, count, row_blocks, block, blocks, SLOT, RULE, N, BLOCK_T)
    low, high = row_span(bounds, t, T, S, SLOT, N)
    d = tl.arange(0, BLOCK_D)
    sunk = tl.sum(do.to(tl.float32) * value_of(v, to, v_s, S, D, BLOCK_D)[None, :], 1)
    mass = tl.zeros([BLOCK_T], tl.float32)
    for start in tl.range(0, length, BLOCK_S):
        j = key_tile(kept, count, begin, start, S, RULE, BLOCK_S)
        other = class_of(key_class, j, S, KC)
        row = j.to(tl.int64)[:, None]
        rule = rule_between(class_rules, rules[None, :], other[:, None], 1, PACKED)
        used = (rule != 3) & (j >= 0)[:, None] & sees(low[None, :], high[None, :], j[:, None])
        mask = (tl.max(used.to(tl.int32), 1) > 0)[:, None] & (d < D)[None, :]
        keys = tl.load(k + row * k_s + d[None, :], mask=mask, other=0.0)
        s = cap(tl.dot(q, keys.T, input_precision=PRECISION), inner, SOFTCAP)
        rule = rule_between(class_rules, rules[:, None], other[None, :], 1, PACKED)
        seen = (rule != 3) & (j >= 0)[None, :] & sees(low[:, None], high[:, None], j[None, :])
        p = tl.where(seen, power(s * outer - total[:, None], PRECISION), 0.0)
        moved = tl.where(moves(rule, RULE), p, 0.0)
        mass += tl.sum(moved, 1)
        # the value of a sink that a row does not use may be NaN
        ds = tl.where(moved > 0, moved * sunk[:, None], 0.0) - p * delta[:, None]
        if RULE == 0 or RULE == 3:
            values = tl.load(v + row * v_s + d[None, :], mask=mask, other=0.0)
            dp = tl.dot(do, values.T, input_precision=PRECISION)
            # a value that no row attends to may be NaN
            ds += tl.where((rule == 0) & (p > 0), p * dp, 0.0)
        if SOFTCAP:
            ds *= 1.0 - s * s
        acc = tl.dot(ds.to(keys.dtype), keys, acc, input_precision=PRECISION)
    return acc, mass
