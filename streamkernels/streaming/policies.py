"""When to read and when to write: policies behind one protocol.

A policy is any callable `policy(state) -> Action.READ | Action.WRITE`. The session asks it at word boundaries only:
before the first word, and after every finished word, once per state, so a punctuation mark inside a word never asks.
It is not asked while no word has been read (there is nothing to write about) nor once the source has ended (there is
nothing to read).

A policy that follows a rule may also have `visible(target_segment, segments) -> int`, the number of source segments
that a target segment sees, as in `streamkernels.core.spans`: segment 0 of the source is the prompt, of the target the
header. The session uses it for the header, whose rows but the last see `visible(0, segments)` segments; without it
they see all that has been read.

A policy that looks at `state.logits` or `state.ending` each time may say so by an attribute `predicts = True`: the
prediction is then there before it is asked, and in a batch its forward is shared with the other sessions.
"""

from __future__ import annotations

import enum
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch

from ..core.shapes import check_int, check_number, refuse
from ..core.spans import visible_segments


class Action(enum.Enum):
    """What a policy decides."""

    READ = "read"
    WRITE = "write"


@dataclass(frozen=True)
class State:
    """What a policy may look at, at a word boundary.

    source_words: words read. source_segments: prompt, words and, once read, the end marker. source_ended: the end
    marker was read. target_words: words written. `text`, `tokens`, `logits` and `ending` are looked up when used.
    """

    source_words: int
    source_segments: int
    source_ended: bool
    target_words: int
    _tokens: Callable[[], tuple[int, ...]] = field(repr=False)
    _text: Callable[[], str] = field(repr=False)
    _logits: Callable[[], torch.Tensor] = field(repr=False)
    _ending: Callable[[], bool] = field(repr=False)

    @property
    def tokens(self) -> tuple[int, ...]:
        """The target tokens so far, without the header."""
        return self._tokens()

    @property
    def text(self) -> str:
        """The text written so far."""
        return self._text()

    @property
    def logits(self) -> torch.Tensor:
        """Float [vocab]: what the model predicts for the next word's first token, given everything that has been read.

        Costs a forward unless the model has just predicted it. Writing then uses it; reading takes the row back and
        feeds it again (`Counts.extra_forwards`). Only there while the policy decides.
        """
        return self._logits()

    @property
    def ending(self) -> bool:
        """Whether the text would end here if it is written on now. Costs what `logits` costs."""
        return self._ending()


class Policy(Protocol):
    """The one protocol: a callable from a state to an action."""

    def __call__(self, state: State) -> Action: ...


class WaitK:
    """Wait-k: target word t (from 1) sees the first k + t - 1 source words; written only when these were read.

    In segments (prompt and header are number 0), target segment s sees `core.spans.visible_segments(s, k, segments)`,
    the function that builds the training limits too. k: an int >= 1. Source: Ma et al. 2019, STACL, arXiv 1810.08398;
    the count that takes the prompt for one word: the code of GPE (arXiv 2505.16983).
    """

    def __init__(self, k: int) -> None:
        self.k = check_int("WaitK", "k", k, minimum=1)

    def visible(self, target_segment: int, segments: int) -> int:
        """How many of `segments` source segments the target segment sees."""
        return visible_segments(target_segment, self.k, segments)

    def __call__(self, state: State) -> Action:
        segments = state.source_segments if state.source_ended else sys.maxsize
        enough = self.visible(state.target_words + 1, segments) <= state.source_segments
        return Action.WRITE if enough else Action.READ

    def __repr__(self) -> str:
        return f"WaitK({self.k})"


class ReadAll:
    """Read everything as it comes, then write: sequential streaming (arXiv 2603.04592), a wait-k model's batch mode."""

    def visible(self, target_segment: int, segments: int) -> int:
        """All of them."""
        return segments

    def __call__(self, state: State) -> Action:
        return Action.WRITE if state.source_ended else Action.READ

    def __repr__(self) -> str:
        return "ReadAll()"


class Threshold:
    """Write while `score(state) >= threshold`, otherwise read on. `score` is the user's, a float; NaN is refused.

    predicts: whether the score always looks at the logits.

    >>> confident = Threshold(lambda state: state.logits.softmax(-1).max().item(), 0.7)
    """

    def __init__(self, score: Callable[[State], float], threshold: float, *, predicts: bool = False) -> None:
        if not callable(score):
            refuse("Threshold", "score", "a callable from State to float", score, TypeError)
        self.score, self.predicts = score, predicts
        self.threshold = check_number("Threshold", "threshold", threshold)

    def __call__(self, state: State) -> Action:
        score = float(self.score(state))
        if score != score:
            refuse("Threshold", "score", "a number", score)
        return Action.WRITE if score >= self.threshold else Action.READ

    def __repr__(self) -> str:
        return f"Threshold({self.threshold})"
