"""Where a word ends, for two kinds of Hugging Face tokenizer: words that begin with their space, and bytes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from transformers import ByT5Tokenizer

from ...core.shapes import refuse

Tokens = str | Sequence[int]  # text that the tokenizer reads, or ids

_ANCHOR = "a"  # text that stands before a word, so that the word is tokenised as inside a sentence


class LeadingSpaceCodec:
    """Tokenizers in which a space belongs to the word after it: byte-level BPE (GPT-2, Llama 3, Qwen2), SentencePiece
    (Llama 2).

    A finished word shows only when the next one opens, except before a token that ends in white space itself ('.\\n').

    tokenizer: a Hugging Face tokenizer. end: ids that end the target text, default its eos token. Special tokens
    written out in a word are read as text where the tokenizer can do so. Raises ValueError if the tokenizer does not
    put the space first.
    """

    def __init__(self, tokenizer: Any, end: Iterable[int] | None = None) -> None:
        self.tokenizer = tokenizer
        self.end = _end(tokenizer, end)
        self._anchor = self._ids(_ANCHOR)
        self._anchor_text = self._text(self._anchor)
        self._texts: dict[int, str] = {}
        after = self.encode("b", first=False)
        if not after or not self.opens(after[0]):
            got = f"{type(tokenizer).__name__}, whose words do not begin with their space: pass codec="
            refuse(
                "LeadingSpaceCodec", "tokenizer", "a tokenizer that puts a space at the beginning of the next word", got
            )

    def encode(self, word: str, first: bool) -> list[int]:
        """The tokens of one source word: as at the beginning of a text if it is the first, else as after a space."""
        if first:
            return self._ids(word)
        ids = self._ids(f"{_ANCHOR} {word}")
        n = len(self._anchor)
        return ids[n:] if ids[:n] == self._anchor else self._ids(f" {word}")

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of some target tokens, their leading space included; special tokens are left out."""
        return self._text([*self._anchor, *tokens]).removeprefix(self._anchor_text)

    def closes(self, token: int) -> bool:
        """Whether the token ends in white space after something else."""
        text = self._token(token)
        return text != text.rstrip() and bool(text.strip())

    def opens(self, token: int) -> bool:
        """Whether the token begins with white space."""
        text = self._token(token)
        return text != text.lstrip()

    def _token(self, token: int) -> str:
        if token not in self._texts:
            self._texts[token] = self.decode([token])
        return self._texts[token]

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True))

    def _text(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))


class ByteCodec:
    """UTF-8 bytes as tokens (`ByT5Tokenizer`: byte + 3): every word, read or written, ends with its space.

    The boundary shows in the word's own last token, so that writing pays no extra forward for it.

    tokenizer: a ByT5Tokenizer, or any object with `offset` (the id of byte 0) and `eos_token_id`. end: ids that end
    the target text.
    """

    def __init__(self, tokenizer: Any, end: Iterable[int] | None = None) -> None:
        self.offset = int(tokenizer.offset)
        self.end = _end(tokenizer, end)

    def encode(self, word: str, first: bool) -> list[int]:
        """The bytes of one source word and of the space after it."""
        return [byte + self.offset for byte in f"{word} ".encode()]

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of some target tokens; ids that are no byte, and broken UTF-8, are left out."""
        return bytes(t - self.offset for t in tokens if 0 <= t - self.offset < 256).decode(errors="ignore")

    def closes(self, token: int) -> bool:
        """Whether the token is the space."""
        return token == ord(" ") + self.offset

    def opens(self, token: int) -> bool:
        """Never: a byte alone does not begin a word."""
        return False


def codec_for(tokenizer: Any, end: Iterable[int] | None = None) -> LeadingSpaceCodec | ByteCodec:
    """The codec of a Hugging Face tokenizer. end: ids that end the target text, default its eos token.

    Raises ValueError for a tokenizer that neither works on bytes nor puts the space at the beginning of a word.
    """
    return ByteCodec(tokenizer, end) if isinstance(tokenizer, ByT5Tokenizer) else LeadingSpaceCodec(tokenizer, end)


def _end(tokenizer: Any, end: Iterable[int] | None) -> frozenset[int]:
    if end is not None:
        return frozenset(end)
    return frozenset() if tokenizer.eos_token_id is None else frozenset([tokenizer.eos_token_id])


def tokens_of(op: str, tokenizer: Any, name: str, text: Tokens) -> list[int]:
    """The ids of a piece of text around source or target, in which special tokens count as such."""
    if not isinstance(text, str):
        return list(text)
    if tokenizer is None:
        refuse(op, name, "token ids when there is no tokenizer", text)
    return list(tokenizer.encode(text, add_special_tokens=False))


def ends_of(lm: Any, tokenizer: Any) -> frozenset[int]:
    """End tokens of the target: those of the model's generation config and the tokenizer's."""
    config = getattr(lm, "generation_config", None)
    found = getattr(config, "eos_token_id", None)
    ends = list(found) if isinstance(found, (list, tuple)) else [found]
    return frozenset(e for e in [*ends, getattr(tokenizer, "eos_token_id", None)] if e is not None)
