"""`StreamSession`: the loop computes what one forward under the same spans computes; codecs; the patch's lifetime."""

from __future__ import annotations

import gc

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

import streamkernels as sk
from streamkernels import ReadAll, StreamSession, WaitK
from streamkernels.integrations.transformers import ByteCodec, GroupedCache, LeadingSpaceCodec, codec_for
from streamkernels.integrations.transformers.patch import handle_of
from streamkernels.testing.compare import EXACT

TEXT = (
    "the meeting is on the twenty third of march at five thirty pm , "
    "so the third room of the house is free on march five ."
)
WORDS = TEXT.split()


def bpe(space):
    """A little BPE tokenizer with the space in front of a word: GPT-2's bytes, or SentencePiece's block."""
    tokenizer = Tokenizer(models.BPE())
    if space == "bytes":
        tokenizer.pre_tokenizer, tokenizer.decoder = (
            pre_tokenizers.ByteLevel(add_prefix_space=False),
            decoders.ByteLevel(),
        )
    else:
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=["<eos>", "<user>", "<bot>"], show_progress=False)
    tokenizer.train_from_iterator([TEXT] * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", additional_special_tokens=["<user>", "<bot>"]
    )


def never_end(logits):
    """Greedy, but the text goes on: a random model may end at once."""
    return int(logits[2:].argmax()) + 2


SESSIONS = [
    ("qwen2", torch.float64, "byte", WaitK(1), 0),
    ("qwen2", torch.float64, "byte", WaitK(3), 7),
    ("qwen2", torch.float64, "byte", ReadAll(), 0.5),
    ("qwen2", torch.float64, "bytes", WaitK(1), 0.5),
    ("qwen2", torch.float64, "bytes", ReadAll(), 0),
    ("qwen2", torch.float64, "metaspace", WaitK(3), 0),
    ("llama", torch.float64, "byte", WaitK(3), 0.5),
    ("llama", torch.float64, "bytes", WaitK(3), 0),
    ("llama", torch.float64, "metaspace", WaitK(1), 7),
    ("qwen2", torch.float32, "byte", WaitK(1), 7),
    ("llama", torch.float32, "bytes", WaitK(1), 0),
]


@pytest.mark.parametrize("family, dtype, kind, policy, offset", SESSIONS)
def test_a_session_equals_one_shot(tiny, family, dtype, kind, policy, offset, close, one_shot, recorded):
    tokenizer = ByT5Tokenizer() if kind == "byte" else bpe(kind)
    model = tiny(family, dtype=dtype, vocab=384 if kind == "byte" else 120)
    pieces = (
        {"prompt": [4, 5, 6], "header": [7, 8], "source_end": [9]}
        if kind == "byte"
        else {"prompt": "<user>", "header": "<bot> a", "source_end": "<eos>"}
    )
    with StreamSession(
        model, tokenizer, policy, offset=offset, sample=never_end, max_target_tokens=40, max_word_tokens=5, **pieces
    ) as session:
        rows = recorded(session)
        events = list(session.run(WORDS[:9]))
        limits, text = session.limits, session.text
        S = sum(session.source_lengths)
        codec = session.codec
    assert model.config._attn_implementation == "sdpa" and handle_of(model) is None
    assert len({type(e).__name__ for e in events}) == 3 and len(limits) == len(rows) > 10
    ids = [
        piece if isinstance(piece, list) else tokenizer.encode(piece, add_special_tokens=False)
        for piece in pieces.values()
    ]
    source = ids[0] + [t for i, word in enumerate(WORDS[:9]) for t in codec.encode(word, i == 0)] + ids[2]
    target = (ids[1] + session.tokens)[: len(rows)]
    source = source[:S]
    _, want = one_shot(model, source, target, limits, offset)
    close(torch.stack(rows), want, EXACT if dtype == torch.float64 else 1e-5)
    assert text == codec.decode(session.tokens)
    _, shifted = one_shot(model, source, target, limits, offset + 1)
    _, fewer = one_shot(model, source, target, [max(n - 1, 0) for n in limits], offset)
    assert min((shifted - want).abs().max(), (fewer - want).abs().max()) > 0.01  # positions and limits matter


