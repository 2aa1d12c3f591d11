"""Sessions on models that misbehave, on clocks, and beside encoding again."""

import pytest
import torch

from streamkernels.streaming import End, Session, WaitK
from streamkernels.streaming.trace import re_encoding_cost

from .streaming_fakes import HashModel, leading, scripted, short, trailing


class TestModels:
    @pytest.mark.parametrize("bad", ["nan", "inf", "shape", "dtype", "rows"])
    def test_logits_that_are_none(self, bad):
        session = scripted(trailing(), ["a "], WaitK(1))
        step = session.model.step

        def broken(source, target, limits):
            logits = step(source, target, limits)
            if bad in ("nan", "inf"):
                logits[-1, 1] = float(bad)
            return {"shape": logits[0], "dtype": logits.long(), "rows": logits[:-1]}.get(bad, logits)

        session.model.step = broken
        session.read("u")
        trace, model = session.trace, session.model.snapshot()
        with pytest.raises(ValueError, match=r"Session: model.step\(...\): expected (finite|float) logits"):
            session.write()
        assert session.trace == trace and session.model.snapshot() == model
        session.model.step = step
        session.end()
        assert session.write()[-1].reason == "end" and session.text == "a "

    def test_header_sees_one_segment_less(self):
        session = scripted(trailing(), ["a "], WaitK(2), prompt=[5, 5], header=[1, 1, 1, 1])
        list(session.run(["u", "v", "w"]))
        lengths = session.source_lengths
        assert session.limits[:4] == [sum(lengths[:2])] * 3 + [sum(lengths[:3])]
        with pytest.raises(ValueError, match="Session: header: expected at least one token"):
            Session(HashModel(4), leading(), WaitK(1), header=[])

    def test_sampling(self):
        drawn = []

        def sample(logits):
            drawn.append(logits.shape)
            return logits.argmax()

        pieces = [" a", "e", " b", " cd"]
        greedy, sampled = (scripted(leading(), pieces, WaitK(1), sample=s) for s in (None, sample))
        assert short(greedy.run(["u"])) == short(sampled.run(["u"])) and greedy.counts == sampled.counts
        # once per forward with target rows, also where the prediction is first held and then stands
        assert drawn == [(len(leading()),)] * sampled.counts.forwards and sampled.counts.extra_forwards == 1

    @pytest.mark.parametrize("token", [99, -1, 0.5, None])
    def test_bad_samples(self, token):
        error = ValueError if isinstance(token, int) else TypeError
        session = scripted(leading(), [" a"], WaitK(1), sample=lambda logits: token)
        with pytest.raises(error, match=r"Session: sample\(logits\): expected"):
            list(session.run(["u"]))
        assert session.tokens == [] and session.model.staged is None

    def test_settings_are_checked(self):
        for name in ("max_target_tokens", "max_word_tokens"):
            with pytest.raises(ValueError, match=f"Session: {name}: expected an int >= 1"):
                scripted(leading(), [], WaitK(1), **{name: 0})
        for name in ("header", "prompt", "source_end"):
            with pytest.raises(ValueError, match=rf"Session: {name}\[1\]: expected an int >= 0, got -1"):
                Session(HashModel(4), leading(), WaitK(1), **{"header": [1], name: [1, -1]})
        session = Session(HashModel(4), leading(), WaitK(1), header=torch.tensor([1, 2]))
        assert session.target_lengths == [2]


def test_clocks():
    """A forward takes a second, a word comes every ten: times count both, elapsed only the work."""
    now = [100.0]
    session = scripted(trailing(), ["a ", "b ", "cd "], WaitK(1), clock=lambda: now[0])
    session.model.on_step = lambda: now.__setitem__(0, now[0] + 1)
    events = []
    for word in ["u", "v"]:
        now[0] += 10
        events += session.read(word) + session.write()
    now[0] += 10
    events += session.end() + session.write()
    times = [e.time for e in events]
    assert short(events) == ["R", "a ", "R", "b ", "R", "cd ", "end"]
    assert times == [0, 1, 11, 12, 22, 23, 24] and isinstance(events[-1], End)
    assert session.elapsed == [1, 2, 3] and session.delays == [1, 2, 2]


@pytest.mark.parametrize("seed", range(20))
def test_re_encoding_cost_by_brute_force(seed):
    """Counts the rows of a loop that keeps a cache only while the visible source stays the same."""
    generator = torch.Generator().manual_seed(seed)
    header, rows = seed % 4 + 1, seed % 11 + 4
    limits = torch.randint(0, 3, (rows,), generator=generator).cumsum(0).tolist()
    source = target = cached_source = cached_target = 0
    seen = None
    for j in range(header - 1, rows):
        if limits[j] != seen:
            cached_source = cached_target = 0
            seen = limits[j]
        source += seen - cached_source
        target += j + 1 - cached_target
        cached_source, cached_target = seen, j + 1
    assert re_encoding_cost(limits, header) == (source, target)


def test_counts_beside_re_encoding():
    session = scripted(trailing(), ["a ", "b "], WaitK(1), header=[1, 1], prompt=[5])
    list(session.run(["u", "v"]))
    # limits: header 1 | 2, then 'a ' sees 'v' too (4 tokens), 'b ' the end marker (5)
    lengths = session.source_lengths
    assert lengths == [1, 1, 2, 1] and session.limits == [1, 2, 4, 5]
    counts = session.counts
    assert (counts.source_tokens_projected, counts.target_tokens_projected) == (5, 4)
    assert (counts.re_encoded_source_tokens, counts.re_encoded_target_tokens) == (2 + 4 + 5, 2 + 3 + 4)
    assert re_encoding_cost([], 2) == (0, 0)
