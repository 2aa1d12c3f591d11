"""One decoded token over a cache of which a kept list names a few per cent: span_attention (CUDA) beside dense.

`pytest -s bench/bench_pruned_decode.py`. Device time, inputs rotating through more than twice the L2. Dense is our own
kernel over the same cache and torch's SDPA. The floor is the kept rows of k and v at the bandwidth of a large read.
"""

from __future__ import annotations

import pytest
import torch
from baselines import copy_bandwidth
from kernel_time import copies_for_cold_l2, graph_time, host_time

import streamkernels as sk
from streamkernels.core.spans import KEPT, Spans

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="device time needs a GPU")
CASES = [
    # H, HK, D, S, share of the keys that is kept, T
    (32, 32, 128, 32768, 0.05, 1),
    (32, 32, 128, 32768, 0.05, 8),
    (32, 32, 128, 32768, 0.01, 1),
    (32, 32, 128, 4096, 0.05, 1),
    (28, 4, 128, 65536, 0.05, 1),
    (16, 8, 64, 65536, 0.05, 1),
    (8, 4, 256, 32768, 0.05, 1),
]


def _sets(H: int, HK: int, D: int, S: int, share: float, T: int) -> list[tuple]:
    """(q, k, v, dense spans, spans over a kept list), as many as keep the L2 cold for the kept rows too."""
    K = max(1, int(S * share))
    copies = min(copies_for_cold_l2(4 * K * HK * D), 12)
    dense = Spans(torch.tensor([0, S], dtype=torch.int32, device="cuda").expand(1, T, 1, 2).contiguous())
    sets = []
    for _ in range(copies):
        q = torch.randn(1, T, H, D, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
        k, v = (torch.randn(1, HK, S, D, device="cuda", dtype=torch.bfloat16) for _ in "kv")
        kept = torch.stack([torch.randperm(S, device="cuda")[:K].sort().values for _ in range(HK)]).int()[None]
        count = torch.full((1, HK), K, dtype=torch.int32, device="cuda")
        sets.append((q, k, v, dense, Spans(dense.bounds, (KEPT,), kept=kept, kept_count=count)))
    return sets


@pytest.mark.parametrize("H, HK, D, S, share, T", CASES)
def test_kept_keys_beside_all_keys(H, HK, D, S, share, T, rows):
    sets = _sets(H, HK, D, S, share, T)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    q, k, v, dense, _ = sets[0]
    theirs = sdpa(q, k, v, enable_gqa=H != HK)
    torch.testing.assert_close(sk.span_attention(q, k, v, dense, backend="cuda"), theirs, atol=2e-2, rtol=2e-2)
    pruned_us = graph_time([lambda x=x: sk.span_attention(*x[:3], x[4], backend="cuda") for x in sets])
    dense_us = graph_time([lambda x=x: sk.span_attention(*x[:4], backend="cuda") for x in sets])
    sdpa_us = graph_time([lambda x=x: sdpa(*x[:3], enable_gqa=H != HK) for x in sets])
    nbytes = 4 * int(S * share) * HK * D
    row = {"H": H, "HK": HK, "D": D, "S": S, "kept": share, "T": T, "kept us": pruned_us, "dense us": dense_us}
    row |= {"SDPA us": sdpa_us, "dense / kept": dense_us / pruned_us, "SDPA / kept": sdpa_us / pruned_us}
    row |= {"floor us": nbytes / copy_bandwidth(1 << 30) / 1e3}
    row |= {"host us": host_time(lambda: sk.span_attention(*sets[0][:3], sets[0][4], backend="cuda"))}
    rows.append(row)
