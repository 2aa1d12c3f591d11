"""The CUDA kernel of select_tokens on a GPU, equal to the reference."""

from __future__ import annotations

import random

import pytest
import torch

from streamkernels.backends.select import explain
from streamkernels.ops.select_tokens import select_tokens, visipruner_select

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("K", [0, 1, 17, 576, 2048, 2049, 46080, 100_003])
@pytest.mark.parametrize("kind", ["spread", "ties", "same"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_the_reference(K: int, kind: str, dtype: torch.dtype) -> None:
    draw = random.Random(K)
    generator = torch.Generator().manual_seed(K)
    B = 2
    if kind == "ties":
        values = torch.tensor([0.0, -0.0, 0.25, 0.5, 1.0, -1.0, float("inf"), float("-inf"), float("nan")])
        scores = values[torch.randint(0, 9, (B, K), generator=generator)]
    else:
        scores = torch.randn(B, K, generator=generator) if kind == "spread" else torch.full((B, K), 0.7)
    scores = scores.to(dtype).cuda()
    count = torch.tensor([K, K // 2], dtype=torch.int32, device="cuda")
    names = torch.arange(3, K + 3, dtype=torch.int32, device="cuda").expand(B, K)
    for threshold, k, largest in [
        (0.3, None, True), (0.25, None, False), (None, 1, True), (None, K // 3, True), (None, K // 2, False),
        (None, K + 5, True), (None, 0, True),
    ]:  # fmt: skip
        for max_keep in (None, draw.choice([0, 3, K // 4, K + 1])):
            options = {"threshold": threshold, "k": k, "max_keep": max_keep, "largest": largest}
            options |= {"count": draw.choice([None, count]), "index": draw.choice([None, names])}
            ours = select_tokens(scores, **options, backend="cuda")
            reference = select_tokens(scores, **options, backend="reference")
            assert all(torch.equal(a, b) for a, b in zip(ours, reference, strict=True)), options


def test_strided_scores_and_lists() -> None:
    wide = torch.randn(700, 4, device="cuda")
    scores = wide[:, ::2].T
    names = torch.randint(0, 9000, (700, 4), dtype=torch.int32, device="cuda")[:, 1:3].T
    count = torch.tensor([650, 9, 700, 9], dtype=torch.int32, device="cuda")[::2]
    for options in ({"k": 40}, {"threshold": 0.2}):
        ours = select_tokens(scores, index=names, count=count, **options, backend="cuda")
        reference = select_tokens(scores, index=names, count=count, **options, backend="reference")
        assert all(torch.equal(a, b) for a, b in zip(ours, reference, strict=True))


def test_the_decision_of_visipruner_and_a_graph() -> None:
    cosine, norm = torch.rand(2, 576, device="cuda") * 0.01 + 0.992, torch.rand(2, 576, device="cuda")
    cosine[1] = 1.0
    reference = visipruner_select((cosine, norm, norm), backend="reference")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = visipruner_select((cosine, norm, norm), backend="cuda")
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, reference, strict=True))
    assert explain(select_tokens, norm, k=3).reasons["cuda"] == "ok"
