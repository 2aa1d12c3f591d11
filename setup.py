"""Decides whether the CUDA extension is built, and runs CMake for it. Everything else is in pyproject.toml.

STREAMKERNELS_BUILD_CUDA   auto (default: build when nvcc is found), 1 (an error without nvcc), 0 (never)
STREAMKERNELS_CUDA_ARCHS   what to build for, CMake's spelling, such as "80;90a-real", or "native"
CUDACXX, CUDA_HOME, PATH   where nvcc is looked for, in this order, then the default CUDA folder
CUDAHOSTCXX, MAX_JOBS      host compiler, parallel jobs
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
MINIMUM = (12, 0)
# SASS and PTX of 80: the PTX serves every GPU that has no code of its own
ARCHS = ("80", "90a-real", "100-real", "120-real")
OLDEST_ARCH = 80
DEFAULT_CUDA = Path("/usr/local/cuda")


def stop(text: str) -> None:
    """End the build with one sentence: an exception would show as a traceback of this file."""
    sys.exit(f"streamkernels: {text}")


def say(text: str) -> None:
    """Tell the user even where pip hides the output of a build that succeeds."""
    print(f"streamkernels: {text}", file=sys.stderr)
    if os.environ.get("CI"):
        return
    try:
        with open("/dev/tty", "w") as terminal:
            print(f"\nstreamkernels: {text}", file=terminal)
    except OSError:
        pass


def find_nvcc() -> str | None:
    """The nvcc to build with. One that is named but not there is an error, never a reason to look further."""
    if named := os.environ.get("CUDACXX"):
        found = shutil.which(named)
        if found is None:
            stop(f"CUDACXX={named!r} is not an executable")
        return found
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if home := os.environ.get(name):
            found = shutil.which("nvcc", path=os.path.join(home, "bin"))
            if found is None:
                stop(f"{name}={home!r} has no bin/nvcc")
            return found
    return shutil.which("nvcc") or shutil.which("nvcc", path=str(DEFAULT_CUDA / "bin"))


def find_tool(name: str) -> str:
    """cmake or ninja: on PATH, or beside a Python whose environment is not activated."""
    found = shutil.which(name) or shutil.which(name, path=sysconfig.get_path("scripts"))
    if found is None:
        stop(f"{name} was not found; without build isolation, install it first: pip install {name}")
    return found


def ask(nvcc: str, *args: str) -> str:
    try:
        done = subprocess.run([nvcc, *args], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    except OSError as e:
        stop(f"{nvcc} does not run: {e}")
    if done.returncode:
        words = (done.stderr or done.stdout).strip()
        stop(f"{nvcc} {' '.join(args)} failed (exit {done.returncode}): {words}")
    return done.stdout


def check_version(nvcc: str) -> tuple[int, int]:
    m = re.search(r"release (\d+)\.(\d+)", ask(nvcc, "--version"))
    if m is None:
        stop(f"{nvcc} --version does not name a CUDA release; is it nvcc? Point CUDACXX at CUDA's compiler")
    version = int(m[1]), int(m[2])
    if version < MINIMUM:
        needed = ".".join(map(str, MINIMUM))
        stop(f"{nvcc} is CUDA {m[1]}.{m[2]}; {needed} or newer is needed. Point CUDACXX at a newer nvcc, or set "
             "STREAMKERNELS_BUILD_CUDA=0 to install without CUDA kernels")
    return version


def choose_archs(nvcc: str) -> str:
    """The architectures to build for, as a CMake list."""
    known = {m for m in re.findall(r"compute_(\d+)", ask(nvcc, "--list-gpu-arch")) if int(m) >= OLDEST_ARCH}
    wanted = os.environ.get("STREAMKERNELS_CUDA_ARCHS")
    if wanted is None:
        # an older nvcc builds for fewer GPUs; the PTX of 80 serves the others
        return ";".join(a for a in ARCHS if re.match(r"\d+", a)[0] in known)
    archs = [a for a in re.split(r"[;, ]+", wanted) if a]
    if archs == ["native"]:
        return "native"
    unknown = [a for a in archs if not (m := re.fullmatch(r"(\d+)[af]?(-real|-virtual)?", a)) or m[1] not in known]
    if unknown or not archs:
        usable = ", ".join(sorted(known, key=int))
        stop(f"STREAMKERNELS_CUDA_ARCHS: {unknown} cannot be built for; with this nvcc the kernels can have {usable}")
    return ";".join(archs)


def choose_cuda() -> str | None:
    """nvcc to build the extension with, or None for a pure Python package."""
    mode = os.environ.get("STREAMKERNELS_BUILD_CUDA", "auto").strip().lower() or "auto"
    if mode not in ("auto", "0", "1"):
        stop(f"STREAMKERNELS_BUILD_CUDA: expected auto, 1 or 0, got {mode!r}")
    if mode == "0":
        say("installing without CUDA kernels (STREAMKERNELS_BUILD_CUDA=0)")
        return None
    nvcc = find_nvcc()
    if nvcc is not None:
        check_version(nvcc)
    elif mode == "1":
        stop("STREAMKERNELS_BUILD_CUDA=1, but no nvcc was found: put it on PATH or point CUDACXX at it")
    else:
        say("no nvcc found, so this is a pure Python install without CUDA kernels; Triton and reference kernels work")
    return nvcc


class BuildCuda(build_ext):
    """Runs CMake in a folder that stays, so that a second build recompiles only what changed."""

    def build_extension(self, ext: Extension) -> None:
        nvcc = ext.nvcc
        folder = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}-{sysconfig.get_platform()}"
        stamp = folder / "nvcc.txt"
        compiler = f"{nvcc}\n{ask(nvcc, '--version')}"
        if folder.exists() and (not stamp.exists() or stamp.read_text() != compiler):
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        stamp.write_text(compiler)
        self._configure(nvcc, folder)
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        self._run([find_tool("cmake"), "--build", str(folder), "--parallel", jobs])
        (built,) = (folder / "out").glob("_C*.so")
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(built, target)

    def _configure(self, nvcc: str, folder: Path) -> None:
        import pybind11

        # paths of this build environment: the cache may remember those of one that is gone
        define = {
            "CMAKE_MAKE_PROGRAM": find_tool("ninja"),
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "Python_EXECUTABLE": sys.executable,
            "CMAKE_CUDA_COMPILER": nvcc,
            "CMAKE_CUDA_ARCHITECTURES": choose_archs(nvcc),
            "SK_VERSION": self.distribution.get_version(),
        }
        if host := os.environ.get("CUDAHOSTCXX") or os.environ.get("NVCC_CCBIN"):
            define["CMAKE_CUDA_HOST_COMPILER"] = host
        options = [f"-D{name}={value}" for name, value in define.items()]
        command = [find_tool("cmake"), "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", *options]
        done = subprocess.run(command, stdin=subprocess.DEVNULL)
        if done.returncode:
            # cmake hides what nvcc said: let nvcc say it
            shutil.rmtree(folder, ignore_errors=True)
            try_nvcc(nvcc)
            stop(f"cmake could not set up the CUDA build (exit {done.returncode}); its words are above")

    @staticmethod
    def _run(command: list[str]) -> None:
        done = subprocess.run(command, stdin=subprocess.DEVNULL)
        if done.returncode:
            stop(f"{' '.join(command)} failed (exit {done.returncode}); the compiler's words are above")


def try_nvcc(nvcc: str) -> None:
    """Compile an empty kernel; stop with the compiler's own words if it cannot."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "empty.cu"
        source.write_text("__global__ void empty() {}\nint main() { return 0; }\n")
        command = [nvcc, str(source), "-o", str(Path(folder) / "empty")]
        if host := os.environ.get("CUDAHOSTCXX") or os.environ.get("NVCC_CCBIN"):
            command[1:1] = ["-ccbin", host]
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if done.returncode:
            words = (done.stderr or done.stdout).strip()
            stop(f"{nvcc} cannot compile an empty kernel:\n{words}\nRepair CUDA, point CUDACXX at another nvcc, or set "
                 "STREAMKERNELS_BUILD_CUDA=0 to install without CUDA kernels")


