"""`compact` against loops over rows, its gradients, and what may not leak."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from streamkernels.backends.select import explain
from streamkernels.ops.compact import compact
from streamkernels.ops.select_tokens import select_tokens

torch.set_num_threads(1)
NAN, GARBAGE = float("nan"), 2**31 - 1


def ints(x: list) -> Tensor:
    return torch.tensor(x, dtype=torch.int32)


def by_loops(x: Tensor, index: Tensor, count: Tensor, dim: int) -> Tensor:
    rows = x.movedim(dim, 1)
    out = torch.zeros(rows.shape[0], index.shape[1], *rows.shape[2:], dtype=x.dtype)
    for b in range(rows.shape[0]):
        for i in range(int(count[b])):
            if 0 <= int(index[b, i]) < rows.shape[1]:
                out[b, i] = rows[b, int(index[b, i])]
    return out.movedim(1, dim)


INDEX = ints([[0, 4, 16, GARBAGE, -3], [7, 7, -1, 17, 2], [5, 6, 7, 8, 9]])
COUNT = ints([3, 5, 0])


SHAPES = [((3, 17), 1), ((3, 17, 6), 1), ((3, 2, 17, 8), 2), ((3, 2, 17, 8), -2), ((3, 2, 17), -1)]


@pytest.mark.parametrize(("shape", "dim"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool])
def test_against_loops(shape: tuple[int, ...], dim: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = (torch.randn(shape) * 5).to(dtype)
    got = compact(x, INDEX, COUNT, dim=dim)
    assert got.is_contiguous() and got.dtype == dtype
    assert torch.equal(got, by_loops(x, INDEX, COUNT, dim % len(shape)))


def test_strides_and_poison() -> None:
    torch.manual_seed(1)
    x = torch.full((3, 17, 2, 16), NAN)[..., :8].transpose(1, 2)
    listed = {(0, 0), (0, 4), (0, 16), (1, 7), (1, 2)}
    for b, j in listed:
        x[b, :, j] = torch.randn(2, 8)
    got = compact(x, INDEX, COUNT, dim=2)
    assert bool(got.isfinite().all()) and torch.equal(got, by_loops(x, INDEX, COUNT, 2))
    assert not bool(got[2].any()) and not bool(got[0, :, 3:].any())
    # strided lists
    wide_index = torch.full((5, 6), GARBAGE, dtype=torch.int32)
    wide_index[:, ::2] = INDEX.T
    assert torch.equal(compact(x, wide_index[:, ::2].T, COUNT, dim=2), got)


def test_no_rows_all_rows_and_the_dtypes_zero() -> None:
    x = torch.randn(2, 5, 3)
    assert compact(x, torch.zeros(2, 0, dtype=torch.int32), ints([0, 9])).shape == (2, 0, 3)
    assert torch.equal(compact(x, torch.arange(5, dtype=torch.int32).expand(2, 5), ints([5, 5])), x)
    assert compact(x[:, :0], ints([[0], [0]]), ints([1, 1])).tolist() == [[[0.0] * 3]] * 2
    assert compact(torch.ones(1, 2, dtype=torch.bool), ints([[1, 5]]), ints([2])).tolist() == [[True, False]]


def test_after_select_tokens() -> None:
    scores = torch.tensor([[0.1, 0.9, 0.3, 0.8], [0.0, 0.0, 0.7, 0.0]])
    index, count = select_tokens(scores, threshold=0.25)
    positions = torch.arange(4).expand(2, 4) + 100
    assert compact(positions, index, count).tolist() == [[101, 102, 103, 0], [102, 0, 0, 0]]


@pytest.mark.parametrize("dim", [1, 2])
def test_gradients(dim: int) -> None:
    torch.manual_seed(2)
    x = torch.randn((2, 3, 7) if dim == 2 else (2, 7, 3), dtype=torch.float64, requires_grad=True)
    index, count = ints([[1, 1, 6, 0], [3, -1, 9, 2]]), ints([3, 4])

    def call(x: Tensor) -> Tensor:
        return compact(x, index, count, dim=dim)

    assert torch.autograd.gradcheck(call, (x,))
    assert torch.autograd.gradgradcheck(call, (x,))
    # rows that are not listed get exact zeros, whatever arrives in padded rows
    out = call(x)
    (grad,) = torch.autograd.grad(out, x, torch.full_like(out, 2.0))
    rows = grad.movedim(dim, 1)[..., 0]
    assert rows.tolist() == [[0, 4, 0, 0, 0, 0, 2], [0, 0, 2, 2, 0, 0, 0]]


def test_half_precision_gradients_are_summed_in_fp32() -> None:
    x = torch.zeros(1, 1, 1, dtype=torch.bfloat16, requires_grad=True)
    index = torch.zeros(1, 512, dtype=torch.int32)
    compact(x, index, ints([512])).sum().backward()
    assert float(x.grad) == 512.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_registration(dtype: torch.dtype) -> None:
    x = torch.ones(2, 7, 3).to(dtype)
    if dtype.is_floating_point:
        x = x.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    torch.library.opcheck(torch.ops.streamkernels.compact, (x, ints([[1, 2], [0, 9]]), ints([1, 2]), 1, "reference"))
    dy = torch.ones(2, 2, 3).to(dtype)
    if dtype.is_floating_point:
        dy.requires_grad_()
    arguments = (dy, ints([[1, 2], [0, 9]]), ints([1, 2]), 7, 1, "reference")
    torch.library.opcheck(torch.ops.streamkernels.compact_backward, arguments)


def test_compile_with_dynamic_lengths_and_checkpointing() -> None:
    def call(x: Tensor, index: Tensor, count: Tensor) -> Tensor:
        return compact(x.cos(), index, count).sin()

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    for S, K in ((7, 3), (17, 5)):
        x = torch.randn(2, S, 3, requires_grad=True)
        index, count = torch.arange(K, dtype=torch.int32).repeat(2, 1), ints([K, 1])
        want = torch.autograd.grad(call(x, index, count).sum(), x)[0]
        got = compiled(x, index, count)
        assert torch.equal(got, call(x, index, count))
        torch.testing.assert_close(torch.autograd.grad(got.sum(), x)[0], want)
        again = torch.utils.checkpoint.checkpoint(call, x, index, count, use_reentrant=False)
        torch.testing.assert_close(torch.autograd.grad(again.sum(), x)[0], want)


X = torch.zeros(2, 5, 3)


@pytest.mark.parametrize(
    ("error", "name", "call"),
    [
        (TypeError, "x", lambda: compact(X.tolist(), ints([[0], [0]]), ints([1, 1]))),
        (ValueError, "x", lambda: compact(torch.zeros(5), ints([[0]]), ints([1]))),
        (ValueError, "dim", lambda: compact(X, ints([[0], [0]]), ints([1, 1]), dim=0)),
        (ValueError, "dim", lambda: compact(X, ints([[0], [0]]), ints([1, 1]), dim=3)),
        (ValueError, "dim", lambda: compact(X, ints([[0], [0]]), ints([1, 1]), dim=-3)),
        (TypeError, "dim", lambda: compact(X, ints([[0], [0]]), ints([1, 1]), dim=1.0)),
        (TypeError, "index", lambda: compact(X, torch.zeros(2, 1, dtype=torch.int64), ints([1, 1]))),
        (ValueError, "index", lambda: compact(X, ints([[0]]), ints([1, 1]))),
        (ValueError, "count", lambda: compact(X, ints([[0], [0]]), ints([1]))),
        (ValueError, "count", lambda: compact(X, ints([[0], [0]]), ints([1, 1]).to("meta"))),
        (ValueError, "backend", lambda: compact(X, ints([[0], [0]]), ints([1, 1]), backend="gpu")),
        (NotImplementedError, "backend='cuda'", lambda: compact(X, ints([[0], [0]]), ints([1, 1]), backend="cuda")),
    ],
)
def test_bad_input_is_refused_by_name(error: type[Exception], name: str, call) -> None:
    with pytest.raises(error, match=rf"^compact: {name}"):
        call()


def test_explain() -> None:
    assert explain(compact, X, ints([[0], [0]]), ints([1, 1])).backend == "reference"
