"""Collect the rows of a benchmark run; print them as tables and save them with the machine and the commit."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
# FlashAttention-4 compiles seconds per kernel: let processes share what they compiled
os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
# FlexAttention's kernels are compiled one after the other: a pool of compiling processes would only cost its start
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

_rows: dict[str, list[dict]] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--compile-only",
        action="store_true",
        help="run every benchmarked call once, untimed, to fill the compilers' caches (with -n 8: in parallel)",
    )


def pytest_configure(config: pytest.Config) -> None:
    import kernel_time

    # the option is unknown where bench/ is found only while collecting
    kernel_time.compile_only = bool(config.getoption("--compile-only", default=False))


@pytest.fixture
def rows(request: pytest.FixtureRequest) -> list[dict]:
    """Append dicts to this list: they become the table named after the benchmark's file."""
    return _rows.setdefault(request.path.stem, [])


@pytest.fixture
def show(rows: list[dict], benchmark: Any, request: pytest.FixtureRequest) -> Callable[..., None]:
    """show(rows of the table, our call): record rows, and the call as pytest-benchmark's own (host-visible, warm).

    What is recorded is on disk at once: a run that is cut off keeps it."""

    def show(found: Sequence[dict], call: Callable[[], object]) -> None:
        import kernel_time
        import record

        rows.extend(found)
        if not kernel_time.compile_only:
            print(record.tables(list(found)))
            record.save(request.path.stem, rows)
        benchmark.extra_info["rows"] = list(found)

        def synchronised() -> None:
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()

        benchmark.pedantic(synchronised, rounds=1 if kernel_time.compile_only else 5, warmup_rounds=1)

    return show


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    import kernel_time
    import record

    if kernel_time.compile_only:
        return
    for name, found in _rows.items():
        terminalreporter.section(name)
        terminalreporter.write_line(str(record.machine()))
        terminalreporter.write_line(record.tables(found))
        record.save(name, found)
