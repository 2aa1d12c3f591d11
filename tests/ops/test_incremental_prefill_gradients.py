"""The gradient of `incremental_prefill` in this call's rows, which is that of one forward with a constant history."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from streamkernels.core.cache import PADDING, SOURCE, TARGET, StreamCache
from streamkernels.core.positions import Rotary, apply_rotary
from streamkernels.core.spans import Spans
from streamkernels.ops.incremental_prefill import incremental_prefill
from streamkernels.testing.compare import assert_exact
from streamkernels.testing.dense import dense_attention

NAN = float("nan")
B, H, HK, D, T = 2, 4, 2, 8, 7
HISTORY = (5, 3)
ROLE = torch.tensor([[1, 0, 1, 0, 0, 1, -1], [0, 0, 1, 1, 1, 1, 0]], dtype=torch.int8)
LIMIT = torch.tensor([[6, 0, 8, 0, 0, 3, 9], [0, 0, 5, 6, 8, 2, 0]], dtype=torch.int32)


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def started(capacity: int | tuple[int, int] = 32, **options) -> StreamCache:
    """A cache that holds HISTORY rows per session, NaN behind them."""
    cache = StreamCache(
        layers=1, batch=B, kv_heads=HK, head_dim=D, dtype=torch.float64, device="cpu", capacity=capacity, **options
    )
    with torch.no_grad():
        for role, n in enumerate(HISTORY):
            for buffer in cache.segment(0, role):
                buffer.fill_(NAN)
            chunk = [draw(B, heads, n, D, seed=50 + role) for heads in (H, HK, HK)]
            incremental_prefill(*chunk, None, None, cache, 0, role=role)
            cache.commit()
    return cache


def leaves(T: int = T, seed: int = 0) -> list[Tensor]:
    return [draw(B, heads, T, D, seed=seed + i).requires_grad_() for i, heads in enumerate((H, HK, HK))]


def declared(begins: tuple[int, int] = (0, 0)) -> Spans:
    """What the rows of ROLE see of [source history | target history | chunk], by brute force."""
    n = sum(HISTORY) + T
    visible = torch.zeros(B, T, n, dtype=torch.bool)
    for b in range(B):
        count = list(HISTORY)
        keys = [(0, i) for i in range(HISTORY[0])] + [(1, i) for i in range(HISTORY[1])]
        for t in range(T):
            r = int(ROLE[b, t])
            keys.append((r, count[r] if r != PADDING else -1))
            if r != PADDING:
                count[r] += 1
        for t in range(T):
            r, own = keys[sum(HISTORY) + t]
            ends = {SOURCE: (own + 1, 0), TARGET: (int(LIMIT[b, t]), own + 1), PADDING: (0, 0)}[r]
            for j, (segment, i) in enumerate(keys):
                visible[b, t, j] = segment != PADDING and begins[segment] <= i < ends[segment]
    bounds = torch.zeros(B, T, 8, 2, dtype=torch.int32)
    for b in range(B):
        for t in range(T):
            edges = torch.diff(visible[b, t].int(), prepend=torch.zeros(1), append=torch.zeros(1))
            begin, end = (edges == 1).nonzero().flatten(), (edges == -1).nonzero().flatten()
            bounds[b, t, : len(begin), 0], bounds[b, t, : len(end), 1] = begin.int(), end.int()
    return Spans(bounds)


def whole(cache: StreamCache, chunk: list[Tensor]) -> list[Tensor]:
    """q, k, v of the chunk with the history, detached, before the keys and values."""
    q, *rest = chunk
    parts = []
    for i, x in enumerate(rest):
        held = [cache.segment(0, role)[i][:, :, :n].detach().clone() for role, n in enumerate(HISTORY)]
        parts.append(torch.cat([*held, x], 2))
    return [q, *parts]


OPTIONS = [
    {},
    {"softcap": 1.3, "scale": 0.8},
    {"sinks": True},
    {"rotary": Rotary.from_theta(D)},
    {"rotary": Rotary.from_theta(D, rotary_dim=4, interleaved=True), "softcap": 2.0, "sinks": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "softcap", "sink_logits", "rotary", "all"])
def test_equals_one_forward_with_a_constant_history(options):
    options = dict(options)
    cache, chunk = started(), leaves()
    rotary, has_sinks = options.pop("rotary", None), options.pop("sinks", False)
    if has_sinks:
        options["sink_logits"] = torch.linspace(-1, 1, H, dtype=torch.float64).requires_grad_()
    inputs = chunk + ([options["sink_logits"]] if has_sinks else [])
    cos = sin = None
    rotated = list(chunk)
    interleaved = rotary is not None and rotary.interleaved
    if rotary is not None:
        cos, sin = rotary.cos_sin(torch.arange(T)[None], dtype=torch.float64)
        rotated[:2] = [apply_rotary(x, cos, sin, interleaved) for x in chunk[:2]]
    do, dlse = draw(B, H, T, D, seed=7), draw(B, H, T, seed=8)

    o, lse = incremental_prefill(
        *chunk, cos, sin, cache, 0, role=ROLE, source_limit=LIMIT, interleaved=interleaved, return_lse=True, **options
    )
    padding = (ROLE == PADDING)[:, None]
    assert (o[padding.expand(B, H, T)] == 0).all()
    ours = torch.autograd.grad([o, lse], inputs, [do, dlse.masked_fill(padding, 0)])

    want_o, want_lse = dense_attention(*whole(cache, rotated), declared(), **{"scale": D**-0.5, **options})
    want = torch.autograd.grad([want_o, want_lse], inputs, [do, dlse.masked_fill(padding, 0)])
    assert_exact("o", o.detach(), want_o.detach())
    assert_exact("lse", lse.detach(), want_lse.detach())
    for name, x, y in zip(("dq", "dk", "dv", "dsink_logits"), ours, want, strict=False):
        assert_exact(name, x, y)
    assert ours[1].abs().sum((1, 3)).gt(0).equal(ROLE != PADDING)


def test_gradcheck():
    cache, chunk = started(), [x.detach()[:, :, :4].requires_grad_() for x in leaves()]
    cos, sin = Rotary.from_theta(D, rotary_dim=4).cos_sin(torch.arange(4)[None], dtype=torch.float64)
    sink_logits = torch.linspace(-1, 1, H, dtype=torch.float64).requires_grad_()
    role, limit = ROLE[:, :4], LIMIT[:, :4]
    begin = torch.tensor([[3, 0, 2, 1], [2, 4, 0, 3]], dtype=torch.int32)

    def call(q, k, v, sink_logits):
        cache.discard()
        return incremental_prefill(
            q, k, v, cos, sin, cache, 0, role=role, source_limit=limit, source_begin=begin, target_begin=begin // 2,
            sinks=(2, 1), sink_logits=sink_logits, softcap=3.0, return_lse=True,
        )  # fmt: skip

    assert torch.autograd.gradcheck(call, (*chunk, sink_logits), fast_mode=True)


def test_begins_hide_chunk_rows_in_the_backward_too():
    cache, chunk = started(), leaves()
    begin = [torch.full((B, T), n, dtype=torch.int32) for n in (6, 4)]
    o = incremental_prefill(
        *chunk, None, None, cache, 0, role=ROLE, source_limit=LIMIT, source_begin=begin[0], target_begin=begin[1]
    )
    do = draw(B, H, T, D, seed=7)
    want, _ = dense_attention(*whole(cache, chunk), declared((6, 4)), scale=D**-0.5)
    assert_exact("o", o.detach(), want.detach())
    for name, x, y in zip("qkv", torch.autograd.grad(o, chunk, do), torch.autograd.grad(want, chunk, do), strict=True):
        assert_exact(f"d{name}", x, y)


def test_padding_may_hold_anything():
    cache, chunk = started(), leaves()
    real = (ROLE != PADDING)[:, None, :, None]
    clean = [torch.autograd.grad(incremental_prefill(*chunk, None, None, cache, 0, role=ROLE).sum(), chunk)]
    cache.discard()
    dirty = [x.detach().masked_fill(~real, NAN).requires_grad_() for x in chunk]
    clean.append(torch.autograd.grad(incremental_prefill(*dirty, None, None, cache, 0, role=ROLE).sum(), dirty))
    for x, y in zip(*clean, strict=True):
        assert torch.equal(x, y)


def test_later_calls_growth_and_discards_may_come_before_the_backward():
    def gradients(later: bool) -> tuple[Tensor, ...]:
        cache, chunk = started(capacity=(12, 7)), leaves()
        o = incremental_prefill(*chunk, None, None, cache, 0, role=ROLE, source_limit=LIMIT)
        if later:
            cache.discard()  # overwritten, but their gradient stays that of the forward
            with torch.no_grad():
                other = leaves(9, seed=20)
                for role in (SOURCE, TARGET, SOURCE):
                    incremental_prefill(*other, None, None, cache, 0, role=role)
                    cache.commit()
            assert cache.capacity(0, SOURCE) > 12 and cache.capacity(0, TARGET) > 7
        return torch.autograd.grad(o, chunk, draw(B, H, T, D, seed=7))

    for x, y in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(x, y)


def test_a_whole_session_is_differentiable_call_by_call():
    cache, first, second = started(), leaves(), leaves(seed=30)
    a = incremental_prefill(*first, None, None, cache, 0, role=ROLE)
    cache.commit()
    b = incremental_prefill(*second, None, None, cache, 0, role=TARGET)
    cache.commit()
    grads = torch.autograd.grad((a.sum() + b.sum()), first + second)
    assert all(torch.isfinite(g).all() and g.abs().sum() > 0 for g in grads)
    # the first call's keys are a constant for the second
    assert_exact("dk", grads[1], torch.autograd.grad(again(first).sum(), first)[1])


def again(chunk: list[Tensor]) -> Tensor:
    return incremental_prefill(*chunk, None, None, started(), 0, role=ROLE)


CHANGES = {
    "pop": lambda cache: cache.pop(1),
    "evict": lambda cache: cache.evict(0, 1, SOURCE),
    "keep": lambda cache: cache.keep([0, 2], role=SOURCE),
    "reset": lambda cache: cache.reset(),
    "reset_row": lambda cache: cache.reset(1),
    "rollback": lambda cache: cache.rollback(cache.mark()),
    "reanchor": lambda cache: cache.reanchor(3, SOURCE),
    "select": lambda cache: cache.select([1, 0]),
    "reorder": lambda cache: cache.reorder([1, 1]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_rearranged_cache_refuses_the_backward(change):
    cache, chunk = started(rotary=Rotary.from_theta(D)), leaves()
    o = incremental_prefill(*chunk, None, None, cache, 0, role=ROLE)
    cache.commit()
    CHANGES[change](cache)
    with pytest.raises(RuntimeError, match="incremental_prefill: cache: expected the keys that the forward saw"):
        o.sum().backward()
    assert all(x.grad is None for x in chunk)


def test_only_lse_or_only_one_input():
    cache, chunk = started(), leaves()
    _, lse = incremental_prefill(*chunk, None, None, cache, 0, role=TARGET, return_lse=True)
    dq, dk, dv = torch.autograd.grad(lse.sum(), chunk)
    assert dq.abs().sum() > 0 and dk.abs().sum() > 0 and (dv == 0).all()
    cache.discard()
    q, k, v = (x.detach() for x in chunk)
    sink_logits = torch.zeros(H, dtype=torch.float64, requires_grad=True)
    o = incremental_prefill(q, k, v, None, None, cache, 0, role=TARGET, sink_logits=sink_logits)
    o.sum().backward()
    assert sink_logits.grad is not None and sink_logits.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes_and_strides_of_the_gradients(dtype):
    cache = StreamCache(layers=1, batch=B, kv_heads=HK, head_dim=D, dtype=dtype, device="cpu")
    wide = torch.randn(B, T, H + 2 * HK, D, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    q, k, v = wide.transpose(1, 2).split([H, HK, HK], 1)
    sink_logits = torch.zeros(H, requires_grad=True)
    o, lse = incremental_prefill(
        q, k, v, None, None, cache, 0, role=ROLE, source_limit=LIMIT, sink_logits=sink_logits, return_lse=True
    )
    assert o.dtype == dtype and lse.dtype == torch.float32 and o.transpose(1, 2).is_contiguous()
    o.float().square().sum().backward()
    assert wide.grad is not None and wide.grad.dtype == dtype and wide.grad.isfinite().all()
    assert sink_logits.grad is not None and sink_logits.grad.dtype == torch.float32


def test_refusals():
    chunk = leaves()
    bounded = StreamCache(
        layers=1, batch=B, kv_heads=HK, head_dim=D, dtype=torch.float64, device="cpu", window=4, max_chunk=T
    )
    with pytest.raises(NotImplementedError, match="incremental_prefill: cache: expected a call without gradients"):
        incremental_prefill(*chunk, None, None, bounded, 0, role=TARGET)
    with torch.no_grad():
        incremental_prefill(*chunk, None, None, bounded, 0, role=TARGET)
    cache = started()
    o = incremental_prefill(*chunk, None, None, cache, 0, role=TARGET)
    (dq,) = torch.autograd.grad(o.square().sum(), chunk[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dq.sum().backward()
    with pytest.raises(NotImplementedError, match="incremental_prefill: cos: expected a constant"):
        angles = torch.zeros(1, T, D // 2, dtype=torch.float64, requires_grad=True)
        incremental_prefill(*chunk, angles, angles, cache, 0, role=TARGET)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_cannot_repeat_a_call(reentrant):
    cache, chunk = started(), leaves()

    def call(q, k, v):
        return incremental_prefill(q, k, v, None, None, cache, 0, role=TARGET)

    o = torch.utils.checkpoint.checkpoint(call, *chunk, use_reentrant=reentrant)
    cache.commit()
    before = cache.length().clone()
    with pytest.raises(RuntimeError, match="incremental_prefill: cache: expected a call outside of a backward"):
        o.sum().backward()
    cache.discard()
    assert torch.equal(cache.length(), before)
