"""The CUDA kernel of rotate and reanchor on a GPU, against the reference in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from streamkernels.ops.reanchor import reanchor
from streamkernels.ops.rotate import rotate
from streamkernels.testing.compare import assert_accurate

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def layouts(x: Tensor) -> list[Tensor]:
    """x as it is, transposed from [B, T, H, D], and off its 16-byte borders."""
    wide = torch.full((*x.shape[:3], x.shape[3] + 3), float("nan"), dtype=x.dtype, device=x.device)
    return [x, x.transpose(1, 2).contiguous().transpose(1, 2), wide[..., 1:-2].copy_(x)]


@pytest.mark.parametrize("D, rotary_dim", [(8, 8), (64, 64), (80, 20), (80, 32), (128, 128), (256, 64)])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype, fp32", [(torch.bfloat16, True), (torch.float16, False), (torch.float32, True)])
def test_accurate(D: int, rotary_dim: int, interleaved: bool, dtype: torch.dtype, fp32: bool) -> None:
    random = torch.Generator().manual_seed(D)
    B, H, T = 2, 5, 333
    x = torch.randn(B, H, T, D, generator=random).to(dtype).cuda()
    turn = torch.rand(B, T, rotary_dim // 2, generator=random).cuda() * 6.28
    cos, sin = (a.to(torch.float32 if fp32 else dtype) for a in (turn.cos(), turn.sin()))
    for view in layouts(x):
        for a, b in ((cos, sin), (cos[:1], sin[:1])):
            plain = rotate(view, a, b, interleaved=interleaved, backend="reference")
            exact = rotate(view.double(), a.double(), b.double(), interleaved=interleaved, backend="reference")
            ours = rotate(view, a, b, interleaved=interleaved, backend="cuda")
            assert_accurate("rotate", ours, plain, exact)
            assert torch.equal(ours[..., rotary_dim:], x[..., rotary_dim:])
            moved = view[:, :, 3:]
            reanchor(moved, a[:, 3:], b[:, 3:], interleaved=interleaved, backend="cuda")
            assert torch.equal(view[:, :, 3:], ours[:, :, 3:]) and torch.equal(view[:, :, :3], x[:, :, :3])
            view.copy_(x)
    whole = x.clone()
    reanchor(whole, cos[:, :1], sin[:, :1], interleaved=interleaved, backend="cuda")
    one = [a[:, :1].expand(-1, T, -1).contiguous() for a in (cos, sin)]
    assert torch.equal(whole, rotate(x, *one, interleaved=interleaved, backend="cuda"))


def test_gradient_and_graph() -> None:
    x = torch.randn(1, 4, 33, 64, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    turn = torch.rand(1, 33, 32, device="cuda")
    grads = [
        torch.autograd.grad(rotate(x, turn.cos(), turn.sin(), backend=name).square().sum(), x)[0]
        for name in ("cuda", "reference")
    ]
    torch.testing.assert_close(*grads)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = rotate(x.detach(), turn.cos(), turn.sin(), backend="cuda")
    y.fill_(float("nan"))
    graph.replay()
    assert torch.equal(y, rotate(x, turn.cos(), turn.sin(), backend="cuda"))
