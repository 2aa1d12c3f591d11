"""The Triton backend: the only, lazy, import of `streamkernels.triton_kernels`."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.shapes import refuse
from .tensors import reader

OPS: tuple[str, ...] = ("rotate_append", "incremental_prefill", "span_attention", "prepare")
OPS += ("token_scores", "select_tokens", "compact", "rotate", "reanchor")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _missing() -> str | None:
    return None if _installed() else "triton is not installed (pip install 'streamkernels[triton]')"


# a constant to torch.compile, which could not trace the search for a module
_missing._dynamo_marked_constant = True  # type: ignore[attr-defined]


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
    attends = call.op in ("span_attention", "incremental_prefill")
    if attends and call.dtype == torch.float32 and "backward" in call.features:
        return "fp32 gradients would be less accurate than plain PyTorch's (2.7 times its error, measured on an H200)"
    if "scale" in call.features:
        return "the Triton kernels need a scale > 0"
    if call.device.type not in ("cpu", "cuda"):
        return f"the tensors are on {call.device.type}; Triton kernels need a CUDA device"
    return _missing()


@functools.cache
def _launch(op: str, function: str, file: str = "launch") -> Any:
    device: Any = importlib.import_module("streamkernels.triton_kernels.device.launch")
    device.native = reader()
    return getattr(importlib.import_module(f"streamkernels.triton_kernels.{op}.{file}"), function)


def rotate_append(*arguments: Any) -> None:
    """`reference.rotate_append` with the same raw arguments, as one Triton launch."""
    _launch("rotate_append", "rotate_append")(*arguments)


def prepare(*arguments: Any) -> Any:
    """`reference.prepare` with the same raw arguments, as two Triton launches."""
    return _launch("prepare", "prepare")(*arguments)


def span_attention(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> Any:
    """`reference.span_attention` with the op's raw arguments."""
    return _launch("span_attention", "span_attention")(q, k, v, *_prepared(options, k.shape[2]))


def span_attention_backward(*arguments: Any) -> Any:
    """`reference.span_attention_backward` with the op's raw arguments."""
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
    """The op's options with what `prepare` makes of the bounds if the caller did not."""
    *given, row_blocks, key_blocks, scale, softcap = options
    if row_blocks is None:
        row_blocks, key_blocks = prepare(given[0], S)
    return *given, row_blocks, key_blocks, scale, softcap


def incremental_prefill(*arguments: Any) -> tuple[Tensor, Tensor]:
    """`reference.incremental_prefill` with the same raw arguments: one Triton launch, one more where it splits the keys
    over programs, and one before it that writes a long chunk."""
    call = _launch("incremental_prefill", "incremental_prefill")
    k, (ring_sinks, bounded, source_window, target_window) = arguments[1], arguments[18:22]
    rings = [bounded and source_window > 0, bounded and target_window > 0]
    # short chunks are written by the attention itself; so are those that only one of two rings takes
    if k.shape[2] < _launch("incremental_prefill", "LONG_CHUNK") or rings[0] != rings[1]:
        return call(*arguments)
    rotate_append(*arguments[1:13], ring_sinks, rings[0], arguments[25])
    return call(*arguments, written=True)


