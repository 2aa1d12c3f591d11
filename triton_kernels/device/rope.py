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
