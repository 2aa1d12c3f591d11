"""`merge_partials`: plain differentiable PyTorch on every device, so neither schema nor backends."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...core.shapes import FLOATS, Shapes, refuse
from ...reference.merge_partials import merge_partials as reference

OP = "merge_partials"


def merge_partials(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Join attention over disjoint key sets into the attention over their union.

    Args:
        parts: at least one (o [B, H, T, D], lse [B, H, T]) as `span_attention(..., return_lse=True)` returns them,
            computed without sink_logits (a sink enters once, at the very end). All o of one dtype, all lse fp32 or all
            fp64.

    Returns:
        (o, lse): o in the dtype of the parts, computed in lse's dtype and rounded once; lse the natural log of the
        union's sum. Associative and commutative up to rounding. A part with lse = -inf is the identity, whatever its o
        holds; where all parts are empty, o = 0 and lse = -inf with zero gradients. Differentiable in every o and lse.
        Nothing is mutated.

    Raises:
        TypeError, ValueError: no parts, or a part whose shape, dtype or device differs from the first's.

    Source: online softmax, Milakov and Gimelshein 2018, arXiv 1805.02867, section 3.1.
    """
    if not isinstance(parts, (tuple, list)):
        refuse(OP, "parts", "a sequence of (o, lse)", parts, TypeError)
    if not parts:
        refuse(OP, "parts", "at least one (o, lse)", "none")
    shapes = Shapes(OP)
    for i, part in enumerate(parts):
        if not isinstance(part, (tuple, list)) or len(part) != 2:
            refuse(OP, f"parts[{i}]", "a pair (o, lse)", part, TypeError)
        o, lse = part
        o_dtype = FLOATS if i == 0 else parts[0][0].dtype
        lse_dtype = (torch.float32, torch.float64) if i == 0 else parts[0][1].dtype
        shapes.tensor(f"parts[{i}][0]", o, "B H T D", dtype=o_dtype)
        shapes.tensor(f"parts[{i}][1]", lse, "B H T", dtype=lse_dtype)
    o, lse = reference(parts)
    return o.to(parts[0][0].dtype), lse
