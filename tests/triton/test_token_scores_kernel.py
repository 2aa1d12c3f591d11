"""The Triton kernel of token_scores against fp64: the interpreter on a CPU, the compiled kernel on a GPU.

Run as `TRITON_INTERPRET=1 pytest tests/triton` without a GPU. The reference itself is tested in tests/ops.
"""

from __future__ import annotations

import math
import os

import pytest
import torch
from torch import Tensor

from streamkernels import token_scores
from streamkernels.testing.compare import assert_accurate
from streamkernels.testing.inputs import fresh

GPU = torch.cuda.is_available()
if not GPU and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU or TRITON_INTERPRET=1", allow_module_level=True)
DEVICE = "cuda" if GPU else "cpu"
# triton's interpreter computes bf16 on raw bits: bf16 only runs on a GPU
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if GPU else [])
NAN, GARBAGE = float("nan"), 2**31 - 1


def attention_row(q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None) -> tuple[Tensor, Tensor]:
    """o [B, H, 1, D] in q's dtype and lse fp32 [B, H, 1] of one row over all keys, computed in fp64."""
    R = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(R, 1) for x in (k, v))
    s = q.double() @ k.mT * scale
    s = s if softcap is None else softcap * torch.tanh(s / softcap)
    return (s.softmax(-1) @ v).to(q.dtype), s.logsumexp(-1).float()


def stored(q, k, v, o, lse, index, scale, softcap) -> tuple[Tensor, Tensor, Tensor]:
    """The scores as VisiPruner states them, every contribution stored, in the dtype of the arguments."""
    R = q.shape[1] // k.shape[1]
    s = q @ k.repeat_interleave(R, 1).mT * scale
    s = s if softcap is None else softcap * torch.tanh(s / softcap)
    a = (s - lse.to(s.dtype)[..., None]).exp()
    c = (a.mT * v.repeat_interleave(R, 1)).transpose(1, 2).flatten(2)
    whole = o.transpose(1, 2).flatten(2)
    scores = torch.cosine_similarity(whole - c, whole, dim=-1), c.norm(dim=-1), a.sum((1, 2))
    return tuple(x.gather(1, index.long()) for x in scores)


def make(B, H, HK, S, D, dtype, strided=False, sharp=2.0):
    g = torch.Generator().manual_seed(S + H)
    draw = lambda heads, rows, x=1.0: (torch.randn(B, heads, rows, D, generator=g) * x).to(DEVICE, dtype)  # noqa: E731
    q, k, v = draw(H, 1, sharp), draw(HK, S), draw(HK, S)
    if strided:
        k, v = (fresh((B, S, HK, D + 8), dtype, DEVICE)[..., :D].transpose(1, 2).copy_(x) for x in (k, v))
    return q, k, v


def beside_the_reference(got, *arguments) -> None:
    wide = [x.double() if x.is_floating_point() else x for x in arguments]
    references = (token_scores(*x, backend="reference") for x in (arguments, wide))
    for name, x, plain, exact in zip(got._fields, got, *references, strict=True):
        assert_accurate(name, x, plain, exact)


def ints(x) -> Tensor:
    return torch.tensor(x, dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "B, H, HK, S, D, softcap",
    [
        (1, 1, 1, 9, 8, None),
        (3, 4, 4, 63, 64, None),
        (2, 6, 2, 17, 80, 5.0),
        (2, 8, 1, 33, 16, None),
        (1, 5, 5, 41, 128, None),
        (1, 34, 34, 19, 16, None),
        (1, 2, 1, 23, 256, 30.0),
    ],
)
def test_accurate(B, H, HK, S, D, softcap, dtype):
    q, k, v = make(B, H, HK, S, D, dtype, strided=HK % 2 == 0)
    scale = D**-0.5
    o, lse = attention_row(q, k, v, scale, softcap)
    index = torch.stack([torch.randperm(S) for _ in range(B)]).int().to(DEVICE)
    ours = token_scores(q, k, v, o, lse, index, ints([S] * B), softcap=softcap, backend="triton")
    plain = stored(q, k, v, o, lse, index, scale, softcap)
    exact = stored(*(x.double() for x in (q, k, v, o, lse)), index, scale, softcap)
    for name, a, b, c in zip(ours._fields, ours, plain, exact, strict=True):
        assert a.dtype == torch.float32
        assert_accurate(name, a, b, c)


