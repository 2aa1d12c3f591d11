"""The Triton kernel of reanchor against fp64 and the reference: the interpreter on a CPU, compiled on a GPU.

Run as `TRITON_INTERPRET=1 pytest tests/triton` without a GPU. The reference itself is tested in tests/ops.
"""

from __future__ import annotations

import os

import pytest
import torch

from streamkernels import reanchor
from streamkernels.testing.compare import assert_accurate
from streamkernels.testing.inputs import fresh, strided_like

GPU = torch.cuda.is_available()
if not GPU and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU or TRITON_INTERPRET=1", allow_module_level=True)
DEVICE = "cuda" if GPU else "cpu"
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if GPU else [])


def make(B=2, HK=3, S=17, D=64, rotary_dim=64, dtype=torch.float32, samples=1, rows=None, angle_dtype=torch.float32):
    g = torch.Generator().manual_seed(S + D)
    x = fresh((B, HK, S, D + 8), dtype, DEVICE)[..., :D]
    x.copy_(torch.randn(B, HK, S, D, generator=g))
    angles = torch.rand(samples, S if rows is None else rows, rotary_dim // 2, generator=g) * 6
    return x, *(a.to(DEVICE, angle_dtype) for a in (angles.cos(), angles.sin()))


def moved(x, cos, sin, interleaved, backend):
    y = strided_like(x)
    assert reanchor(y, cos, sin, interleaved=interleaved, backend=backend) is None
    return y


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "D, rotary_dim", [(64, 64), (128, 128), (80, 80), (96, 48), (256, 256), (8, 8), (40, 16), (8, 2)]
)
@pytest.mark.parametrize("samples, rows", [(1, 1), (2, None)])
def test_accurate(D, rotary_dim, samples, rows, dtype, interleaved):
    x, cos, sin = make(D=D, rotary_dim=rotary_dim, dtype=dtype, samples=samples, rows=rows)
    got = moved(x, cos, sin, interleaved, "triton")
    plain = moved(x, cos, sin, interleaved, "reference")
    exact = moved(x.double(), cos.double(), sin.double(), interleaved, "reference")
    assert_accurate("moved", got, plain, exact)
    assert torch.equal(got[..., rotary_dim:], x[..., rotary_dim:])


@pytest.mark.parametrize("S", [0, 1, 63, 111])
@pytest.mark.parametrize("samples, rows", [(1, None), (2, 1)])
def test_a_slice_of_a_buffer(S, samples, rows):
    """What lies around the keys is not touched, NaN included, and autograd hears of the change."""
    x, cos, sin = make(S=S, samples=samples, rows=rows, angle_dtype=torch.float32)
    buffer = fresh((2, 3, S + 9, 80), torch.float32, DEVICE)
    part = buffer[:, :, 4 : 4 + S, 8:72]
    part.copy_(x)
    version = buffer._version
    reanchor(part, cos, sin, backend="triton")
    assert buffer._version > version
    assert_accurate("moved", part, moved(x, cos, sin, False, "reference"),
                    moved(x.double(), cos.double(), sin.double(), False, "reference"))  # fmt: skip
    part.fill_(float("nan"))
    assert bool(buffer.isnan().all())


@pytest.mark.skipif(not GPU, reason="the interpreter is sequential")
@pytest.mark.parametrize("interleaved", [False, True])
def test_in_place_is_bit_equal_every_time(interleaved):
    x, cos, sin = make(S=3000, D=128, rotary_dim=96, dtype=torch.bfloat16)
    first = moved(x, cos, sin, interleaved, "triton")
    for _ in range(20):
        assert torch.equal(moved(x, cos, sin, interleaved, "triton")[..., :128], first)
    y = strided_like(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        reanchor(y, cos, sin, interleaved=interleaved, backend="triton")
    y.copy_(x)
    graph.replay()
    assert torch.equal(y, first)


def test_registration():
    x, cos, sin = make()
    torch.library.opcheck(torch.ops.streamkernels.reanchor, (x, cos, sin, False, "triton"))
