"""Shape letters, and the checks that write every error message.

Letters: `B` batch, `T` query rows, `S` key slots, `H` query heads, `HK` key/value heads, `R = H // HK`, `D` head dim,
`N` span slots, `K` kept keys, `L` layers. Every refused call raises ValueError, TypeError or NotImplementedError with a
text of one form: `op: argument: expected what, got what`. Checks read metadata only and never synchronise a device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAX_HEAD_DIM = 256


def describe(x: object) -> str:
    """What came, for an error message: `float32[2, 8, 17, 64] on cpu` for a tensor, its repr or type for the rest."""
    if isinstance(x, torch.Tensor):
        return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)} on {x.device}"
    if x is None or isinstance(x, (bool, int, float, str)):
        return repr(x)
    if isinstance(x, (tuple, list)) and len(x) <= 8 and all(isinstance(i, (int, float, str)) for i in x):
        return repr(x)
    return type(x).__name__


def refuse(op: str, argument: str, expected: str, got: object, error: type[Exception] = ValueError) -> NoReturn:
    """Raise `error` with the library's one form of message."""
    raise error(f"{op}: {argument}: expected {expected}, got {got if isinstance(got, str) else describe(got)}")


class Shapes:
    """Binds shape letters over the arguments of one call: the first tensor that carries a letter fixes it.

    >>> s = Shapes("span_attention")
    >>> s.tensor("q", torch.empty(2, 8, 5, 64), "B H T D").shape[0]
    2
    >>> s["T"]
    5
    """

    def __init__(self, op: str, **bound: int) -> None:
        self.op = op
        self.sizes: dict[str, int] = dict(bound)
        self.device: torch.device | None = None

    def __getitem__(self, letter: str) -> int:
        return self.sizes[letter]

    def tensor(
        self,
        name: str,
        x: object,
        letters: str,
        *,
        dtype: torch.dtype | Sequence[torch.dtype] | None = None,
        unit_last_stride: bool = False,
    ) -> torch.Tensor:
        """Check that `x` is a tensor of shape `letters` (a literal number stands for itself, `1|B` for either), of one
        of the dtypes `dtype`, on the device of the tensors before it. Returns it; binds new letters only when all is
        well."""
        if not isinstance(x, torch.Tensor):
            refuse(self.op, name, f"a tensor [{letters.replace(' ', ', ')}]", x, TypeError)
        wanted = letters.split()
        new: dict[str, int] = {}
        shape = x.shape
        fits = len(shape) == len(wanted)
        if fits:
            for letter, size in zip(wanted, shape, strict=True):
                known = self.sizes.get(letter, new.get(letter))
                if known is None:
                    fits = self._bind(letter, size, new) and fits
                elif known != size:
                    fits = False
        if not fits:
            bound = ", ".join(f"{k}={v}" for k, v in self.sizes.items() if k in letters.replace("|", " ").split())
            refuse(self.op, name, f"shape [{', '.join(wanted)}]" + (f" with {bound}" if bound else ""), x)
        if dtype is not None:
            dtypes = (dtype,) if isinstance(dtype, torch.dtype) else tuple(dtype)
            if x.dtype not in dtypes:
                names = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
                refuse(self.op, name, names, x, TypeError)
        if self.device is not None and x.device != self.device:
            refuse(self.op, name, f"a tensor on {self.device}", x)
        if unit_last_stride and x.dim() and x.shape[-1] > 1 and x.stride(-1) != 1:
            refuse(self.op, name, "last stride 1 (call .contiguous())", f"strides {tuple(x.stride())}")
        self.sizes.update(new)
        self.device = x.device
        return x

    def _bind(self, letter: str, size: int, new: dict[str, int]) -> bool:
        """Whether `size` fits a letter that is not bound yet: a new one, a literal number, or alternatives."""
        for part in letter.split("|"):
            known = int(part) if part.isdigit() else self.sizes.get(part, new.get(part))
            # not `in`: torch.compile compares a specialised size to a symbolic one wrongly there
            if known is None:
                new[part] = size
                return True
            if known == size:
                return True
        return False

    def heads(self) -> int:
        """Check H against HK and D against the limits; returns R = H // HK."""
        H, HK, D = self.sizes["H"], self.sizes["HK"], self.sizes["D"]
        if HK < 1 or H % HK:
            refuse(
                self.op,
                "q",
                f"a number of query heads that is a multiple of the {HK} key/value heads",
                f"{H} query heads",
            )
        self.head_dim(D)
        return H // HK

    def head_dim(self, D: int) -> None:
        if D % 8 or not 8 <= D <= MAX_HEAD_DIM:
            refuse(
                self.op,
                "q" if "H" in self.sizes else "k",
                f"a head dim D that is a multiple of 8, at most {MAX_HEAD_DIM}",
                f"D={D}",
            )


def check_number(op: str, name: str, x: object, *, minimum: float | None = None, positive: bool = False) -> float:
    """A finite Python number (not a tensor: reading one would synchronise), optionally bounded below."""
    if isinstance(x, bool) or not isinstance(x, (int, float)):
        refuse(op, name, "a number", x, TypeError)
    if x != x or x in (float("inf"), float("-inf")):
        refuse(op, name, "a finite number", x)
    if positive and x <= 0:
        refuse(op, name, "a number > 0", x)
    if minimum is not None and x < minimum:
        refuse(op, name, f"a number >= {minimum}", x)
    return x


def check_int(op: str, name: str, x: object, *, minimum: int = 0, maximum: int | None = None) -> int:
    """A Python int in `[minimum, maximum]`."""
    if isinstance(x, bool) or not isinstance(x, int):
        refuse(op, name, "an int", x, TypeError)
    if x < minimum or (maximum is not None and x > maximum):
        refuse(op, name, f"an int >= {minimum}" + (f" and <= {maximum}" if maximum is not None else ""), x)
    return x
