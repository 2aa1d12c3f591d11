"""The captions' data: the same on every machine, two sides that never meet, and wait-k ceilings by brute force."""

from __future__ import annotations

import hashlib
import itertools
from random import Random

import pytest

pytest.importorskip("num2words")
from layout import ceiling, seen  # noqa: E402
from writing import BEFORE_MONTH, LABELS, write  # noqa: E402

entities = pytest.importorskip("entities")
generator = pytest.importorskip("generator")

HELD_OUT = generator.HERE / "held_out.tsv"
SHA256 = "1be21cd6188605ed0ba38b29a74b44dd44994d8ab6e3e783894ee2f73aca4d86"


def test_held_out_set_is_the_committed_one() -> None:
    rows = generator.held_out_set()
    text = generator.to_tsv(rows)
    assert hashlib.sha256(text.encode()).hexdigest() == SHA256
    assert HELD_OUT.read_text(encoding="utf-8") == text
    assert generator.from_tsv(HELD_OUT) == rows


def test_sides_never_meet() -> None:
    held_out = {sample.spoken for sample in generator.from_tsv(HELD_OUT)}
    assert len(held_out) == 1000
    assert all(generator.is_held_out(spoken) for spoken in held_out)
    trained = {sample.spoken for sample in itertools.islice(generator.samples("train 0 0", held_out=False), 3000)}
    assert not trained & held_out
    assert len(trained) > 2900


def test_streams_follow_their_seed() -> None:
    first, again, other = (
        list(itertools.islice(generator.samples(seed, held_out=False), 50)) for seed in ("a 1", "a 1", "a 2")
    )
    assert first == again
    assert not {s.spoken for s in first} & {s.spoken for s in other if len(s.spoken) > 3}


@pytest.mark.parametrize("kind", sorted(entities.KINDS))
def test_entities_are_written_as_their_values_say(kind: str) -> None:
    """num2words against the grammar; every kind is drawn, and alone it means what was drawn."""
    rng = Random(kind)
    for _ in range(200):
        spoken, written = entities.KINDS[kind](rng)
        assert " ".join(write(spoken.split())[0]) == written, spoken


def test_samples_are_short_and_certain_in_order() -> None:
    for sample in itertools.islice(generator.samples("check", held_out=False), 500):
        assert 1 <= len(sample.spoken) <= generator.MAX_WORDS
        assert len(" ".join(sample.spoken).encode()) < generator.MAX_BYTES
        assert len(sample.needed) == len(sample.written) + 1
        assert list(sample.needed) == sorted(sample.needed)
        assert sample.needed[-1] == len(sample.spoken) + 1


@pytest.mark.parametrize("k", [1, 2, 3, 5, 8, None])
def test_ceiling_by_brute_force(k: int | None) -> None:
    rows = generator.from_tsv(HELD_OUT)[:300]
    reached = 0
    for sample in rows:
        # play the schedule: read k words, then write one, read one; the end marker is read like a word
        there = len(sample.spoken) + 1
        read, good = (there if k is None else min(k, there)), []
        for needed in sample.needed:
            good.append(needed <= read)
            read = min(read + 1, there)
        assert seen(sample, k) == good
        reached += all(good)
    assert ceiling(rows, k) == reached / len(rows)


def test_ceilings_leave_room_to_stream() -> None:
    rows = generator.from_tsv(HELD_OUT)
    assert ceiling(rows, 1) < 0.3
    assert 0.7 < ceiling(rows, 5) < 0.95
    assert ceiling(rows, None) == 1.0


def test_transcript_follows_the_conventions() -> None:
    """Written by hand; the grammar agrees with the hand, and the alignment is its."""
    rows = generator.from_tsv(generator.HERE / "transcript.tsv")
    assert len(rows) >= 60
    for sample in rows:
        written, needed = write(sample.spoken)
        assert tuple(written) == sample.written
        assert (*needed, len(sample.spoken) + 1) == sample.needed
    assert len({sample.spoken for sample in rows}) == len(rows)


def test_plain_words_hold_no_rule_twice() -> None:
    assert not LABELS & BEFORE_MONTH
