"""How spoken words are written: the conventions of the captions, as one small grammar.

The written form is a function of the spoken words alone, and this file is that function. It is *online*: it reads one
word at a time and writes each word as soon as no continuation could change it. So it also tells, for every written
word, how many spoken words had to be read before it was certain (`needed`), which is what bounds a wait-k schedule.

The rule: the words since the last certain one form a pending phrase. While the phrase could still grow into a longer
phrase of the table below, nothing is written ("five thirty" could go on to "five thirty five"; "the" could begin
"the third of march"; "march" could be followed by a day). As soon as it cannot, or the end marker is read, the longest
complete phrase at its beginning is written and the rest is looked at again. `tests/examples/test_writing.py` checks by
brute force that `needed` is the smallest possible.

Conventions, in words:
- numbers from 10 on in digits, 0 to 9 as words ("three people", "12 people"), but in digits after a label ("gate 5"),
  before a unit or am/pm ("5 km", "5 pm"), and inside every other phrase; a comma from 10,000 on; "3 million";
- "the twenty third of march" -> "23 March", "june second" -> "June 2", "the second of the month" stays; ordinals from
  10th on in digits; months and weekdays with a capital ("march" and "may" only where a word before or a day after shows
  that the month is meant);
- "five thirty" -> "5:30", "half past two" -> "2:30", "six o'clock" -> "6:00"; years said in pairs -> "1984";
- "$20.50", "€5", "£3 million", "25%", "-4°", "3.14", "5 km/h"; digits said one by one are joined ("room 205");
- "mister" -> "Mr" and a capital on the name after it; "i" -> "I". Everything else is copied.
"""

from __future__ import annotations

from collections.abc import Sequence

from automaton import Automaton

ONES = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen".split()
ONES += "sixteen seventeen eighteen nineteen".split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
ORDINALS = "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth".split()
ORDINALS += "fourteenth fifteenth sixteenth seventeenth eighteenth nineteenth".split()
TENTHS = "twentieth thirtieth fortieth fiftieth sixtieth seventieth eightieth ninetieth".split()
MONTHS = "january february march april may june july august september october november december".split()
WEEKDAYS = "monday tuesday wednesday thursday friday saturday sunday".split()
SCALES = {"million": 10**6, "billion": 10**9}
CURRENCY = {"dollar": "$", "dollars": "$", "euro": "€", "euros": "€", "pound": "£", "pounds": "£"}
TITLES = {"mister": "Mr", "missus": "Mrs"}
# words that a number names: after them a single digit is written as a digit
LABELS = frozenset(
    "room gate flight bus platform page line chapter track number route channel section level lane exit seat row table"
    " terminal floor version step part unit question item zone bay studio building apartment".split()
)
# before "march" and "may" these words show that the month is meant
BEFORE_MONTH = frozenset("in of since until during last next this every early late mid".split())
UNITS = {
    unit + ending: short
    for units, short in {
        "kilometre kilometer": "km", "metre meter": "m", "centimetre centimeter": "cm", "millimetre millimeter": "mm",
        "kilogram kilo": "kg", "gram": "g", "litre liter": "l", "megabyte": "MB", "gigabyte": "GB", "watt": "W",
        "kilowatt": "kW", "volt": "V",
    }.items()
    for unit in units.split()
    for ending in ("", "s")
}  # fmt: skip
VALUE = {word: value for value, word in enumerate(ONES)} | {word: 10 * i for i, word in enumerate(TENS, 2)} | {"oh": 0}
DAY = {word: value for value, word in enumerate(ORDINALS, 1)} | {word: 10 * i for i, word in enumerate(TENTHS, 2)}

