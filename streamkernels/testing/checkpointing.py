"""Selective activation checkpointing, as a policy asks for it by the registered op."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from ..ops.span_attention import span_attention
from .inputs import Inputs


def assert_attention_is_saved(x: Inputs, **options: Any) -> None:
    """A block under a policy that saves `span_attention` runs it once forward and once backward, with the gradients of
    a block that is not checkpointed; what stands around it is computed again."""
    op = torch.ops.streamkernels.span_attention.default
    backward = torch.ops.streamkernels.span_attention_backward.default
    calls = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            calls.append(func)
            return func(*args, **(kwargs or {}))

    def policy(ctx: object, called: object, *args: object, **kwargs: object) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if called is op else CheckpointPolicy.PREFER_RECOMPUTE

    def block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        o = span_attention(q.sin(), k.cos(), v, x.spans, **options)
        assert isinstance(o, Tensor)
        return o.sin()

    context = functools.partial(create_selective_checkpoint_contexts, policy)
    grads, sines = [], []
    for run in (block, lambda *a: checkpoint(block, *a, use_reentrant=False, context_fn=context)):
        leaves = x.leaves()
        calls.clear()
        with Count():
            run(*leaves).sum().backward()
        grads.append([leaf.grad for leaf in leaves])
        assert calls.count(op) == 1 and calls.count(backward) == 1
        sines.append(calls.count(torch.ops.aten.sin.default))
    # one of the two sines of the forward is computed again, the attention is not
    assert sines[1] == sines[0] + 1
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
