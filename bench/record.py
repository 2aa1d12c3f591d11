"""Where a number comes from: machine, software, commit; the file that holds the numbers; what a row must show."""

from __future__ import annotations

import functools
import json
import math
import os
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Goal:
    """What a ratio must be: `at_least`, or `at_most`, a number. An aim is a goal that a row may miss."""

    at_least: float | None = None
    at_most: float | None = None
    aim: bool = False

    def __str__(self) -> str:
        bound = f">= {self.at_least:g}" if self.at_least is not None else f"<= {self.at_most:g}"
        return f"aim {bound}" if self.aim else bound

    def met(self, ratio: float) -> bool:
        """Whether `ratio` meets it; NaN never does."""
        return ratio >= self.at_least if self.at_least is not None else ratio <= (self.at_most or 0.0)


def compared(
    work: str, part: str, predicted: float, measured: float, peer: str, peer_us: float, goal: Goal | None
) -> dict[str, Any]:
    """One row of a table, times in us. The ratio is peer / measured for a goal from below, measured / peer for one from
    above."""
    over = goal is not None and goal.at_most is not None
    ratio = measured / peer_us if over else peer_us / measured
    unknown = goal is None or math.isnan(ratio)
    return {
        "work": work,
        "part": part,
        "predicted us": predicted,
        "measured us": measured,
        "peer": peer,
        "peer us": peer_us,
        "ratio": ratio,
        "goal": "-" if goal is None else str(goal),
        "met": "-" if unknown else "yes" if goal.met(ratio) else "no",
    }


@functools.cache
def machine() -> dict[str, Any]:
    """GPU, driver-independent software versions, and the commit (git's, or STREAMKERNELS_COMMIT where there is no
    git)."""
    found: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__}
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError:
        found["triton"] = None
    if torch.cuda.is_available():
        p = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": p.name,
            "sms": p.multi_processor_count,
            "l2_mb": p.L2_cache_size >> 20,
            "cuda": torch.version.cuda,
        }
    found["commit"] = os.environ.get("STREAMKERNELS_COMMIT") or _git_commit()
    return found


def _git_commit() -> str:
    here = Path(__file__).parent
    done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def save(name: str, rows: list[dict[str, Any]]) -> Path:
    """Write rows and the machine to `$OUT/<name>.json` (or bench/results/)."""
    folder = Path(os.environ.get("OUT") or Path(__file__).parent / "results")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1))
    return path


def tables(rows: list[dict[str, Any]]) -> str:
    """Rows as Markdown tables: one per set of columns, in the order in which they first appear."""
    found: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(tuple(row), []).append(row)
    return "\n\n".join(table(some) for some in found.values()) or "(no rows)"


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as a Markdown table."""
    if not rows:
        return "(no rows)"
    keys = list(rows[0])
    lines = ["| " + " | ".join(keys) + " |", "|" + "---|" * len(keys)]
    for row in rows:
        lines.append("| " + " | ".join(_cell(row[k]) for k in keys) + " |")
    return "\n".join(lines)


def _cell(value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    return "-" if math.isnan(value) else f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"
