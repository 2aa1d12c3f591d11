"""What users of one-segment attention would write themselves to attend over two: rotate q, and join two partial
results, each in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _rotate_kernel(x, out, cos, sin, T, H, x_b, x_t, x_h, o_b, o_t, o_h, c_b, HALF: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    b, t = row // T, row % T
    head = tl.arange(0, BLOCK)[:, None] + tl.program_id(1) * BLOCK
    d = tl.arange(0, HALF)[None, :]
    here = head < H
    first = tl.load(x + b * x_b + t * x_t + head * x_h + d, mask=here).to(tl.float32)
    second = tl.load(x + b * x_b + t * x_t + head * x_h + d + HALF, mask=here).to(tl.float32)
    c = tl.load(cos + b * c_b + t * HALF + d).to(tl.float32)
    s = tl.load(sin + b * c_b + t * HALF + d).to(tl.float32)
    to = out + b * o_b + t * o_t + head * o_h + d
    tl.store(to, first * c - second * s, mask=here)
    tl.store(to + HALF, second * c + first * s, mask=here)


@triton.jit
def _merge_kernel(a, lse_a, b, lse_b, out, T, H, a_b, a_t, b_b, b_t, o_b, o_t, la_b, lb_b, D: tl.constexpr):
    row = tl.program_id(0)
    batch, t, h = row // (T * H), row // H % T, row % H
    d = tl.arange(0, D)
    at = h * T + t
    la, lb = tl.load(lse_a + batch * la_b + at), tl.load(lse_b + batch * lb_b + at)
    top = tl.maximum(la, lb)
    wa, wb = tl.exp(la - top), tl.exp(lb - top)
    part_a = tl.load(a + batch * a_b + t * a_t + h * D + d).to(tl.float32)
    part_b = tl.load(b + batch * b_b + t * b_t + h * D + d).to(tl.float32)
    tl.store(out + batch * o_b + t * o_t + h * D + d, (wa * part_a + wb * part_b) / (wa + wb))


def rotate_rows(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, T, H, D] rotated in half pairs by cos, sin [B or 1, T, D / 2] -> a contiguous [B, T, H, D]."""
    B, T, H, D = x.shape
    out = torch.empty((B, T, H, D), dtype=x.dtype, device=x.device)
    angles = 0 if cos.shape[0] == 1 else cos.stride(0)
    _rotate_kernel[(B * T, triton.cdiv(H, 8))](
        x, out, cos, sin, T, H, *x.stride()[:3], *out.stride()[:3], angles, HALF=D // 2, BLOCK=8, num_warps=4
    )
    return out


def merge_two(a: Tensor, lse_a: Tensor, b: Tensor, lse_b: Tensor, out: Tensor) -> Tensor:
    """Attention over two disjoint key sets from each one's own: a, b, out [B, T, H, D], lse fp32 [B, H, T]; rows of
    heads are contiguous, the batch may be strided; `out` may be `b`."""
    B, T, H, D = a.shape
    _merge_kernel[(B * T * H,)](
        a, lse_a, b, lse_b, out, T, H, *a.stride()[:2], *b.stride()[:2], *out.stride()[:2],
        lse_a.stride(0), lse_b.stride(0), D=D, num_warps=1,
    )  # fmt: skip
    return out
