"""Attention of query rows over one set of keys, a chunk of rows at a time: what every attention reference shares.

A caller says what a chunk of rows sees (`Visible`); this file does the arithmetic, in fp32 (fp64 for fp64 inputs):

    s_ij = cap(scale * q_i . k_j)            cap(x) = softcap * tanh(x / softcap), or x without softcap
    lse_i = log sum_j c_ij exp(s_ij)         c_ij: how often row i counts key j (0: it does not see it)
    p_ij = c_ij exp(s_ij - lse_i)            the probabilities of the visible keys, summing to 1
    a_i  = sigmoid(lse_i - sink_logit)       1 without sink_logits: the share that the learned sink leaves
    o_i  = a_i sum_j p_ij u_ij               u_ij: where the mass of key j lands, v_j unless `Visible` says otherwise

and backwards, with dP_ij = do_i . u_ij:

    dS_ij = p_ij (a_i (dP_ij - do_i . o_i) + dlse_i),   d sink_logit = - sum_i (1 - a_i) do_i . o_i

which is the softmax gradient of FlashAttention-2 (Dao 2023, arXiv 2307.08691, section 2.3.2) with two more terms. `o`
and `lse` may be those of a larger set of keys: the backward of one part of it, given the whole's o and lse, is that
part's exact share of dq and its own dk and dv.

A key that no row sees may hold anything, NaN included. A key or value that is not finite reaches exactly the rows that
see it (o and lse, or o alone, become NaN there), and in the backward exactly what those rows see.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# scores held at once, in elements: small on a CPU, one chunk for ordinary training batches on a GPU
CHUNK_ELEMENTS = {"cpu": 1 << 22}
DEFAULT_CHUNK_ELEMENTS = 1 << 26

NEVER = float("-inf")


@dataclass(frozen=True)
class Visible:
    """What a chunk of c rows sees of S keys; `G` is HK, or 1 when all heads see the same.

    keys:   [B, G, c, S], bool (seen or not) or the number of times that the key counts, in the compute dtype.
    values: [B, G, c, S] in the compute dtype, the share of a key's mass that lands on its own value; None: all of it.
    sinks:  pairs (share [B, G, c, S] in the compute dtype, at bool [B, S]): that share of the mass lands on the value
            that `at` marks, on none where it marks nothing.
    """

    keys: Tensor
    values: Tensor | None = None
    sinks: tuple[tuple[Tensor, Tensor], ...] = ()

    def deposit(self, p: Tensor) -> Tensor:
        """Move mass p [B, HK, R, c, S] to the values that it lands on; what is not finite moves nowhere else."""
        if self.values is None:
            return p
        landed = _only(self.values.unsqueeze(2), p)
        for share, at in self.sinks:
            landed += torch.where(_column(at), _only(share.unsqueeze(2), p).sum(-1, keepdim=True), 0.0)
        return landed

    def collect(self, dp: Tensor) -> Tensor:
        """The transpose of `deposit`: from do . v_j of each value to do . u_ij of each key [B, HK, R, c, S].

        Values that a key's mass does not reach stay out of it, whatever they hold.
        """
        if self.values is None:
            return dp
        collected = _only(self.values.unsqueeze(2), dp)
        for share, at in self.sinks:
            collected += _only(share.unsqueeze(2), torch.where(_column(at), dp, 0.0).sum(-1, keepdim=True))
        return collected

    def reached(self) -> Tensor:
        """[B, G, c, S], non-zero where a row uses the value of a key."""
        if self.values is None:
            return self.keys
        reached = self.values
        for share, at in self.sinks:
            reached = reached + share.sum(-1, keepdim=True) * at[:, None, None, :]
        return reached


def attend_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Callable[[slice], Visible],
    *,
    scale: float,
    softcap: float = 0.0,
    sink_logits: Tensor | None = None,
    row_elements: int = 0,
) -> tuple[Tensor, Tensor]:
    """q [B, H, T, D] over k, v [B, HK, S, D] -> o [B, H, T, D] (stored [B, T, H, D]) and lse [B, H, T], compute dtype.

    `visible(rows)` is asked once for each slice of query rows. `softcap` 0 means none; `sink_logits` [H] enters o only.
    `row_elements`: elements per query row that `visible` itself needs, if that is more than B * H * S.
    A row that sees nothing gets o = 0 and lse = -inf.
    """
    B, H, T, D = q.shape
    HK, S = k.shape[1:3]
    dtype = compute_dtype(q.dtype)
    o = torch.zeros((B, T, H, D), dtype=dtype, device=q.device).transpose(1, 2)
    lse = torch.full((B, H, T), NEVER, dtype=dtype, device=q.device)
    if o.numel() == 0 or S == 0:
        return o, lse
    k, v = k.to(dtype).contiguous(), v.to(dtype).contiguous()
    odd_values = _odd(v)
    v = _finite(v)
    # a registered op runs inside the caller's autocast, which would turn these products into half precision
    with torch.autocast(q.device.type, enabled=False):
        for rows in row_chunks(T, max(B * H * S, row_elements), q.device):
            seen = visible(rows)
            s = _scores(_rows(q, rows, HK, dtype) * scale, k, seen, softcap)
            top = s.amax(-1, keepdim=True)
            p = s.sub_(top.masked_fill_(top == NEVER, 0.0)).exp_()
            if seen.keys.dtype != torch.bool:
                p *= seen.keys.unsqueeze(2)
            total = p.sum(-1, keepdim=True)
            out = _product(seen.deposit(p), v) / total.masked_fill(total == 0, 1.0)
            out.masked_fill_(_any(seen.reached(), odd_values)[:, :, None, :, None], float("nan"))
            o[:, :, rows] = out.flatten(1, 2)
            lse[:, :, rows] = (top + total.log()).squeeze(-1).flatten(1, 2)
        if sink_logits is not None:
            o *= sink_gate(lse, sink_logits).unsqueeze(-1)
    return o, lse


def attend_rows_backward(
    do: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    visible: Callable[[slice], Visible],
    *,
    scale: float,
    softcap: float = 0.0,
    sink_logits: Tensor | None = None,
    row_elements: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `attend_rows` -> dq [B, H, T, D], dk and dv [B, HK, S, D], stored rows first, compute dtype.

    `o` [B, H, T, D] and `lse` [B, H, T] are the forward's, or those of a larger key set of which k and v are a part
    (`o` after `sink_logits`). `do` is shaped as o, `dlse` as lse (None: zero). The gradient of sink_logits is
    `sink_logits_gradient`.
    """
    B, H, T, D = q.shape
    HK, S = k.shape[1:3]
    dtype = compute_dtype(q.dtype)
    dq = torch.zeros((B, T, H, D), dtype=dtype, device=q.device).transpose(1, 2)
    dk, dv = (torch.zeros((B, S, HK, D), dtype=dtype, device=q.device).transpose(1, 2) for _ in range(2))
    if dq.numel() == 0 or dk.numel() == 0:
        return dq, dk, dv
    k, v, do = k.to(dtype).contiguous(), v.to(dtype).contiguous(), do.to(dtype)
    finite_k, odd_do = _finite(k), _odd(do)
    gate = None if sink_logits is None else sink_gate(lse.to(dtype), sink_logits)
    with torch.autocast(q.device.type, enabled=False):
        # what dS subtracts in each row: a_i do_i . o_i - dlse_i
        less = (do * o).sum(-1) if gate is None else (do * o).sum(-1) * gate
        less = less if dlse is None else less - dlse
        lse = lse.to(dtype)
        for rows in row_chunks(T, max(B * H * S, row_elements), q.device):
            seen = visible(rows)
            hidden = _hidden(seen)
            q_rows, do_rows = _rows(q, rows, HK, dtype) * scale, _rows(do, rows, HK, dtype)
            s = _scores(q_rows, k, seen, softcap)
            slope = None if not softcap else 1.0 - (s / softcap).square_()
            p = s.sub_(_row_values(lse, rows, HK)).exp_().masked_fill_(hidden, 0.0)
            if seen.keys.dtype != torch.bool:
                p *= seen.keys.unsqueeze(2)
            ds = seen.collect(_product(do_rows, v.mT))
            if gate is not None:
                ds *= _row_values(gate, rows, HK)
                do_rows = do_rows * _row_values(gate, rows, HK)
            ds = ds.sub_(_row_values(less, rows, HK)).mul_(p)
            if slope is not None:
                ds *= slope
            ds.masked_fill_(hidden, 0.0)
            dq[:, :, rows] = (_product(ds, finite_k) * scale).flatten(1, 2)
            dk += _sum_rows(ds, _finite(q_rows))
            dv += _sum_rows(seen.deposit(p), _finite(do_rows))
            odd_rows = odd_do[:, :, rows].unflatten(1, (HK, -1)).any(2)
            dv.masked_fill_(_any(seen.reached().mT, odd_rows).unsqueeze(-1), float("nan"))
    return dq, dk, dv


