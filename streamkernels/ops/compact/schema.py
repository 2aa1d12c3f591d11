"""`streamkernels::compact` and its backward: schemas, implementations and fakes."""

from __future__ import annotations

import torch
from torch import Tensor

from ...backends import cuda, triton
from ...core.shapes import refuse
from ...reference import compact as reference

OP = "compact"
LIBRARY = torch.library.Library("streamkernels", "FRAGMENT")
TAGS = (torch.Tag.pt2_compliant_tag,)
LIBRARY.define("compact(Tensor x, Tensor index, Tensor count, int dim, str backend) -> Tensor", tags=TAGS)
LIBRARY.define(
    "compact_backward(Tensor dy, Tensor index, Tensor count, SymInt S, int dim, str backend) -> Tensor", tags=TAGS
)


def run(x: Tensor, index: Tensor, count: Tensor, dim: int, backend: str) -> Tensor:
    """What `torch.ops.streamkernels.compact` does, without the dispatcher."""
    room = {"reference": reference, "triton": triton, "cuda": cuda}[backend]
    gathered: Tensor = room.compact(x, index, count, dim)  # type: ignore[attr-defined]
    return gathered


def _compact_backward(dy: Tensor, index: Tensor, count: Tensor, S: int, dim: int, backend: str) -> Tensor:
    if backend != "reference":
        refuse(OP, "backend", "reference, the only one that has the gradient", backend, NotImplementedError)
    return reference.compact_backward(dy, index, count, S, dim)


def _fake(x: Tensor, index: Tensor, count: Tensor, dim: int, backend: str) -> Tensor:
    return x.new_empty((*x.shape[:dim], index.shape[1], *x.shape[dim + 1 :]))


def _fake_backward(dy: Tensor, index: Tensor, count: Tensor, S: int, dim: int, backend: str) -> Tensor:
    return dy.new_empty((*dy.shape[:dim], S, *dy.shape[dim + 1 :]))


LIBRARY.impl(OP, run, "CompositeExplicitAutograd")
LIBRARY.impl(f"{OP}_backward", _compact_backward, "CompositeExplicitAutograd")
torch.library.register_fake(f"streamkernels::{OP}", _fake, lib=LIBRARY)
torch.library.register_fake(f"streamkernels::{OP}_backward", _fake_backward, lib=LIBRARY)
