"""What a session did: events, counts, and both as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Read:
    """A source word was read. `index` counts words from 0; the last Read is the end marker, with text ''.

    `time` as in `Write`.
    """

    index: int
    text: str
    time: float


@dataclass(frozen=True)
class Write:
    """A target word was finished, with all its tokens, after `source_words` words had been read.

    `text` keeps its spaces: joined, the texts of a session are its text. `time`: seconds on the session's clock since
    its first word was handed over, waiting included.
    """

    text: str
    tokens: tuple[int, ...]
    source_words: int
    time: float


@dataclass(frozen=True)
class End:
    """The text ended: `reason` is 'end' (the model said so), 'length' (max_target_tokens), 'stop' (the decoder said so)
    or 'cancelled'."""

    reason: str
    time: float


Event = Read | Write | End


@dataclass
class Counts:
    """Forwards and projected tokens of one session.

    Every forward is one of the first three: only source rows, only target rows, or both merged. `extra_forwards` says
    how many of them predicted something that was taken back because more was read. The projected tokens are the rows
    given to the model, those of extra forwards included; a forward that failed (an exception, NaN) counts nowhere.
    The last two say what re-encoding would have projected for the same text (`re_encoding_cost`).
    """

    read_forwards: int = 0
    write_forwards: int = 0
    merged_forwards: int = 0
    extra_forwards: int = 0
    source_tokens_projected: int = 0
    target_tokens_projected: int = 0
    re_encoded_source_tokens: int = 0
    re_encoded_target_tokens: int = 0

    @property
    def forwards(self) -> int:
        """All forwards."""
        return self.read_forwards + self.write_forwards + self.merged_forwards

    def add(self, source: int, target: int) -> None:
        """Count one forward over so many source and target rows."""
        self.merged_forwards += source > 0 and target > 0
        self.read_forwards += source > 0 and target == 0
        self.write_forwards += source == 0
        self.source_tokens_projected += source
        self.target_tokens_projected += target


def re_encoding_cost(limits: Sequence[int], header: int) -> tuple[int, int]:
    """(source, target) tokens that re-encoded streaming would have projected for the same text.

    `limits[j]` is the number of source tokens that target row j saw, the first `header` rows being the header's.
    Whenever the next prediction sees more source than the one before, such a loop rebuilds both caches: all source
    tokens read so far and all target tokens so far, header included; otherwise it feeds the one new token. Reads
    without a word between them are rebuilt once, and the loop is taken to know every word boundary for free, so the
    numbers are a lower bound. Definition: "re-encoded" in arXiv 2603.04592, table 1.
    """
    source = target = 0
    for j in range(header - 1, len(limits)):
        if j == header - 1 or limits[j] != limits[j - 1]:
            source += limits[j]
            target += j + 1
        else:
            target += 1
    return source, target


def event_record(event: Event) -> dict[str, Any]:
    """One event as JSON-able data: its fields besides `event`: 'read', 'write' or 'end'."""
    record = {"event": type(event).__name__.lower()} | asdict(event)
    return {name: list(value) if isinstance(value, tuple) else value for name, value in record.items()}
