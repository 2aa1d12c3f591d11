"""Moving cached keys to other positions: one more rotation, in place.

Rotations of a plane add up, R(p + delta) = R(delta) R(p) (RoFormer, Su et al., arXiv 2104.09864, eq. 34), so a key that
was cached at position p becomes the key of position p + delta without the unrotated key.
"""

from __future__ import annotations

from torch import Tensor

from ..core.positions import apply_rotary
from .attend_rows import row_chunks


def reanchor(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> None:
    """Rotate x [B, HK, S, D] in place by cos, sin [B or 1, S or 1, rotary_dim / 2], a piece of S at a time."""
    for keys in row_chunks(x.shape[2], x.shape[0] * x.shape[1] * x.shape[3], x.device):
        angles = (cos, sin) if cos.shape[1] == 1 else (cos[:, keys], sin[:, keys])
        x[:, :, keys] = apply_rotary(x[:, :, keys], *angles, interleaved)
