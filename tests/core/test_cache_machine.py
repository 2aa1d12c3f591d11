"""Random sequences of all operations against lists: keys are where the model says, refusals change nothing."""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from streamkernels.core import segments
from streamkernels.core.cache import PADDING, SOURCE, TARGET, Mark, StreamCache
from streamkernels.core.positions import Rotary, apply_rotary

torch.set_num_threads(1)
D = 8
ROTARY = Rotary.from_theta(D, theta=100.0)


@pytest.fixture(autouse=True)
def small_blocks(fresh_memory_is_nan: None, monkeypatch: pytest.MonkeyPatch) -> None:
    # keys move in blocks, of which small segments would see only one
    monkeypatch.setattr(segments, "BLOCK", 3)


@dataclass
class Token:
    name: int
    position: float
    index: int


@dataclass
class Segment:
    """One segment of one session in one layer, as lists: the committed tokens, and what each slot holds."""

    tokens: list[Token] = field(default_factory=list)
    memory: dict[int, Token] = field(default_factory=dict)
    anchored: int | None = None


@dataclass
class Noted:
    """A mark and what the model knows of it."""

    mark: Mark
    lengths: dict[tuple[int, int, int], int]
    lowest: dict[tuple[int, int, int], int]
    arranged: bool = False


def ring_walk(index: int, capacity: int, sinks: int) -> int:
    """The slot of a stream index by walking: on to the next slot, and from the last one back behind the sinks."""
    at = -1
    for _ in range(index + 1):
        at = at + 1 if at + 1 < capacity else sinks
    return at


