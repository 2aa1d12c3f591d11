"""rotate_append beside a plain copy and beside eager torch: device time with cold L2, and host-visible time.

`pytest bench/bench_rotate_append.py`. Prediction: the kernel reads k, v once and writes them once, so from 64 MB on it
should run near the bandwidth of a copy of as many bytes (cos, sin add rotary_dim / (2 HK D) of it in fp32, 2 % at HK =
4 ... 25 % at HK = 1).
"""

from __future__ import annotations

import pytest
import torch
from baselines import copy_bandwidth, eager_rotate_append
from kernel_time import copies_for_cold_l2, graph_time, host_time

import streamkernels as sk
from streamkernels.ops import rotate_append as _register  # noqa: F401  (registers torch.ops.streamkernels.rotate_append)

MB = 1 << 20
SHAPES = [(4, 128), (8, 64), (32, 128), (4, 256)]  # HK, D
SIZES = [1 * MB, 8 * MB, 64 * MB, 256 * MB, 1024 * MB]  # bytes read + written
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="device time needs a GPU")


def _inputs(HK: int, D: int, T: int, dtype: torch.dtype, mixed: bool):
    """One call's tensors: new rows as Hugging Face hands them over ([B, T, HK, D] transposed), and a target segment."""
    k, v = (torch.randn(1, T, HK, D, device="cuda", dtype=dtype).transpose(1, 2) for _ in "kv")
    angles = torch.rand(1, T, D // 2, device="cuda")
    segments = [torch.empty(1, HK, T + 8 if i > 1 or mixed else 8, D, device="cuda", dtype=dtype) for i in range(4)]
    role = torch.randint(0, 2, (1, T), device="cuda", dtype=torch.int8) if mixed else None
    return k, v, angles.cos(), angles.sin(), segments, role


def _call(inputs, backend: str):
    k, v, cos, sin, segments, role = inputs
    length = torch.tensor([[3, 5]], dtype=torch.int32, device="cuda")
    status = torch.zeros(1, dtype=torch.int32, device="cuda")
    segment = sk.TARGET
    op = torch.ops.streamkernels.rotate_append
    return lambda: op(k, v, cos, sin, *segments, length, status, role, segment, None, 0, False, False, backend)


@gpu
@pytest.mark.parametrize("roles", ["one", "mixed"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("HK, D", SHAPES)
@pytest.mark.parametrize("size", SIZES, ids=lambda n: f"{n // MB}MB")
def test_device_time(size, HK, D, dtype, roles, rows):
    if (dtype == torch.float32 or roles == "mixed") and (HK, D) != (4, 128):
        pytest.skip("one shape is enough for fp32 and for mixed roles")
    T = size // (4 * HK * D * dtype.itemsize)
    # the cache need not rotate further than the inputs: both are as large
    sets = [_inputs(HK, D, T, dtype, roles == "mixed") for _ in range(min(copies_for_cold_l2(size), 64))]
    row = {"MB": size // MB, "HK": HK, "D": D, "dtype": str(dtype)[6:], "roles": roles, "T": T}
    bandwidth = copy_bandwidth(size)
    row["copy GB/s"] = bandwidth
    for backend in ("triton", "cuda"):
        us = graph_time([_call(s, backend) for s in sets])
        row[f"{backend} us"] = us
        row[f"{backend} / copy"] = size / us / 1e3 / bandwidth
    if roles == "one":
        us = graph_time([lambda s=s: eager_rotate_append(*s[:4], s[4][2], s[4][3], 5) for s in sets[:8]])
        row["eager torch us"] = us
    else:
        row["eager torch us"] = "-"
    rows.append(row)


@gpu
@pytest.mark.parametrize("T", [1, 8, 512])
def test_host_visible_time(T, rows, benchmark):
    """The public call, Python included, for a streaming step."""
    inputs = _inputs(4, 128, T, torch.bfloat16, False)
    row = {
        "MB": 4 * T * 1024 / MB,
        "HK": 4,
        "D": 128,
        "dtype": "bfloat16",
        "roles": "host-visible",
        "T": T,
        "copy GB/s": "-",
    }
    for backend in ("triton", "cuda"):
        row[f"{backend} us"] = host_time(_call(inputs, backend))
        row[f"{backend} / copy"] = "-"
    k, v, cos, sin, segments, _ = inputs
    row["eager torch us"] = host_time(lambda: eager_rotate_append(k, v, cos, sin, segments[2], segments[3], 5))
    rows.append(row)
    benchmark.pedantic(_call(inputs, "cuda"), rounds=50, iterations=10, warmup_rounds=5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU's throughput is of interest where there is no GPU")
@pytest.mark.parametrize("T", [1, 512])
def test_reference_throughput(T, benchmark):
    """Tokens per second of the reference backend, for CPU users."""
    cache = sk.StreamCache(layers=1, batch=1, kv_heads=4, head_dim=128, dtype=torch.float32, device="cpu", capacity=T)
    k = torch.randn(1, 4, T, 128)
    angles = torch.rand(1, T, 64)

    def step():
        sk.rotate_append(k, k, angles.cos(), angles.sin(), cache, 0, role=sk.TARGET)
        cache.discard()

    benchmark(step)
    benchmark.extra_info["tokens"] = T
