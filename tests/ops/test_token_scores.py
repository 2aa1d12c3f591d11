"""`token_scores` against the formulas as VisiPruner states them, with every contribution stored, in fp64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from streamkernels.backends.select import explain
from streamkernels.ops.token_scores import token_scores

torch.set_num_threads(1)
NAN, GARBAGE = float("nan"), 2**31 - 1


def attention_row(q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None) -> tuple[Tensor, Tensor]:
    """o [B, H, 1, D] and lse [B, H, 1] over all keys, by the book."""
    R = q.shape[1] // k.shape[1]
    s = q @ k.repeat_interleave(R, 1).mT * scale
    s = s if softcap is None else softcap * torch.tanh(s / softcap)
    return s.softmax(-1) @ v.repeat_interleave(R, 1), s.logsumexp(-1)


def literal(q: Tensor, k: Tensor, v: Tensor, o: Tensor, scale: float, softcap: float | None) -> tuple[Tensor, ...]:
    """cosine, norm, mass of every key [B, S]: contributions of all heads side by side, then torch's own cosine."""
    B, H, _, D = q.shape
    R = H // k.shape[1]
    s = q @ k.repeat_interleave(R, 1).mT * scale
    s = s if softcap is None else softcap * torch.tanh(s / softcap)
    a = s.softmax(-1)  # [B, H, 1, S]
    c = a.mT * v.repeat_interleave(R, 1)  # [B, H, S, D]
    c = c.transpose(1, 2).reshape(B, -1, H * D)
    whole = o.transpose(1, 2).reshape(B, 1, H * D)
    return torch.cosine_similarity(whole - c, whole.expand_as(c), dim=-1), c.norm(dim=-1), a.sum((1, 2))


def inputs(
    B: int, H: int, HK: int, S: int, D: int, dtype: torch.dtype = torch.float64, sharp: float = 2.0
) -> list[Tensor]:
    q = torch.randn(B, H, 1, D, dtype=dtype) * sharp
    return [q, torch.randn(B, HK, S, D, dtype=dtype), torch.randn(B, HK, S, D, dtype=dtype)]


