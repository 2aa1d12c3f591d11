"""Attention under spans the plain way: a dense mask, repeated heads, autograd. In fp64 it is the truth that others are
measured against, in any other dtype it is what plain PyTorch makes of the same inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.spans import Spans


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans: Spans,
    *,
    scale: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """q [B, H, T, D], k and v [B, HK, S, D] -> o [B, H, T, D] in q's dtype, lse [B, H, T] in fp32 (fp64).

    As the eager attention of Hugging Face models: products in q's dtype, softmax in fp32 (fp64). Spans must be
    disjoint: a dense mask counts a key once.
    """
    H, S = q.shape[1], k.shape[2]
    k, v = (x.repeat_interleave(H // k.shape[1], 1) for x in (k, v))
    visible, destination = (_per_head(x, H) for x in (spans.visible(S), spans.destination(S)))
    sees = visible.any(-1)
    s = (q @ k.mT) * scale
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    s = s.to(torch.promote_types(s.dtype, torch.float32))
    # a row that sees nothing takes part with zeros, so that no gradient becomes NaN
    s = torch.where(visible, s, float("-inf")).masked_fill(~sees.unsqueeze(-1), 0.0)
    lse = torch.logsumexp(s, -1)
    p = torch.exp(s - lse.unsqueeze(-1)) * sees.unsqueeze(-1)
    landed = torch.zeros_like(p).scatter_add(-1, destination.clamp(min=0), p * (destination >= 0))
    if sink_logits is not None:
        landed = landed * torch.sigmoid(lse - sink_logits[:, None]).unsqueeze(-1)
    return landed.to(q.dtype) @ v, lse.masked_fill(~sees, float("-inf"))


def _per_head(x: Tensor, H: int) -> Tensor:
    return x.repeat_interleave(H // x.shape[1], 1)