class BuildPython(build_py):
    """Starts from an empty folder: build/lib survives, and a renamed module would live on in every later wheel."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib) / "streamkernels", ignore_errors=True)
        super().run()


def packages_under(folder: Path, name: str) -> dict[str, str]:
    """`folder` and every folder below it that holds Python files, links not followed."""
    found = {name: folder.relative_to(ROOT).as_posix()}
    for path, folders, files in os.walk(folder):
        own = (f for f in folders if f.isidentifier() and f != "__pycache__")
        folders[:] = sorted(f for f in own if not (Path(path) / f).is_symlink())
        if any(f.endswith(".py") for f in files):
            parts = Path(path).relative_to(folder).parts
            found[".".join([name, *parts])] = Path(path).relative_to(ROOT).as_posix()
    return found


# triton_kernels/ lives beside the package and installs inside it: a top-level `triton_kernels` is Triton's own
PACKAGES = {
    **packages_under(ROOT / "streamkernels", "streamkernels"),
    **packages_under(ROOT / "triton_kernels", "streamkernels.triton_kernels"),
}

nvcc = choose_cuda()
extensions = []
if nvcc is not None:
    extension = Extension("streamkernels._C", sources=[])
    extension.nvcc = nvcc
    extensions.append(extension)

setup(
    packages=sorted(PACKAGES),
    package_dir=PACKAGES,
    ext_modules=extensions,
    cmdclass={"build_ext": BuildCuda, "build_py": BuildPython},
)
