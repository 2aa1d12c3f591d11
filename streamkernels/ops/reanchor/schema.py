"""`streamkernels::reanchor`: schema, implementation and fake over plain tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from ...backends import cuda, triton
from ...reference import reanchor as reference

OP = "reanchor"
LIBRARY = torch.library.Library("streamkernels", "FRAGMENT")
LIBRARY.define(
    "reanchor(Tensor(a!) x, Tensor cos, Tensor sin, bool interleaved, str backend) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _reanchor(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, backend: str) -> None:
    room = {"reference": reference, "triton": triton, "cuda": cuda}[backend]
    with torch.no_grad():
        room.reanchor(x, cos, sin, interleaved)  # type: ignore[attr-defined]
    if not x.is_inference():
        torch.autograd.graph.increment_version(x)


def _fake(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, backend: str) -> None:
    return None


LIBRARY.impl(OP, _reanchor, "CompositeExplicitAutograd")
torch.library.register_fake(f"streamkernels::{OP}", _fake, lib=LIBRARY)
