"""The Triton kernel against the reference, through the registered op: the interpreter on a CPU, the compiled kernel
on a GPU.

Run as `TRITON_INTERPRET=1 pytest tests/triton` without a GPU. The reference itself is tested in tests/ops.
"""

from __future__ import annotations

import os

import pytest
import torch

from streamkernels.core.cache import PADDING, SOURCE, TARGET
from streamkernels.ops import rotate_append as _register  # noqa: F401  (registers torch.ops.streamkernels.rotate_append)

GPU = torch.cuda.is_available()
if not GPU and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU or TRITON_INTERPRET=1", allow_module_level=True)
DEVICE = "cuda" if GPU else "cpu"
BACKENDS = ["triton", "cuda"] if GPU else ["triton"]
# triton's interpreter computes bf16 on raw bits: bf16 only runs on a GPU
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if GPU else [])
op = torch.ops.streamkernels.rotate_append


def make(
    B=2,
    HK=2,
    T=17,
    D=64,
    rotary_dim=64,
    dtype=torch.float32,
    capacity=(23, 29),
    seed=0,
    strided=False,
    angle_batch=1,
    angle_dtype=None,
):
    """Raw arguments with NaN in fresh cache memory."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g).to(DEVICE, dtype)  # noqa: E731
    k, v = draw(B, HK, T, D), draw(B, HK, T, D)
    if strided:  # the fused-qkv and transposed views that models hand over
        wide = draw(B, T, 3 * HK, D)
        k, v = wide[:, :, :HK].transpose(1, 2), wide[:, :, HK : 2 * HK].transpose(1, 2)
    angles = torch.rand(angle_batch, T, max(rotary_dim // 2, 1), generator=g) * 6
    cos, sin = (a.to(DEVICE, angle_dtype or torch.float32) for a in (angles.cos(), angles.sin()))
    segments = [
        torch.full((B, HK, c, D), float("nan"), device=DEVICE, dtype=dtype)
        for c in (capacity[0],) * 2 + (capacity[1],) * 2
    ]
    return k, v, cos if rotary_dim else None, sin if rotary_dim else None, segments


def run(backend, arguments, length, role=None, segment=TARGET, sinks=0, bounded=False, interleaved=False):
    k, v, cos, sin, segments = arguments
    segments = [s.clone() for s in segments]
    status = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    length = torch.tensor(length, dtype=torch.int32, device=DEVICE)
    role = None if role is None else role.to(DEVICE)
    op(k, v, cos, sin, *segments, length, status, role, segment, None, sinks, bounded, interleaved, backend)
    return segments, status


def same(arguments, dtype, **options):
    """Both write the same slots (all others keep their NaN), the same values up to one rounding of the dtype, the
    same status."""
    want, want_status = run("reference", arguments, **options)
    for backend in BACKENDS:
        got, status = run(backend, arguments, **options)
        assert status.item() == want_status.item()
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a.isnan(), b.isnan())
            # fma against separate rounding: half an ulp of fp32 before the one rounding to dtype
            scale = b.nan_to_num(0).abs().max().item()
            step = torch.finfo(dtype).eps * max(scale, 1e-6)
            assert (a - b).nan_to_num(0).abs().max().item() <= step
    return want, want_status


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "D, rotary_dim", [(64, 64), (128, 128), (80, 80), (96, 48), (112, 112), (256, 256), (8, 8), (40, 16), (64, 0)]
)
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotates_and_writes(dtype, D, rotary_dim, interleaved):
    same(make(D=D, rotary_dim=rotary_dim, dtype=dtype), dtype, length=[[3, 5], [0, 11]], interleaved=interleaved)


@pytest.mark.parametrize("T", [1, 17, 63, 111])
@pytest.mark.parametrize("segment", [SOURCE, TARGET])
def test_odd_lengths(T, segment):
    written, _ = same(make(T=T, capacity=(T + 9, T + 7)), torch.float32, length=[[3, 5], [0, 7]], segment=segment)
    assert (~written[2 * segment].isnan()).sum() == 2 * 2 * T * 64


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_inputs_and_per_row_angles(dtype):
    same(make(dtype=dtype, strided=True, angle_batch=2, angle_dtype=dtype), dtype, length=[[3, 5], [0, 11]])


@pytest.mark.parametrize("T", [5, 63, 111])
def test_mixed_roles_count_their_own_rows(T):
    g = torch.Generator().manual_seed(T)
    role = torch.randint(-1, 2, (2, T), generator=g, dtype=torch.int8)
    written, status = same(make(T=T, capacity=(T + 9, T + 9)), torch.float32, length=[[3, 5], [0, 9]], role=role)
    assert status.item() == 0
    for b, (begin_source, begin_target) in enumerate([(3, 5), (0, 9)]):
        for segment, begin in ((0, begin_source), (2, begin_target)):
            count = int((role[b] == segment // 2).sum())
            rows = ~written[segment][b, 0, :, 0].isnan()
            assert rows.nonzero().flatten().tolist() == list(range(begin, begin + count))


def test_padding_rows_write_nothing():
    role = torch.full((2, 17), PADDING, dtype=torch.int8)
    written, _ = same(make(), torch.float32, length=[[3, 5], [0, 11]], role=role)
    assert all(s.isnan().all() for s in written)


def test_a_full_fixed_cache_drops_the_write_and_says_so():
    _, status = same(make(T=17, capacity=(23, 20)), torch.float32, length=[[3, 5], [0, 3]])
    assert status.item() == 1 << TARGET
    role = torch.zeros(2, 17, dtype=torch.int8)
    _, status = same(make(T=17, capacity=(10, 20)), torch.float32, length=[[3, 5], [0, 3]], role=role)
    assert status.item() == 1 << SOURCE


@pytest.mark.parametrize("length", [[[-4, -4], [2**31 - 40, 2**31 - 40]], [[-(2**31), 9], [10**9, 10**9]]])
def test_garbage_lengths_stay_inside_the_buffers(length):
    arguments = make(T=9)
    guarded = [torch.full((4, 2, s.shape[2], 64), 7.0, device=DEVICE) for s in arguments[4]]
    for s in guarded:
        s[1:3] = float("nan")
    for backend in BACKENDS:
        run(backend, (*arguments[:4], [s[1:3] for s in guarded]), length=length)
    assert all((s[0] == 7).all() and (s[3] == 7).all() for s in guarded)


@pytest.mark.parametrize("roles", [False, True])
def test_the_ring_wraps_behind_its_sinks(roles):
    role = torch.tensor([[0, 1, 1, 0, -1, 1, 0], [1, 1, 1, 1, 0, 0, 0]], dtype=torch.int8) if roles else None
    written, status = same(
        make(T=7, capacity=(16, 13)), torch.float32, length=[[15, 300], [14, 11]], role=role, sinks=4, bounded=True
    )
    assert status.item() == 0
    assert all(s[:, :, :4].isnan().all() for s in written)  # the sinks stay


def test_long_mixed_chunks_are_counted_ahead(monkeypatch):
    """Calls longer than one counting step (2048 rows): forced on a short one by a step of 16."""
    from streamkernels.triton_kernels.rotate_append import tiles

    monkeypatch.setattr(tiles, "COUNT", 16)
    monkeypatch.setattr(tiles, "tile", lambda row_bytes: tiles.Tile(block_t=8, num_warps=4))
    role = torch.randint(-1, 2, (2, 300), dtype=torch.int8)
    same(make(HK=3, T=300, D=8, rotary_dim=8, capacity=(350, 350)), torch.float32, length=[[3, 5], [0, 9]], role=role)
