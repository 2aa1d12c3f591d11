"""Sessions of a batch that read and write at different points, and what each must come to."""

from __future__ import annotations

import torch
from transformers import ByT5Tokenizer

from streamkernels import ReadAll, StreamSession, Threshold, WaitK

WORDS = "the meeting is on the twenty third of march at five thirty pm so the third room is free".split()
OPTIONS = {"header": [7, 8], "prompt": [4, 5], "source_end": [9], "max_target_tokens": 24, "max_word_tokens": 4}
SOURCES = [WORDS[:6], WORDS[3:5], WORDS[5:13], WORDS[:1]]


def policies():
    confident = Threshold(lambda state: state.logits.softmax(-1).max().item(), 0.2, predicts=True)
    return [WaitK(1), ReadAll(), WaitK(3), confident]


def never_end(logits):
    return int(logits[2:].argmax()) + 2


def alone(model, row, **options):
    with StreamSession(model, ByT5Tokenizer(), policies()[row], sample=never_end, **OPTIONS, **options) as session:
        events = list(session.run(SOURCES[row]))
        return session, events


def same(session, other):
    for name in ("tokens", "delays", "source_lengths", "target_lengths", "visible", "limits", "ended"):
        assert getattr(session, name) == getattr(other, name), name


def recording(batch):
    """Per session the logits of every target row that is kept, of which a model answers the last of each step."""
    model, kept, last = batch._model, [[] for _ in batch], {}
    step, drop, pop = model.step, model.drop, model.pop

    def record(steps):
        answers = step(steps)
        for row, answer in answers.items():
            last[row] = len(steps[row].target)
            if not isinstance(answer, Exception) and last[row]:
                kept[row] += [None] * (last[row] - 1) + [answer[0]]
        return answers

    def dropped(row):
        drop(row)
        del kept[row][len(kept[row]) - last[row] :]

    def popped(row, n):
        pop(row, n)
        del kept[row][len(kept[row]) - n :]

    model.step, model.drop, model.pop = record, dropped, popped
    return kept


def agree_with_one_shot(model, batch, kept, one_shot, offset, tolerance):
    for row, session in enumerate(batch):
        encoded = [session.codec.encode(word, i == 0) for i, word in enumerate(SOURCES[row])]
        source = [4, 5, *(t for word in encoded for t in word), 9][: sum(session.source_lengths)]
        target = [7, 8, *session.tokens][: len(kept[row])]
        _, want = one_shot(model, source, target, session.limits, offset)
        have = [j for j, logits in enumerate(kept[row]) if logits is not None]
        got = torch.stack([kept[row][j] for j in have])
        assert len(have) == len(target) - 1 and (got - want[have]).abs().max() <= tolerance


def live_session(model, row):
    with StreamSession(model, ByT5Tokenizer(), policies()[row], sample=never_end, **OPTIONS) as session:
        finish(session, SOURCES[row])
        return session


def finish(session, words):
    """Hand over what is left, as far as the text goes."""
    for word in words:
        if not session.ended:
            session.read(word)
            session.write()
    if not session.ended:
        session.end()
        session.write()


def going(batch, rows):
    return [row for row in rows if not batch[row].ended]
