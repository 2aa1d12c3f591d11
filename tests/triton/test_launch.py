"""Launches made again: the same arguments by every way, and only by ways that this Triton has."""

from __future__ import annotations

import struct
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

import triton
from triton import knobs

from streamkernels.triton_kernels.device import launch as module
from streamkernels.triton_kernels.device import memory, relaunch
from streamkernels.triton_kernels.device.launch import Box, Launch, on_device_of, signature
from streamkernels.triton_kernels.device.memory import remembered


class CudaLauncher:
    """What Triton's has that `direct` looks at; `make_tensordesc_arg` is beside it, as there."""

    global_scratch_size = profile_scratch_size = 0
    launch_cooperative_grid = launch_pdl = False
    arg_annotations, kernel_signature = "annotations", "signature"

    def __init__(self, launch) -> None:
        self.launch = launch


def make_tensordesc_arg(descriptor, meta):
    return ["map", descriptor.base, meta["a"]]


class Compiled:
    """What a compiled kernel shows of itself."""

    def __init__(self) -> None:
        self.ordinary: list[tuple] = []
        self.direct: list[tuple] = []
        self.function, self.packed_metadata = "function", (4, 1, 0)
        self.metadata = SimpleNamespace(tensordesc_meta=[{"a": 1}])

        def launcher(*arguments):
            self.direct.append(arguments)

        def inner(*arguments):
            return launcher(*arguments)

        self.run = CudaLauncher(inner)

    def __getitem__(self, grid):
        return lambda *arguments: self.ordinary.append((grid, arguments))


class Kernel:
    arg_names = ["x", "y", "n", "BLOCK"]

    def __init__(self) -> None:
        self.compiled, self.calls = Compiled(), []

    def __getitem__(self, grid):
        def call(*arguments, **constants):
            self.calls.append((grid, arguments, constants))
            return self.compiled

        return call


@pytest.fixture
def kernel(monkeypatch):
    active = SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda device: 17)
    monkeypatch.setattr(triton.runtime.driver, "_active", active)
    return Kernel()


def tensors():
    return torch.zeros(1, 2, 8, 16), torch.zeros(3)


@pytest.mark.parametrize("version, packs", [("3.6.0", False), ("3.7.1+git", True)])
def test_by_address(kernel, monkeypatch, version, packs):
    monkeypatch.setattr(triton, "__version__", version)
    x, y = tensors()
    launch = Launch(kernel, (5,), (7,), (Box(x, 8, 16),), BLOCK=64)
    for _ in range(3):
        launch(x, y)
    (first,) = kernel.calls
    assert first[0] == (5, 1, 1) and first[1][1:] == (y, 7) and first[2] == {"BLOCK": 64}
    assert not kernel.compiled.ordinary and len(kernel.compiled.direct) == 2
    flat = ["map", x.data_ptr(), 1, y.data_ptr(), 7, 64]
    for call in kernel.compiled.direct:
        assert call[:7] == (5, 1, 1, 17, "function", False, False)
        assert call[-1] == flat if packs else list(call[-6:]) == flat
    # another tensor of the same form: its own address
    z = torch.ones_like(x)
    launch(z, y)
    assert z.data_ptr() in (kernel.compiled.direct[-1][-1] if packs else kernel.compiled.direct[-1])


@pytest.mark.parametrize("lacks", ["version", "class", "launch", "map", "scratch"])
def test_where_triton_is_another_the_call_goes_through_its_layers(kernel, monkeypatch, lacks):
    monkeypatch.setattr(triton, "__version__", "3.8.0" if lacks == "version" else "3.6.0")
    if lacks == "class":
        kernel.compiled.run = SimpleNamespace(**vars(CudaLauncher), launch=kernel.compiled.run.launch)
    if lacks == "launch":
        kernel.compiled.run.launch = print
    if lacks == "map":
        monkeypatch.delitem(globals(), "make_tensordesc_arg")
    if lacks == "scratch":
        kernel.compiled.run.global_scratch_size = 8
    x, y = tensors()
    launch = Launch(kernel, (5,), (7,), (Box(x, 8, 16),), BLOCK=64)
    for _ in range(3):
        launch(x, y)
    assert len(kernel.calls) == 1 and not kernel.compiled.direct
    assert [grid for grid, _ in kernel.compiled.ordinary] == [(5, 1, 1)] * 2
    for _, arguments in kernel.compiled.ordinary:
        assert arguments[0].base is x and arguments[1:] == (y, 7, 64)


def test_who_listens_to_launches_hears_them(kernel, monkeypatch):
    monkeypatch.setattr(triton, "__version__", "3.6.0")
    x, y = tensors()
    launch = Launch(kernel, (5,), (7,), (Box(x, 8, 16),), BLOCK=64)
    launch(x, y)
    launch(x, y)
    hook = lambda metadata: None  # noqa: E731
    knobs.runtime.launch_enter_hook.add(hook)
    try:
        launch(x, y)
    finally:
        knobs.runtime.launch_enter_hook.remove(hook)
    launch(x, y)
    assert len(kernel.compiled.ordinary) == 1 and len(kernel.compiled.direct) == 2


class Extension:
    """What `launch.native` does, told instead of done."""

    def __init__(self, runs: bool = True) -> None:
        self.made: list[tuple] = []
        self.launched: list[tuple] = []
        self.runs = runs

    def signature(self, count: int, *tensors: object) -> None:
        return None

    def make_relaunch(self, *arguments: object) -> str:
        self.made.append(arguments)
        return "relaunch"

    def relaunch(self, *arguments: object) -> bool:
        self.launched.append(arguments)
        return self.runs