class Machine:
    def __init__(self, seed: int, folder: Path) -> None:
        self.draw, self.folder, self.names = random.Random(seed), folder, 0
        bounded = seed % 2 == 1
        window: Any = None
        if bounded:
            window = self.draw.choice([3, (2, 5), (4, None), (None, 1)])
        self.cache = StreamCache(
            layers=2,
            batch=self.draw.randint(1, 3),
            kv_heads=[1, 2],
            head_dim=D,
            dtype=torch.float64,
            device=self.draw.choice(["cpu", ["cpu", "cpu:0"]]),
            capacity=self.draw.choice([1, (2, 5), 7]),
            window=window,
            sinks=self.draw.randint(0, 2) if bounded else 0,
            max_chunk=4,
            rotary=ROTARY,
        )
        self.model = [[[Segment(), Segment()] for _ in range(self.cache.batch)] for _ in range(2)]
        self.marks: list[Noted] = []

    # the model's side

    def slot(self, layer: int, role: int, index: int) -> int:
        if self.cache.windows[role] is None:
            return index
        return ring_walk(index, self.cache.capacity(layer, role), self.cache.sinks)

    def each(self) -> list[tuple[tuple[int, int, int], Segment]]:
        return [
            ((layer, b, role), segment)
            for layer, sessions in enumerate(self.model)
            for b, pair in enumerate(sessions)
            for role, segment in enumerate(pair)
        ]

    def lengths(self) -> dict[tuple[int, int, int], int]:
        return {where: len(segment.tokens) for where, segment in self.each()}

    def window_held(self, length: int, layer: int, role: int, segment: Segment) -> bool:
        """Whether the row that comes next at `length` finds its whole window, itself included, not overwritten."""
        window = self.cache.windows[role]
        if window is None:
            return True
        first = max(self.cache.sinks, length + 1 - window)
        held = all(segment.memory[self.slot(layer, role, i)] is segment.tokens[i] for i in range(first, length))
        # nor may the ring have run over the next row's own place: a kernel could not tell its key from lost history
        following = max(length, self.cache.sinks)
        there = segment.memory.get(self.slot(layer, role, following))
        return held and (there is None or there.index <= following)

    def note_low(self) -> None:
        now = self.lengths()
        for noted in self.marks:
            if not noted.arranged:
                noted.lowest = {where: min(n, now[where]) for where, n in noted.lowest.items()}

    def arranged(self) -> None:
        for noted in self.marks:
            noted.arranged = True

    # what the cache must hold

    def check(self) -> None:
        cache = self.cache
        for (layer, b, role), segment in self.each():
            n = len(segment.tokens)
            assert int(cache.length(layer)[b, role]) == n
            assert cache.longest(role, layer) >= n
            k, v = cache.segment(layer, role)
            window, R = cache.windows[role], k.shape[2] - cache.sinks
            oldest = int(cache._lengths.oldest(layer)[b, role])
            for i, token in enumerate(segment.tokens):
                at = self.slot(layer, role, i)
                held = segment.memory.get(at) is token
                readable = window is None or i < cache.sinks or (i >= n - R and i >= oldest)
                assert held == readable, (layer, b, role, i)
                if held:
                    assert torch.equal(v[b, :, at], value(token, k.shape[1]))
                    assert torch.allclose(k[b, :, at], key(token, k.shape[1]), rtol=0, atol=1e-12)
            assert self.window_held(n, layer, role, segment)

    # the moves

    def write(self, T: int | list[int], roles: list[Any]) -> list[list[tuple[Segment, int, Token]]]:
        """Stage and write rows in every layer, as an op does; returns what a commit appends."""
        written = []
        for layer, role in enumerate(roles):
            n = T[layer] if isinstance(T, list) else T
            staged = self.cache.stage(layer, role, n)
            buffers = ((staged.source_k, staged.source_v), (staged.target_k, staged.target_v))
            new: list[tuple[Segment, int, Token]] = []
            for b in range(self.cache.batch):
                count = [int(staged.length[b, 0]), int(staged.length[b, 1])]
                for t in range(n):
                    r = staged.segment if staged.role is None else int(staged.role[b, t])
                    if r == PADDING:
                        continue
                    self.names += 1
                    token, at = Token(self.names, float(count[r]), count[r]), self.slot(layer, r, count[r])
                    k, v = buffers[r]
                    k[b, :, at], v[b, :, at] = key(token, k.shape[1]), value(token, k.shape[1])
                    segment = self.model[layer][b][r]
                    segment.memory[at] = token
                    new.append((segment, r, token))
                    count[r] += 1
            written.append(new)
        return written

    def roles(self, T: int) -> Any:
        if self.draw.random() < 0.3:
            return self.draw.choice([SOURCE, TARGET])
        values = [[self.draw.choice([SOURCE, TARGET, PADDING]) for _ in range(T)] for _ in range(self.cache.batch)]
        return torch.tensor(values, dtype=torch.int8).reshape(self.cache.batch, T)

    def step(self) -> None:
        T = self.draw.randint(0, 4)
        role = self.roles(T)
        if self.draw.random() < 0.2:
            self.write(T, [role, role])
            if self.draw.random() < 0.5:
                self.cache.discard()
        lengths: Any = T
        roles = [role, role]
        if self.draw.random() < 0.2:
            # a pruned layer stages fewer rows
            lengths = [T, self.draw.randint(0, T)]
            roles = [role, role if isinstance(role, int) else role[:, : lengths[1]].contiguous()]
        written = self.write(lengths, roles)
        if self.draw.random() < 0.2:
            self.cache.discard()
        else:
            self.cache.commit()
            for new in written:
                for segment, _, token in new:
                    segment.tokens.append(token)

    def pop(self) -> None:
        role = self.draw.choice([SOURCE, TARGET])
        n = [self.draw.choice([0, 0, 1, 1, 2, 5]) for _ in range(self.cache.batch)]
        fits = all(
            n[b] == 0 or (n[b] <= len(s.tokens) and self.window_held(len(s.tokens) - n[b], layer, role, s))
            for (layer, b, r), s in self.each()
            if r == role
        )
        if self.attempt(fits, ValueError, lambda: self.cache.pop(n[0] if len(set(n)) == 1 else n, role)):
            for (_, b, r), segment in self.each():
                if r == role and n[b]:
                    del segment.tokens[-n[b] :]
            self.note_low()

    def mark(self) -> None:
        now = self.lengths()
        self.marks = [*self.marks[-2:], Noted(self.cache.mark(), now, dict(now))]

    def rollback(self) -> None:
        if not self.marks:
            return
        noted = self.draw.choice(self.marks)
        intact = not noted.arranged and all(noted.lowest[w] >= n for w, n in noted.lengths.items())
        staged = intact and self.draw.random() < 0.3
        if staged:
            self.write(2, [TARGET, TARGET])
        fits = intact and all(
            noted.lengths[layer, b, role] == len(s.tokens)
            or self.window_held(noted.lengths[layer, b, role], layer, role, s)
            for (layer, b, role), s in self.each()
        )
        if self.attempt(fits, ValueError if intact else RuntimeError, lambda: self.cache.rollback(noted.mark)):
            for where, segment in self.each():
                del segment.tokens[noted.lengths[where] :]
            self.note_low()
        self.cache.discard()

    def evict(self) -> None:
        role, layer = self.draw.choice([SOURCE, TARGET]), self.draw.choice([None, 0, 1])
        layers = [0, 1] if layer is None else [layer]
        longest = max(len(s.tokens) for (i, _, r), s in self.each() if r == role and i in layers)
        begin = [self.draw.randint(0, longest) for _ in range(self.cache.batch)]
        end = [self.draw.randint(first, longest) for first in begin]
        if self.draw.random() < 0.5:
            begin, end = [begin[0]] * len(begin), [end[0]] * len(end)
        arguments: Any = (begin[0], end[0]) if len(set(begin)) == len(set(end)) == 1 else (begin, end)
        endless = self.cache.windows[role] is None
        if self.attempt(endless, NotImplementedError, lambda: self.cache.evict(*arguments, role, layer)):
            self.keep_only(role, layers, [lambda i, b=b: not begin[b] <= i < end[b] for b in range(len(begin))])

    def keep(self) -> None:
        role, layer, B = self.draw.choice([SOURCE, TARGET]), self.draw.choice([None, 0, 1]), self.cache.batch
        layers = [0, 1] if layer is None else [layer]
        least = [min(len(self.model[i][b][role].tokens) for i in layers) for b in range(B)]
        lists = [sorted(self.draw.sample(range(n), self.draw.randint(0, n))) for n in least]
        K = max(map(len, lists))
        index = torch.tensor([row + [self.draw.choice([-1, 0, 10**6])] * (K - len(row)) for row in lists])
        index, count = index.reshape(B, K).to(torch.int64), torch.tensor([len(row) for row in lists])
        endless = self.cache.windows[role] is None
        if self.attempt(endless, NotImplementedError, lambda: self.cache.keep(index, count, role, layer)):
            self.keep_only(role, layers, [lambda i, row=row: i in row for row in lists])

    def keep_only(self, role: int, layers: list[int], wanted: list[Any]) -> None:
        for (layer, b, r), segment in self.each():
            if r == role and layer in layers:
                segment.tokens = [token for i, token in enumerate(segment.tokens) if wanted[b](i)]
                segment.memory = dict(enumerate(segment.tokens))
        self.arranged()

    def reanchor(self) -> None:
        role = self.draw.choice([SOURCE, TARGET])
        delta = [self.draw.choice([0.0, 0.5, -7.0, 1e6]) for _ in range(self.cache.batch)]
        window, sinks = self.cache.windows[role], self.cache.sinks
        begin = self.draw.choice([None, 0, 1])
        first = begin if begin is not None else (0 if window is None else sinks)
        ready = window is None or all(
            not delta[b] or s.anchored is None or len(s.tokens) - s.anchored >= window
            for (_, b, r), s in self.each()
            if r == role
        )
        if self.attempt(ready, RuntimeError, lambda: self.cache.reanchor(delta, role, begin=begin)):
            for (layer, b, r), segment in self.each():
                if r == role and delta[b]:
                    segment.anchored = len(segment.tokens)
                    for i, token in enumerate(segment.tokens):
                        at = self.slot(layer, role, i)
                        if i >= first and segment.memory.get(at) is token:
                            segment.tokens[i] = segment.memory[at] = Token(token.name, token.position + delta[b], i)
            self.arranged()

    def reset(self) -> None:
        row = self.draw.choice([None, *range(self.cache.batch)])
        self.cache.reset(row)
        for layer in range(2):
            for b in range(self.cache.batch):
                if row in (None, b):
                    self.model[layer][b] = [Segment(), Segment()]
        self.arranged()

    def take(self) -> None:
        fresh = self.draw.random() < 0.5
        B = self.cache.batch
        rows = [self.draw.randrange(B) for _ in range(self.draw.randint(1, 3) if fresh else B)]
        given: Any = torch.tensor(rows) if self.draw.random() < 0.5 else rows
        (self.cache.select if fresh else self.cache.reorder)(given)
        self.model = [[copy.deepcopy(sessions[row]) for row in rows] for sessions in self.model]
        self.arranged()

    def fork(self) -> None:
        before, old = snapshot(self.cache), self.cache
        self.cache = old.fork()
        for layer in range(2):
            for role in (SOURCE, TARGET):
                for buffer in (*old.segment(layer, role), old.length(layer)):
                    buffer.fill_(7)
        self.marks = []
        assert len(before) == len(snapshot(old))

    def disk(self) -> None:
        path = self.folder / "cache.safetensors"
        self.cache.save(path)
        self.cache = StreamCache.load(path, like=self.cache)
        self.marks = []

    def attempt(self, fits: bool, error: type[Exception], move: Any) -> bool:
        """Make a move that must succeed, or one that must be refused and change nothing."""
        if fits:
            move()
            return True
        before = snapshot(self.cache)
        with pytest.raises(error):
            move()
        assert snapshot(self.cache) == before
        return False

    def run(self, moves: int) -> None:
        choices = [self.step] * 12 + [self.pop] * 4 + [self.mark, self.rollback] * 2
        choices += [self.evict, self.keep, self.reanchor, self.reanchor, self.reset, self.take, self.fork, self.disk]
        for _ in range(moves):
            self.draw.choice(choices)()
            self.check()


