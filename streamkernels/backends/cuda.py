"""The CUDA backend: the only, lazy, import of `streamkernels._C`, and the step from tensors to pointers and strides.

An op with a CUDA kernel has two things here: an entry in `KERNELS`, which says which calls the kernel takes, and a
function of the op's name with the op's raw arguments, already checked. A kernel launches on torch's current stream of
the tensors' device; it allocates nothing beyond outputs and workspace, keeps nothing and does not synchronise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import _ext
from . import cuda_incremental_prefill, cuda_pruned, cuda_span_attention
from .cuda_incremental_prefill import gradient as gradient
from .cuda_incremental_prefill import incremental_prefill as incremental_prefill
from .cuda_incremental_prefill import plan_of as plan_of
from .cuda_pruned import compact as compact
from .cuda_pruned import reanchor as reanchor
from .cuda_pruned import rotate as rotate
from .cuda_pruned import select_tokens as select_tokens
from .cuda_pruned import token_scores as token_scores
from .cuda_span_attention import span_attention as span_attention
from .cuda_span_attention import span_attention_backward as span_attention_backward
from .tensors import DTYPES
from .tensors import rows_of as _rows
from .tensors import stream_of as _stream
from .tensors import table_of as _table

if TYPE_CHECKING:
    from .select import Call


def reason(call: Call) -> str | None:
    """None if the CUDA kernels can run `call`, else one sentence why not. The driver is asked last."""
    kernel = KERNELS.get(call.op)
    if kernel is None:
        return f"no CUDA kernel for {call.op} yet"
    if call.dtype not in DTYPES and call.op not in cuda_pruned.ANY_DTYPE:
        return f"the CUDA kernels take float16, bfloat16 and float32, not {str(call.dtype).removeprefix('torch.')}"
    if call.device.type != "cuda":
        return f"the tensors are on {call.device}; the CUDA kernels need a CUDA device"
    if torch.version.hip is not None:
        return "this torch is a ROCm build; the CUDA kernels need an NVIDIA GPU"
    return kernel(call) or _unavailable(call.device.index)


def hands_over(call: Call) -> str | None:
    """Why `auto` leaves a call to Triton that the CUDA kernel can run too; None where it does not."""
    ask = {"incremental_prefill": cuda_incremental_prefill, "span_attention": cuda_span_attention}
    if ask.get(call.op, cuda_pruned).hands_over(call):  # type: ignore[attr-defined]
        return "Triton's kernel was measured to be faster"
    return None


def _unavailable(index: int | None) -> str | None:
    return _ext.unavailable(torch.cuda.current_device() if index is None else index)


# a constant to torch.compile; its decorator for this would import dynamo, and triton with it, at import time
_unavailable._dynamo_marked_constant = True  # type: ignore[attr-defined]


def preload(device: torch.device | int) -> None:
    """Load every CUDA kernel onto `device`, so that no first use has to: for graph captures and timed runs."""
    index = device if isinstance(device, int) else device.index
    _ext.load().preload(torch.cuda.current_device() if index is None else index)


def _takes_rotate_append(call: Call) -> str | None:
    D = call.sizes.get("D", 8)
    if D % 8 or not 8 <= D <= 256:
        return f"the CUDA kernel takes a head dim D that is a multiple of 8, at most 256, not {D}"
    return None


def rotate_append(
    k: Tensor,
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    source_k: Tensor,
    source_v: Tensor,
    target_k: Tensor,
    target_v: Tensor,
    length: Tensor,
    status: Tensor,
    role: Tensor | None,
    segment: int,
    sinks: int,
    bounded: bool,
    interleaved: bool,
) -> None:
    """Rotate k [B, HK, T, D] by cos, sin (None: already rotated) and write k, v behind the committed lengths."""
    B, HK, T, D = k.shape
    if B * HK * T == 0:
        return
    device = k.device
    dtype = DTYPES[k.dtype]
    if cos is None or sin is None:
        angles, rotary_dim, angles_dtype = (0,) * 6, 0, dtype
    else:
        angles, rotary_dim, angles_dtype = (*_table(cos), *_table(sin)), 2 * cos.shape[2], DTYPES[cos.dtype]
    _ext.load().rotate_append(
        *_rows(k), *_rows(v), *angles,
        *_rows(source_k), *_rows(source_v), *_rows(target_k), *_rows(target_v),
        length.data_ptr(), *length.stride(), status.data_ptr(),
        *((0, 0, 0) if role is None else (role.data_ptr(), *role.stride())),
        B, HK, T, D, rotary_dim, source_k.shape[2], target_k.shape[2], segment, sinks, bounded, interleaved,
        dtype, angles_dtype, device.index, _stream(device),
    )  # fmt: skip


KERNELS: dict[str, Callable[[Call], str | None]] = {
    "rotate_append": _takes_rotate_append,
    "incremental_prefill": cuda_incremental_prefill.reason,
    **cuda_pruned.KERNELS,
    **cuda_span_attention.KERNELS,
}