# every word has a letter, the alphabet of the phrases; "." is a word that only ever gets copied
LETTERS = {word: "d" for word in ONES[1:10]} | {word: "a" for word in ONES[10:13]} | {word: "t" for word in ONES[13:]}
LETTERS |= {word: "f" for word in TENS[1:4]} | {word: "n" for word in TENS[4:]} | {word: "M" for word in SCALES}
LETTERS |= {word: "r" for word in ORDINALS[:9]} | {word: "q" for word in ORDINALS[9:]} | {word: "s" for word in TENTHS}
LETTERS |= {word: "m" for word in MONTHS} | {"march": "y", "may": "y"} | {word: "$" for word in CURRENCY}
LETTERS |= {"twenty": "w", "zero": "z", "oh": "o", "hundred": "H", "thousand": "K", "and": "N", "point": "p"}
LETTERS |= {"of": "F", "past": "P", "to": "Q", "half": "h", "quarter": "g", "o'clock": "C", "minus": "X"}
LETTERS |= {"the": "E", "percent": "%", "degree": "D", "degrees": "D", "cent": "c", "cents": "c", "per": "R"}
LETTERS |= {"hour": "U"}
LETTERS |= {word: "u" for word, short in UNITS.items() if short == "km"}

_SMALL = "(d|a|t|(w|f|n)d?)"  # 1 to 99
_HUNDREDS = f"((d|a|t)H(N?{_SMALL})?)"  # also "fifteen hundred"
_BELOW = f"({_SMALL}|{_HUNDREDS})"
_REST = f"(N?{_SMALL}|{_HUNDREDS})?"
_NUMBER = f"X?(z|{_BELOW}|{_BELOW}K{_REST}|{_BELOW}M({_BELOW}K)?{_REST}|({_BELOW}|z)p(d|z|o)+M?)"
_ORDINAL = "(r|q|s|(w|f|n)r)"
# earlier wins where two phrases are the same words
PHRASES = {
    "clock": "(d|a)C",
    "past": f"(h|g|{_SMALL})P(d|a)",
    "to": "gQ(d|a)",
    "time": "(d|a)(a|t|(w|f)d?|od)",
    "year": "(t|w)(a|t|(w|f|n)d?|od)",
    "digits": "(d|z|o)(d|z|o)+",
    "percent": f"{_NUMBER}%",
    "degrees": f"{_NUMBER}D",
    "money": f"{_NUMBER}$(N{_SMALL}c)?",
    "number": _NUMBER,
    "date": f"E{_ORDINAL}F(m|y)",
    "day": f"y{_ORDINAL}",
    "ordinal": _ORDINAL,
    "month": "m",
    "speed": "uRU",
}


_AUTOMATON = Automaton(PHRASES)


class Writer:
    """Reads spoken words one at a time, writes each word as soon as it is certain.

    >>> writer = Writer()
    >>> [writer.read(word) for word in "at five thirty pm".split()], writer.end()
    ([['at'], [], [], ['5:30', 'pm']], [])
    """

    def __init__(self) -> None:
        self._pending: list[str] = []
        self._before = ""  # the last spoken word already written
        self._kind = ""  # and the kind of its phrase

    def read(self, word: str) -> list[str]:
        """Read one spoken word; returns the written words that became certain, often none."""
        self._pending.append(word)
        return self._write(ended=False)

    def end(self) -> list[str]:
        """Read the end marker; returns what was still pending."""
        return self._write(ended=True)

    def _write(self, ended: bool) -> list[str]:
        out: list[str] = []
        while self._pending:
            count, kind, grows = self._longest()
            if grows and not ended:
                break
            words = self._pending[:count]
            after = self._pending[count] if count < len(self._pending) else ""
            out += _written(kind, words, self._before, self._kind, after)
            self._before, self._kind = words[-1], kind
            del self._pending[:count]
        return out

    def _longest(self) -> tuple[int, str, bool]:
        """Length and kind of the longest complete phrase, and whether all that is pending may still grow."""
        state = _AUTOMATON.start
        count, kind = 1, "copy"
        for i, word in enumerate(self._pending):
            after = _AUTOMATON.step(state, self._letter(word, first=i == 0))
            if after is None:
                return count, kind, False
            state = after
            if (found := _AUTOMATON.kind[state]) is not None:
                count, kind = i + 1, found
        return count, kind, _AUTOMATON.grows[state]

    def _letter(self, word: str, first: bool) -> str:
        letter = LETTERS.get(word, ".")
        if first and letter == "y" and self._before in BEFORE_MONTH:
            return "m"
        if first and letter == "u" and self._kind != "number":
            return "."
        return letter


