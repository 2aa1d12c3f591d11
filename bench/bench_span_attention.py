"""span_attention beside FlexAttention, cuDNN and itself: device time with cold L2, and host-visible time. Ours is what
`auto` takes: on Hopper the CUDA kernel for many rows and Triton's backward. Rules beside each other are Triton's.

`pytest -s bench/bench_span_attention.py`; a first `pytest -n 8 --compile-only` of it compiles in parallel. TFLOP/s
count the arithmetic of visible pairs, 4 D per pair and head forward, 2.5 times that backward (FlashAttention's
convention). Prediction: that arithmetic at a fraction of the measured matrix product (`EFFICIENCY`), and 5 us.
"""

from __future__ import annotations

import functools
import gc
from dataclasses import dataclass, replace

import kernel_time
import pytest
import torch
from baselines import Peer, flash_attention_4_missing, flex_attend, matmul_rate, peer, sdpa_attend
from kernel_time import copies_for_cold_l2, graph_time, host_time
from record import Goal, compared

import streamkernels as sk
from streamkernels.core.spans import ATTEND, KEPT, MASS, SINK
from streamkernels.ops import span_attention as _register  # noqa: F401  (registers torch.ops.streamkernels.span_attention)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="device time needs a GPU")
DEVICE = "cuda"
DTYPE = torch.bfloat16
BACKEND, RULES_BACKEND = "auto", "triton"
# of a matrix product: what Hopper's kernel reaches, and Triton, 4 products of whose 7 are in the slow half
EFFICIENCY = {"forward": 0.75, "backward": 0.45}
PRODUCTS = {"forward": 1.0, "backward": 2.5}


@dataclass(frozen=True)
class Case:
    """A wait-k training shape and what must be shown of it: beside FlexAttention on Triton and on FlashAttention-4, or
    (`best`) beside the faster of the two."""

    L: int
    H: int
    HK: int
    D: int
    forward: float = 1.1
    backward: float = 1.1
    flash: bool = False
    best: bool = False

    def __str__(self) -> str:
        return f"L={self.L} H={self.H} HK={self.HK} D={self.D}"


CASES = [
    Case(2048, 28, 4, 128, 1.2, 1.2, flash=True, best=True),
    Case(8192, 28, 4, 128, 1.2, 1.2, flash=True),
    Case(16384, 28, 4, 128, 1.2, 1.05, flash=True),
    Case(32768, 28, 4, 128, 1.2, 1.05, flash=True),
    Case(8192, 16, 8, 64),
    Case(8192, 8, 4, 256),
    Case(8192, 32, 32, 128),
]
CAUSAL = Case(8192, 28, 4, 128)


