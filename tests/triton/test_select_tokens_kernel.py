"""The Triton kernel of select_tokens against the reference: the interpreter on a CPU, compiled on a GPU.

Run as `TRITON_INTERPRET=1 pytest tests/triton` without a GPU. The reference itself is tested in tests/ops.
"""

from __future__ import annotations

import math
import os
import random

import pytest
import torch

from streamkernels import select_tokens, visipruner_select

GPU = torch.cuda.is_available()
if not GPU and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU or TRITON_INTERPRET=1", allow_module_level=True)
DEVICE = "cuda" if GPU else "cpu"
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if GPU else [])


def same(scores, **options):
    want = select_tokens(scores, **options, backend="reference")
    got = select_tokens(scores, **options, backend="triton")
    for a, b in zip(got, want, strict=True):
        assert a.dtype == torch.int32 and torch.equal(a, b), options
    return got


@pytest.mark.parametrize("seed", range(30))
def test_equals_the_reference(seed, monkeypatch):
    from streamkernels.triton_kernels.select_tokens import launch

    draw = random.Random(seed)
    if seed % 2:  # rows of several steps, without long rows
        monkeypatch.setattr(launch, "BLOCK", 64)
    B, K = draw.randint(1, 3), draw.choice([0, 1, 5, 63, 200])
    dtype = draw.choice(DTYPES)
    # few different values: ties everywhere, infinities, both zeros and NaN among them
    values = [0.0, -0.0, 0.25, 0.5, 1.0, -1.0, math.inf, -math.inf, math.nan]
    if draw.random() < 0.5:
        values += [draw.gauss(0, 1) * 10 ** draw.randint(-3, 3) for _ in range(300)]
    scores = torch.tensor([draw.choice(values) for _ in range(B * K)], dtype=dtype).view(B, K).to(DEVICE)
    if draw.random() < 0.5:
        wide = torch.full((K, B + 1), math.inf, dtype=dtype, device=DEVICE)
        wide[:, :B] = scores.T
        scores = wide[:, :B].T
    ints = lambda x: torch.tensor(x, dtype=torch.int32, device=DEVICE)  # noqa: E731
    count = ints([draw.randint(-1, K + 3) for _ in range(B)]) if draw.random() < 0.6 else None
    names = torch.randperm(2 * K)[:K].sort().values.int().repeat(B, 1).to(DEVICE) if draw.random() < 0.5 else None
    threshold = draw.choice([0.0, 0.25, -2.0, 0.1]) if draw.random() < 0.5 else None
    k = None if threshold is not None else draw.choice([0, 1, 4, 63, 100, 999])
    same(
        scores, threshold=threshold, k=k, max_keep=draw.choice([None, 0, 2, 70]), largest=draw.random() < 0.7,
        index=names, count=count,
    )  # fmt: skip


def test_ties_go_to_the_lower_entry():
    ones = torch.ones(2, 300, device=DEVICE)
    ones[1, ::2] = -0.0
    ones[1, 1::2] = 0.0
    assert same(ones, k=3)[0].tolist() == [[0, 1, 2]] * 2
    assert same(ones, k=3, largest=False)[0].tolist() == [[0, 1, 2]] * 2


def test_the_threshold_is_strict_and_in_the_dtype_of_the_scores():
    for dtype in DTYPES:
        at = torch.tensor([[0.2]], dtype=dtype, device=DEVICE)
        above = torch.nextafter(at, torch.ones_like(at))
        assert same(torch.cat([at, above], 1), threshold=0.2)[0].tolist() == [[1, -1]]


def test_visipruner():
    cosine = torch.tensor([[1.0, 0.99, 1.0], [0.995, 1.0, 0.999]], device=DEVICE)
    norm = torch.tensor([[0.3, 0.1, 0.2], [9.0, 0.0, math.nan]], device=DEVICE)
    want = visipruner_select((cosine, norm, norm), backend="reference")
    for a, b in zip(visipruner_select((cosine, norm, norm), backend="triton"), want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif(not GPU, reason="long rows take the interpreter long")
@pytest.mark.parametrize("K", [576, 4096, 4097, 46080, 1000003])
def test_long_rows(K):
    scores = torch.randn(2, K, device=DEVICE).round(decimals=3)
    same(scores, threshold=0.2)
    same(scores, k=min(K - 1, 576))
    same(scores, k=K // 2, largest=False, count=torch.tensor([K, 7], dtype=torch.int32, device=DEVICE))
    same(scores, threshold=-0.5, max_keep=100)


@pytest.mark.skipif(not GPU, reason="the interpreter is sequential")
def test_repeats_are_bit_equal_and_a_graph_replays():
    scores = torch.randn(3, 5000, device=DEVICE).round(decimals=2)
    first = select_tokens(scores, k=700, backend="triton")
    for _ in range(20):
        again = select_tokens(scores, k=700, backend="triton")
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = select_tokens(scores, k=700, backend="triton")
    for x in captured:
        x.fill_(-7)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(first, captured, strict=True))


def test_registration():
    scores = torch.rand(2, 7, device=DEVICE)
    torch.library.opcheck(torch.ops.streamkernels.select_tokens, (scores, None, None, 0.3, 7, 7, True, "triton"))


def test_fp64_is_refused_with_the_reason():
    with pytest.raises(NotImplementedError, match="float64 is not supported"):
        select_tokens(torch.rand(1, 3, dtype=torch.float64, device=DEVICE), k=1, backend="triton")
