"""Sessions on scripted models: word boundaries, policies, the live calls."""

import math

import pytest

from streamkernels.core.spans import wait_k_limits
from streamkernels.streaming import Action, Read, ReadAll, Session, Threshold, WaitK, Write

from .streaming_fakes import END, HEADER, HashModel, both, leading, letters, scripted, short, trailing


class TestForwards:
    """10 words, 14 tokens to predict (the end is one), 9 source words and the end marker, k = 1.

    The loop released with GPE pays 33 forwards: 10 reads, 14 predictions, 9 dropped ones at the spaces between words.
    """

    WORDS = ["w"] * 9
    LENGTHS = [1, 2, 1, 2, 1, 1, 2, 1, 1, 1]

    def test_leading_spaces_pay_one_forward_per_word(self):
        pieces = [p for n in self.LENGTHS for p in [" a", "e"][:n]]
        session = scripted(leading(), pieces, WaitK(1))
        list(session.run(self.WORDS))
        counts = session.counts
        assert session.target_lengths == [3, *self.LENGTHS, 1] and len(session.tokens) == 13
        assert counts.forwards == 14 + 9 == 23
        assert (counts.read_forwards, counts.merged_forwards, counts.extra_forwards) == (0, 10, 9)
        assert counts.source_tokens_projected == sum(session.source_lengths)
        assert counts.target_tokens_projected == 3 + 13 + 9

    def test_trailing_spaces_pay_none(self):
        pieces = [p for n in self.LENGTHS for p in ["e", "a "][2 - n :]]
        session = scripted(trailing(), pieces, WaitK(1))
        list(session.run(self.WORDS))
        counts = session.counts
        assert session.target_lengths == [3, *self.LENGTHS, 1]
        assert counts.forwards == 14 and counts.merged_forwards == 10
        assert (counts.read_forwards, counts.extra_forwards) == (0, 0)

    @pytest.mark.parametrize("k", [2, 3, 30])
    def test_words_before_the_first_write_are_encoded_as_they_come(self, k):
        session = scripted(leading(), [" a", " b"], WaitK(k))
        list(session.run(["w"] * 5))
        # k words, or 5 and the end marker: the last chunk is merged with the header, the others have a forward each
        assert session.counts.read_forwards == min(k, 6) - 1

    def test_nothing_is_dropped_once_the_source_has_ended(self):
        session = scripted(leading(), [" a", "e", ",", " b", " cd", "."], ReadAll())
        list(session.run(["w"] * 3))
        assert session.counts.extra_forwards == 0 and session.counts.forwards == 3 + 1 + 6

    def test_a_policy_that_does_not_read_pays_nothing(self):
        session = scripted(leading(), [" a", " b", " cd"], lambda state: Action.WRITE)
        events = list(session.run(["w"] * 3))
        assert session.counts.extra_forwards == 0 and session.counts.forwards == 4
        assert short(events) == ["R", " a", " b", " cd", "end"]

    def test_an_end_marker_without_tokens_changes_no_limit(self):
        session = scripted(leading(), [" a", " b"], WaitK(1), source_end=[])
        assert short(session.run(["w"])) == ["R", " a", "R", " b", "end"]
        assert session.counts.extra_forwards == 0 and session.counts.read_forwards == 0
        session = scripted(trailing(), ["a "], ReadAll(), source_end=[])
        list(session.run(["w"]))
        assert session.counts.read_forwards == 0 and session.counts.merged_forwards == 1

    def test_flush(self):
        session = scripted(trailing(), ["a ", "b "], WaitK(1), prompt=[5, 5])
        session.read("w", flush=True)
        assert session.counts.read_forwards == 1 and session.model.source == [5, 5, *session.codec.encode("w", True)]
        session.write()
        session.end(flush=True)
        assert session.counts.read_forwards == 2 and session.counts.merged_forwards == 0
        session.write()
        assert session.ended and session.counts.merged_forwards == 0
        flushed = scripted(trailing(), ["a ", "b "], WaitK(1), prompt=[5, 5])
        list(flushed.run(["w"], flush=True))
        assert flushed.counts == session.counts and flushed.limits == session.limits


