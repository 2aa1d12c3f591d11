"""A cache on disk: one safetensors file that says what it is and can tell that it is whole.

Tensors `layer.{i}.{source|target}.{k|v}`: [B, HK, held, D] with the first `held` slots, all that hold a key of any
session, the rest zero; `lengths`, `oldest` int32 and `anchored` int64 [layers, B, 2]. The metadata has the schema
version, the form of the cache as JSON, and a SHA-256 digest over form and tensors.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import json
import os
import tempfile
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .cache_form import CacheForm, place
from .lengths import Lengths
from .rotary import Rotary
from .segments import Segments
from .shapes import refuse
from .slots import stream_index

if TYPE_CHECKING:
    from .cache import StreamCache

SCHEMA = "streamkernels.StreamCache/1"
NAMES = ("source", "target")


def save(cache: StreamCache, path: str | os.PathLike[str]) -> None:
    safetensors = _safetensors()
    tensors = _state(cache)
    for layer in range(cache.layers):
        for segment, name in enumerate(NAMES):
            for part, buffer in zip("kv", cache._segments.pairs[layer][segment], strict=True):
                tensors[f"layer.{layer}.{name}.{part}"] = _held(cache, layer, segment, buffer)
    form = json.dumps(_described(cache), sort_keys=True)
    metadata = {"schema": SCHEMA, "form": form, "sha256": _digest(form, tensors)}
    where = os.path.abspath(os.fspath(path))
    handle, part_name = tempfile.mkstemp(dir=os.path.dirname(where), prefix=os.path.basename(where), suffix=".part")
    os.close(handle)
    try:
        safetensors.torch.save_file(tensors, part_name, metadata=metadata)
        os.replace(part_name, where)
    except BaseException:
        os.unlink(part_name)
        raise


def _state(cache: StreamCache) -> dict[str, Tensor]:
    shape = (cache.layers, cache.batch, 2)
    state = {
        "lengths": torch.empty(shape, dtype=torch.int32),
        "oldest": torch.empty(shape, dtype=torch.int32),
        "anchored": torch.empty(shape, dtype=torch.int64),
    }
    for group in cache._lengths.groups:
        for name, source in (("lengths", group.committed), ("oldest", group.oldest), ("anchored", group.anchored)):
            state[name][group.layers] = source.cpu()
    return state


def _held(cache: StreamCache, layer: int, segment: int, buffer: Tensor) -> Tensor:
    """The slots in use, on the CPU, zero where a session has no key: stale memory of other sessions stays here."""
    capacity = buffer.shape[2]
    used = min(cache._lengths.longest[layer][segment], capacity)
    total = cache._lengths.bound(layer)[:, segment, None]
    ring = cache.windows[segment] is not None
    index = stream_index(torch.arange(used)[None], total, capacity, cache.sinks, ring)
    # below `oldest` a ring slot was overwritten by a row that is no longer counted
    oldest = cache._lengths.oldest(layer).cpu()[:, segment, None]
    held = (index >= 0) & ((index >= oldest) | (index < (cache.sinks if ring else capacity)))
    return torch.where(held[:, None, :, None], buffer[:, :, :used].cpu(), 0).contiguous()


def load(
    kind: type[StreamCache],
    path: str | os.PathLike[str],
    device: str | torch.device | None,
    like: StreamCache | None,
) -> StreamCache:
    safetensors = _safetensors()
    try:
        with safetensors.safe_open(os.fspath(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except safetensors.SafetensorError as error:
        raise ValueError(f"load: path: expected a whole safetensors file, got {os.fspath(path)}: {error}") from error
    schema, form_text = metadata.get("schema"), metadata.get("form", "")
    if schema != SCHEMA:
        refuse("load", "path", f"a file of schema {SCHEMA}", f"schema {schema}")
    if metadata.get("sha256") != _digest(form_text, tensors):
        refuse("load", "path", "a file as it was saved", "one whose SHA-256 digest does not match its content")
    try:
        described = json.loads(form_text)
        form, capacities = _form_of(described)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"load: path: expected a file that StreamCache.save wrote, got a form without {error}"
        ) from error
    if like is not None:
        _check_like(described, _described(like))
    if device is not None:
        form = replace(form, devices=(place(device),) * form.layers)
    elif like is not None:
        form = replace(form, devices=like.form.devices)
    cache = object.__new__(kind)
    with torch.inference_mode(False):
        cache._start(form, Lengths(form.batch, form.devices), Segments(form, capacities))
        _fill(cache, tensors)
    return cache


def _fill(cache: StreamCache, tensors: dict[str, Tensor]) -> None:
    for layer in range(cache.layers):
        for segment, name in enumerate(NAMES):
            for part, buffer in zip("kv", cache._segments.pairs[layer][segment], strict=True):
                held = tensors[f"layer.{layer}.{name}.{part}"]
                buffer[:, :, : held.shape[2]].copy_(held)
    for group in cache._lengths.groups:
        group.committed.copy_(tensors["lengths"][group.layers])
        group.oldest.copy_(tensors["oldest"][group.layers])
        group.anchored.copy_(tensors["anchored"][group.layers])
    cache._lost = bool(tensors["oldest"].any())
    cache._lengths.tighten()


def _described(cache: StreamCache) -> dict[str, Any]:
    form = cache.form
    return {
        "layers": form.layers,
        "batch": form.batch,
        "kv_heads": list(form.kv_heads),
        "head_dim": list(form.head_dims),
        "dtype": str(form.dtype).removeprefix("torch."),
        "window": list(form.windows),
        "sinks": form.sinks,
        "max_chunk": form.max_chunk,
        "fixed": form.fixed,
        "least": list(form.capacity),
        "capacity": [[cache._segments.capacity(layer, s) for s in (0, 1)] for layer in range(form.layers)],
        # floats survive JSON exactly: it writes the shortest text that reads back as the same number
        "rotary": [None if rotary is None else asdict(rotary) for rotary in form.rotaries],
    }


def _form_of(described: dict[str, Any]) -> tuple[CacheForm, list[tuple[int, int]]]:
    rotaries = [None if r is None else Rotary(**r) for r in described["rotary"]]
    form = CacheForm.of(
        "load",
        described["layers"],
        described["batch"],
        getattr(torch, described["dtype"]),
        per_layer={
            "kv_heads": described["kv_heads"],
            "head_dim": described["head_dim"],
            "device": "cpu",
            "rotary": rotaries,
        },
        capacity=described["least"],
        window=described["window"],
        sinks=described["sinks"],
        max_chunk=described["max_chunk"],
        fixed=described["fixed"],
    )
    return form, [(source, target) for source, target in described["capacity"]]


def _check_like(file: dict[str, Any], like: dict[str, Any]) -> None:
    # through JSON, so that tuples compare as lists
    like = json.loads(json.dumps(like))
    for name in ("layers", "kv_heads", "head_dim", "dtype", "window", "sinks", "max_chunk", "rotary"):
        if file[name] != like[name]:
            if name == "rotary":
                refuse("load", "path", "a file whose rotary description is that of `like`", "a different one")
            refuse("load", "path", f"a file with {name} {like[name]}, as `like` has", f"{name} {file[name]}")


def _digest(form: str, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(form.encode())
    for name in sorted(tensors):
        x = tensors[name].contiguous()
        digest.update(f"\n{name} {x.dtype} {list(x.shape)}\n".encode())
        if x.numel():
            # the bytes in place: numpy has no bfloat16
            digest.update((ctypes.c_char * (x.numel() * x.element_size())).from_address(x.data_ptr()))
    return digest.hexdigest()


def _safetensors() -> Any:
    try:
        module = importlib.import_module("safetensors")
        importlib.import_module("safetensors.torch")
    except ImportError as error:
        raise ImportError("StreamCache.save and load need the safetensors package: pip install safetensors") from error
    return module
