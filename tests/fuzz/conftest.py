"""The fuzzer is also a program: like it, its tests find the modules beside it by their names."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
