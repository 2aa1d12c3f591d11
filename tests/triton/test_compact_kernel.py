"""The Triton kernel of compact against the reference, bit by bit: the interpreter on a CPU, compiled on a GPU.

Run as `TRITON_INTERPRET=1 pytest tests/triton` without a GPU. The reference itself is tested in tests/ops.
"""

from __future__ import annotations

import os

import pytest
import torch

from streamkernels import compact

GPU = torch.cuda.is_available()
if not GPU and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU or TRITON_INTERPRET=1", allow_module_level=True)
DEVICE = "cuda" if GPU else "cpu"
DTYPES = [torch.float32, torch.float16, torch.float64, torch.int64, torch.int8, torch.bool, torch.complex64]
DTYPES += [torch.bfloat16] if GPU else []
NAN, GARBAGE = float("nan"), 2**31 - 1
INDEX = torch.tensor([[0, 4, 16, GARBAGE, -3], [7, 7, -1, 17, 2], [5, 6, 7, 8, 9]], dtype=torch.int32, device=DEVICE)
COUNT = torch.tensor([3, 5, -4], dtype=torch.int32, device=DEVICE)
SHAPES = [((3, 17), 1), ((3, 17, 6), 1), ((3, 2, 17, 8), 2), ((3, 2, 17), -1)]
SHAPES += [((3, 2, 3, 17, 2, 5), 3), ((3, 17, 1100), 1)]


def same(x, index, count, dim):
    got = compact(x, index, count, dim=dim, backend="triton")
    assert got.is_contiguous() and torch.equal(got, compact(x, index, count, dim=dim, backend="reference"))
    return got


@pytest.mark.parametrize("shape, dim", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_the_reference(shape, dim, dtype):
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 5).to(DEVICE, dtype)
    got = same(x, INDEX, COUNT, dim)
    assert not bool(got[2].any())


def test_strides_and_poison():
    x = torch.full((3, 17, 2, 16), NAN, device=DEVICE)[..., :8].transpose(1, 2)
    for b, j in {(0, 0), (0, 4), (0, 16), (1, 7), (1, 2)}:
        x[b, :, j] = torch.randn(2, 8, device=DEVICE)
    got = same(x, INDEX, COUNT, 2)
    assert bool(got.isfinite().all())
    # strided lists, rows whose elements are apart, one sample for all
    wide = torch.full((5, 6), GARBAGE, dtype=torch.int32, device=DEVICE)
    wide[:, ::2] = INDEX.T
    assert torch.equal(same(x, wide[:, ::2].T, COUNT, 2), got)
    same(torch.randn(3, 6, 17, device=DEVICE).mT, INDEX, COUNT, 1)
    same(torch.randn(1, 17, 6, device=DEVICE).expand(3, 17, 6), INDEX, COUNT, 1)


def test_no_rows_and_all_rows():
    x = torch.randn(2, 5, 3, device=DEVICE)
    ints = lambda x: torch.tensor(x, dtype=torch.int32, device=DEVICE)  # noqa: E731
    assert same(x, torch.zeros(2, 0, dtype=torch.int32, device=DEVICE), ints([0, 9]), 1).shape == (2, 0, 3)
    assert torch.equal(same(x, ints([range(5)] * 2), ints([5, 5]), 1), x)
    assert not bool(same(x[:, :0], ints([[0], [0]]), ints([1, 1]), 1).any())
    assert same(x[..., :0], ints([[0], [0]]), ints([1, 1]), 1).shape == (2, 1, 0)


@pytest.mark.parametrize("K", [1, 63, 300])
def test_more_entries_than_a_tile(K):
    index = torch.randint(-3, 80, (2, K), generator=torch.Generator().manual_seed(K), dtype=torch.int32).to(DEVICE)
    for shape, dim in (((2, 70), 1), ((2, 2, 70, 16), 2), ((2, 70, 130), 1)):
        same(torch.randn(shape, device=DEVICE), index, torch.tensor([K, K - 1], device=DEVICE, dtype=torch.int32), dim)


def test_a_gradient_is_refused_with_the_reason_and_taken_by_auto():
    x = torch.randn(3, 17, 2, device=DEVICE, requires_grad=True)
    with pytest.raises(NotImplementedError, match="the gradient of compact has no Triton kernel"):
        compact(x, INDEX, COUNT, backend="triton")
    compact(x, INDEX, COUNT).sum().backward()
    assert float(x.grad.sum()) == 2 * 6


@pytest.mark.skipif(not GPU, reason="CUDA graphs need a GPU")
def test_captured_in_a_cuda_graph():
    x = torch.randn(3, 17, 4096, device=DEVICE, dtype=torch.bfloat16)
    want = compact(x, INDEX, COUNT, backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = compact(x, INDEX, COUNT, backend="triton")
    captured.fill_(NAN)
    for _ in range(20):
        graph.replay()
        assert torch.equal(captured, want)


def test_registration():
    torch.library.opcheck(
        torch.ops.streamkernels.compact, (torch.randn(3, 17, 4, device=DEVICE), INDEX, COUNT, 1, "triton")
    )
