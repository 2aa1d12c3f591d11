"""A training step's attention in a CUDA graph."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.span_attention import span_attention
from .cases import Case
from .inputs import make_inputs


def assert_step_is_replayed(case: Case, backend: str) -> None:
    """Forward and backward, captured once, give for other values what they give outside of the graph, bit by bit."""
    first, *others = (make_inputs(case, "cuda", seed) for seed in range(3))
    q, k, v = (x.detach().clone().requires_grad_() for x in (first.q, first.k, first.v))
    do = first.do.clone()

    def step() -> tuple[Tensor, ...]:
        o, lse = span_attention(q, k, v, first.spans, scale=first.scale, return_lse=True, backend=backend)
        return (o.detach(), lse.detach(), *torch.autograd.grad((o, lse), (q, k, v), (do, first.dlse)))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for x in others:
        with torch.no_grad():
            for leaf, value in zip((q, k, v, do), (x.q, x.k, x.v, x.do), strict=True):
                leaf.copy_(value)
            for t in captured:
                t.fill_(float("nan"))
        graph.replay()
        for a, b in zip(captured, step(), strict=True):
            assert torch.equal(a, b)
