"""span_attention at its borders: the dispatcher, the compiler, checkpointing, memory, and what it refuses."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
import torch._dynamo.testing
from torch.utils._python_dispatch import TorchDispatchMode

import streamkernels as sk
from streamkernels import Spans, prepare, span_attention, spans
from streamkernels.core.spans import ATTEND, KEPT, MASS, SINK
from streamkernels.reference import attend_rows as rows
from streamkernels.reference import span_attention as reference
from streamkernels.testing.cases import Case
from streamkernels.testing.checkpointing import assert_attention_is_saved
from streamkernels.testing.inputs import Inputs, make_inputs

OP = torch.ops.streamkernels.span_attention.default
BACKWARD = torch.ops.streamkernels.span_attention_backward.default


def raw_arguments(x: Inputs, prepared: bool = False) -> tuple:
    sp = x.spans
    blocks = prepare(sp, x.k.shape[2]) if prepared else (None, None)
    content = tuple(getattr(sp, name) for name in reference.SpanTensors._fields)
    return (x.q, x.k, x.v, *content, x.sink_logits, *blocks, x.scale, x.softcap or 0.0, "reference")


@pytest.mark.parametrize(
    "case",
    [
        Case(2, 4, 2, 17, 17, 8, "causal"),
        Case(1, 1, 1, 1, 1, 8, "causal", layout="bhtd"),
        Case(2, 4, 2, 5, 9, 16, "kept", softcap=3.0, layout="packed_qkv"),
        Case(2, 4, 1, 7, 7, 8, "classes", torch.bfloat16, sink_logits=True),
        Case(1, 2, 2, 63, 65, 8, "sink", torch.float16, sink_logits=True),
    ],
    ids=str,
)
def test_opcheck(case):
    x = make_inputs(case)
    q, k, v, *sinks = x.leaves()
    x = replace(x, q=q, k=k, v=v, sink_logits=sinks[0] if sinks else None)
    torch.library.opcheck(OP, raw_arguments(x, prepared=case.T > 32))
    with torch.no_grad():
        o, lse = OP(*raw_arguments(x))
    arguments = (x.do, x.dlse, *(t.detach() for t in (q, k, v)), o, lse, *raw_arguments(x)[3:])
    arguments = tuple(t.detach() if isinstance(t, torch.Tensor) else t for t in arguments)
    torch.library.opcheck(BACKWARD, arguments)


def test_backward_through_the_backward_is_refused():
    x = make_inputs(Case(1, 2, 2, 5, 5, 8, "causal"))
    q = x.q.requires_grad_()
    (dq,) = torch.autograd.grad(span_attention(q, x.k, x.v, x.spans).sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="span_attention: expected one backward"):
        dq.sum().backward()


@pytest.mark.parametrize("dynamic, as_tensor", [(True, False), (None, True)], ids=["dynamic-Spans", "automatic-bounds"])
def test_compiles_once_for_all_lengths(dynamic, as_tensor):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def layer(q, k, v, sp):
        prepared = prepare(sp, k.shape[2])
        o, lse = span_attention(q * 2, k, v, sp, softcap=30.0, prepared=prepared, return_lse=True)
        return o.transpose(1, 2).flatten(2) * 2, lse

    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend=counter)
    for T in (70, 81, 128, 129, 300):
        x = make_inputs(Case(2, 4, 2, T, T, 16, "causal"))
        results = []
        for fn in (compiled, layer):
            q, k, v = x.leaves()
            o, lse = fn(q, k, v, x.spans.bounds if as_tensor else x.spans)
            results.append((o, lse, *torch.autograd.grad(o.sum() + lse.sum(), (q, k, v))))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert counter.frame_count <= (1 if dynamic else 2)


def test_compiles_with_every_option():
    torch._dynamo.reset()
    for mask in ("sink", "kept", "classes"):
        x = make_inputs(Case(2, 4, 2, 9, 9, 8, mask, sink_logits=True))
        fn = functools.partial(span_attention, scale=0.3, return_lse=True, sink_logits=x.sink_logits)
        compiled = torch.compile(fn, fullgraph=True, dynamic=True, backend="aot_eager")
        for a, b in zip(compiled(x.q, x.k, x.v, x.spans), fn(x.q, x.k, x.v, x.spans), strict=True):
            assert torch.equal(a, b)


def test_selective_checkpointing_saves_the_attention():
    assert_attention_is_saved(make_inputs(Case(2, 4, 2, 17, 17, 8, "wait_k")))


def test_autocast_changes_no_precision_and_mixed_dtypes_are_refused():
    x = make_inputs(Case(2, 4, 2, 17, 17, 8, "wait_k"))
    results = []
    for enabled in (False, True):
        leaves = x.leaves()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            o = span_attention(*leaves, x.spans)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            results.append((o, *torch.autograd.grad(o.sum(), leaves)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    with torch.autocast("cpu", torch.bfloat16):
        v = x.v.transpose(-1, -2) @ torch.eye(17)
        with pytest.raises(TypeError, match=r"span_attention: v: expected float32, got bfloat16\[2, 2, 17, 8\]"):
            span_attention(x.q, x.k, v.transpose(-1, -2).contiguous(), x.spans)


class Largest(TorchDispatchMode):
    """Records the largest tensor that any op returns, and how many ops ran; refuses reads on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.elements, self.ops = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise AssertionError(f"{func} waits for the device")
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                # an expanded view holds no memory of its own
                self.elements = max(self.elements, min(x.numel(), x.untyped_storage().nbytes() // x.element_size()))
        self.ops += func not in VIEWS
        return out


VIEWS = {
    getattr(torch.ops.aten, name).default for name in "view _unsafe_view expand unsqueeze permute detach".split()
} | {
    torch.ops.aten.slice.Tensor,
    torch.ops.aten.select.int,
    torch.ops.aten.transpose.int,
    torch.ops.aten.squeeze.dim,
    torch.ops.aten.unbind.int,
}


def run_reference(x: Inputs) -> Largest:
    tensors = reference.SpanTensors(*(getattr(x.spans, name) for name in reference.SpanTensors._fields))
    with Largest() as seen:
        o, lse = reference.span_attention(x.q, x.k, x.v, tensors, x.sink_logits, scale=x.scale)
        reference.span_attention_backward(x.do, x.dlse, x.q, x.k, x.v, o, lse, tensors, x.sink_logits, scale=x.scale)
    return seen


@pytest.mark.parametrize("mask", ["causal", "kept", "classes", "sink"])
def test_memory_is_bounded(mask, monkeypatch):
    monkeypatch.setitem(rows.CHUNK_ELEMENTS, "cpu", 1 << 14)
    x = make_inputs(Case(1, 2, 1, 500, 500, 8, mask, sink_logits=True))
    assert run_reference(x).elements <= 1 << 14 < 500 * 500


def test_memory_of_a_long_input():
    # a T x S tensor would have 400 million elements; 64 rows of it show the size of every chunk
    T = S = 20_000
    x = make_inputs(Case(1, 1, 1, 64, S, 8, "bottom_right", layout="bhtd"))
    assert run_reference(x).elements <= rows.CHUNK_ELEMENTS["cpu"] < T * S // 90
    steps = list(rows.row_chunks(T, S, torch.device("cpu")))
    assert max(step.stop - step.start for step in steps) * S <= rows.CHUNK_ELEMENTS["cpu"]
    assert [i for step in steps for i in range(step.start, step.stop)] == list(range(T))


def test_the_plain_case_is_one_chunk_of_few_kernels():
    x = make_inputs(Case(2, 4, 2, 17, 17, 8, "wait_k"))
    assert run_reference(x).ops <= 110


def test_prepared_changes_nothing():
    x = make_inputs(Case(2, 4, 2, 70, 130, 8, "random"))
    assert torch.equal(
        span_attention(x.q, x.k, x.v, x.spans),
        span_attention(x.q, x.k, x.v, x.spans, prepared=prepare(x.spans, 130)),
    )


def test_explain():
    x = make_inputs(Case(1, 2, 2, 5, 5, 8, "causal"))
    explanation = sk.explain(span_attention, x.q, x.k, x.v, x.spans)
    assert explanation.op == "span_attention" and explanation.backend == "reference"


def int32(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


BOUNDS = torch.zeros(2, 5, 2, 2, dtype=torch.int32)
REFUSED = [
    ({"q": [1.0]}, TypeError, r"q: expected a tensor \[B, H, T, D\], got \[1.0\]"),
    (
        {"q": torch.zeros(2, 4, 5, 8, dtype=torch.int32)},
        TypeError,
        r"q: expected float16 or .*, got int32\[2, 4, 5, 8\]",
    ),
    ({"q": torch.zeros(2, 4, 5)}, ValueError, r"q: expected shape \[B, H, T, D\], got float32\[2, 4, 5\]"),
    (
        {"q": torch.zeros(2, 3, 5, 8)},
        ValueError,
        "q: expected a number of query heads .* of the 2 .*, got 3 query heads",
    ),
    ({"q": torch.zeros(2, 4, 8, 5).mT}, ValueError, r"q: expected last stride 1 .*, got strides \(160, 40, 1, 5\)"),
    ({"k": torch.zeros(2, 2, 7, 16)}, ValueError, r"k: expected shape .* with B=2, D=8, got float32\[2, 2, 7, 16\]"),
    ({"k": torch.zeros(2, 2, 7, 8).half()}, TypeError, r"k: expected float32, got float16"),
    ({"v": torch.zeros(2, 2, 7, 8).bfloat16()}, TypeError, r"v: expected float32, got bfloat16"),
    ({"v": torch.zeros(2, 2, 6, 8)}, ValueError, r"v: expected shape .* S=7, got float32\[2, 2, 6, 8\]"),
    ({"v": torch.zeros(2, 2, 7, 8, device="meta")}, ValueError, r"v: expected a tensor on cpu, got .* on meta"),
    ({"spans": BOUNDS.long()}, TypeError, r"spans: expected int32, got int64\[2, 5, 2, 2\]"),
    ({"spans": BOUNDS[:, :4]}, ValueError, r"spans: expected shape \[B, T, N, 2\] with B=2, T=5, got"),
    ({"spans": BOUNDS[:, :, [0, 1, 1]]}, ValueError, r"spans: expected 1, 2, 4 or 8 slots .*, got 3 slots"),
    ({"spans": [(0, 1)]}, TypeError, r"spans: expected a tensor \[B, T, N, 2\], got list"),
    ({"spans": spans.causal(4, B=2)}, ValueError, r"spans: expected shape .* T=5, got int32\[2, 4, 1, 2\]"),
    ({"spans": spans.causal(5, B=2), "rules": (ATTEND,)}, ValueError, "rules: expected None beside a Spans"),
    ({"rules": (ATTEND,)}, ValueError, "rules: expected 2 rules, one per slot, got"),
    ({"rules": (ATTEND, 4)}, ValueError, "rules: expected ATTEND, MASS, SINK or KEPT in every slot"),
    ({"rules": (ATTEND, -1)}, ValueError, "rules: expected ATTEND, MASS, SINK or KEPT in every slot"),
    ({"rules": (ATTEND, SINK)}, ValueError, "sink_key: expected a tensor, because a slot has the rule SINK, got None"),
    (
        {"rules": (ATTEND, MASS), "sink_key": int32([0, 0], [0, 0])},
        ValueError,
        "sink_key: expected None, because no slot",
    ),
    (
        {"rules": (SINK, MASS), "sink_key": int32([0], [0])},
        ValueError,
        r"sink_key: expected shape \[B, N\] with B=2, N=2",
    ),
    ({"rules": (KEPT, MASS), "kept": int32([[0], [0]], [[0], [0]])}, ValueError, "kept_count: expected a tensor"),
    ({"kept": int32([[0], [0]], [[0], [0]])}, ValueError, "kept: expected None, because no slot has the rule KEPT"),
    ({"scale": float("nan")}, ValueError, "scale: expected a finite number, got nan"),
    ({"scale": torch.ones(())}, TypeError, "scale: expected a number, got"),
    ({"softcap": 0.0}, ValueError, "softcap: expected a number > 0, got 0.0"),
    ({"sink_logits": torch.zeros(2)}, ValueError, r"sink_logits: expected shape \[H\] with H=4, got float32\[2\]"),
    ({"sink_logits": torch.zeros(4).half()}, TypeError, "sink_logits: expected float32, got float16"),
    ({"prepared": (BOUNDS,)}, TypeError, "prepared: expected the pair of tensors"),
    (
        {"prepared": prepare(BOUNDS, 70)},
        ValueError,
        r"prepared\[1\]: expected shape \[B, SB, 4\] with B=2, SB=1",
    ),
    ({"backend": "fast"}, ValueError, "backend: expected one of auto, cuda, triton, reference, got 'fast'"),
    ({"backend": "cuda"}, NotImplementedError, "backend='cuda' cannot run this call: "),
    ({"D": 12}, ValueError, "q: expected a head dim D that is a multiple of 8, at most 256, got D=12"),
    ({"D": 264}, ValueError, "q: expected a head dim D that is a multiple of 8, at most 256, got D=264"),
]


@pytest.mark.parametrize("change, error, message", REFUSED, ids=[m[2][:40] + str(i) for i, m in enumerate(REFUSED)])
def test_refuses(change, error, message):
    D = change.get("D", 8)
    arguments = {
        "q": torch.zeros(2, 4, 5, D),
        "k": torch.zeros(2, 2, 7, D),
        "v": torch.zeros(2, 2, 7, D),
        "spans": BOUNDS,
    }
    arguments |= {name: x for name, x in change.items() if name != "D"}
    with pytest.raises(error, match="span_attention: " + message):
        span_attention(**arguments)


@pytest.mark.parametrize("change, error, message", REFUSED, ids=[m[2][:40] + str(i) for i, m in enumerate(REFUSED)])
def test_what_differs_from_a_call_that_went_through_is_checked(change, error, message):
    D = change.get("D", 8)
    good = {"q": torch.zeros(2, 4, 5, 8), "k": torch.zeros(2, 2, 7, 8), "v": torch.zeros(2, 2, 7, 8)}
    good["spans"] = Spans(BOUNDS)
    span_attention(**good)
    other = {name: torch.zeros(*x.shape[:3], D) for name, x in good.items() if name != "spans"} if D != 8 else {}
    change = {name: x for name, x in change.items() if name != "D"}
    # rules and lists are a Spans' own
    if set(change) & {"rules", "kept", "sink_key"} and "spans" not in change:
        message = ".*: expected None beside a Spans"
    with pytest.raises(error, match="span_attention: " + message):
        span_attention(**good | other | change)


def test_calls_that_look_alike_are_checked_once(monkeypatch):
    from streamkernels.ops.span_attention import api

    x = make_inputs(Case(2, 4, 2, 9, 11, 8, "kept"))
    call = {"q": x.q, "k": x.k, "v": x.v, "spans": x.spans, "return_lse": True}
    o, lse = span_attention(**call)
    monkeypatch.setattr(api, "Shapes", None)
    again = span_attention(**call)
    assert torch.equal(again[0], o) and torch.equal(again[1], lse)
    for changed in (
        {"scale": 1.0}, {"softcap": 2.0}, {"backend": "reference"}, {"q": x.q.clone().requires_grad_()},
        {"q": x.q[:, :, :, :].mT.contiguous().mT}, {"prepared": prepare(x.spans, 11)}, {"prepared": ()},
        {"spans": replace(x.spans, rules=(ATTEND,) * len(x.spans.rules), kept=None, kept_count=None)},
    ):  # fmt: skip
        with pytest.raises(TypeError, match="not callable"):
            span_attention(**call | changed)
    with pytest.raises(TypeError, match="not callable"):
        sk.explain(span_attention, **call)


def test_a_known_call_still_has_its_gradient():
    x = make_inputs(Case(1, 2, 2, 9, 9, 8, "causal"))
    q, k, v = (t.clone().requires_grad_() for t in (x.q, x.k, x.v))
    grads = [torch.autograd.grad(span_attention(q, k, v, x.spans).sum(), (q, k, v)) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    with torch.no_grad():
        assert not span_attention(q, k, v, x.spans).requires_grad
        assert not span_attention(q, k, v, x.spans).requires_grad
    assert span_attention(q, k, v, x.spans).requires_grad


def test_a_spans_object_and_its_content_are_the_same_call():
    x = make_inputs(Case(2, 4, 2, 9, 11, 8, "kept"))
    content = {"rules": x.spans.rules, "kept": x.spans.kept, "kept_count": x.spans.kept_count}
    assert torch.equal(span_attention(x.q, x.k, x.v, x.spans), span_attention(x.q, x.k, x.v, x.spans.bounds, **content))
    # ints do as well as rules
    content["rules"] = [int(rule) for rule in x.spans.rules]
    assert torch.equal(span_attention(x.q, x.k, x.v, x.spans), span_attention(x.q, x.k, x.v, x.spans.bounds, **content))


def test_spans_may_be_shared_by_the_batch_without_a_copy():
    x = make_inputs(Case(3, 4, 2, 9, 9, 8, "causal"))
    shared = spans.causal(9).bounds.expand(3, 9, 1, 2)
    assert torch.equal(span_attention(x.q, x.k, x.v, x.spans), span_attention(x.q, x.k, x.v, Spans(shared)))
