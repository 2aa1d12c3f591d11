"""`incremental_prefill` under torch.library: opcheck, torch.compile with growing lengths, no synchronisation."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import Tensor

import streamkernels.reference.incremental_prefill as reference
from streamkernels.core.cache import SOURCE, TARGET, StreamCache
from streamkernels.core.positions import Rotary
from streamkernels.ops.incremental_prefill import incremental_prefill
from streamkernels.testing.compare import assert_exact

B, H, HK, D, T = 2, 4, 2, 16, 5
ROLE = torch.tensor([[0, 1, 1, -1, 0], [1, 1, 0, 0, 1]], dtype=torch.int8)
raw = torch.ops.streamkernels.incremental_prefill.default
raw_backward = torch.ops.streamkernels.incremental_prefill_backward.default

FEATURES = {
    "plain": {},
    "roles": {"role": ROLE},
    "limits": {"role": ROLE, "source_limit": 3, "source_begin": 1, "target_begin": 1},
    "rotary": {"rotary": D},
    "partial_interleaved": {"rotary": 8, "interleaved": True, "role": ROLE},
    "sinks": {"source_sinks": 2, "target_sinks": 1, "target_begin": 3},
    "ring": {"bounded": True, "ring_sinks": 2, "source_window": 3, "target_window": 4, "role": ROLE},
    "extras": {"softcap": 2.0, "scale": 0.3, "sink_logits": True},
}


def arguments(dtype=torch.float32, segment=TARGET, role=None, rotary=0, length=((3, 2), (0, 4)), **features) -> list:
    """The raw arguments; limits and begins are given as one int for all rows."""
    g = torch.Generator().manual_seed(0)
    draw = lambda heads, n: torch.randn(B, heads, n, D, generator=g).to(dtype)  # noqa: E731
    q, k, v = (draw(heads, T).transpose(1, 2).contiguous().transpose(1, 2) for heads in (H, HK, HK))
    cos = sin = None
    if rotary:
        cos, sin = Rotary.from_theta(rotary).cos_sin(torch.arange(T)[None])
    rows = [features.get(name) for name in ("source_limit", "source_begin", "target_begin")]
    rows = [None if n is None else torch.full((B, T), n, dtype=torch.int32) for n in rows]
    lengths, status = torch.tensor(length, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    sinks = [features.get(name, 0) for name in ("source_sinks", "target_sinks", "ring_sinks")]
    windows = [features.get(name, 0) for name in ("source_window", "target_window")]
    sink_logits = torch.linspace(-1, 1, H) if features.get("sink_logits") else None
    return [
        q, k, v, cos, sin, *[draw(HK, 14) for _ in range(4)], lengths, status, role, segment, *rows, None,
        *sinks, features.get("bounded", False), *windows, features.get("scale", 0.25), features.get("softcap", 0.0),
        sink_logits, features.get("interleaved", False), "reference",
    ]  # fmt: skip


def backward_arguments(forward: list) -> list:
    q, k, v, cos, sin, *segments, length, _status = forward[:11]
    o, lse = raw(*[x.clone() if isinstance(x, Tensor) else x for x in forward])
    rows, sinks, tail = forward[11:17], forward[17:19], forward[23:]
    do = torch.ones_like(o)
    return [do, torch.ones_like(lse), q, k, v, o, lse, cos, sin, *segments, length, *rows, *sinks, *tail]


@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES.keys())
def test_opcheck(features):
    forward = arguments(**features)
    # the last of the four checks compiles: on those with the most features
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    checks += ("test_aot_dispatch_dynamic",) * (len(features) > 2)
    torch.library.opcheck(raw, forward, test_utils=checks)
    if not features.get("bounded"):
        torch.library.opcheck(raw_backward, backward_arguments(forward), test_utils=checks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_outputs_are_fresh_and_laid_out_for_the_model(dtype):
    o, lse = raw(*arguments(dtype, rotary=D, sink_logits=True))
    assert o.dtype == dtype and o.transpose(1, 2).is_contiguous()
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and lse.is_contiguous()


def test_writes_count_as_changes_for_autograd():
    forward = arguments()
    versions = [x._version for x in forward[5:9]]
    raw(*forward)
    assert all(x._version > before for x, before in zip(forward[5:9], versions, strict=True))
    with torch.inference_mode():
        raw(*arguments())


def test_the_raw_op_records_no_graph():
    forward = arguments()
    forward[0].requires_grad_()
    forward[1].requires_grad_()
    raw(*forward)
    assert not any(x.requires_grad for x in forward[5:9])


def test_a_dropped_row_gets_no_gradient():
    """Where a graph replay overran a segment, rows that were not written were not seen either."""
    forward = arguments(length=((0, 12), (0, 0)), rotary=D)
    _, dk, dv, _ = raw_backward(*backward_arguments(forward))
    for x in (dk, dv):
        assert x[0, :, :2].abs().sum() > 0 and (x[0, :, 2:] == 0).all() and (x[1].abs().sum((0, 2)) > 0).all()


def test_block_tables_are_not_there_yet():
    table = torch.zeros(B, 1, dtype=torch.int32)
    forward = arguments()
    for op, place, call in ((raw, 16, forward), (raw_backward, 19, backward_arguments(forward))):
        call[place] = table
        with pytest.raises(NotImplementedError, match="incremental_prefill: block_table: expected None"):
            op(*call)


def test_compiled_once_for_all_lengths():
    compiles = []

    def backend(graph, inputs):
        compiles.append(graph)
        return graph

    @torch.compile(fullgraph=True, backend=backend)
    def step(*forward):
        o, lse = torch.ops.streamkernels.incremental_prefill(*forward)
        return o * 2, lse

    for length in ([[0, 0], [0, 0]], [[3, 2], [0, 4]], [[7, 9], [9, 9]]):
        ours, plain = arguments(length=length, role=ROLE), arguments(length=length, role=ROLE)
        o, lse = step(*ours)
        want_o, want_lse = raw(*plain)
        assert torch.equal(o, want_o * 2) and torch.equal(lse, want_lse)
        for x, y in zip(ours[5:9], plain[5:9], strict=True):
            assert torch.equal(x, y)
    assert len(compiles) == 1


@pytest.mark.parametrize("options", [{"capacity": 4}, {"window": (6, None), "sinks": 1, "max_chunk": T}])
def test_the_public_call_compiles_once(options):
    """Two layers of a step as one graph; the session commits between steps and reserves room before them."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    weights = torch.randn(2, 3, 8, HK * D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rotary = Rotary.from_theta(D)

    def layers(x: Tensor, ids: Tensor, role: Tensor, limit: Tensor, cache: StreamCache) -> Tensor:
        cos, sin = rotary.cos_sin(ids, dtype=torch.float64)
        for layer in range(2):
            q, k, v = ((x @ w).unflatten(-1, (HK, D)).transpose(1, 2) for w in weights[layer])
            o = incremental_prefill(q, k, v, cos, sin, cache, layer, role=role, source_limit=limit)
            x = x + o.transpose(1, 2).flatten(2) @ weights[layer, 0].mT
        return x

    def run(step):
        cache = StreamCache(layers=2, batch=B, kv_heads=HK, head_dim=D, dtype=torch.float64, device="cpu", **options)
        cache.reserve(64, 64)
        out = []
        for n in range(4):
            x = torch.randn(B, T, 8, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
            limit = torch.full((B, T), n, dtype=torch.int32)
            with torch.no_grad():
                out.append(step(x, torch.arange(T)[None] + n, ROLE.roll(n, 1), limit, cache))
            cache.commit()
        return torch.stack(out), cache.length().clone()

    o, length = run(torch.compile(layers, fullgraph=True, backend=counter))
    want, want_length = run(layers)
    assert_exact("o", o, want)
    assert torch.equal(length, want_length)
    assert counter.frame_count == 1


def test_a_compiled_step_that_overruns_is_reported():
    step = torch.compile(incremental_prefill, fullgraph=True, backend="eager")
    cache = StreamCache(layers=1, batch=B, kv_heads=HK, head_dim=D, dtype=torch.float32, device="cpu", capacity=(2, 9))
    q, k, v = arguments()[:3]
    with torch.no_grad():
        step(q, k, v, None, None, cache, 0, role=SOURCE)
    with pytest.raises(RuntimeError, match="source segment was full"):
        cache.commit()
    cache.discard()
    cache.reserve(source=T)
    with torch.no_grad():
        step(q, k, v, None, None, cache, 0, role=SOURCE)
    cache.commit()
    assert cache.length(0).tolist() == [[T, 0], [T, 0]]


def test_no_gradient_inside_compile():
    step = torch.compile(incremental_prefill, fullgraph=True, backend="eager")
    cache = StreamCache(layers=1, batch=B, kv_heads=HK, head_dim=D, dtype=torch.float32, device="cpu")
    q, k, v = arguments()[:3]
    with pytest.raises(Exception, match="torch.compile, which cannot watch the cache"):
        step(q.requires_grad_(), k, v, None, None, cache, 0, role=SOURCE)


@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES.keys())
def test_the_reference_does_not_synchronise_on_a_gpu(features, monkeypatch):
    """On the meta device, which is not a CPU either, reading any value raises."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    forward = [x.to("meta") if isinstance(x, Tensor) else x for x in arguments(**features)]
    o, lse = reference.incremental_prefill(*forward[:16], *forward[17:-1])
    assert o.device.type == "meta" and lse.shape == (B, H, T)
    with pytest.raises(RuntimeError):
        int(lse.max())


def test_memory_is_bounded(monkeypatch):
    """Long histories are attended in chunks of rows: nothing of the size of rows x keys exists."""
    import streamkernels.reference.attend_rows as attend

    monkeypatch.setattr(attend, "CHUNK_ELEMENTS", {"cpu": 2 * B * H * 14})
    largest = [0]

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for x in torch.utils._pytree.tree_leaves(out):
                if isinstance(x, Tensor) and x.dim() > 3 and x.shape[-1] == 14 and x.shape[-2] != D:
                    largest[0] = max(largest[0], x.numel())
            return out

    forward = arguments(length=((9, 9), (9, 9)))
    with Watch():
        reference.incremental_prefill(*forward[:16], *forward[17:-1])
    assert 0 < largest[0] <= 2 * B * H * 14 < B * H * T * 14
