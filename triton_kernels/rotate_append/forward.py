"""rotate_append: rotate new keys by their own positions and write k, v to the segment that each row's role names.

Grid (row tiles * HK, B), the heads of a tile side by side, so that cos and sin are read from HBM once (apart in
the grid they were read once per head: 0.68 instead of 0.9 of copy bandwidth at HK=4, 256 MB on an H200). Memory-bound:
every byte of k, v is read once and written once.
"""

import triton
import triton.language as tl

from ..device.cache import count_roles, slot, sum_counts
from ..device.rope import rotate_halves, rotate_interleaved


@triton.jit
def store_rows(
    source,
    target,
    source_offset,
    target_offset,
    x,
    mask,
    is_source,
    HAS_ROLE: tl.constexpr,
    SEGMENT: tl.constexpr,
):
    """Store tile x [BLOCK_T, n] at the offsets of each row's own segment: in a mixed call the address is chosen, so
    that there is one store, not two of which each writes about half."""
    if HAS_ROLE:
        at = tl.where(is_source, source + source_offset, target + target_offset)
    elif SEGMENT == 0:
        at = source + source_offset
    else:
        at = target + target_offset
    tl.store(at, x.to(source.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["T", "chunks"])
def count_chunks_kernel(role, counts, T, chunks, role_b, role_t, COUNT: tl.constexpr):
    """counts int32 [B, chunks, 2]: source and target rows of each chunk of COUNT rows; grid (chunks, B).

    Only for mixed calls longer than COUNT: a program of the main kernel then reads one chunk of roles, not all that
    stand before it.
    """
    b = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0) * COUNT
    sources, targets = count_roles(role + b * role_b, start, T, role_t, COUNT)
    at = counts + (b * chunks + tl.program_id(0)) * 2
    tl.store(at, sources)
    tl.store(at + 1, targets)


