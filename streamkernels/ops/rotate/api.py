"""`rotate`: checks, the choice of a backend, and the call."""

from __future__ import annotations

import torch
from torch import Tensor

from ...backends.select import Call, choose
from ...core.chunk import check_angles, check_heads
from ...core.shapes import Shapes
from . import autograd as autograd
from .schema import OP


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False, backend: str = "auto") -> Tensor:
    """Rotary position embedding (RoFormer, Su et al., arXiv 2104.09864, eq. 34): turn each pair of a head by its row's
    angle.

    A pair (a, b) becomes (a cos - b sin, b cos + a sin). Pairs are (i, i + rotary_dim / 2), as in Llama and Qwen, or
    (2i, 2i + 1) if `interleaved`. Head dims from rotary_dim on pass through.

    Args:
        x: queries or keys [B, H, T, D], bf16, fp16, fp32 (fp64: reference), any strides, last stride 1; D a multiple of
            8 up to 256.
        cos, sin: [B or 1, T, rotary_dim / 2], fp32 or x's dtype, rotary_dim <= D; `Rotary.cos_sin` makes them.
            Constants.
        backend: "auto", "reference", "triton" or "cuda".

    Returns a new contiguous tensor of x's shape and dtype: fp32 arithmetic, one rounding. Differentiable in x, any
    number of times.

    Raises TypeError or ValueError for arguments that do not fit, NotImplementedError for angles that require a gradient
    and for a named backend that cannot run the call. Nothing is mutated.
    """
    shapes = Shapes(OP)
    check_heads(shapes, "x", x)
    for name, angle in (("cos", cos), ("sin", sin)):
        shapes.tensor(name, angle, "1|B T A")
    check_angles(shapes, cos, sin, x.dtype)
    features = frozenset({"interleaved"} if interleaved else ())
    chosen = choose(Call(OP, x.device, x.dtype, dict(shapes.sizes), features), backend)
    rotated: Tensor = torch.ops.streamkernels.rotate(x, cos, sin, interleaved, chosen)
    return rotated
