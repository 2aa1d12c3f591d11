"""Things that are said in words and written in figures: dates, times, money and the like.

Each function draws one and returns (spoken, written), both as text. The spoken side comes from `num2words`, the written
side from the values drawn, so that the grammar in `writing.py` is checked against something that is not itself.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from random import Random

from num2words import num2words
from words import made_up, noun
from writing import BEFORE_MONTH, LABELS, MONTHS, ORDINALS, TENTHS, WEEKDAYS, number, ordinal

Entity = tuple[str, str]


@lru_cache(maxsize=100_000)
def _say(value: int | str, to: str = "cardinal") -> str:
    return str(num2words(value, to=to)).replace("-", " ").replace(",", "")


def cardinal_words(rng: Random, value: int) -> str:
    """A whole number in words, the "and" left out now and then."""
    words = _say(value)
    return words.replace(" and ", " ") if rng.random() < 0.3 else words


def _value(rng: Random) -> int:
    low, high, step = rng.choices(
        (
            (10, 99, 1), (10, 90, 10), (100, 999, 1), (100, 900, 100),
            (1000, 9999, 1), (1000, 9000, 100), (10_000, 999_999, 1), (10_000, 900_000, 1000),
        ),
        (30, 12, 16, 10, 6, 5, 3, 4),
    )[0]  # fmt: skip
    return rng.randrange(low, high + 1, step)


def cardinal(rng: Random) -> Entity:
    value = _value(rng)
    if value % 100 == 0 and 1100 <= value < 2000 and rng.random() < 0.5:
        return f"{_say(value // 100)} hundred", number(value)
    return cardinal_words(rng, value), number(value)


def small(rng: Random) -> Entity:
    """One to nine on its own: stays a word."""
    word = _say(rng.randint(1, 9))
    return word, word


def decimal(rng: Random) -> Entity:
    whole = rng.choice((rng.randint(0, 9), rng.randint(0, 99)))
    digits = [rng.randint(0, 9) for _ in range(rng.choices((1, 2, 3), (6, 3, 1))[0])]
    return f"{_say(whole)} point {' '.join(map(_say, digits))}", f"{whole}." + "".join(map(str, digits))


def large(rng: Random) -> Entity:
    scale, power = rng.choice((("million", 10**6), ("billion", 10**9)))
    kind = rng.random()
    if kind < 0.5:
        value = rng.choice((rng.randint(1, 20), rng.randint(1, 999)))
        return f"{cardinal_words(rng, value)} {scale}", f"{value} {scale}"
    if kind < 0.9 or scale == "billion":
        spoken, written = decimal(rng)
        return f"{spoken} {scale}", f"{written} {scale}"
    value = rng.randint(1, 9) * power + rng.randint(1, 9) * 100_000
    return cardinal_words(rng, value), number(value)


def ordinal_number(rng: Random) -> Entity:
    value = rng.choice((rng.randint(1, 9), rng.randint(10, 31), rng.randint(10, 99)))
    word = _say(value, "ordinal")
    return word, ordinal(value) if value > 9 else word


def month(rng: Random) -> Entity:
    """A month whose name is nothing else."""
    name = rng.choice([m for m in MONTHS if m not in ("march", "may")])
    return name, name.capitalize()


def in_month(rng: Random) -> Entity:
    """Any month after a word that shows that it is one; half the time "march" or "may"."""
    name, before = rng.choice((rng.choice(MONTHS), "march", "may")), rng.choice(_BEFORE_MONTH)
    return f"{before} {name}", f"{before} {name.capitalize()}"


def weekday(rng: Random) -> Entity:
    name = rng.choice(WEEKDAYS)
    return name, name.capitalize()


def year(rng: Random) -> Entity:
    value = rng.choices((rng.randint(1300, 1999), rng.randint(1930, 1999), rng.randint(2000, 2030)), (2, 4, 4))[0]
    return _say(value, "year"), str(value)


def date(rng: Random) -> Entity:
    day, name = rng.randint(1, 31), rng.choice(MONTHS)
    said = ORDINALS[day - 1] if day < 20 else TENTHS[day // 10 - 2] if day % 10 == 0 else _say(day, "ordinal")
    if rng.random() < 0.65:
        spoken, written = f"the {said} of {name}", f"{day} {name.capitalize()}"
    else:
        spoken, written = f"{name} {said}", f"{name.capitalize()} {day}"
    if rng.random() < 0.12:
        said, figures = year(rng)
        spoken, written = f"{spoken} {said}", f"{written} {figures}"
    if rng.random() < 0.15:
        said, figures = weekday(rng)
        spoken, written = f"{said} {spoken}", f"{figures} {written}"
    return spoken, written


def time(rng: Random) -> Entity:
    hour, kind = rng.randint(1, 12), rng.random()
    said = _say(hour)
    half = rng.choice(("am", "pm"))
    if kind < 0.15:
        return f"{said} {half}", f"{hour} {half}"
    if kind < 0.27:
        spoken, written = f"{said} o'clock", f"{hour}:00"
    elif kind < 0.37:
        spoken, written = f"half past {said}", f"{hour}:30"
    elif kind < 0.47:
        minutes, word = rng.choice(((15, "quarter"), (5, "five"), (10, "ten"), (20, "twenty"), (25, "twenty five")))
        spoken, written = f"{word} past {said}", f"{hour}:{minutes:02d}"
    elif kind < 0.55:
        spoken, written = f"quarter to {said}", f"{(hour + 10) % 12 + 1}:45"
    else:
        minutes = rng.choice((rng.randint(1, 59), 10 * rng.randint(1, 5), 5 * rng.randint(1, 11)))
        spoken, written = f"{said} {'oh ' if minutes < 10 else ''}{_say(minutes)}", f"{hour}:{minutes:02d}"
        if rng.random() < 0.6:
            spoken, written = f"{spoken} {half}", f"{written} {half}"
    return spoken, written


def money(rng: Random) -> Entity:
    name, sign = rng.choice((("dollar", "$"), ("euro", "€"), ("pound", "£")))
    kind = rng.random()
    if kind < 0.1:
        spoken, written = large(rng)
        return f"{spoken} {name}s", sign + written
    value = rng.choice((rng.randint(1, 9), _value(rng)))
    spoken = f"{cardinal_words(rng, value)} {name}{'s' * (value > 1)}"
    if kind < 0.35:
        cents = rng.choice((rng.randint(1, 99), 5 * rng.randint(1, 19)))
        return f"{spoken} and {_say(cents)} cent{'s' * (cents > 1)}", f"{sign}{number(value)}.{cents:02d}"
    return spoken, sign + number(value)


def cents(rng: Random) -> Entity:
    value = rng.randint(10, 99)
    return f"{_say(value)} cents", f"{value} cents"


def percent(rng: Random) -> Entity:
    whole = rng.random() >= 0.35
    spoken, written = (cardinal if whole and rng.random() < 0.1 else _up_to_hundred if whole else decimal)(rng)
    return f"{spoken} percent", f"{written}%"


def _up_to_hundred(rng: Random) -> Entity:
    value = rng.choice((rng.randint(0, 100), 5 * rng.randint(1, 19)))
    return _say(value), str(value)


def degrees(rng: Random) -> Entity:
    spoken, written = decimal(rng) if rng.random() < 0.2 else _up_to_hundred(rng)
    minus = rng.random() < 0.3
    return f"{'minus ' * minus}{spoken} degrees", f"{'-' * minus}{written}°"


_UNITS = """kilometres km, kilometers km, metres m, meters m, centimetres cm, millimetres mm, kilograms kg, kilos kg,
grams g, litres l, liters l, megabytes MB, gigabytes GB, watts W, kilowatts kW, volts V, kilometres per hour km/h,
kilometres km, metres m, kilograms kg"""
UNIT_PAIRS = [tuple(pair.rsplit(maxsplit=1)) for pair in _UNITS.split(",")]


def measure(rng: Random) -> Entity:
    unit, short = rng.choice(UNIT_PAIRS)
    kind = rng.random()
    value = rng.choice((rng.randint(1, 9), rng.randint(10, 99), _value(rng)))
    spoken, written = decimal(rng) if kind < 0.3 else (cardinal_words(rng, value), number(value))
    if written == "1":
        unit = unit.replace("s per", " per") if " per " in unit else unit.removesuffix("s")
    return f"{spoken} {unit}", f"{written} {short}"


def digits(rng: Random) -> Entity:
    """Digits said one by one; lengths 2 to 7, mostly short."""
    count = rng.choices(range(2, 8), (3, 8, 5, 2, 1, 1))[0]
    values = [rng.randint(0, 9) for _ in range(count)]
    return " ".join(map(_say, values)), "".join(map(str, values))


def label(rng: Random) -> Entity:
    """A label noun and its number: one digit, two or three digits, or a number."""
    name = rng.choice(_LABELS)
    value = rng.randint(0, 9)
    spoken, written = rng.choice((digits, cardinal, lambda _: (_say(value), str(value))))(rng)
    return f"{name} {spoken}", f"{name} {written}"


def person(rng: Random) -> Entity:
    title, short = rng.choice((("mister", "Mr"), ("missus", "Mrs")))
    name = made_up(rng) if rng.random() < 0.6 else noun(rng)
    return f"{title} {name}", f"{short} {name.capitalize()}"


_LABELS = sorted(LABELS)
_BEFORE_MONTH = sorted(BEFORE_MONTH)
KINDS: dict[str, Callable[[Random], Entity]] = {
    "date": date, "time": time, "money": money, "cardinal": cardinal, "small": small, "decimal": decimal, "large":
    large, "ordinal": ordinal_number, "month": month, "weekday": weekday, "year": year, "percent": percent,
    "degrees": degrees, "measure": measure, "digits": digits, "label": label, "person": person, "cents": cents,
    "in_month": in_month,
}  # fmt: skip
# how often a free place in a sentence takes each kind
WEIGHTS = {
    "date": 14, "time": 14, "money": 11, "cardinal": 12, "small": 8, "decimal": 4, "large": 3, "ordinal": 6,
    "month": 3, "weekday": 4, "year": 6, "percent": 6, "degrees": 3, "measure": 8, "digits": 3, "label": 8,
    "person": 7, "cents": 2, "in_month": 3,
}  # fmt: skip
