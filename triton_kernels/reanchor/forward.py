"""reanchor: rotate cached keys in place by a difference of positions; dims that do not rotate are not touched.

Grid (row tiles * HK, B). Every program reads and writes rows of its own.
"""

import triton
import triton.language as tl

from ..device.rope import load_angles, rotate_rows


@triton.jit(do_not_specialize=["S", "HK", "cos_b", "cos_t", "sin_b", "sin_t"])
def reanchor_kernel(
    x,  # [B, HK, S, D]
    cos, sin,  # [B or 1, S or 1, ROTARY / 2]
    S, HK,
    x_b, x_h, x_s, cos_b, cos_t, sin_b, sin_t,
    STEP: tl.constexpr,  # what the strides of cos and sin count
    ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    h = (tl.program_id(0) % HK).to(tl.int64)
    j = (tl.program_id(0) // HK) * BLOCK_S + tl.arange(0, BLOCK_S)
    inside = j < S
    c = load_angles(cos, b, j, cos_b, cos_t, inside, STEP, ROTARY, BLOCK_HALF)
    s = load_angles(sin, b, j, sin_b, sin_t, inside, STEP, ROTARY, BLOCK_HALF)
    rows = x + b * x_b + h * x_h + j.to(tl.int64)[:, None] * x_s
    rotate_rows(rows, rows, c, s, inside, ROTARY, ROTARY, INTERLEAVED, True, BLOCK_S, BLOCK_HALF, 1)
