"""What each listed key contributes to the output of one query row, from the row's saved o and lse.

With a_hi = exp(s_hi - lse_h) the probability of key i in head h, its contribution is c_i = concat_h a_hi v_hi, and the
output without it is e_i = o - c_i (VisiPruner, arXiv 2510.17205, section 3.6: value-aware selection). Three sums over
heads and head dim per key are enough, so contributions live for one chunk of keys only:

    norm_i = sqrt(sum c_i^2)
    cos_i  = sum e_i o / (|o| sqrt(sum e_i^2))
    mass_i = sum_h a_hi

With d = o . c_i and n = |c_i|^2 the cosine is also (|o|^2 - d) / sqrt(|o|^2 (|o|^2 - 2 d + n)), which needs no e_i. The
two agree to rounding near the thresholds of the method (0.995, 0.999) while c_i is small. Where one key is most of the
output, the closed form subtracts nearly equal numbers, in fp32 down to the root of a negative one; subtracting first
keeps the digits that a_hi has, and reads no more memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .attend_rows import compute_dtype, row_chunks

# |o - c| below this many ulps of |o| is rounding of exp(s - lse), not a direction
ROUNDING = 64


def token_scores(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    index: Tensor,
    count: Tensor,
    *,
    scale: float,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """q, o [B, H, 1, D], k, v [B, HK, S, D], lse [B, H, 1], index [B, K], count [B] -> cosine, norm, mass [B, K]."""
    B, HK, S, D = k.shape
    H, K = q.shape[1], index.shape[1]
    dtype = compute_dtype(q.dtype)
    # [B, HK, R, D] and [B, HK, R, 1]; +inf for a row that saw nothing makes all its probabilities 0
    q = q[:, :, 0].unflatten(1, (HK, -1)).to(dtype) * scale
    o = o[:, :, 0].unflatten(1, (HK, -1)).to(dtype)
    lse = lse.to(dtype).masked_fill(lse == float("-inf"), float("inf")).unflatten(1, (HK, -1))
    listed = (torch.arange(K, device=index.device) < count[:, None]) & (index >= 0) & (index < S)
    at = index.long().masked_fill(~listed, 0)
    along, left, own, mass = (torch.zeros((B, K), dtype=dtype, device=q.device) for _ in range(4))
    # a registered op runs inside the caller's autocast, which would turn these products into half precision
    with torch.autocast(q.device.type, enabled=False):
        for keys in row_chunks(K if S else 0, 2 * B * H * D, q.device):
            rows = at[:, None, keys, None].expand(-1, HK, -1, D)
            s = q @ k.gather(2, rows).to(dtype).mT  # [B, HK, R, c]
            if softcap:
                s = (s / softcap).tanh() * softcap
            a = (s - lse).exp()
            c = a.unsqueeze(-1) * v.gather(2, rows).to(dtype).unsqueeze(2)  # [B, HK, R, c, D]
            e = o.unsqueeze(3) - c
            own[:, keys] = c.square().sum((1, 2, 4))
            left[:, keys] = e.square().sum((1, 2, 4))
            along[:, keys] = e.mul_(o.unsqueeze(3)).sum((1, 2, 4))
            mass[:, keys] = a.sum((1, 2))
    cosine = _cosine(along, left.sqrt(), o.square().sum((1, 2, 3)).sqrt()[:, None])
    return cosine.masked_fill(~listed, 1.0), own.sqrt().masked_fill(~listed, 0.0), mass.masked_fill(~listed, 0.0)


def _cosine(along: Tensor, left: Tensor, whole: Tensor) -> Tensor:
    """e . o, |e|, |o| -> the cosine: 1 if o is zero, 0 if e is zero to rounding."""
    nothing = left <= ROUNDING * torch.finfo(left.dtype).eps * whole
    lengths = (left * whole).masked_fill(nothing, 1.0)
    cosine = (along / lengths).clamp(-1.0, 1.0)
    return cosine.masked_fill(nothing, 0.0).masked_fill(whole == 0, 1.0)
