"""The benchmarks' folder on the path, as pytest puts it there for the benchmarks themselves."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))