def wait_k(L: int) -> sk.Spans:
    """Half source, half target, words of 4 tokens, k = 5."""
    words = [4] * (L // 8)
    return sk.spans.wait_k([words], [words], k=5, device=DEVICE)


def input_sets(case: Case) -> list[tuple[torch.Tensor, ...]]:
    """(q, k, v, do), as models hand them over: stored rows first; as many sets as keep the L2 cold."""
    heads = (case.H, case.HK, case.HK, case.H)
    timed = DEVICE == "cuda" and not kernel_time.compile_only
    n = copies_for_cold_l2(2 * case.L * case.D * sum(heads)) if timed else 1
    make = lambda h: torch.randn(1, case.L, h, case.D, device=DEVICE, dtype=DTYPE).transpose(1, 2)  # noqa: E731
    return [tuple(make(h).requires_grad_(i < 3) for i, h in enumerate(heads)) for _ in range(n)]


def ours(sets: list[tuple[torch.Tensor, ...]], spans: sk.Spans, backend: str | None = None) -> Peer:
    """Our calls over the same sets; the backward is the registered op, without autograd's host work."""
    backend = backend or BACKEND
    prepared = sk.prepare(spans, sets[0][1].shape[2], backend=BACKEND)

    def attend(q, k, v):
        return sk.span_attention(q, k, v, spans, prepared=prepared, backend=backend)

    chosen = sk.explain(sk.span_attention, *sets[0][:3], spans, backend=backend).backend
    rules = [int(rule) for rule in spans.rules]
    options = (spans.bounds, rules, *[None] * 8, *prepared, sets[0][0].shape[3] ** -0.5, 0.0, chosen)
    op, op_backward = torch.ops.streamkernels.span_attention, torch.ops.streamkernels.span_attention_backward
    plain = [tuple(x.detach() for x in s) for s in sets]
    saved = [op(*s[:3], *options) for s in plain]
    zero = torch.zeros_like(saved[0][1])
    forwards = [lambda s=s: op(*s[:3], *options) for s in plain]
    backwards = [
        lambda s=s, r=r: op_backward(s[3], zero, *s[:3], *r, *options) for s, r in zip(plain, saved, strict=True)
    ]
    return Peer(f"ours, {chosen}", attend, forwards, backwards, (saved[0][0], *backwards[0]()[:3]))


def cuda_runs(sets: list[tuple[torch.Tensor, ...]], spans: sk.Spans) -> bool:
    return sk.explain(sk.span_attention, *sets[0][:3], spans).reasons["cuda"].startswith("ok")


def check_same(a: Peer, b: Peer) -> None:
    """Both compute the same o, dq, dk, dv: rows that differ would be timed for nothing."""
    for name, x, y in zip(("o", "dq", "dk", "dv"), a.first, b.first, strict=True):
        error = float((x.double() - y.double()).norm() / y.double().norm())
        assert error < 2e-2, f"{name} of {b.name} differs from ours: relative norm {error:.2g}"


def visible_pairs(spans: sk.Spans) -> int:
    return int((spans.bounds[..., 1] - spans.bounds[..., 0]).clamp(min=0).sum())


def predicted(flops: float, part: str) -> float:
    return PRODUCTS[part] * flops / matmul_rate() / EFFICIENCY[part] + 5


@functools.lru_cache(maxsize=1)
def contenders(case: Case) -> tuple[sk.Spans, dict[str, Peer]]:
    """Everyone who can run the case, over the same inputs, and found to agree."""
    gc.collect()
    spans, sets = wait_k(case.L), input_sets(case)
    found = {"ours": ours(sets, spans), "flex Triton": peer("flex Triton", flex_attend(spans, case.L), sets)}
    if case.flash and (why := flash_attention_4_missing()):
        print(why)
    elif case.flash:
        try:
            found["flex FA4"] = peer("flex FA4", flex_attend(spans, case.L, backend="FLASH"), sets)
        except Exception as error:  # a peer that cannot run is a gap in a column, not the end of the table
            print(f"no column for FlexAttention on FlashAttention-4: {str(error)[-800:]}")
    for name in list(found)[1:]:
        check_same(found["ours"], found[name])
    return spans, found


@pytest.mark.parametrize("part", ["forward", "forward + backward"])
def test_host_visible(part, show):
    """L = 2048: back-to-back eager calls, as a training loop makes them."""
    if kernel_time.compile_only:
        pytest.skip("the forward's test compiles all of it")
    case = CASES[0]
    spans, found = contenders(case)
    q, k, v, do = input_sets(case)[0]

    def step(p: Peer) -> object:
        o = p.attend(q, k, v)
        return o if part == "forward" else torch.autograd.grad(o, (q, k, v), do)

    times = {name: host_time(lambda p=p: step(p), calls=40, repeats=5) for name, p in found.items()}
    peers = [name for name in times if name != "ours"]
    best = min(peers, key=times.__getitem__)
    flops = 4 * visible_pairs(spans) * case.H * case.D
    guess = predicted(flops, "forward") + (predicted(flops, "backward") if "backward" in part else 0)
    # the launch from Python, with autograd's part of it
    guess = max(guess, 40.0 if part == "forward" else 150.0)
    goals = {name: Goal(at_least=2, aim=name != best) for name in peers}
    work = f"host-visible, {case}"
    rows = [compared(work, part, guess, times["ours"], name, times[name], goals[name]) for name in peers]
    show(rows, lambda: step(found["ours"]))


@pytest.mark.parametrize("part", ["forward", "backward"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_wait_k(case, part, show):
    if kernel_time.compile_only and part == "backward":
        pytest.skip("the forward's test compiles both")
    spans, found = contenders(case)
    calls = {name: getattr(p, f"{part}s") for name, p in found.items()}
    times = {name: graph_time(c) for name, c in calls.items()}
    guess = predicted(4 * visible_pairs(spans) * case.H * case.D, part)
    goal = case.forward if part == "forward" else case.backward
    aim = 0.95 if part == "forward" else 0.9
    rows = []
    peers = [name for name in times if name != "ours"]
    best = min(peers, key=times.__getitem__)
    for name in peers:
        if case.best:
            wanted = Goal(at_least=goal, aim=name != best)
        else:
            wanted = Goal(at_least=goal) if name == "flex Triton" else Goal(at_least=aim, aim=True)
        rows.append(compared(f"wait-k 5, {case}", part, guess, times["ours"], name, times[name], wanted))
    show(rows, calls["ours"][0])


@functools.lru_cache(maxsize=1)
def causal_contenders() -> tuple[sk.Spans, dict[str, Peer]]:
    contenders.cache_clear()
    gc.collect()
    spans, sets = sk.spans.causal(CAUSAL.L, device=DEVICE), input_sets(CAUSAL)
    found = {"ours": ours(sets, spans), "cuDNN": peer("cuDNN", sdpa_attend, sets)}
    check_same(found["ours"], found["cuDNN"])
    return spans, found


@pytest.mark.parametrize("part", ["forward", "backward"])
def test_causal(part, show):
    spans, found = causal_contenders()
    calls = {name: getattr(p, f"{part}s") for name, p in found.items()}
    times = {name: graph_time(c) for name, c in calls.items()}
    guess = predicted(4 * visible_pairs(spans) * CAUSAL.H * CAUSAL.D, part)
    rows = [
        compared(f"causal, {CAUSAL}", part, guess, times["ours"], "cuDNN", times["cuDNN"], goal)
        for goal in (Goal(at_least=0.75), Goal(at_least=0.95, aim=True))
    ]
    show(rows, calls["ours"][0])


def _cuda_cases() -> list[tuple[str, Case, int]]:
    """(name, case, keys): training shapes, chunks of rows behind a cache, and few or many blocks of rows; 0 keys: a
    wait-k mask."""
    cases = [*(case for case in CASES if case.D <= 128), *(Case(L, 28, 4, 128) for L in (512, 1024, 4096))]
    # heads are as good as sessions
    cases += [Case(512, 56, 8, 128), Case(512, 224, 32, 128), Case(1024, 8, 2, 128), Case(2048, 8, 2, 64)]
    chunks = [(T, T + S) for S in (0, 4096, 16384) for T in (65, 128, 256, 512, 1024)]
    return [(f"wait-k 5, {case}", case, 0) for case in cases] + [
        (f"chunk of {T}, S={S} H=28 HK=4 D=128", Case(T, 28, 4, 128), S) for T, S in chunks
    ]


@pytest.mark.parametrize(("work", "case", "S"), [pytest.param(*row, id=row[0]) for row in _cuda_cases()])
def test_cuda_for_many_rows(work, case, S, show):
    """The CUDA kernel for many rows beside Triton's: what `auto` should take."""
    if kernel_time.compile_only:
        pytest.skip("the other tests compile Triton's")
    contenders.cache_clear()
    gc.collect()
    spans, sets = wait_k(case.L), input_sets(case)
    if S:
        spans = sk.spans.bottom_right([case.L], [S], device=DEVICE)
        keys = [s[1:3] for s in input_sets(replace(case, L=S))]
        sets = [(sets[0][0], *pair, sets[0][3]) for pair in keys]
    if not cuda_runs(sets, spans):
        pytest.skip("the CUDA kernel does not run here")
    cuda, triton = ours(sets, spans, "cuda"), ours(sets, spans, RULES_BACKEND)
    check_same(triton, cuda)
    guess = predicted(4 * visible_pairs(spans) * case.H * case.D, "forward")
    a, b = graph_time(cuda.forwards), graph_time(triton.forwards)
    show([compared(f"CUDA, {work}", "forward", guess, a, "Triton", b, Goal(at_least=1, aim=True))], cuda.forwards[0])


# text rows over a long cache: H = HK = 32, T = 512, S = 16k; K and V alone are 268 MB, so every call is cold
H, T, S, D = 32, 512, 16384, 128


@functools.lru_cache(maxsize=1)
def long_inputs() -> tuple[torch.Tensor, ...]:
    causal_contenders.cache_clear()
    gc.collect()
    return tuple(torch.randn(1, H, n, D, device=DEVICE, dtype=DTYPE) for n in (T, S, S))


@functools.cache
def time_of(name: str) -> float:
    """Device time of one kind of long call."""
    return graph_time([long_call(name)])


def long_call(name: str):
    """The call over the long cache under one of the spans below."""
    spans = long_spans(name)
    q, k, v = long_inputs()
    prepared = sk.prepare(spans, S)
    return lambda: sk.span_attention(q, k, v, spans, prepared=prepared, backend=RULES_BACKEND)


def long_spans(name: str) -> sk.Spans:
    """all keys, a tenth of them by spans or by a kept list; or text rows that see all vision keys under a rule."""
    if name in ("ATTEND", "MASS", "SINK"):
        bounds = torch.zeros(1, T, 2, 2, dtype=torch.int32, device=DEVICE)
        bounds[:, :, 1, 1] = S - T
        bounds[:, :, 0, 0] = S - T
        bounds[:, :, 0, 1] = S - T + 1 + torch.arange(T, device=DEVICE)
        rule = {"ATTEND": ATTEND, "MASS": MASS, "SINK": SINK}[name]
        sink = torch.zeros(1, 2, dtype=torch.int32, device=DEVICE) if rule == SINK else None
        return sk.Spans(bounds, (ATTEND, rule), sink)
    first = S - S // 10 if name == "10 % by spans" else 0
    bounds = torch.tensor([first, S], dtype=torch.int32, device=DEVICE).expand(1, T, 1, 2).contiguous()
    if name != "10 % by KEPT":
        return sk.Spans(bounds, (ATTEND,))
    kept = torch.arange(0, S, 10, dtype=torch.int32, device=DEVICE).expand(1, H, -1).contiguous()
    count = torch.full((1, H), kept.shape[2], dtype=torch.int32, device=DEVICE)
    return sk.Spans(bounds, (KEPT,), None, kept, count)


@pytest.mark.parametrize("rule", ["MASS", "SINK"])
def test_rules(rule, show):
    """The rule beside ATTEND of the same keys: no product with the values, 2 of 4 products left."""
    base = time_of("ATTEND")
    goals = (Goal(at_most=0.85), Goal(at_most=0.6, aim=True))
    work = f"{rule}, T={T} S={S} H=HK={H}"
    show(
        [compared(work, "forward", 0.6 * base, time_of(rule), "ATTEND", base, goal) for goal in goals], long_call(rule)
    )


@pytest.mark.parametrize("kind", ["10 % by spans", "10 % by KEPT"])
def test_removed_keys(kind, show):
    """90 % of the keys hidden: a tenth of the arithmetic and of the bytes, and a launch."""
    base = time_of("all keys")
    goals = (Goal(at_most=0.2), Goal(at_most=0.12, aim=True))
    work = f"{kind}, T={T} S={S} H=HK={H}"
    guess = 0.1 * base + 5
    show([compared(work, "forward", guess, time_of(kind), "all keys", base, goal) for goal in goals], long_call(kind))


def test_prepare(show):
    """prepare of a 32k mask: 0.5 MB of bounds read, one launch for rows and one for keys."""
    long_inputs.cache_clear()
    masks = [wait_k(32768) for _ in range(2)]
    call = lambda s=masks[0]: sk.prepare(s, 32768, backend=BACKEND)  # noqa: E731
    device = graph_time([call, lambda: sk.prepare(masks[1], 32768, backend=BACKEND)])
    host = host_time(call, calls=100, repeats=5)
    rows = [compared("prepare, L=32768", "device", 6, device, "100 us", 100.0, Goal(at_most=1))]
    rows.append(compared("prepare, L=32768", "host-visible", 60, host, "100 us", 100.0, Goal(at_most=1)))
    show(rows, call)


def test_new_length_compiles_nothing(show):
    """Lengths are run-time values: after one odd and one even length of each kernel, others compile nothing."""
    case = Case(0, 4, 2, 128)

    def run(L: int) -> None:
        bounds = sk.spans.causal(L, device=DEVICE)
        q, k, v = (torch.randn(1, h, L, case.D, device=DEVICE, dtype=DTYPE, requires_grad=True) for h in (4, 2, 2))
        sk.span_attention(q, k, v, bounds, backend=BACKEND).sum().backward()

    for L in (512, 555, 2048, 2111):
        run(L)
    before = len(compiled_kernels())
    for L in (2304, 3001, 517):
        run(L)
    fresh = len(compiled_kernels()) - before
    row = {"work": "kernels compiled for a new length", "measured": fresh, "goal": "<= 0"}
    show([row | {"met": "yes" if fresh == 0 else "no"}], lambda: run(517))


def test_registers(rows):
    """Registers, spills and shared memory of every kernel that this run compiled, as the driver reports them."""
    for name, kernel in compiled_kernels():
        found = {"kernel": name, "registers": kernel.n_regs, "spills": kernel.n_spills}
        meta = kernel.metadata
        rows.append(found | {"shared": meta.shared, "warps": meta.num_warps, "stages": meta.num_stages})


def compiled_kernels() -> list[tuple[str, object]]:
    """(name, compiled kernel) of the Triton kernels of span_attention and prepare that this process has loaded."""
    from streamkernels.triton_kernels.prepare import forward as prepare_kernels
    from streamkernels.triton_kernels.span_attention import backward, forward

    found = []
    for module in (forward, backward, prepare_kernels):
        for name, kernel in vars(module).items():
            for cache in getattr(kernel, "device_caches", {}).values():
                compiled = cache[0] if isinstance(cache, tuple) else cache
                found += [(name, one) for one in compiled.values() if hasattr(one, "metadata")]
    return found
