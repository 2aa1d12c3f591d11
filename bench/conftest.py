"""Collect the rows of a benchmark run; print them as one table and save them with the machine and the commit."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

_rows: dict[str, list[dict]] = {}


@pytest.fixture
def rows(request: pytest.FixtureRequest):
    """Append dicts to this list: they become the table named after the benchmark's file."""
    return _rows.setdefault(request.path.stem, [])


def pytest_terminal_summary(terminalreporter) -> None:
    import record

    for name, found in _rows.items():
        terminalreporter.section(name)
        terminalreporter.write_line(str(record.machine()))
        terminalreporter.write_line(record.table(found))
        record.save(name, found)
