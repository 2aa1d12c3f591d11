"""What every refusal of the cache says, and that it changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from streamkernels.core.cache import PADDING, SOURCE, TARGET
from streamkernels.core.positions import Rotary

from .cache_cases import fill, make, refused

pytestmark = pytest.mark.usefixtures("fresh_memory_is_nan")

ROTARY = Rotary.from_theta(8)
BAD_FORMS: list[tuple[dict[str, Any], type[Exception], str]] = [
    (dict(layers=0), ValueError, "layers"),
    (dict(batch=1.0), TypeError, "batch"),
    (dict(kv_heads=[1]), ValueError, "kv_heads"),
    (dict(head_dim=12), ValueError, "head_dim"),
    (dict(head_dim=264), ValueError, "head_dim"),
    (dict(dtype=torch.int8), TypeError, "dtype"),
    (dict(capacity=0), ValueError, "capacity"),
    (dict(capacity=(1, 2, 3)), ValueError, "capacity"),
    (dict(window=0), ValueError, "window"),
    (dict(window=(1, 2, 3)), ValueError, "window"),
    (dict(sinks=2), ValueError, "sinks"),
    (dict(window=3, max_chunk=0), ValueError, "max_chunk"),
    (dict(rotary=3), TypeError, "rotary"),
    (dict(rotary=Rotary.from_theta(16)), ValueError, "rotary: .*rotary_dim"),
]


@pytest.mark.parametrize(("changes", "error", "text"), BAD_FORMS)
def test_bad_forms_are_named(changes: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=f"StreamCache: {text}"):
        make(**changes)


def int8(*rows: list[int]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int8)


REFUSED: list[tuple[str, Any, type[Exception], str]] = [
    ("layer", lambda c: c.stage(2, SOURCE, 1), ValueError, "stage: layer"),
    ("role int", lambda c: c.stage(0, 2, 1), ValueError, "stage: role"),
    ("role bool", lambda c: c.stage(0, True, 1), ValueError, "stage: role"),
    ("role dtype", lambda c: c.stage(0, torch.zeros(2, 1), 1), TypeError, "stage: role"),
    ("role shape", lambda c: c.stage(0, int8([0, 0]), 2), ValueError, "stage: role"),
    ("role values", lambda c: c.stage(0, int8([0, 2], [0, -2]), 2), ValueError, r"stage: role: .*\[-2, 0, 2\]"),
    ("role device", lambda c: c.stage(0, int8([0], [0]).to("meta"), 1), ValueError, "stage: role"),
    ("rows", lambda c: c.stage(0, SOURCE, -1), ValueError, "stage: T"),
    ("full", lambda c: c.stage(0, SOURCE, 3), ValueError, "stage: rows: .*source segment"),
    ("full by count", lambda c: c.stage(1, int8([-1] * 3, [1, 1, 1]), 3), ValueError, "stage: rows: .*target segment"),
    ("commit", lambda c: c.commit(), RuntimeError, "layers 0, 1 have not"),
    ("pop too many", lambda c: c.pop(3), ValueError, "at most the 2 rows of session 0"),
    ("pop one too many", lambda c: c.pop([2, 3]), ValueError, "at most the 2 rows of session 1"),
    ("pop negative", lambda c: c.pop(-1), ValueError, "pop: n"),
    ("pop shape", lambda c: c.pop([1]), ValueError, "pop: n"),
    ("pop role", lambda c: c.pop(1, PADDING), ValueError, "pop: role"),
    ("evict order", lambda c: c.evict(1, 0, SOURCE), ValueError, "evict: end"),
    ("evict far", lambda c: c.evict(0, 3, SOURCE), ValueError, "evict: end"),
    ("evict negative", lambda c: c.evict(-1, 1, SOURCE), ValueError, "evict: begin"),
    ("keep order", lambda c: c.keep([1, 0]), ValueError, "keep: index: .*ascending"),
    ("keep twice", lambda c: c.keep([0, 0]), ValueError, "keep: index: .*ascending"),
    ("keep far", lambda c: c.keep([0, 2]), ValueError, "keep: index"),
    ("keep dtype", lambda c: c.keep(torch.zeros(1)), TypeError, "keep: index"),
    ("keep shape", lambda c: c.keep(torch.zeros(3, 1, dtype=torch.int64)), ValueError, "keep: index"),
    ("keep count", lambda c: c.keep([0], 2), ValueError, "keep: count"),
    ("keep counts", lambda c: c.keep([0], torch.tensor([1, 2])), ValueError, "keep: count"),
    ("keep much", lambda c: c.keep(torch.arange(9), 1), ValueError, "keep: index: expected at most 4"),
    ("reanchor nan", lambda c: c.reanchor(float("nan")), ValueError, "reanchor: delta"),
    ("reanchor nans", lambda c: c.reanchor([float("nan"), 0.0]), ValueError, "reanchor: delta"),
    ("reanchor shape", lambda c: c.reanchor([1.0]), ValueError, "reanchor: delta"),
    ("reanchor axes", lambda c: c.reanchor([[1.0, 1.0]] * 3), ValueError, "reanchor: delta"),
    ("reset", lambda c: c.reset(2), ValueError, "reset: row"),
    ("select none", lambda c: c.select([]), ValueError, "select: rows"),
    ("select far", lambda c: c.select([0, 2]), ValueError, "select: rows"),
    ("select bool", lambda c: c.select([True, False]), TypeError, "select: rows"),
    ("reorder short", lambda c: c.reorder([0]), ValueError, "reorder: rows"),
    ("reorder far", lambda c: c.reorder(torch.tensor([0, -1])), ValueError, "reorder: rows"),
]


@pytest.mark.parametrize(("call", "error", "text"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
def test_refused_calls_change_nothing(call: Any, error: type[Exception], text: str) -> None:
    cache = make(fixed=True, rotary=ROTARY)
    fill(cache, SOURCE, 2), fill(cache, TARGET, 2)
    refused(cache, error, text, lambda: call(cache))


@pytest.mark.parametrize("name", ["pop", "evict", "keep", "reanchor", "select", "reorder", "reset"])
def test_nothing_is_rearranged_under_staged_rows(name: str) -> None:
    cache = make(rotary=ROTARY)
    fill(cache, SOURCE, 2)
    fill(cache, SOURCE, 1, commit=False)
    arguments: dict[str, tuple[Any, ...]] = {
        "pop": (1, SOURCE),
        "evict": (0, 1, SOURCE),
        "keep": ([0],),
        "reanchor": (1.0,),
        "select": ([0],),
        "reorder": ([0, 1],),
        "reset": (0,),
    }
    refused(cache, RuntimeError, f"{name}: rows are staged", lambda: getattr(cache, name)(*arguments[name]))
    cache.commit()
    assert int(cache.length(0)[0, 0]) == 3


def test_half_a_step_is_not_committed() -> None:
    cache = make(layers=3)
    cache.stage(0, SOURCE, 1), cache.stage(2, SOURCE, 1)
    refused(cache, RuntimeError, "layers 1 have not", cache.commit)
    cache.discard()
    refused(cache, RuntimeError, "layers 0, 1, 2 have not", cache.commit)


def test_reanchoring_needs_a_rotary_and_patience() -> None:
    cache = make(rotary=[ROTARY, None])
    refused(cache, ValueError, "reanchor: rotary", lambda: cache.reanchor(1.0))
    bounded = make(window=3, sinks=1, rotary=ROTARY, max_chunk=2)
    for _ in range(3):
        fill(bounded, SOURCE, 2)
    bounded.reanchor(-2.0)
    fill(bounded, SOURCE, 2)
    refused(bounded, RuntimeError, "2 new tokens since the last move, 3 are needed", lambda: bounded.reanchor(-2.0))
    bounded.reanchor([0.0, 0.0])
    fill(bounded, SOURCE, 1)
    before = bounded.segment(0, SOURCE)[0].clone()
    bounded.reanchor([-2.0, 0.0])
    after = bounded.segment(0, SOURCE)[0]
    assert torch.equal(after[1], before[1]) and not torch.equal(after[0], before[0])
    bounded.reset(0)
    bounded.reanchor([-2.0, 0.0])
    refused(bounded, NotImplementedError, "evicts by itself", lambda: bounded.evict(0, 1, SOURCE))
    refused(bounded, NotImplementedError, "evicts by itself", lambda: bounded.keep([0]))
    refused(bounded, ValueError, "window of 3 keys the ring holds", lambda: bounded.pop([0, 5], SOURCE))
