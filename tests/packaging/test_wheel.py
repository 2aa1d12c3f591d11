"""What is in the source archive and in the wheel that is built from it, and how the installed package behaves."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def python_files(folder: Path) -> set[str]:
    """The Python files below a folder of the checkout, links not followed, as paths inside of it."""
    found = set()
    for path, folders, files in os.walk(folder):
        folders[:] = [f for f in folders if f != "__pycache__" and not (Path(path) / f).is_symlink()]
        found |= {(Path(path) / f).relative_to(folder).as_posix() for f in files if f.endswith(".py")}
    return found


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (path,) = built.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def python(code: str, installed: Path, tmp_path: Path) -> str:
    """Run `code` against the unpacked wheel, away from the checkout, also if that is installed as editable."""
    code = f"import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]; {code}"
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(installed)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_without_cuda_the_wheel_fits_every_machine(wheel: Path, names: set[str]) -> None:
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not [n for n in names if n.endswith(".so")]


def test_the_wheel_holds_the_package_and_nothing_else(names: set[str]) -> None:
    ours = {n for n in names if not n.split("/")[0].endswith(".dist-info")}
    expected = {f"streamkernels/{n}" for n in python_files(ROOT / "streamkernels")}
    expected |= {f"streamkernels/triton_kernels/{n}" for n in python_files(ROOT / "triton_kernels")}
    assert expected | {"streamkernels/py.typed", "streamkernels/_C.pyi"} == ours


def test_triton_kernels_is_never_top_level(wheel: Path, names: set[str], installed: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (top,) = [n for n in names if n.endswith("top_level.txt")]
        assert archive.read(top).decode().split() == ["streamkernels"]
    code = "from importlib.util import find_spec; print(find_spec('streamkernels.triton_kernels').origin is None, "
    code += "getattr(find_spec('triton_kernels'), 'origin', None))"
    own, other = python(code, installed, tmp_path).split(" ", 1)
    assert own == "True"
    assert str(installed) not in other and str(ROOT) not in other
    assert not (ROOT / "triton_kernels" / "__init__.py").exists()


def test_the_source_archive_holds_one_copy_of_each_file(built: Path) -> None:
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        inside = {n.partition("/")[2] for n in archive.getnames()}
        assert not [m.name for m in archive.getmembers() if m.issym() or m.islnk()]
    for name in ("CMakeLists.txt", "LICENSE", "setup.py", "csrc/bindings.cpp", "csrc/rotate_append/kernel.cuh"):
        assert name in inside
    assert {f"triton_kernels/{n}" for n in python_files(ROOT / "triton_kernels")} <= inside
    assert not [n for n in inside if n.startswith("streamkernels/triton_kernels/")]


def test_one_version(wheel: Path, names: set[str], installed: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (path,) = [n for n in names if n.endswith(".dist-info/METADATA")]
        metadata = Parser().parsestr(archive.read(path).decode())
    scope: dict[str, str] = {}
    exec((ROOT / "streamkernels" / "_version.py").read_text(), scope)
    assert metadata["Version"] == scope["__version__"]
    assert metadata["License-Expression"] == "Apache-2.0"
    code = "import streamkernels, importlib.metadata as m; print(streamkernels.__version__, m.version('streamkernels'))"
    assert python(code, installed, tmp_path).split() == [scope["__version__"]] * 2


def test_the_installed_package_says_why_it_has_no_cuda(installed: Path, tmp_path: Path) -> None:
    text = python("import streamkernels; print(streamkernels.cuda_status())", installed, tmp_path)
    assert text.startswith("CUDA kernels not available: streamkernels was installed without its CUDA extension; ")
    assert "STREAMKERNELS_BUILD_CUDA=1" in text and "\n" not in text


def test_an_extension_of_another_version_is_refused(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "fake.py").write_text(
        "import sys, types\nold = types.ModuleType('streamkernels._C')\nold.__version__ = '0.0.0'\n"
        "sys.modules['streamkernels._C'] = old\nimport streamkernels\nprint(streamkernels.cuda_status())\n"
    )
    text = python("exec(open('fake.py').read())", installed, tmp_path)
    assert "is of version 0.0.0 and the package of" in text and "reinstall" in text
