"""`reanchor`: checks, the choice of a backend, and the call."""

from __future__ import annotations

import torch
from torch import Tensor

from ...backends.select import Call, choose
from ...core.chunk import check_angles, check_heads
from ...core.shapes import Shapes, refuse
from .schema import OP


def reanchor(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False, backend: str = "auto") -> None:
    """Rotate cached keys **in place** by a difference of positions: the key of position p becomes the key of p + delta.

    Rotations of a plane add up, so one more rotation is exact up to its one rounding (RoFormer, Su et al., arXiv
    2104.09864, eq. 34). It must be a pure rotation: a scale that the model puts into cos and sin (YaRN) is already in
    the key, and `Rotary.reanchor_cos_sin(delta)` leaves it out. `StreamCache.reanchor` does this for whole segments;
    this is the op for a buffer, or a slice of one, that the caller holds, and it does not touch a cache's epoch.

    Args:
        x: rotated keys [B, HK, S, D], bf16, fp16, fp32 (fp64: reference), any strides, last stride 1; overwritten. No
            gradient.
        cos, sin: [B or 1, S or 1, rotary_dim / 2] of delta, fp32 or x's dtype, rotary_dim <= D; one row moves all keys
            alike.
        interleaved: pairs are (2i, 2i + 1) instead of (i, i + rotary_dim / 2).
        backend: "auto", "reference", "triton" or "cuda".

    Raises TypeError or ValueError for arguments that do not fit, ValueError for an x that requires a gradient,
    NotImplementedError for a named backend that cannot run the call; x is unchanged then.
    """
    shapes = Shapes(OP)
    check_heads(shapes, "x", x)
    if x.requires_grad and torch.is_grad_enabled():
        refuse(OP, "x", "keys without a gradient, to change in place", "x with requires_grad")
    if isinstance(cos, Tensor) and cos.dim() == 3 and cos.shape[1] == 1:
        shapes.sizes["T"] = 1
    for name, angle in (("cos", cos), ("sin", sin)):
        shapes.tensor(name, angle, "1|B T A")
    check_angles(shapes, cos, sin, x.dtype)
    features = frozenset({"interleaved"} if interleaved else ())
    chosen = choose(Call(OP, x.device, x.dtype, dict(shapes.sizes), features), backend)
    torch.ops.streamkernels.reanchor(x, cos, sin, interleaved, chosen)
