"""Training batches: samples of like length, their tokens, positions and labels, and their wait-k spans."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, islice
from random import Random

import torch
from generator import Sample, samples
from layout import HEADER_ID, PROMPT_ID, seen, segments
from torch import Tensor

from streamkernels.core.spans import wait_k

# each training sample is shown at one of these waits; None reads everything first
WAITS = (1, 2, 3, 4, 5, 6, 8, 10, None)
WAIT_WEIGHTS = (6, 8, 14, 10, 18, 8, 10, 4, 22)
# a written word whose needed words have not been read can only be guessed: it teaches a habit, not the task
GUESS_WEIGHT = 0.1
IGNORED = -100
Batch = dict[str, Tensor]


def collate(batch: Sequence[Sample], ks: Sequence[int | None]) -> Batch:
    """Tensors of one batch: each row is [source | target | padding], sample b under wait-k with `ks[b]`.

    Returns input_ids, position_ids, labels (all int64 [B, T]), spans (int32 [B, T, 2, 2]) and weights (fp32 [B, T]).
    A target row's label is the token after it, from the header's last row (which predicts the first word) on; a row
    sees what had been read when the token that it predicts was written. Source and target positions count from 0.
    """
    sources = [segments(sample.spoken, PROMPT_ID) for sample in batch]
    targets = [segments(sample.written, HEADER_ID) for sample in batch]
    source_lengths = [[len(s) for s in source] for source in sources]
    target_lengths = [[len(t) for t in target] for target in targets]
    T = max(sum(s) + sum(t) for s, t in zip(source_lengths, target_lengths, strict=True))
    T += -T % 8
    ids, positions = torch.zeros(len(batch), T, dtype=torch.long), torch.zeros(len(batch), T, dtype=torch.long)
    labels, weights = torch.full((len(batch), T), IGNORED), torch.zeros(len(batch), T)
    for b, (sample, k) in enumerate(zip(batch, ks, strict=True)):
        source, target = list(chain(*sources[b])), list(chain(*targets[b]))
        S, n = len(source), len(source) + len(target)
        ids[b, :n] = torch.tensor(source + target)
        positions[b, :n] = torch.tensor([*range(S), *range(n - S)])
        labels[b, S : n - 1] = ids[b, S + 1 : n]
        sure = [1.0 if known else GUESS_WEIGHT for known in seen(sample, k)]
        each = ([weight] * count for weight, count in zip(sure, target_lengths[b][1:], strict=True))
        weights[b, S : n - 1] = torch.tensor(list(chain(*each)))
    spans = wait_k(source_lengths, target_lengths, list(ks), T=T).bounds
    return {"input_ids": ids, "position_ids": positions, "labels": labels, "spans": spans, "weights": weights}


def tokens_of(sample: Sample) -> int:
    """Rows that a sample takes."""
    return sum(len(word.encode()) + 1 for word in (*sample.spoken, *sample.written)) + 4


def by_length(rows: Sequence[Sample], tokens: int, most: int = 10**9) -> Iterator[list[Sample]]:
    """Batches of samples of like length, each of at most `tokens` tokens with padding and `most` samples."""
    batch: list[Sample] = []
    for sample in sorted(rows, key=tokens_of):
        if batch and (tokens_of(sample) * (len(batch) + 1) > tokens or len(batch) == most):
            yield batch
            batch = []
        batch.append(sample)
    if batch:
        yield batch


class Training(torch.utils.data.IterableDataset[Batch]):
    """Endless training batches of about `tokens` tokens (at most `most` samples), different in every worker."""

    def __init__(self, seed: str, tokens: int, most: int = 10**9, pool: int = 2048) -> None:
        self.seed, self.tokens, self.most, self.pool = seed, tokens, most, pool

    def __iter__(self) -> Iterator[Batch]:
        worker = torch.utils.data.get_worker_info()
        name = f"{self.seed} {worker.id if worker else 0}"
        stream, rng = samples(name, held_out=False), Random(name)
        while True:
            batches = list(by_length(list(islice(stream, self.pool)), self.tokens, self.most))
            # what is left over at the end of the sort is short of samples
            rng.shuffle(batches)
            for batch in batches:
                yield collate(batch, rng.choices(WAITS, WAIT_WEIGHTS, k=len(batch)))
