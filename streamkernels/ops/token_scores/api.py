"""`token_scores`: checks, the choice of a backend, and the call."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...backends.select import Call, choose
from ...core.shapes import FLOATS, Shapes, check_number
from ..known import Known, look_of, undispatched, wants_gradient
from .schema import OP, run


class TokenScores(NamedTuple):
    """Three scores per listed key, each [B, K] in fp32 (fp64 for fp64)."""

    cosine: Tensor
    norm: Tensor
    mass: Tensor


def token_scores(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    index: Tensor,
    count: Tensor,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    backend: str = "auto",
) -> TokenScores:
    """How much each listed key contributes to the output of one query row, without the attention matrix.

    With a_hi = exp(score_hi - lse_h), the contribution of key i is c_i = concat over heads of a_hi v_hi.

    Args:
        q: [B, H, 1, D], the query row (the last text row, for VisiPruner), bf16, fp16, fp32 or fp64, last stride 1.
        k, v: [B, HK, S, D] of q's dtype and device, H a multiple of HK. Rotated as they were for the attention.
        o, lse: what `span_attention(..., return_lse=True)` or `incremental_prefill` gave for that row: o [B, H, 1, D]
            of q's dtype, lse [B, H, 1] in fp32 (fp64 for fp64), the natural log of the sum over all keys that it saw.
            For a model with sink_logits pass `torch.logaddexp(lse, sink_logits[:, None])`, since o is scaled by that.
        index: int32 [B, K], keys that the row sees (a key that it does not see would get a probability all the same).
        count: int32 [B], how many entries of each list count.
        scale: default 1 / sqrt(D). softcap: as in the attention. backend: "auto", "reference", "triton" or "cuda".

    Returns:
        `TokenScores`, three tensors [B, K] in fp32 (fp64 for fp64):
        cosine: of o - c_i to o over all heads together, in [-1, 1]. 1 if o is zero, 0 if nothing but rounding is left
            of o - c_i (as torch.cosine_similarity has it for a zero vector).
        norm: the L2 norm of c_i over all heads together.
        mass: a_hi summed over heads, in [0, H]; divide by H for the mean.
        Entries from the count on, and indices outside [0, S), are ignored: cosine 1, norm 0, mass 0. A row that saw
        nothing (lse = -inf) has the same. Keys that are not listed may hold NaN. Not differentiable (the results never
        require a gradient). O(K) memory besides chunks of gathered keys. Nothing is mutated.

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape or device. Metadata only, without a sync.
        NotImplementedError: a named backend that cannot run the call.

    Source: VisiPruner, arXiv 2510.17205, section 3.6; how it is computed without a tensor of contributions:
    `streamkernels/reference/token_scores.py`.
    """
    tensors = (q, k, v, o, lse, index, count)
    look = look_of(tensors, (scale, softcap, backend))
    if look is not None and wants_gradient(*tensors[:5]):
        look = None
    if (known := _known.get(look)) is not None:
        op = run if undispatched(*tensors) else torch.ops.streamkernels.token_scores
        return TokenScores(*op(*tensors, *known))
    shapes = Shapes(OP)
    shapes.tensor("q", q, "B H 1 D", dtype=FLOATS, unit_last_stride=True)
    shapes.tensor("k", k, "B HK S D", dtype=q.dtype, unit_last_stride=True)
    shapes.tensor("v", v, "B HK S D", dtype=q.dtype, unit_last_stride=True)
    shapes.heads()
    shapes.tensor("o", o, "B H 1 D", dtype=q.dtype, unit_last_stride=True)
    shapes.tensor("lse", lse, "B H 1", dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)
    shapes.tensor("index", index, "B K", dtype=torch.int32)
    shapes.tensor("count", count, "B", dtype=torch.int32)
    scale = shapes["D"] ** -0.5 if scale is None else check_number(OP, "scale", scale)
    cap = 0.0 if softcap is None else check_number(OP, "softcap", softcap, positive=True)
    features = frozenset({"softcap"} if softcap is not None else ())
    chosen = choose(Call(OP, q.device, q.dtype, dict(shapes.sizes), features), backend)
    constants = (x.detach() for x in (q, k, v, o, lse))
    outcome = (float(scale), float(cap), chosen)
    scores = torch.ops.streamkernels.token_scores(*constants, index, count, *outcome)
    _known.keep(look, outcome)
    return TokenScores(*scores)


_known = Known()
