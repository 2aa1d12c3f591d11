"""Steps on a cache under torch.compile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from streamkernels.core.cache import TARGET

from .cache_cases import make

pytestmark = pytest.mark.usefixtures("fresh_memory_is_nan")


@pytest.mark.parametrize("inside", [False, True])
def test_a_compiled_step_compiles_once_for_all_lengths(inside: bool) -> None:
    cache = make(capacity=64)
    graphs = 0

    def count(module: Any, _: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return module.forward

    def step(x: Tensor, role: Tensor) -> Tensor:
        for layer in range(2):
            staged = cache.stage(layer, role, x.shape[1])
            x = x + staged.length.sum() + staged.target_k[:, 0, 0, :1]
        if inside:
            cache.commit()
        return x

    compiled = torch.compile(step, backend=count, fullgraph=True)
    cache.segment(0, TARGET)[0].zero_(), cache.segment(1, TARGET)[0].zero_()
    role = torch.tensor([[1, 1, 0], [1, -1, -1]], dtype=torch.int8)
    for n in range(5):
        cache.reserve(source=3, target=3)
        out = compiled(torch.zeros(2, 3), role.clone())
        # lengths are summed over sessions and segments, once per layer
        assert float(out[0, 0]) == 2 * 4 * n
        if not inside:
            cache.commit()
        assert cache.length(1).tolist() == [[n + 1, 2 * n + 2], [0, n + 1]]
    assert graphs == 1
    # the host learns what was committed behind its back before it says what fits
    cache.stage(0, TARGET, 56)
    assert cache.capacity(0, TARGET) == 128 and cache.longest(TARGET) >= 10
    cache.discard()
    cache.pop([10, 5])
    assert cache.length(0)[:, 1].tolist() == [0, 0]


def test_a_compiled_step_that_overruns_is_not_committed() -> None:
    cache = make(layers=1, capacity=2)

    def step(x: Tensor) -> Tensor:
        staged = cache.stage(0, TARGET, 3)
        staged.status.bitwise_or_(2)
        return x + staged.length.sum()

    torch.compile(step, backend="eager", fullgraph=True)(torch.zeros(1))
    with pytest.raises(RuntimeError, match="target segment was full"):
        cache.commit()
    assert cache.length(0).tolist() == [[0, 0]] * 2
    cache.discard()
