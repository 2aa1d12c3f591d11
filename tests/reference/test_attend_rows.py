"""The shared piece of the attention references: parts of a key set, and sinks of mass."""

from __future__ import annotations

from math import inf

import torch
from torch import Tensor

from streamkernels.reference.attend_rows import (
    Visible,
    attend_rows,
    attend_rows_backward,
    row_chunks,
    sink_gate,
    sink_logits_gradient,
)
from streamkernels.reference.merge_partials import merge_partials
from streamkernels.testing.compare import assert_exact

B, H, HK, T, S, D = 2, 4, 2, 5, 9, 8
OPTIONS = {"scale": 0.4, "softcap": 3.0}


def tensors(*shapes: tuple[int, ...]) -> list[Tensor]:
    random = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=random, dtype=torch.float64) for shape in shapes]


def test_parts_of_a_key_set_make_the_whole_forward_and_backward():
    q, k, v, do, dlse, sink_logits = tensors((B, H, T, D), (B, HK, S, D), (B, HK, S, D), (B, H, T, D), (B, H, T), (H,))
    seen = torch.rand(B, 1, T, S, generator=torch.Generator().manual_seed(1)) < 0.5
    seen[:, :, 2] = False
    seen[:, :, 3, :4] = False
    parts = (slice(0, 4), slice(4, 7), slice(7, 9))

    def visible(keys: slice):
        return lambda rows: Visible(seen[:, :, rows, keys])

    whole = attend_rows(q, k, v, visible(slice(None)), sink_logits=sink_logits, **OPTIONS)
    merged = merge_partials([attend_rows(q, k[:, :, p], v[:, :, p], visible(p), **OPTIONS) for p in parts])
    o, lse = merged[0] * sink_gate(merged[1], sink_logits).unsqueeze(-1), merged[1]
    assert_exact("o", o, whole[0])
    assert_exact("lse", lse, whole[1])

    grads = attend_rows_backward(do, dlse, q, k, v, o, lse, visible(slice(None)), sink_logits=sink_logits, **OPTIONS)
    pieces = [
        attend_rows_backward(
            do, dlse, q, k[:, :, p], v[:, :, p], o, lse, visible(p), sink_logits=sink_logits, **OPTIONS
        )
        for p in parts
    ]
    assert_exact("dq", sum(dq for dq, _, _ in pieces), grads[0])
    assert_exact("dk", torch.cat([dk for _, dk, _ in pieces], 2), grads[1])
    assert_exact("dv", torch.cat([dv for _, _, dv in pieces], 2), grads[2])


def test_backward_equals_autograd_of_the_formula():
    q, k, v, do, dlse, sink_logits = (
        x.requires_grad_() for x in tensors((B, H, T, D), (B, HK, S, D), (B, HK, S, D), (B, H, T, D), (B, H, T), (H,))
    )
    random = torch.Generator().manual_seed(2)
    count = torch.randint(0, 3, (B, HK, T, S), generator=random).double()
    count[:, :, 1, 0] = 1
    own = torch.rand(B, HK, T, S, generator=random, dtype=torch.float64)
    sunk = 1 - own
    at = torch.zeros(B, S, dtype=torch.bool)
    at[0, 3] = True
    see = Visible(count, own, ((sunk, at),))

    s = 3.0 * torch.tanh(0.4 * q.unflatten(1, (HK, -1)) @ k.unsqueeze(2).mT / 3.0)
    weight = s.exp() * count.unsqueeze(2)
    p = weight / weight.sum(-1, keepdim=True)
    landed = p * own.unsqueeze(2) + (p * sunk.unsqueeze(2)).sum(-1, keepdim=True) * at[:, None, None, None]
    lse = weight.sum(-1).log().flatten(1, 2)
    o = (landed @ v.unsqueeze(2)).flatten(1, 2) * torch.sigmoid(lse - sink_logits[:, None]).unsqueeze(-1)
    expected = torch.autograd.grad((o * do).sum() + (lse * dlse).sum(), (q, k, v, sink_logits))

    def visible(rows: slice) -> Visible:
        return Visible(count[:, :, rows], own[:, :, rows], ((sunk[:, :, rows], at),))

    with torch.no_grad():
        ours = attend_rows(q, k, v, visible, sink_logits=sink_logits, **OPTIONS)
        assert_exact("o", ours[0], o)
        assert_exact("lse", ours[1], lse)
        grads = attend_rows_backward(do, dlse, q, k, v, *ours, visible, sink_logits=sink_logits, **OPTIONS)
        dsink = sink_logits_gradient(do, ours[0], ours[1], sink_logits)
    for name, a, b in zip(("dq", "dk", "dv", "dsink_logits"), (*grads, dsink), expected, strict=True):
        assert_exact(name, a, b)
    assert see.reached().shape == (B, HK, T, S)


def test_collect_is_the_transpose_of_deposit():
    p, dp = tensors((B, HK, 2, T, S), (B, HK, 2, T, S))
    own, share = torch.rand(2, B, 1, T, S, dtype=torch.float64)
    at = torch.zeros(B, S, dtype=torch.bool)
    at[:, 4] = True
    see = Visible(torch.ones(B, 1, T, S, dtype=torch.bool), own, ((share, at),))
    assert torch.allclose((see.deposit(p) * dp).sum(), (p * see.collect(dp)).sum())


def test_a_row_without_keys_and_no_keys_at_all():
    q, k, v = tensors((B, H, T, D), (B, HK, 0, D), (B, HK, 0, D))
    o, lse = attend_rows(q, k, v, lambda rows: Visible(torch.ones(B, 1, T, 0, dtype=torch.bool)), **OPTIONS)
    assert bool((o == 0).all()) and bool((lse == -inf).all())
    assert bool((sink_gate(lse, torch.full((H,), -inf, dtype=torch.float64)) == 0).all())


def test_chunks_cover_every_row_once():
    for T_, elements in ((0, 5), (1, 1), (10, 1 << 21), (10, 1 << 40)):
        chunks = list(row_chunks(T_, elements, torch.device("cpu")))
        assert [i for c in chunks for i in range(c.start, c.stop)] == list(range(T_))
    assert len(list(row_chunks(10, 1 << 40, torch.device("cpu")))) == 10
