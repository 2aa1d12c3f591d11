"""The Triton backend: the only, lazy, import of `streamkernels.triton_kernels`."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.shapes import refuse

OPS: tuple[str, ...] = ("rotate_append", "span_attention", "prepare")
OPS += ("token_scores", "select_tokens", "compact", "rotate", "reanchor")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@functools.cache
def _missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install 'streamkernels[triton]')"
    return None


def interpreting() -> bool:
    """Whether Triton runs its kernels on the CPU, by TRITON_INTERPRET=1 (set before triton is first imported)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def reason(call: Any) -> str | None:
    """None if the Triton kernels can run `call` (a `backends.select.Call`), else one sentence why not."""
    if call.op not in OPS:
        return f"no Triton kernel for {call.op} yet"
    if call.op == "compact":
        if "backward" in call.features:
            return "the gradient of compact has no Triton kernel"
        if call.dtype.itemsize > 8:
            return f"{str(call.dtype).removeprefix('torch.')} has elements of more than 8 bytes"
    elif call.op != "prepare" and call.dtype not in _DTYPES:
        return f"{str(call.dtype).removeprefix('torch.')} is not supported; Triton kernels run fp16, bf16 and fp32"
    if call.device.type == "cpu" and not interpreting():
        return "the tensors are on cpu; Triton kernels need a GPU (or TRITON_INTERPRET=1 for tests)"
    if call.device.type == "cpu" and call.dtype == torch.bfloat16:
        return "Triton's interpreter computes bfloat16 wrongly"
    if call.op == "span_attention" and call.dtype == torch.float32 and "backward" in call.features:
        return "fp32 gradients would be less accurate than plain PyTorch's (2.7 times its error, measured on an H200)"
    if "classes" in call.features:
        return "the Triton kernels have no class table yet"
    if "scale" in call.features:
        return "the Triton kernels need a scale > 0"
    if call.device.type not in ("cpu", "cuda"):
        return f"the tensors are on {call.device.type}; Triton kernels need a CUDA device"
    return _missing()


@functools.cache
def _launch(op: str, function: str) -> Any:
    return getattr(importlib.import_module(f"streamkernels.triton_kernels.{op}.launch"), function)


def rotate_append(*arguments: Any) -> None:
    """`reference.rotate_append` with the same raw arguments, as one Triton launch."""
    _launch("rotate_append", "rotate_append")(*arguments)


def prepare(*arguments: Any) -> Any:
    """`reference.prepare` with the same raw arguments, as two Triton launches."""
    return _launch("prepare", "prepare")(*arguments)


def span_attention(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> Any:
    """`reference.span_attention` with the op's raw arguments, but for the class table."""
    return _launch("span_attention", "span_attention")(q, k, v, *_prepared(options, k.shape[2]))


def span_attention_backward(*arguments: Any) -> Any:
    """`reference.span_attention_backward` with the op's raw arguments, but for the class table."""
    tensors, options = arguments[:7], arguments[7:]
    return _launch("span_attention", "span_attention_backward")(*tensors, *_prepared(options, tensors[3].shape[2]))


def token_scores(*arguments: Any) -> Any:
    """`reference.token_scores` with the op's raw arguments, as one Triton launch."""
    return _launch("token_scores", "token_scores")(*arguments)


def select_tokens(*arguments: Any) -> Any:
    """`reference.select_tokens` with the op's raw arguments, as one Triton launch."""
    return _launch("select_tokens", "select_tokens")(*arguments)


def compact(*arguments: Any) -> Any:
    """`reference.compact` with the same raw arguments, as one Triton launch."""
    return _launch("compact", "compact")(*arguments)


def rotate(*arguments: Any) -> Any:
    """`reference.rotate` with the same raw arguments, as one Triton launch."""
    return _launch("rotate", "rotate")(*arguments)


def reanchor(*arguments: Any) -> None:
    """`reference.reanchor` with the same raw arguments, as one Triton launch."""
    _launch("reanchor", "reanchor")(*arguments)


def _prepared(options: tuple[Any, ...], S: int) -> tuple[Any, ...]:
    """The op's options without the class table, and with what `prepare` makes of the bounds if the caller did not."""
    bounds, rules, sink_key, kept, kept_count, *_classes, sink_logits, row_blocks, key_blocks, scale, softcap = options
    if row_blocks is None:
        row_blocks, key_blocks = prepare(bounds, S)
    return bounds, rules, sink_key, kept, kept_count, sink_logits, row_blocks, key_blocks, scale, softcap


def warmup(
    device: torch.device | str = "cuda",
    *,
    head_dims: Sequence[int] = (64, 128),
    dtypes: Sequence[torch.dtype] = (torch.bfloat16,),
) -> int:
    """Compile and load the kernels of a streaming step (`rotate_append`) ahead of the first call, so that no request
    pays for it. The training kernels (`span_attention`, `prepare`) compile when they are first called.

    `head_dims` and `dtypes` are those that the models in use have. Runs each kernel once on scratch tensors of `device`
    (a few MB, freed on return), Triton and CUDA alike. Returns the number of variants that ran.
    Raises ValueError if `device` is no CUDA device. Lengths, batch sizes and capacities are run-time values: none of
    them compiles anything later.
    """
    from ..core.cache import SOURCE, TARGET, StreamCache
    from ..ops.rotate_append import rotate_append as op

    place = torch.device(device)
    if place.type != "cuda":
        refuse("warmup", "device", "a CUDA device", str(place))
    ran = 0
    for D in head_dims:
        for dtype in dtypes:
            for tokens in (16, 17):
                k = torch.zeros(1, 2, tokens, D, dtype=dtype, device=place)
                angles = torch.zeros(1, tokens, D // 2, device=place)
                roles: tuple[Any, ...] = (SOURCE, TARGET, torch.zeros(1, tokens, dtype=torch.int8, device=place))
                for role in roles:
                    for cos in (angles, angles.to(dtype), None):
                        for backend in ("triton", "cuda"):
                            cache = StreamCache(
                                layers=1, batch=1, kv_heads=2, head_dim=D, dtype=dtype, device=place, capacity=32
                            )
                            try:
                                op(k, k, cos, cos, cache, 0, role=role, backend=backend)
                            except NotImplementedError:
                                continue
                            ran += 1
    torch.cuda.synchronize(place)
    return ran
