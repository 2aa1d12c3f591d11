"""The CUDA kernel of token_scores on a GPU, against the reference in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from streamkernels.ops.token_scores import token_scores
from streamkernels.testing.compare import assert_accurate

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
NAN = float("nan")
CASES = [
    # B, H, HK, S, K, D, softcap
    (1, 32, 32, 624, 576, 128, None),
    (2, 32, 32, 5000, 4611, 128, None),
    (3, 28, 4, 700, 333, 128, None),
    (2, 16, 1, 300, 300, 96, 5.0),
    (2, 8, 4, 70, 41, 256, None),
    (4, 5, 5, 63, 17, 80, None),
    (1, 48, 48, 64, 1, 64, None),
    (2, 2, 1, 17, 9, 8, 2.0),
    (1, 28, 4, 3000, 2880, 128, None),
    (2, 60, 3, 50, 29, 192, None),
    (1, 17, 1, 90, 71, 40, None),
    (3, 6, 6, 9000, 8001, 64, None),
]


def inputs(
    B: int, H: int, HK: int, S: int, K: int, D: int, softcap: float | None, dtype: torch.dtype, sharp: float = 1.0
) -> list[Tensor]:
    """q, k, v as Hugging Face lays them out, o and lse of the row over all keys, a ragged list. `sharp` grows q."""
    random = torch.Generator().manual_seed(S + D)
    q, k, v = (
        torch.randn(B, n, heads, D, generator=random).to(dtype).cuda().transpose(1, 2)
        for heads, n in ((H, 1), (HK, S), (HK, S))
    )
    q *= sharp
    s = q.double() @ k.double().repeat_interleave(H // HK, 1).mT * D**-0.5
    s = s if softcap is None else softcap * torch.tanh(s / softcap)
    o = (s.softmax(-1) @ v.double().repeat_interleave(H // HK, 1)).to(dtype)
    index = torch.stack([torch.randperm(S, generator=random)[:K].sort().values for _ in range(B)]).int().cuda()
    count = torch.tensor([K, 0, K // 2, K + 3][:B], dtype=torch.int32, device="cuda")
    return [q, k, v, o, s.logsumexp(-1).float(), index, count]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_accurate(case: tuple, dtype: torch.dtype) -> None:
    x = inputs(*case, dtype)
    ours = token_scores(*x, softcap=case[-1], backend="cuda")
    plain = token_scores(*x, softcap=case[-1], backend="reference")
    exact = token_scores(*(t.double() for t in x[:5]), *x[5:], softcap=case[-1], backend="reference")
    for name, a, b, c in zip(ours._fields, ours, plain, exact, strict=True):
        assert_accurate(name, a, b, c)
    for _ in range(20):
        again = token_scores(*x, softcap=case[-1], backend="cuda")
        assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("H", "HK", "D", "S"), [(1, 1, 128, 40), (3, 3, 64, 17), (4, 1, 96, 9), (2, 2, 256, 3)])
def test_keys_that_are_most_of_the_output(H: int, HK: int, D: int, S: int, dtype: torch.dtype) -> None:
    x = inputs(2, H, HK, S, S, D, None, dtype, sharp=3.0)
    x[6][:] = S
    ours = token_scores(*x, backend="cuda")
    exact = token_scores(*(t.double() for t in x[:5]), *x[5:], backend="reference")
    assert bool((exact.norm.amax(1) > 0.5 * x[3].double().square().sum((1, 2, 3)).sqrt()).any())
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a.double(), b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("H", "HK", "D"), [(6, 2, 128), (28, 4, 128)])
def test_what_products_cut_off_is_kept(H: int, HK: int, D: int, dtype: torch.dtype) -> None:
    """Every key by itself, as in tests/packaging/test_pruned_on_host.py. Of these inputs sums in fp32 make 11 to 17
    units in the last place, products that lose what they cut off 10 to 20, and those that keep it 4.7 to 7.3."""
    x = inputs(1, H, HK, 2000, 2000, D, None, dtype, sharp=4.0)
    ours = token_scores(*x, backend="cuda")
    exact = token_scores(*(t.double() for t in x[:5]), *x[5:], backend="reference")
    for a, b in zip(ours[1:], exact[1:], strict=True):
        torch.testing.assert_close(a.double(), b, atol=0.0, rtol=9 * 2.0**-23)
    few = exact.norm < 0.1 * float(x[3].double().norm())
    assert int(few.sum()) > 1000 and float((ours.cosine - exact.cosine)[few].abs().max()) <= 2.0**-24


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_key_that_is_all_of_the_output(dtype: torch.dtype) -> None:
    q = torch.ones(1, 3, 1, 64, dtype=dtype, device="cuda")
    v = torch.randn(1, 3, 20, 64, device="cuda").to(dtype)
    lse = torch.full((1, 3, 1), 8.0, device="cuda")
    index = torch.arange(20, dtype=torch.int32, device="cuda")[None]
    count = torch.tensor([20], dtype=torch.int32, device="cuda")
    scores = token_scores(q, torch.ones_like(v), v, v[:, :, 13:14].contiguous(), lse, index, count, backend="cuda")
    assert float(scores.cosine[0, 13]) == 0.0 and bool((scores.cosine[0, :13] != 0.0).all())
    torch.testing.assert_close(scores.mass, torch.full_like(scores.mass, 3.0))


def test_rows_off_their_borders() -> None:
    x = inputs(2, 8, 4, 70, 41, 64, None, torch.bfloat16)
    ours = token_scores(*x, backend="cuda")
    odd = []
    for t in x[:4]:
        wide = torch.full((*t.shape[:3], t.shape[3] + 3), NAN, dtype=t.dtype, device=t.device)
        odd.append(wide[..., 1:-2].copy_(t))
    again = token_scores(*odd, *x[4:], backend="cuda")
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))


def test_poison_garbage_and_influence() -> None:
    x = inputs(1, 8, 4, 70, 9, 128, None, torch.bfloat16)
    q, k, v, o, lse, index, count = x
    index[0, 2], index[0, 5], index[0, 7] = -(2**31), 2**31 - 1, 70
    clean = token_scores(*x, backend="cuda")
    listed = [int(i) for i in index[0] if 0 <= i < 70]
    never = torch.ones(70, dtype=torch.bool, device="cuda")
    never[listed] = False
    k.masked_fill_(never[:, None], NAN)
    v.masked_fill_(never[:, None], NAN)
    again = token_scores(*x, backend="cuda")
    for a, b, ignored in zip(again, clean, (1.0, 0.0, 0.0), strict=True):
        assert torch.equal(a, b) and a[0, [2, 5, 7]].tolist() == [ignored] * 3
    v[0, :, listed[1]] = NAN
    hit = token_scores(*x, backend="cuda").norm.isnan()[0]
    assert hit.sum() == 1 and int(index[0, hit.nonzero()[0, 0]]) == listed[1]


def test_nothing_seen_no_keys_no_list() -> None:
    x = inputs(2, 8, 4, 70, 9, 64, None, torch.float16)
    x[4][1] = float("-inf")
    x[6][:] = 9
    scores = token_scores(*x, backend="cuda")
    assert scores.mass[1].tolist() == [0.0] * 9 and bool((scores.mass[0] > 0).all())
    assert token_scores(*x[:5], x[5][:, :0], x[6], backend="cuda").norm.shape == (2, 0)
    no_keys = token_scores(x[0], x[1][:, :, :0], x[2][:, :, :0], *x[3:], backend="cuda")
    assert no_keys.cosine.unique().tolist() == [1.0]


def test_captured_in_a_graph_with_a_count_that_changes() -> None:
    x = inputs(2, 32, 32, 624, 576, 128, None, torch.float16)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = token_scores(*x, backend="cuda")
    for counts in ([576, 3], [0, 575]):
        x[6].copy_(torch.tensor(counts))
        for t in captured:
            t.fill_(NAN)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, token_scores(*x, backend="cuda"), strict=True))
