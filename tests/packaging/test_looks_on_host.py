"""The extension's own reading of tensors, run on the host: looks of calls, and launches of Triton's kernels made
again."""

from __future__ import annotations

import ctypes
import struct
from types import ModuleType

import pytest
import torch
from torch import Tensor

from streamkernels import _ext
from streamkernels.core.spans import Rule


@pytest.fixture(scope="module")
def extension(extension: ModuleType) -> ModuleType:
    assert extension.read_tensors(Tensor.__dlpack_c_exchange_api__, Tensor, torch.nn.Parameter)
    return extension


def test_looks(extension: ModuleType) -> None:
    x, y = torch.zeros(4, 6), torch.ones(6)
    look = extension.look
    first = look(2, x, y, 1, "a")
    assert first == look(2, torch.ones(4, 6), torch.zeros(12)[6:], 1, "a") and isinstance(first, bytes)
    tables = [torch.zeros(6, 4).t(), x[:, :5], x.double(), x.half(), x.bfloat16(), torch.nn.Parameter(x), None, x[None]]
    others = [look(2, other, y, 1, "a") for other in tables]
    options = (True, 1.0, "1", None, 2, -1, Rule.MASS, 2**62)
    others += [look(2, x, y, option, "a") for option in options] + [look(2, x, y, 1, "b"), look(2, y, x, 1, "a")]
    assert first not in others and len(set(others)) == len(others)
    # what was never looked at is nothing that could be known
    assert all(look(2, x, other, 1, "a") is None for other in (3, "x", x.to("meta"), x.to_sparse(), [x]))
    assert look(1, x, (1, 2)) is None and look(1, x, 2**63) is None and look(1, x, "a" * 5000) is None

    class Mine(Tensor):
        pass

    assert look(1, x.as_subclass(Mine)) is None
    # the tensors of many gradients at once have no memory that could be read
    seen = []

    class Look(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            return x * 1

        @staticmethod
        def backward(ctx, do: Tensor) -> Tensor:
            seen.append((type(do), look(1, do)))
            return do

    leaf = x.clone().requires_grad_()
    torch.autograd.grad(Look.apply(leaf), leaf, torch.ones(2, 4, 6), is_grads_batched=True)
    assert seen == [(Tensor, None)]


def test_signatures_know_where_tensors_lie(extension: ModuleType) -> None:
    memory = torch.zeros(64, dtype=torch.int16)
    base = memory.data_ptr() // 2 % 8
    parts = [memory[8 - base + i :][:8] for i in range(9)]
    found = [extension.signature(1, part) for part in parts]
    assert len(set(found)) == 8 and found[0] == found[8]
    assert len({extension.look(1, part) for part in parts}) == 1


CONFIG = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_uint32), ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p
)


def test_launches_made_again(extension: ModuleType) -> None:
    """A stand-in for the driver reads what the kernel would: addresses, maps, numbers."""
    sizes, seen, code = (8, 128, 4, 8, 4), [], [0]

    @CONFIG
    def driver(config, function, parameters, extra) -> int:
        found = [ctypes.string_at(parameters[i], n) for i, n in enumerate(sizes)]
        stream = ctypes.cast(config, ctypes.POINTER(ctypes.c_uint64))[4]
        seen.append((tuple(config[:7]), stream, function, found))
        return code[0]

    made = []
    numbers = [("n", 0, struct.pack("<i", -5)), ("n", 0, struct.pack("<q", 1 << 40)), ("n", 0, struct.pack("<f", 0.5))]
    parameters = [("p", 1, b""), ("m", 0, b""), *numbers]
    launch = ctypes.cast(driver, ctypes.c_void_p).value
    kernel = extension.make_relaunch(launch, 77, [5, 2, 1], 128, 4096, 2, parameters, lambda *a: made.append(a) or 1)
    x, y = torch.zeros(4), torch.zeros(2)
    with pytest.raises(ValueError, match="Triton's tensor map"):
        extension.relaunch(kernel, 9, x, y)
    assert made == [(0, x)] and not seen
    kernel = extension.make_relaunch(launch, 77, [5, 2, 1], 128, 4096, 2, [("p", 1, b""), *numbers[:1]], None)
    sizes = (8, 4)
    # without a map the second parameter is a number
    assert extension.relaunch(kernel, 9, x, y) is True and extension.relaunch(kernel, 9, x, None) is True
    assert [entry[:3] for entry in seen] == [((5, 2, 1, 128, 1, 1, 4096), 9, 77)] * 2
    assert [entry[3] for entry in seen] == [[struct.pack("<q", p), struct.pack("<i", -5)] for p in (y.data_ptr(), 0)]
    # no context in this thread: the caller goes another way
    code[0] = 201
    assert extension.relaunch(kernel, 9, x, y) is False
    code[0] = 700
    with pytest.raises(_ext.CudaError, match="700") as failed:
        extension.relaunch(kernel, 9, x, y)
    assert failed.value.code == 700
    code[0] = 0
    assert extension.relaunch(kernel, 9, x, 3) is False
    with pytest.raises(ValueError, match="other tensors"):
        extension.relaunch(kernel, 9, x)
    empty = extension.make_relaunch(launch, 77, [5, 0, 1], 128, 0, 2, parameters[:1], None)
    count = len(seen)
    assert extension.relaunch(empty, 9, x, y) is True and len(seen) == count
    with pytest.raises(ValueError, match="a parameter that is none"):
        extension.make_relaunch(launch, 77, [1, 1, 1], 32, 0, 2, [("p", 2, b"")], None)
