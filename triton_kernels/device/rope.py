"""Rotary position embedding on tiles: fp32 arithmetic, one rounding (by the caller's store)."""

import triton
import triton.language as tl


@triton.jit
def rotate_halves(first, second, cos, sin):
    """Half rotation (Llama, Qwen): `first` holds dims [0, rotary_dim / 2), `second` the rest of the rotary dims.

    All four are fp32 tiles [BLOCK_T, rotary_dim / 2]. RoFormer (arXiv 2104.09864) eq. 34, with the pairs (d, d +
    rotary_dim / 2).
    """
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def rotate_interleaved(x, cos, sin, BLOCK_T: tl.constexpr, BLOCK_HALF: tl.constexpr):
    """Interleaved rotation (GLM, Cohere): pairs (2 d, 2 d + 1) of an fp32 tile [BLOCK_T, 2 * BLOCK_HALF]."""
    even, odd = tl.split(tl.reshape(x, [BLOCK_T, BLOCK_HALF, 2]))
    rotated = tl.join(even * cos - odd * sin, odd * cos + even * sin)
    return tl.reshape(rotated, [BLOCK_T, 2 * BLOCK_HALF])


@triton.jit
def load_angles(table, b, row, stride_b, stride_t, inside, STEP: tl.constexpr, ROTARY: tl.constexpr,
                BLOCK_HALF: tl.constexpr):  # fmt: skip
    """fp32 [BLOCK_T, BLOCK_HALF] of cos or sin [B or 1, T, ROTARY / 2]; `row` [BLOCK_T]. Strides count STEP elements:
    they are not specialised, since one of them grows with the length, and this is what a load may know of them."""
    half = tl.arange(0, BLOCK_HALF)[None, :]
    at = table + b * stride_b * STEP + row.to(tl.int64)[:, None] * stride_t * STEP + half
    return tl.load(at, mask=inside[:, None] & (half < ROTARY // 2), other=0.0).to(tl.float32)


@triton.jit
def rotate_rows(
    source, target, cos, sin, inside, D: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr,
    IN_PLACE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """Write the rows at pointers `source` [BLOCK_T, 1], rotated by fp32 tiles cos, sin [BLOCK_T, BLOCK_HALF], to
    `target`; dims from ROTARY on are copied, unless IN_PLACE."""
    inside = inside[:, None]
    if INTERLEAVED:
        pair = tl.arange(0, 2 * BLOCK_HALF)[None, :]
        mask = inside & (pair < ROTARY)
        x = tl.load(source + pair, mask=mask, other=0.0).to(tl.float32)
        x = rotate_interleaved(x, cos, sin, BLOCK_T, BLOCK_HALF)
        if IN_PLACE:
            # the thread that stores an element need not be the only one that loaded it
            tl.debug_barrier()
        tl.store(target + pair, x.to(target.dtype.element_ty), mask=mask)
    else:
        half = tl.arange(0, BLOCK_HALF)[None, :]
        mask = inside & (half < ROTARY // 2)
        first = tl.load(source + half, mask=mask, other=0.0).to(tl.float32)
        second = tl.load(source + half + ROTARY // 2, mask=mask, other=0.0).to(tl.float32)
        first, second = rotate_halves(first, second, cos, sin)
        if IN_PLACE:
            tl.debug_barrier()
        tl.store(target + half, first.to(target.dtype.element_ty), mask=mask)
        tl.store(target + half + ROTARY // 2, second.to(target.dtype.element_ty), mask=mask)
    if ROTARY < D and not IN_PLACE:
        rest = ROTARY + tl.arange(0, BLOCK_REST)[None, :]
        mask = inside & (rest < D)
        tl.store(target + rest, tl.load(source + rest, mask=mask, other=0.0), mask=mask)


@triton.jit
def load_rotated(
    x, cos, sin, mask,
    D: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_D: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """Rows rotated by their angles (BACK: by the negative angles) -> fp32 [ROWS, BLOCK_D], zeros beyond D.

    x, cos, sin: pointers [ROWS, 1] to each row's begin; mask: bool [ROWS, 1]. Of partial rotary dims the rest is passed
    through.
    """
    ROWS: tl.constexpr = x.shape[0]
    HALF: tl.constexpr = BLOCK_D // 2
    d = tl.arange(0, BLOCK_D)[None, :]
    half = tl.arange(0, HALF)[None, :]
    if ROTARY == 0:
        return tl.load(x + d, mask=mask & (d < D), other=0.0).to(tl.float32)
    elif INTERLEAVED:
        # pairs beyond the rotary dims turn by no angle
        turns = mask & (half < ROTARY // 2)
        c = tl.load(cos + half, mask=turns, other=1.0).to(tl.float32)
        s = tl.load(sin + half, mask=turns, other=0.0).to(tl.float32)
        s = -s if BACK else s
        rows = tl.load(x + d, mask=mask & (d < D), other=0.0).to(tl.float32)
        return rotate_interleaved(rows, c, s, ROWS, HALF)
    elif ROTARY == BLOCK_D:
        c = tl.load(cos + half, mask=mask, other=1.0).to(tl.float32)
        s = tl.load(sin + half, mask=mask, other=0.0).to(tl.float32)
        s = -s if BACK else s
        first = tl.load(x + half, mask=mask, other=0.0).to(tl.float32)
        second = tl.load(x + half + HALF, mask=mask, other=0.0).to(tl.float32)
        first, second = rotate_halves(first, second, c, s)
        return tl.reshape(tl.permute(tl.join(first, second), (0, 2, 1)), [ROWS, BLOCK_D])
    else:
        # pairs that straddle the padded tile: every dim looks for its partner
        turns = mask & (d < ROTARY)
        lower = d < ROTARY // 2
        c = tl.load(cos + tl.where(lower, d, d - ROTARY // 2), mask=turns, other=1.0).to(tl.float32)
        s = tl.load(sin + tl.where(lower, d, d - ROTARY // 2), mask=turns, other=0.0).to(tl.float32)
        s = tl.where(lower, s, -s) if BACK else tl.where(lower, -s, s)
        rows = tl.load(x + d, mask=mask & (d < D), other=0.0).to(tl.float32)
        partner = tl.load(x + tl.where(lower, d + ROTARY // 2, d - ROTARY // 2), mask=turns, other=0.0).to(tl.float32)
        return rows * c + partner * s
