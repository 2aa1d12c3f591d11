"""All that one session knows: what it was told once, and where it stands."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from ..core.shapes import check_int
from .policies import Action
from .protocols import Decoder
from .trace import Counts, Event


@dataclass(frozen=True)
class Settings:
    """What a session is told once; see `Session`."""

    header: list[int]
    prompt: list[int]
    source_end: list[int]
    sample: Callable[[torch.Tensor], int] | None
    decoder: Decoder | None
    max_target_tokens: int
    max_word_tokens: int
    clock: Callable[[], float]


@dataclass
class Held:
    """What the last row that was fed predicts, and how much source it saw."""

    limit: int
    logits: torch.Tensor  # [vocab]
    best: int  # or what the decoder chose
    token: int | None = None  # sampled from logits, at most once


@dataclass
class Stream:
    """All that one session knows, apart from its model and settings."""

    source_lengths: list[int]  # of the segments read
    pending: list[int]  # source tokens read, not yet projected
    unfed: list[int]  # target tokens whose rows come next: the header, then one token at a time
    read_tokens: int
    waiting: bool = False  # whether pending holds more than the prompt
    inbox: deque[tuple[str, list[int]]] = field(default_factory=deque)  # handed over, not read; '' is the end marker
    handed: int = 0
    closed: bool = False  # end() was called
    words_read: int = 0
    source_ended: bool = False  # and the end marker read
    tokens: list[int] = field(default_factory=list)
    word: list[int] = field(default_factory=list)  # the open word
    before: list[int] = field(default_factory=list)  # the word before it
    target_lengths: list[int] = field(default_factory=list)
    visible: list[int] = field(default_factory=list)  # source segments that each target segment sees
    limits: list[int] = field(default_factory=list)  # one per target row in the cache
    boundary: bool = True  # the next prediction begins a word: the policy is to be asked
    decision: Action | None = None
    held: Held | None = None
    in_word: bool = False  # the text so far ends inside a word
    written: list[tuple[int, float]] = field(default_factory=list)  # per word of the text: words read, seconds spent
    done: bool = False
    counts: Counts = field(default_factory=Counts)
    events: list[Event] = field(default_factory=list)
    delivered: int = 0
    started: float = 0.0
    spent: float = 0.0
    entered: float = 0.0


def token_ids(op: str, name: str, tokens: Sequence[int]) -> list[int]:
    """Token ids as a list of Python ints >= 0, checked."""
    ids = tokens.tolist() if isinstance(tokens, torch.Tensor) else list(tokens)
    return [check_int(op, f"{name}[{i}]", token) for i, token in enumerate(ids)]
