"""incremental_prefill beside what users would call instead: device time with cold L2, and host-visible time.

`pytest -s bench/bench_incremental_prefill.py`. The new rows are target rows that see all of a source and a target
segment of S / 2 keys each. A row is met by its ratios or by 1.15 of its floor, the larger of the time to read as many
bytes in the same run (cold L2) and of the arithmetic at the rate of a matrix product in the same run. Prediction: the
larger of the bytes at 4.3 TB/s and the arithmetic at half of 790 TFLOP/s, and 5 us for the launch, the first loads and
the merge. Columns: `step_peers.py`; every contender's output is compared with ours first.
"""

from __future__ import annotations

import functools
import gc
import math
import random
from dataclasses import dataclass, field

import kernel_time
import pytest
import step_peers
import torch
from baselines import matmul_rate, read_time
from kernel_time import capture, copies_for_cold_l2, graph_time, host_time, replay_time
from record import Goal, compared
from step_peers import Step, make_step

import streamkernels as sk

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="device time needs a GPU")
DEVICE = "cuda"
DTYPE = torch.bfloat16
PEERS = ("FA3+append", "FA3 2seg", "cuDNN", "flex", "eager")
# the reference masks the whole capacity in fp32: beyond, it would only burn time
REFERENCE_KEYS = 4096