@triton.jit(do_not_specialize=["T", "HK", "source_capacity", "target_capacity", "sinks"])
def rotate_append_kernel(
    k, v,  # [B, HK, T, D]
    cos, sin,  # [B or 1, T, ROTARY / 2]
    source_k, source_v,  # [B, HK, source_capacity, D]
    target_k, target_v,  # [B, HK, target_capacity, D]
    length,  # int32 [B, 2]
    status,  # int32 [1]
    role,  # int8 [B, T]
    counts,  # int32 [B, ceil(T / COUNT), 2], for mixed calls longer than COUNT
    T, HK, source_capacity, target_capacity, sinks,
    k_b, k_h, k_t, v_b, v_h, v_t,
    cos_b, cos_t, sin_b, sin_t,
    sk_b, sk_h, sk_t, sv_b, sv_h, sv_t,
    tk_b, tk_h, tk_t, tv_b, tv_h, tv_t,
    length_b, length_r, role_b, role_t,
    D: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, BOUNDED: tl.constexpr,
    HAS_ROLE: tl.constexpr, HAS_COUNTS: tl.constexpr, SEGMENT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr, BLOCK_D: tl.constexpr,
    COUNT: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    head = (tl.program_id(0) % HK).to(tl.int64)
    start = (tl.program_id(0) // HK) * BLOCK_T
    t = start + tl.arange(0, BLOCK_T)
    row = t.to(tl.int64)[:, None]
    inside = t < T

    # all loads come before the roles are counted, which they need not wait for
    if HAS_ROLE:
        r = tl.load(role + b * role_b + t.to(tl.int64) * role_t, mask=inside, other=-1)
    here = inside[:, None]
    half = tl.arange(0, BLOCK_HALF)[None, :]
    pair = tl.arange(0, 2 * BLOCK_HALF)[None, :]
    upper = half + ROTARY // 2
    rest = ROTARY + tl.arange(0, BLOCK_REST)[None, :]
    d = tl.arange(0, BLOCK_D)[None, :]
    from_k = k + b * k_b + head * k_h + row * k_t
    from_v = v + b * v_b + head * v_h + row * v_t
    # [BLOCK_T, D]
    values = tl.load(from_v + d, mask=here & (d < D), other=0.0)
    if ROTARY > 0:
        angles = here & (half < ROTARY // 2)
        if INTERLEAVED:
            x = tl.load(from_k + pair, mask=here & (pair < ROTARY), other=0.0)
        else:
            x = tl.load(from_k + half, mask=angles, other=0.0)
            y = tl.load(from_k + upper, mask=angles, other=0.0)
        c = tl.load(cos + b * cos_b + row * cos_t + half, mask=angles, other=0.0).to(tl.float32)
        s = tl.load(sin + b * sin_b + row * sin_t + half, mask=angles, other=0.0).to(tl.float32)
    if ROTARY < D:
        z = tl.load(from_k + rest, mask=here & (rest < D), other=0.0)

    # the index of each row in its segment: committed length + earlier rows of its role in this call
    if HAS_ROLE:
        is_source, is_target = r == 0, r == 1
        chunk = start // COUNT
        before_source, before_target = 0, 0
        if HAS_COUNTS:
            before_source, before_target = sum_counts(counts + b * tl.cdiv(T, COUNT) * 2, chunk, 64)
        sources, targets = count_roles(role + b * role_b, chunk * COUNT, start, role_t, COUNT)
        before_source += sources
        before_target += targets
        source_rank = before_source + tl.cumsum(is_source.to(tl.int32), 0) - 1
        target_rank = before_target + tl.cumsum(is_target.to(tl.int32), 0) - 1
    else:
        is_source, is_target = inside & (SEGMENT == 0), inside & (SEGMENT == 1)
        source_rank, target_rank = t, t
    source_index = tl.load(length + b * length_b).to(tl.int64) + source_rank
    target_index = tl.load(length + b * length_b + length_r).to(tl.int64) + target_rank
    source_slot = slot(source_index, source_capacity, sinks, BOUNDED)
    target_slot = slot(target_index, target_capacity, sinks, BOUNDED)
    to_source = is_source & (source_slot >= 0) & (source_slot < source_capacity)
    to_target = is_target & (target_slot >= 0) & (target_slot < target_capacity)
    full = tl.max((is_source & ~to_source).to(tl.int32), 0) + 2 * tl.max((is_target & ~to_target).to(tl.int32), 0)
    if full > 0:
        tl.atomic_or(status, full)
    written = (to_source | to_target)[:, None]
    to_source = to_source[:, None]

    at_sk = b * sk_b + head * sk_h + source_slot[:, None] * sk_t
    at_tk = b * tk_b + head * tk_h + target_slot[:, None] * tk_t
    at_sv = b * sv_b + head * sv_h + source_slot[:, None] * sv_t + d
    at_tv = b * tv_b + head * tv_h + target_slot[:, None] * tv_t + d
    store_rows(source_v, target_v, at_sv, at_tv, values, written & (d < D), to_source, HAS_ROLE, SEGMENT)
    # fmt: off
    if ROTARY > 0:
        if INTERLEAVED:
            x = rotate_interleaved(x.to(tl.float32), c, s, BLOCK_T, BLOCK_HALF)
            store_rows(source_k, target_k, at_sk + pair, at_tk + pair, x, written & (pair < ROTARY), to_source,
                       HAS_ROLE, SEGMENT)
        else:
            x, y = rotate_halves(x.to(tl.float32), y.to(tl.float32), c, s)
            mask = written & (half < ROTARY // 2)
            store_rows(source_k, target_k, at_sk + half, at_tk + half, x, mask, to_source, HAS_ROLE, SEGMENT)
            store_rows(source_k, target_k, at_sk + upper, at_tk + upper, y, mask, to_source, HAS_ROLE, SEGMENT)
    if ROTARY < D:
        store_rows(source_k, target_k, at_sk + rest, at_tk + rest, z, written & (rest < D), to_source, HAS_ROLE,
                   SEGMENT)
    # fmt: on
