"""Makes captions: spoken sentences, their written form, and how many words had to be read for each written word.

    python generator.py --show 20        # look at some
    python generator.py --ceilings       # what wait-k can reach on the held-out set
    python generator.py --write          # write held_out.tsv again (a test holds its checksum)

Everything follows from a seed. A sentence belongs to the held-out side if the hash of its spoken text says so; training
skips that side, so the two are disjoint whatever the seeds. A sentence is kept only if the grammar of `writing.py`
writes it as the values drawn for it say.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random

from entities import KINDS, WEIGHTS
from words import noun, plain, verb
from writing import WEEKDAYS, write

HERE = Path(__file__).resolve().parent
SEED = 20_260_323  # fixed before the first training
HELD_OUT = 1000
MAX_WORDS = 20
MAX_BYTES = 110
TEMPLATES = tuple((HERE / "templates.txt").read_text(encoding="utf-8").split("\n")[:-1])
_KIND_NAMES = tuple(WEIGHTS)
_KIND_WEIGHTS = tuple(WEIGHTS.values())
_ENDINGS = ("{w}", "{w} {w}", "{w} the {n}", "and {w} {w}", "in {month}", "on {weekday}")
_FILL = {"n": noun, "v": verb, "w": plain}


@dataclass(frozen=True)
class Sample:
    """One caption. `needed[j]`: spoken words (the end marker counts as one more) that make written word j certain; the
    last entry stands for the end of the written text."""

    spoken: tuple[str, ...]
    written: tuple[str, ...]
    needed: tuple[int, ...]


def _as_written(word: str) -> str:
    return word.capitalize() if word == "i" or word.startswith("i'") or word in WEEKDAYS else word


def _fill(rng: Random, template: Sequence[str]) -> tuple[list[str], list[str]]:
    spoken: list[str] = []
    written: list[str] = []
    for part in template:
        if part[0] != "{":
            words = figures = part
        elif (name := part[1 : part.index("}")]) in KINDS:
            words, figures = KINDS[name](rng)
        else:
            words = figures = _FILL[name](rng) + part[part.index("}") + 1 :]
        spoken += words.split()
        written += [_as_written(word) for word in words.split()] if words == figures else figures.split()
    return spoken, written


def _salad(rng: Random) -> list[str]:
    """Plain words in any order, with none to two things in figures among them."""
    length = rng.choices((rng.randint(1, 5), rng.randint(4, 10), rng.randint(8, 16)), (2, 6, 2))[0]
    parts = rng.choices(("{w}", "{n}", "{v}", "the", "a", "and", "of"), (50, 12, 12, 12, 4, 5, 5), k=length)
    for _ in range(rng.choices((0, 1, 2), (35, 50, 15))[0]):
        kind = rng.choices(_KIND_NAMES, _KIND_WEIGHTS)[0]
        parts.insert(rng.randint(0, len(parts)), "{" + kind + "}")
    return parts


def draw(rng: Random) -> Sample | None:
    """One sentence, or None if what was drawn is too long or means something else than intended."""
    template: Sequence[str] = rng.choice(TEMPLATES).split() if rng.random() < 0.45 else _salad(rng)
    if rng.random() < 0.2:
        template = [*template, *rng.choice(_ENDINGS).split()]
    spoken, intended = _fill(rng, template)
    if len(spoken) > MAX_WORDS or sum(map(len, spoken)) + len(spoken) > MAX_BYTES:
        return None
    written, needed = write(spoken)
    if written != intended:
        return None
    return Sample(tuple(spoken), tuple(written), (*needed, len(spoken) + 1))


def is_held_out(spoken: Sequence[str]) -> bool:
    """Which side of the split a sentence is on: one in 16 is never trained on."""
    return hashlib.sha1(" ".join(spoken).encode()).digest()[0] % 16 == 0


def samples(seed: int | str, *, held_out: bool) -> Iterator[Sample]:
    """Endless samples of one side of the split, the same for the same seed."""
    rng = Random(f"captions {SEED} {seed}")
    while True:
        sample = draw(rng)
        if sample is not None and is_held_out(sample.spoken) == held_out:
            yield sample


def held_out_set(count: int = HELD_OUT) -> list[Sample]:
    """The held-out set: the first `count` different sentences of its side."""
    found: dict[tuple[str, ...], Sample] = {}
    for sample in samples("held out", held_out=True):
        found.setdefault(sample.spoken, sample)
        if len(found) == count:
            break
    return list(found.values())


def to_tsv(rows: Sequence[Sample]) -> str:
    """One line a sample: spoken, written, needed."""
    return "".join(f"{' '.join(s.spoken)}\t{' '.join(s.written)}\t{' '.join(map(str, s.needed))}\n" for s in rows)


def from_tsv(path: Path) -> list[Sample]:
    """Read `to_tsv` back; lines that begin with `#` are comments."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            spoken, written, needed = line.split("\t")
            rows.append(Sample(tuple(spoken.split()), tuple(written.split()), tuple(map(int, needed.split()))))
    return rows


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--show", type=int, default=0, metavar="N", help="print N training samples")
    parser.add_argument("--ceilings", action="store_true", help="print the ceilings of the held-out set")
    parser.add_argument("--write", action="store_true", help="write held_out.tsv")
    args = parser.parse_args()
    for sample in islice(samples("show", held_out=False), args.show):
        print(f"{' '.join(sample.spoken)}\n    {' '.join(sample.written)}")
    if args.ceilings:
        from layout import ceiling

        rows = held_out_set()
        for k in (1, 2, 3, 4, 5, 6, 8, 10, None):
            print(f"k={k}: {ceiling(rows, k):.3f}")
    if args.write:
        (HERE / "held_out.tsv").write_text(to_tsv(held_out_set()), encoding="utf-8")


if __name__ == "__main__":
    _main()
