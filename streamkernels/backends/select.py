"""The choice of a backend: one rule for all ops, never a silent fallback.

An op describes its call (`Call`), every kernel backend answers `reason(call)`: None if it can run the call, else one
sentence why not. `auto` takes the first of cuda, triton, reference that can, but Triton's kernel where the CUDA one
hands over to it, where it was measured to be slower; a named backend that cannot raises with its sentence.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from . import cuda, triton

BACKENDS = ("auto", "cuda", "triton", "reference")


@dataclass(frozen=True)
class Call:
    """What a backend needs to know to say yes or no: metadata only."""

    op: str
    device: torch.device
    dtype: torch.dtype
    sizes: dict[str, int] = field(default_factory=dict)  # shape letters: B T S H HK D N K
    features: frozenset[str] = frozenset()  # options in use: softcap, kept, bounded, backward, ...


@dataclass(frozen=True)
class Explanation:
    """Which backend runs a call, and what every backend said of it (`ok`, or why not)."""

    op: str
    backend: str
    reasons: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.backend}"]
        return "\n".join(lines + [f"  {name}: {text}" for name, text in self.reasons.items()])


class _Explained(Exception):
    def __init__(self, explanation: Explanation) -> None:
        self.explanation = explanation


_explaining: contextvars.ContextVar[bool] = contextvars.ContextVar("explaining", default=False)


def explaining() -> bool:
    """Whether the call in progress only wants to know its backend (`explain`)."""
    return _explaining.get()


def choose(call: Call, backend: str) -> str:
    """The backend that runs `call`: `backend` itself if it is named and able, the fastest able one for `auto`."""
    if backend not in BACKENDS:
        raise ValueError(f"{call.op}: backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    if not torch.compiler.is_compiling() and explaining():
        raise _Explained(_explanation(call, backend))
    if backend == "reference":
        return backend
    if backend != "auto":
        why = _kernel_backend(backend).reason(call)
        if why is not None:
            raise NotImplementedError(f"{call.op}: backend={backend!r} cannot run this call: {why}")
        return backend
    if call.device.type == "cuda" and call.dtype != torch.float64:
        able = [name for name in ("cuda", "triton") if _kernel_backend(name).reason(call) is None]
        if len(able) == 2 and cuda.hands_over(call) is not None:
            return "triton"
        if able:
            return able[0]
    return "reference"


def _kernel_backend(name: str) -> Any:
    return {"cuda": cuda, "triton": triton}[name]


def _explanation(call: Call, backend: str) -> Explanation:
    reasons = {name: _kernel_backend(name).reason(call) or "ok" for name in ("cuda", "triton")}
    why = cuda.hands_over(call)
    if reasons["cuda"] == reasons["triton"] == "ok" and why is not None:
        reasons["cuda"] = f"ok, but {why}"
    reasons["reference"] = "ok"
    token = _explaining.set(False)
    try:
        chosen = choose(call, backend)
    finally:
        _explaining.reset(token)
    return Explanation(call.op, chosen, reasons)


def explain(op: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Say which backend `op(*args, **kwargs)` would run on and why the others would not; runs and changes nothing.

    >>> import streamkernels as sk
    >>> print(sk.explain(sk.span_attention, q, k, v, spans))  # doctest: +SKIP
    span_attention: reference
      cuda: the tensors are on cpu; the CUDA kernels need a CUDA device
      triton: q is on cpu; Triton kernels need a CUDA device
      reference: ok

    Raises what the call itself would raise for bad arguments, and TypeError for a function that has no backends.
    """
    token = _explaining.set(True)
    try:
        op(*args, **kwargs)
    except _Explained as e:
        return e.explanation
    finally:
        _explaining.reset(token)
    raise TypeError(
        f"explain: op: expected an op of streamkernels that has backends, got {getattr(op, '__name__', op)!r}"
    )
