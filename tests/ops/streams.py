"""Random streams in random calls, and what one forward over all of them would be given."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from streamkernels.core import spans as build
from streamkernels.core.cache import PADDING, SOURCE, TARGET, StreamCache
from streamkernels.core.positions import Rotary, apply_rotary
from streamkernels.ops.incremental_prefill import incremental_prefill
from streamkernels.ops.span_attention import span_attention
from streamkernels.testing.compare import assert_exact

NAN = float("nan")
FAR = 2**31 - 1


@dataclass(frozen=True)
class Options:
    """What stays the same in all calls of a stream."""

    rotary: Rotary | None = None
    softcap: float | None = None
    sink_logits: Tensor | None = None
    scale: float | None = None
    interleaved: bool = False

    def attention(self) -> dict:
        return {"softcap": self.softcap, "sink_logits": self.sink_logits, "scale": self.scale}


class Sessions:
    """B sessions of one layer: each a buffer [source | target] of q, k, v, its angles, and the limits of its target.

    `kept[b]` marks the rows that the layer has at all: a pruned layer has fewer, and its stream counts only those.
    """

    def __init__(self, rng, sources, limits, H, HK, D, options, kept=None):
        g = torch.Generator().manual_seed(rng.randrange(2**31))
        self.sources, self.options, self.shape = sources, options, (H, HK, D)
        lengths = [s + len(rows) for s, rows in zip(sources, limits, strict=True)]
        n = max(lengths)
        draw = lambda heads: torch.randn(len(sources), heads, n, D, generator=g, dtype=torch.float64)  # noqa: E731
        self.q, self.k, self.v = draw(H), draw(HK), draw(HK)
        self.kept = kept or [[True] * length for length in lengths]
        # position = index for the source, phi + index for the target: both start near 0, as group positions do
        ids = torch.zeros(len(sources), n, dtype=torch.float64)
        for b, (s, length) in enumerate(zip(sources, lengths, strict=True)):
            ids[b, :s] = torch.arange(s)
            ids[b, s:length] = torch.arange(length - s) + 0.5
        self.cos = self.sin = None
        if options.rotary is not None:
            self.cos, self.sin = options.rotary.cos_sin(ids, dtype=torch.float64)
        # what each target row sees of this layer's source rows
        self.limits = [[sum(mine[:one]) for one in rows] for mine, rows in zip(self.kept, limits, strict=True)]
        self.expected, self.expected_lse = self._one_shot()

    def rotated(self) -> tuple[Tensor, Tensor]:
        if self.cos is None:
            return self.q, self.k
        return tuple(apply_rotary(x, self.cos, self.sin, self.options.interleaved) for x in (self.q, self.k))

    def _one_shot(self) -> tuple[Tensor, Tensor]:
        """o and lse of every row of the buffers; rows that the layer does not have stay NaN."""
        B, H, n, D = self.q.shape
        q, k = self.rotated()
        o, lse = torch.full((B, H, n, D), NAN, dtype=torch.float64), torch.full((B, H, n), NAN, dtype=torch.float64)
        for b, (s, mine, limits) in enumerate(zip(self.sources, self.kept, self.limits, strict=True)):
            have = [i for i, there in enumerate(mine) if there]
            inputs = [x[b : b + 1, :, have] for x in (q, k, self.v)]
            limits = [one for one, there in zip(limits, mine[s:], strict=True) if there]
            spans = build.from_limits(limits, sum(mine[:s]))
            o[b, :, have], lse[b, :, have] = (
                x[0] for x in span_attention(*inputs, spans, return_lse=True, **self.options.attention())
            )
        return o, lse

    def call(self, cache: StreamCache, layer: int, rng: random.Random, plan: list[list[int | None]]) -> None:
        """Feed one chunk, and compare its output: `plan[b][t]` is a row of session b's buffer, or None for padding."""
        B, T = len(plan), len(plan[0])
        role = torch.full((B, T), PADDING, dtype=torch.int8)
        limit = torch.tensor([[rng.choice([-5, 0, 3, FAR]) for _ in range(T)] for _ in range(B)], dtype=torch.int32)
        rows = torch.zeros(B, T, dtype=torch.long)
        for b, chunk in enumerate(plan):
            for t, row in enumerate(chunk):
                if row is not None and self.kept[b][row]:
                    role[b, t] = SOURCE if row < self.sources[b] else TARGET
                    rows[b, t] = row
                    if role[b, t] == TARGET:
                        limit[b, t] = self.limits[b][row - self.sources[b]]
        unused = (role == PADDING)[:, None, :, None]
        q, k, v = (
            x.gather(2, rows[:, None, :, None].expand(B, x.shape[1], T, x.shape[3])).masked_fill(unused, NAN)
            for x in (self.q, self.k, self.v)
        )
        cos = sin = None
        if self.cos is not None:
            cos, sin = (x.gather(1, rows[:, :, None].expand(B, T, x.shape[2])) for x in (self.cos, self.sin))
        roles = set(role.flatten().tolist())
        whole = roles.pop() if len(roles) == 1 else PADDING
        o, lse = incremental_prefill(
            q, k, v, cos, sin, cache, layer,
            role=role if whole == PADDING or rng.random() < 0.5 else whole,
            source_limit=limit, interleaved=self.options.interleaved, return_lse=True, **self.options.attention(),
        )  # fmt: skip
        for b in range(B):
            real = role[b] != PADDING
            assert_exact(f"o of session {b}", o[b][:, real], self.expected[b][:, rows[b, real]])
            assert_exact(f"lse of session {b}", lse[b][:, real], self.expected_lse[b][:, rows[b, real]])
            assert (o[b][:, ~real] == 0).all() and (lse[b][:, ~real] == -torch.inf).all()