@pytest.mark.parametrize(("H", "HK"), [(1, 1), (4, 4), (6, 2), (4, 1)])
@pytest.mark.parametrize(("S", "D"), [(1, 8), (17, 16), (63, 64)])
@pytest.mark.parametrize(("scale", "softcap"), [(None, None), (0.3, 5.0)])
def test_against_stored_contributions(
    H: int, HK: int, S: int, D: int, scale: float | None, softcap: float | None
) -> None:
    torch.manual_seed(S + H)
    q, k, v = inputs(3, H, HK, S, D)
    factor = D**-0.5 if scale is None else scale
    o, lse = attention_row(q, k, v, factor, softcap)
    index = torch.stack([torch.randperm(S) for _ in range(3)]).int()
    count = torch.tensor([S, S // 2, 0], dtype=torch.int32)
    got = token_scores(q, k, v, o, lse, index, count, scale=scale, softcap=softcap)
    assert got._fields == ("cosine", "norm", "mass")
    for x, wanted, ignored in zip(got, literal(q, k, v, o, factor, softcap), (1.0, 0.0, 0.0), strict=True):
        assert x.shape == index.shape and x.dtype == torch.float64
        wanted = wanted.gather(1, index.long()).masked_fill(torch.arange(S) >= count[:, None], ignored)
        torch.testing.assert_close(x, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_and_strides(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    B, H, HK, S, D = 2, 4, 2, 33, 32
    exact = inputs(B, H, HK, S, D)
    # the layout that Hugging Face hands over, NaN in between
    narrow = []
    for x in exact:
        wide = torch.full((B, x.shape[2], x.shape[1], D + 8), NAN, dtype=dtype)[..., :D].transpose(1, 2)
        narrow.append(wide.copy_(x))
    q, k, v = (x.double() for x in narrow)
    o, lse = attention_row(q, k, v, D**-0.5, None)
    index = torch.arange(S, dtype=torch.int32).expand(B, S)
    count = torch.full((B,), S, dtype=torch.int32)
    got = token_scores(*narrow, o.to(dtype), lse.float(), index, count)
    wanted = literal(q, k, v, o.to(dtype).double(), D**-0.5, None)
    for x, y in zip(got, wanted, strict=True):
        assert x.dtype == torch.float32
        torch.testing.assert_close(x.double(), y, rtol=2e-5, atol=2e-6)


def test_the_cosine_near_the_thresholds_in_fp32() -> None:
    # a token whose removal turns o by a known angle: 1e-6 below or above a threshold must fall on the right side
    for threshold in (0.995, 0.999):
        for cosine in (threshold - 1e-6, threshold + 1e-6):
            o = torch.zeros(1, 1, 1, 8, dtype=torch.float64)
            o[..., 0] = 1.7
            c = torch.zeros_like(o)
            c[..., 0], c[..., 1] = 0.5, 1.2 * math.tan(math.acos(cosine))
            # one key with probability exp(-1): its value is c * e, the rest of the row is elsewhere
            q = torch.zeros(1, 1, 1, 8)
            got = token_scores(q, q, (c * math.e).float(), o.float(), torch.ones(1, 1, 1), ints([[0]]), ints([1]))
            assert abs(float(got.cosine) - cosine) < 2.5e-7
            assert (float(got.cosine) < threshold) == (cosine < threshold)


def ints(x: list) -> Tensor:
    return torch.tensor(x, dtype=torch.int32)


@pytest.mark.parametrize(("share", "tolerance"), [(0.5, 1e-6), (0.99, 6e-3), (0.999, 0.1)])
def test_a_key_that_is_most_of_the_output_keeps_its_digits_in_fp32(share: float, tolerance: float) -> None:
    # here |o|^2 - 2 d + n cancels: that form is off by 2e-2 at 0.99 and NaN at 0.999
    torch.manual_seed(2)
    D = 64
    first = torch.randn(200, 1, 1, D, dtype=torch.float64)
    rest = 0.15 * torch.randn(200, 1, 1, D, dtype=torch.float64)
    v = torch.cat([first, rest], 2).float()
    logit = math.log(share / (1 - share))
    q = torch.ones(200, 1, 1, D)
    k = torch.stack([torch.full((D,), logit / D), torch.zeros(D)]).expand(200, 1, 2, D)
    o, lse = attention_row(q.double(), k.double(), v.double(), 1.0, None)
    index, count = torch.zeros(200, 1, dtype=torch.int32), torch.ones(200, dtype=torch.int32)
    got = token_scores(q, k.contiguous(), v, o.float(), lse.float(), index, count, scale=1.0).cosine
    wanted = literal(q.double(), k.double(), v.double(), o, 1.0, None)[0][:, :1]
    assert float((got - wanted).abs().max()) < tolerance and bool((wanted.abs() < 0.95).all())


def test_small_contributions_stay_below_one() -> None:
    torch.manual_seed(2)
    q, k, v = inputs(1, 2, 1, 2048, 16, sharp=0.1)
    v += 1
    o, lse = attention_row(q, k, v, 0.25, None)
    index, count = torch.arange(2048, dtype=torch.int32)[None], ints([2048])
    exact = token_scores(q, k, v, o, lse, index, count)
    single = token_scores(q.float(), k.float(), v.float(), o.float(), lse.float(), index, count)
    assert float(exact.cosine.min()) > 0.99999
    torch.testing.assert_close(single.cosine.double(), exact.cosine, rtol=0, atol=2.5e-7)
    assert bool((single.cosine <= 1).all())


def test_a_key_that_is_the_whole_output_and_an_output_of_zero() -> None:
    torch.manual_seed(3)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        v = torch.randn(1, 1, 2, 16, dtype=dtype)
        v[:, :, 1] = -v[:, :, 0]
        q, k = torch.zeros(1, 2, 1, 16, dtype=dtype), torch.zeros(1, 1, 2, 16, dtype=dtype)
        o = v[:, :, :1].expand(1, 2, 1, 16)
        alone = token_scores(q, k, v, o, torch.zeros(1, 2, 1, dtype=wide), ints([[0]]), ints([1]))
        # as torch.cosine_similarity has it for a zero vector
        assert alone.cosine.tolist() == [[0.0]] and alone.mass.tolist() == [[2.0]]
        lse = torch.full((1, 2, 1), math.log(2), dtype=wide)
        gone = token_scores(q, k, v, torch.zeros(1, 2, 1, 16, dtype=dtype), lse, ints([[0, 1]]), ints([2]))
        assert gone.cosine.tolist() == [[1.0, 1.0]]
        assert bool((gone.norm > 0.1).all())


def test_garbage_unlisted_nan_and_empty_rows() -> None:
    torch.manual_seed(4)
    B, H, HK, S, D = 3, 4, 2, 17, 16
    q, k, v = inputs(B, H, HK, S, D)
    o, lse = attention_row(q, k, v, D**-0.5, None)
    lse[2] = float("-inf")
    o[2] = 0
    listed = torch.tensor([3, 5, 9, 10])
    index = torch.full((B, 9), GARBAGE).int()
    index[:, :4] = listed
    index[1, 1], index[1, 2] = -1, S
    count = ints([4, 4, 4])
    clean = token_scores(q, k, v, o, lse, index, count)
    spoiled = [x.clone() for x in (k, v)]
    for x in spoiled:
        x[:, :, [j for j in range(S) if j not in listed]] = NAN
    # whatever stands behind the count names a poisoned key
    index[:, 4:] = ints([0, 1, -7, GARBAGE, -GARBAGE])
    got = token_scores(q, *spoiled, o, lse, index, count)
    wanted = literal(q, k, v, o, D**-0.5, None)
    for x, y, z, ignored in zip(got, clean, wanted, (1.0, 0.0, 0.0), strict=True):
        assert torch.equal(x, y) and bool(x.isfinite().all())
        torch.testing.assert_close(x[0, :4], z[0, listed])
        assert x[1, 1:3].tolist() == [ignored] * 2 and x[:, 4:].unique().tolist() == [ignored]
        assert x[2].unique().tolist() == [ignored]
    # influence: a listed key that is NaN spoils its own entry only
    v[0, :, 5] = NAN
    hit = token_scores(q, k, v, o, lse, index, count)
    assert bool(hit.norm[0, 1].isnan()) and not bool(hit.norm[0, [0, 2, 3]].isnan().any())


def test_empty_lists_and_buffers() -> None:
    q, k, v = inputs(2, 2, 1, 5, 8)
    o, lse = attention_row(q, k, v, 1.0, None)
    none = token_scores(q, k, v, o, lse, torch.zeros(2, 0, dtype=torch.int32), ints([0, 3]))
    assert none.cosine.shape == (2, 0)
    no_keys = token_scores(q, k[:, :, :0], v[:, :, :0], o, lse, ints([[0], [0]]), ints([1, 1]))
    assert no_keys.cosine.tolist() == [[1.0], [1.0]] and no_keys.mass.tolist() == [[0.0], [0.0]]


def test_long_lists_go_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    from streamkernels.reference import attend_rows

    torch.manual_seed(5)
    q, k, v = inputs(2, 4, 2, 63, 16)
    o, lse = attention_row(q, k, v, 0.25, None)
    index, count = torch.arange(63, dtype=torch.int32).expand(2, 63), ints([63, 50])
    whole = token_scores(q, k, v, o, lse, index, count)
    monkeypatch.setitem(attend_rows.CHUNK_ELEMENTS, "cpu", 1000)
    for x, y in zip(token_scores(q, k, v, o, lse, index, count), whole, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-14)


def test_autocast_and_gradients_leave_the_scores_alone() -> None:
    torch.manual_seed(6)
    q, k, v = inputs(1, 2, 1, 9, 8, dtype=torch.float32)
    o, lse = attention_row(q, k, v, 8**-0.5, None)
    index, count = torch.arange(9, dtype=torch.int32)[None], ints([9])
    plain = token_scores(q, k, v, o, lse, index, count)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = token_scores(*(x.clone().requires_grad_() for x in (q, k, v, o, lse)), index, count)
    for x, y in zip(cast, plain, strict=True):
        assert torch.equal(x, y) and not x.requires_grad


def test_registration() -> None:
    q, k, v = inputs(2, 4, 2, 9, 16, dtype=torch.float32)
    o, lse = attention_row(q, k, v, 0.25, None)
    index, count = torch.arange(9, dtype=torch.int32).expand(2, 9), ints([9, 4])
    arguments = (q, k, v, o, lse, index, count, 0.25, 0.0, "reference")
    torch.library.opcheck(torch.ops.streamkernels.token_scores, arguments)
    exact = tuple(x.double() for x in arguments[:5])
    torch.library.opcheck(torch.ops.streamkernels.token_scores, (*exact, index, count, 0.25, 4.0, "reference"))


def test_compile_with_dynamic_lengths() -> None:
    def call(q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, index: Tensor, count: Tensor) -> Tensor:
        scores = token_scores(q, k, v, o, lse, index, count)
        return scores.cosine + scores.norm * scores.mass

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    for S, K in ((9, 5), (17, 11)):
        q, k, v = inputs(2, 4, 2, S, 16, dtype=torch.float32)
        o, lse = attention_row(q, k, v, 0.25, None)
        index, count = torch.arange(K, dtype=torch.int32).repeat(2, 1), ints([K, 2])
        assert torch.equal(compiled(q, k, v, o, lse, index, count), call(q, k, v, o, lse, index, count))


GOOD = {
    "q": torch.zeros(2, 4, 1, 16),
    "k": torch.zeros(2, 2, 9, 16),
    "v": torch.zeros(2, 2, 9, 16),
    "o": torch.zeros(2, 4, 1, 16),
    "lse": torch.zeros(2, 4, 1),
    "index": torch.zeros(2, 5, dtype=torch.int32),
    "count": torch.zeros(2, dtype=torch.int32),
}


@pytest.mark.parametrize(
    ("error", "name", "change"),
    [
        (ValueError, "q", {"q": torch.zeros(2, 4, 2, 16)}),
        (ValueError, "q", {"q": torch.zeros(2, 3, 1, 16), "o": torch.zeros(2, 3, 1, 16), "lse": torch.zeros(2, 3, 1)}),
        (TypeError, "q", {"q": torch.zeros(2, 4, 1, 16, dtype=torch.int32)}),
        (TypeError, "k", {"k": torch.zeros(2, 2, 9, 16).bfloat16()}),
        (ValueError, "v", {"v": torch.zeros(2, 2, 8, 16)}),
        (ValueError, "v", {"v": torch.zeros(2, 2, 16, 9).mT}),
        (ValueError, "o", {"o": torch.zeros(2, 4, 2, 16)}),
        (TypeError, "lse", {"lse": torch.zeros(2, 4, 1).bfloat16()}),
        (ValueError, "lse", {"lse": torch.zeros(2, 4)}),
        (TypeError, "index", {"index": torch.zeros(2, 5, dtype=torch.int64)}),
        (ValueError, "count", {"count": torch.zeros(2, 1, dtype=torch.int32)}),
        (ValueError, "count", {"count": torch.zeros(2, dtype=torch.int32, device="meta")}),
        (ValueError, "scale", {"scale": NAN}),
        (ValueError, "softcap", {"softcap": 0.0}),
        (ValueError, "backend", {"backend": "fast"}),
        (NotImplementedError, "backend='triton'", {"backend": "triton"}),
        (NotImplementedError, "backend='cuda'", {"backend": "cuda"}),
    ],
)
def test_bad_input_is_refused_by_name(error: type[Exception], name: str, change: dict) -> None:
    # also beside a call that went through, whose look is known
    for _ in range(2):
        with pytest.raises(error, match=rf"^token_scores: {name}"):
            token_scores(**{**GOOD, **change})
        token_scores(**GOOD)


def test_calls_that_look_alike_are_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from streamkernels.ops.token_scores import api

    first = token_scores(**GOOD)
    monkeypatch.setattr(api, "Shapes", None)
    assert all(torch.equal(a, b) for a, b in zip(token_scores(**GOOD), first, strict=True))
    with_gradient = {"q": GOOD["q"].clone().requires_grad_()}
    for changed in ({"scale": 1.0}, {"softcap": 2.0}, {"backend": "reference"}, with_gradient):
        with pytest.raises(TypeError, match="not callable"):
            token_scores(**{**GOOD, **changed})


def test_explain() -> None:
    assert explain(token_scores, **GOOD).backend == "reference"