class TestBoundaries:
    def test_punctuation_reads_once(self):
        session = scripted(leading(), [" a", ",", " b", ".", "e", " cd"], WaitK(1))
        events = short(session.run(["u", "v", "w", "x", "y"]))
        assert events == ["R", " a,", "R", " b.e", "R", " cd", "R", "end"]
        session = scripted(letters(), list("a, b. c"), WaitK(1))
        assert short(session.run(["u", "v", "w", "x", "y"])) == ["R", "a, ", "R", "b. ", "R", "c", "R", "end"]

    def test_a_spaced_mark_is_a_word(self):
        session = scripted(leading(), [" a", " !", " b"], WaitK(1))
        assert short(session.run(["u", "v", "w"])) == ["R", " a", "R", " !", "R", " b", "R", "end"]

    def test_spaces_alone_are_no_word(self):
        session = scripted(letters(), list("a  b "), WaitK(1))
        assert short(session.run(["u", "v", "w"])) == ["R", "a ", "R", " b ", "R", "end"]
        session = scripted(leading(), [" ", " a", " ", " b"], WaitK(1))
        assert short(session.run(["u", "v", "w"])) == ["R", "  a", "R", "  b", "R", "end"]

    def test_a_token_may_open_and_close(self):
        session = scripted(both(), [" a", " b ", " b ", "e", "c "], WaitK(1))
        assert short(session.run(["u"] * 9)) == ["R", " a", "R", " b ", "R", " b ", "R", "ec ", "R", "end"]
        assert session.counts.extra_forwards == 1

    def test_the_end_of_an_open_word_is_a_boundary(self):
        # 'ab' seems to end the text; once 'v' is read the model writes 'b ' to it instead, glued to the word before
        session = scripted(letters(), [], WaitK(1), reads_on={2: (2, 2)})
        session.codec.encode = lambda word, first: [1]
        session.model.script = [*session.codec.ids("a", "b"), END, *session.codec.ids(" "), END]
        events = short(session.run(["u", "v"]))
        assert events == ["R", "ab", "R", "b ", "R", "end"] and session.text == "abb "
        assert session.delays == [2] and session.source_lengths == [0, 1, 1, 1]
        assert session.limits == wait_k_limits([0, 1, 1, 1], session.target_lengths, 1)[:-1]

    def test_the_end_without_a_read_costs_nothing(self):
        session = scripted(letters(), list("ab"), WaitK(9))
        list(session.run(["u"]))
        assert session.counts.extra_forwards == 0 and session.delays == [1]

    def test_word_cap_reads_on(self):
        session = scripted(letters(), list("abcabcab"), WaitK(1), max_word_tokens=3)
        assert short(session.run(["u"] * 5)) == ["R", "abc", "R", "abc", "R", "ab", "R", "end"]
        # one word of text, finished when its last piece was
        assert session.delays == [3] and session.counts.extra_forwards == 1

    def test_text_cap(self):
        session = scripted(leading(), [" a", "e", " b", "f"], WaitK(1), max_target_tokens=3)
        events = list(session.run(["u", "v", "w"]))
        assert short(events) == ["R", " ae", "R", " b", "end"] and events[-1].reason == "length"
        assert session.target_lengths == [3, 2, 1] and len(session.limits) == 5

    def test_pieces_are_decoded_behind_the_word_before(self):
        class Stripping:
            """As SentencePiece: the space that begins a text is dropped."""

            def __getattr__(self, name):
                return getattr(inner, name)

            def decode(self, tokens):
                return inner.decode(tokens).removeprefix(" ")

        inner = leading()
        session = scripted(inner, [" a", " b", "e", " cd"], WaitK(1))
        session = Session(session.model, Stripping(), WaitK(1), header=HEADER)
        events = short(session.run(["u", "v", "w"]))
        assert events == ["R", "a", "R", " be", "R", " cd", "R", "end"] and session.text == "a be cd"

    def test_words_left_over_are_not_taken(self):
        words = iter(["u", "v", "w", "x"])
        session = scripted(trailing(), ["a "], WaitK(1))
        assert short(session.run(words)) == ["R", "a ", "R", "end"] and list(words) == ["w", "x"]

    def test_no_words_at_all(self):
        session = scripted(trailing(), ["a "], WaitK(3))
        assert short(session.run([])) == ["R", "a ", "end"] and session.delays == [0]
        session = scripted(trailing(), [], WaitK(3))
        assert short(session.run([])) == ["R", "end"] and session.text == "" and session.delays == []


