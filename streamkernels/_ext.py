"""The CUDA extension `streamkernels._C`: loaded when first needed, and one sentence when it cannot be.

Nothing here imports torch, and importing this module touches no device: `load` looks for the extension, and only
`unavailable` and `cuda_status` ask the driver.
"""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from types import ModuleType

from ._version import __version__

_HERE = Path(__file__).resolve().parent


class CudaError(RuntimeError):
    """A CUDA call of a kernel failed. `code` is the number of the cudaError_t.

    Launches are asynchronous: the text says "at or before this launch" because the error may belong to earlier work on
    the device, also to another library's. After an illegal address the process cannot use the device any more.
    """

    def __init__(self, text: str, code: int = 0) -> None:
        super().__init__(text)
        self.code = code


@functools.cache
def _find() -> tuple[ModuleType | None, str]:
    """The extension, or None and why not."""
    try:
        module = importlib.import_module("streamkernels._C")
    except ModuleNotFoundError:
        return None, _not_built()
    except ImportError as e:
        return None, f"streamkernels._C is installed but does not load: {e}"
    built = getattr(module, "__version__", "unknown")
    if built != __version__:
        return None, f"streamkernels._C is of version {built} and the package of {__version__}; reinstall streamkernels"
    return module, ""


def _not_built() -> str:
    if (_HERE.parent / "CMakeLists.txt").exists():
        return (
            f"{_HERE} is a source checkout in which the CUDA extension was not built; run `pip install -e .` with nvcc "
            "on PATH, or start Python outside of the checkout to use an installed streamkernels"
        )
    others = sorted(f.name for f in _HERE.glob("_C.*.so"))
    if others:
        return f"streamkernels._C was built for another Python ({', '.join(others)}); reinstall streamkernels"
    return (
        "streamkernels was installed without its CUDA extension; reinstall it with nvcc on PATH and "
        "STREAMKERNELS_BUILD_CUDA=1"
    )


def load() -> ModuleType:
    """The extension module. Raises NotImplementedError with the reason when there is none."""
    module, why = _find()
    if module is None:
        raise NotImplementedError(why)
    return module


@functools.cache
def unavailable(device: int = -1) -> str | None:
    """None when the CUDA kernels can run on CUDA device `device` (-1: on some device), else one sentence why not.

    The answer is remembered. Asks the driver when the extension is there, which initialises CUDA in this process: not
    before a fork.
    """
    module, why = _find()
    if module is None:
        return why
    return module.unavailable_reason(device) or None


def cuda_status() -> str:
    """One sentence: whether the CUDA kernels can run here, and why not if they cannot.

    >>> import streamkernels
    >>> print(streamkernels.cuda_status())  # doctest: +SKIP
    CUDA kernels ready: built with CUDA 13.0 for 80, 90a-real, 100-real, 120-real
    """
    why = unavailable()
    if why is not None:
        return f"CUDA kernels not available: {why}"
    module = load()
    return f"CUDA kernels ready: built with CUDA {module.toolkit} for {module.architectures.replace(',', ', ')}"
