"""`SessionBatch`: sessions at different points in one forward compute what each computes alone; faults stay apart."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    ByT5Tokenizer,
    EosTokenCriteria,
    LogitsProcessorList,
    MaxLengthCriteria,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TextStreamer,
    TopKLogitsWarper,
)

from streamkernels import ReadAll, SessionBatch, StreamSession, WaitK
from streamkernels.core import cache_room
from streamkernels.integrations.transformers import Decoding, GroupedCache
from streamkernels.integrations.transformers.patch import handle_of
from streamkernels.streaming import RowErrors

from .batch_sessions import (
    OPTIONS,
    SOURCES,
    WORDS,
    agree_with_one_shot,
    alone,
    finish,
    going,
    live_session,
    never_end,
    policies,
    recording,
    same,
)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
@pytest.mark.parametrize("offset, fused", [(0, False), (7, True), (2.5, True)])
def test_a_batch_equals_its_sessions(tiny, family, offset, fused, one_shot):
    model = tiny(family, vocab=384)
    cache = GroupedCache.for_model(model, 4, capacity=(8, 4))
    with SessionBatch(
        model,
        ByT5Tokenizer(),
        policies(),
        cache=cache,
        offset=offset,
        fused=fused,
        sample=lambda row: never_end,
        **OPTIONS,
    ) as batch:
        assert handle_of(model).fused == fused
        kept = recording(batch)
        forwards = []
        step = batch._model._run
        batch._model._run = lambda *a: forwards.append(1) or step(*a)
        list(batch.run(SOURCES))
        assert len(forwards) == max(s.counts.forwards for s in batch) < sum(s.counts.forwards for s in batch) / 2
        lengths = cache.stream.length(0).tolist()
        for row, session in enumerate(batch):
            assert lengths[row] == [sum(session.source_lengths), len(session.limits)] == batch._model.lengths[row]
            assert session.counts.source_tokens_projected == sum(session.source_lengths)
    assert handle_of(model) is None
    for row, session in enumerate(batch):
        same(session, alone(model, row, offset=offset)[0])
    if family != "gemma2":
        agree_with_one_shot(model, batch, kept, one_shot, offset, 1e-9)


def test_live_calls_faults_and_a_cancelled_row(tiny, monkeypatch):
    model = tiny(vocab=384)
    expected = {row: alone(model, row)[0] for row in range(4)}
    with SessionBatch(model, ByT5Tokenizer(), policies(), sample=lambda row: never_end, **OPTIONS) as batch:
        # write before read, blank word, source after its end: only the session that is meant
        with pytest.raises(ValueError, match="session 2: expected a word"):
            batch.write([2])
        with pytest.raises(RowErrors, match="session 1: .*blank"):
            batch.read({0: SOURCES[0][0], 1: " "})
        head = batch._model._lm.lm_head
        forward = head.forward
        for n in range(8):
            words = {row: SOURCES[row][n] for row in going(batch, range(4)) if n < len(SOURCES[row]) and (row or n)}
            batch.read(words)
            if n == 2:
                # NaN in one session's logits, once
                def poisoned(x):
                    out = forward(x).clone()
                    out[2] = float("nan")
                    return out

                head.forward = poisoned
                with pytest.raises(RowErrors, match="session 2: .*finite logits") as caught:
                    batch.write()
                assert list(caught.value.errors) == [2]
                del head.forward
                assert batch._model.lengths[0] != [0, 0]
            batch.write([r for r in range(4) if batch[r]._stream.handed and not batch[r].ended])
            if n == 4:
                batch.cancel(3)
            if n == len(SOURCES[1]) - 1:
                batch.end([1])
        with pytest.raises(RowErrors, match=r"session 1: .*after end\(\)|session 1: .*has ended"):
            batch.read({1: "more"})
        batch.end(going(batch, [0, 2]))
        batch.write()
        for row in (0, 2):
            live = live_session(model, row)
            same(batch[row], live)
        assert batch[1].tokens == expected[1].tokens
        assert batch[3].ended and batch.cache.stream.length(0)[3].tolist() == [0, 0]
        batch.reset(3, policy=WaitK(1))
        batch.read({3: "again"})
        batch.end([3])
        batch.write()
        with StreamSession(model, ByT5Tokenizer(), WaitK(1), sample=never_end, **OPTIONS) as session:
            session.read("again")
            session.end()
            session.write()
            same(batch[3], session)


def test_a_full_fixed_cache_stops_one_session(tiny):
    model = tiny(vocab=384)
    cache, policy = GroupedCache.for_model(model, 2, capacity=(40, 30), fixed=True), [ReadAll(), WaitK(1)]
    with SessionBatch(model, ByT5Tokenizer(), policy, cache=cache, sample=lambda row: never_end, **OPTIONS) as batch:
        with pytest.raises(RowErrors, match="session 0: expected rows that fit the fixed cache, got a full") as caught:
            list(batch.run([WORDS[:12], WORDS[:1]]))
        assert list(caught.value.errors) == [0] and isinstance(caught.value.errors[0], ValueError)
        with StreamSession(model, ByT5Tokenizer(), WaitK(1), sample=never_end, **OPTIONS) as session:
            list(session.run(WORDS[:1]))
        same(batch[1], session)
        lengths = cache.stream.length(0).tolist()
        assert lengths == batch._model.lengths and lengths[0][0] <= 40 and lengths[0][1] == 0
        counts = batch[0].counts
        with pytest.raises(RowErrors, match="full"):
            batch.read({0: WORDS[batch[0]._stream.handed]})
        assert cache.stream.length(0).tolist() == lengths and batch[0].counts == counts
        batch.cancel(0)
        batch.reset(0)
        batch.read({0: "a"})
        batch.end([0])
        batch.write()
        assert batch[0].tokens


def test_no_memory_to_grow_stops_one_session(tiny, monkeypatch):
    model = tiny(vocab=384)
    cache = GroupedCache.for_model(model, 2, capacity=(16, 16))
    want = {}
    for row, words in enumerate((WORDS[:9], WORDS[:1])):
        with StreamSession(model, ByT5Tokenizer(), ReadAll(), sample=never_end, **OPTIONS) as session:
            list(session.run(words))
            want[row] = session
    with SessionBatch(
        model, ByT5Tokenizer(), ReadAll(), rows=2, cache=cache, sample=lambda row: never_end, **OPTIONS
    ) as batch:
        grow, refusing = cache_room.grow, [True]

        def simulated(c, layer, capacities):
            if refusing[0] and layer == 1 and max(capacities) > 16:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            grow(c, layer, capacities)

        monkeypatch.setattr(cache_room, "grow", simulated)
        for word in WORDS[:9]:
            try:
                batch.read({0: word})
            except RowErrors as error:
                assert "session 0: no memory to grow the cache" in str(error)
                assert isinstance(error.errors[0].__cause__, torch.OutOfMemoryError)
                break
        else:
            pytest.fail("it never had to grow")
        before = cache.stream.length(0).tolist()
        batch.read({1: WORDS[0]})
        assert cache.stream.length(0).tolist()[0] == before[0]
        refusing[0] = False
        for word in WORDS[batch[0]._stream.handed : 9]:
            batch.read({0: word})
        batch.end([0, 1])
        batch.write()
        for row in range(2):
            same(batch[row], want[row])


def test_a_forward_that_fails_changes_nothing(tiny):
    model = tiny(vocab=384)
    with SessionBatch(model, ByT5Tokenizer(), policies(), sample=lambda row: never_end, **OPTIONS) as batch:
        batch.read({row: SOURCES[row][0] for row in range(4)})
        hook = model.model.layers[1].register_forward_pre_hook(
            lambda *_: (_ for _ in ()).throw(RuntimeError("layer 1"))
        )
        lengths = batch.cache.stream.length().clone()
        with pytest.raises(RuntimeError, match="layer 1"):
            batch.write([0, 2, 3])
        hook.remove()
        assert torch.equal(batch.cache.stream.length(), lengths)
        batch.cache.stream.pop(0)  # raises while rows are staged
        rest = [source[1:] for source in SOURCES]
        list(batch.run(rest))
        for row in range(4):
            same(batch[row], alone(model, row)[0])


def test_rollback_of_one_session(tiny):
    model = tiny(vocab=384)
    with SessionBatch(model, ByT5Tokenizer(), policies(), sample=lambda row: never_end, **OPTIONS) as batch:
        for n in range(3):
            batch.read({row: SOURCES[row][n] for row in (0, 2)})
            batch.write()
        mark, other = batch[0].mark(), batch.cache.stream.length(0)[2].tolist()
        assert not batch[0].ended
        for word in ("something", "else"):
            for row in going(batch, [0]):
                batch.read({row: word})
                batch.write([row])
        batch[0].rollback(mark)
        for n in range(3, 8):
            batch.read({row: SOURCES[row][n] for row in going(batch, [0, 2]) if n < len(SOURCES[row])})
            batch.write(going(batch, [0, 2]))
        batch.end(going(batch, [0, 2]))
        batch.write()
        assert other != [0, 0]
        for row in (0, 2):
            same(batch[row], live_session(model, row))
    with StreamSession(model, ByT5Tokenizer(), WaitK(1), sample=never_end, **OPTIONS) as session:
        for word in SOURCES[0][:3]:
            session.read(word)
            session.write()
        mark = session.mark()
        session.read("some")
        session.write()
        session.rollback(mark)
        finish(session, SOURCES[0][3:])
        same(session, live_session(model, 0))


def test_refusals(tiny):
    model = tiny(vocab=384)
    with pytest.raises(ValueError, match="rows: expected a number of sessions"):
        SessionBatch(model, ByT5Tokenizer(), WaitK(1), header=[7])
    with pytest.raises(ValueError, match="cache: expected a GroupedCache of 2 rows"):
        SessionBatch(model, ByT5Tokenizer(), WaitK(1), rows=2, header=[7], cache=GroupedCache.for_model(model, 3))
    for options, text in (({}, "fixed, unbounded"), ({"fixed": True}, "one CUDA device")):
        cache = GroupedCache.for_model(model, 2, **options)
        with pytest.raises(ValueError, match=text):
            SessionBatch(model, ByT5Tokenizer(), WaitK(1), rows=2, header=[7], cache=cache, graphs=True)
    assert handle_of(model) is None
    batch = SessionBatch(model, ByT5Tokenizer(), WaitK(1), rows=2, header=[7])
    batch.close()
    with pytest.raises(RuntimeError, match="closed"):
        batch.reset(0)
        batch.read({0: "a"})
        batch.write()


def test_a_bounded_cache(tiny):
    model = tiny(vocab=384)
    options = {"window": 12, "sinks": 2, "max_chunk": 16, "capacity": 8}
    want = []
    for row in range(2):
        cache = GroupedCache.for_model(model, **options)
        with StreamSession(
            model, ByT5Tokenizer(), WaitK(2), cache=cache, sample=never_end, **OPTIONS | {"max_target_tokens": 40}
        ) as session:
            list(session.run(WORDS[row:14]))
            want.append(session)
    cache = GroupedCache.for_model(model, 2, **options)
    with SessionBatch(
        model,
        ByT5Tokenizer(),
        WaitK(2),
        rows=2,
        cache=cache,
        sample=lambda row: never_end,
        **OPTIONS | {"max_target_tokens": 40},
    ) as batch:
        list(batch.run([WORDS[0:14], WORDS[1:14]]))
        for row in range(2):
            same(batch[row], want[row])
        batch[0].reset()
        with pytest.raises(RowErrors, match="max_chunk of the bounded cache is 16"):
            batch.read({0: "a" * 30}, flush=True)
        mark = batch[1].mark()
        with pytest.raises(NotImplementedError, match="bounded"):
            batch[1].rollback(mark)


# decoding the Hugging Face way


def test_processors_criteria_and_streamers(tiny):
    model, tokenizer, heard = tiny(vocab=384), ByT5Tokenizer(), []
    seen = []

    def look(ids, scores):
        assert ids.shape[0] == 1 and scores.shape == (1, 384)
        seen.append(ids.tolist()[0])
        return scores

    class Streamer(TextStreamer):
        def on_finalized_text(self, text, stream_end=False):
            heard.append((text, stream_end))

    def decoding(row):
        return Decoding(
            processors=[RepetitionPenaltyLogitsProcessor(1.7), look],
            criteria=[MaxLengthCriteria(9 + row)],
            streamer=Streamer(tokenizer, skip_prompt=True) if row == 0 else None,
        )

    with SessionBatch(model, tokenizer, WaitK(1), rows=2, decoder=decoding, **OPTIONS) as batch:
        list(batch.run(SOURCES[:2]))
    penalised = [list(s.tokens) for s in batch]
    assert seen and all(ids == batch[0].tokens[: len(ids)] or ids == batch[1].tokens[: len(ids)] for ids in seen)
    ends = [s._stream.events[-1].reason for s in batch]
    for row, reason in enumerate(ends):
        assert len(penalised[row]) == 9 + row if reason == "stop" else len(penalised[row]) < 9 + row
    assert "stop" in ends
    assert heard and heard[-1][1] and "".join(text for text, _ in heard) == tokenizer.decode(penalised[0])

    # greedy with the same processors by hand
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.7)])
    for row in range(2):
        with StreamSession(model, tokenizer, WaitK(1), decoder=decoding(row), **OPTIONS) as session:
            list(session.run(SOURCES[row]))
            assert session.tokens == penalised[row]
        with StreamSession(model, tokenizer, WaitK(1), **OPTIONS) as plain:

            def choose(logits, plain=plain):
                return int(processors(torch.tensor([plain.tokens], dtype=torch.int64), logits[None].clone()).argmax())

            plain._settings = plain._loop.settings = type(plain._settings)(
                **{**vars(plain._settings), "sample": choose}
            )
            list(plain.run(SOURCES[row]))
            n = len(penalised[row])
            assert plain.tokens[:n] == penalised[row]


def test_sampling_follows_the_distribution():
    decoding = Decoding(
        processors=[TemperatureLogitsWarper(0.5), TopKLogitsWarper(3)],
        do_sample=True,
        generator=torch.Generator().manual_seed(0),
    )
    logits = torch.tensor([0.0, 1.0, 0.5, -1.0, 0.8])
    drawn = torch.stack([decoding.choose(logits, [1, 2]) for _ in range(4000)])
    want = torch.zeros(5)
    top = [1, 4, 2]
    want[top] = (logits[top] / 0.5).softmax(-1)
    assert (torch.bincount(drawn, minlength=5) / 4000 - want).abs().max() < 0.03
    assert drawn.dtype == torch.int64 and decoding.choose(logits, []).dim() == 0
    with pytest.raises(TypeError, match="processors"):
        Decoding(processors=[3])
    stops = Decoding(criteria=[EosTokenCriteria(5)])
    assert stops.stops([1, 5], logits) and not stops.stops([5, 1], logits)
