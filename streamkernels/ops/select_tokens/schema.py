"""`streamkernels::select_tokens`: schema, implementation and fake."""

from __future__ import annotations

import torch
from torch import Tensor

from ...backends import cuda, triton
from ...reference.select_tokens import select_tokens as reference

OP = "select_tokens"
LIBRARY = torch.library.Library("streamkernels", "FRAGMENT")
LIBRARY.define(
    "select_tokens(Tensor scores, Tensor? index, Tensor? count, float? threshold, SymInt limit, SymInt width, "
    "bool largest, str backend) -> (Tensor index, Tensor count)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def run(
    scores: Tensor,
    index: Tensor | None,
    count: Tensor | None,
    threshold: float | None,
    limit: int,
    width: int,
    largest: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """What `torch.ops.streamkernels.select_tokens` does, without the dispatcher."""
    if backend != "reference":
        room = {"triton": triton, "cuda": cuda}[backend]
        selected: tuple[Tensor, Tensor] = room.select_tokens(  # type: ignore[attr-defined]
            scores, index, count, threshold, limit, width, largest
        )
        return selected
    return reference(scores, index, count, threshold=threshold, limit=limit, width=width, largest=largest)


def _fake(
    scores: Tensor,
    index: Tensor | None,
    count: Tensor | None,
    threshold: float | None,
    limit: int,
    width: int,
    largest: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    B = scores.shape[0]
    return scores.new_empty((B, width), dtype=torch.int32), scores.new_empty((B,), dtype=torch.int32)


LIBRARY.impl(OP, run, "CompositeExplicitAutograd")
torch.library.register_fake(f"streamkernels::{OP}", _fake, lib=LIBRARY)