def write(words: Sequence[str]) -> tuple[list[str], list[int]]:
    """The written words of a spoken sentence, and for each how many spoken words had to be read before it was certain.

    The end marker counts as one more word: a phrase that only the end completes needs `len(words) + 1`.

    >>> write("the meeting is on the twenty third of march at five thirty pm".split())
    (['the', 'meeting', 'is', 'on', '23', 'March', 'at', '5:30', 'pm'], [2, 2, 3, 4, 9, 9, 10, 13, 13])
    """
    writer = Writer()
    written: list[str] = []
    needed: list[int] = []
    for n, word in enumerate([*words, None], 1):
        certain = writer.end() if word is None else writer.read(word)
        written += certain
        needed += [n] * len(certain)
    return written, needed


def number(value: int) -> str:
    """An integer in digits, with commas from 10,000 on."""
    return f"{value:,}" if value >= 10_000 else str(value)


def ordinal(value: int) -> str:
    """23 -> 23rd."""
    ending = "th" if value % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(value % 10, "th")
    return f"{value}{ending}"


def _cardinal(words: Sequence[str]) -> int:
    total = part = 0
    for word in words:
        if word == "hundred":
            part *= 100
        elif word == "thousand":
            total, part = total + 1000 * part, 0
        elif word in SCALES:
            total, part = total + SCALES[word] * part, 0
        elif word != "and":
            part += VALUE[word]
    return total + part


def _amount(words: Sequence[str]) -> list[str]:
    """A number phrase in digits: one written word, or two ("3 million")."""
    if words[0] == "minus":
        first, *rest = _amount(words[1:])
        return ["-" + first, *rest]
    scale = [words[-1]] if words[-1] in SCALES else []
    words = words[:-1] if scale else words
    if "point" in words:
        at = words.index("point")
        return [number(_cardinal(words[:at])) + "." + "".join(str(VALUE[w]) for w in words[at + 1 :]), *scale]
    return [number(_cardinal(words)), *scale]


def _written(kind: str, words: Sequence[str], before: str, before_kind: str, after: str) -> list[str]:
    """One phrase, written. `before`, `after`: the spoken words around it; `before_kind`: the last phrase's kind."""
    values = [VALUE[word] for word in words if word in VALUE]
    if kind == "number":
        alone = len(words) == 1 and values[0] < 10
        counted = before in LABELS or after in UNITS or after in ("am", "pm")
        return [words[0]] if alone and not counted else _amount(words)
    if kind in ("percent", "degrees"):
        first, *rest = _amount(words[:-1])
        return [first, rest[0] + "%°"[kind == "degrees"]] if rest else [first + "%°"[kind == "degrees"]]
    if kind == "money":
        at = next(i for i, word in enumerate(words) if word in CURRENCY)
        first, *rest = _amount(words[:at])
        cents = f".{_cardinal(words[at + 2 : -1]):02d}" if at + 1 < len(words) else ""
        return [CURRENCY[words[at]] + first, *rest] if not cents else [CURRENCY[words[at]] + first + cents]
    if kind == "clock":
        return [f"{values[0]}:00"]
    if kind == "past":
        minutes = {"half": 30, "quarter": 15}.get(words[0]) or sum(values[:-1])
        return [f"{values[-1]}:{minutes:02d}"]
    if kind == "to":
        return [f"{(values[0] + 10) % 12 + 1}:45"]
    if kind == "time":
        return [f"{values[0]}:{sum(values[1:]):02d}"]
    if kind == "year":
        return [str(100 * values[0] + sum(values[1:]))]
    if kind == "digits":
        return ["".join(str(value) for value in values)]
    day = sum(values) + sum(DAY.get(word, 0) for word in words)
    if kind == "date":
        return [str(day), words[-1].capitalize()]
    if kind == "day":
        return [words[0].capitalize(), str(day)]
    if kind == "ordinal":
        if before_kind == "month":
            return [str(day)]
        return list(words) if day < 10 else [ordinal(day)]
    if kind == "speed":
        return ["km/h"]
    return [_copied(words[0], kind, before, before_kind)]


def _copied(word: str, kind: str, before: str, before_kind: str) -> str:
    if word in UNITS and before_kind == "number":
        return UNITS[word]
    if word in TITLES:
        return TITLES[word]
    if kind == "month" or word in WEEKDAYS or before in TITLES or word == "i" or word.startswith("i'"):
        return word.capitalize()
    return word
