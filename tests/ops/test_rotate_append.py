"""`rotate_append`: which slot each row reaches, what stays untouched, registration, errors that change nothing."""

from __future__ import annotations

import pytest
import torch

from streamkernels.backends.select import explain
from streamkernels.core.cache import PADDING, SOURCE, TARGET, StreamCache
from streamkernels.core.positions import Rotary, apply_rotary
from streamkernels.ops.rotate_append import rotate_append

B, HK, D = 2, 2, 16
NAN = float("nan")
raw = torch.ops.streamkernels.rotate_append.default


def make(T: int = 7, dtype=torch.float32, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(B, HK, T, D, generator=g).to(dtype) for _ in range(2))


def cache_of(capacity=(16, 13), dtype=torch.float32, **options) -> StreamCache:
    cache = StreamCache(
        layers=1, batch=B, kv_heads=HK, head_dim=D, dtype=dtype, device="cpu", capacity=capacity, **options
    )
    for role in (SOURCE, TARGET):
        for x in cache.segment(0, role):
            x.fill_(NAN)
    return cache


def raw_arguments(
    T=7,
    length=((3, 5), (0, 11)),
    role=None,
    segment=TARGET,
    sinks=0,
    bounded=False,
    capacity=(16, 13),
    dtype=torch.float32,
):
    k, v = make(T, dtype)
    cos, sin = Rotary.from_theta(D, rotary_dim=8).cos_sin(torch.arange(T)[None])
    segments = [torch.full((B, HK, c, D), NAN, dtype=dtype) for c in (capacity[0],) * 2 + (capacity[1],) * 2]
    status = torch.zeros(1, dtype=torch.int32)
    return [
        k,
        v,
        cos,
        sin,
        *segments,
        torch.tensor(length, dtype=torch.int32),
        status,
        role,
        segment,
        None,
        sinks,
        bounded,
        False,
        "reference",
    ]


def expected(call: list) -> tuple[list[torch.Tensor], int]:
    """By Python loops: one row at a time."""
    k, v, cos, sin, *segments = (x.clone() for x in call[:8])
    length, status, role, segment, _, sinks, bounded, interleaved, _ = call[8:]
    k = apply_rotary(k, cos, sin, interleaved)
    word = 0
    for b in range(B):
        count = length[b].tolist()
        for t in range(k.shape[2]):
            r = segment if role is None else int(role[b, t])
            if r not in (SOURCE, TARGET):
                continue
            index, capacity = count[r], segments[2 * r].shape[2]
            count[r] += 1
            if bounded and index >= capacity:
                index = sinks + (index - sinks) % (capacity - sinks)
            if not 0 <= index < capacity:
                word |= 1 << r
                continue
            segments[2 * r][b, :, index], segments[2 * r + 1][b, :, index] = k[b, :, t], v[b, :, t]
    return segments, word


def same(call: list) -> None:
    want, word = expected(call)
    raw(*call)
    assert int(call[9]) == word
    for x, y in zip(call[4:8], want, strict=True):
        assert torch.equal(x.view(torch.int32), y.view(torch.int32))  # bits: NaN included


ROLES = [
    torch.tensor([[0, 1, 1, 0, -1, 1, 0], [1, 1, 1, 1, 0, 0, 0]], dtype=torch.int8),
    torch.full((B, 7), PADDING, dtype=torch.int8),
    torch.tensor([[-1, -1, -1, -1, -1, -1, 1], [0, 7, -3, 0, 0, -1, -1]], dtype=torch.int8),
    torch.zeros(7, B, dtype=torch.int8).T,
]


@pytest.mark.parametrize(
    "length", [((3, 5), (0, 6)), ((9, 6), (0, 13)), ((0, 0), (16, 11)), ((-2, 3), (2**31 - 3, -9))]
)
@pytest.mark.parametrize("role", [None, 0, 1, 2, 3])
def test_every_row_reaches_its_slot_or_none(role, length):
    for segment in (SOURCE, TARGET):
        same(raw_arguments(length=length, role=None if role is None else ROLES[role], segment=segment))


@pytest.mark.parametrize("role", [None, 0])
@pytest.mark.parametrize("length", [((15, 300), (14, 11)), ((2, 12), (99, 13))])
def test_a_ring_wraps_behind_its_sinks(role, length):
    same(raw_arguments(length=length, role=None if role is None else ROLES[role], sinks=4, bounded=True))


