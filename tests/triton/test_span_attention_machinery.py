"""span_attention's compiled kernels in CUDA graphs, the dispatcher, torch.compile, checkpointing and warmup, on a GPU.

Without one, tests/ops has the dispatcher, and the interpreter has no part in the rest.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

import streamkernels as sk
from streamkernels import prepare, span_attention
from streamkernels.reference.span_attention import SpanTensors
from streamkernels.testing.cases import Case
from streamkernels.testing.checkpointing import assert_attention_is_saved
from streamkernels.testing.gradients import forward_and_backward
from streamkernels.testing.graphs import assert_step_is_replayed
from streamkernels.testing.inputs import Inputs, make_inputs, random_spans

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICE = "cuda"
OP = torch.ops.streamkernels.span_attention.default
BACKWARD = torch.ops.streamkernels.span_attention_backward.default


def test_captured_in_a_cuda_graph():
    x = make_inputs(Case(1, 8, 2, 300, 300, 64, "wait_k", torch.bfloat16), DEVICE)
    eager = span_attention(x.q, x.k, x.v, x.spans, backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = span_attention(x.q, x.k, x.v, x.spans, backend="triton")
    captured.fill_(float("nan"))
    graph.replay()
    assert torch.equal(captured, eager)


@pytest.mark.parametrize("T", [300, 2100])
def test_a_training_step_captured_in_a_cuda_graph(T):
    """The parts of dk and dv are joined by whoever arrives last, which replays must find as the first run did."""
    assert_step_is_replayed(Case(1, 28, 4, T, T, 128, "wait_k", torch.bfloat16), "triton")


def raw_arguments(x: Inputs) -> tuple:
    content = tuple(getattr(x.spans, field) for field in SpanTensors._fields)
    blocks = prepare(x.spans, x.k.shape[2])
    return (x.q, x.k, x.v, *content, x.sink_logits, *blocks, x.scale, x.softcap or 0.0, "triton")


@pytest.mark.parametrize("mask", ["wait_k", "classes"])
def test_opcheck(mask):
    x = make_inputs(Case(2, 4, 2, 33, 33, 64, mask, torch.bfloat16, sink_logits=True), DEVICE)
    q, k, v, sink_logits = x.leaves()
    x = replace(x, q=q, k=k, v=v, sink_logits=sink_logits)
    torch.library.opcheck(OP, raw_arguments(x))
    with torch.no_grad():
        o, lse = OP(*raw_arguments(x))
    arguments = (x.do, x.dlse, q, k, v, o, lse, *raw_arguments(x)[3:])
    arguments = tuple(t.detach() if isinstance(t, Tensor) else t for t in arguments)
    torch.library.opcheck(BACKWARD, arguments)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles_once_for_all_lengths(compiler):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend(compiler)

    def layer(q, k, v, sp):
        o, lse = span_attention(
            q * 2, k, v, sp, prepared=prepare(sp, k.shape[2]), return_lse=True, backend="triton"
        )  # fmt: skip
        return o.transpose(1, 2).flatten(2) * 2, lse

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    for T in (70, 81, 300):
        x = make_inputs(Case(2, 4, 2, T, T, 64, "causal", torch.bfloat16), DEVICE)
        results = []
        for fn in (compiled, layer):
            q, k, v = x.leaves()
            o, lse = fn(q, k, v, x.spans.bounds)
            results.append((o, lse, *torch.autograd.grad(o.float().sum() + lse.sum(), (q, k, v))))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert counter.frame_count == 1


def test_selective_checkpointing_saves_the_attention():
    x = make_inputs(Case(2, 4, 2, 63, 63, 64, "wait_k", torch.bfloat16), DEVICE)
    assert_attention_is_saved(x, backend="triton")


def test_after_warmup_no_length_compiles_anything(monkeypatch):
    from triton import knobs

    from streamkernels.backends import triton as backend

    # the kernels of a streaming step have tests of their own, and take as long again to compile
    monkeypatch.setattr(backend, "_warm_streaming_step", lambda *_: 0)
    D, dtype = 64, torch.bfloat16
    sk.warmup(DEVICE, head_dims=(D,), dtypes=(dtype,), heads=((8, 2),), slots=(2,), training=True)
    compiled = []
    before = knobs.runtime.jit_post_compile_hook
    knobs.runtime.jit_post_compile_hook = lambda **call: compiled.append(call)
    try:
        for T in (1, 2, 15, 16, 17, 48, 333, 1000, 1024, 2049):
            x = make_inputs(Case(2, 8, 2, T, T, D, "causal", dtype), DEVICE)
            random = torch.Generator().manual_seed(T)
            x = replace(x, spans=random_spans(2, T, T, 2, random).to(DEVICE))
            o, lse, *_ = forward_and_backward(span_attention, x, return_lse=True, backend="triton")
            index = torch.arange(T, dtype=torch.int32, device=DEVICE).expand(2, T)
            count = torch.full((2,), T, dtype=torch.int32, device=DEVICE)
            row = (x.q[:, :, -1:], x.k, x.v, o[:, :, -1:], lse[:, :, -1:])
            norm = sk.token_scores(*row, index, count, backend="triton").norm
            for options in ({"threshold": 0.1}, {"k": max(T // 2, 1)} if T > 1 else {"threshold": 0.1}):
                kept, kept_count = sk.select_tokens(norm, **options, index=index, count=count, backend="triton")
            sk.compact(x.k, kept, kept_count, dim=2, backend="triton")
            angles = torch.rand(1, T, D // 2, device=DEVICE)
            sk.rotate(x.q, angles, angles, backend="triton")
            sk.reanchor(x.k, angles, angles, backend="triton")
    finally:
        knobs.runtime.jit_post_compile_hook = before
    assert not compiled, sorted({call["repr"] for call in compiled})
