"""After `warmup`, no length compiles anything: counted on a CPU, by the forms of calls that Triton would compile.

Triton compiles a kernel once per form of its arguments: types, constants, integers that are 1 or multiples of 16,
aligned pointers. Its launcher runs here with a driver that only names a GPU, and a hook that notes a new form and
compiles nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

import streamkernels as sk
from streamkernels.backends import triton as backend
from streamkernels.core.spans import Spans
from streamkernels.testing.inputs import random_spans

triton = pytest.importorskip("triton")
CPU = torch.device("cpu")
LENGTHS = (1, 2, 3, 15, 16, 17, 48, 333, 1000, 1024, 2049)
D, DTYPE = 64, torch.float16


@pytest.fixture
def forms(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The forms asked for, in order, by kernel and types."""
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    if backend.interpreting():
        pytest.skip("the interpreter compiles nothing")
    from streamkernels.triton_kernels.span_attention import launch

    asked: list[str] = []
    known: set[str] = set()

    def note(*, repr: str, fn: SimpleNamespace, key: object, **_: object) -> bool:
        if (form := f"{fn.name} {key}") not in known:
            known.add(form)
            asked.append(repr)
        return True

    names = {
        # a device that no other test has: Triton keeps what it knows per device
        "get_current_device": lambda: 99,
        "get_current_stream": lambda device: 0,
        "get_current_target": lambda: GPUTarget("cuda", 90, 32),
        "get_active_torch_device": lambda: CPU,
    }
    monkeypatch.setattr(driver, "_active", SimpleNamespace(**names))
    monkeypatch.setattr(knobs.runtime, "jit_cache_hook", note)
    monkeypatch.setattr(backend, "interpreting", lambda: True)
    monkeypatch.setattr(launch, "_capability", lambda device: 90)
    yield asked
    launch.FORWARD.clear()
    launch.BACKWARD.clear()


def rows(B: int, H: int, T: int) -> torch.Tensor:
    """[B, H, T, D] as models hand it over."""
    return torch.zeros(B, T, H, D, dtype=DTYPE).transpose(1, 2)


@pytest.mark.parametrize("classes", [False, True])
@pytest.mark.parametrize("B, H, HK", [(2, 8, 2), (1, 28, 4), (1, 3, 1), (3, 5, 5)])
def test_span_attention(B, H, HK, classes, forms):
    backend._warm_span_attention(CPU, D, DTYPE, (2,), True, classes)
    warmed = len(forms)
    assert warmed >= 5
    for T in (*LENGTHS, 9001):
        q, k, v = (rows(B, heads, T).requires_grad_() for heads in (H, HK, HK))
        # a view that begins anywhere in a longer list
        bounds = random_spans(B, T + 1, T, 2, torch.Generator().manual_seed(T)).bounds.flatten()
        bounds = bounds[3 : 3 + 4 * B * T].view(B, T, 2, 2)
        table = {}
        if classes:
            kinds = torch.zeros(B, T + 1, dtype=torch.int8)
            table = {"key_class": kinds[:, 1:], "row_class": kinds[:, 1:], "class_rules": kinds[:1, :1]}
        o, lse = sk.span_attention(q, k, v, Spans(bounds, **table), return_lse=True, backend="triton")
        torch.autograd.grad(o.sum() + lse.sum(), (q, k, v))
        assert forms[warmed:] == [], f"T = {T}"


@pytest.mark.parametrize("B, H, HK", [(2, 8, 2), (1, 32, 32)])
def test_what_moves_and_scores_tokens(B, H, HK, forms):
    backend._warm_selection(CPU)
    backend._warm_rows(CPU, D, DTYPE)
    backend._warm_token_scores(CPU, D, DTYPE, H, HK)
    warmed = len(forms)
    assert warmed >= 8
    for T in (*LENGTHS, 20000):
        k = rows(B, HK, T)
        q, o = rows(B, H, T)[:, :, -1:], rows(B, H, T)[:, :, -1:]
        index = torch.full((B, T + 1), -1, dtype=torch.int32)[:, 1:]
        count = torch.full((B + 1,), T, dtype=torch.int32)[1:]
        norm = sk.token_scores(q, k, k, o, torch.zeros(B, H, T)[:, :, -1:], index, count, backend="triton").norm
        for options in ({"threshold": 0.1}, {"k": T // 2}):
            sk.select_tokens(norm, **options, backend="triton")
            sk.select_tokens(norm, **options, index=index, count=count, backend="triton")
        sk.compact(k, index, count, dim=2, backend="triton")
        sk.compact(torch.zeros(B, T, 1024, dtype=DTYPE), index, count, backend="triton")
        sk.compact(torch.zeros(B, T, dtype=torch.int64), index, count, backend="triton")
        for samples in (1, B):
            angles = torch.zeros(samples, T, D // 2)
            sk.rotate(k, angles, angles, backend="triton")
            sk.reanchor(k, angles, angles, backend="triton")
            sk.reanchor(k, angles[:, :1], angles[:, :1], backend="triton")
        assert forms[warmed:] == [], f"T = {T}"


@pytest.mark.parametrize("B, HK", [(1, 2), (3, 4)])
def test_a_streaming_step(B, HK, forms):
    backend._warm_streaming_step(CPU, D, DTYPE)
    warmed = len(forms)
    for T in LENGTHS[:-1]:
        options = {"batch": B, "kv_heads": HK, "head_dim": D, "dtype": DTYPE, "device": "cpu", "capacity": 3000}
        for role in (sk.SOURCE, sk.TARGET, torch.zeros(B, T, dtype=torch.int8)):
            cache = sk.StreamCache(layers=1, **options)
            angles = torch.zeros(1, T, D // 2)
            sk.rotate_append(rows(B, HK, T), rows(B, HK, T), angles, angles, cache, 0, role=role, backend="triton")
            assert forms[warmed:] == [], f"T = {T}"
