"""`streamkernels::prepare`: schema, implementation and fake."""

from __future__ import annotations

import torch
from torch import Tensor

from ...backends import triton
from ...reference.prepare import BLOCK
from ...reference.prepare import prepare as reference

OP = "prepare"
LIBRARY = torch.library.Library("streamkernels", "FRAGMENT")
LIBRARY.define(
    "prepare(Tensor bounds, SymInt S, str backend) -> (Tensor row_blocks, Tensor key_blocks)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _prepare(bounds: Tensor, S: int, backend: str) -> tuple[Tensor, Tensor]:
    if backend == "triton":
        return triton.prepare(bounds, S)
    return reference(bounds, S)


def _fake(bounds: Tensor, S: int, backend: str) -> tuple[Tensor, Tensor]:
    B, T, N, _ = bounds.shape
    return bounds.new_empty((B, (T + BLOCK - 1) // BLOCK, N, 4)), bounds.new_empty((B, (S + BLOCK - 1) // BLOCK, 4))


LIBRARY.impl(OP, _prepare, "CompositeExplicitAutograd")
torch.library.register_fake(f"streamkernels::{OP}", _fake, lib=LIBRARY)
