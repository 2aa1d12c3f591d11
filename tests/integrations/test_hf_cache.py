"""`GroupedCache`: any schedule of reads and writes through a patched model equals one forward under the same spans."""

from __future__ import annotations

import random

import pytest
import torch

import streamkernels as sk
from streamkernels import PADDING, SOURCE, TARGET
from streamkernels.integrations.transformers import GroupedCache
from streamkernels.testing.compare import EXACT


def poison(cache):
    """NaN in every slot, so that a slot that is read before it is written shows."""
    for layer in range(cache.stream.layers):
        for role in (SOURCE, TARGET):
            for buffer in cache.stream.segment(layer, role):
                buffer.fill_(float("nan"))


class Row:
    """One session of the batch: its tokens, limits, and what has been fed of them."""

    def __init__(self, rng, S, T):
        self.source, self.target = [rng.randrange(2, 67) for _ in range(S)], [rng.randrange(2, 67) for _ in range(T)]
        self.limits = sorted(rng.randint(0, S) for _ in range(T))
        self.read, self.written = 0, 0

    def chunk(self, rng):
        """Rows (token, position, role, limit) of the next call: some source, and target rows whose source is there."""
        s = min(rng.randint(0, 3), len(self.source) - self.read)
        rows = [(self.source[i], i, SOURCE, 0) for i in range(self.read, self.read + s)]
        self.read += s
        for _ in range(rng.randint(0, 3)):
            j = self.written
            if j < len(self.target) and self.limits[j] <= self.read:
                rows.insert(
                    rng.randint(0, len(rows)) if not any(r[2] == TARGET for r in rows) else len(rows),
                    (self.target[j], j, TARGET, self.limits[j]),
                )
                self.written += 1
        return rows

    @property
    def done(self):
        return self.read == len(self.source) and self.written == len(self.target)