@dataclass(frozen=True)
class Case:
    """One row of the table: sizes, what must be shown (peer -> ratio), and the peers beside FA3."""

    S: int
    T: int
    H: int = 28
    HK: int = 4
    D: int = 128
    goals: dict[str, float] = field(default_factory=dict, hash=False)
    others: tuple[str, ...] = ("FA3 2seg", "eager")

    def __str__(self) -> str:
        return f"S={self.S} T={self.T} H={self.H} HK={self.HK} D={self.D}"

    def step(self) -> Step:
        """Fresh inputs: half the keys source, half target, one session that writes."""
        sizes = (self.H, self.HK, self.D, self.T)
        return make_step(*sizes, [(self.S // 2, self.S - self.S // 2)], [False], dtype=DTYPE, device=DEVICE)


SMALL = {"FA3+append": 1.6, "FA3 2seg": 4.0, "cuDNN": 1.2}
WITH_CUDNN = ("FA3 2seg", "cuDNN", "eager")
CASES = [Case(S, T, goals=SMALL, others=WITH_CUDNN) for S in (1024, 4096) for T in (1, 8, 32)]
CASES += [Case(16384, T, goals={"FA3+append": 1.4}, others=WITH_CUDNN) for T in (1, 8, 32)]
CASES += [Case(65536, T, goals={"FA3+append": goal}) for T, goal in ((1, 1.3), (8, 1.3), (32, 1.15))]
CASES += [Case(S, T, goals={"FA3+append": 0.7}) for S in (16384, 65536) for T in (128, 512)]
CASES += [
    Case(S, T, *shape, goals={"FA3+append": 1.3})
    for shape in ((32, 32, 128), (16, 8, 64), (8, 4, 256))
    for S in (4096, 16384)
    for T in (1, 8)
]
# FlexAttention compiles seconds per shape: three are enough to see where it stands
FLEX = {(4096, 1), (4096, 8), (16384, 128)}
MAIN = Case(4096, 8)


def step_bytes(step: Step) -> int:
    """Keys and values that the new rows see read once, q, k, v read, o and the new keys written."""
    held = sum(s if reads else s + t for (s, t), reads in zip(step.lengths, step.reads, strict=True))
    HK, D = step.k.shape[1], step.k.shape[3]
    return step.q.element_size() * (2 * held * HK * D + 2 * step.q.numel() + 4 * step.k.numel())


def step_flops(step: Step) -> int:
    """4 D per visible pair and head."""
    T, H, D = step.q.shape[2], step.q.shape[1], step.q.shape[3]
    held = sum(s if reads else s + t for (s, t), reads in zip(step.lengths, step.reads, strict=True))
    return 4 * D * H * (held * T + len(step.lengths) * T * (T + 1) // 2)


def predicted(step: Step) -> float:
    return max(step_bytes(step) / 4.3e6, step_flops(step) / 395e6) + 5


def floor(step: Step) -> float:
    return max(read_time(step_bytes(step)), step_flops(step) / matmul_rate())


def kernels_for(step: Step) -> dict[str, str]:
    """Backend -> "ok" or why not, and `auto` -> the one that it takes, for this step's call."""
    (call, *_), cache = step_peers.ours([step], "auto")
    del call
    cos, sin = step.row_angles
    explained = sk.explain(
        sk.incremental_prefill, step.q, step.k, step.v, cos, sin, cache, 0, role=roles_of(step), backend="auto"
    )
    return {**explained.reasons, "auto": explained.backend}


def roles_of(step: Step) -> torch.Tensor | int:
    """The role argument of a step's call."""
    roles = [sk.SOURCE if reads else sk.TARGET for reads in step.reads]
    if len(set(roles)) == 1:
        return roles[0]
    B, T = len(roles), step.q.shape[2]
    return torch.tensor(roles, dtype=torch.int8, device=step.q.device)[:, None].expand(B, T).contiguous()


def cold(make, nbytes: int) -> list[Step]:
    """As many steps as keep the L2 cold."""
    gc.collect()
    if kernel_time.compile_only:
        return [make()]
    n = min(copies_for_cold_l2(nbytes), 64) if DEVICE == "cuda" else 2
    return [make() for _ in range(n)]


def contenders(steps: list[Step], peers: tuple[str, ...]) -> dict[str, list]:
    """name -> calls, one per step; a contender that cannot run says why and is left out."""
    ready = kernels_for(steps[0])
    kernels = [name for name in ("cuda", "triton") if ready[name] == "ok"]
    append = "cuda" if sk.cuda_status().startswith("CUDA kernels ready") else "triton"
    append = append if DEVICE == "cuda" else "reference"
    makers = {
        "FA3+append": step_peers.fa3_append,
        "FA3 2seg": step_peers.fa3_two_segments,
        "cuDNN": lambda step: step_peers.cudnn(step, append),
        "flex": lambda step: step_peers.flex(step, append),
        "eager": step_peers.eager,
    }
    found = {name: step_peers.ours(steps, name)[0] for name in kernels}
    held = max(s + t for s, t in steps[0].lengths)
    if not kernels and held <= REFERENCE_KEYS:
        found["reference"] = step_peers.ours(steps, "reference")[0]
    for name in kernels[1:]:
        check_same(found, name)
    for name in peers:
        try:
            found[name] = [makers[name](step) for step in steps]
            check_same(found, name)
        except AssertionError:
            raise
        except Exception as error:  # a peer that cannot run is a gap in a column, not the end of the table
            found.pop(name, None)
            print(f"no {name} column: {type(error).__name__}: {str(error)[-300:]}")
    return found


def check_same(found: dict[str, list], name: str) -> None:
    """`name` computes what the first contender does: rows that differ would be timed for nothing."""
    first = next(iter(found))
    a, b = found[first][0]().double(), found[name][0]().double()
    error = float((a - b).norm() / b.norm())
    assert error < 2e-2, f"{name} differs from {first}: relative norm {error:.2g}"


@torch.no_grad()
def time_all(steps: list[Step], peers: tuple[str, ...]) -> dict[str, float]:
    """Device microseconds of every contender that can run; `ours` is the backend that `auto` takes."""
    found = contenders(steps, peers)
    times = {name: graph_time(calls) for name, calls in found.items()}
    auto = kernels_for(steps[0])["auto"]
    return {"ours": times.get(auto, math.nan), "backend": auto, **times}


def row_of(work: str, steps: list[Step], times: dict, goals: dict[str, float]) -> dict:
    """Predicted, measured and ratios of one case; met by all its ratios or by 1.15 of its floor."""
    mine, least = times["ours"], floor(steps[0])
    row = {"work": work, "predicted us": predicted(steps[0]), "floor us": least, "backend": times["backend"]}
    row |= {"measured us": mine, "/ floor": mine / least, "triton us": times.get("triton", math.nan)}
    for name in PEERS:
        row[f"{name} us"] = times.get(name, math.nan)
    ratios = {name: times.get(name, math.nan) / mine for name in goals}
    row["ratios"] = ", ".join(f"{ratio:.2f} {name}" for name, ratio in ratios.items())
    row["goal"] = ", ".join(f"{goal:g} {name}" for name, goal in goals.items())
    unknown = math.isnan(mine) or (mine > 1.15 * least and any(math.isnan(ratio) for ratio in ratios.values()))
    met = mine <= 1.15 * least or all(ratios[name] >= goal for name, goal in goals.items())
    return row | {"met": "-" if unknown else "yes" if met else "no"}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_step(case, show):
    steps = cold(case.step, step_bytes(case.step()))
    peers = ("FA3+append", *case.others)
    if (case.S, case.T) in FLEX and case.H == 28:
        peers += ("flex",)
    times = time_all(steps, peers)
    show([row_of(str(case), steps, times, case.goals)], last_call(steps))


def last_call(steps: list[Step]):
    """Our call for pytest-benchmark's own table, by the backend that `auto` takes."""
    call = step_peers.ours(steps[:1], "auto")[0][0]
    held = max(s + t for s, t in steps[0].lengths)
    if held > REFERENCE_KEYS and kernels_for(steps[0])["auto"] == "reference":
        return lambda: None

    @torch.no_grad()
    def run() -> object:
        return call()

    return run


@pytest.mark.parametrize("sessions", [8, 32, 64])
def test_ragged_batch(sessions, show):
    """Sessions of 500 to 16k keys, half source and half target; every other one reads 8 tokens, the rest write 8.

    The best of FA3: one call over every session's own segment and one more for the writers' sources (`step_peers`)."""
    draw = random.Random(sessions)
    sizes = [draw.randint(250, 8000) for _ in range(sessions)]
    reads = [b % 2 == 0 for b in range(sessions)]
    make = lambda: make_step(28, 4, 128, 8, [(n, n) for n in sizes], reads, dtype=DTYPE, device=DEVICE)  # noqa: E731
    steps = cold(make, step_bytes(make()))
    times = time_all(steps, ("FA3 2seg",))
    show([row_of(f"batch of {sessions}, 500 .. 16k, T=8", steps, times, {"FA3 2seg": 1.3})], last_call(steps))


def test_host_visible(show):
    """One eager call from Python, S = 1k, T = 1: back-to-back calls, beside FA3's with append."""
    step = Case(1024, 1).step()
    call = last_call([step])
    mine = host_time(call, calls=100, repeats=5)
    try:
        theirs = host_time(torch.no_grad()(step_peers.fa3_append(step)), calls=100, repeats=5)
    except ImportError:
        theirs = math.nan
    backend = kernels_for(step)["auto"]
    work = f"host-visible eager call, S=1024 T=1 ({backend})"
    rows = [compared(work, "host", 16, mine, "FA3+append", theirs, Goal(at_least=2.5))]
    show([*rows, compared(work, "host", 16, mine, "12 us", 12.0, Goal(at_most=1, aim=True))], call)


@functools.cache
def single_call(backend: str) -> float:
    """The cold single-call graph time of S = 4k, T = 8."""
    steps = cold(MAIN.step, step_bytes(MAIN.step()))
    with torch.no_grad():
        return graph_time(step_peers.ours(steps, backend)[0])


def test_layers_in_one_graph(show):
    """28 layers in one graph: no more than 28 cold calls (the commit, once per step, is not in it)."""
    steps = [MAIN.step() for _ in range(28)]
    backend = kernels_for(steps[0])["auto"]
    with torch.no_grad():
        calls, _ = step_peers.ours(steps, backend)
        together = 28 * graph_time(calls)
    alone = 28 * single_call(backend)
    row = compared(
        f"28 layers, S=4096 T=8 ({backend})", "graph", alone, together, "28 calls", alone, Goal(at_most=1.05)
    )
    show([row], last_call(steps))


@torch.no_grad()
def replayed_at(backend: str, captured: int, replayed: int, longest: int, T: int = 8) -> float:
    """Microseconds per call of a graph captured at `captured` keys and replayed at `replayed`, all in caches with room
    for `longest`."""
    steps = [Case(captured, T).step() for _ in range(2)]
    calls, cache = step_peers.ours(steps, backend, room=(longest - captured) // 2)
    for layer in range(cache.layers):
        for role in (sk.SOURCE, sk.TARGET):
            for buffer in cache.segment(layer, role):
                buffer.normal_()
    graph = capture(calls)
    cache.length().copy_(torch.full_like(cache.length(), replayed // 2))
    return replay_time(graph) / len(calls)


def test_graph_of_another_length(show):
    """The split over keys comes from the lengths on the device, not from those at capture."""
    short, long = (1024, 65536)
    backend = kernels_for(Case(short, 8).step())["auto"]
    if backend == "reference":
        pytest.skip("the reference has no graph worth timing")
    there = replayed_at(backend, long, long, long)
    here = replayed_at(backend, short, long, long)
    work = f"captured at 1k, replayed at 64k, T=8 ({backend})"
    row = compared(work, "graph", there, here, "captured at 64k", there, Goal(at_most=1.1))
    show([row], last_call([Case(short, 8).step()]))
