"""One small call of every pruning kernel, for `compute-sanitizer --tool memcheck python tests/cuda/sanitize_pruned.py`.

Also with --tool racecheck, initcheck and synccheck. Prints `done` at the end.
"""

from __future__ import annotations

import torch

import streamkernels as sk
from streamkernels.core.spans import ATTEND, KEPT, MASS, SINK

GARBAGE = 2**31 - 1


def ints(x: list) -> torch.Tensor:
    return torch.tensor(x, dtype=torch.int32, device="cuda")


def prune(dtype: torch.dtype, D: int) -> None:
    q, o = (torch.randn(2, 4, 1, D, device="cuda").to(dtype) for _ in "qo")
    k, v = (torch.randn(2, 2, 37, D, device="cuda").to(dtype) for _ in "kv")
    index = ints([[0, 3, 36, -1, GARBAGE], [5, 6, 7, 8, 9]])
    count = ints([5, 2])
    lse = torch.ones(2, 4, 1, device="cuda")
    scores = sk.token_scores(q, k, v, o, lse, index, count, backend="cuda")
    kept, kept_count = sk.select_tokens(scores.norm, k=2, index=index, count=count, backend="cuda")
    sk.select_tokens(scores.norm, threshold=0.1, index=index, backend="cuda")
    sk.compact(k, kept, kept_count, dim=2, backend="cuda")
    angles = torch.rand(1, 37, D // 2, device="cuda")
    sk.rotate(k, angles, angles, backend="cuda")
    sk.reanchor(k, angles[:, :1], angles[:, :1], interleaved=True, backend="cuda")


def score_long_lists(H: int, HK: int, D: int, offset: int) -> None:
    """More keys than blocks have at once, one of them nearly all of the output. `offset` 3: off 16-byte borders."""
    S = 30000 // HK
    k, v = (torch.randn(1, HK, S, D + 8, device="cuda").half()[..., offset : D + offset] for _ in "kv")
    q, o = torch.randn(1, H, 1, D, device="cuda").half(), v[:, :, 77:78].repeat_interleave(H // HK, 1).contiguous()
    lse = (q.float() * k[:, :, 77:78].float().repeat_interleave(H // HK, 1)).sum(-1) * D**-0.5 + 0.1
    index = torch.arange(S, dtype=torch.int32, device="cuda")[None]
    sk.token_scores(q, k, v, o, lse, index, ints([S - 5]), backend="cuda")


def attend(T: int, D: int, HK: int) -> None:
    q = torch.randn(1, 2 * HK, T, D, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(1, HK, 333, D, device="cuda", dtype=torch.bfloat16) for _ in "kv")
    bounds = ints([[0, 40], [50, 300], [300, 320], [320, GARBAGE]]).expand(1, T, 4, 2).contiguous()
    kept = ints([[[-5, 55, 60, 299, 400, GARBAGE]]]).expand(1, HK, 6)
    spans = sk.Spans(bounds, (ATTEND, KEPT, MASS, SINK), ints([[0, 0, 0, 5]]), kept, ints([[5] * HK]))
    sk.span_attention(q, k, v, spans, sink_logits=torch.zeros(2 * HK, device="cuda"), softcap=9.0, backend="cuda")


def attend_many(T: int, D: int, dtype: torch.dtype) -> None:
    """Hopper's kernel for many rows, several items to a block."""
    S = 333
    q = torch.randn(1, 140, T, D, device="cuda", dtype=dtype)
    k, v = (torch.randn(1, 4, S, D, device="cuda", dtype=dtype) for _ in "kv")
    bounds = ints([[-5, 140], [150, GARBAGE]]).repeat(1, T, 1, 1)
    bounds[:, ::3, 0], bounds[:, T // 2 :, 1] = ints([170, 40]), ints([200, 201])
    for sinks in (None, torch.randn(q.shape[1], device="cuda")):
        for slots in (1, 2):
            sk.span_attention(q, k, v, bounds[:, :, :slots].contiguous(), sink_logits=sinks, backend="cuda")


if __name__ == "__main__":
    prune(torch.bfloat16, 64)
    prune(torch.float32, 256)
    for H, HK, D, offset in ((2, 1, 128, 0), (9, 9, 64, 0), (17, 1, 96, 3), (4, 4, 256, 0)):
        score_long_lists(H, HK, D, offset)
    for T, D, HK in ((1, 128, 2), (64, 64, 1), (9, 256, 1), (3, 96, 2)):
        attend(T, D, HK)
    if torch.cuda.get_device_capability() == (9, 0):
        for T, D, dtype in ((200, 128, torch.bfloat16), (70, 64, torch.bfloat16), (150, 128, torch.float16)):
            attend_many(T, D, dtype)
    torch.cuda.synchronize()
    print("done")
