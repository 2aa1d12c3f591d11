"""The promise of the project: however a stream is cut into calls, it gives what one forward over all of it gives.

Random sessions are fed through `incremental_prefill` in random chunks that mix reading and writing, with padding,
discards, rollbacks, pops, resets and forks in between, and every output row is compared with `span_attention` over the
buffer [source | target] under the spans that `core.spans` declares. fp64, 1e-10. Memory that was never written holds
NaN.
"""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from streamkernels.core import spans as build
from streamkernels.core.cache import SOURCE, TARGET, StreamCache
from streamkernels.core.positions import Rotary
from streamkernels.core.spans import Spans
from streamkernels.ops.incremental_prefill import incremental_prefill
from streamkernels.ops.span_attention import span_attention
from streamkernels.testing.compare import assert_exact, influence

from .streams import NAN, Options, Sessions, advance, described, draw_chunk, draw_limits, draw_options, poison


@pytest.fixture(autouse=True)
def fresh_memory_is_nan():
    torch.set_num_threads(1)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("seed", range(24))
def test_any_schedule_gives_the_one_shot_result(seed):
    rng = random.Random(seed)
    B, layers, pruned = rng.randint(1, 3), rng.randint(1, 3), seed % 3 == 0
    sources = [rng.randint(0, 11) for _ in range(B)]
    kind = rng.choice(["wait-k", "monotone", "any"])
    limits = [draw_limits(rng, s, rng.randint(0, 9), kind) for s in sources]
    stack = []
    for layer in range(layers):
        HK = rng.choice([1, 2])
        H, D = HK * rng.choice([1, 2, 3]), rng.choice([8, 16])
        kept = None
        if pruned and layer:
            kept = [[rng.random() < 0.7 for _ in range(s + len(rows))] for s, rows in zip(sources, limits, strict=True)]
        stack.append(Sessions(rng, sources, limits, H, HK, D, draw_options(rng, H, D), kept))
    cache = StreamCache(
        layers=layers, batch=B, dtype=torch.float64, device="cpu", capacity=rng.choice([1, 4, (16, 2)]),
        kv_heads=[s.shape[1] for s in stack], head_dim=[s.shape[2] for s in stack],
    )  # fmt: skip
    most = rng.choice([1, 3, 17])
    done = [(0, 0)] * B
    marks = [(cache.mark(), done)]
    goal = [(s, len(rows)) for s, rows in zip(sources, limits, strict=True)]
    happened = set()
    for step in range(400):
        if done == goal and (step > 25 or sum(map(sum, goal)) == 0):
            break
        plan = draw_chunk(rng, done, sources, limits, most)
        if not plan[0]:
            plan = [[None]] * B
        for layer, sessions in enumerate(stack):
            sessions.call(cache, layer, rng, plan)
        what = rng.choice(["commit"] * 8 + ["discard", "rollback", "pop", "reset", "fork"])
        happened.add(what)
        if what in ("discard", "fork"):  # a fork leaves staged rows behind
            cache.discard()
            cache = cache.fork() if what == "fork" else cache
            marks = marks if what == "discard" else [(cache.mark(), done)]
        else:
            cache.commit()
            done = advance(done, plan, sources)
            marks.append((cache.mark(), done))
        if what == "rollback":
            mark, done = rng.choice(marks)
            cache.rollback(mark)
            marks = [(mark, done)]
        if what == "reset" and step < 25:
            b = rng.randrange(B)
            cache.reset(b)
            done = [(0, 0) if i == b else rw for i, rw in enumerate(done)]
            marks = [(cache.mark(), done)]
        if what == "pop" and not pruned and step < 25:
            segment = rng.choice([SOURCE, TARGET])
            n = [rng.randint(0, min(3, rw[segment])) for rw in done]
            cache.pop(n, segment)
            done = [(r - x, w) if segment == SOURCE else (r, w - x) for (r, w), x in zip(done, n, strict=True)]
            marks = [(cache.mark(), done)]
        if rng.random() < 0.5:
            poison(cache)
    assert done == goal and "commit" in happened
    for layer, sessions in enumerate(stack):
        want = [[sum(m[:s]), sum(m[s:])] for m, s in zip(sessions.kept, sources, strict=True)]
        assert cache.length(layer).tolist() == want