def test_live_use_counts_every_source_token_once(tiny):
    model, tokenizer = tiny(vocab=384), ByT5Tokenizer()
    with StreamSession(model, tokenizer, WaitK(2), header=[7], max_target_tokens=30, max_word_tokens=6) as session:
        for word in WORDS[:6]:
            if session.ended:
                break
            session.read(word)
            session.write()
        counts = session.counts
        assert counts.source_tokens_projected == int(session.cache.stream.length(0)[0, 0])
        assert counts.target_tokens_projected - counts.extra_forwards == int(session.cache.stream.length(0)[0, 1])


def test_a_failing_forward_leaves_nothing_half_done(tiny, close, recorded):
    model, tokenizer = tiny(vocab=384), ByT5Tokenizer()
    results = []
    for fail in (False, True):
        with StreamSession(model, tokenizer, WaitK(1), header=[7], max_target_tokens=12, max_word_tokens=4) as session:
            rows = recorded(session)
            session.read(WORDS[0])
            if fail:
                hook = model.model.layers[1].register_forward_pre_hook(
                    lambda *_: (_ for _ in ()).throw(RuntimeError("layer 1"))
                )
                lengths = session.cache.stream.length().clone()
                with pytest.raises(RuntimeError, match="layer 1"):
                    session.write()
                hook.remove()
                assert torch.equal(session.cache.stream.length(), lengths)
            session.write()
            session.read(WORDS[1])
            session.end()
            session.write()
            results.append((session.tokens, torch.stack(rows)))
    assert results[0][0] == results[1][0]
    close(results[0][1], results[1][1], 1e-12)


def test_a_session_starts_anew(tiny):
    model, tokenizer = tiny(vocab=384), ByT5Tokenizer()
    with StreamSession(model, tokenizer, WaitK(1), header=[7], max_target_tokens=12) as session:
        list(session.run(WORDS[:3]))
        first = session.tokens
        session.reset()
        assert session.cache.get_seq_length() == 0
        list(session.run(WORDS[:3]))
        assert session.tokens == first


def test_two_sessions_over_one_model(tiny, close):
    model, tokenizer = tiny(vocab=384), ByT5Tokenizer()
    alone = []
    for words in (WORDS[:3], WORDS[3:6]):
        with StreamSession(model, tokenizer, WaitK(1), header=[7], max_target_tokens=12) as session:
            list(session.run(words))
            alone.append(session.tokens)
    one = StreamSession(model, tokenizer, WaitK(1), header=[7], max_target_tokens=12)
    two = StreamSession(model, tokenizer, WaitK(1), header=[7], max_target_tokens=12)
    for _ in zip(one.run(WORDS[:3]), two.run(WORDS[3:6]), strict=False):
        pass
    one.close()
    one.close()
    assert handle_of(model) is not None
    list(two.run(()))
    two.close()
    assert handle_of(model) is None
    assert one.tokens == alone[0][: len(one.tokens)] and two.tokens == alone[1]
    with pytest.raises(RuntimeError, match="closed"):
        two.reset()
        two.read("word")
        two.write()


def test_the_patch_lives_as_long_as_it_is_needed(tiny):
    model, tokenizer = tiny(vocab=384), ByT5Tokenizer()
    config = model.config
    session = StreamSession(model, tokenizer, WaitK(1), header=[7])
    with pytest.raises(ValueError, match="open StreamSession"):
        sk.patch(model)
    del session
    gc.collect()
    assert handle_of(model) is None and model.config is config
    with sk.patch(model) as handle:
        with StreamSession(model, tokenizer, WaitK(1), header=[7]):
            pass
        assert handle.active
        session = StreamSession(model, tokenizer, WaitK(1), header=[7])
        session.read("word")
    with pytest.raises(RuntimeError, match="undone"):
        session.write()
    with pytest.raises(ValueError):
        StreamSession(model, tokenizer, WaitK(1), header=[])
    assert handle_of(model) is None