@pytest.mark.parametrize("T", [0, 1, 17, 63])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_public_call_writes_behind_the_committed_rows(T, dtype):
    cache = cache_of(dtype=dtype)
    k, v = make(T, dtype)
    rotary = Rotary.from_theta(D, rotary_dim=8, interleaved=True)
    cos, sin = rotary.cos_sin(torch.arange(T)[None])
    for n, role in enumerate((SOURCE, TARGET, SOURCE)):
        assert rotate_append(k, v, cos, sin, cache, 0, role=role, interleaved=True) is None
        assert cache.length(0)[:, role].tolist() == [T * (n == 2)] * B
        cache.commit()
    rotated = apply_rotary(k, cos, sin, True)
    for role, times in ((SOURCE, 2), (TARGET, 1)):
        held_k, held_v = cache.segment(0, role)
        for i in range(times):
            assert torch.equal(held_k[:, :, i * T : (i + 1) * T], rotated)
            assert torch.equal(held_v[:, :, i * T : (i + 1) * T], v)
    assert torch.equal(cache.length(0), torch.tensor([[2 * T, T]] * B, dtype=torch.int32))


def test_a_call_can_be_repeated_or_forgotten():
    cache = cache_of()
    (k, v), (other, _) = make(), make(seed=1)
    rotate_append(other, v, None, None, cache, 0, role=SOURCE)
    rotate_append(k, v, None, None, cache, 0, role=TARGET)
    cache.commit()
    assert cache.length(0).tolist() == [[0, 7]] * B
    rotate_append(other, v, None, None, cache, 0, role=TARGET)
    cache.discard()
    assert torch.equal(cache.segment(0, TARGET)[0][:, :, :7], k)


def test_no_gradient_reaches_the_cache():
    cache, (k, v) = cache_of(), make()
    rotate_append(
        k.requires_grad_(), v.requires_grad_(), None, None, cache, 0, role=torch.zeros(B, 7, dtype=torch.int8)
    )
    assert not any(x.requires_grad for role in (SOURCE, TARGET) for x in cache.segment(0, role))


def test_inference_mode():
    with torch.inference_mode():
        cache, (k, v) = cache_of(), make()
        rotate_append(k, v, None, None, cache, 0, role=SOURCE)
        cache.commit()
    rotate_append(k, v, None, None, cache, 0, role=SOURCE)
    cache.commit()
    assert torch.equal(cache.segment(0, SOURCE)[0][:, :, 7:14], k)


def test_opcheck():
    for call in (
        raw_arguments(),
        raw_arguments(role=ROLES[0]),
        raw_arguments(sinks=4, bounded=True, length=((15, 300), (14, 11))),
    ):
        call[4:8] = [torch.zeros_like(x) for x in call[4:8]]
        torch.library.opcheck(raw, call)


def test_compiled_once_for_all_lengths():
    compiles = []

    def backend(graph, inputs):
        compiles.append(graph)
        return graph

    @torch.compile(fullgraph=True, backend=backend)
    def step(*call):
        torch.ops.streamkernels.rotate_append(*call)
        return call[8] + 1

    for length in (((0, 0), (0, 0)), ((3, 5), (0, 6)), ((9, 6), (0, 13))):
        ours = raw_arguments(length=length, role=ROLES[0])
        want, word = expected(ours)
        step(*ours)
        assert int(ours[9]) == word
        for x, y in zip(ours[4:8], want, strict=True):
            assert torch.equal(x.view(torch.int32), y.view(torch.int32))
    assert len(compiles) == 1


def test_public_call_compiles():
    step = torch.compile(rotate_append, fullgraph=True, backend="aot_eager")
    cache, (k, v) = cache_of(), make()
    for _ in range(2):
        step(k, v, None, None, cache, 0, role=SOURCE)
        cache.commit()
    assert torch.equal(cache.segment(0, SOURCE)[0][:, :, :14], torch.cat([k, k], 2))


@pytest.mark.parametrize("role", [TARGET, ROLES[0]], ids=["whole", "mixed"])
def test_beside_a_ring_a_segment_without_a_window_never_wraps(role):
    """Where nothing can be checked, its overflow is dropped and reported."""
    cache, (k, v) = cache_of(capacity=(8, 9), window=(2, None), sinks=1, max_chunk=7), make()
    step = torch.compile(rotate_append, fullgraph=True, backend="eager")
    for _ in range(3):
        step(k, v, None, None, cache, 0, role=role)
        if cache.status.any():
            break
        cache.commit()
    assert int(cache.status) == 1 << TARGET and cache.length(0)[:, TARGET].max() + 7 > 9
    with pytest.raises(RuntimeError, match="the target segment was full"):
        cache.commit()
    if role is TARGET:
        assert torch.equal(cache.segment(0, TARGET)[0], torch.cat([k, k], 2)[:, :, :9])


def test_explain_changes_nothing():
    cache, (k, v) = cache_of(capacity=1), make()
    explanation = explain(rotate_append, k, v, None, None, cache, 0, role=SOURCE)
    assert explanation.backend == "reference" and cache.capacity(0, SOURCE) == 1
    with pytest.raises(RuntimeError, match="must have staged"):
        cache.commit()


