"""Compiles every CUDA kernel for every architecture that we build for, without a GPU, and reports what each one costs.

    python tests/compile_cuda.py [--archs 80,90a,100,120] [--jobs 2] [file ...]
    python tests/compile_cuda.py --built streamkernels/_C.*.so        the same of what is built already, in a second

Prints registers, shared memory, stack and spills per kernel. Exit status 1 when a file does not compile, when a kernel
spills registers, uses a stack frame or has its asynchronous products serialised, or when no kernel was found. nvcc is
$CUDACXX, else the one on PATH; cuobjdump lies on PATH, beside nvcc, or in the triton package.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FLAGS = ["-std=c++17", "-O3", "-Xptxas=-v", "-cubin", f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'include'}"]
DEFAULT_CUDA = Path("/usr/local/cuda/bin/nvcc")


@dataclass
class Report:
    kernel: str
    registers: int
    shared: int
    stack: int
    spills: int


def find_nvcc() -> str | None:
    named = os.environ.get("CUDACXX") or shutil.which("nvcc")
    return named or (str(DEFAULT_CUDA) if DEFAULT_CUDA.exists() else None)


def short(name: str) -> str:
    """`sk::op::op_kernel<sk::BFloat16, 8, false>(...)` without namespaces and parameters."""
    plain = name.replace("(anonymous namespace)::", "").removeprefix("void ")
    return re.sub(r"\w+::", "", re.sub(r"\(.*\)$", "", plain))


def parse(log: str) -> list[Report]:
    """The kernels of one ptxas -v log. Properties of a function come in two lines before its registers."""
    reports: list[Report] = []
    name, stack, spills = "", 0, 0
    for line in log.splitlines():
        if m := re.search(r"Function properties for (.+)", line):
            name, stack, spills = m[1], 0, 0
        elif m := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            stack, spills = int(m[1]), int(m[2]) + int(m[3])
        elif m := re.search(r"Used (\d+) registers", line):
            shared = re.search(r"(\d+) bytes smem", line)
            reports.append(Report(name, int(m[1]), int(shared[1]) if shared else 0, stack, spills))
    return plain_names(reports)


def plain_names(reports: list[Report]) -> list[Report]:
    if reports and shutil.which("c++filt"):
        names = "\n".join(r.kernel for r in reports)
        plain = subprocess.run(["c++filt"], input=names, capture_output=True, text=True).stdout.splitlines()
        for report, text in zip(reports, plain, strict=True):
            report.kernel = short(text)
    return reports


def compile_one(nvcc: str, source: Path, arch: str, folder: Path) -> tuple[bool, str, float]:
    begin = time.monotonic()
    out = folder / f"{source.parent.name}-{source.stem}-{arch}.cubin"
    # compute_90a code does not come from -arch=sm_90a alone in every nvcc
    code = [f"-gencode=arch=compute_{arch},code=sm_{arch}"]
    done = subprocess.run([nvcc, *FLAGS, *code, str(source), "-o", str(out)], capture_output=True, text=True)
    return done.returncode == 0, done.stdout + done.stderr, time.monotonic() - begin


def find_cuobjdump() -> str | None:
    nvcc, package = find_nvcc(), find_spec("triton")
    beside = [Path(nvcc).with_name("cuobjdump")] if nvcc else []
    homes = (package and package.submodule_search_locations) or []
    beside += [Path(home) / "backends/nvidia/bin/cuobjdump" for home in homes]
    return shutil.which("cuobjdump") or next((str(p) for p in beside if p.exists()), None)


def report_built(extension: Path, archs: list[str]) -> int:
    """Prints what every kernel in a built extension costs; 1 if one has a stack frame, which spills need too, or if an
    architecture has not the kernels that the others have."""
    tool = find_cuobjdump()
    if tool is None:
        print("compile_cuda: no cuobjdump: put it on PATH or install triton", file=sys.stderr)
        return 1
    text = subprocess.run([tool, "-res-usage", str(extension)], capture_output=True, text=True, check=True).stdout
    found: dict[str, list[Report]] = {}
    arch, name = "", ""
    for line in text.splitlines():
        if m := re.match(r"arch = sm_(\w+)", line):
            arch = m[1]
        elif m := re.match(r"\s*Function (\S+):", line):
            name = m[1]
        elif m := re.match(r"\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            registers, stack, shared, local = map(int, m.groups())
            found.setdefault(arch, []).append(Report(name, registers, shared, stack, local))
    failures = 0
    for arch in archs:
        reports = plain_names(found.get(arch, []))
        print(f"{extension.name} sm_{arch}: {len(reports)} kernels")
        failures += sum(show(r) for r in sorted(reports, key=lambda r: r.kernel))
    counts = {len(found.get(arch, [])) for arch in archs}
    whole = len(counts) == 1 and 0 not in counts
    print(f"compile_cuda: {sum(map(len, found.values()))} kernels in {extension.name}, {failures} failures")
    return 0 if whole and not failures else 1


def show(r: Report) -> bool:
    """Prints one kernel's line; whether it spills or has a stack frame."""
    bad = r.spills > 0 or r.stack > 0
    cost = f"{r.registers:3d} registers  {r.shared:6d} B shared  {r.stack:4d} B stack  {r.spills} B spills"
    print(f"  {cost}  {r.kernel}{'   <-- FAILS' if bad else ''}")
    return bad


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--archs", default="80,90a,100,120")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--built", type=Path, help="a built extension, to report on instead of compiling")
    parser.add_argument("files", nargs="*", type=Path)
    args = parser.parse_args()
    if args.built is not None:
        return report_built(args.built, args.archs.split(","))
    nvcc = find_nvcc()
    if nvcc is None:
        print("compile_cuda: no nvcc: set CUDACXX or put it on PATH", file=sys.stderr)
        return 1
    sources = args.files or sorted((ROOT / "csrc").rglob("*.cu"))
    archs = args.archs.split(",")
    kernels = failures = 0
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.jobs) as pool:
        tasks = [(s, a, pool.submit(compile_one, nvcc, s, a, Path(folder))) for s in sources for a in archs]
        for source, arch, task in tasks:
            good, log, seconds = task.result()
            print(f"{source.relative_to(ROOT) if source.is_absolute() else source} sm_{arch}: {seconds:.1f} s")
            if not good:
                failures += 1
                print(log)
                continue
            for r in parse(log):
                kernels += 1
                failures += show(r)
            for line in log.splitlines():
                # C7510 and the like: ptxas makes products of a warpgroup wait for each other
                if "wgmma" in line and "serialized" in line:
                    failures += 1
                    print(f"  {line}   <-- FAILS")
    print(f"compile_cuda: {kernels} kernels in {len(sources)} files for sm_{', sm_'.join(archs)}, {failures} failures")
    return 1 if failures or not kernels else 0


if __name__ == "__main__":
    sys.exit(main())