def draw_chunk(rng, done, sources, limits, most):
    """Per session some of the next source rows and target rows that these allow, in any order, with padding."""
    plan = []
    for (read, written), s, rows in zip(done, sources, limits, strict=True):
        reads = [read + i for i in range(rng.randint(0, min(most, s - read)))]
        writes = []
        while written + len(writes) < len(rows) and rows[written + len(writes)] <= read + len(reads):
            if len(writes) == most or rng.random() < 0.3:
                break
            writes.append(s + written + len(writes))
        chunk = []
        while reads or writes:
            chunk.append((reads if not writes or (reads and rng.random() < 0.5) else writes).pop(0))
            if rng.random() < 0.15:
                chunk.append(None)
        plan.append(chunk)
    T = max(map(len, plan))
    return [chunk + [None] * (T - len(chunk)) for chunk in plan]


def described(chunk: list[int | None], S: int, limits: list[int]) -> dict[str, Tensor]:
    """role and source_limit of one session's chunk of buffer rows; None is padding."""
    role = [PADDING if row is None else SOURCE if row < S else TARGET for row in chunk]
    limit = [limits[row - S] if r == TARGET else 0 for row, r in zip(chunk, role, strict=True)]
    return {"role": torch.tensor([role], dtype=torch.int8), "source_limit": torch.tensor([limit], dtype=torch.int32)}


def advance(done, plan, sources):
    """(read, written) of every session after a chunk."""
    after = []
    for (read, written), chunk, s in zip(done, plan, sources, strict=True):
        rows = [row for row in chunk if row is not None]
        after.append((read + sum(row < s for row in rows), written + sum(row >= s for row in rows)))
    return after


def poison(cache: StreamCache) -> None:
    """NaN in every slot that no committed row uses."""
    for layer in range(cache.layers):
        for segment in (SOURCE, TARGET):
            for buffer in cache.segment(layer, segment):
                for b, n in enumerate(cache.length(layer)[:, segment].tolist()):
                    buffer[b, :, n:] = NAN


def draw_options(rng: random.Random, H: int, D: int) -> Options:
    interleaved = rng.random() < 0.4
    rotary = Rotary.from_theta(D, 100.0, rng.choice([D, D - 4, 4]), interleaved=interleaved)
    return Options(
        rotary=None if rng.random() < 0.2 else rotary,
        softcap=rng.choice([None, None, 1.5]),
        sink_logits=torch.linspace(-1, 2, H, dtype=torch.float64) if rng.random() < 0.3 else None,
        scale=rng.choice([None, 0.7]),
        interleaved=interleaved,
    )


def draw_limits(rng: random.Random, source: int, target: int, kind: str) -> list[int]:
    if kind == "wait-k":
        words, written = [1] * source, [1] * target
        return build.wait_k_limits(words, written, rng.randint(1, 3)) if target else []
    limits = [rng.randint(0, source) for _ in range(target)]
    return sorted(limits) if kind == "monotone" else limits
