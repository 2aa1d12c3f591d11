"""token_scores, and select_tokens behind it, beside VisiPruner's own way and beside reading K and V once: device time.

`pytest -s bench/bench_token_scores.py`. Prediction: every row of K and V is read once, so from 11520 tokens on (189 MB
at H = HK = 32) the kernel should take little more than reading them, and at 576 what a launch and a chain of two
dependent reads (the list, then K and V) take, 5 to 10 us. Inputs are cold: sets of more than twice the L2 rotate.
"""

from __future__ import annotations

import pytest
import torch
from kernel_time import copies_for_cold_l2, graph_time, host_time

import streamkernels as sk

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="device time needs a GPU")
TOKENS = (576, 2880, 11520, 46080)
SHAPES = [(tokens, 32, 32, 128, torch.float16) for tokens in TOKENS]
SHAPES += [(tokens, 28, 4, 128, torch.bfloat16) for tokens in TOKENS]
BACKENDS = ("triton", "cuda")


def _inputs(K: int, H: int, HK: int, D: int, dtype: torch.dtype):
    """One call's tensors: K vision keys between 35 and 13 text keys, as in a prompt of LLaVA-1.5."""
    S = K + 48
    q, k, v = (torch.randn(1, heads, n, D, device="cuda", dtype=dtype) for heads, n in ((H, 1), (HK, S), (HK, S)))
    index = torch.arange(35, 35 + K, device="cuda", dtype=torch.int32)[None]
    count = torch.full((1,), K, device="cuda", dtype=torch.int32)
    R = H // HK
    s = (q @ k.repeat_interleave(R, 1).mT).float() * D**-0.5
    o = (s.softmax(-1).to(dtype) @ v.repeat_interleave(R, 1)).contiguous()
    return q, k, v, o, s.logsumexp(-1), index, count


def _stored_contributions(q, k, v, o):
    """The definition as VisiPruner's code evaluates it: the row's softmax, then every contribution in memory."""
    R = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(R, 1) if R > 1 else x for x in (k, v))
    a = ((q @ k.mT) * q.shape[-1] ** -0.5).float().softmax(-1).to(q.dtype)
    c = (a.mT * v).transpose(1, 2).flatten(2).contiguous()
    whole = o.transpose(1, 2).flatten(2)
    return torch.cosine_similarity(whole - c, whole, dim=-1), c.norm(dim=-1)


def _read_bandwidth() -> float:
    """Bytes per microsecond of torch's sum over 2 GiB."""
    x = torch.randn(1 << 29, device="cuda")
    return 4 * x.numel() / graph_time([x.sum])


def _times(sets, backend: str) -> dict[str, object]:
    def scores(s):
        return sk.token_scores(*s, backend=backend)

    def select(s):
        # the scores' norms over the threshold, on the same backend
        return sk.select_tokens(scores(s).norm, threshold=0.2, index=s[5], count=s[6], backend=backend)

    try:
        scores(sets[0])
    except NotImplementedError:
        return {f"{backend} us": "-", f"{backend} with select us": "-", f"{backend} host us": "-"}
    row = {f"{backend} us": graph_time([lambda s=s: scores(s) for s in sets])}
    try:
        row[f"{backend} with select us"] = graph_time([lambda s=s: select(s) for s in sets])
    except NotImplementedError:
        row[f"{backend} with select us"] = "-"
    row[f"{backend} host us"] = host_time(lambda: scores(sets[0]))
    return row


@pytest.mark.parametrize("K, H, HK, D, dtype", SHAPES)
def test_token_scores(K, H, HK, D, dtype, rows):
    nbytes = 2 * K * HK * D * dtype.itemsize
    sets = [_inputs(K, H, HK, D, dtype) for _ in range(min(copies_for_cold_l2(nbytes), 64))]
    theirs, ours = _stored_contributions(*sets[0][:4]), sk.token_scores(*sets[0])
    for a, b in zip(theirs, ours[:2], strict=True):
        torch.testing.assert_close(a[:, 35 : 35 + K].float(), b, atol=2e-2, rtol=2e-2)
    eager = graph_time([lambda s=s: _stored_contributions(*s[:4]) for s in sets])
    read = nbytes / _read_bandwidth()
    row = {"tokens": K, "H": H, "HK": HK, "D": D, "dtype": str(dtype)[6:], "MB": nbytes / 1e6}
    row |= {"K and V read once us": read, "stored contributions us": eager}
    for backend in BACKENDS:
        row |= _times(sets, backend)
        us = row[f"{backend} us"]
        row[f"{backend} / read"] = us / read if isinstance(us, float) else "-"
        row[f"stored / {backend}"] = eager / us if isinstance(us, float) else "-"
    rows.append(row)


@pytest.mark.parametrize("K", TOKENS)
def test_select_tokens(K, rows):
    """Both ways of selecting alone, for the table's last columns."""
    scores = [torch.rand(1, K, device="cuda") for _ in range(8)]
    row = dict.fromkeys(rows[0], "-") if rows else {}
    row |= {"tokens": K, "dtype": "select alone"}
    for backend in BACKENDS:
        for name, options in (("threshold", {"threshold": 0.9}), ("k = K / 10", {"k": K // 10})):
            try:
                us = graph_time([lambda s=s: sk.select_tokens(s, **options, backend=backend) for s in scores])  # noqa: B023
            except NotImplementedError:
                continue
            row[f"{backend} us" if name == "threshold" else f"{backend} with select us"] = us
    rows.append(row)
