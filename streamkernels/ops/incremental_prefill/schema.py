"""`streamkernels::incremental_prefill` and its backward: schemas, implementations and fakes over plain tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...backends import cuda, triton
from ...backends.tensors import reader
from ...core.cache import Staged
from ...core.shapes import refuse
from ...reference import incremental_prefill as reference
from ...reference.attend_rows import compute_dtype

OP = "incremental_prefill"
LIBRARY = torch.library.Library("streamkernels", "FRAGMENT")
TAGS = (torch.Tag.pt2_compliant_tag,)

_ROWS = (
    "Tensor? role, int segment, Tensor? source_limit, Tensor? source_begin, Tensor? target_begin, Tensor? block_table"
)

# softcap 0 and window 0 are none
LIBRARY.define(
    "incremental_prefill(Tensor q, Tensor k, Tensor v, Tensor? cos, Tensor? sin, Tensor(a!) source_k, "
    f"Tensor(b!) source_v, Tensor(c!) target_k, Tensor(d!) target_v, Tensor length, Tensor(e!) status, {_ROWS}, "
    "int source_sinks, int target_sinks, int ring_sinks, bool bounded, int source_window, int target_window, "
    "float scale, float softcap, Tensor? sink_logits, bool interleaved, str backend) -> (Tensor o, Tensor lse)",
    tags=TAGS,
)
LIBRARY.define(
    "incremental_prefill_backward(Tensor do, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, "
    "Tensor? cos, Tensor? sin, Tensor source_k, Tensor source_v, Tensor target_k, Tensor target_v, Tensor length, "
    f"{_ROWS}, int source_sinks, int target_sinks, float scale, float softcap, Tensor? sink_logits, bool interleaved, "
    "str backend) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dsink_logits)",
    tags=TAGS,
)
# places in the two schemas
BUFFERS, STATUS, BLOCK_TABLE = slice(5, 9), 10, 16
BACKWARD_BLOCK_TABLE, BACKWARD_SINK_LOGITS = 19, 24
# without the block table
BACKWARD_SCALE = 21


def run(*arguments: Any) -> tuple[Tensor, Tensor]:
    """What `torch.ops.streamkernels.incremental_prefill` does, without the dispatcher."""
    *call, backend = arguments
    _refuse_blocks(call.pop(BLOCK_TABLE))
    room = {"reference": reference, "triton": triton, "cuda": cuda}[backend]
    if torch.is_grad_enabled():
        with torch.no_grad():
            o, lse = room.incremental_prefill(*call)  # type: ignore[attr-defined]
    else:
        o, lse = room.incremental_prefill(*call)  # type: ignore[attr-defined]
    # an op of torch.library does not count its writes by itself
    torch.autograd.graph.increment_version([x for x in (*call[BUFFERS], call[STATUS]) if not x.is_inference()])
    return o, lse


def plan_of(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Any:
    """What `run_again` takes for calls of this look; None where it cannot run them."""
    plain = type(q) is type(k) is type(v) is Tensor
    if backend != "cuda" or not plain or q.numel() == 0 or reader() is None:
        return None
    B, H, T, D = q.shape
    return cuda.plan_of(B, H, k.shape[1], T, D, q.dtype, q.device)


def run_again(
    plan: Any, staged: Staged, rows: tuple[Tensor | None, ...], numbers: tuple[float, ...], with_lse: bool
) -> tuple[Tensor, Tensor]:
    """What `run` does for a call without sinks and windows that looks like one that it ran. rows: q, k, v, cos, sin,
    and the limits; numbers: scale, softcap and whether pairs are interleaved. Without `with_lse`, lse is no result."""
    q, k, v, cos, sin, *limits = rows
    source_k, source_v, target_k, target_v, length, status, role, segment, _, sinks, _, _ = staged
    found = plan.run(
        (q, k, v, cos, sin, source_k, source_v, target_k, target_v, length, status, role, *limits, None),
        (segment, 0, 0, sinks, False, 0, 0, *numbers),
        with_lse,
    )
    # those of a cache are never inference tensors
    torch._C._increment_version((source_k, source_v, target_k, target_v, status))  # type: ignore[attr-defined]
    return found


def _backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *call, backend = arguments
    _refuse_blocks(call.pop(BACKWARD_BLOCK_TABLE))
    if backend == "cuda":
        backend = cuda.gradient(call[2].dtype, call[BACKWARD_SCALE])
    room = {"reference": reference, "triton": triton}[backend]
    with torch.no_grad():
        dq, dk, dv, dsink_logits = room.incremental_prefill_backward(*call)  # type: ignore[attr-defined]
    return dq, dk, dv, dsink_logits


def _fake_forward(q: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    _refuse_blocks(arguments[BLOCK_TABLE - 1])
    B, H, T, D = q.shape
    return _rows_first(q), q.new_empty((B, H, T), dtype=compute_dtype(q.dtype))


def _fake_backward(
    do: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    _refuse_blocks(arguments[BACKWARD_BLOCK_TABLE - 5])
    sink_logits = arguments[BACKWARD_SINK_LOGITS - 5]
    dsink_logits = q.new_empty(0) if sink_logits is None else torch.empty_like(sink_logits)
    return _rows_first(q), _rows_first(k), _rows_first(v), dsink_logits


def _rows_first(x: Tensor) -> Tensor:
    # [B, H, T, D] stored [B, T, H, D], which is how models go on with it
    B, H, T, D = x.shape
    return x.new_empty((B, T, H, D)).transpose(1, 2)


def _refuse_blocks(block_table: Tensor | None) -> None:
    if block_table is not None:
        refuse(OP, "block_table", "None, since segments are not paged yet", block_table, NotImplementedError)


for name, implementation, fake in (
    ("incremental_prefill", run, _fake_forward),
    ("incremental_prefill_backward", _backward, _fake_backward),
):
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"streamkernels::{name}", fake, lib=LIBRARY)
