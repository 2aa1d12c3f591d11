"""A few small calls of `incremental_prefill` for the checkers of CUDA, which are too slow for the test table:

    PYTHONPATH=. compute-sanitizer --tool memcheck python tests/cuda/sanitize.py     (and racecheck, initcheck)
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from prefill_cases import Case, make_call  # noqa: E402

from streamkernels.backends import cuda  # noqa: E402

CASES = [
    Case(T=1, length=(60, 9)),
    Case(T=9, H=14, HK=2, role="padded", limits="random", begins=True, sinks=(2, 3), length=(300, 70)),
    Case(T=40, H=8, HK=2, D=64, role="mixed", dtype=torch.float16, length=(100, 80)),
    Case(B=3, T=5, role="mixed", ragged=True, length=(200, 90), D=96),
    Case(B=2, T=20, D=256, window=(64, 32), ring_sinks=4, capacity=(87, 55), length=(1000, 500), role="mixed"),
    Case(layout="odd", T=3),
    Case(T=30, H=14, HK=2, length=(2000, 100)),
    Case(T=8, H=14, HK=2, length=(3000, 100)),
    Case(T=33, H=14, HK=2, D=64, role="source", length=(500, 100), capacity=(520, 100)),
    Case(T=64, H=14, HK=2, dtype=torch.float16, length=(1000, 3000)),
]


def main() -> None:
    for case in CASES:
        o, lse = cuda.incremental_prefill(*make_call(case))
        torch.cuda.synchronize()
        print(case, tuple(o.shape), bool(torch.isfinite(o).all()), flush=True)


if __name__ == "__main__":
    main()