def test_a_bounded_cache(tiny, close, recorded):
    model, tokenizer, W, sinks = tiny(vocab=384), ByT5Tokenizer(), 12, 2
    cache = GroupedCache.for_model(model, window=W, sinks=sinks, max_chunk=16, capacity=8)
    header = {"header": [7], "cache": cache, "sample": never_end}
    with StreamSession(model, tokenizer, WaitK(2), max_target_tokens=50, max_word_tokens=3, **header) as session:
        rows, size = recorded(session), cache.stream.nbytes
        list(session.run(WORDS))
        limits, S = session.limits, sum(session.source_lengths)
        target = [7, *session.tokens][: len(rows)]
        assert cache.stream.nbytes == size and S > 2 * W and len(rows) > 2 * W
    source = [t for word in WORDS for t in session.codec.encode(word, True)][:S]
    mask = torch.zeros(1, 1, S + len(rows), S + len(rows), dtype=torch.bool)

    def see(row, begin, end):
        mask[0, 0, row, begin : begin + min(sinks, end)] = True
        mask[0, 0, row, begin + max(end - W, 0) : begin + end] = True

    for i in range(S):
        see(i, 0, i + 1)
    for j, limit in enumerate(limits):
        see(S + j, 0, limit)
        see(S + j, S, j + 1)
    positions = torch.cat([torch.arange(S), torch.arange(len(rows))])[None]
    with torch.no_grad():
        want = model(torch.tensor([source + target]), position_ids=positions, attention_mask=mask).logits[0, S:]
    close(torch.stack(rows), want)


def test_session_refuses(tiny):
    model, tokenizer = tiny(vocab=384), ByT5Tokenizer()
    with pytest.raises(ValueError, match="a model with logits"):
        StreamSession(model.model, tokenizer, WaitK(1), header=[7])
    with pytest.raises(ValueError, match="cache: expected a GroupedCache of one row"):
        StreamSession(model, tokenizer, WaitK(1), header=[7], cache=GroupedCache.for_model(model, 2))
    with pytest.raises(ValueError, match="header: expected token ids"):
        StreamSession(model, None, WaitK(1), header="x", codec=ByteCodec(tokenizer))
    with pytest.raises(TypeError, match="offset"):
        StreamSession(model, tokenizer, WaitK(1), header=[7], offset="1")
    assert handle_of(model) is None


def test_an_undone_patch_is_noticed_by_the_cache_too(tiny):
    model = tiny(vocab=384)
    cache = GroupedCache.for_model(model)
    sk.patch(model).undo()
    with pytest.raises(ValueError, match="no longer"):
        model(torch.tensor([[3]]), past_key_values=cache, position_ids=torch.zeros(1, 1, dtype=torch.long))


# codecs


def test_byte_codec():
    codec = codec_for(ByT5Tokenizer())
    assert isinstance(codec, ByteCodec) and codec.end == {1}
    tokenizer = ByT5Tokenizer()
    for word in ("march", "für", "</s>", "日本"):
        tokens = codec.encode(word, True)
        assert tokens == codec.encode(word, False) and tokens[:-1] == [b + 3 for b in word.encode()]
        assert codec.decode(tokens) == word + " " and [codec.closes(t) for t in tokens] == [False] * (
            len(tokens) - 1
        ) + [True]
        assert not any(codec.opens(t) for t in tokens)
    assert tokenizer.decode(codec.encode("five pm", True)) == "five pm "
    assert codec.decode([1, 300, *codec.encode("a", True)[:1], 3 + 0xC3]) == "a"  # specials and half a character
    assert ByteCodec(tokenizer, end=[0, 5]).end == {0, 5}


@pytest.mark.parametrize("kind", ["bytes", "metaspace"])
def test_leading_space_codec(kind):
    tokenizer = bpe(kind)
    codec = codec_for(tokenizer)
    assert isinstance(codec, LeadingSpaceCodec) and codec.end == {tokenizer.eos_token_id}
    pieces = [codec.encode(word, i == 0) for i, word in enumerate(WORDS)]
    # the words one by one are the text as a whole
    assert [t for piece in pieces for t in piece] == tokenizer.encode(TEXT, add_special_tokens=False)
    assert "".join(codec.decode(piece) for piece in pieces).strip() == TEXT
    for piece in pieces[1:]:
        assert [codec.opens(t) for t in piece] == [True] + [False] * (len(piece) - 1)
        assert codec.decode(piece).startswith(" ") and not any(codec.closes(t) for t in piece)
    assert codec.decode([tokenizer.eos_token_id]) == ""
    assert tokenizer.eos_token_id not in codec.encode("<eos>", False)  # text, not a control token


def test_codec_refuses_what_has_no_leading_space():
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Whitespace(), decoders.Fuse()
    with pytest.raises(ValueError, match="pass codec="):
        codec_for(PreTrainedTokenizerFast(tokenizer_object=tokenizer))
