"""The two borders of a session: the model it steps and the codec between text and tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True)
class Step:
    """The rows that one session wants in a forward: `StreamModel.step`'s arguments."""

    source: Sequence[int]
    target: Sequence[int]
    limits: Sequence[int]


class StreamModel(Protocol):
    """What a session needs of a model: forwards that are staged until they are committed."""

    def step(self, source: Sequence[int], target: Sequence[int], limits: Sequence[int]) -> torch.Tensor:
        """One forward over the rows [source chunk ; target tokens], staged.

        Source rows see the source up to themselves; target row j sees the first `limits[j]` source tokens, those of
        this chunk included, and the target up to itself. Either side may be empty, not both. Returns float logits
        [len(target), vocab], or [1, vocab] of the last row alone.
        """
        ...

    def commit(self) -> None:
        """Keep the staged rows."""
        ...

    def discard(self) -> None:
        """Forget the staged rows, if there are any: also called when `step` itself raised."""
        ...

    def pop(self, n: int) -> None:
        """Forget the last n committed target rows. The source stays, also that of the same forward."""
        ...

    def reset(self) -> None:
        """Forget everything."""
        ...


class BatchModel(Protocol):
    """What `Sessions` need of a model: forwards that sessions share. `rows` sessions, numbered from 0."""

    rows: int

    def step(self, steps: Mapping[int, Step]) -> Mapping[int, torch.Tensor | Exception]:
        """One forward for these sessions; what it wrote is kept, unless `drop` takes it back.

        The answer of a session that took part: float logits [1, vocab] of its last target row (anything if it has
        none). One that could not, for want of room say, gets the exception, and nothing has changed for it. An
        exception that is raised means that nothing has changed at all.
        """
        ...

    def drop(self, row: int) -> None:
        """Forget what the last step wrote for this session."""
        ...

    def pop(self, row: int, n: int) -> None:
        """Forget the last n target rows of a session."""
        ...

    def truncate(self, row: int, source: int, target: int) -> None:
        """Forget all but the first rows of a session."""
        ...

    def reset(self, row: int) -> None:
        """Forget everything of a session."""
        ...


class Decoder(Protocol):
    """How tokens are chosen and where they go, for one session; the tokens are those of the text, without header."""

    def begin(self, header: Sequence[int]) -> None:
        """A text begins behind these tokens."""
        ...

    def choose(self, logits: torch.Tensor, tokens: Sequence[int]) -> torch.Tensor:
        """The next token, a number on the device of `logits` [vocab], behind `tokens`; nothing is read back here."""
        ...

    def put(self, token: int) -> None:
        """A token was written."""
        ...

    def stops(self, tokens: Sequence[int], logits: torch.Tensor) -> bool:
        """Whether the text ends with `tokens`; `logits` [vocab] predicted the last of them."""
        ...

    def end(self) -> None:
        """The text has ended."""
        ...


class Codec(Protocol):
    """The border between text and tokens."""

    end: frozenset[int]
    """Tokens that end the text; they are never fed."""

    def encode(self, word: str, first: bool) -> list[int]:
        """The tokens of one source word; `first` says that it is the first."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of target tokens."""
        ...

    def closes(self, token: int) -> bool:
        """Whether a word ends with this token, as the token itself shows (trailing-space and byte-level tokenizers)."""
        ...

    def opens(self, token: int) -> bool:
        """Whether this token can only begin a new word (leading-space tokenizers)."""
        ...
