"""The caption model's tokens: what stands before, between and after the words; and how far a wait-k schedule can get.

Source segments are [prompt, word 1, ..., word n, end], target segments [header, word 1, ..., word m, end]. A word is
its UTF-8 bytes and a space, as `streamkernels`' ByteCodec makes it (ByT5 ids: byte + 3). The prompt counts as one
source segment and the header as target segment 0, as `streamkernels.spans.wait_k` has it.
"""

from __future__ import annotations

from collections.abc import Sequence

from generator import Sample

from streamkernels.core.spans import visible_segments

# as text for a tokenizer, and as ids
PROMPT, HEADER, SOURCE_END = "<extra_id_0>", "<extra_id_1>", "</s>"
PROMPT_ID, HEADER_ID, END_ID, BYTE = 259, 260, 1, 3
VOCAB = 384


def word_tokens(word: str) -> list[int]:
    """One word, spoken or written: its bytes and a space."""
    return [byte + BYTE for byte in f"{word} ".encode()]


def segments(words: Sequence[str], first: int) -> list[list[int]]:
    """[prompt or header, word 1, ..., word n, end] as token ids; `first` is PROMPT_ID or HEADER_ID."""
    return [[first], *map(word_tokens, words), [END_ID]]


def seen(sample: Sample, k: int | None) -> list[bool]:
    """For each written word, and last for the end of the text: has wait-k read the spoken words that it needs?"""
    count = len(sample.spoken) + 2
    return [visible_segments(s, k, count) - 1 >= n for s, n in enumerate(sample.needed, 1)]


def ceiling(samples: Sequence[Sample], k: int | None) -> float:
    """The share of samples whose every written word had its needed words read: what wait-k can do without guessing."""
    return sum(all(seen(sample, k)) for sample in samples) / len(samples)
