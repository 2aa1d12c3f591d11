"""From tensors to what the CUDA kernels take: addresses, strides in elements, codes of dtypes, the current stream."""

from __future__ import annotations

import functools
from types import ModuleType

import torch
from torch import Tensor

from .. import _ext

# the codes of csrc/include/streamkernels/tensor.h
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
NO_ROWS = (0, 0, 0, 0)
NO_TABLE = (0, 0, 0)


@functools.cache
def reader() -> ModuleType | None:
    """The extension, once it can read tensors themselves (by DLPack's C exchange API: 50 ns a tensor, where asking for
    its shape, strides, dtype, device and address from Python takes 400); None without it."""
    module, _ = _ext._find()
    exchange = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    if module is None or exchange is None or not module.read_tensors(exchange, Tensor, torch.nn.Parameter):
        return None
    return module


def needed_reader() -> ModuleType:
    """The same; an error that says what is missing without it."""
    if (extension := reader()) is None:
        _ext.load()
        raise NotImplementedError("the CUDA kernel needs a torch with DLPack's C exchange API, as 2.11 has it")
    return extension


def stream_of(device: torch.device) -> int:
    """The handle of torch's current stream; the short way costs a tenth of making a Stream object."""
    raw = getattr(torch._C, "_cuda_getCurrentRawStream", None)
    return raw(device.index) if raw is not None else torch.cuda.current_stream(device).cuda_stream


def rows_of(x: Tensor) -> tuple[int, int, int, int]:
    """Address and strides of [B, HK, rows, D]; the last stride is 1."""
    batch, head, row, _ = x.stride()
    return x.data_ptr(), batch, head, row


def table_of(x: Tensor) -> tuple[int, int, int]:
    """Address and strides of [B or 1, rows, columns]; a batch of one serves all."""
    batch, row, _ = x.stride()
    return x.data_ptr(), batch if x.shape[0] > 1 else 0, row


def first_strides(x: Tensor) -> tuple[int, int, int]:
    """Address and the first two strides of [B, rows, ...]; 0 for one that is not there."""
    strides = x.stride()
    return x.data_ptr(), strides[0], strides[1] if len(strides) > 1 else 0
