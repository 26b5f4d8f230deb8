"""The Python in the documents runs as it stands there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def block_of(page: str) -> str:
    """The one block of Python that a page has."""
    (found,) = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.M | re.S)
    return found


def patients(path: Path) -> None:
    """A made-up table in which the age decides, mostly."""
    lines = [f"{20 + i % 60},{'MF'[i % 2]},{'no' if i % 60 < 30 + i % 7 else 'yes'}" for i in range(900)]
    path.write_text("age,sex,ill\n" + "\n".join(lines) + "\n")


def test_the_chinese_page_shows_the_readme_s_code():
    code = [re.sub(r" *#.*", "", block_of(page)) for page in ("README.md", "docs/zh.md")]
    assert code[0] == code[1]
    assert "fv.simulate(" in code[0]


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", "docs/guide.md"])
def test_a_page(page, tmp_path):
    patients(tmp_path / "patients.csv")
    (tmp_path / "study.py").write_text(block_of(page), encoding="utf-8")
    done = subprocess.run([sys.executable, "study.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "True" in done.stdout  # the report verifies
    assert "accuracy s.e." in done.stdout
