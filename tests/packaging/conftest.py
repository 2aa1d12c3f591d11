"""A copy of what the package is built from: builds leave folders behind, and the checkout must stay as it is."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = ("pyproject.toml", "setup.py", "CMakeLists.txt", "MANIFEST.in", "LICENSE", "README.md")
FOLDERS = ("csrc", "streamkernels", "triton_kernels")


def copy_sources(to: Path) -> Path:
    for name in FILES:
        shutil.copy(ROOT / name, to)
    ignore = shutil.ignore_patterns("__pycache__", "*.so")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, to / name, symlinks=True, ignore=ignore)
    return to


def run(*command: object, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a command without the variables that steer a build, except those given; the output is one text."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("STREAMKERNELS_") and k not in STEERING}
    return subprocess.run(
        [str(c) for c in command], cwd=cwd, env=clean | {"CI": "1"} | env, text=True, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


STEERING = {"CUDACXX", "CUDA_HOME", "CUDA_PATH", "CUDAHOSTCXX", "NVCC_CCBIN", "PYTHONPATH", "TRITON_INTERPRET"}


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The extension with its kernels compiled for the host; misaligned accesses and integer overflow trap."""
    pybind11 = pytest.importorskip("pybind11")
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    out = tmp_path_factory.mktemp("host") / "_C.so"
    host = Path(__file__).parent / "cuda_on_host"
    traps = ["-fsanitize=alignment,bounds,shift,signed-integer-overflow", "-fsanitize-undefined-trap-on-error"]
    defines = ['-DSK_VERSION="host"', '-DSK_ARCHITECTURES="host"']
    folders = [ROOT / "csrc", ROOT / "csrc" / "include", host, pybind11.get_include(), sysconfig.get_path("include")]
    csrc = ROOT / "csrc"
    sources = [csrc / "bindings.cpp", csrc / "incremental_prefill" / "call.cpp", *sorted(host.glob("*.cpp"))]
    command = [compiler, "-std=c++17", "-O1", "-fPIC", "-shared", "-fvisibility=hidden", *traps, *defines]
    done = subprocess.run(
        [*command, *(f"-I{f}" for f in folders), *map(str, sources), "-o", str(out)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="session")
def native(library: Path) -> ctypes.CDLL:
    """What it exports besides the bindings."""
    lib = ctypes.CDLL(str(library))
    lib.slot_of.argtypes = [ctypes.c_int64, ctypes.c_int, ctypes.c_int, ctypes.c_bool]
    return lib


@pytest.fixture(scope="session")
def extension(library: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("_C", library)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_sources(tmp_path_factory.mktemp("sources"))


@pytest.fixture(scope="session")
def built(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist and the pure wheel that was built from that sdist. No network: CI builds in isolation."""
    pytest.importorskip("build")
    pytest.importorskip("setuptools", minversion="77")
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--skip-dependency-check", "--outdir", out]
    done = run(*command, cwd=sources, STREAMKERNELS_BUILD_CUDA="0")
    assert done.returncode == 0, done.stdout[-4000:]
    return out
