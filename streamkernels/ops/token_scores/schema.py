"""`streamkernels::token_scores`: schema, implementation and fake."""

from __future__ import annotations

import torch
from torch import Tensor

from ...backends import cuda, triton
from ...reference.attend_rows import compute_dtype
from ...reference.token_scores import token_scores as reference

OP = "token_scores"
LIBRARY = torch.library.Library("streamkernels", "FRAGMENT")
LIBRARY.define(
    "token_scores(Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, Tensor index, Tensor count, float scale, "
    "float softcap, str backend) -> (Tensor cosine, Tensor norm, Tensor mass)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    index: Tensor,
    count: Tensor,
    scale: float,
    softcap: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """What `torch.ops.streamkernels.token_scores` does, without the dispatcher."""
    if backend != "reference":
        room = {"triton": triton, "cuda": cuda}[backend]
        scores: tuple[Tensor, Tensor, Tensor] = room.token_scores(  # type: ignore[attr-defined]
            q, k, v, o, lse, index, count, scale, softcap
        )
        return scores
    return reference(q, k, v, o, lse, index, count, scale=scale, softcap=softcap)


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    index: Tensor,
    count: Tensor,
    scale: float,
    softcap: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    cosine, norm, mass = (q.new_empty(index.shape, dtype=compute_dtype(q.dtype)) for _ in range(3))
    return cosine, norm, mass


LIBRARY.impl(OP, run, "CompositeExplicitAutograd")
torch.library.register_fake(f"streamkernels::{OP}", _fake, lib=LIBRARY)
