"""Rotary position embedding of a tensor of heads; the arithmetic is `core.positions.apply_rotary`."""

from __future__ import annotations

from torch import Tensor

from ..core.positions import apply_rotary


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x [B, H, T, D], cos and sin [B or 1, T, rotary_dim / 2] -> x rotated, contiguous, in x's dtype."""
    return apply_rotary(x, cos, sin, interleaved).contiguous()
