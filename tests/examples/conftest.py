"""The examples are scripts in a folder, not a package: put the folder on the path for these tests only."""

from __future__ import annotations

import sys
from pathlib import Path

CAPTIONS = Path(__file__).resolve().parents[2] / "examples" / "captions"
sys.path.insert(0, str(CAPTIONS))
