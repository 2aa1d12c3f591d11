"""Sessions that share forwards: what each computes is what it computes alone, and nobody pays for another's fault."""

from __future__ import annotations

import random

import pytest
import torch

from streamkernels.streaming import End, ReadAll, RowErrors, Session, Sessions, Step, Threshold, WaitK

from .streaming_fakes import HashModel, both, leading, letters, trailing

HEADER = [1, 2, 3]
OPTIONS = {"header": HEADER, "prompt": [5], "source_end": [4], "max_target_tokens": 25, "max_word_tokens": 4}


class Rows:
    """A BatchModel of one HashModel per session. `fails[n]` is what step n does: an exception that it raises, or the
    faults of sessions at their own n-th step."""

    def __init__(self, rows, vocab, fails=None):
        self.models = [HashModel(vocab, seed) for seed in range(rows)]
        self.rows, self.steps, self.calls, self.fails = rows, 0, [], dict(fails or {})
        self.kept, self.turns = {}, {}

    def step(self, steps):
        whole = self.fails.get(self.steps)
        self.steps += 1
        if isinstance(whole, BaseException):
            raise whole
        fail = {}
        for row in steps:
            self.turns[row] = self.turns.get(row, 0) + 1
            faults = self.fails.get(self.turns[row] - 1)
            if isinstance(faults, dict) and row in faults:
                fail[row] = faults[row]
        self.calls.append(sorted(steps))
        answers = {}
        for row, step in steps.items():
            assert isinstance(step, Step)
            if isinstance(fail.get(row), Exception):
                answers[row] = fail[row]
                continue
            model = self.models[row]
            self.kept[row] = [*map(list, (model.source, model.target, model.limits, model.source_rows))]
            self.kept[row].append(list(model.target_rows))
            answers[row] = model.step(step.source, step.target, step.limits)[-1:] * (
                float("nan") if fail.get(row) == "nan" else 1
            )
            model.commit()
        return answers

    def drop(self, row):
        model = self.models[row]
        model.source, model.target, model.limits, model.source_rows, model.target_rows = self.kept.pop(row)

    def pop(self, row, n):
        self.models[row].pop(n)

    def truncate(self, row, source, target):
        model = self.models[row]
        assert source <= len(model.source) and target <= len(model.target)
        del model.source[source:], model.source_rows[source + 1 :]
        del model.target[target:], model.limits[target:], model.target_rows[target + 1 :]

    def reset(self, row):
        self.models[row].reset()


def policies(rows):
    confident = Threshold(lambda state: state.logits.max().item(), 0.98, predicts=True)
    lazy = Threshold(lambda state: state.logits.max().item(), 0.98)
    return [[WaitK(1), WaitK(3), ReadAll(), confident, lazy][row % 5] for row in range(rows)]


def words(row, n):
    rng = random.Random(row)
    return ["".join(rng.choice("abcde") for _ in range(rng.randint(1, 3))) for _ in range(n)]


def never_end(logits):
    return int(logits[1:].argmax()) + 1


def alone(row, policy, codec, sources):
    session = Session(HashModel(len(codec), row), codec, policy, **OPTIONS)
    events = list(session.run(sources))
    return session, events


def same(session, other):
    names = ("tokens", "text", "delays", "source_lengths", "target_lengths", "visible", "limits", "ended")
    for name in names:
        assert getattr(session, name) == getattr(other, name), name


@pytest.mark.parametrize("make", [leading, trailing, letters, both])
def test_each_session_is_what_it_is_alone(make):
    codec, sources = make(), [words(row, 3 + 2 * row) for row in range(5)]
    batch = Sessions(Rows(5, len(codec)), codec, policies(5), **OPTIONS)
    events = [[] for _ in range(5)]
    for row, event in batch.run(sources):
        events[row].append(event)
    for row in range(5):
        session, expected = alone(row, policies(5)[row], codec, sources[row])
        same(batch[row], session)
        assert [type(e) for e in events[row]] == [type(e) for e in expected]
        counts, other = batch[row].counts, session.counts
        assert counts.forwards == other.forwards or row in (3, 4)
        assert (batch[row].model.model.models[row].target, batch[row].model.model.models[row].limits) == (
            session.model.target,
            session.model.limits,
        )


def test_forwards_are_shared():
    codec, sources = letters(), [words(row, 6) for row in range(4)]
    model = Rows(4, len(codec))
    batch = Sessions(model, codec, WaitK(2), sample=lambda row: never_end, **OPTIONS)
    list(batch.run(sources))
    each = [session.counts.forwards for session in batch]
    # nobody waits for anybody: as many forwards as the longest session needs
    assert model.steps == max(each) < sum(each) / 2
    assert model.calls[0] == [0, 1, 2, 3]


