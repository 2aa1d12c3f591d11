"""The CUDA kernels of pruning, run on the host from `backends.cuda` through the real bindings, against the reference.

See `test_cuda_on_host.py`, whose library this uses; the same calls run on a GPU in tests/cuda.
"""

from __future__ import annotations

import ctypes
import itertools
import random
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor

from streamkernels import _ext
from streamkernels.backends import cuda, cuda_pruned
from streamkernels.reference import compact as compact_reference
from streamkernels.reference import reanchor as reanchor_reference
from streamkernels.reference import rotate as rotate_reference
from streamkernels.reference.select_tokens import select_tokens as select_reference
from streamkernels.reference.token_scores import token_scores as scores_reference
from streamkernels.testing.compare import assert_accurate
from streamkernels.testing.inputs import random_kept, random_spans

HALVES = (torch.bfloat16, torch.float16)
NAN = float("nan")


@pytest.fixture(autouse=True)
def on_host(extension: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """`backends.cuda` on CPU tensors, which have neither a device index nor a stream."""

    def call(name: str) -> Callable[..., None]:
        return lambda *a: getattr(extension, name)(*a[:-2], 0, 0)

    calls = {name: call(name) for name in ("token_scores", "select_tokens", "compact", "rotate", "reanchor")}
    monkeypatch.setattr(_ext, "load", lambda: SimpleNamespace(**calls))
    monkeypatch.setattr(cuda_pruned, "stream_of", lambda device: 0)


def ints(x: list) -> Tensor:
    return torch.tensor(x, dtype=torch.int32)


def spread(x: Tensor, odd: bool = False) -> Tensor:
    """The same values as columns of wider rows, NaN between them; `odd`: off every 16-byte border."""
    wide = torch.full((x.shape[0], x.shape[2] + 2, x.shape[1], x.shape[3] + 8), NAN, dtype=x.dtype)
    at = 3 if odd else 8
    return wide[:, 1:-1, :, at : at + x.shape[3]].transpose(1, 2).copy_(x) if x.shape[3] + at <= wide.shape[3] else x


@pytest.mark.parametrize(
    ("H", "HK", "D", "dtype", "softcap", "odd"),
    [
        (4, 4, 64, torch.bfloat16, 0.0, False), (6, 2, 128, torch.float16, 0.0, False),
        (16, 1, 96, torch.bfloat16, 5.0, False), (3, 3, 8, torch.float32, 0.0, True),
        (5, 5, 256, torch.float32, 0.0, False), (8, 2, 80, torch.float16, 0.0, True),
        (40, 40, 16, torch.float32, 0.0, False), (2, 1, 256, torch.bfloat16, 0.0, False),
        (24, 1, 40, torch.float16, 0.0, False), (35, 35, 8, torch.float16, 0.0, False),
    ],
)  # fmt: skip
def test_token_scores(H: int, HK: int, D: int, dtype: torch.dtype, softcap: float, odd: bool) -> None:
    torch.manual_seed(H)
    B, S, K = 3, 63, 41
    q, k, v = (torch.randn(B, n, m, D).to(dtype) for n, m in ((H, 1), (HK, S), (HK, S)))
    k, v = spread(k, odd), spread(v, odd)
    scale = 1.5 * D**-0.5
    s = q.double() @ k.double().repeat_interleave(H // HK, 1).mT * scale
    s = softcap * torch.tanh(s / softcap) if softcap else s
    o = (s.softmax(-1) @ v.double().repeat_interleave(H // HK, 1)).to(dtype)
    lse = s.logsumexp(-1).float()
    lse[2] = float("-inf")
    index = torch.stack([torch.randperm(S)[:K] for _ in range(B)]).int()
    index[0, 3], index[1, 5] = -1, S
    count = ints([K, 17, K + 5])
    never = torch.ones(B, S, dtype=torch.bool)
    for b in range(B):
        never[b, [int(i) for i in index[b, : int(count[b])] if 0 <= i < S]] = False
    for x in (k, v):
        x.masked_fill_(never[:, None, :, None], NAN)
    arguments = (q, k, v, o, lse, index, count)
    ours = cuda.token_scores(*arguments, scale, softcap)
    plain = scores_reference(*arguments, scale=scale, softcap=softcap)
    exact = scores_reference(*(x.double() for x in arguments[:5]), index, count, scale=scale, softcap=softcap)
    for name, a, b, c in zip(("cosine", "norm", "mass"), ours, plain, exact, strict=True):
        assert_accurate(name, a, b, c)
    assert all(x[1, 17:].unique().numel() == 1 for x in ours)
    again = cuda.token_scores(*arguments, scale, softcap)
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))


@pytest.mark.parametrize(("H", "HK", "D", "S"), [(1, 1, 128, 40), (3, 3, 64, 17), (4, 1, 96, 9), (2, 2, 256, 3)])
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
def test_keys_that_are_most_of_the_output(H: int, HK: int, D: int, S: int, dtype: torch.dtype) -> None:
    torch.manual_seed(S)
    q, k, v = (torch.randn(1, n, m, D).to(dtype) for n, m in ((H, 1), (HK, S), (HK, S)))
    s = 3.0 * q.double() @ k.double().repeat_interleave(H // HK, 1).mT * D**-0.5
    o, lse = (s.softmax(-1) @ v.double().repeat_interleave(H // HK, 1)).to(dtype), s.logsumexp(-1).float()
    rows = (q, k, v, o, lse)
    index, count = torch.arange(S, dtype=torch.int32)[None], ints([S])
    ours = cuda.token_scores(*rows, index, count, 3.0 * D**-0.5, 0.0)
    exact = scores_reference(*(x.double() for x in rows), index, count, scale=3.0 * D**-0.5)
    assert float(exact[1].max()) > 0.5 * float(o.double().norm())
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a.double(), b, atol=4e-6, rtol=4e-6)


@pytest.mark.parametrize(("H", "HK", "D", "softcap"), [(6, 2, 128, 0.0), (2, 2, 64, 0.0), (1, 1, 200, 30.0)])
@pytest.mark.parametrize("dtype", HALVES)
def test_what_products_cut_off_is_kept(H: int, HK: int, D: int, softcap: float, dtype: torch.dtype) -> None:
    """Every key by itself: an error of a score is a relative error of all that its key gives. Scores reach 14 here,
    where half a unit in the last place is 4 units of a probability; softcap rounds them to that, and tanh is off by one
    more. What products cut off of the sums is another 8 to 20."""
    torch.manual_seed(D)
    q, k, v = (torch.randn(1, n, m, D).to(dtype) for n, m in ((H, 1), (HK, 200), (HK, 200)))
    s = 4.0 * q.double() @ k.double().repeat_interleave(H // HK, 1).mT * D**-0.5
    s = softcap * torch.tanh(s / softcap) if softcap else s
    o, lse = torch.randn(1, H, 1, D).to(dtype), s.logsumexp(-1).float()
    index, count = torch.arange(200, dtype=torch.int32)[None], ints([200])
    ours = cuda.token_scores(q, k, v, o, lse, index, count, 4.0 * D**-0.5, softcap)
    exact = scores_reference(
        *(x.double() for x in (q, k, v, o, lse)), index, count, scale=4.0 * D**-0.5, softcap=softcap
    )
    for a, b in zip(ours[1:], exact[1:], strict=True):
        torch.testing.assert_close(a.double(), b, atol=0.0, rtol=(12 if softcap else 6) * 2.0**-23)
    # in units of the last place: the rounding of the sine's square and of the root
    few = exact[1] < 0.1 * float(o.double().norm())
    assert int(few.sum()) > 150 and float((ours[0] - exact[0])[few].abs().max()) <= 2.0**-24


@pytest.mark.parametrize(("H", "HK", "count"), [(1, 1, 500), (9, 3, 333), (20, 2, 497)])
def test_blocks_that_take_turns(library: Path, H: int, HK: int, count: int) -> None:
    native = ctypes.CDLL(str(library))
    q, k, v = (torch.randn(2, n, m, 64).half() for n, m in ((H, 1), (HK, 520), (HK, 520)))
    s = q.double() @ k.double().repeat_interleave(H // HK, 1).mT / 8
    o = (s.softmax(-1) @ v.double().repeat_interleave(H // HK, 1)).half()
    lse = s.logsumexp(-1).float()
    # the output of the last sample is one key's value: a key that is done again in a late turn
    lse[1] = s[1, :, :, 480].float() + 0.05 * (1 + torch.arange(H)[:, None] % 4)
    o[1] = v[1, :, 480:481].repeat_interleave(H // HK, 0)
    rows = (q, k, v, o, lse)
    index = torch.arange(500, dtype=torch.int32).repeat(2, 1) + 7
    native.set_processors(1)
    try:
        ours = cuda.token_scores(*rows, index, ints([count, 499]), 0.125, 0.0)
    finally:
        native.set_processors(132)
    exact = scores_reference(*(x.double() for x in rows), index, ints([count, 499]), scale=0.125)
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a.double(), b, atol=4e-6, rtol=4e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_token_scores_of_nothing_and_of_everything(dtype: torch.dtype) -> None:
    v = torch.randn(1, 1, 2, 16).to(dtype)
    v[:, :, 1] = -v[:, :, 0]
    q, k = torch.zeros(1, 2, 1, 16, dtype=dtype), torch.zeros(1, 1, 2, 16, dtype=dtype)

    def scores(o: Tensor, lse: float, keys: list[int]) -> tuple[Tensor, ...]:
        row = torch.full((1, 2, 1), lse)
        return cuda.token_scores(q, k, v, o, row, ints([keys]), ints([len(keys)]), 1.0, 0.0)

    alone = scores(v[:, :, :1].expand(1, 2, 1, 16), 0.0, [0])
    assert alone[0].tolist() == [[0.0]] and alone[2].tolist() == [[2.0]]
    assert scores(torch.zeros_like(q), 1.0, [0, 1])[0].tolist() == [[1.0, 1.0]]
    v[0, 0, 1] = NAN
    hit = scores(torch.ones_like(q), 1.0, [0, 1])
    assert hit[1][0].isnan().tolist() == [False, True] and hit[0][0].isnan().tolist() == [False, True]


@pytest.mark.parametrize("seed", range(40))
def test_select_tokens(seed: int) -> None:
    draw = random.Random(seed)
    B, K = draw.randint(1, 2), draw.choice([0, 1, 5, 17, 63, 700, 2100, 4099])
    dtype = draw.choice([torch.float32, *HALVES])
    values = [0.0, -0.0, 0.25, 0.5, 1.0, -1.0, float("inf"), float("-inf"), NAN]
    scores = torch.tensor([draw.choice(values) for _ in range(B * K)]).to(dtype).view(B, K)
    if seed % 2:
        scores = torch.where(scores == 0.5, torch.randn(B, K).to(dtype), scores)
    scores = torch.stack([scores, scores + 1], -1)[..., 0]
    count = ints([draw.randint(-1, K + 1) for _ in range(B)]) if draw.random() < 0.6 else None
    index = torch.randperm(5000)[:K].sort().values.int().repeat(B, 1) if draw.random() < 0.5 else None
    threshold = draw.choice([None, 0.0, 0.25, -2.0])
    limit = min(K, draw.choice([0, 1, 4, 63, 999])) if threshold is None or draw.random() < 0.3 else K
    width = limit + draw.choice([0, 3])
    largest = draw.random() < 0.7
    ours = cuda.select_tokens(scores, index, count, threshold, limit, width, largest)
    options = {"threshold": threshold, "limit": limit, "width": width, "largest": largest}
    for a, b in zip(ours, select_reference(scores, index, count, **options), strict=True):
        assert torch.equal(a, b)


INDEX, COUNT = ints([[0, 4, 16, 2**31 - 1, -3], [7, 7, -1, 17, 2], [5, 6, 7, 8, 9]]), ints([3, 5, 0])
SHAPES = [((3, 17), 1), ((3, 17, 6), 1), ((3, 2, 17, 8), 2), ((3, 2, 17), 2), ((3, 2, 3, 17, 5, 4), 3)]


@pytest.mark.parametrize(("shape", "dim"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex128])
def test_compact(shape: tuple[int, ...], dim: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = (torch.randn(shape) * 5).to(dtype)
    views = [x, x.transpose(0, -1).contiguous().transpose(0, -1), torch.stack([x, x], -1)[..., 0]]
    views += [x.repeat(1, 1, *[2] * (len(shape) - 2))[tuple(slice(n) for n in shape)]]
    if len(shape) > 3:
        views.append(x.transpose(1, 2).contiguous().transpose(1, 2))
    wanted = compact_reference.compact(x, INDEX, COUNT, dim)
    for view in views:
        got = cuda.compact(view, INDEX, COUNT, dim)
        assert got.is_contiguous() and torch.equal(got, wanted)


@pytest.mark.parametrize(
    ("dtype", "fp32", "D", "rotary_dim", "interleaved", "odd"),
    [
        (d, f, D, r, i, odd)
        for (d, f), (D, r), i, odd in itertools.product(
            [(torch.bfloat16, True), (torch.float16, False), (torch.float32, True)],
            [(8, 8), (24, 16), (64, 64), (80, 20), (256, 128)], [False, True], [False, True],
        )
    ],
)  # fmt: skip
def test_rotate_and_reanchor(
    dtype: torch.dtype, fp32: bool, D: int, rotary_dim: int, interleaved: bool, odd: bool
) -> None:
    torch.manual_seed(D)
    B, H, T = 2, 5, 17
    x = spread(torch.randn(B, H, T, D).to(dtype), odd)
    turn = torch.rand(B, T, rotary_dim // 2) * 6.28
    cos, sin = (a.to(torch.float32 if fp32 else dtype) for a in (turn.cos(), turn.sin()))
    for angles in ((cos, sin), (cos[:1], sin[:1])):
        ours = cuda.rotate(x, *angles, interleaved)
        exact = rotate_reference.rotate(x.double(), *(a.double() for a in angles), interleaved)
        assert ours.is_contiguous() and torch.equal(ours[..., rotary_dim:], x[..., rotary_dim:])
        assert_accurate("rotate", ours, rotate_reference.rotate(x, *angles, interleaved), exact)
    for angles in ((cos, sin), (cos[:, :1], sin[:, :1]), (cos[:1, :1], sin[:1, :1])):
        y, plain, exact = x.clone(), x.clone(), x.double()
        y = torch.empty_strided(x.shape, x.stride(), dtype=dtype).copy_(x)
        cuda.reanchor(y, *angles, interleaved)
        reanchor_reference.reanchor(plain, *angles, interleaved)
        reanchor_reference.reanchor(exact, *(a.double() for a in angles), interleaved)
        assert_accurate("reanchor", y, plain, exact)


def address(x: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.data_ptr())


@pytest.mark.parametrize("seed", range(24))
def test_the_splits_of_span_attention_go_through_every_key_once(library: Path, seed: int) -> None:
    """Each key that some row of a block sees, once; a kept list by its entries; nothing far from what rows see."""
    draw = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    B, HK, R, T = draw.randint(1, 2), draw.randint(1, 2), draw.choice([1, 3]), draw.choice([1, 5, 40])
    S, N, K = draw.choice([1, 17, 300, 1500]), draw.choice([1, 2, 4, 8]), draw.choice([0, 1, 40, 700])
    splits = draw.choice([1, 2, 7, 33])
    spans = random_spans(B, T, S, N, generator).bounds
    spans[0, 0, 0] = torch.tensor([-(2**31), 2**31 - 1]) if seed % 3 == 0 else spans[0, 0, 0]
    rules = torch.tensor([draw.choice([0, 1, 2, 3]) for _ in range(N)], dtype=torch.int8)
    kept, count = random_kept(B, HK, S, K, generator)
    tiles = (T * R + 63) // 64
    times = torch.zeros(B, HK, tiles, N, S, dtype=torch.int32)
    native = ctypes.CDLL(str(library))
    native.walk_of(
        B, R * HK, HK, T, S, N, K, address(rules), address(spans), address(kept), address(count), splits,
        address(times),
    )  # fmt: skip
    for b, hk, tile, n in itertools.product(range(B), range(HK), range(tiles), range(N)):
        rows = range(tile * 64 // R, min(T, (tile * 64 + 63) // R + 1))
        ends = [(max(0, int(x)), min(S, int(y))) for x, y in spans[b, rows.start : rows.stop, n]]
        ends = [(x, y) for x, y in ends if x < y]
        wanted = torch.zeros(S, dtype=torch.int32)
        if ends:
            wanted[min(x for x, _ in ends) : max(y for _, y in ends)] = 1
        if rules[n] == 3:
            listed = torch.zeros(S, dtype=torch.int32)
            listed[kept[b, hk, : int(count[b, hk])].long()] = 1
            wanted *= listed
        assert torch.equal(times[b, hk, tile, n], wanted)
