"""Scores to a compact list of kept entries, without the host knowing how many."""

from __future__ import annotations

import torch
from torch import Tensor


def select_tokens(
    scores: Tensor,
    index: Tensor | None,
    count: Tensor | None,
    *,
    threshold: float | None,
    limit: int,
    width: int,
    largest: bool,
) -> tuple[Tensor, Tensor]:
    """scores [B, K], index [B, K] or None, count [B] or None -> int32 [B, width], -1 behind the kept, and int32 [B]."""
    B, K = scores.shape
    at = torch.arange(K, device=scores.device)
    keep = ~scores.isnan()
    if count is not None:
        keep &= at < count[:, None]
    if threshold is not None:
        keep &= (scores > threshold) if largest else (scores < threshold)
    if limit < K:
        keep &= _rank(scores if largest else -scores, keep) < limit
    # entries that are not kept land in one extra column that is cut off
    place = torch.where(keep, keep.cumsum(1) - 1, width)
    names = at.expand(B, K).to(torch.int32) if index is None else index
    out = torch.full((B, width + 1), -1, dtype=torch.int32, device=scores.device)
    return out.scatter(1, place, names)[:, :width].contiguous(), keep.sum(1, dtype=torch.int32)


def _rank(scores: Tensor, keep: Tensor) -> Tensor:
    # place of each entry: candidates before the rest, the higher score first, ties to the lower index
    by_score = scores.masked_fill(~keep, float("-inf")).sort(dim=1, descending=True, stable=True).indices
    candidates_first = (~keep).gather(1, by_score).to(torch.int8).sort(dim=1, stable=True).indices
    order = by_score.gather(1, candidates_first)
    place = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, place)