@pytest.mark.parametrize("dtype", DTYPES)
def test_unlisted_keys_may_be_nan_and_garbage_is_ignored(dtype):
    B, S, D = 3, 41, 16
    q, k, v = make(B, 4, 2, S, D, dtype, strided=True)
    o, lse = attention_row(q, k, v, D**-0.5, None)
    listed = [3, 5, 5, 40]
    index = ints([[*listed, 0, 1, -7, GARBAGE, -GARBAGE], [4, S, -1, *[0] * 6], [0] * 9])
    count = ints([4, 3, -2])
    clean = token_scores(q, k, v, o, lse, index, count, backend="triton")
    for x in (k, v):
        x[0, :, [j for j in range(S) if j not in listed]] = NAN
        x[1, :, [j for j in range(S) if j != 4]] = NAN
        x[2] = NAN
    got = token_scores(q, k, v, o, lse, index, count, backend="triton")
    for x, y, ignored in zip(got, clean, (1.0, 0.0, 0.0), strict=True):
        assert torch.equal(x, y) and bool(x.isfinite().all())
        assert x[1, 1:].unique().tolist() == x[2].unique().tolist() == x[0, 4:].unique().tolist() == [ignored]
        assert x[0, 1] == x[0, 2]
    beside_the_reference(got, q, k, v, o, lse, index, count)
    # influence: a listed key that is NaN spoils its own entry only
    v[0, :, 3] = NAN
    hit = token_scores(q, k, v, o, lse, index, count, backend="triton")
    for x, y in zip(hit[:2], clean[:2], strict=True):
        assert bool(x[0, 0].isnan()) and torch.equal(x[0, 1:], y[0, 1:]) and torch.equal(x[1:], y[1:])


@pytest.mark.parametrize("K", [0, 9, 17, 63, 300])
def test_odd_and_empty_lists(K):
    q, k, v = make(2, 4, 4, 70, 8, torch.float32)
    o, lse = attention_row(q, k, v, 8**-0.5, None)
    index = torch.randint(-2, 72, (2, K), generator=torch.Generator().manual_seed(K), dtype=torch.int32).to(DEVICE)
    # strided lists with garbage between the entries
    wide = torch.full((K, 2, 2), GARBAGE, dtype=torch.int32, device=DEVICE)
    wide[:, :, 0] = index.T
    count = ints([[K, 0], [K // 2, 0]])[:, 0]
    got = token_scores(q, k, v, o, lse, wide[:, :, 0].T, count, backend="triton")
    beside_the_reference(got, q, k, v, o, lse, index, count)
    none = token_scores(q, k[:, :, :0], v[:, :, :0], o, lse, index, count, backend="triton")
    assert not bool(none.mass.any()) and bool((none.cosine == 1).all())


def test_what_the_definition_fixes():
    """A row that saw nothing, an output of zero, a key that is all of the output; infinite head counts are refused."""
    q, k, v = make(1, 2, 2, 5, 16, torch.float32)
    index, count = ints([[0, 1]]), ints([2])
    o, lse = attention_row(q, k, v, 0.25, None)
    blind = token_scores(q, k, v, o * 0, lse * 0 - math.inf, index, count, backend="triton")
    assert [x.tolist() for x in blind] == [[[1.0, 1.0]], [[0.0, 0.0]], [[0.0, 0.0]]]
    one = token_scores(q, k, v, v[:, :, :1], (q @ k[:, :, :1].mT)[..., 0] * 0.25, index, count, backend="triton")
    assert float(one.cosine[0, 0]) == 0.0 and abs(float(one.mass[0, 0]) - 2) < 1e-5


@pytest.mark.parametrize("threshold", [0.995, 0.999])
@pytest.mark.parametrize("step", [-1e-6, 1e-6])
def test_the_cosine_near_the_thresholds(threshold, step):
    o = torch.zeros(1, 1, 1, 8, dtype=torch.float64)
    o[..., 0] = 1.7
    c = torch.zeros_like(o)
    c[..., 0], c[..., 1] = 0.5, 1.2 * math.tan(math.acos(threshold + step))
    q, o, v = (x.float().to(DEVICE) for x in (torch.zeros(1, 1, 1, 8), o, c * math.e))
    got = token_scores(q, q, v, o, q[..., 0] + 1, ints([[0]]), ints([1]), backend="triton").cosine
    assert (float(got) < threshold) == (step < 0)


@pytest.mark.skipif(not GPU, reason="the interpreter is sequential")
def test_repeats_are_bit_equal_and_a_graph_replays():
    q, k, v = make(2, 32, 32, 2880, 128, torch.float16)
    o, lse = attention_row(q, k, v, 128**-0.5, None)
    index, count = torch.arange(2880, dtype=torch.int32, device=DEVICE).expand(2, -1), ints([2880, 999])
    first = token_scores(q, k, v, o, lse, index, count, backend="triton")
    for _ in range(20):
        again = token_scores(q, k, v, o, lse, index, count, backend="triton")
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = token_scores(q, k, v, o, lse, index, count, backend="triton")
    for x in captured:
        x.fill_(NAN)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(first, captured, strict=True))


def test_registration():
    q, k, v = make(2, 4, 2, 9, 16, torch.float32)
    o, lse = attention_row(q, k, v, 0.25, None)
    index, count = ints([list(range(9))] * 2), ints([9, 4])
    torch.library.opcheck(torch.ops.streamkernels.token_scores, (q, k, v, o, lse, index, count, 0.25, 0.0, "triton"))
