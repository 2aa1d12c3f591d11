"""The two borders of a session: the model it steps and the codec between text and tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch


class StreamModel(Protocol):
    """What a session needs of a model: forwards that are staged until they are committed."""

    def step(self, source: Sequence[int], target: Sequence[int], limits: Sequence[int]) -> torch.Tensor:
        """One forward over the rows [source chunk ; target tokens], staged.

        Source rows see the source up to themselves; target row j sees the first `limits[j]` source tokens, those of
        this chunk included, and the target up to itself. Either side may be empty, not both. Returns float logits
        [len(target), vocab].
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