def test_live_calls_at_different_points():
    codec, model = letters(), Rows(3, len(letters()))
    batch = Sessions(model, codec, [WaitK(1), WaitK(2), ReadAll()], **OPTIONS)
    assert len(batch) == 3
    with pytest.raises(ValueError, match="session 1: expected a word"):
        batch.write([1])
    assert batch.write() == {}
    sources = [words(row, 4) for row in range(3)]
    for n in range(4):
        batch.read({row: sources[row][n] for row in range(3) if n >= row})
        batch.write()
    batch.end([0, 1])
    batch.write()
    batch.end([2])
    batch.write()
    for row in range(3):
        session = Session(HashModel(len(codec), row), codec, [WaitK(1), WaitK(2), ReadAll()][row], **OPTIONS)
        for word in sources[row][row:]:
            session.read(word)
            session.write()
        session.end()
        session.write()
        same(batch[row], session)


FAULTS = {
    "nan": "nan",
    "no room": ValueError("a full cache"),
    "memory": MemoryError("no room to grow"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("at", [0, 1, 4, 5])
def test_one_sessions_fault_stops_nobody_else(fault, at):
    codec, sources = both(), [words(row, 5) for row in range(3)]
    model = Rows(3, len(codec), {at: {1: FAULTS[fault]}})
    batch = Sessions(model, codec, WaitK(2), **OPTIONS)
    failed = 0

    def attempt(call, argument):
        nonlocal failed
        try:
            call(argument)
        except RowErrors as errors:
            failed += 1
            assert list(errors.errors) == [1] and "session 1: " in str(errors)
            call({1: argument[1]} if isinstance(argument, dict) else [1] if argument is not None else None)

    for n in range(5):
        attempt(batch.read, {row: sources[row][n] for row in range(3)})
    attempt(batch.end, [0, 1, 2])
    attempt(batch.write, None)
    assert all(session.ended for session in batch)
    # what a read predicts is not looked at
    assert failed == (at > 0 or fault != "nan")
    for row in range(3):
        session = Session(HashModel(len(codec), row), codec, WaitK(2), **OPTIONS)
        for word in sources[row]:
            session.read(word)
        session.end()
        session.write()
        same(batch[row], session)


def test_a_forward_that_fails_changes_nothing():
    codec, sources = both(), [words(row, 5) for row in range(3)]
    for at in range(12):
        model = Rows(3, len(codec), {at: RuntimeError("layer 1")})
        batch = Sessions(model, codec, policies(3), **OPTIONS)
        for row in range(3):
            batch[row]  # sessions exist before anything happens
        with pytest.raises(RuntimeError, match="layer 1"):
            list(batch.run(sources))
        rest = [source[batch[row]._stream.handed :] for row, source in enumerate(sources)]
        list(batch.run(rest)) if not all(s._stream.closed for s in batch) else batch.write()
        for row in range(3):
            same(batch[row], alone(row, policies(3)[row], codec, sources[row])[0])


def test_cancel_and_reset_of_one_session():
    codec, sources = letters(), [words(row, 6) for row in range(3)]
    model = Rows(3, len(codec))
    batch = Sessions(model, codec, WaitK(1), **OPTIONS)
    for n, (row, _) in enumerate(batch.run(sources)):
        if n == 4:
            batch.cancel(row)
            cancelled = row
    assert isinstance(batch[cancelled]._stream.events[-1], End)
    assert batch[cancelled]._stream.events[-1].reason == "cancelled"
    assert not model.models[cancelled].target
    for row in set(range(3)) - {cancelled}:
        same(batch[row], alone(row, WaitK(1), codec, sources[row])[0])
    with pytest.raises(RowErrors, match="the text has ended"):
        batch.read({cancelled: "a"})
    batch.reset(cancelled, policy=WaitK(3))
    for word in sources[cancelled]:
        batch.read({cancelled: word})
    batch.end([cancelled])
    batch.write()
    session = Session(HashModel(len(codec), cancelled), codec, WaitK(3), **OPTIONS)
    for word in sources[cancelled]:
        session.read(word)
    session.end()
    session.write()
    same(batch[cancelled], session)


def test_bad_input_reaches_only_its_session():
    codec = letters()
    batch = Sessions(Rows(2, len(codec)), codec, WaitK(1), **OPTIONS)
    with pytest.raises(RowErrors, match="session 0: .*not blank") as caught:
        batch.read({0: " ", 1: "ab"})
    assert isinstance(caught.value.errors[0], ValueError)
    assert batch[1]._stream.handed == 1 and not batch[0]._stream.handed
    batch.end([1])
    with pytest.raises(RowErrors, match=r"nothing more after end\(\)"):
        batch.read({1: "ab"})
    with pytest.raises(ValueError, match="row"):
        batch[2]
    with pytest.raises(ValueError, match="2, one per session"):
        Sessions(Rows(2, len(codec)), codec, [WaitK(1)], **OPTIONS)
    with pytest.raises(ValueError, match="2 iterables"):
        list(batch.run([[]]))


@pytest.mark.parametrize("make", [both, leading, letters])
def test_rollback_of_one_session(make):
    codec, sources, fed = make(), [words(row, 8) for row in range(2)], 0
    for stop in range(1, 7):
        batch = Sessions(Rows(2, len(codec)), codec, WaitK(2), sample=lambda row: never_end, **OPTIONS)
        for n in range(stop):
            batch.read({row: sources[row][n] for row in range(2) if not batch[row].ended})
            batch.write()
        mark = batch[0].mark()
        fed += mark.fed and not batch[0].ended
        later = None
        for again in range(2):
            for word in ("zz", "a", "dd")[: 1 + again]:
                if not batch[0].ended:
                    batch.read({0: word.replace("z", "e")})
                    batch.write([0])
                later = batch[0].mark()
            batch[0].rollback(mark)
            with pytest.raises(ValueError, match="rolled back"):
                batch[0].rollback(later)
        for n in range(stop, 8):
            for row in range(2):
                if not batch[row].ended:
                    batch.read({row: sources[row][n]})
            batch.write([row for row in range(2) if not batch[row].ended])
        rows = [row for row in range(2) if not batch[row].ended]
        batch.end(rows)
        batch.write()
        for row in range(2):
            live = Session(HashModel(len(codec), row), codec, WaitK(2), sample=never_end, **OPTIONS)
            for word in sources[row]:
                if not live.ended:
                    live.read(word)
                    live.write()
            if not live.ended:
                live.end()
                live.write()
            same(batch[row], live)
    # a word that the next token closes has been fed to its end
    assert fed or make is not leading
    with pytest.raises(ValueError, match="mark"):
        batch[1].rollback(mark)


def test_a_run_that_is_left_keeps_what_was_done():
    codec, sources = letters(), [words(row, 6) for row in range(2)]
    batch = Sessions(Rows(2, len(codec)), codec, WaitK(1), **OPTIONS)
    run = batch.run(sources)
    for _ in range(3):
        next(run)
    run.close()
    for row, session in enumerate(batch):
        for word in sources[row][session._stream.handed :]:
            if not session.ended:
                batch.read({row: word})
                batch.write()
        if not session.ended:
            batch.end([row])
    batch.write()
    for row in range(2):
        assert batch[row].text == alone(row, WaitK(1), codec, sources[row])[0].text


class Greedy:
    """A decoder that records what it is told, stops at a token, and chooses the worst but one."""

    def __init__(self, stop):
        self.stop, self.heard = stop, []

    def begin(self, header):
        self.heard.append(("begin", list(header)))

    def choose(self, logits, tokens):
        assert logits.dim() == 1 and isinstance(list(tokens), list)
        return logits.argsort()[1]

    def put(self, token):
        self.heard.append(token)

    def stops(self, tokens, logits):
        assert logits.dim() == 1
        return len(tokens) >= 3 and tokens[-1] % self.stop == 0

    def end(self):
        self.heard.append("end")


def test_decoders_choose_stop_and_hear():
    codec = letters()
    made = {}

    def decoder(row):
        return made.setdefault(row, Greedy(2 + row))

    batch = Sessions(Rows(2, len(codec)), codec, WaitK(1), decoder=decoder, **OPTIONS)
    list(batch.run([words(row, 5) for row in range(2)]))
    for row in range(2):
        tokens = batch[row].tokens
        assert made[row].heard == [("begin", HEADER), *tokens, "end"]
        alone = Greedy(2 + row)
        session = Session(HashModel(len(codec), row), codec, WaitK(1), decoder=alone, **OPTIONS)
        list(session.run(words(row, 5)))
        same(batch[row], session)
        assert alone.heard == made[row].heard
    with pytest.raises(ValueError, match="sample: expected None beside a decoder"):
        Session(HashModel(9), codec, WaitK(1), decoder=Greedy(2), sample=lambda x: 1, **OPTIONS)


def test_tokens_come_in_one_transfer(monkeypatch):
    codec, calls = letters(), []
    model = Rows(3, len(codec))
    batch = Sessions(model, codec, WaitK(1), **OPTIONS)
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: calls.append(1) or tolist(self))
    monkeypatch.setattr(torch.Tensor, "item", lambda self: pytest.fail("a read of its own"))
    list(batch.run([words(row, 5) for row in range(3)]))
    assert len(calls) <= model.steps
