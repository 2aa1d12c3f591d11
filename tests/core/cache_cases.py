"""Small caches whose rows say where they belong, and what a refusal must leave as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from streamkernels.core.cache import PADDING, SOURCE, TARGET, StreamCache, slot

torch.set_num_threads(1)


def make(**changes: Any) -> StreamCache:
    given: dict[str, Any] = dict(
        layers=2, batch=2, kv_heads=2, head_dim=8, dtype=torch.float32, device="cpu", capacity=4
    )
    return StreamCache(**{**given, **changes})


def fill(cache: StreamCache, role: Any, T: int, *, commit: bool = True) -> None:
    """Stage T rows everywhere and write numbers that say where they belong: 100 * row + stream index."""
    for layer in range(cache.layers):
        staged = cache.stage(layer, role, T)
        for b in range(cache.batch):
            at = [int(n) for n in staged.length[b]]
            for t in range(T):
                r = staged.segment if staged.role is None else int(staged.role[b, t])
                if r == PADDING:
                    continue
                k, v = ((staged.source_k, staged.source_v), (staged.target_k, staged.target_v))[r]
                ring = staged.windows[r] is not None
                place = slot(torch.tensor(at[r]), k.shape[2], staged.sinks, ring)
                if place < k.shape[2]:
                    k[b, :, place], v[b, :, place] = 100.0 * b + at[r], 100.0 * b + at[r]
                at[r] += 1
    if commit:
        cache.commit()


def values(cache: StreamCache, layer: int, role: int, b: int) -> list[float]:
    n = int(cache.length(layer)[b, role])
    return cache.segment(layer, role)[1][b, 0, :n, 0].tolist()


def snapshot(cache: StreamCache) -> list[Any]:
    seen: list[Any] = [cache.epoch, cache.batch, cache.status.tolist(), cache._lost, list(cache._step.rows)]
    for layer in range(cache.layers):
        tensors = [*cache.segment(layer, SOURCE), *cache.segment(layer, TARGET), cache.length(layer)]
        seen += [(t.data_ptr(), list(t.shape), t.view(torch.uint8).numpy().tobytes()) for t in tensors]
        seen.append(cache._lengths.oldest(layer).tolist())
    return seen


def refused(cache: StreamCache, error: type[Exception], text: str, call: Any) -> None:
    before = snapshot(cache)
    with pytest.raises(error, match=text):
        call()
    assert snapshot(cache) == before
