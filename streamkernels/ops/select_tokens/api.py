"""`select_tokens`: checks, the choice of a backend, and the call."""

from __future__ import annotations

import torch
from torch import Tensor

from ...backends.select import Call, choose
from ...core.shapes import FLOATS, Shapes, check_int, check_number, refuse
from ..known import Known, look_of, undispatched
from .schema import OP, run


def select_tokens(
    scores: Tensor,
    *,
    threshold: float | None = None,
    k: int | None = None,
    max_keep: int | None = None,
    largest: bool = True,
    index: Tensor | None = None,
    count: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The entries of each row that pass a threshold, or the k best, as an ascending list and a count, on the device.

    Args:
        scores: [B, K], bf16, fp16, fp32 or fp64.
        threshold: keep scores > threshold (< threshold if not `largest`), compared in the dtype of `scores`.
        k: keep the k best. Exactly one of `threshold` and `k` is given.
        max_keep: the width of the list, and at most so many are kept: the best ones. Default k, else K.
        largest: whether high scores are the good ones.
        index: int32 [B, K], what the entries are called (say the list that `token_scores` got). Default 0, 1, 2, ...
        count: int32 [B], how many entries of each row take part. Default K.
        backend: "auto", "reference", "triton" or "cuda".

    Returns:
        index: int32 [B, max_keep, k or K], the kept entries in the order of the row (ascending if `index` is, as the
            default is), then -1.
        count: int32 [B], how many were kept. It may be 0, and less than k if fewer take part.
        Ties go to the lower entry. NaN is never kept. Not differentiable. No synchronisation. Nothing is mutated.

    Raises:
        TypeError, ValueError: none or both of threshold and k; a wrong type, dtype, shape or device.
        NotImplementedError: a named backend that cannot run the call.
    """
    look = look_of((scores, index, count), (threshold, k, max_keep, largest, backend))
    if (known := _known.get(look)) is not None:
        given = tuple(x for x in (scores, index, count) if x is not None)
        op = run if undispatched(*given) else torch.ops.streamkernels.select_tokens
        return op(scores.detach() if scores.requires_grad else scores, index, count, *known)
    shapes = Shapes(OP)
    shapes.tensor("scores", scores, "B K", dtype=FLOATS)
    if (threshold is None) == (k is None):
        refuse(OP, "threshold" if k is None else "k", "exactly one of threshold and k", "none" if k is None else "both")
    if threshold is not None:
        threshold = float(check_number(OP, "threshold", threshold))
    limit = shapes["K"] if k is None else check_int(OP, "k", k)
    width = limit if max_keep is None else check_int(OP, "max_keep", max_keep)
    if not isinstance(largest, bool):
        refuse(OP, "largest", "a bool", largest, TypeError)
    if index is not None:
        shapes.tensor("index", index, "B K", dtype=torch.int32)
    if count is not None:
        shapes.tensor("count", count, "B", dtype=torch.int32)
    features = frozenset({"threshold"} if k is None else {"k"})
    chosen = choose(Call(OP, scores.device, scores.dtype, dict(shapes.sizes), features), backend)
    outcome = (threshold, min(limit, width), width, largest, chosen)
    selected = torch.ops.streamkernels.select_tokens(scores.detach(), index, count, *outcome)
    _known.keep(look, outcome)
    return selected


_known = Known()