@pytest.mark.parametrize("chunk", [1, 3, 17, 63])
def test_wait_k_in_any_chunking(chunk):
    """Words of several tokens: read what the schedule asks for, write what it allows, in chunks of any size."""
    rng = random.Random(chunk)
    source_words, target_words = [5, 1, 2, 1, 3, 2, 4, 1], [3, 2, 1, 2, 2, 3]
    limits = [build.wait_k_limits(source_words, target_words, k) for k in (2, 5)]
    sources = [sum(source_words)] * 2
    sessions = Sessions(rng, sources, limits, 4, 2, 16, Options(rotary=Rotary.from_theta(16)))
    spans = build.wait_k([source_words] * 2, [target_words] * 2, [2, 5])
    q, k = sessions.rotated()
    assert_exact("declared", sessions.expected, span_attention(q, k, sessions.v, spans))
    cache = StreamCache(layers=1, batch=2, kv_heads=2, head_dim=16, dtype=torch.float64, device="cpu", capacity=1)
    done = [(0, 0)] * 2
    while done != [(s, len(rows)) for s, rows in zip(sources, limits, strict=True)]:
        plan = []
        for (read, written), s, rows in zip(done, sources, limits, strict=True):
            reads = list(range(read, min(s, read + chunk)))
            writes = [s + j for j in range(written, len(rows)) if rows[j] <= read + len(reads)][:chunk]
            plan.append(writes + reads)  # the targets first: they see source rows placed after them
        T = max(map(len, plan))
        plan = [chunk_rows + [None] * (T - len(chunk_rows)) for chunk_rows in plan]
        sessions.call(cache, 0, rng, plan)
        cache.commit()
        done = advance(done, plan, sources)


def whole_spans(rows: list[list[list[tuple[int, int]]]], n: int) -> Spans:
    """Spans over a buffer of n keys from up to four intervals per row and session."""
    bounds = torch.zeros(len(rows), max(map(len, rows)), 4, 2, dtype=torch.int32)
    for b, session in enumerate(rows):
        for t, intervals in enumerate(session):
            for slot, (begin, end) in enumerate(intervals):
                bounds[b, t, slot] = torch.tensor([begin, max(begin, end)])
    return Spans(bounds).validate(n)


def seen(begin: int, end: int, sinks: int, offset: int, oldest: int = 0) -> list[tuple[int, int]]:
    """Two disjoint intervals: [0, sinks) and [begin, end) behind `oldest`, clipped to end and moved by offset."""
    first = min(sinks, end)
    return [(offset, offset + first), (offset + min(max(begin, first, oldest), end), offset + end)]


@pytest.mark.parametrize("seed", range(6))
def test_begins_and_sinks(seed):
    """Every row with begins of its own, source rows too, and keys [0, sinks) besides."""
    rng = random.Random(seed)
    S, T, sinks = 13, 9, [(0, 0), (2, 0), (3, 1), 2, (0, 4), 1][seed]
    pair = sinks if isinstance(sinks, tuple) else (sinks, sinks)
    limits = sorted(rng.randint(1, S) for _ in range(T))
    sessions = Sessions(rng, [S], [limits], 2, 1, 8, Options())
    begins = torch.tensor([[[rng.randint(-2, S) for _ in range(S + T)] for _ in range(2)]], dtype=torch.int32)[0]
    rows = []
    for i in range(S + T):
        b = [max(0, x) for x in begins[:, i].tolist()]
        if i < S:
            rows.append(seen(b[0], i + 1, pair[0], 0))
        else:
            rows.append(seen(b[0], limits[i - S], pair[0], 0) + seen(b[1], i - S + 1, pair[1], S))
    spans = whole_spans([rows], S + T)
    o, lse = span_attention(sessions.q, sessions.k, sessions.v, spans, return_lse=True)
    assert (lse == -torch.inf).any() or seed  # without sinks some begins lie behind the end
    cache = StreamCache(layers=1, batch=1, kv_heads=1, head_dim=8, dtype=torch.float64, device="cpu", capacity=2)
    done = [(0, 0)]
    while done != [(S, T)]:
        chunk = [row for row in draw_chunk(rng, done, [S], [limits], 4)[0] if row is not None]
        if not chunk:
            continue
        got, got_lse = incremental_prefill(
            *(x[:, :, chunk] for x in (sessions.q, sessions.k, sessions.v)), None, None, cache, 0,
            **described(chunk, S, limits), source_begin=begins[:1, chunk], target_begin=begins[1:, chunk], sinks=sinks,
            return_lse=True,
        )  # fmt: skip
        assert_exact("o", got, o[:, :, chunk])
        assert_exact("lse", got_lse, lse[:, :, chunk])
        cache.commit()
        done = advance(done, [chunk], [S])