def call(model, cache, chunks, offset=0, padding_mask=False):
    """One forward over ragged chunks; returns the logits per row and chunk entry."""
    width = max(map(len, chunks))
    filled = [rows + [(5, 0, PADDING, 0)] * (width - len(rows)) for rows in chunks]
    ids, positions, role, limit = (torch.tensor([[row[i] for row in rows] for rows in filled]) for i in range(4))
    inputs = {"position_ids": torch.where(role == TARGET, positions + offset, positions), "source_limit": limit.int()}
    if padding_mask:
        inputs |= {"attention_mask": (role != PADDING).long(), "role": role.clamp(min=0).to(torch.int8)}
    else:
        inputs |= {"role": role.to(torch.int8)}
    logits = model(ids, past_key_values=cache, **inputs).logits
    return [logits[b, : len(rows)] for b, rows in enumerate(chunks)]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, EXACT), (torch.float32, 1e-5)], ids=["fp64", "fp32"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("sizes", [[(11, 9)], [(11, 9), (4, 17)]], ids=["one", "ragged"])
def test_any_schedule_equals_one_shot(tiny, family, sizes, dtype, tolerance, close, one_shot):
    model = tiny(family, dtype=dtype)
    for seed in range(3):
        rng = random.Random(seed)
        rows, offset = [Row(rng, S, T) for S, T in sizes], rng.choice([0, 7, 2.5])
        want = [one_shot(model, r.source, r.target, r.limits, offset) for r in rows]
        got = [([], []) for _ in rows]
        cache = GroupedCache.for_model(model, len(rows), capacity=(3, 2))
        with sk.patch(model), torch.no_grad():
            poison(cache)
            while not all(r.done for r in rows):
                before = [(r.read, r.written) for r in rows]
                chunks = [r.chunk(rng) for r in rows]
                if not any(chunks):
                    continue
                # with small odds a step is thrown away, or done and rolled back, and done again
                accident, mark = rng.random(), cache.stream.mark()
                if accident < 0.15:
                    call(model, cache, chunks, offset)
                    cache.discard()
                elif accident < 0.3:
                    call(model, cache, chunks, offset)
                    cache.commit()
                    cache.stream.rollback(mark)
                logits = call(model, cache, chunks, offset, padding_mask=rng.random() < 0.5)
                cache.commit()
                for b, chunk in enumerate(chunks):
                    for row, out in zip(chunk, logits[b], strict=True):
                        got[b][row[2]].append(out)
                assert (
                    [tuple(x) for x in cache.stream.length(0).tolist()] == [(r.read, r.written) for r in rows] != before
                )
        for b in range(len(rows)):
            for role in (SOURCE, TARGET):
                close(torch.stack(got[b][role]), want[b][role], tolerance)


def test_the_comparison_can_fail(tiny, one_shot):
    model, rng = tiny(), random.Random(0)
    row = Row(rng, 11, 9)
    row.limits = [3, 3, 4, 5, 5, 7, 9, 11, 11]
    _, want = one_shot(model, row.source, row.target, row.limits)
    for limits, offset in (([3, 3, 4, 5, 6, 7, 9, 11, 11], 0), (row.limits, 1)):
        _, other = one_shot(model, row.source, row.target, limits, offset)
        assert (other - want).abs().max() > 0.01


def filled(model, batch=2, seed=0):
    """A cache of two ragged rows, and the ids that went in."""
    rng = random.Random(seed)
    rows = [Row(rng, 5 + b, 4 + 2 * b) for b in range(batch)]
    for r in rows:
        r.limits = [len(r.source)] * len(r.target)
    cache = GroupedCache.for_model(model, batch)
    poison(cache)
    chunks = [
        [(t, i, SOURCE, 0) for i, t in enumerate(r.source)]
        + [(t, j, TARGET, n) for j, (t, n) in enumerate(zip(r.target, r.limits, strict=True))]
        for r in rows
    ]
    call(model, cache, chunks)
    cache.commit()
    return cache, rows


def next_logits(model, cache, rows, token=9):
    """The prediction after one more target token, then forgotten."""
    out = call(model, cache, [[(token, len(r.target), TARGET, len(r.source))] for r in rows])
    cache.discard()
    return torch.cat(out)


def expected_next(one_shot, model, rows, token=9):
    return torch.stack(
        [one_shot(model, r.source, [*r.target, token], [len(r.source)] * (len(r.target) + 1))[1][-1] for r in rows]
    )


def test_crop_reorder_select_repeat_reset(tiny, close, one_shot):
    model = tiny()
    with torch.no_grad():
        handle = sk.patch(model)
        cache, rows = filled(model)
        handle.undo()
        want = expected_next(one_shot, model, rows)
        handle = sk.patch(model)
        close(next_logits(model, cache, rows), want)
        cache.reorder_cache(torch.tensor([1, 0]))
        rows = rows[::-1]
        close(next_logits(model, cache, rows), want.flip(0))
        cache.crop(0)
        close(next_logits(model, cache, rows), want.flip(0))
        cache.crop(-2)
        for r in rows:
            r.target = r.target[:-2]
        handle.undo()
        want = expected_next(one_shot, model, rows)
        handle = sk.patch(model)
        close(next_logits(model, cache, rows), want)
        cache.batch_repeat_interleave(2)
        rows = [rows[0], rows[0], rows[1], rows[1]]
        close(next_logits(model, cache, rows), want.repeat_interleave(2, 0))
        cache.batch_select_indices(torch.tensor([3]))
        close(next_logits(model, cache, rows[3:]), want[1:])
        assert cache.stream.batch == cache.layers[0].batch_size == 1
        cache.reset()
        assert cache.stream.length().abs().sum() == 0 and cache.get_seq_length() == 0
        handle.undo()


def test_what_hugging_face_is_told(tiny):
    model = tiny()
    cache = GroupedCache.for_model(model, 2)
    assert cache.get_seq_length() == 0 and cache.get_mask_sizes(3, 0) == (3, 0)
    with sk.patch(model), torch.no_grad():
        cache, rows = filled(model)
    longest = max(len(r.source) for r in rows) + max(len(r.target) for r in rows)
    for layer in range(2):
        assert cache.get_seq_length(layer) == longest and cache.get_mask_sizes(3, layer) == (longest + 3, 0)
    assert len(cache) == 2 and cache.is_sliding == [False, False] and not cache.is_compileable and cache.is_initialized
    assert cache.layers[0].get_max_length() == -1
    assert GroupedCache.for_model(model, capacity=(5, 6), fixed=True).layers[1].get_max_length() == 11


def test_refusals(tiny):
    model = tiny()
    cache = GroupedCache.for_model(model)
    with pytest.raises(ValueError, match="tokens_to_remove"):
        cache.crop(3)
    with pytest.raises(ValueError):
        cache.crop(-1)  # nothing is there
    for use in (lambda: cache.layers[0].reset(), lambda: cache.layers[0].crop(-1), lambda: cache.offload(0)):
        with pytest.raises(NotImplementedError):
            use()
    with pytest.raises(NotImplementedError, match="dynamic"):
        GroupedCache.for_model(
            tiny("llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
        )


def test_for_model_describes_the_model(tiny):
    model = tiny("llama", head_dim=16)
    stream = GroupedCache.for_model(model, 3, capacity=(7, 9)).stream
    assert (stream.layers, stream.batch, stream.dtype) == (2, 3, torch.float64)
    assert stream.segment(1, SOURCE)[0].shape == (3, 2, 7, 16) and stream.segment(1, TARGET)[1].shape == (3, 2, 9, 16)
    assert GroupedCache.for_model(model, dtype=torch.bfloat16).stream.dtype == torch.bfloat16


def test_reanchoring_moves_the_source_as_the_model_would_have_placed_it(tiny, close):
    model = tiny(
        "llama",
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 128,
        },
    )
    rng = random.Random(1)
    row = Row(rng, 7, 3)
    source = [(t, i, SOURCE, 0) for i, t in enumerate(row.source)]
    target = [(t, j, TARGET, 7) for j, t in enumerate(row.target)]
    moved = [(t, i + 20, *rest) for t, i, *rest in source]
    outs = []
    with sk.patch(model), torch.no_grad():
        for rows, delta in ((source, 20), (moved, 0), (source, 0)):
            cache = GroupedCache.for_model(model)
            call(model, cache, [rows])
            cache.commit()
            if delta:
                cache.stream.reanchor(delta, SOURCE)
            outs.append(call(model, cache, [target])[0])
    close(outs[0], outs[1], 1e-5)  # angles are fp32
    assert (outs[1] - outs[2]).abs().max() > 0.01


def test_gradients_through_one_step(tiny, close, one_shot):
    model = tiny().train()
    rng = random.Random(2)
    row = Row(rng, 6, 5)
    row.limits = [2, 3, 3, 6, 6]
    chunk = [(t, i, SOURCE, 0) for i, t in enumerate(row.source)] + [
        (t, j, TARGET, n) for j, (t, n) in enumerate(zip(row.target, row.limits, strict=True))
    ]
    _, want = one_shot(model, row.source, row.target, row.limits)
    want.pow(2).sum().backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    with sk.patch(model):
        got = call(model, GroupedCache.for_model(model), [chunk])[0][6:]
        close(got, want)
        got.pow(2).sum().backward()
    for name, p in model.named_parameters():
        close(p.grad, expected[name], 1e-9)
