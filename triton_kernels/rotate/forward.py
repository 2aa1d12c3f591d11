"""rotate: RoPE of a tensor of heads into a new one; its gradient is the same kernel with -sin.

Grid (row tiles * H, B), the heads of a tile side by side, so that cos and sin are read from HBM once. Memory-bound:
every byte of x is read once and written once.
"""

import triton
import triton.language as tl

from ..device.rope import load_angles, rotate_rows


@triton.jit(do_not_specialize=["T", "H", "cos_b", "cos_t", "sin_b", "sin_t"])
def rotate_kernel(
    x, out,  # [B, H, T, D]
    cos, sin,  # [B or 1, T, ROTARY / 2]
    T, H,
    x_b, x_h, x_t, out_b, out_h, out_t, cos_b, cos_t, sin_b, sin_t,
    STEP: tl.constexpr,  # what the strides of cos and sin count
    D: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    h = (tl.program_id(0) % H).to(tl.int64)
    t = (tl.program_id(0) // H) * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = t < T
    row = t.to(tl.int64)[:, None]
    c = load_angles(cos, b, t, cos_b, cos_t, inside, STEP, ROTARY, BLOCK_HALF)
    s = load_angles(sin, b, t, sin_b, sin_t, inside, STEP, ROTARY, BLOCK_HALF)
    rotate_rows(
        x + b * x_b + h * x_h + row * x_t, out + b * out_b + h * out_h + row * out_t, c, s, inside,
        D, ROTARY, INTERLEAVED, False, BLOCK_T, BLOCK_HALF, BLOCK_REST,
    )  # fmt: skip
