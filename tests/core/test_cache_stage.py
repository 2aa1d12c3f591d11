"""Staging a layer again, which looks at less: it gives and refuses what the first time does."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from streamkernels.core import cache_room
from streamkernels.core.cache import PADDING, SOURCE, TARGET, Staged, StreamCache

from .cache_cases import make


@pytest.fixture
def again(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each `stage`, whether it went the short way."""
    ways: list[bool] = []
    short = cache_room._stage_again

    def told(*arguments: Any) -> Staged | None:
        found = short(*arguments)
        ways.append(found is not None)
        return found

    monkeypatch.setattr(cache_room, "_stage_again", told)
    return ways


def check(staged: Staged, cache: StreamCache, layer: int, segment: int, role: torch.Tensor | None = None) -> None:
    pairs = (*cache.segment(layer, SOURCE), *cache.segment(layer, TARGET))
    assert all(a is b for a, b in zip(staged[:4], pairs, strict=True))
    length = cache.length(layer)
    assert staged.length.data_ptr() == length.data_ptr() and torch.equal(staged.length, length)
    assert staged.status.data_ptr() == cache.status.data_ptr()
    assert staged.role is role and staged.segment == segment
    assert (staged.bounded, staged.windows, staged.oldest) == (False, (None, None), None)


def test_the_short_way_gives_the_same(again: list[bool]) -> None:
    cache = make(capacity=8)
    for n in range(3):
        for role, T in ((SOURCE, 1), (TARGET, 2)):
            for layer in (0, 1):
                check(cache.stage(layer, role, T), cache, layer, role)
            cache.commit()
        assert cache.length().tolist() == [[[n + 1, 2 * n + 2]] * 2] * 2
    assert again == [False, False] + [True] * 10


def test_roles_are_looked_at_once_a_step(again: list[bool]) -> None:
    cache = make(capacity=8)
    for n in range(3):
        role = torch.tensor([[SOURCE, TARGET], [PADDING, TARGET]], dtype=torch.int8)
        for layer in (0, 1):
            check(cache.stage(layer, role, 2), cache, layer, SOURCE, role)
        cache.commit()
        assert cache.length(1).tolist() == [[n + 1, n + 1], [0, n + 1]]
    assert again == [False, False] + [False, True] * 2
    # another tensor, and another T, are others
    cache.stage(0, role, 2)
    with pytest.raises(ValueError, match="stage: role: expected shape"):
        cache.stage(1, role, 1)
    with pytest.raises(ValueError, match="stage: role: expected values"):
        cache.stage(1, role + 5, 2)
    assert cache._step.rows[1] is None


def test_growth_and_selection_are_seen(again: list[bool]) -> None:
    cache = make(capacity=8)
    for _ in range(3):
        for layer in (0, 1):
            check(cache.stage(layer, TARGET, 4), cache, layer, TARGET)
        cache.commit()
    assert cache.capacity(0, TARGET) == 16 and again == [False, False, True, True, False, False]
    cache.select([1, 0, 1])
    again.clear()
    for layer in (0, 1, 0):
        staged = cache.stage(layer, TARGET, 1)
        check(staged, cache, layer, TARGET)
        assert staged.length.shape == (3, 2)
    assert again == [False, False, True]


@pytest.mark.parametrize("role", [SOURCE, TARGET])
def test_room_made_between_two_stages_is_seen(again: list[bool], role: int) -> None:
    cache = make(capacity=8)
    for layer in (0, 1):
        cache.stage(layer, role, 1)
    cache.commit()
    cache.reserve(**{("source", "target")[role]: 20})
    for layer in (0, 1, 0):
        check(cache.stage(layer, role, 1), cache, layer, role)
    # nor is it another tensor of lengths
    group = cache._lengths.groups[0]
    group.committed = group.committed.clone()
    check(cache.stage(0, role, 1), cache, 0, role)
    assert again == [False, False, False, False, True, False]


@pytest.mark.parametrize("twin_of", [copy.deepcopy, StreamCache.fork])
def test_a_copy_stages_its_own(twin_of: Any) -> None:
    cache = make(capacity=8)
    for layer in (0, 1):
        cache.stage(layer, TARGET, 2)
    cache.commit()
    twin = twin_of(cache)
    for one in (twin, cache, twin):
        for layer in (0, 1):
            check(one.stage(layer, TARGET, 1), one, layer, TARGET)
        one.commit()
    assert cache.length(0).tolist() == [[0, 3]] * 2 and twin.length(0).tolist() == [[0, 4]] * 2


def test_refusals_of_a_known_layer() -> None:
    cache = make(capacity=8, fixed=True)
    for layer in (0, 1):
        cache.stage(layer, TARGET, 5)
    cache.commit()
    for role, T, error, text in (
        (TARGET, 4, ValueError, "8 slots of layer 0's target segment"),
        (True, 1, ValueError, "stage: role"),
        (2, 1, ValueError, "stage: role"),
        (-1, 1, ValueError, "stage: role"),
        (TARGET, -1, ValueError, "stage: T"),
        (TARGET, 1.0, (TypeError, ValueError), "stage: T"),
    ):
        with pytest.raises(error, match=text):
            cache.stage(0, role, T)
        assert not cache._step.any() and cache.length(0).tolist() == [[0, 5]] * 2
    for layer in (-1, 2, 0.0):
        with pytest.raises((TypeError, ValueError), match="stage: layer"):
            cache.stage(layer, TARGET, 1)
    # a bound that nobody can rely on is measured first
    cache.replayed(target=5)
    check(cache.stage(0, TARGET, 3), cache, 0, TARGET)


def test_nothing_is_remembered_where_somebody_watches(again: list[bool]) -> None:
    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    cache = make(capacity=8)
    with Watch():
        cache.stage(0, TARGET, 1)
    assert cache._ready == [None, None]
    cache.stage(0, TARGET, 1)
    cache.stage(0, TARGET, 1)
    assert again == [False, False, True]


def test_bounded_caches_take_the_long_way(again: list[bool]) -> None:
    cache = make(capacity=8, window=4, sinks=1, max_chunk=2)
    for _ in range(3):
        for layer in (0, 1):
            cache.stage(layer, TARGET, 2)
        cache.commit()
    assert not again