def sink_gate(lse: Tensor, sink_logits: Tensor) -> Tensor:
    """a = sigmoid(lse - sink_logit) [B, H, T]: what a learned sink [H] leaves of o; 0 for a row that sees nothing."""
    gate = torch.sigmoid(lse - sink_logits.to(lse.dtype)[:, None])
    return gate.masked_fill(lse == NEVER, 0.0)


def sink_logits_gradient(do: Tensor, o: Tensor, lse: Tensor, sink_logits: Tensor) -> Tensor:
    """- sum over batch and rows of (1 - a) do . o -> [H] in the compute dtype; o is the output after the sink."""
    dtype = compute_dtype(o.dtype)
    along = (do.to(dtype) * o).sum(-1) * (1.0 - sink_gate(lse.to(dtype), sink_logits))
    return -along.masked_fill(lse == NEVER, 0.0).sum((0, 2))


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64, fp32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def row_chunks(T: int, row_elements: int, device: torch.device) -> Iterator[slice]:
    """Slices of [0, T) so that a chunk has at most the device's budget of elements, one row at least."""
    budget = CHUNK_ELEMENTS.get(device.type, DEFAULT_CHUNK_ELEMENTS)
    step = max(1, budget // max(1, row_elements))
    for start in range(0, T, step):
        yield slice(start, min(T, start + step))


def _rows(x: Tensor, rows: slice, HK: int, dtype: torch.dtype) -> Tensor:
    # [B, H, T, D] -> [B, HK, R, c, D]: the R query heads of a key head side by side, no key is repeated
    return x[:, :, rows].to(dtype).unflatten(1, (HK, -1))


def _row_values(x: Tensor, rows: slice, HK: int) -> Tensor:
    return x[:, :, rows].unflatten(1, (HK, -1)).unsqueeze(-1)


def _product(a: Tensor, b: Tensor) -> Tensor:
    # a [B, HK, R, c, X] times b [B, HK, X, Y] in one batched product
    R, c = a.shape[2:4]
    return (a.flatten(2, 3) @ b).unflatten(2, (R, c))


def _sum_rows(a: Tensor, x: Tensor) -> Tensor:
    # a [B, HK, R, c, S], x [B, HK, R, c, D] -> [B, HK, S, D], summed over rows and query heads
    return a.flatten(2, 3).mT @ x.flatten(2, 3)


def _hidden(seen: Visible) -> Tensor:
    return (seen.keys == 0).unsqueeze(2)


def _scores(q: Tensor, k: Tensor, seen: Visible, softcap: float) -> Tensor:
    # q [B, HK, R, c, D], scaled -> [B, HK, R, c, S], -inf where unseen whatever the key holds
    s = _product(q, k.mT)
    if softcap:
        s = s.div_(softcap).tanh_().mul_(softcap)
    return s.masked_fill_(_hidden(seen), NEVER)


def _finite(x: Tensor) -> Tensor:
    return torch.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0)


def _odd(x: Tensor) -> Tensor:
    # [..., D] -> [...], true where a row is not finite
    return ~torch.isfinite(x).all(-1)


def _any(reached: Tensor, odd: Tensor) -> Tensor:
    # reached [B, G, c, S], odd bool [B, HK, S] -> bool [B, HK, c]: does the row reach an odd one
    reached, odd = reached.to(torch.float32), odd.to(torch.float32)
    if reached.shape[1] == 1:
        return (reached[:, 0] @ odd.mT).mT > 0
    return (reached @ odd.unsqueeze(-1)).squeeze(-1) > 0


def _column(at: Tensor) -> Tensor:
    return at[:, None, None, None, :]


def _only(share: Tensor, x: Tensor) -> Tensor:
    # share * x, 0 where the share is 0 whatever x holds
    return torch.where(share > 0, share * x, 0.0)
