"""The conventions of the captions: what is written, and that `needed` is the smallest possible, by brute force."""

from __future__ import annotations

import doctest
import itertools
import random

import pytest
import writing
from automaton import Automaton
from writing import write

EXAMPLES = {
    "i may go in may": "I may go in May",
    "we march on the third of march": "we march on 3 March",
    "we march may third": "we march May 3",
    "half past two or quarter to one": "2:30 or 12:45",
    "a quarter of it": "a quarter of it",
    "five past six and twenty five past twelve": "6:05 and 12:25",
    "two hundred and five people": "205 people",
    "two hundred and people": "200 and people",
    "twenty dollars and fifty cents": "$20.50",
    "twenty dollars and five people": "$20 and five people",
    "three point five million dollars": "$3.5 million",
    "three million two hundred thousand": "3,200,000",
    "minus five degrees or zero degrees": "-5° or 0°",
    "five kilometres per hour": "5 km/h",
    "kilometres per hour": "kilometres per hour",
    "fifty kilometres per person": "50 km per person",
    "three people at gate three": "three people at gate 3",
    "nineteen oh five": "1905",
    "two oh five and two oh five one": "2:05 and 2051",
    "mister smith and missus jones": "Mr Smith and Mrs Jones",
    "the third of the list": "the third of the list",
    "the tenth of the list": "the 10th of the list",
    "june twenty second nineteen eighty four": "June 22 1984",
    "one in twenty twenty six": "one in 2026",
    "one hundred and twenty three thousand four hundred and five": "123,405",
    "fifteen hundred or fifteen thousand": "1500 or 15,000",
    "zero point zero five percent": "0.05%",
    "i'm here on monday at nine am": "I'm here on Monday at 9 am",
    "three point": "three point",
    "eleven o'clock": "11:00",
}
# one word of every letter of the grammar and of every rule outside it
WORDS = """zero oh five nine ten twelve thirteen nineteen twenty thirty sixty hundred thousand million and point the of
past to half quarter o'clock minus percent dollars cents degrees per hour kilometres kilograms first third tenth
twentieth june march in gate am mister monday i cat""".split()


@pytest.mark.parametrize("spoken", EXAMPLES)
def test_written_form(spoken: str) -> None:
    assert " ".join(write(spoken.split())[0]) == EXAMPLES[spoken]


def test_docstring_examples() -> None:
    assert doctest.testmod(writing).failed == 0


def test_online_never_takes_back() -> None:
    rng = random.Random(0)
    for _ in range(300):
        words = rng.choices(WORDS, k=rng.randint(1, 9))
        written, needed = write(words)
        assert needed == sorted(needed)
        for other in (rng.choices(WORDS, k=rng.randint(0, 5)) for _ in range(5)):
            cut = rng.randint(0, len(words))
            again, _ = write(words[:cut] + other)
            certain = sum(n <= cut for n in needed)
            assert again[:certain] == written[:certain]


def test_needed_is_the_smallest() -> None:
    """One spoken word less, and some continuation gives another written word in that place."""
    rng = random.Random(1)
    endings = [list(c) for n in range(3) for c in itertools.product(WORDS, repeat=n)]
    endings += [["and", "five", "cents"], ["first", "of", "june"], ["and", "nine", "thousand"]]
    checked = 0
    for _ in range(400):
        words = rng.choices(WORDS, k=rng.randint(1, 6))
        written, needed = write(words)
        for j, n in enumerate(needed):
            # the first of the words written together is the one that could have come earlier
            if n < 2 or (j and needed[j - 1] == n):
                continue
            head = words[: n - 1]
            assert any(write(head + ending)[0][j : j + 1] != [written[j]] for ending in endings), (words, j)
            checked += 1
    assert checked > 100


def test_automaton_refuses_open_groups() -> None:
    with pytest.raises(ValueError, match="balanced"):
        Automaton({"broken": "a)b"})
