"""Latency metrics against SimulEval's own outputs, and by hand."""

import json
import math
from pathlib import Path

import pytest

from streamkernels.streaming import metrics
from streamkernels.streaming.metrics import METRICS, Sentence, corpus, latency

FIXTURE = json.loads((Path(__file__).parent / "fixtures" / "simuleval_latency.json").read_text())
NAMES = tuple(METRICS)


def close(a, b):
    return a == pytest.approx(b, rel=1e-9, abs=1e-9)


def sentence(case):
    return Sentence(case["delays"], case["source_length"], case["reference_length"], case.get("elapsed"))


def test_the_fixture_covers_the_corners():
    words = FIXTURE["words"]
    assert FIXTURE["simuleval"] == "1.1.4" and len(words) + len(FIXTURE["milliseconds"]) >= 40
    assert any(not c["delays"] for c in words) and any(len(c["delays"]) == 1 for c in words)
    assert any(c["delays"] and c["delays"][0] > c["source_length"] for c in words)
    assert any(len(c["delays"]) > c["reference_length"] for c in words)
    assert any(0 < len(c["delays"]) < c["reference_length"] for c in words)


@pytest.mark.parametrize("case", FIXTURE["words"])
def test_words_equal_simuleval(case):
    if not case["delays"]:
        assert all(math.isnan(x) for x in latency(sentence(case)).values())
        return
    assert close(latency(sentence(case)), case["scores"])
    assert close(latency(Sentence(case["delays"], case["source_length"])), case["scores_without_reference"])


@pytest.mark.parametrize("case", FIXTURE["milliseconds"])
def test_milliseconds_and_computation_aware_equal_simuleval(case):
    assert close(latency(sentence(case)), case["scores"])
    assert close(latency(sentence(case), computation_aware=True), case["scores_computation_aware"])
    assert case["scores"] != case["scores_computation_aware"]


def test_corpus_means_equal_simuleval_and_count_what_they_skip():
    ours = corpus(sentence(c) for c in FIXTURE["words"])
    assert close({k: ours[k] for k in NAMES}, FIXTURE["corpus"])
    empty = sum(not c["delays"] for c in FIXTURE["words"])
    assert (ours["sentences"], ours["skipped"]) == (len(FIXTURE["words"]) - empty, empty) and empty > 0
    ours = corpus((sentence(c) for c in FIXTURE["milliseconds"]), computation_aware=True)
    assert close({k: ours[k] for k in NAMES}, FIXTURE["corpus_computation_aware"])
    nothing = corpus([])
    assert nothing["sentences"] == 0 and all(math.isnan(nothing[k]) for k in NAMES)


def test_by_hand():
    # wait-1 over equal lengths lags one word; read-all lags the whole source until tau = 1
    assert latency(Sentence([1, 2, 3, 4], 4)) == {"AL": 1.0, "LAAL": 1.0, "AP": 10 / 16, "DAL": 1.0}
    assert latency(Sentence([4, 4, 4, 4], 4)) == {"AL": 4.0, "LAAL": 4.0, "AP": 1.0, "DAL": 4.0}
    # over-generation: AL falls below LAAL
    scores = latency(Sentence([1, 2, 2, 3, 3, 4], 4, 3))
    assert scores["AL"] < scores["LAAL"]


def test_elapsed_is_source_read_plus_time_spent():
    assert metrics.elapsed([1, 3], [0.25, 0.5], source_word=0.5) == [0.75, 2.0]
    with pytest.raises(ValueError, match="computed: expected one time per delay"):
        metrics.elapsed([1, 3], [0.25], source_word=0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1, 2], 0), "source_length: expected a number > 0"),
        (([1, 2], 3, 0), "reference_length: expected an int >= 1"),
        (([2, 1], 3), r"delays\[1\]: expected a number >= 2"),
        (([-1], 3), r"delays\[0\]"),
        (([math.nan], 3), r"delays\[0\]: expected a finite number"),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_refusals(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        METRICS[name](*arguments)


def test_computation_aware_needs_elapsed():
    with pytest.raises(ValueError, match="elapsed: expected one elapsed time per delay"):
        latency(Sentence([1], 2), computation_aware=True)
    with pytest.raises(ValueError, match="expected one elapsed time per delay .2. for computation-aware scores, got 1"):
        latency(Sentence([1, 2], 2, elapsed=[1.0]), computation_aware=True)
