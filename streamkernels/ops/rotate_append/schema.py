"""`streamkernels::rotate_append`: schema, implementation and fake over plain tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...backends import cuda, triton
from ...core.shapes import refuse
from ...reference import rotate_append as reference

OP = "rotate_append"
LIBRARY = torch.library.Library("streamkernels", "FRAGMENT")
LIBRARY.define(
    "rotate_append(Tensor k, Tensor v, Tensor? cos, Tensor? sin, Tensor(a!) source_k, Tensor(b!) source_v, "
    "Tensor(c!) target_k, Tensor(d!) target_v, Tensor length, Tensor(e!) status, Tensor? role, int segment, "
    "Tensor? block_table, int sinks, bool bounded, bool interleaved, str backend) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)
BUFFERS, STATUS, BLOCK_TABLE = slice(4, 8), 9, 12  # places in the schema


def _rotate_append(*arguments: Any) -> None:
    *call, backend = arguments
    _refuse_blocks(call.pop(BLOCK_TABLE))
    room = {"reference": reference, "triton": triton, "cuda": cuda}[backend]
    with torch.no_grad():
        room.rotate_append(*call)  # type: ignore[attr-defined]
    # an op of torch.library does not count its writes by itself
    for x in (*call[BUFFERS], call[STATUS]):
        if not x.is_inference():
            torch.autograd.graph.increment_version(x)


def _fake(*arguments: Any) -> None:
    _refuse_blocks(arguments[BLOCK_TABLE])


def _refuse_blocks(block_table: Tensor | None) -> None:
    if block_table is not None:
        refuse(OP, "block_table", "None, since segments are not paged yet", block_table, NotImplementedError)


LIBRARY.impl(OP, _rotate_append, "CompositeExplicitAutograd")
torch.library.register_fake(f"streamkernels::{OP}", _fake, lib=LIBRARY)
