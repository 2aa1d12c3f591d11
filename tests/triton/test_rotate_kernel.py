"""The Triton kernel of rotate against fp64 and the reference: the interpreter on a CPU, compiled on a GPU.

Run as `TRITON_INTERPRET=1 pytest tests/triton` without a GPU. The reference itself is tested in tests/ops.
"""

from __future__ import annotations

import os

import pytest
import torch

from streamkernels import rotate
from streamkernels.testing.compare import assert_accurate
from streamkernels.testing.inputs import fresh

GPU = torch.cuda.is_available()
if not GPU and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU or TRITON_INTERPRET=1", allow_module_level=True)
DEVICE = "cuda" if GPU else "cpu"
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if GPU else [])


def make(B=2, H=3, T=17, D=64, rotary_dim=64, dtype=torch.float32, rows=1, angle_dtype=torch.float32):
    g = torch.Generator().manual_seed(T + D)
    # the transposed view that models hand over, NaN between the rows
    x = fresh((B, T, H, D + 8), dtype, DEVICE)[..., :D].transpose(1, 2)
    x.copy_(torch.randn(B, H, T, D, generator=g))
    angles = torch.rand(rows, T, rotary_dim // 2, generator=g) * 6
    return x, *(a.to(DEVICE, angle_dtype) for a in (1.2 * angles.cos(), 1.2 * angles.sin()))


def accurate(x, cos, sin, interleaved):
    got = rotate(x, cos, sin, interleaved=interleaved, backend="triton")
    assert got.is_contiguous() and got.dtype == x.dtype
    plain = rotate(x, cos, sin, interleaved=interleaved, backend="reference")
    exact = rotate(*(a.double() for a in (x, cos, sin)), interleaved=interleaved, backend="reference")
    assert_accurate("rotated", got, plain, exact)
    assert torch.equal(got[..., 2 * cos.shape[2] :], x[..., 2 * cos.shape[2] :])
    return got


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "D, rotary_dim", [(64, 64), (128, 128), (80, 80), (96, 48), (256, 256), (8, 8), (40, 16), (8, 2)]
)
@pytest.mark.parametrize("interleaved", [False, True])
def test_accurate(D, rotary_dim, dtype, interleaved):
    accurate(*make(D=D, rotary_dim=rotary_dim, dtype=dtype), interleaved)


@pytest.mark.parametrize("T", [0, 1, 63, 111])
@pytest.mark.parametrize("dtype", DTYPES)
def test_odd_lengths_and_angles_per_sample(T, dtype):
    accurate(*make(T=T, dtype=dtype, rows=2, angle_dtype=dtype), False)


def test_strided_angles():
    x, cos, sin = make(rows=2, rotary_dim=40)
    wide = [torch.stack([a, a * float("nan")], 1)[:, 0] for a in (cos, sin)]
    assert torch.equal(accurate(x, *wide, True), accurate(x, cos, sin, True))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_rotates_back(dtype, interleaved):
    x, cos, sin = make(rotary_dim=48, dtype=dtype, rows=2)
    do = torch.randn_like(x.contiguous()).transpose(1, 2).contiguous().transpose(1, 2)
    grads = []
    for backend, wide in (("triton", dtype), ("reference", dtype), ("reference", torch.float64)):
        leaf = x.to(wide).requires_grad_()
        angles = (cos, sin) if wide == dtype else (cos.double(), sin.double())
        out = rotate(leaf, *angles, interleaved=interleaved, backend=backend)
        grads.append(torch.autograd.grad(out, leaf, do.to(wide))[0])
    assert_accurate("dx", *grads)


@pytest.mark.skipif(not GPU, reason="CUDA graphs need a GPU")
def test_captured_in_a_cuda_graph_and_bit_equal():
    x, cos, sin = make(T=333, D=128, rotary_dim=128, dtype=torch.bfloat16)
    want = rotate(x, cos, sin, backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = rotate(x, cos, sin, backend="triton")
    for _ in range(20):
        captured.fill_(float("nan"))
        graph.replay()
        assert torch.equal(captured, want)


def test_registration():
    x, cos, sin = make()
    torch.library.opcheck(torch.ops.streamkernels.rotate, (x.requires_grad_(), cos, sin, False, "triton"))
