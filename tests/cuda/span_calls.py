"""What the tests of span_attention's CUDA kernels share: a call with everything that a case holds, and its truth."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from streamkernels import span_attention
from streamkernels.testing.compare import assert_accurate
from streamkernels.testing.dense import dense_attention
from streamkernels.testing.inputs import Inputs


def both(*args, backend: str = "cuda", **kwargs) -> tuple[Tensor, Tensor]:
    return span_attention(*args, return_lse=True, backend=backend, **kwargs)


def run(x: Inputs, function=both) -> tuple[Tensor, Tensor]:
    return function(x.q, x.k, x.v, x.spans, scale=x.scale, softcap=x.softcap, sink_logits=x.sink_logits)


def check(x: Inputs) -> None:
    ours = run(x)
    plain, exact = run(x, dense_attention), run(x.to(torch.float64), dense_attention)
    for name, a, b, c in zip(("o", "lse"), ours, plain, exact, strict=True):
        assert_accurate(name, a, b, c)


def check_repeated(x: Inputs) -> None:
    """Accurate, stored as models go on with it, and the same every time."""
    check(x)
    first = run(x)
    assert first[0].transpose(1, 2).is_contiguous()
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(first, run(x), strict=True))


def off_borders(x: Inputs) -> Inputs:
    """The same q, k and v between NaN, whose rows begin on no 16-byte border."""
    odd = []
    for t in (x.q, x.k, x.v):
        wide = torch.full((*t.shape[:3], t.shape[3] + 3), float("nan"), dtype=t.dtype, device="cuda")
        odd.append(wide[..., 1:-2].copy_(t))
    return replace(x, q=odd[0], k=odd[1], v=odd[2])
