"""A CUDA compiler that cannot be used stops the install with one clear sentence, never with a silent pure install."""

from __future__ import annotations

import os
import shutil
import stat
import sys
from pathlib import Path

import pytest

from .conftest import copy_sources, run

pytest.importorskip("setuptools", minversion="77")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sources whose default CUDA folder does not exist, so that no compiler of this machine is found by chance."""
    folder = copy_sources(tmp_path_factory.mktemp("tree"))
    setup = folder / "setup.py"
    setup.write_text(setup.read_text().replace('Path("/usr/local/cuda")', f'Path("{folder / "no-cuda"}")'))
    return folder


@pytest.fixture
def nvcc(tmp_path: Path):  # type: ignore[no-untyped-def]
    """Makes a compiler that is a shell script."""

    def make(script: str) -> Path:
        path = tmp_path / "cuda" / "bin" / "nvcc"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("#!/bin/sh\n" + script)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return path

    return make


def path_without_nvcc() -> str:
    folders = os.environ["PATH"].split(os.pathsep)
    return os.pathsep.join(f for f in folders if not (Path(f) / "nvcc").exists())


def setup(tree: Path, *arguments: str, **env: str) -> tuple[int, str]:
    env = {"PATH": path_without_nvcc(), **env}
    done = run(sys.executable, "setup.py", *(arguments or ("--version",)), cwd=tree, **env)
    return done.returncode, done.stdout


OLD = 'echo "Cuda compilation tools, release 11.2, V11.2.152"'
GOOD = """case "$1" in
--version) echo "Cuda compilation tools, release 13.0, V13.0.88" ;;
--list-gpu-arch) echo compute_75; echo compute_80; echo compute_90 ;;
*) echo "host gcc is too new" >&2; exit 1 ;;
esac
"""


def test_no_nvcc(tree: Path) -> None:
    code, text = setup(tree)
    assert code == 0 and "no nvcc found, so this is a pure Python install" in text
    code, text = setup(tree, STREAMKERNELS_BUILD_CUDA="1")
    assert code != 0 and "STREAMKERNELS_BUILD_CUDA=1, but no nvcc was found" in text and "Traceback" not in text


def test_named_but_missing(tree: Path) -> None:
    for name, words in [("CUDACXX", "is not an executable"), ("CUDA_HOME", "has no bin/nvcc")]:
        code, text = setup(tree, **{name: "/nope"})
        assert code != 0 and f"{name}='/nope' {words}" in text and "Traceback" not in text


def test_bad_mode(tree: Path) -> None:
    code, text = setup(tree, STREAMKERNELS_BUILD_CUDA="yes")
    assert code != 0 and "STREAMKERNELS_BUILD_CUDA: expected auto, 1 or 0, got 'yes'" in text


def test_too_old(tree: Path, nvcc) -> None:  # type: ignore[no-untyped-def]
    for mode in ("auto", "1"):
        code, text = setup(tree, CUDACXX=str(nvcc(OLD)), STREAMKERNELS_BUILD_CUDA=mode)
        assert code != 0 and "is CUDA 11.2; 12.0 or newer is needed" in text and "Traceback" not in text
    code, _ = setup(tree, CUDACXX=str(nvcc(OLD)), STREAMKERNELS_BUILD_CUDA="0")
    assert code == 0


def test_does_not_run(tree: Path, nvcc) -> None:  # type: ignore[no-untyped-def]
    path = nvcc('echo "libfoo.so.1: cannot open shared object file" >&2; exit 127')
    code, text = setup(tree, CUDA_HOME=str(path.parent.parent))
    assert code != 0 and "--version failed (exit 127): libfoo.so.1" in text and "Traceback" not in text


def test_unknown_architecture(tree: Path, nvcc) -> None:  # type: ignore[no-untyped-def]
    pytest.importorskip("pybind11")
    code, text = setup(tree, "build_ext", CUDACXX=str(nvcc(GOOD)), STREAMKERNELS_CUDA_ARCHS="80;75;70")
    assert code != 0 and "STREAMKERNELS_CUDA_ARCHS: ['75', '70'] cannot be built for; with this nvcc" in text
    assert text.rstrip().endswith("can have 80, 90") and "Traceback" not in text


@pytest.mark.skipif(shutil.which("cmake") is None or shutil.which("ninja") is None, reason="needs cmake and ninja")
def test_cannot_compile(tree: Path, nvcc) -> None:  # type: ignore[no-untyped-def]
    pytest.importorskip("pybind11")
    code, text = setup(tree, "build_ext", CUDACXX=str(nvcc(GOOD)))
    assert code != 0 and "cannot compile an empty kernel:\nhost gcc is too new" in text
