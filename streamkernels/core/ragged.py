"""How builders read batches of samples of different lengths: flat sequences are one sample, nested ones a batch.

Everything here runs on the host and names the argument that is wrong.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from .shapes import check_int, refuse


def listed(op: str, name: str, x: Any) -> list[Any]:
    """`x` as a list: a list, a tuple, a range, a tensor or an array (a tensor on a device is copied to the host)."""
    if hasattr(x, "tolist"):
        x = x.tolist()
    if not isinstance(x, Sequence) or isinstance(x, (str, bytes)):
        refuse(op, name, "a sequence of ints, or one such sequence per sample", x, TypeError)
    return list(x)


def integers(op: str, name: str, x: object, *, minimum: int | None = 0) -> list[int]:
    """One sample: a flat sequence of ints, each at least `minimum`."""
    values = listed(op, name, x)
    kinds = set(map(type, values))
    if kinds - {int}:
        wrong = next((v for v in values if isinstance(v, bool) or not hasattr(v, "__index__")), None)
        if wrong is not None:
            refuse(op, name, "ints", wrong, TypeError)
        values = [operator.index(v) for v in values]
    if minimum is not None and values and min(values) < minimum:
        refuse(op, name, f"ints >= {minimum}", f"{min(values)} at index {values.index(min(values))}")
    return values


def nested(x: Any) -> bool:
    """Whether `x` holds one sequence per sample. An empty sequence is one sample without entries."""
    if hasattr(x, "dim"):
        return bool(x.dim() > 1)
    return isinstance(x, Sequence) and len(x) > 0 and all(isinstance(i, Sequence) or hasattr(i, "tolist") for i in x)


def samples(op: str, name: str, x: Any, *, minimum: int | None = 0) -> list[list[int]]:
    """A batch: one list of ints per sample. A flat sequence is a batch of one."""
    if not nested(x):
        return [integers(op, name, x, minimum=minimum)]
    return [integers(op, f"{name}[{b}]", row, minimum=minimum) for b, row in enumerate(x)]


def sizes(op: str, name: str, x: object, B: int | None = None, *, minimum: int = 0) -> list[int]:
    """One int per sample: an int counts for each of `B` samples (default 1), a sequence names every sample's own."""
    if isinstance(x, int) and not isinstance(x, bool):
        return [check_int(op, name, x, minimum=minimum)] * (1 if B is None else check_int(op, "B", B, minimum=1))
    if isinstance(x, (bool, float, str)) or x is None:
        refuse(op, name, "an int, or one int per sample", x, TypeError)
    values = integers(op, name, x, minimum=minimum)
    if not values or (B is not None and len(values) != B):
        refuse(op, name, "at least one sample" if B is None else f"{B} samples", f"{len(values)} samples")
    return values


def same_batch(op: str, name: str, x: Sequence[object], like: str, other: Sequence[object]) -> None:
    """Refuse `x` unless it has as many samples as `other`, the argument called `like`."""
    if len(x) != len(other):
        refuse(op, name, f"{len(other)} samples, as in {like}", f"{len(x)} samples")


def batch_size(op: str, name: str, x: int | None, lengths: Sequence[int]) -> int:
    """Rows (or keys) of the padded batch: the longest sample, or `x` if it is given and no sample is longer."""
    longest = max(lengths, default=0)
    return longest if x is None else check_int(op, name, x, minimum=longest)
