"""Models and codecs without weights, for the session tests.

`HashModel` computes logits as hashes of everything that a row sees, and of everything that the rows it sees have
seen: one wrong limit, one token fed twice or encoded again, and other tokens come out. It also refuses a session that
breaks the step protocol.
"""

import torch

from streamkernels.streaming import Read, Session, Write

END = 0
HEADER = [1, 2, 3]


class ProtocolError(Exception):
    """The session used the model in a way that `StreamModel` does not allow."""


class HashModel:
    """Rows are chained hashes. `fails` maps the number of a step, failed ones included, to 'nan' or an exception."""

    def __init__(self, vocab, seed=0, fails=None, on_step=None):
        self.vocab, self.seed, self.fails, self.on_step = vocab, seed, dict(fails or {}), on_step
        self.steps = self.resets = 0
        self.reset()

    def reset(self):
        self.source, self.target, self.limits = [], [], []
        self.source_rows, self.target_rows, self.staged = [hash((self.seed,))], [hash((self.seed, 1))], None
        self.popped = 0
        self.resets += 1

    def step(self, source, target, limits):
        if self.staged is not None:
            raise ProtocolError("a step while another is staged")
        if not source and not target:
            raise ProtocolError("a step without rows")
        if len(limits) != len(target):
            raise ProtocolError("one limit per target row")
        if any(not 0 <= limit <= len(self.source) + len(source) for limit in limits):
            raise ProtocolError("a limit beyond the source")
        fail = self.fails.get(self.steps)
        self.steps += 1
        if self.on_step:
            self.on_step()
        source_rows, target_rows = list(self.source_rows), list(self.target_rows)
        for token in source:
            source_rows.append(hash((source_rows[-1], token)))
        for token, limit in zip(target, limits, strict=True):
            target_rows.append(hash((target_rows[-1], token, limit, source_rows[limit])))
        self.staged = (list(source), list(target), list(limits), source_rows, target_rows)
        if isinstance(fail, Exception):
            raise fail
        logits = self.logits(target_rows[len(target_rows) - len(target) :])
        return logits * float("nan") if fail == "nan" else logits

    def logits(self, rows):
        values = [[(hash((row, v)) % 100003) / 100003 for v in range(self.vocab)] for row in rows]
        return torch.tensor(values, dtype=torch.float64).reshape(len(rows), self.vocab)

    def commit(self):
        if self.staged is None:
            raise ProtocolError("nothing to commit")
        source, target, limits, self.source_rows, self.target_rows = self.staged
        self.source += source
        self.target += target
        self.limits += limits
        self.staged = None

    def discard(self):
        self.staged = None

    def pop(self, n):
        if self.staged is not None or n > len(self.target):
            raise ProtocolError("a pop that cannot be")
        self.popped += n
        for rows in (self.target, self.limits, self.target_rows):
            del rows[len(rows) - n :]

    def snapshot(self):
        return list(self.source), list(self.target), list(self.limits), self.staged


def one_shot(model, source, target, limits):
    """The logits of all target rows in one pass: what the session must have computed step by step."""
    source_row, rows = [hash((model.seed,))], []
    for token in source:
        source_row.append(hash((source_row[-1], token)))
    row = hash((model.seed, 1))
    for token, limit in zip(target, limits, strict=True):
        row = hash((row, token, limit, source_row[limit]))
        rows.append(row)
    return model.logits(rows)


class ScriptModel(HashModel):
    """Writes `script` whatever it reads. With `reads_on[n] = (limit, token)`, a row that has seen n tokens of the text
    and at least `limit` of the source writes `token` instead."""

    def __init__(self, vocab, header, script, reads_on=None):
        self.header, self.script, self.reads_on = header, list(script), dict(reads_on or {})
        super().__init__(vocab)

    def step(self, source, target, limits):
        logits = super().step(source, target, limits)
        for j in range(len(target)):
            written = len(self.target) + j + 1 - self.header
            if written >= 0:
                token = self.script[written]
                changed = self.reads_on.get(written)
                if changed is not None and limits[j] >= changed[0]:
                    token = changed[1]
                logits[j, token] = 9.0
        return logits


class Pieces:
    """A codec over a list of token texts; token 0 ends the text. `opens`, `closes`: whether spaces tell boundaries."""

    def __init__(self, pieces, opens, closes):
        self.pieces, self.end = ["", *pieces], frozenset({END})
        self._opens, self._closes = opens, closes

    def __len__(self):
        return len(self.pieces)

    def encode(self, word, first):
        return [ord(c) % 89 for c in word] + ([] if first else [7])

    def decode(self, tokens):
        return "".join(self.pieces[t] for t in tokens)

    def closes(self, token):
        return self._closes and self.pieces[token].endswith(" ")

    def opens(self, token):
        return self._opens and self.pieces[token].startswith(" ")

    def ids(self, *pieces):
        return [self.pieces.index(piece) for piece in pieces]


def leading():
    return Pieces([" a", " b", " cd", "e", "f", ",", " !", " ", "."], True, False)


def trailing():
    return Pieces(["a ", "b ", "cd ", "e", "f", ",", "! ", " ", "."], False, True)


def letters():
    return Pieces(["a", "b", " ", ",", "c", "."], False, True)


def both():
    return Pieces([" a", " b ", "c ", "e", ", ", " ", "f"], True, True)


CODECS = {"leading": leading, "trailing": trailing, "letters": letters, "both": both}


def scripted(codec, pieces, policy, *, reads_on=None, **options):
    model = ScriptModel(len(codec), len(options.get("header", HEADER)), [*codec.ids(*pieces), END], reads_on)
    return Session(model, codec, policy, **{"header": HEADER, "source_end": [4], **options})


def short(events):
    """R for a read, the text of a write, 'end'."""
    return ["R" if isinstance(e, Read) else e.text if isinstance(e, Write) else "end" for e in events]
