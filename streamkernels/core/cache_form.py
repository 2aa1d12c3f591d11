"""What a cache is made of: the arguments of `StreamCache`, checked and spelt out per layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from .rotary import Rotary
from .shapes import FLOATS, MAX_HEAD_DIM, check_int, refuse

# lengths are int32 on the device
UNLIMITED = 2**31 - 1
X = TypeVar("X")


@dataclass(frozen=True)
class CacheForm:
    """One entry per layer in kv_heads, head_dims, devices and rotaries; (source, target) in capacity and windows."""

    batch: int
    kv_heads: tuple[int, ...]
    head_dims: tuple[int, ...]
    dtype: torch.dtype
    devices: tuple[torch.device, ...]
    rotaries: tuple[Rotary | None, ...]
    capacity: tuple[int, int]
    windows: tuple[int | None, int | None]
    sinks: int
    max_chunk: int
    fixed: bool

    @classmethod
    def of(
        cls,
        op: str,
        layers: int,
        batch: int,
        dtype: torch.dtype,
        *,
        per_layer: dict[str, Any],
        capacity: int | tuple[int, int],
        window: int | tuple[int | None, int | None] | None,
        sinks: int,
        max_chunk: int,
        fixed: bool,
    ) -> CacheForm:
        """Check the arguments of `StreamCache`; a bounded segment gets at least the capacity that its window needs."""
        check_int(op, "layers", layers, minimum=1)
        check_int(op, "batch", batch, minimum=1)
        if dtype not in FLOATS:
            refuse(op, "dtype", "float16, bfloat16, float32 or float64", str(dtype), TypeError)
        each = {name: _each(op, name, x, layers) for name, x in per_layer.items()}
        for n in each["kv_heads"]:
            check_int(op, "kv_heads", n, minimum=1)
        for n in each["head_dim"]:
            if check_int(op, "head_dim", n, minimum=8, maximum=MAX_HEAD_DIM) % 8:
                refuse(op, "head_dim", "a multiple of 8", n)
        _check_rotaries(op, each["rotary"], each["head_dim"])
        windows = tuple(w if w is None else check_int(op, "window", w, minimum=1) for w in _pair(op, "window", window))
        check_int(op, "sinks", sinks)
        check_int(op, "max_chunk", max_chunk, minimum=1)
        if windows == (None, None) and sinks:
            refuse(op, "sinks", "0 without a window", sinks)
        sizes = []
        for size, w in zip(_pair(op, "capacity", capacity), windows, strict=True):
            check_int(op, "capacity", size, minimum=1, maximum=UNLIMITED)
            sizes.append(size if w is None else max(size, sinks + w + max_chunk - 1))
        return cls(
            batch=batch,
            kv_heads=tuple(each["kv_heads"]),
            head_dims=tuple(each["head_dim"]),
            dtype=dtype,
            devices=tuple(place(d) for d in each["device"]),
            rotaries=tuple(each["rotary"]),
            capacity=(sizes[0], sizes[1]),
            windows=(windows[0], windows[1]),
            sinks=sinks,
            max_chunk=max_chunk,
            fixed=bool(fixed),
        )

    @property
    def layers(self) -> int:
        return len(self.devices)


def _each(op: str, name: str, x: X | Sequence[X], layers: int) -> list[X]:
    if isinstance(x, (list, tuple)):
        if len(x) != layers:
            refuse(op, name, f"one value, or {layers}, one per layer", f"{len(x)} values")
        return list(x)
    return [x] * layers  # type: ignore[list-item]


def _pair(op: str, name: str, x: Any) -> tuple[Any, Any]:
    pair = tuple(x) if isinstance(x, (tuple, list)) else (x, x)
    if len(pair) != 2:
        refuse(op, name, "one value or (source, target)", x)
    return pair[0], pair[1]


def place(device: str | torch.device) -> torch.device:
    """A device with its index, as the tensors made there have it."""
    d = torch.device(device)
    return torch.device("cuda", torch.cuda.current_device()) if d.type == "cuda" and d.index is None else d


def _check_rotaries(op: str, rotaries: list[object], head_dims: list[int]) -> None:
    for rotary, D in zip(rotaries, head_dims, strict=True):
        if rotary is None:
            continue
        if not isinstance(rotary, Rotary):
            refuse(op, "rotary", "a Rotary or None", rotary, TypeError)
        if rotary.rotary_dim > D:
            refuse(op, "rotary", f"a rotary_dim of at most head_dim = {D}", rotary.rotary_dim)