@pytest.mark.parametrize("seed", range(10))
def test_a_bounded_cache_shows_its_sinks_and_its_window(seed):
    """Rings that wrap many times, with pops, discards and rollbacks: a row sees what is still held of its window."""
    rng = random.Random(seed)
    sinks, most = rng.randint(0, 3), rng.choice([1, 2, 5])
    windows = [(4, 3), (5, None), (None, 2), (1, 1), (7, 7)][seed % 5]
    capacity = rng.choice([1, (13, 9)])
    S, T = 40, 31
    limits = sorted(rng.randint(0, S) for _ in range(T))
    sessions = Sessions(rng, [S], [limits], 4, 2, 8, Options())
    cache = StreamCache(
        layers=1, batch=1, kv_heads=2, head_dim=8, dtype=torch.float64, device="cpu", capacity=capacity,
        window=windows, sinks=sinks, max_chunk=2 * most,
    )  # fmt: skip
    done, high = [(0, 0)], [0, 0]  # high: the largest number of rows that were ever written
    wrapped = False
    for step in range(400):
        if done == [(S, T)] and step > 40:
            break
        chunk = [row for row in draw_chunk(rng, done, [S], [limits], most)[0] if row is not None] or [None]
        after = advance(done, [chunk], [S])
        high = [max(h, n) for h, n in zip(high, after[0], strict=True)]
        rings = [cache.capacity(0, r) - sinks for r in (0, 1)]
        rows = []
        for row in chunk:
            ends = (0, 0) if row is None else (row + 1, 0) if row < S else (limits[row - S], row - S + 1)
            intervals = []
            for r, end in enumerate(ends):
                w, offset = windows[r], (0, S)[r]
                oldest = 0 if w is None else high[r] - rings[r]
                intervals += seen(0 if w is None else end - w, end, 0 if w is None else sinks, offset, oldest)
                wrapped |= w is not None and oldest > sinks
            rows.append(intervals)
        spans = whole_spans([rows], S + T)
        at = [0 if row is None else row for row in chunk]
        o, lse = span_attention(sessions.q[:, :, at], sessions.k, sessions.v, spans, return_lse=True)
        got, got_lse = incremental_prefill(
            *(x[:, :, at] for x in (sessions.q, sessions.k, sessions.v)), None, None, cache, 0,
            **described(chunk, S, limits), return_lse=True,
        )  # fmt: skip
        assert_exact("o", got, o)
        assert_exact("lse", got_lse, lse)
        if rng.random() < 0.15:
            cache.discard()
            continue
        mark = cache.mark()
        before, done = done, after
        cache.commit()
        what = rng.choice(["", "", "", "rollback", "pop"]) if step < 40 else ""
        try:
            if what == "rollback":
                cache.rollback(mark)
                done = before
            if what == "pop" and done[0][TARGET]:
                cache.pop(1)
                done = [(done[0][0], done[0][1] - 1)]
        except (ValueError, RuntimeError):
            pass  # the ring no longer holds the window of an earlier row
    assert done == [(S, T)] and wrapped


def test_a_window_that_the_ring_holds_does_not_depend_on_the_chunking():
    """Causal rows of one segment under window and sinks, against `sliding_window` over the whole stream."""
    n, W, sinks = 67, 6, 2
    sessions = Sessions(random.Random(0), [0], [[0] * n], 2, 2, 8, Options())
    want = span_attention(sessions.q, sessions.k, sessions.v, build.sliding_window(n, W, sinks=sinks))
    for chunk in (1, 4, 5):
        cache = StreamCache(
            layers=1, batch=1, kv_heads=2, head_dim=8, dtype=torch.float64, device="cpu", capacity=1,
            window=W, sinks=sinks, max_chunk=chunk,
        )  # fmt: skip
        assert cache.capacity(0, TARGET) == sinks + W + chunk - 1
        for at in range(0, n, chunk):
            rows = slice(at, min(n, at + chunk))
            part = [x[:, :, rows] for x in (sessions.q, sessions.k, sessions.v)]
            assert_exact("o", incremental_prefill(*part, None, None, cache, 0, role=TARGET), want[:, :, rows])
            cache.commit()


@pytest.mark.parametrize("seed", range(4))
def test_influence_equals_the_declared_spans(seed):
    """Token j changes row i through the incremental path exactly where the spans say so, NaN or not."""
    rng = random.Random(seed)
    S, T, D = 9, 7, 8
    limits = [draw_limits(rng, S, T, ["wait-k", "monotone", "any", "monotone"][seed])]
    g = torch.Generator().manual_seed(seed)
    weights = torch.randn(3, D, D, generator=g, dtype=torch.float64) / D**0.5
    x = torch.randn(1, S + T, D, generator=g, dtype=torch.float64)
    schedule, done = [], [(0, 0)]
    while done != [(S, T)]:
        chunk = [row for row in draw_chunk(rng, done, [S], limits, 4)[0] if row is not None]
        schedule += [chunk] if chunk else []
        done = advance(done, [chunk], [S])

    def incremental(x: Tensor) -> Tensor:
        cache = StreamCache(layers=1, batch=1, kv_heads=1, head_dim=D, dtype=torch.float64, device="cpu", capacity=1)
        out = torch.zeros(1, S + T, D, dtype=torch.float64)
        for chunk in schedule:
            q, k, v = (x[:, None, chunk] @ w for w in weights)
            o = incremental_prefill(q, k, v, None, None, cache, 0, **described(chunk, S, limits[0]))
            out[:, chunk] = o[:, 0]
            cache.commit()
            poison(cache)
        return out

    declared = build.from_limits(limits, S).visible(S + T)[:, 0]
    assert torch.equal(influence(incremental, x), declared)
    # a token that is NaN ruins exactly the rows that see it
    for j in (0, S - 1, S, S + T - 1):
        bad = x.clone()
        bad[:, j] = NAN
        assert torch.equal(incremental(bad).isnan().any(-1), declared[:, :, j])