def incremental_prefill_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`reference.incremental_prefill_backward` with the same raw arguments."""
    return _launch("incremental_prefill", "incremental_prefill_backward", "launch_backward")(*arguments)


def warmup(
    device: torch.device | str = "cuda",
    *,
    head_dims: Sequence[int] = (64, 128),
    dtypes: Sequence[torch.dtype] = (torch.bfloat16,),
    heads: Sequence[tuple[int, int]] = ((32, 32),),
    slots: Sequence[int] = (1, 2),
    training: bool = False,
    classes: bool = False,
) -> int:
    """Compile and load kernels ahead of the first call, so that no request pays for it.

    Those of a streaming step (`incremental_prefill`, `rotate_append`), of `span_attention` and `prepare` with all slots
    ATTEND, of `token_scores`, `select_tokens`, `compact`, `rotate` and `reanchor`. Runs each variant once on scratch
    tensors of `device` (some 100 MB, freed on return), Triton and CUDA alike; a first time takes seconds per variant, a
    later process finds what Triton keeps on disk.

    Args:
        head_dims, dtypes: those that the models in use have.
        heads: (H, HK) of the models in use.
        slots: the numbers of spans per row in use: 1 for causal, 2 for a streaming mask.
        training: also the backward of `span_attention`.
        classes: also `span_attention` under a class table, as patched models use it for padded batches.

    Returns the number of variants that ran. Raises ValueError if `device` is no CUDA device. Lengths, batch sizes and
    capacities are run-time values: none of them compiles anything later, for head dims that are multiples of 16.
    """
    place = torch.device(device)
    if place.type != "cuda":
        refuse("warmup", "device", "a CUDA device", str(place))
    ran = _warm_selection(place)
    for D in head_dims:
        for dtype in dtypes:
            ran += _warm_streaming_step(place, D, dtype)
            ran += _warm_span_attention(place, D, dtype, slots, training, classes)
            ran += _warm_rows(place, D, dtype)
            ran += sum(_warm_token_scores(place, D, dtype, H, HK) for H, HK in heads)
            ran += sum(_warm_incremental_prefill(place, D, dtype, H, HK) for H, HK in heads)
    torch.cuda.synchronize(place)
    return ran


def _warm_incremental_prefill(place: torch.device, D: int, dtype: torch.dtype, H: int, HK: int) -> int:
    """The forward for rows of one role and of any, rotated by the kernel or before, and for one row, a few, and chunks
    that are long, and before many keys; what the kernel is compiled for is H // HK."""
    from ..core.cache import SOURCE, TARGET, StreamCache
    from ..ops.incremental_prefill import incremental_prefill as op

    ran = 0
    R, long = H // HK, _launch("incremental_prefill", "LONG_CHUNK")
    few = [(T, T + 1024) for T in sorted({1, 16 // R + 1, long, 1024 // R + 1})]
    for T, capacity in (*few, (long - 1, _launch("incremental_prefill", "far_capacity")(place, H))):
        q, k = (torch.zeros(1, heads, T, D, dtype=dtype, device=place) for heads in (H, HK))
        cache = StreamCache(
            layers=1, batch=1, kv_heads=HK, head_dim=D, dtype=dtype, device=place, capacity=capacity, fixed=True
        )
        limit = torch.zeros(1, T, dtype=torch.int32, device=place)
        mixed = torch.zeros(1, T, dtype=torch.int8, device=place)
        for role, seen in ((SOURCE, None), (TARGET, limit), (mixed, limit)):
            for cos in (torch.zeros(1, T, D // 2, device=place), None):
                for backend in ("triton", "cuda"):
                    try:
                        op(q, k, k, cos, cos, cache, 0, role=role, source_limit=seen, backend=backend)
                    except NotImplementedError:
                        continue
                    ran += 1
                    cache.discard()
    return ran


def _ran(op: Any, *arguments: Any, **options: Any) -> int:
    """Run one variant on both kernel backends; how many of them have it."""
    ran = 0
    for backend in ("triton", "cuda"):
        try:
            op(*arguments, **options, backend=backend)
        except NotImplementedError:
            continue
        ran += 1
    return ran


def _warm_streaming_step(place: torch.device, D: int, dtype: torch.dtype) -> int:
    from ..core.cache import SOURCE, TARGET, StreamCache
    from ..ops.rotate_append import rotate_append as op

    ran = 0
    # a role's stride is the chunk's length: 1, a multiple of 16, another
    for tokens in (1, 16, 17):
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
    return ran


def _warm_span_attention(
    place: torch.device, D: int, dtype: torch.dtype, slots: Sequence[int], training: bool, classes: bool
) -> int:
    from ..core.spans import Spans
    from ..ops.prepare import prepare as prepared_op
    from ..ops.span_attention import span_attention as op

    ran = 0
    # many rows over many keys have a tile of their own; dk and dv of few key heads are made in parts
    for H, HK, T, S in ((2, 2, 17, 17), (8448, 1, 16, 16393)):
        sizes = ((H, T), (HK, S), (HK, S))
        rows = (torch.zeros(1, heads, length, D, dtype=dtype, device=place) for heads, length in sizes)
        q, k, v = (x.requires_grad_(training) for x in rows)
        of_key, of_row = (torch.zeros(1, length, dtype=torch.int8, device=place) for length in (S, T))
        table: dict[str, Any] = {"key_class": of_key, "row_class": of_row, "class_rules": of_row[:, :1]}
        for N in slots:
            bounds = torch.zeros(1, T, N, 2, dtype=torch.int32, device=place)
            for spans in (Spans(bounds), *([Spans(bounds, **table)] if classes else [])):
                blocks = prepared_op(spans, S, backend="triton")
                o: Any = op(q, k, v, spans, prepared=blocks, backend="triton")
                if training:
                    torch.autograd.grad(o.sum(), (q, k, v))
                ran += 2 if training else 1
    # of few rows and of many
    for T in (1, 65):
        q, bounds = torch.zeros(1, 2, T, D, dtype=dtype, device=place), torch.zeros(1, T, 1, 2, dtype=torch.int32)
        with contextlib.suppress(NotImplementedError):
            op(q, q, q, bounds.to(place), backend="cuda")
            ran += 1
    return ran


def _warm_token_scores(place: torch.device, D: int, dtype: torch.dtype, H: int, HK: int) -> int:
    from ..ops.token_scores import token_scores as op

    q, k = (torch.zeros(1, heads, 1, D, dtype=dtype, device=place) for heads in (H, HK))
    lse, count = torch.zeros(1, H, 1, device=place), torch.zeros(1, dtype=torch.int32, device=place)
    # few keys and many have tiles of their own; none of these is a key
    lists = (torch.full((1, K), -1, dtype=torch.int32, device=place) for K in (1, (1 << 17) // HK + 1))
    return sum(_ran(op, q, k, k, q, lse, index, count) for index in lists)


def _warm_selection(place: torch.device) -> int:
    from ..ops.compact import compact as compact_op
    from ..ops.select_tokens import select_tokens as op

    scores = torch.zeros(1, 3, device=place)
    index = torch.zeros(1, 3, dtype=torch.int32, device=place)
    ran = 0
    for options in ({"threshold": 0.5}, {"k": 1}):
        ran += _ran(op, scores, **options) + _ran(op, scores, **options, index=index, count=index[:, 0])
    return ran + _ran(compact_op, index.long(), index, index[:, 0])


def _warm_rows(place: torch.device, D: int, dtype: torch.dtype) -> int:
    """Those that move or rotate rows: hidden states, keys and values of head dim D."""
    from ..ops.compact import compact as compact_op
    from ..ops.reanchor import reanchor as reanchor_op
    from ..ops.rotate import rotate as rotate_op

    x = torch.zeros(1, 2, 3, D, dtype=dtype, device=place)
    angles = torch.zeros(1, 3, D // 2, device=place)
    index = torch.zeros(1, 3, dtype=torch.int32, device=place)
    ran = _ran(compact_op, x, index, index[:, 0], dim=2)
    ran += _ran(compact_op, x.new_zeros(1, 3, 2048), index, index[:, 0])
    for cos in (angles, angles.to(dtype)):
        ran += _ran(rotate_op, x, cos, cos) + _ran(reanchor_op, x, cos, cos)
    return ran
