"""The Python in the documents runs as it stands there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "guide.md").read_text(encoding="utf-8"), re.M | re.S)


def patients(path: Path) -> None:
    """A made-up table in which the age decides, mostly."""
    lines = [f"{20 + i % 60},{'MF'[i % 2]},{'no' if i % 60 < 30 + i % 7 else 'yes'}" for i in range(900)]
    path.write_text("age,sex,ill\n" + "\n".join(lines) + "\n")


def test_there_is_something_to_run():
    assert any("fv.simulate(" in block and "fv.sweep(" in block for block in BLOCKS)


@pytest.mark.slow
@pytest.mark.parametrize("block", BLOCKS)
def test_the_guide(block, tmp_path):
    patients(tmp_path / "patients.csv")
    (tmp_path / "study.py").write_text(block)
    done = subprocess.run([sys.executable, "study.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "COMPLETED" in done.stdout
    assert "accuracy s.e." in done.stdout
