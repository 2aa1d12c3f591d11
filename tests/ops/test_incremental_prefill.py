"""`incremental_prefill`: every option does something, dtypes, errors that change nothing, a cache that is full."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from streamkernels.backends.select import explain
from streamkernels.core.cache import PADDING, SOURCE, TARGET, StreamCache
from streamkernels.core.positions import Rotary, apply_rotary
from streamkernels.core.spans import from_limits
from streamkernels.ops.incremental_prefill import incremental_prefill
from streamkernels.ops.known import Known
from streamkernels.ops.rotate_append import rotate_append
from streamkernels.ops.span_attention import span_attention
from streamkernels.testing.compare import assert_accurate
from streamkernels.testing.dense import dense_attention

B, H, HK, D, T = 2, 4, 2, 16, 7
NAN = float("nan")
ROLE = torch.tensor([[0, 1, 1, 0, -1, 1, 0], [1, 1, 0, 0, 1, 1, -1]], dtype=torch.int8)
LIMIT = torch.tensor([[0, 4, 2, 0, 0, 6, 0], [3, 3, 0, 0, 5, 5, 0]], dtype=torch.int32)
COS, SIN = Rotary.from_theta(D).cos_sin(torch.arange(T)[None] * 3)


def chunk(seed: int = 0, dtype=torch.float32, T: int = T) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(B, heads, T, D, generator=g).to(dtype) for heads in (H, HK, HK)]


def cache_of(dtype=torch.float32, capacity=32, rows: int = 4, **options) -> StreamCache:
    """A cache with `rows` committed rows in both segments, NaN behind them."""
    cache = StreamCache(
        layers=1, batch=B, kv_heads=HK, head_dim=D, dtype=dtype, device="cpu", capacity=capacity, **options
    )
    for role in (SOURCE, TARGET):
        for x in cache.segment(0, role):
            x.fill_(NAN)
        _, k, v = chunk(10 + role, dtype, rows)
        rotate_append(k, v, None, None, cache, 0, role=role)
        cache.commit()
    return cache


def contents(cache: StreamCache) -> list[Tensor]:
    return [x.clone() for role in (SOURCE, TARGET) for x in cache.segment(0, role)] + [cache.length().clone()]


def same_bits(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x.view(torch.int8), y.view(torch.int8)) for x, y in zip(a, b, strict=True))


PLAIN = {"role": ROLE, "source_limit": LIMIT}
TOGGLED = {
    "source_limit": {"source_limit": LIMIT.clamp(max=3)},
    "no_source_limit": {"source_limit": None},
    "source_begin": {"source_begin": torch.full((B, T), 2, dtype=torch.int32)},
    "target_begin": {"target_begin": torch.full((B, T), 2, dtype=torch.int32)},
    "sink_logits": {"sink_logits": torch.zeros(H)},
    "scale": {"scale": 0.9},
    "softcap": {"softcap": 0.5},
    "interleaved": {"interleaved": True},
    "role": {"role": ROLE.flip(0)},
    "whole_role": {"role": TARGET},
}


@pytest.mark.parametrize("option", TOGGLED)
def test_every_option_changes_the_output(option):
    plain, cache = cache_of(), cache_of()
    before = incremental_prefill(*chunk(), COS, SIN, plain, 0, **PLAIN)
    after = incremental_prefill(*chunk(), COS, SIN, cache, 0, **{**PLAIN, **TOGGLED[option]})
    assert (before - after).abs().max() > 1e-3


def test_sinks_change_what_begins_hide():
    begin = torch.full((B, T), 4, dtype=torch.int32)
    outputs = []
    for sinks in (0, (1, 0), (0, 1), 2):
        outputs.append(
            incremental_prefill(
                *chunk(), COS, SIN, cache_of(), 0, **PLAIN, source_begin=begin, target_begin=begin, sinks=sinks
            )
        )
    for i, a in enumerate(outputs):
        for b in outputs[:i]:
            assert (a - b).abs().max() > 1e-3


def test_writes_what_rotate_append_writes():
    ours, other = cache_of(), cache_of()
    q, k, v = chunk()
    incremental_prefill(q, k, v, COS, SIN, ours, 0, **PLAIN)
    rotate_append(k, v, COS, SIN, other, 0, role=ROLE)
    assert same_bits(contents(ours), contents(other))
    ours.commit()
    assert ours.length(0).tolist() == [[7, 7], [6, 8]]


def test_rotated_rows_can_be_handed_in():
    q, k, v = chunk()
    turned = [apply_rotary(x, COS, SIN) for x in (q, k)]
    a = incremental_prefill(q, k, v, COS, SIN, cache_of(), 0, **PLAIN)
    b = incremental_prefill(*turned, v, None, None, cache_of(), 0, **PLAIN)
    assert torch.equal(a, b)


def test_strided_inputs_and_noncontiguous_limits():
    wide = torch.full((B, T, H + 2 * HK, 3 * D), NAN)
    q, k, v = wide[..., D : 2 * D].transpose(1, 2).split([H, HK, HK], 1)
    for x, y in zip((q, k, v), chunk(), strict=True):
        x.copy_(y)
    angles = [torch.stack([a[0], a[0]], 1)[:, 1].expand(B, -1, -1) for a in (COS, SIN)]
    options = {"role": ROLE.T.contiguous().T, "source_limit": LIMIT.repeat_interleave(2, 1)[:, ::2]}
    a = incremental_prefill(q, k, v, *angles, cache_of(), 0, **options)
    assert torch.equal(a, incremental_prefill(*chunk(), COS, SIN, cache_of(), 0, **PLAIN))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_as_accurate_as_plain_attention_in_the_same_dtype(dtype):
    """[source | target] in three calls against the truth in fp64, with plain PyTorch as the yardstick."""
    S, n = 19, 12
    limits = [[3 + j for j in range(n)], [7] * n]
    spans = from_limits(limits, [S, S])
    q, k, v = chunk(3, dtype, S + n)
    rows = [(SOURCE, slice(0, 11)), (TARGET, slice(S, S + 5)), (SOURCE, slice(11, S)), (TARGET, slice(S + 5, S + n))]
    cache = cache_of(dtype, rows=0)
    o, lse = torch.empty_like(q), torch.empty(B, H, S + n)
    for role, at in rows:
        limit = None if role == SOURCE else torch.tensor(limits, dtype=torch.int32)[:, at.start - S : at.stop - S]
        part = [x[:, :, at] for x in (q, k, v)]
        o[:, :, at], lse[..., at] = incremental_prefill(
            *part, None, None, cache, 0, role=role, source_limit=limit, return_lse=True
        )
        cache.commit()
    plain, plain_lse = dense_attention(q, k, v, spans, scale=D**-0.5)
    exact, exact_lse = dense_attention(q.double(), k.double(), v.double(), spans, scale=D**-0.5)
    assert_accurate("o", o, plain, exact)
    assert_accurate("lse", lse[..., None], plain_lse[..., None], exact_lse[..., None])


def test_autocast_does_not_reach_inside():
    want = incremental_prefill(*chunk(), COS, SIN, cache_of(), 0, **PLAIN)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(incremental_prefill(*chunk(), COS, SIN, cache_of(), 0, **PLAIN), want)


@pytest.mark.parametrize("T", [0, 1])
def test_an_empty_cache_and_empty_chunks(T):
    cache = cache_of(rows=0)
    o, lse = incremental_prefill(*chunk(T=T), None, None, cache, 0, role=TARGET, return_lse=True)
    assert o.shape == (B, H, T, D) and lse.shape == (B, H, T)
    if T:  # alone with itself
        assert torch.allclose(o, chunk(T=1)[2].repeat_interleave(H // HK, 1))
    cache.commit()
    assert cache.length(0).tolist() == [[0, T]] * B


def test_limits_are_clipped_and_only_target_rows_read_them():
    far = torch.where(ROLE == TARGET, 2**31 - 1, -(2**31)).int()
    want = incremental_prefill(*chunk(), COS, SIN, cache_of(), 0, role=ROLE)
    assert torch.equal(incremental_prefill(*chunk(), COS, SIN, cache_of(), 0, role=ROLE, source_limit=far), want)
    o, lse = incremental_prefill(
        *chunk(), None, None, cache_of(rows=0), 0, role=TARGET, source_limit=-far.abs(), return_lse=True
    )
    assert torch.isfinite(lse).all()  # a target row sees itself


def test_one_shot_through_a_role_tensor_equals_span_attention():
    S, n = 9, 5
    q, k, v = chunk(T=S + n, dtype=torch.float64)
    limits = [[2, 4, 4, 9, 9], [0, 1, 2, 3, 4]]
    role = torch.tensor([[SOURCE] * S + [TARGET] * n] * B, dtype=torch.int8)
    limit = torch.tensor([[0] * S + row for row in limits], dtype=torch.int32)
    cache = cache_of(torch.float64, rows=0)
    o = incremental_prefill(q, k, v, None, None, cache, 0, role=role, source_limit=limit)
    want = span_attention(q, k, v, from_limits(limits, [S, S]))
    assert (o - want).abs().max() < 1e-12


def test_a_full_fixed_cache_refuses_and_a_larger_one_grows():
    cache, growing = cache_of(capacity=(6, 9), fixed=True), cache_of(capacity=(6, 9))
    before = contents(cache)
    with pytest.raises(ValueError, match="layer 0.s source segment"):
        incremental_prefill(*chunk(), COS, SIN, cache, 0, **PLAIN)
    assert same_bits(contents(cache), before)
    a = incremental_prefill(*chunk(), COS, SIN, growing, 0, **PLAIN)
    assert torch.equal(a, incremental_prefill(*chunk(), COS, SIN, cache_of(), 0, **PLAIN))
    assert growing.capacity(0, SOURCE) == 12
    fits = ROLE.masked_fill(ROLE == SOURCE, PADDING)  # roles on the CPU are counted, not bounded by T
    incremental_prefill(*chunk(), COS, SIN, cache, 0, role=fits)


def test_explain_changes_nothing():
    cache = cache_of()
    before = contents(cache)
    explanation = explain(incremental_prefill, *chunk(), COS, SIN, cache, 0, **PLAIN)
    assert explanation.backend == "reference" and same_bits(contents(cache), before)


Q, K, V = chunk()
SMALL = torch.zeros(B, T - 1, dtype=torch.int32)
BAD = {
    "cache": (dict(cache=None), TypeError, "cache: expected a StreamCache"),
    "layer": (dict(layer=3), ValueError, "layer: expected an int >= 0 and <= 0"),
    "q_type": (dict(q=None), TypeError, "q: expected a tensor"),
    "q_dtype": (dict(q=Q.half()), TypeError, "q: expected float32"),
    "q_rows": (dict(q=Q[:, :, 1:]), ValueError, "q: expected shape"),
    "q_heads": (dict(q=torch.randn(B, 3, T, D)), ValueError, "multiple of the 2 key/value heads"),
    "q_stride": (dict(q=torch.randn(B, H, D, T).mT), ValueError, "q: expected last stride 1"),
    "q_device": (dict(q=Q.to("meta")), ValueError, "q: expected a tensor on cpu"),
    "k_dtype": (dict(k=K.bfloat16(), v=V.bfloat16()), TypeError, "k: expected float32"),
    "v_heads": (dict(v=V[:, :1]), ValueError, "v: expected shape"),
    "cos_wide": (dict(cos=torch.zeros(1, T, D), sin=torch.zeros(1, T, D)), ValueError, "an even rotary_dim in"),
    "cos_alone": (dict(sin=None), TypeError, "sin: expected a tensor"),
    "cos_device": (dict(cos=COS.to("meta")), ValueError, "cos: expected a tensor on cpu"),
    "role_dtype": (dict(role=ROLE.bool()), TypeError, "role: expected int8 with values 0"),
    "role_values": (dict(role=ROLE + 1), ValueError, "role: expected values 0"),
    "role_int": (dict(role=2), ValueError, "role: expected 0"),
    "limit_dtype": (dict(source_limit=LIMIT.long()), TypeError, "source_limit: expected int32"),
    "limit_shape": (dict(source_limit=SMALL), ValueError, "source_limit: expected shape"),
    "limit_int": (dict(source_limit=3), TypeError, "source_limit: expected a tensor"),
    "source_begin": (dict(source_begin=SMALL), ValueError, "source_begin: expected shape"),
    "target_begin": (dict(target_begin=LIMIT.float()), TypeError, "target_begin: expected int32"),
    "sinks": (dict(sinks=-1), ValueError, "sinks: expected an int >= 0"),
    "sinks_pair": (dict(sinks=(1, 2, 3)), ValueError, "sinks: expected an int or"),
    "sinks_type": (dict(sinks=1.0), TypeError, "sinks: expected an int"),
    "sink_logits": (dict(sink_logits=torch.zeros(HK)), ValueError, "sink_logits: expected shape"),
    "sink_logits_dtype": (dict(sink_logits=torch.zeros(H).half()), TypeError, "sink_logits: expected float32"),
    "scale": (dict(scale="1"), TypeError, "scale: expected a number"),
    "scale_nan": (dict(scale=NAN), ValueError, "scale: expected a finite number"),
    "softcap": (dict(softcap=0.0), ValueError, "softcap: expected a number > 0"),
    "backend": (dict(backend="fast"), ValueError, "backend: expected one of"),
    "cuda": (dict(backend="cuda"), NotImplementedError, "backend='cuda' cannot run"),
    "triton": (dict(backend="triton"), NotImplementedError, "backend='triton' cannot run"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_refusal_changes_nothing(case):
    changes, error, text = BAD[case]
    cache = cache_of()
    call = {"q": Q, "k": K, "v": V, "cos": COS, "sin": SIN, "cache": cache, "layer": 0, **PLAIN, **changes}
    before, epoch = contents(cache), cache.epoch
    with pytest.raises(error, match=text):
        incremental_prefill(**call)
    assert same_bits(contents(cache), before) and cache.epoch == epoch and not cache.status.any()
    with pytest.raises(RuntimeError, match="must have staged"):
        cache.commit()


@pytest.mark.parametrize("case", BAD)
def test_what_differs_from_a_call_that_went_through_is_checked(case):
    changes, error, text = BAD[case]
    cache = cache_of()
    call = {"q": Q, "k": K, "v": V, "cos": COS, "sin": SIN, "cache": cache, "layer": 0, "role": SOURCE}
    incremental_prefill(**call)
    cache.discard()
    with pytest.raises(error, match=text):
        incremental_prefill(**call | changes)
    with pytest.raises(RuntimeError, match="must have staged"):
        cache.commit()


def test_calls_that_look_alike_are_checked_once(monkeypatch):
    from streamkernels.ops.incremental_prefill import api

    cache = cache_of()
    call = {"q": Q, "k": K, "v": V, "cos": COS, "sin": SIN, "cache": cache, "layer": 0, "role": SOURCE}
    first, lse = incremental_prefill(**call, return_lse=True)
    monkeypatch.setattr(api, "check_chunk", None)
    again, lse_again = incremental_prefill(**call, return_lse=True)
    assert torch.equal(first, again) and torch.equal(lse, lse_again)
    for changed in ({"scale": 1.0}, {"role": TARGET}, {"q": Q.clone().requires_grad_()}, {"backend": "reference"}):
        with pytest.raises(TypeError, match="not callable"):
            incremental_prefill(**call | changed)
    with pytest.raises(TypeError, match="not callable"):
        explain(incremental_prefill, **call)
    cache.commit()
    incremental_prefill(**call)
    # a session fewer: checked again
    cache.discard()
    cache.select(torch.tensor([0]))
    with pytest.raises(TypeError, match="not callable"):
        incremental_prefill(**call)


def test_rows_of_a_known_call_are_this_call_s(monkeypatch):
    """Roles, limits and begins of another call that looks alike are not used again, and others are checked."""
    from streamkernels.ops.incremental_prefill import api

    begins = {"source_begin": torch.zeros_like(LIMIT), "target_begin": torch.zeros_like(LIMIT)}
    first = PLAIN | begins
    other = {"role": ROLE.flip(0), "source_limit": LIMIT.clamp(max=3)} | {k: x + 1 for k, x in begins.items()}
    plain = incremental_prefill(*chunk(), COS, SIN, cache_of(), 0, **first)
    for changed in (*({name: x} for name, x in other.items()), other):
        monkeypatch.setattr(api, "_known", Known())
        checked = incremental_prefill(*chunk(), COS, SIN, cache_of(), 0, **first | changed)
        monkeypatch.setattr(api, "_known", Known())
        incremental_prefill(*chunk(), COS, SIN, cache_of(), 0, **first)
        with monkeypatch.context() as patch:
            patch.setattr(api, "check_chunk", None)
            known = incremental_prefill(*chunk(), COS, SIN, cache_of(), 0, **first | changed)
            for wrong in ({"source_limit": LIMIT[:1]}, {"target_begin": LIMIT.long()}, {"role": ROLE.int()}):
                with pytest.raises(TypeError, match="not callable"):
                    incremental_prefill(*chunk(), COS, SIN, cache_of(), 0, **first | wrong)
        assert torch.equal(known, checked) and not torch.equal(known, plain)


def test_bounded_caches_refuse_long_chunks_and_more_sinks_than_they_keep():
    cache = cache_of(capacity=1, window=3, sinks=1, max_chunk=T - 1)
    with pytest.raises(ValueError, match="at most max_chunk = 6 rows"):
        incremental_prefill(*chunk(), COS, SIN, cache, 0, **PLAIN)
    with pytest.raises(ValueError, match="sinks: expected an int >= 0 and <= 1"):
        incremental_prefill(*chunk(), COS, SIN, cache, 0, **PLAIN, sinks=2)
    half = cache_of(capacity=(1, 30), window=(3, None), max_chunk=T)
    incremental_prefill(*chunk(), COS, SIN, half, 0, **PLAIN, sinks=(0, 2))