class TestPolicies:
    def test_asked_once_per_state_at_boundaries_only(self):
        asked = []

        def policy(state):
            asked.append((state.source_words, state.target_words, state.text, state.source_segments))
            return WaitK(2)(state)

        session = scripted(leading(), [" a", ",", "e", " b"], policy)
        session.read("u")
        assert session.write() == [] and session.write() == []
        session.read("v")
        session.write()
        assert asked == [(1, 0, "", 2), (2, 0, "", 3), (2, 1, " a,e", 3)]
        session.write()
        session.read("w")
        session.end()
        session.write()
        assert session.ended and asked[3:] == [(3, 1, " a,e", 4), (3, 2, " a,e b", 4)]

    def test_rules_by_state(self):
        seen = []

        def remember(state):
            seen.append(state)
            return Action.WRITE

        list(scripted(leading(), [" a"], remember).run(["u"]))
        one = seen[0]
        assert (one.source_words, one.source_segments, one.source_ended, one.target_words) == (1, 2, False, 0)
        assert WaitK(1)(one) is Action.WRITE and WaitK(2)(one) is Action.READ and ReadAll()(one) is Action.READ
        assert (seen[1].source_words, seen[1].target_words, seen[1].text) == (1, 1, " a")
        assert "_text" not in repr(one)

    def test_visible_is_the_training_rule(self):
        assert [WaitK(3).visible(s, 6) for s in range(5)] == [3, 4, 5, 6, 6]
        assert ReadAll().visible(0, 6) == 6

    def test_looking_before_reading_costs_a_forward_and_writing_none(self):
        looked = []

        def policy(state):
            looked.append(state.logits.shape)
            return WaitK(2)(state)

        session = scripted(trailing(), ["a ", "b "], policy)
        list(session.run(["u", "v"]))
        # before 'v' for the header, before the end marker for 'a '; what was seen before writing was used
        assert session.counts.extra_forwards == 2 and session.model.popped == 2 and len(looked) == 3
        assert session.counts.forwards == session.model.steps == 3 + 2
        free = scripted(leading(), [" a", " b"], policy)
        list(free.run(["u", "v"]))
        # where the boundary shows late, the prediction is there already
        assert free.counts.extra_forwards == 2

    def test_reading_on_at_the_end(self):
        policy = WaitK(1)

        def hold(state):
            return Action.READ if state.ending else policy(state)

        for codec, word in ((leading(), " a"), (trailing(), "a ")):
            session = scripted(codec, [word], hold)
            assert short(session.run(["u", "v", "w"])) == ["R", word, "R", "R", "R", "end"]
            assert session.limits[-1] == sum(session.source_lengths) and session.counts.extra_forwards == 3

    def test_logits_only_while_deciding(self):
        states = []
        session = scripted(leading(), [" a"], lambda state: states.append(state) or Action.WRITE)
        list(session.run(["u"]))
        with pytest.raises(ValueError, match="State: logits, ending: expected use while the policy decides"):
            _ = states[0].logits

    def test_threshold(self):
        ahead = Threshold(lambda state: state.source_words - 2 * state.target_words, 2)
        session = scripted(trailing(), ["a ", "b "], ahead)
        assert short(session.run(["t", "u", "v", "w", "x"])) == ["R", "R", "a ", "R", "R", "b ", "R", "R", "end"]
        with pytest.raises(ValueError, match="Threshold: score: expected a number, got nan"):
            list(scripted(trailing(), ["a "], Threshold(lambda state: math.nan, 2)).run(["t"]))

    def test_refusals(self):
        with pytest.raises(ValueError, match="WaitK: k: expected an int >= 1, got 0"):
            WaitK(0)
        with pytest.raises(TypeError, match="Threshold: score"):
            Threshold(0.5, 1.0)
        with pytest.raises(ValueError, match="Threshold: threshold: expected a finite number"):
            Threshold(lambda state: 0.0, math.nan)
        with pytest.raises(TypeError, match="Session: policy: expected a callable"):
            Session(HashModel(4), leading(), "wait-3", header=HEADER)
        session = scripted(leading(), [" a"], lambda state: "read")
        with pytest.raises(TypeError, match=r"policy\(state\): expected Action.READ or Action.WRITE, got 'read'"):
            list(session.run(["u"]))


