"""The two decisions of VisiPruner over `token_scores`: which tokens stay from the filter layer on, and when all go."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...core.shapes import FLOATS, Shapes, check_number, refuse
from .api import select_tokens


def visipruner_select(
    scores: Sequence[Tensor],
    *,
    layer_threshold: float = 0.995,
    token_threshold: float = 0.2,
    index: Tensor | None = None,
    count: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """The filter layer of VisiPruner and the tokens that it keeps, on the device.

    A layer filters if without some vision token the output of the last row turns: any cosine < `layer_threshold`. Then
    the tokens with norm > `token_threshold` stay, maybe none. Elsewhere all stay.

    Args:
        scores: what `token_scores` returned for the vision keys: (cosine, norm, mass), each [B, K].
        index, count, backend: as in `select_tokens`. Give the `count` that `token_scores` got.

    Returns:
        found: bool [B], whether this is a row's filter layer. NaN is not below a threshold.
        index: int32 [B, K], the tokens that stay, then -1; all of them where `found` is False.
        count: int32 [B], how many.
        No synchronisation. Nothing is mutated.

    Raises:
        TypeError, ValueError: scores that are no three tensors [B, K], thresholds that are no finite numbers.

    Source: arXiv 2510.17205, section 3.6. The paper discards norms < 0.2; its released code
    (`custom_modeling_llama.py`) keeps norms > 0.2, and so does this.
    """
    cosine, norm = _scores("visipruner_select", scores, count)
    found = (cosine < check_number("visipruner_select", "layer_threshold", layer_threshold)) & _part(cosine, count)
    found = found.any(1)
    check_number("visipruner_select", "token_threshold", token_threshold)
    stays = torch.where(found[:, None], norm, float("inf"))
    kept, kept_count = select_tokens(stays, threshold=token_threshold, index=index, count=count, backend=backend)
    return found, kept, kept_count


def visipruner_exit(scores: Sequence[Tensor], *, exit_threshold: float = 0.999, count: Tensor | None = None) -> Tensor:
    """bool [B]: no listed token matters any more, every cosine >= `exit_threshold`.

    `scores` and `count` as in `visipruner_select`. A row without tokens has none that matters: True. NaN matters.
    VisiPruner drops all vision tokens when this has held in two layers (arXiv 2510.17205, section 3.6: two consecutive
    ones; its code counts any two and has 0.999). No synchronisation. Raises as `visipruner_select`.
    """
    cosine, _ = _scores("visipruner_exit", scores, count)
    quiet = cosine >= check_number("visipruner_exit", "exit_threshold", exit_threshold)
    return (quiet | ~_part(cosine, count)).all(1)


def _scores(op: str, scores: Sequence[Tensor], count: Tensor | None) -> tuple[Tensor, Tensor]:
    if not isinstance(scores, (tuple, list)) or len(scores) != 3:
        refuse(op, "scores", "(cosine, norm, mass) as token_scores returns them", scores, TypeError)
    shapes = Shapes(op)
    for i, x in enumerate(scores):
        shapes.tensor(f"scores[{i}]", x, "B K", dtype=FLOATS)
    if count is not None:
        shapes.tensor("count", count, "B", dtype=torch.int32)
    return scores[0].detach(), scores[1].detach()


def _part(cosine: Tensor, count: Tensor | None) -> Tensor:
    # bool [B, K]: which entries take part
    at = torch.arange(cosine.shape[1], device=cosine.device)
    return torch.ones_like(cosine, dtype=torch.bool) if count is None else at < count[:, None]
