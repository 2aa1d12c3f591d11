"""The checks that every op on a chunk of new rows shares: keys and values that fit the cache, their angles, their
roles."""

from __future__ import annotations

import torch
from torch import Tensor

from .cache import PADDING, SOURCE, TARGET, StreamCache
from .shapes import FLOATS, MAX_HEAD_DIM, Shapes, check_int, refuse


def check_chunk(
    op: str,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    cache: StreamCache,
    layer: int,
    role: Tensor | int,
) -> Shapes:
    """Check new rows k, v [B, HK, T, D] against layer `layer` of `cache`; returns their shape letters. Changes nothing.

    k, v: the cache's dtype, the layer's device, any strides but the last, which is 1. cos, sin: see `check_angles`.
    role: SOURCE or TARGET for all rows, or int8 [B, T] on the layer's device or on the CPU. Raises TypeError or
    ValueError.
    """
    if not isinstance(cache, StreamCache):
        refuse(op, "cache", "a StreamCache", cache, TypeError)
    check_int(op, "layer", layer, maximum=cache.layers - 1)
    held = cache.segment(layer, SOURCE)[0]
    shapes = Shapes(op, B=held.shape[0], HK=held.shape[1], D=held.shape[3])
    shapes.device = held.device
    for name, x in (("k", k), ("v", v)):
        shapes.tensor(name, x, "B HK T D", dtype=cache.dtype, unit_last_stride=True)
    check_angles(shapes, cos, sin, k.dtype)
    if isinstance(role, Tensor):
        if role.dtype != torch.int8:
            values = f"{SOURCE} (source), {TARGET} (target), {PADDING} (padding)"
            refuse(op, "role", f"int8 with values {values}", role, TypeError)
        if role.device.type == "cpu":
            shapes.device = role.device
        shapes.tensor("role", role, "B T")
        shapes.device = held.device
    elif isinstance(role, bool) or role not in (SOURCE, TARGET):
        refuse(op, "role", f"{SOURCE} (source), {TARGET} (target) or a tensor int8 [B, T]", role)
    return shapes


def check_angles(shapes: Shapes, cos: Tensor | None, sin: Tensor | None, dtype: torch.dtype) -> None:
    """Check cos and sin [B or 1, T, rotary_dim / 2], fp32 or `dtype`, constants; both None for rows that are already
    rotated."""
    op = shapes.op
    if cos is None and sin is None:
        return
    for name, x in (("cos", cos), ("sin", sin)):
        shapes.tensor(name, x, "1|B T A", dtype=(torch.float32, dtype), unit_last_stride=True)
        if not 2 <= 2 * shapes["A"] <= shapes["D"]:
            refuse(op, name, f"[B or 1, T, rotary_dim / 2] with an even rotary_dim in [2, D={shapes['D']}]", x)
        if x is not None and x.requires_grad and torch.is_grad_enabled():
            refuse(
                op, name, "a constant, since angles get no gradient", f"{name} with requires_grad", NotImplementedError
            )
    if cos is not None and sin is not None and (cos.dtype != sin.dtype or cos.shape != sin.shape):
        refuse(op, "sin", "the shape and dtype of cos", sin)


def check_heads(shapes: Shapes, name: str, x: Tensor) -> Tensor:
    """Check one tensor of heads [B, H, T, D] with D a multiple of 8 up to 256."""
    shapes.tensor(name, x, "B H T D", dtype=FLOATS, unit_last_stride=True)
    D = shapes["D"]
    if D % 8 or not 8 <= D <= MAX_HEAD_DIM:
        refuse(shapes.op, name, f"a head dim D that is a multiple of 8, at most {MAX_HEAD_DIM}", f"D={D}")
    return x
