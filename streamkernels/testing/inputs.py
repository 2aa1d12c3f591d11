"""Random inputs for the cases of the table: given strides, fresh memory full of NaN, poisoned keys, sharp logits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..core import spans as build
from ..core.spans import ATTEND, KEPT, MASS, SINK, SKIP, Rule, Spans
from .cases import Case


@dataclass(frozen=True)
class Inputs:
    """The arguments of one `span_attention` call, and gradients to feed its backward."""

    q: Tensor  # [B, H, T, D]
    k: Tensor  # [B, HK, S, D]
    v: Tensor
    spans: Spans
    scale: float
    softcap: float | None
    sink_logits: Tensor | None  # [H]
    do: Tensor  # [B, H, T, D]
    dlse: Tensor  # [B, H, T]

    def to(self, dtype: torch.dtype) -> Inputs:
        """The same values in another floating dtype (lse's gradient: at least fp32)."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        sink_logits = None if self.sink_logits is None else self.sink_logits.to(wide)
        tensors = {name: getattr(self, name).to(dtype) for name in ("q", "k", "v", "do")}
        return replace(self, **tensors, sink_logits=sink_logits, dlse=self.dlse.to(wide))

    def leaves(self) -> tuple[Tensor, ...]:
        """Copies of q, k, v and sink_logits, strides kept, that collect gradients."""
        tensors = [self.q, self.k, self.v] + ([] if self.sink_logits is None else [self.sink_logits])
        return tuple(strided_like(x).requires_grad_() for x in tensors)


def make_inputs(case: Case, device: torch.device | str = "cpu", seed: int = 0) -> Inputs:
    """Inputs of a case; values are drawn on the CPU, so that every device gets the same."""
    random = torch.Generator().manual_seed(seed)
    q, k, v = make_qkv(case, random)
    scale = case.sharp / case.D**0.5
    spans = make_spans(case, random)
    wide = torch.float64 if case.dtype == torch.float64 else torch.float32
    sink_logits = torch.randn(case.H, generator=random, dtype=wide) if case.sink_logits else None
    do = torch.randn(case.B, case.T, case.H, case.D, generator=random).to(case.dtype).transpose(1, 2)
    dlse = torch.randn(case.B, case.H, case.T, generator=random).to(wide)
    softcap = case.softcap or None
    on = [None if x is None else strided_like(x, device) for x in (q, k, v, sink_logits, do, dlse)]
    return Inputs(on[0], on[1], on[2], spans.to(device), scale, softcap, on[3], on[4], on[5])  # type: ignore[arg-type]


def make_qkv(case: Case, random: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v in the case's layout; what lies between their elements is NaN."""
    shapes = [(case.H, case.T), (case.HK, case.S), (case.HK, case.S)]
    if case.layout == "packed_qkv" and case.T == case.S:
        heads = case.H + 2 * case.HK
        row = torch.randn(case.B, case.T, heads, case.D, generator=random).to(case.dtype).transpose(1, 2)
        q, k, v = row.split([case.H, case.HK, case.HK], 1)
        return q, k, v
    out = []
    for heads, length in shapes:
        x = torch.randn(case.B, heads, length, case.D, generator=random).to(case.dtype)
        if case.layout == "bhtd":
            out.append(x)
        elif case.layout == "bthd":
            out.append(x.transpose(1, 2).contiguous().transpose(1, 2))
        else:
            wide = fresh((case.B, length, heads, case.D + 8), case.dtype)[..., : case.D].transpose(1, 2)
            out.append(wide.copy_(x))
    return out[0], out[1], out[2]


def fresh(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """Memory as an op may find it: full of NaN."""
    return torch.full(shape, float("nan"), dtype=dtype, device=device)


def strided_like(x: Tensor, device: torch.device | str | None = None) -> Tensor:
    """A copy with the strides of `x`, NaN between its elements."""
    size = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
    memory = fresh((size,), x.dtype, x.device if device is None else device)
    return memory.as_strided(x.shape, x.stride()).copy_(x.detach())


def spread(x: Tensor, between: int = -7) -> Tensor:
    """The same numbers at every second place of every dimension, garbage between them."""
    wide = x.new_full([2 * n for n in x.shape], between)
    return wide[(slice(None, None, 2),) * x.ndim].copy_(x)


def spread_options(x: Inputs) -> Inputs:
    """The same inputs whose spans and sink logits are `spread`."""
    own: dict[str, Any] = {n: spread(y) if isinstance(y, Tensor) else y for n, y in vars(x.spans).items()}
    logits = None if x.sink_logits is None else spread(x.sink_logits)
    return replace(x, spans=Spans(**own), sink_logits=logits)


def poison(x: Tensor, keys: Tensor, value: float = float("nan")) -> Tensor:
    """A copy of x [B, HK, S, D] with `value` at the keys marked in bool [B, HK or 1, S]."""
    return strided_like(x).masked_fill_(keys.unsqueeze(-1), value)


def make_spans(case: Case, random: torch.Generator) -> Spans:
    """The spans of a case, by its mask's name."""
    B, T, S = case.B, case.T, case.S
    ragged = [max(1, T - 5 * b) for b in range(B)]
    if case.mask == "causal":
        return build.causal(T, B=B)
    if case.mask == "bottom_right":
        return build.bottom_right([T] * B, [S] * B)
    if case.mask == "window":
        return build.sliding_window([T] * B, max(1, T // 3), sinks=min(2, T))
    if case.mask == "packed":
        return build.packed([_words(n, 7) for n in ragged])
    if case.mask == "wait_k":
        return build.wait_k([_words(n - n // 2, 3) for n in ragged], [_words(n // 2, 2) for n in ragged], 2)
    if case.mask in ("mass", "sink", "kept"):
        return _ruled(case, random)
    if case.mask == "classes":
        key_class = torch.randint(0, 3, (B, S), generator=random)
        table = [[ATTEND, MASS, SINK], [ATTEND, SKIP, ATTEND], [SINK, ATTEND, MASS]]
        return build.classes(key_class.tolist(), table, row_class=key_class[:, S - T :].tolist(), sink_key=[0] * B)
    if case.mask == "empty":
        return Spans(torch.tensor([[5, 5], [9, 2]], dtype=torch.int32).expand(B, T, 2, 2).contiguous())
    spans = random_spans(B, T, S, 4, random)
    if case.mask == "outside":
        # what leaves the buffer is clipped, however far it goes
        bounds = spans.bounds.clone()
        bounds[..., 0, 0].masked_fill_(bounds[..., 0, 0] == 0, -(2**31))
        bounds[..., -1, 1].masked_fill_(bounds[..., -1, 1] > S // 2, 2**31 - 1)
        return Spans(bounds)
    return spans


def random_spans(
    B: int, T: int, S: int, N: int, random: torch.Generator, rules: tuple[Rule, ...] = (), empty: float = 0.2
) -> Spans:
    """N sorted disjoint spans per row, some of them empty, and a share `empty` of the rows seeing nothing."""
    cuts = torch.randint(0, S + 1, (B, T, 2 * N), generator=random).sort(-1).values.view(B, T, N, 2)
    cuts[torch.rand(B, T, generator=random) < empty] = 0
    return Spans(cuts.to(torch.int32), rules)


def random_kept(B: int, HK: int, S: int, K: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """kept int32 [B, HK, K] ascending and unique up to kept_count int32 [B, HK], garbage behind it."""
    count = torch.randint(0, min(K, S) + 1, (B, HK), generator=random)
    kept = torch.randint(-3, S + 3, (B, HK, K), generator=random)
    for b in range(B):
        for h in range(HK):
            n = int(count[b, h])
            kept[b, h, :n] = torch.randperm(S, generator=random)[:n].sort().values
    return kept.to(torch.int32), count.to(torch.int32)


def _ruled(case: Case, random: torch.Generator) -> Spans:
    B, T, S = case.B, case.T, case.S
    rules = {"mass": (ATTEND, MASS), "sink": (SINK, ATTEND, MASS, SINK), "kept": (ATTEND, KEPT, MASS, KEPT)}[case.mask]
    bounds = random_spans(B, T, S, len(rules), random).bounds
    if case.mask == "sink":
        return Spans(bounds, rules, sink_key=torch.randint(0, S, (B, len(rules)), generator=random, dtype=torch.int32))
    if case.mask == "kept":
        kept, count = random_kept(B, case.HK, S, S // 2 + 1, random)
        return Spans(bounds, rules, kept=kept, kept_count=count)
    return Spans(bounds, rules)


def _words(tokens: int, most: int) -> list[int]:
    # segments of 1, 2, ... most, 1, ... tokens that add up
    words: list[int] = []
    while tokens > 0:
        words.append(min(tokens, len(words) % most + 1))
        tokens -= words[-1]
    return words
