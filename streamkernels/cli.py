"""The command `streamkernels`: `demo` streams a text through a model, `info` says what can run here, `bench` runs a
checkout's benchmarks."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from ._version import __version__

_DEMO = """
Streams text that arrives word by word through a model and shows what was read and written when. Each line of the text
is one utterance. At the end: average lagging (AL, LAAL; source words), forwards, source tokens projected beside what
re-encoding would have projected, and the largest difference to one forward over the whole text under the same spans.
A policy never lets the text end before the source has ended: where the model would, it reads on (--early-end: it ends).
"""

_BENCH = """
Runs bench/bench_OP.py of the checkout that streamkernels was imported from, with pytest, and prints the tables. On a
machine without a GPU only the reference is timed.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 2 for a user's mistake, 130 when interrupted."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    args = _parser().parse_args(arguments)
    try:
        code: int = args.run(args)
        return code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # the reader of our output has gone; keep the interpreter from flushing into the closed pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="streamkernels", description=__doc__)
    parser.add_argument("--version", action="version", version=f"streamkernels {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")
    demo = commands.add_parser("demo", help="stream a text through a model", description=_DEMO)
    demo.set_defaults(run=_demo)
    demo.add_argument("--model", type=Path, metavar="PATH", help="a Llama or Qwen2 checkpoint (default: the example's)")
    demo.add_argument("--text", metavar="FILE", help="text to stream, - for stdin (default: the example's lines)")
    demo.add_argument(
        "--policy",
        help="wait-k:K, read-all, or threshold:P: write while the model's largest probability for the next word's "
        "first token is at least P, and no more words than were read (default: the checkpoint's, else wait-k:5)",
    )
    demo.add_argument("--early-end", action="store_true", help="let the model end the text while words still come")
    demo.add_argument("--trace", choices=["json"], help="JSON Lines to stdout and nothing else")
    demo.add_argument("--rate", type=float, metavar="N", help="words per second (default: as fast as possible)")
    demo.add_argument("--max-tokens", type=int, default=256, metavar="N", help="cut each text there (default: 256)")
    demo.add_argument("--prompt", help="text before the source (default: the checkpoint's)")
    demo.add_argument("--header", help="text before the target (default: the checkpoint's)")
    demo.add_argument("--source-end", help="text after the source (default: the checkpoint's)")
    demo.add_argument("--device", default="auto", help="default: cuda where there is a GPU, else cpu")
    demo.add_argument("--dtype", default="float32", choices=["float32", "float64", "bfloat16", "float16"])
    info = commands.add_parser("info", help="versions, backends, GPU", description="What streamkernels can use here.")
    info.set_defaults(run=_info)
    bench = commands.add_parser("bench", help="the benchmarks of a checkout", description=_BENCH)
    bench.set_defaults(run=_bench)
    bench.add_argument("ops", nargs="*", metavar="OP", help="for example span_attention (default: all)")
    compile_only = "time nothing, fill the compilers' caches (with pytest-xdist in 8 processes)"
    bench.add_argument("--compile-only", action="store_true", help=compile_only)
    return parser


def _demo(args: argparse.Namespace) -> int:
    from .demo import DemoError, Options, demo

    names = ("model", "text", "policy", "rate", "prompt", "header", "source_end", "max_tokens", "early_end")
    options = {name: getattr(args, name) for name in (*names, "device", "dtype")}
    try:
        demo(Options(trace=args.trace is not None, **options), sys.stdout)
    except DemoError as error:
        print(f"streamkernels demo: {error}", file=sys.stderr)
        return 2
    return 0


def _info(args: argparse.Namespace) -> int:
    import torch

    from ._ext import cuda_status
    from .backends import triton
    from .backends.select import Call

    print(f"streamkernels  {__version__} (Python {sys.version.split()[0]})")
    for package in ("torch", "triton", "transformers"):
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            version = "not installed"
        print(f"{package:<15}{version}")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            found = torch.cuda.get_device_properties(index)
            print(f"GPU {index:<11}{found.name}, sm_{found.major}{found.minor}, {found.total_memory / 2**30:.0f} GiB")
    else:
        print("GPU            none that torch can use")
    print("backends")
    print("  reference    ready (any device)")
    why = triton.reason(Call(triton.OPS[0], torch.device("cuda", 0), torch.float32))
    if why is None and not torch.cuda.is_available():
        why = "Triton kernels need a GPU, and torch can use none"
    print(f"  triton       {why or 'ready: ' + ', '.join(triton.OPS)}")
    print(f"  cuda         {cuda_status()}")
    return 0


def _bench(args: argparse.Namespace) -> int:
    folder = Path(__file__).resolve().parents[1] / "bench"
    found = {path.stem.removeprefix("bench_"): path for path in sorted(folder.glob("bench_*.py"))}
    why = None
    if not (folder / "conftest.py").is_file():
        why = "the benchmarks are not installed with the package; run this from a checkout (pip install -e .)"
    for op in args.ops:
        if why is None and op not in found:
            why = f"no benchmark of {op!r}; there are {', '.join(found)}"
    if why is not None:
        print(f"streamkernels bench: {why}", file=sys.stderr)
        return 2
    # the folder's own conftest comes first: it knows the option
    chosen = [str(found[op]) for op in args.ops or found]
    options = ["-s"]
    if args.compile_only:
        options = ["--compile-only", *(["-n", "8"] if importlib.util.find_spec("xdist") else [])]
    return subprocess.run([sys.executable, "-m", "pytest", *options, *chosen], cwd=folder.parent).returncode