K, V = make()
COS, SIN = Rotary.from_theta(D).cos_sin(torch.arange(7)[None])
BAD = {
    "cache": (dict(cache={}), TypeError, "cache: expected a StreamCache"),
    "layer_type": (dict(layer="0"), TypeError, "layer: expected an int"),
    "layer_range": (dict(layer=1), ValueError, "layer: expected an int >= 0 and <= 0"),
    "layer_negative": (dict(layer=-1), ValueError, "layer: expected an int >= 0"),
    "k_dtype": (dict(k=K.double()), TypeError, "k: expected float32"),
    "k_heads": (dict(k=K[:, :1]), ValueError, "k: expected shape"),
    "k_batch": (dict(k=K[:1], v=V[:1]), ValueError, "k: expected shape"),
    "k_head_dim": (dict(k=K[..., :8], v=V[..., :8]), ValueError, "k: expected shape"),
    "k_stride": (dict(k=torch.randn(B, HK, D, 7).mT), ValueError, "k: expected last stride 1"),
    "k_device": (dict(k=K.to("meta"), v=V.to("meta")), ValueError, "k: expected a tensor on cpu"),
    "v_rows": (dict(v=V[:, :, :5]), ValueError, "v: expected shape"),
    "v_dtype": (dict(v=V.half()), TypeError, "v: expected float32"),
    "cos_alone": (dict(cos=None), TypeError, "cos: expected a tensor"),
    "sin_alone": (dict(sin=None), TypeError, "sin: expected a tensor"),
    "cos_rows": (dict(cos=COS[:, :3], sin=SIN[:, :3]), ValueError, "cos: expected shape"),
    "cos_odd": (dict(cos=COS[0], sin=SIN[0]), ValueError, "cos: expected shape"),
    "cos_wide": (dict(cos=torch.cat([COS, COS], 2), sin=torch.cat([SIN, SIN], 2)), ValueError, "an even rotary_dim in"),
    "cos_dtype": (dict(cos=COS.half(), sin=SIN.half()), TypeError, "cos: expected float32"),
    "role_padding": (dict(role=PADDING), ValueError, "role: expected 0"),
    "role_bool": (dict(role=True), ValueError, "role: expected 0"),
    "role_none": (dict(role=None), ValueError, "role: expected 0"),
    "role_dtype": (dict(role=ROLES[0].long()), TypeError, "role: expected int8 with values 0"),
    "role_shape": (dict(role=ROLES[0][:, :3]), ValueError, "role: expected shape"),
    "role_values": (dict(role=ROLES[2]), ValueError, "role: expected values 0"),
    "role_device": (dict(role=ROLES[0].to("meta")), ValueError, "role: expected a tensor on cpu"),
    "full": (dict(role=TARGET), ValueError, "layer 0.s target segment"),
    "backend": (dict(backend="fast"), ValueError, "backend: expected one of"),
    "cuda": (dict(backend="cuda"), NotImplementedError, "backend='cuda' cannot run"),
    "triton": (dict(backend="triton"), NotImplementedError, "backend='triton' cannot run"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_refusal_changes_nothing(case):
    changes, error, text = BAD[case]
    cache = cache_of(capacity=(20, 13), fixed=True)
    rotate_append(K, V, COS, SIN, cache, 0, role=TARGET)
    cache.commit()
    call = {"k": K, "v": V, "cos": COS, "sin": SIN, "cache": cache, "layer": 0, "role": SOURCE, **changes}
    before = [x.clone() for role in (SOURCE, TARGET) for x in cache.segment(0, role)] + [
        cache.length().clone(),
        cache.status.clone(),
    ]
    with pytest.raises(error, match=text):
        rotate_append(**call)
    after = [x for role in (SOURCE, TARGET) for x in cache.segment(0, role)] + [cache.length(), cache.status]
    for x, y in zip(before, after, strict=True):
        assert torch.equal(x.view(torch.int32), y.view(torch.int32))
    with pytest.raises(RuntimeError, match="must have staged"):
        cache.commit()


def test_a_chunk_longer_than_the_ring_was_made_for():
    cache, (k, v) = cache_of(window=4, max_chunk=6), make()
    with pytest.raises(ValueError, match="at most max_chunk = 6 rows"):
        rotate_append(k, v, None, None, cache, 0, role=SOURCE)


def test_block_tables_are_not_there_yet():
    call = raw_arguments()
    call[12] = torch.zeros(B, 1, dtype=torch.int32)
    with pytest.raises(NotImplementedError, match="rotate_append: block_table: expected None"):
        raw(*call)
