"""`streamkernels::rotate`: schema, implementation and fake over plain tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from ...backends import cuda, triton
from ...reference import rotate as reference

OP = "rotate"
LIBRARY = torch.library.Library("streamkernels", "FRAGMENT")
LIBRARY.define(
    "rotate(Tensor x, Tensor cos, Tensor sin, bool interleaved, str backend) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, backend: str) -> Tensor:
    room = {"reference": reference, "triton": triton, "cuda": cuda}[backend]
    rotated: Tensor = room.rotate(x, cos, sin, interleaved)  # type: ignore[attr-defined]
    return rotated


def _fake(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, backend: str) -> Tensor:
    return x.new_empty(x.shape)


LIBRARY.impl(OP, _rotate, "CompositeExplicitAutograd")
torch.library.register_fake(f"streamkernels::{OP}", _fake, lib=LIBRARY)
