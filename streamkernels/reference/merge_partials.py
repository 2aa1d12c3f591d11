"""The join of attention over disjoint key sets.

With (o_p, lse_p) of each part p, normalised within the part:

    lse = log sum_p exp(lse_p),   o = sum_p exp(lse_p - lse) o_p

(online softmax: Milakov and Gimelshein 2018, arXiv 1805.02867, section 3.1; the same split over keys in FlashAttention,
Dao et al. 2022, arXiv 2205.14135, section 3.1). A part with lse = -inf is empty and the identity, whatever its o holds.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def merge_partials(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """[(o [B, H, T, D], lse [B, H, T]), ...] -> (o, lse) in lse's dtype; differentiable, at -inf too."""
    every_lse = torch.stack([lse for _, lse in parts])
    top = every_lse.detach().amax(0)
    top = top.masked_fill(top == float("-inf"), 0.0)
    weights = (every_lse - top).exp()
    total = weights.sum(0)
    empty = total == 0
    total = total.masked_fill(empty, 1.0)
    lse = (top + total.log()).masked_fill(empty, float("-inf"))
    o = torch.zeros_like(parts[0][0], dtype=lse.dtype)
    for (part, part_lse), weight in zip(parts, weights, strict=True):
        part = part.to(lse.dtype).masked_fill((part_lse == float("-inf")).unsqueeze(-1), 0.0)
        o = o + part * (weight / total).unsqueeze(-1)
    return o, lse
