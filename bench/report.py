"""Print recorded runs as the Markdown tables of README.md: `python bench/report.py [results/*.json]`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from record import tables


def report(path: Path) -> str:
    """One recorded file: its name, where it was measured, its tables, and how many goals were met."""
    found = json.loads(path.read_text())
    rows = found["rows"]
    machine = ", ".join(f"{name} {value}" for name, value in found["machine"].items())
    goals = [row for row in rows if row.get("met") in ("yes", "no") and not str(row.get("goal")).startswith("aim")]
    met = sum(row["met"] == "yes" for row in goals)
    parts = [f"## {path.stem}", machine]
    if goals:
        missed = [f"- {row['work']}: {row['goal']}" for row in goals if row["met"] == "no"]
        parts += [f"{met} of {len(goals)} goals met" + (", not met:" if missed else "."), *missed]
    return "\n".join([*parts, "", tables(rows), ""])


def main(arguments: list[str]) -> int:
    """Print the named files, by default all of bench/results/; 1 if there are none."""
    paths = [Path(a) for a in arguments] or sorted((Path(__file__).parent / "results").glob("*.json"))
    for path in paths:
        print(report(path))
    if not paths:
        print("nothing recorded: run `pytest bench/bench_<op>.py` on a machine with a GPU first", file=sys.stderr)
    return 0 if paths else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