def typed(kernel, *kinds: str) -> None:
    """Give the kernel's arguments Triton's types, and make it one of 4 warps."""
    kernel.compiled.src = SimpleNamespace(signature=dict(zip(kernel.arg_names, kinds, strict=True)))
    vars(kernel.compiled.metadata).update(num_ctas=1, num_warps=4, shared=4096)


TYPES = ("tensordesc<fp32[1, 1, 8, 16]>", "*fp32", "i32", "constexpr")


@pytest.mark.parametrize("runs", [True, False])
def test_by_the_extension(kernel, monkeypatch, runs):
    extension = Extension(runs)
    monkeypatch.setattr(triton, "__version__", "3.6.0")
    monkeypatch.setattr(module, "native", extension)
    monkeypatch.setattr(relaunch, "_driver_launch", lambda: 99)
    typed(kernel, *TYPES)
    x, y = tensors()
    launch = Launch(kernel, (5,), (7,), (Box(x, 8, 16),), BLOCK=64)
    for _ in range(3):
        launch(x, y)
    ((address, function, grid, threads, shared, count, parameters, over),) = extension.made
    assert (address, function, grid, threads, shared, count) == (99, "function", [5, 1, 1], 128, 4096, 2)
    # the stride of a dim of size 1 is whatever is valid
    sizes = [struct.pack("<i", n) for n in x.shape] + [struct.pack("<q", n) for n in (16, *x.stride()[1:])]
    numbers = [*sizes, None, struct.pack("<i", 7), bytes(8), bytes(8)]
    expected = [("m", 0, b""), *[("p", 1, b"") if n is None else ("n", 0, n) for n in numbers]]
    assert parameters == expected and over(0, x) == "map"
    assert extension.launched == [("relaunch", 17, x, y)] * 2
    # what the extension cannot launch goes through Triton's layers
    assert len(kernel.compiled.ordinary) == (0 if runs else 2) and not kernel.compiled.direct


@pytest.mark.parametrize("other", ["cluster", "cooperative", "dependent", "type", "number", "driver", "meta"])
def test_launches_that_the_extension_does_not_know(kernel, monkeypatch, other):
    extension = Extension()
    monkeypatch.setattr(triton, "__version__", "3.6.0")
    monkeypatch.setattr(module, "native", extension)
    monkeypatch.setattr(relaunch, "_driver_launch", lambda: None if other == "driver" else 99)
    kinds = list(TYPES)
    if other == "type":
        kinds[1] = "i32"
    if other == "number":
        kinds[2] = "fp16"
    typed(kernel, *kinds)
    if other == "cluster":
        kernel.compiled.metadata.num_ctas = 2
    monkeypatch.setattr(kernel.compiled.run, "launch_cooperative_grid", other == "cooperative", raising=False)
    monkeypatch.setattr(kernel.compiled.run, "launch_pdl", other == "dependent", raising=False)
    if other == "meta":
        kernel.compiled.metadata.tensordesc_meta = None
        monkeypatch.setitem(globals(), "make_tensordesc_arg", lambda descriptor, meta: [descriptor.base])
    x, y = tensors()
    launch = Launch(kernel, (5,), (7,), (Box(x, 8, 16),), BLOCK=64)
    for _ in range(3):
        launch(x, y)
    assert not extension.made and len(kernel.compiled.direct) == 2


def test_maps_are_kept_by_address_and_few(kernel, monkeypatch):
    monkeypatch.setattr(module, "MOST_MAPS", 2)
    x = torch.zeros(1, 2, 8, 16)
    made = []
    arguments = module._maps(Box(x, 8, 16), None, lambda d, meta: [made.append(d.base.data_ptr()), d.base])
    others = [torch.zeros_like(x) for _ in range(3)]
    for y in (x, x, others[0], x, others[1], others[1]):
        assert arguments(y)[1] == y.data_ptr()
    assert made == [x.data_ptr(), others[0].data_ptr(), others[1].data_ptr()]


def test_signature_tells_forms_apart():
    x = torch.zeros(4, 6)
    same = [signature(x, None), signature(torch.ones(4, 6), None)]
    assert same[0] == same[1]
    shifted = torch.zeros(25)[1:].view(4, 6)
    for other in (x.t(), x.to(torch.float64), x[:, :5], x.to("meta"), shifted):
        assert signature(other, None) != same[0]
    assert signature(x) != signature(None)


def test_remembered_forgets_all_when_full(monkeypatch):
    monkeypatch.setattr(memory, "MOST", 2)
    plans: dict = {}
    for i in range(5):
        remembered(plans, i, lambda: object())
        assert len(plans) <= 2


def test_on_the_cpu_no_device_is_entered():
    with on_device_of(torch.zeros(1)) as entered:
        assert entered is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_this_triton_is_launched_by_address():
    from streamkernels import span_attention, spans
    from streamkernels.triton_kernels.span_attention import launch

    launch.FORWARD.clear()
    q, k, v = (torch.randn(1, h, 200, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for h in (4, 2, 2))
    mask = spans.causal(200, device="cuda")
    results = []
    for _ in range(4):
        # other tensors of the same form
        q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
        o = span_attention(q, k, v, mask, backend="triton")
        results.append((o, *torch.autograd.grad(o.sum(), (q, k, v))))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    (plan,) = launch.FORWARD.values()
    # a closure of `direct`, not the one that goes through Triton's layers
    way = "sooner" if module.native is not None else "again"
    assert plan.launch.again.__qualname__ == f"direct.<locals>.{way}"
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = span_attention(q.detach(), k.detach(), v.detach(), mask, backend="triton")
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, results[0][0])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        other = span_attention(q, k, v, mask, backend="triton")
    stream.synchronize()
    assert torch.equal(other, results[0][0])
