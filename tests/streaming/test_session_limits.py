"""What a session computes step by step is what one pass under the declared limits computes: any policy, any arrival."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streamkernels.core.spans import limits_from_visible, wait_k_limits
from streamkernels.streaming import Action, End, Read, ReadAll, Session, Threshold, WaitK, Write

from .streaming_fakes import CODECS, END, HashModel, one_shot

torch.set_num_threads(1)
FAST = settings(max_examples=200, deadline=None, derandomize=True)
WORDS = st.lists(st.text("abxy,.é", min_size=1, max_size=5), max_size=9)
RNG = st.randoms(use_true_random=False)
SETUP = st.fixed_dictionaries(
    {
        "codec": st.sampled_from(sorted(CODECS)),
        "seed": st.integers(0, 10**6),
        "header": st.lists(st.integers(0, 5), min_size=1, max_size=4),
        "prompt": st.lists(st.integers(0, 5), max_size=3),
        "source_end": st.lists(st.integers(0, 5), max_size=2),
        "max_target_tokens": st.sampled_from([1, 7, 40]),
        "max_word_tokens": st.sampled_from([1, 3, 50]),
    }
)


def make(setup, policy, **more):
    setup = dict(setup)
    codec = CODECS[setup.pop("codec")]()
    model = HashModel(len(codec), setup.pop("seed"), **more)
    return Session(model, codec, policy, **setup)


def segments_of(setup, words):
    """Token counts and tokens of all that the source would have, read or not."""
    codec = CODECS[setup["codec"]]()
    parts = [setup["prompt"], *(codec.encode(w, i == 0) for i, w in enumerate(words)), setup["source_end"]]
    return [len(p) for p in parts], [t for p in parts for t in p]


def check(session, setup, words):
    """Everything that holds for a finished session, whatever its policy."""
    model, header = session.model, setup["header"]
    _, source = segments_of(setup, words)
    assert session.ended and model.staged is None
    # the cache holds the header and every token that was fed under its own limit; the source comes once and in order
    fed = header + session.tokens
    cut = session.trace["events"][-1]["reason"] == "length"
    assert model.target == (fed[:-1] if cut else fed) and model.limits == session.limits
    assert model.source == source[: len(model.source)]
    declared = limits_from_visible(session.source_lengths, session.target_lengths, session.visible.__getitem__)
    assert session.limits == declared[:-1]
    # and one pass over it writes the same text
    predictions = one_shot(model, model.source, model.target, session.limits)[len(header) - 1 :].argmax(-1)
    assert predictions.tolist() == session.tokens + ([] if cut else [END])
    counts = session.counts
    assert counts.forwards == model.steps and counts.extra_forwards == model.popped
    assert counts.source_tokens_projected == len(model.source)
    assert counts.target_tokens_projected == len(model.target) + model.popped
    assert counts.re_encoded_source_tokens >= max(session.limits)
    assert counts.re_encoded_target_tokens >= len(model.target)


def check_events(session, events, words):
    writes, reads = [e for e in events if isinstance(e, Write)], [e for e in events if isinstance(e, Read)]
    assert "".join(w.text for w in writes) == session.text
    assert [t for w in writes for t in w.tokens] == session.tokens
    assert [r.index for r in reads] == list(range(len(reads)))
    assert [r.text for r in reads] == [*words, ""][: len(reads)]
    assert isinstance(events[-1], End) and sum(isinstance(e, End) for e in events) == 1
    assert len(session.delays) == len(session.elapsed) == len(session.text.split())
    assert session.delays == sorted(session.delays) and all(d <= len(words) for d in session.delays)
    assert all(a.time <= b.time for a, b in zip(events, events[1:], strict=False))
    assert len(json.loads(json.dumps(session.trace))["events"]) == len(events)


def live(session, words, rng):
    """Hands words over by its own timetable: several at once, before they are wanted, flushed or not."""
    events, left = [], list(words)
    while not session.ended:
        if left and rng.random() < 0.6:
            events += session.read(left.pop(0), flush=rng.random() < 0.3)
        elif not left:
            events += session.end(flush=rng.random() < 0.3) + session.write()
            assert session.ended
        if len(left) < len(words) and not session.ended and rng.random() < 0.5:
            events += session.write()
    return events


@FAST
@given(setup=SETUP, words=WORDS, k=st.integers(1, 7), rng=RNG)
def test_wait_k_rows_are_the_training_rows(setup, words, k, rng):
    session = make(setup, WaitK(k))
    events = list(session.run(iter(words)))
    check(session, setup, words)
    check_events(session, events, words)
    lengths, _ = segments_of(setup, words)
    assert session.limits == wait_k_limits(lengths, session.target_lengths, k)[:-1]
    # when words come changes nothing but the number of forwards
    again = make(setup, WaitK(k))
    check_events(again, live(again, words, rng), words)
    check(again, setup, words)
    assert (again.limits, again.tokens, again.delays) == (session.limits, session.tokens, session.delays)


def hashed(seed, use_logits):
    """A policy that reads and writes at random, always the same for the same state; it may look at text and logits."""

    def policy(state):
        look = 0
        if use_logits and hash((seed, state.source_words)) % 3:
            look = (int(state.logits.argmax()), state.ending)
        assert state.text is not None and not state.source_ended and state.source_words > 0
        key = (seed, state.source_words, state.target_words, len(state.tokens), look)
        return Action.READ if hash(key) % 2 else Action.WRITE

    return policy


@FAST
@given(setup=SETUP, words=WORDS, seed=st.integers(0, 99), use_logits=st.booleans(), rng=RNG)
def test_any_policy_matches_one_pass(setup, words, seed, use_logits, rng):
    session = make(setup, hashed(seed, use_logits))
    events = list(session.run(words))
    check(session, setup, words)
    check_events(session, events, words)
    again = make(setup, hashed(seed, use_logits))
    check_events(again, live(again, words, rng), words)
    check(again, setup, words)


@FAST
@given(setup=SETUP, words=WORDS)
def test_read_all_is_batch_mode(setup, words):
    session = make(setup, ReadAll())
    list(session.run(words))
    check(session, setup, words)
    lengths, source = segments_of(setup, words)
    assert session.limits == wait_k_limits(lengths, session.target_lengths, None)[:-1]
    assert session.model.source == source
    assert session.counts.extra_forwards == 0 and set(session.delays) <= {len(words)}


@FAST
@given(setup=SETUP, words=WORDS, threshold=st.floats(0.5, 1.0))
def test_threshold_on_logits(setup, words, threshold):
    session = make(setup, Threshold(lambda state: state.logits.max().item(), threshold))
    list(session.run(words))
    check(session, setup, words)


@FAST
@given(setup=SETUP, words=WORDS, k=st.integers(1, 4), fail=st.integers(0, 25), kind=st.sampled_from(["nan", "raise"]))
def test_a_failed_step_changes_nothing_and_can_be_tried_again(setup, words, k, fail, kind):
    clean = make(setup, WaitK(k))
    list(clean.run(words))
    session = make(setup, WaitK(k), fails={fail: "nan" if kind == "nan" else RuntimeError("model")})
    events, left, failures = [], list(words), 0
    while not session.ended:
        before = session.model.snapshot()
        try:
            if session.trace["events"] or left:
                events += session.write() if session.source_lengths[1:] else []
            if not session.ended:
                events += session.read(left[0]) if left else session.end()
                left = left[1:]
        except (ValueError, RuntimeError) as error:
            assert ("finite logits" in str(error)) if kind == "nan" else str(error) == "model"
            assert session.model.staged is None
            # rows fed before the failing step of the same call stay; the source never shrinks and never repeats
            after = session.model.snapshot()
            assert after[0][: len(before[0])] == before[0]
            assert session.limits == session.model.limits
            failures += 1
    assert failures <= 1
    events += session.write()
    check_events(session, events, words)
    assert (session.tokens, session.limits, session.delays) == (clean.tokens, clean.limits, clean.delays)
    ours, theirs = session.counts, clean.counts
    assert ours.source_tokens_projected == theirs.source_tokens_projected


@pytest.mark.parametrize("change", ["limit", "source order", "target token"])
def test_the_fake_can_fail(change):
    """A hash model that does not notice a wrong limit would make every test above pass."""
    codec = CODECS["leading"]()
    model = HashModel(len(codec), 3)
    source, target, limits = [1, 2, 3, 4], [1, 2, 3], [2, 3, 4]
    right = one_shot(model, source, target, limits)
    if change == "limit":
        limits = [1, 3, 4]
    elif change == "source order":
        source = [2, 1, 3, 4]
    else:
        target = [2, 2, 3]
    assert (one_shot(model, source, target, limits) != right).any(-1).all()
