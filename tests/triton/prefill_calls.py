"""What the tests of incremental_prefill's Triton kernels share: raw calls, their runs and their gradients."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from streamkernels.core.cache import SOURCE, TARGET
from streamkernels.ops import incremental_prefill as _register  # noqa: F401  (registers the ops below)

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
NAN = float("nan")
raw = torch.ops.streamkernels.incremental_prefill.default
raw_backward = torch.ops.streamkernels.incremental_prefill_backward.default


@dataclass(frozen=True)
class Call:
    """One raw call: committed `length` per sample, what the rows are, and the options. `limit`, `begin`: rows draw
    theirs below it."""

    B: int = 2
    H: int = 4
    HK: int = 2
    T: int = 5
    D: int = 16
    length: tuple[tuple[int, int], ...] = ((3, 2), (0, 4))
    capacity: tuple[int, int] = (14, 14)
    role: str = "target"  # source, target, mixed
    rotary: int = 0
    interleaved: bool = False
    limit: int = 0
    begin: tuple[int, int] = (0, 0)
    sinks: tuple[int, int, int] = (0, 0, 0)
    windows: tuple[int, int] = (0, 0)
    softcap: float = 0.0
    sink_logits: bool = False
    strided: bool = False
    sharp: float = 1.0


LONG = Call(H=6, T=11, capacity=(120, 140), length=((110, 70), (30, 130)), role="mixed", limit=120, rotary=16)
CALLS = {
    "target": Call(rotary=16),
    "source": Call(role="source", rotary=16),
    "one row": Call(B=1, H=7, HK=1, T=1, D=64, length=((130, 17),), capacity=(150, 20), rotary=64),
    "empty": Call(length=((0, 0), (0, 0)), capacity=(0, 9)),
    "no rotation": Call(role="mixed", T=9, limit=9),
    "partial rotation": Call(D=24, rotary=8),
    "interleaved": Call(D=40, rotary=24, interleaved=True, role="mixed"),
    "interleaved whole": Call(rotary=16, interleaved=True),
    "odd head dim": Call(D=80, rotary=80, T=3),
    "smallest head dim": Call(D=8, rotary=8, strided=True),
    "long": LONG,
    "tile edges": Call(B=3, H=6, HK=1, T=3, length=((64, 128), (63, 65), (0, 64)), capacity=(64, 131), rotary=16),
    "edges, sources": Call(B=3, H=6, HK=1, T=3, length=((64, 1), (63, 0), (0, 9)), capacity=(130, 9), role="source"),
    "uneven parts": Call(B=3, H=2, HK=1, T=40, length=((600, 500), (64, 0), (63, 700)), capacity=(640, 740), rotary=16),
    "begins": replace(LONG, begin=(100, 100)),
    "sinks": replace(LONG, begin=(100, 140), sinks=(3, 70, 0), T=7),
    "softcap": Call(softcap=2.0, sink_logits=True, rotary=16, sharp=4.0),
    "sink logits": replace(LONG, sink_logits=True, T=5, sharp=8.0),
    "full": Call(capacity=(6, 6), role="mixed", T=9, rotary=16),
    "full target": Call(capacity=(6, 6), T=9),
    "strided": replace(LONG, T=7, strided=True, rotary=8),
    "rings": Call(role="mixed", sinks=(0, 0, 2), windows=(3, 4), length=((13, 2), (100, 14))),
    "one ring": Call(role="mixed", sinks=(0, 0, 2), windows=(0, 4), length=((3, 2), (6, 140))),
    "ring of sources": Call(role="source", sinks=(0, 0, 2), windows=(5, 0), length=((13, 2), (60, 0)), T=3),
    "written first": Call(B=1, H=1, HK=1, D=8, T=260, capacity=(300, 300), length=((10, 3),), role="mixed", limit=250),
}
GPU_CALLS = {
    **{
        f"D={D} R={R} T={T}": Call(
            B=2, H=2 * R, HK=2, T=T, D=D, rotary=D, length=((1500, 333), (64, 2001)), capacity=(2300, 2600),
            role="mixed", limit=1700,
        )
        for D, R, T in ((64, 1, 1), (64, 4, 8), (96, 7, 5), (112, 16, 3), (128, 7, 1), (128, 7, 32), (128, 7, 300),
                        (192, 2, 17), (256, 2, 1), (256, 2, 63), (256, 8, 40))
    },
    "2000 rows": Call(B=1, H=14, HK=2, T=2000, D=128, rotary=128, length=((700, 5),), capacity=(2800, 2800),
                      role="mixed", limit=2500),
    "rings of a model": Call(H=14, HK=2, T=33, D=128, rotary=128, role="mixed", sinks=(0, 0, 4), windows=(256, 300),
                             length=((4000, 100), (271, 999)), capacity=(300, 340)),
}  # fmt: skip
if GPU:
    CALLS |= GPU_CALLS


def make(call: Call, dtype: torch.dtype, seed: int = 0) -> list:
    """Raw arguments; memory that holds no key is NaN."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda heads, n: torch.randn(call.B, heads, n, call.D, generator=g)  # noqa: E731
    shapes = ((call.H, call.T), (call.HK, call.T), (call.HK, call.T))
    q, k, v = (draw(*shape).to(DEVICE, dtype).transpose(1, 2).contiguous().transpose(1, 2) for shape in shapes)
    if call.strided:
        wide = torch.full((call.B, call.T, call.H + 2 * call.HK, call.D + 8), NAN, device=DEVICE, dtype=dtype)
        parts = wide[..., : call.D].transpose(1, 2).split([call.H, call.HK, call.HK], 1)
        q, k, v = (part.copy_(x) for part, x in zip(parts, (q, k, v), strict=True))
    cos = sin = None
    if call.rotary:
        angles = torch.rand(1, call.T, call.rotary // 2, generator=g) * 6
        cos, sin = angles.cos().to(DEVICE), angles.sin().to(DEVICE)
    segments = []
    for r in (SOURCE, TARGET):
        for _ in "kv":
            x = draw(call.HK, call.capacity[r])
            for b in range(call.B):
                x[b, :, max(0, call.length[b][r]) :] = NAN
            segments.append(x.to(DEVICE, dtype))
    length = torch.tensor(call.length, dtype=torch.int32, device=DEVICE)
    status = torch.zeros(1, dtype=torch.int32, device=DEVICE)

    def draw_rows(low: int, high: int, kind: torch.dtype) -> Tensor:
        return torch.randint(low, high, (call.B, call.T), generator=g, dtype=kind).to(DEVICE)

    role = draw_rows(-1, 2, torch.int8) if call.role == "mixed" else None
    rows = [draw_rows(-2, n, torch.int32) if n else None for n in (call.limit, *call.begin)]
    logits = torch.randn(call.H, generator=g).to(DEVICE) if call.sink_logits else None
    return [
        q, k, v, cos, sin, *segments, length, status, role, SOURCE if call.role == "source" else TARGET, *rows, None,
        *call.sinks, any(call.windows), *call.windows, call.sharp * call.D**-0.5, call.softcap, logits,
        call.interleaved, "reference",
    ]  # fmt: skip


def wide(x, dtype: torch.dtype = torch.float64):
    return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x


def run(arguments: list, backend: str) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:
    """o, lse, the segments after the writes, the status word; the arguments stay as they are."""
    arguments = list(arguments)
    arguments[5:9] = [x.clone() for x in arguments[5:9]]
    arguments[10], arguments[-1] = arguments[10].clone(), backend
    o, lse = raw(*arguments)
    return o, lse, arguments[5:9], arguments[10]


def gradients(arguments: list, exact: list, backend: str) -> tuple[Tensor, ...]:
    """dq, dk, dv, d sink_logits for the o and lse of the fp64 reference."""
    o, lse = raw(*[x.clone() if isinstance(x, Tensor) else x for x in exact])
    dtype = arguments[0].dtype
    g = torch.Generator().manual_seed(5)
    do = torch.randn(o.transpose(1, 2).shape, generator=g).to(DEVICE, dtype).transpose(1, 2)
    dlse = torch.randn(lse.shape, generator=g).to(DEVICE)
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    call = [do, wide(dlse, kind), *arguments[:3], o.to(dtype), lse.to(kind), *arguments[3:10], *arguments[11:19]]
    return raw_backward(*call, *arguments[23:-1], backend)
