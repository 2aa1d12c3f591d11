"""The one table of shapes: what every test and benchmark of attention runs over.

`CPU_CASES` is small and odd and holds every mask and option once; `GPU_CASES` adds the head dims, dtypes and lengths of
real models.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

MASKS = (
    "causal", "bottom_right", "window", "wait_k", "packed", "random",
    "mass", "sink", "kept", "classes", "empty", "outside",
)  # fmt: skip
LAYOUTS = ("bhtd", "bthd", "packed_qkv")


@dataclass(frozen=True)
class Case:
    """One call: shape letters, dtype, what rows see (`inputs.make_spans`), options, and how q, k, v lie in memory.

    `softcap` 0 is none. `layout`: contiguous, transposed from [B, T, H, D] as Hugging Face hands over, or slices of one
    wider tensor. `sharp` multiplies the logits: a softmax with one winner is harder than a flat one.
    """

    B: int
    H: int
    HK: int
    T: int
    S: int
    D: int
    mask: str
    dtype: torch.dtype = torch.float32
    softcap: float = 0.0
    sink_logits: bool = False
    layout: str = "bthd"
    sharp: float = 1.0

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        text = f"{self.mask}-B{self.B}-H{self.H}x{self.HK}-T{self.T}-S{self.S}-D{self.D}-{dtype}"
        extras = {"softcap": self.softcap, "sinklogits": self.sink_logits, f"sharp{self.sharp:g}": self.sharp != 1.0}
        return "-".join([text, self.layout, *(name for name, used in extras.items() if used)])


CPU_CASES = (
    Case(1, 1, 1, 1, 1, 8, "causal", layout="bhtd"),
    Case(2, 4, 2, 17, 17, 16, "causal"),
    Case(2, 4, 1, 5, 63, 8, "bottom_right", layout="packed_qkv"),
    Case(1, 6, 2, 63, 63, 24, "window", softcap=5.0),
    Case(3, 4, 4, 29, 29, 64, "wait_k", sharp=8.0),
    Case(2, 2, 1, 33, 33, 8, "packed", sink_logits=True, layout="bhtd"),
    Case(2, 4, 2, 17, 41, 80, "random", softcap=2.0, sink_logits=True),
    Case(2, 4, 2, 31, 31, 16, "mass"),
    Case(2, 4, 2, 31, 31, 16, "sink", sink_logits=True, layout="packed_qkv"),
    Case(2, 4, 2, 31, 37, 16, "kept", softcap=5.0),
    Case(2, 4, 2, 31, 31, 16, "classes", sharp=4.0),
    Case(2, 2, 2, 7, 9, 8, "empty", sink_logits=True),
    Case(2, 2, 2, 17, 19, 8, "outside"),
)

HALF_CASES = tuple(replace(case, dtype=dtype) for case in CPU_CASES[1:] for dtype in (torch.float16, torch.bfloat16))

GPU_CASES = (
    *CPU_CASES,
    *HALF_CASES,
    *(
        Case(2, 8, 2, T, T, D, mask, dtype)
        for T, D, mask in (
            (1, 128, "causal"), (17, 64, "wait_k"), (63, 80, "random"), (111, 96, "sink"), (256, 112, "mass"),
            (777, 128, "wait_k"), (513, 192, "kept"), (300, 256, "classes"), (1023, 64, "window"),
            (2048, 128, "wait_k"),
        )
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
    ),
    *(Case(1, 28, 4, T, 4096 + T, 128, "bottom_right", torch.bfloat16) for T in (1, 3, 16, 64, 65)),
    Case(1, 8, 8, 624, 624, 128, "sink", torch.bfloat16),
    Case(4, 16, 8, 1111, 1111, 256, "window", torch.bfloat16, softcap=50.0),
    Case(8, 64, 8, 333, 333, 64, "window", torch.bfloat16, sink_logits=True),
)  # fmt: skip
