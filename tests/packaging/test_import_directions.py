"""Imports go one way, and a bare `import streamkernels` needs nothing but torch."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "streamkernels"

# room -> the rooms that it may import from, beside itself; `op` is the op's own folder, `ops` any op's public face
ALLOWED = {
    "core": set(),
    "reference": {"core"},
    "backends": {"core", "_ext", "triton_kernels"},
    "op": {"core", "backends", "reference"},
    "streaming": {"core", "ops"},
    "pruning": {"core", "ops"},
    "integrations": {"core", "ops", "backends", "streaming", "pruning"},
    "testing": {"core", "ops", "reference", "backends", "streaming"},
    "triton_kernels": set(),
    "_ext": {"_version"},
    "_version": set(),
}
# module, room: why it is allowed all the same
EXCEPTIONS = {("streamkernels.backends.triton", "op"): "warmup runs the public ops: what it compiles is what they need"}


def imports(path: Path, package: str) -> Iterator[tuple[str, bool]]:
    """(absolute module, whether only type checkers see it) for every import in a file, those inside functions too."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) in typing_only
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module, id(node) in typing_only
            for alias in node.names:
                yield f"{module}.{alias.name}", id(node) in typing_only


def modules(folder: Path, name: str) -> Iterator[tuple[Path, str, str]]:
    """(file, module, its package), links not followed."""
    for directory, folders, files in os.walk(folder):
        folders[:] = [f for f in folders if not (Path(directory) / f).is_symlink() and f != "__pycache__"]
        package = ".".join([name, *Path(directory).relative_to(folder).parts])
        for file in sorted(files):
            if file.endswith(".py"):
                yield Path(directory) / file, package if file == "__init__.py" else f"{package}.{file[:-3]}", package


def is_module_inside_op(name: str) -> bool:
    parts = name.split(".")
    return len(parts) > 3 and ROOT.joinpath(*parts[:4]).with_suffix(".py").exists()


def room_of(module: str) -> tuple[str, str]:
    """(room, op) of a module of ours: ("op", "rotate") for streamkernels.ops.rotate.api."""
    parts = module.split(".")
    if len(parts) < 2:
        return "streamkernels", ""
    if parts[1] == "ops" and len(parts) > 2:
        return "op", parts[2]
    return parts[1], ""


def complaint(module: str, target: str) -> str | None:
    """What is wrong with `module` importing `target`, if anything."""
    room, op = room_of(module)
    to_room, to_op = room_of(target)
    if room not in ALLOWED:
        return None
    if to_room == "streamkernels":
        return f"{module} imports the public names" if room in ("core", "reference", "triton_kernels") else None
    if room == to_room == "op" and op == to_op:
        upwards = module.split(".")[-1] in ("schema", "autograd") and target.split(".")[3:4] == ["api"]
        return f"{module} imports upwards: {target}" if upwards else None
    if room == to_room == "op":
        # what an op publishes is open to a thin builder over it, its files are not
        return f"{module} reaches into another op's folder: {target}" if is_module_inside_op(target) else None
    if room == to_room or to_room in ALLOWED[room] or to_room == "op" and "ops" in ALLOWED[room]:
        return None
    return f"{module} imports {target}"


def test_imports_go_one_way() -> None:
    found = []
    for folder, name in [(PACKAGE, "streamkernels"), (ROOT / "triton_kernels", "streamkernels.triton_kernels")]:
        for path, module, package in modules(folder, name):
            for target, typing_only in imports(path, package):
                if typing_only or not target.startswith("streamkernels"):
                    continue
                problem = complaint(module, target)
                if problem and (module, room_of(target)[0]) not in EXCEPTIONS:
                    found.append(problem)
    assert not found, "\n".join(found)


def test_heavy_packages_are_imported_where_they_live() -> None:
    """triton only in the kernels, transformers only in its integration, the extension only in `_ext`."""
    homes = {
        "triton": ("streamkernels.triton_kernels",),
        "transformers": ("streamkernels.integrations.transformers",),
        "streamkernels._C": ("streamkernels._ext",),
    }
    found = []
    for folder, name in [(PACKAGE, "streamkernels"), (ROOT / "triton_kernels", "streamkernels.triton_kernels")]:
        for path, module, package in modules(folder, name):
            for target, typing_only in imports(path, package):
                for heavy, home in homes.items():
                    if (target == heavy or target.startswith(f"{heavy}.")) and not typing_only:
                        if not module.startswith(home):
                            found.append(f"{module} imports {target}")
    assert not found, "\n".join(sorted(set(found)))


@pytest.mark.parametrize(
    ("module", "target", "wrong"),
    [
        ("streamkernels.core.spans", "streamkernels.core.shapes", False),
        ("streamkernels.core.spans", "streamkernels.ops.rotate", True),
        ("streamkernels.core.spans", "streamkernels", True),
        ("streamkernels.core.spans", "streamkernels.reference.rotate", True),
        ("streamkernels.triton_kernels.rotate_append.forward", "streamkernels.reference.rotate", True),
        ("streamkernels.ops.rotate.api", "streamkernels.backends.select", False),
        ("streamkernels.ops.rotate.api", "streamkernels.ops.rotate_append.schema", True),
        ("streamkernels.ops.rotate.schema", "streamkernels.ops.rotate.api", True),
        ("streamkernels.ops.rotate.api", "streamkernels.ops.rotate.schema.OP", False),
        ("streamkernels.ops.pruned_attention.api", "streamkernels.ops.span_attention.span_attention", False),
        ("streamkernels.ops.rotate.api", "streamkernels.integrations.transformers", True),
        ("streamkernels.reference.rotate", "streamkernels.backends.cuda", True),
    ],
)
def test_the_rule_itself(module: str, target: str, wrong: bool) -> None:
    assert bool(complaint(module, target)) is wrong


BLOCKED = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"triton", "transformers", "safetensors"} or name == "streamkernels._C":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Block())
import streamkernels
loaded = [m for m in sys.modules if m.split(".")[0] in ("triton", "transformers", "safetensors")]
assert not loaded, loaded
import torch
k = torch.randn(1, 2, 3, 8)
cache = streamkernels.StreamCache(layers=1, batch=1, kv_heads=2, head_dim=8, dtype=torch.float32, device="cpu")
streamkernels.rotate_append(k, k, None, None, cache, 0, role=streamkernels.SOURCE)
print(streamkernels.cuda_status())
"""


def test_the_package_works_without_triton_transformers_and_the_extension(tmp_path: Path) -> None:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", BLOCKED], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("CUDA kernels not available: ")


def test_a_checkout_without_the_extension_says_so(tmp_path: Path) -> None:
    if list(PACKAGE.glob("_C*.so")):
        pytest.skip("the extension was built in place")
    code = "import streamkernels; print(streamkernels.cuda_status())"
    env = dict(os.environ) | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "is a source checkout in which the CUDA extension was not built" in done.stdout