def key(token: Token, heads: int) -> Tensor:
    base = torch.sin(token.name * torch.arange(1.0, heads * D + 1, dtype=torch.float64)).reshape(1, heads, 1, D)
    cos, sin = ROTARY.cos_sin(torch.tensor([[token.position]], dtype=torch.float64), dtype=torch.float64)
    return apply_rotary(base, cos, sin)[0, :, 0]


def value(token: Token, heads: int) -> Tensor:
    return torch.full((heads, D), float(token.name), dtype=torch.float64)


def snapshot(cache: StreamCache) -> list[Any]:
    """Everything that a caller can see of a cache, as bytes, so that NaN equals NaN."""
    seen: list[Any] = [cache.epoch, cache.batch, cache.longest(SOURCE), cache.status.tolist()]
    for layer in range(cache.layers):
        tensors = [*cache.segment(layer, SOURCE), *cache.segment(layer, TARGET), cache.length(layer)]
        seen += [cache._step.rows[layer], cache._lengths.oldest(layer).tolist()]
        seen += [(t.data_ptr(), list(t.shape), t.contiguous().view(torch.uint8).numpy().tobytes()) for t in tensors]
    return seen


@pytest.mark.parametrize("seed", range(16))
def test_any_sequence_of_operations_is_what_lists_would_hold(seed: int, tmp_path: Path) -> None:
    Machine(seed, tmp_path).run(60)