class TestLive:
    def test_a_word_is_read_when_it_is_wanted(self):
        session = scripted(trailing(), ["a ", "b ", "cd "], WaitK(1))
        assert short(session.read("u")) == ["R"] and session.read("v") == [] and session.read("w") == []
        assert short(session.write()) == ["a ", "R", "b ", "R", "cd "] and session.write() == []
        assert short(session.end()) == ["R"] and short(session.write()) == ["end"] and session.write() == []
        assert session.limits == wait_k_limits(session.source_lengths, session.target_lengths, 1)[:-1]

    def test_source_text_and_delays(self):
        session = scripted(trailing(), ["a ", "b ", "cd "], WaitK(2))
        events = list(session.run(["good", "day", "sun"]))
        reads = [(e.index, e.text) for e in events if isinstance(e, Read)]
        assert reads == [(0, "good"), (1, "day"), (2, "sun"), (3, "")]
        assert [e.source_words for e in events if isinstance(e, Write)] == session.delays == [2, 3, 3]
        assert session.text == "a b cd " and session.tokens == session.codec.ids("a ", "b ", "cd ")
        assert session.trace["policy"] == "WaitK(2)" and session.trace["delays"] == [2, 3, 3]

    def test_refusals_change_nothing(self):
        session = scripted(trailing(), ["a ", "b "], WaitK(1))
        start = session.trace
        for call, error, message in [
            (lambda: session.write(), ValueError, "Session.write: source: expected a word, or end"),
            (lambda: session.read(""), ValueError, "Session.read: word: expected a word that is not blank, got ''"),
            (lambda: session.read(" \n"), ValueError, "not blank"),
            (lambda: session.read(3), TypeError, "Session.read: word: expected a string, got 3"),
            (lambda: session.read(None), TypeError, "Session.read: word: expected a string, got None"),
        ]:
            with pytest.raises(error, match=message):
                call()
            assert session.trace == start and session.model.steps == 0
        session.read("u")
        session.end()
        for call in (lambda: session.read("v"), session.end):
            with pytest.raises(ValueError, match=r"source: expected nothing more after end\(\)"):
                call()
        assert short(session.write()) == ["a ", "R", "b ", "end"]
        for call in (lambda: session.read("v"), session.end):
            with pytest.raises(ValueError, match=r"the text has ended, call reset\(\)"):
                call()
        assert list(session.run(["v"])) == []

    def test_a_word_without_tokens(self):
        session = scripted(trailing(), ["a "], WaitK(1))
        session.codec.encode = lambda word, first: []
        with pytest.raises(ValueError, match="expected a word with at least one token, got 'u'"):
            session.read("u")
        session.codec.encode = lambda word, first: [0.5]
        with pytest.raises(TypeError, match=r"codec.encode\(word\)\[0\]: expected an int"):
            session.read("u")
        assert session.model.steps == 0 and session.trace["events"] == []

    def test_run_refuses_what_is_no_word(self):
        session = scripted(trailing(), ["a "], WaitK(1))
        with pytest.raises(TypeError, match="expected a string, got None"):
            list(session.run([None]))

    def test_reset_begins_anew(self):
        session = scripted(leading(), [" a", " b"], WaitK(1))
        first = short(session.run(["u", "v"])), session.limits, session.counts
        session.reset()
        assert session.model.resets == 3 and session.text == "" and not session.ended and session.limits == []
        assert (short(session.run(["u", "v"])), session.limits, session.counts) == first

    def test_events_of_a_failed_call_come_with_the_next(self):
        session = scripted(trailing(), ["a ", "b "], WaitK(1))
        session.model.fails = {2: RuntimeError("full")}
        session.read("u")
        session.read("v")
        session.end()
        with pytest.raises(RuntimeError, match="full"):
            session.write()
        assert short(session.write()) == ["a ", "R", "b ", "R", "end"]

    def test_a_policy_that_fails_has_read_nothing(self):
        broken = [True]

        def policy(state):
            if broken[0]:
                raise OSError("policy")
            return WaitK(2)(state)

        session = scripted(trailing(), ["a "], policy)
        session.read("u")
        for call in (lambda: session.read("v"), session.end):
            with pytest.raises(OSError, match="policy"):
                call()
        broken[0] = False
        assert [(e.index, e.text) for e in session.read("v")] == [(1, "v")]
        assert session.write()[0].text == "a " and short(session.end()) == ["R"]
