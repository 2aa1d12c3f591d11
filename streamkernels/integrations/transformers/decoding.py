"""How a session chooses tokens the Hugging Face way: logits processors, stopping criteria, sampling, streamers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList

from ...core.shapes import refuse


class Decoding:
    """A session's `Decoder`, for `StreamSession(decoder=)` or, one per session, `SessionBatch(decoder=)`.

    processors: LogitsProcessors (warpers included) in their order; they get the text's tokens so far, int64 [1, n] on
    the device of the scores, without header and source. criteria: StoppingCriteria; they get the same tokens on the
    CPU, so that they wait for no device, and the unprocessed scores. do_sample: draw from the processed scores instead
    of taking the best; generator: on the scores' device. streamer: put(ids) and end(), a TextStreamer for instance; the
    header is its prompt.

    Choosing reads nothing back: the session reads the token itself, for all sessions of a batch at once. A token is
    chosen for every prediction, also for one that is taken back because more was read.
    """

    def __init__(
        self,
        *,
        processors: Sequence[Callable[..., Tensor]] = (),
        criteria: Sequence[Callable[..., Any]] = (),
        do_sample: bool = False,
        generator: torch.Generator | None = None,
        streamer: Any = None,
    ) -> None:
        for name, found in (("processors", processors), ("criteria", criteria)):
            if not all(callable(f) for f in found):
                refuse("Decoding", name, "callables, as transformers' are", found, TypeError)
        self._processors = LogitsProcessorList(processors)
        self._criteria = StoppingCriteriaList(criteria)
        self._sample, self._generator, self._streamer = do_sample, generator, streamer

    def begin(self, header: Sequence[int]) -> None:
        """A text begins: its header is the streamer's prompt."""
        if self._streamer is not None:
            self._streamer.put(torch.tensor([list(header)]))

    def choose(self, logits: Tensor, tokens: Sequence[int]) -> Tensor:
        """The next token: a number on the device of `logits` [vocab]."""
        scores = logits[None]
        if self._processors:
            ids = torch.tensor([list(tokens)], dtype=torch.int64).to(logits.device, non_blocking=True)
            scores = self._processors(ids, scores.clone())
        if not self._sample:
            return scores[0].argmax(-1)
        # the largest of p / e with e drawn from an exponential distribution is a draw from p; no assertion on a device
        odds = scores[0].float().softmax(-1)
        return (odds / torch.empty_like(odds).exponential_(generator=self._generator)).argmax(-1)

    def put(self, token: int) -> None:
        """Tell the streamer."""
        if self._streamer is not None:
            self._streamer.put(torch.tensor([token]))

    def stops(self, tokens: Sequence[int], logits: Tensor) -> bool:
        """Whether a criterion ends the text here."""
        if not self._criteria:
            return False
        return bool(torch.as_tensor(self._criteria(torch.tensor([list(tokens)]), logits[None])).all())

    def end(self) -> None:
        """Tell the streamer."""
        if self._streamer is not None:
            self._streamer.end()
