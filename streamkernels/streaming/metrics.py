"""Latency of a streamed text: AL, LAAL, AP and DAL, computation-aware or not, equal to SimulEval's scorers.

`delays[i]` is what had been read of the source when target word i was written: source words (a text source) or the
milliseconds read (speech); X is the length of the source in the same unit, Y the number of words written (the
hypothesis), Y* that of the reference. Computation-aware (CA) scores are the same formulas on `elapsed[i]`, the source
read plus the time spent computing until word i was written (`elapsed` makes it); they are called so in SimulEval too.

Where the papers leave room we do as SimulEval 1.1.4 (github.com/facebookresearch/SimulEval):
- AL and AP divide by the reference length when one is given, so AP may exceed 1; LAAL by the larger of both; DAL
  never looks at the reference.
- AL and LAAL end at the first word whose delay reaches X, and are that delay when the very first one lies beyond X.
- A hypothesis without words has no latency: SimulEval skips it with a warning. Here its scores are NaN, and `corpus`
  leaves it out and says how many it left out.

The script released with GPE (github.com/EIT-NLP/StreamingLLM, evaluate/lagging.py) measures something else: the
marker that ends the source counts as a source word, so that X and late delays are one larger; Y is the hypothesis
length for AL also, which makes its AL and LAAL one number; a term enters only while its delay is at most X; and a
punctuation mark adds a second delay to the list, which is then cut to Y entries. Do not compare its numbers with
these.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..core.shapes import check_int, check_number, refuse


@dataclass(frozen=True)
class Sentence:
    """One sentence to score: `delays` and, for computation-aware scores, `elapsed`, in the unit of `source_length`."""

    delays: Sequence[float]
    source_length: float
    reference_length: int | None = None
    elapsed: Sequence[float] | None = None


def average_lagging(delays: Sequence[float], source_length: float, reference_length: int | None = None) -> float:
    """AL = 1/tau sum_{i=1..tau} (d_i - (i - 1) X / Y*), tau the first i with d_i >= X (else the last word).

    How far behind a writer who keeps pace with the source. Y* falls back to the hypothesis length without a
    reference. NaN for an empty hypothesis. Raises ValueError for delays that are negative, not finite or decreasing,
    or lengths that are not positive. Source: Ma et al. 2019, STACL, arXiv 1810.08398.
    """
    _check("average_lagging", delays, source_length, reference_length)
    return _lagging(delays, source_length, reference_length or len(delays))


def length_adaptive_average_lagging(
    delays: Sequence[float], source_length: float, reference_length: int | None = None
) -> float:
    """LAAL: AL with max(Y, Y*) for Y*, so that writing too much is not rewarded. Otherwise as `average_lagging`.

    Source: Papi et al. 2022, "Over-Generation Cannot Be Rewarded", arXiv 2206.05807; Polak et al. 2022, arXiv
    2204.06028.
    """
    _check("length_adaptive_average_lagging", delays, source_length, reference_length)
    return _lagging(delays, source_length, max(reference_length or 0, len(delays)))


def average_proportion(delays: Sequence[float], source_length: float, reference_length: int | None = None) -> float:
    """AP = 1/(X Y*) sum_i d_i: the share of the source that had been read, averaged over the words. Otherwise as above.

    Source: Cho and Esipova 2016, "Can neural machine translation do simultaneous translation?", arXiv 1606.02012.
    """
    _check("average_proportion", delays, source_length, reference_length)
    return sum(delays) / (source_length * (reference_length or len(delays))) if delays else math.nan


def differentiable_average_lagging(
    delays: Sequence[float], source_length: float, reference_length: int | None = None
) -> float:
    """DAL = 1/Y sum_i (d'_i - (i - 1) X / Y) with d'_1 = d_1, d'_i = max(d_i, d'_{i-1} + X / Y).

    Each word costs at least X / Y, so catching up after the source ended is counted. `reference_length` is checked,
    not used. Source: Cherry and Foster 2019, "Thinking Slow about Latency Evaluation", arXiv 1906.00048; Arivazhagan
    et al. 2019, arXiv 1906.05218.
    """
    _check("differentiable_average_lagging", delays, source_length, reference_length)
    if not delays:
        return math.nan
    gamma = len(delays) / source_length
    total = previous = 0.0
    for i, delay in enumerate(delays):
        previous = max(delay, previous + 1 / gamma) if i else delay
        total += previous - i / gamma
    return total / len(delays)


METRICS = {
    "AL": average_lagging,
    "LAAL": length_adaptive_average_lagging,
    "AP": average_proportion,
    "DAL": differentiable_average_lagging,
}


def latency(sentence: Sentence, *, computation_aware: bool = False) -> dict[str, float]:
    """AL, LAAL, AP and DAL of one sentence; on its `elapsed` when `computation_aware` (ValueError when it has none)."""
    delays = sentence.delays
    if computation_aware:
        delays = () if sentence.elapsed is None else sentence.elapsed
        if len(delays) != len(sentence.delays):
            expected = f"one elapsed time per delay ({len(sentence.delays)}) for computation-aware scores"
            refuse("latency", "elapsed", expected, f"{len(delays)}")
    return {name: metric(delays, sentence.source_length, sentence.reference_length) for name, metric in METRICS.items()}


def corpus(sentences: Iterable[Sentence], *, computation_aware: bool = False) -> dict[str, float]:
    """Means of `latency` over the sentences that have words, besides `sentences` (how many) and `skipped` (empty ones).

    All four are NaN when no sentence has words.
    """
    scores, skipped = [], 0
    for sentence in sentences:
        one = latency(sentence, computation_aware=computation_aware)
        if len(sentence.delays):
            scores.append(one)
        else:
            skipped += 1
    means = {name: math.fsum(one[name] for one in scores) / len(scores) if scores else math.nan for name in METRICS}
    return means | {"sentences": len(scores), "skipped": skipped}


def elapsed(delays: Sequence[float], computed: Sequence[float], *, source_word: float) -> list[float]:
    """What SimulEval calls elapsed: `delays[i] * source_word + computed[i]`.

    `delays` in source words, `computed` the time spent computing until each word was written (`Session.elapsed`, in
    seconds), `source_word` how long one source word lasts in the unit of `computed` (0.4 at 150 words a minute). The
    matching source length is the number of source words times `source_word`.
    """
    check_number("elapsed", "source_word", source_word, positive=True)
    if len(delays) != len(computed):
        refuse("elapsed", "computed", f"one time per delay ({len(delays)})", f"{len(computed)}")
    return [delay * source_word + spent for delay, spent in zip(delays, computed, strict=True)]


def _lagging(delays: Sequence[float], source_length: float, target_length: int) -> float:
    if not delays:
        return math.nan
    if delays[0] > source_length:
        return delays[0]
    gamma = target_length / source_length
    total = 0.0
    for i, delay in enumerate(delays):
        total += delay - i / gamma
        if delay >= source_length:
            break
    return total / (i + 1)


def _check(op: str, delays: Sequence[float], source_length: float, reference_length: int | None) -> None:
    check_number(op, "source_length", source_length, positive=True)
    if reference_length is not None:
        check_int(op, "reference_length", reference_length, minimum=1)
    last = 0.0
    for i, delay in enumerate(delays):
        last = check_number(op, f"delays[{i}]", delay, minimum=last)
