"""Rules by class on tiles: what the table says of a row and a key (core/span_table.py).

A rule is two bits: 0 ATTEND, 1 MASS, 2 SINK, 3 SKIP. The rules of one row towards all classes of keys (or of one key
towards all classes of rows) fit into 32 bits when there are at most 16 classes; larger tables are read entry by entry.
"""

import triton
import triton.language as tl


@triton.jit
def class_of(classes, i, length, count):
    """int32: the classes of rows or keys i, clamped into the table: classes int8 [length] of one sample."""
    c = tl.load(classes + i, mask=(i >= 0) & (i < length), other=0).to(tl.int32)
    return tl.minimum(tl.maximum(c, 0), count - 1)


@triton.jit
def rules_towards(table, first, step, count, PACKED: tl.constexpr):
    """What `rule_between` needs of one side, int32 shaped as `first`: its rules towards `count` classes, which are the
    table's entries first, first + step, ...; packed into bits, or where they begin."""
    if PACKED:
        rules = tl.zeros(first.shape, tl.int32)
        for c in range(count):
            rules |= (tl.load(table + first + c * step).to(tl.int32) & 3) << (2 * c)
        return rules
    else:
        return first


@triton.jit
def rule_between(table, rules, others, step, PACKED: tl.constexpr):
    """int32: the rule of each pair; `rules` of one side, classes `others` of the other, broadcast."""
    if PACKED:
        return (rules >> (2 * others)) & 3
    else:
        return tl.load(table + rules + others * step).to(tl.int32) & 3
