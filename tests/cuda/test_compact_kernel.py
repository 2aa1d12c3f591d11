"""The CUDA kernel of compact on a GPU, equal to the reference bit by bit."""

from __future__ import annotations

import pytest
import torch

from streamkernels.ops.compact import compact

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DTYPES = [torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.int8, torch.bool, torch.complex128]


@pytest.mark.parametrize("shape, dim", [((3, 700), 1), ((3, 700, 4096), 1), ((3, 5, 700, 128), 2), ((3, 5, 700), 2),
                                        ((3, 2, 3, 700, 5, 4), 3), ((3, 700, 7), 1)])  # fmt: skip
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_reference(shape: tuple[int, ...], dim: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(shape, generator=generator) * 5).to(dtype).cuda()
    index = torch.randint(-2, 703, (3, 333), generator=generator, dtype=torch.int32).cuda()
    index[0, 7], index[2, 3] = 2**31 - 1, -(2**31)
    count = torch.tensor([333, 0, 200], dtype=torch.int32, device="cuda")
    views = [x, x.transpose(0, -1).contiguous().transpose(0, -1), torch.stack([x, x], -1)[..., 0]]
    if len(shape) > 3:
        views.append(x.transpose(1, 2).contiguous().transpose(1, 2))
    for view in views:
        got, wanted = (compact(view, index, count, dim=dim, backend=name) for name in ("cuda", "reference"))
        assert got.is_contiguous() and torch.equal(got, wanted)


def test_what_is_not_listed_may_be_nan_and_a_graph() -> None:
    x = torch.full((2, 4, 50, 64), float("nan"), dtype=torch.bfloat16, device="cuda")
    x[:, :, 10:20] = 1
    index = torch.arange(10, 30, dtype=torch.int32, device="cuda").expand(2, 20)
    count = torch.tensor([10, 4], dtype=torch.int32, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = compact(x, index, count, dim=2, backend="cuda")
    y.fill_(float("nan"))
    graph.replay()
    assert y.sum((1, 2, 3)).tolist() == [10 * 4 * 64, 4 * 4 * 64]
    assert compact(x[:, :, :0], index, count, dim=2, backend="cuda").count_nonzero() == 0


def test_gradients_are_refused_with_the_reason() -> None:
    x = torch.zeros(1, 5, 3, device="cuda", requires_grad=True)
    index, count = (torch.zeros(n, dtype=torch.int32, device="cuda") for n in ((1, 2), (1,)))
    with pytest.raises(NotImplementedError, match="gradient of compact has no CUDA kernel"):
        compact(x, index, count, backend="cuda")
