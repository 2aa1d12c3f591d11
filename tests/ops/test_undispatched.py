"""Calls that only autograd sees go past the dispatcher: they differ in nothing from those that go through it."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from streamkernels import compact, select_tokens, span_attention
from streamkernels.ops.span_attention.autograd import Undispatched
from streamkernels.testing.cases import Case
from streamkernels.testing.inputs import make_inputs

CASE = Case(2, 4, 2, 17, 17, 8, "wait_k", sink_logits=True)


class Watch(TorchDispatchMode):
    """Lets every call through and counts them: with it, calls go through the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


def attend(x, leaves):
    q, k, v, sink_logits = leaves
    return span_attention(q, k, v, x.spans, sink_logits=sink_logits, return_lse=True)


LOSSES = {
    "o": lambda o, lse: o.sin().sum(),
    "lse": lambda o, lse: lse.sin().sum(),
    "both": lambda o, lse: o.sin().sum() + lse.cos().sum(),
}


@pytest.mark.parametrize("wanted", [(0, 1, 2, 3), (0,), (2, 3), (3,)])
@pytest.mark.parametrize("loss", LOSSES)
def test_same_gradients_as_the_registered_op(loss, wanted):
    x = make_inputs(CASE)
    found = []
    for watched in (False, True):
        leaves = [leaf.detach().requires_grad_(i in wanted) for i, leaf in enumerate(x.leaves())]
        watch = Watch()
        if watched:
            with watch:
                o, lse = attend(x, leaves)
                grads = torch.autograd.grad(LOSSES[loss](o, lse), [leaves[i] for i in wanted])
            assert any("span_attention_backward" in name for name in watch.seen)
        else:
            o, lse = attend(x, leaves)
            assert type(o.grad_fn).__name__ == f"{Undispatched.__name__}Backward"
            grads = torch.autograd.grad(LOSSES[loss](o, lse), [leaves[i] for i in wanted])
        found.append((o, lse, *grads))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_mode_that_begins_after_the_forward_sees_the_backward():
    x = make_inputs(CASE)
    leaves = x.leaves()
    o, _ = attend(x, leaves)
    with Watch() as watch:
        o.sum().backward()
    assert sum("span_attention_backward" in name for name in watch.seen) == 1


def test_a_tensor_changed_in_place_before_the_backward_is_refused():
    x = make_inputs(CASE)
    for change in (0, 2):
        leaves = [leaf.detach().clone().requires_grad_() for leaf in x.leaves()]
        through = [leaf * 1 for leaf in leaves]
        o, _ = attend(x, through)
        with torch.no_grad():
            through[change].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            o.sum().backward()


def test_saved_tensors_go_through_hooks():
    x = make_inputs(CASE)
    expected = torch.autograd.grad(attend(x, leaves := x.leaves())[0].sum(), leaves)
    packed = []

    def pack(tensor):
        packed.append(tensor.shape)
        return tensor.clone()

    leaves = x.leaves()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        o, _ = attend(x, leaves)
    assert x.q.shape in packed and x.spans.bounds.shape in packed
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(o.sum(), leaves), expected, strict=True))


def test_many_gradients_at_once():
    x = make_inputs(CASE)
    leaves = x.leaves()
    o, _ = attend(x, leaves)
    together = torch.stack([torch.ones_like(o), torch.randn_like(o)])
    one_by_one = [torch.autograd.grad(o, leaves[0], do, retain_graph=True)[0] for do in together]
    batched = torch.autograd.grad(o, leaves[0], together, is_grads_batched=True)[0]
    assert torch.allclose(batched, torch.stack(one_by_one))


def test_select_tokens_again():
    scores = torch.randn(3, 50)
    for options in ({"threshold": 0.1}, {"k": 7}, {"k": 7, "max_keep": 4, "largest": False}):
        first = select_tokens(scores, **options)
        with Watch() as watch:
            seen = select_tokens(scores, **options)
        again = select_tokens(scores.requires_grad_(), **options)
        scores = scores.detach()
        assert "streamkernels::select_tokens" in watch.seen
        assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(first, seen, again, strict=True))
        assert not again[0].requires_grad


def test_compact_again():
    x = torch.randn(2, 9, 4)
    index = torch.tensor([[0, 3, 8], [2, 2, 1]], dtype=torch.int32)
    count = torch.tensor([3, 2], dtype=torch.int32)
    first = compact(x, index, count)
    with Watch() as watch:
        seen = compact(x, index, count)
    assert "streamkernels::compact" in watch.seen
    leaf = x.clone().requires_grad_()
    grown = compact(leaf, index, count)
    grown.sum().backward()
    assert leaf.grad is not None and float(leaf.grad.sum()) == 5 * 4
    for other in (seen, compact(x, index, count), grown):
        assert torch.equal(first, other)
