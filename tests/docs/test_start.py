"""Every block of the three ways to start runs, in its order, in one empty folder; and so does every notebook."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PATHS = sorted((ROOT / "docs" / "start").glob("*.md"))
NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.py"))
# What a reader has to see at the end of each way.
SAYS = {
    "researcher": ("s.e.", "sweep.png", "Every check passed"),
    "institution": ("verified release", "COMPLETED", "Every check passed"),
    "auditor": ("Every check passed", "refused, exit code 60", "measured noise multiplier"),
}
ENV = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "COLUMNS": "200"}


def blocks(page: Path, port: int = 8443) -> list[list[str]]:
    """The commands that run a page's blocks; where a block says 8443, ``port`` stands for it."""
    text = page.read_text(encoding="utf-8").replace("8443", str(port))
    found = re.findall(r"^```(sh|python)\n(.*?)^```", text, re.M | re.S)
    shell = ["bash", "-euo", "pipefail", "-c"]
    return [[*shell, text] if kind == "sh" else [sys.executable, "-c", text] for kind, text in found]


def test_there_is_something_to_run() -> None:
    assert {p.stem for p in PATHS} == SAYS.keys()
    assert all(len(blocks(p)) >= 5 for p in PATHS)
    assert len(NOTEBOOKS) >= 3


@pytest.mark.slow
@pytest.mark.parametrize("page", PATHS, ids=lambda p: p.stem)
def test_a_way_to_start(page: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    seen = ""
    for command in blocks(page, port):
        done = subprocess.run(command, cwd=tmp_path, env=ENV, capture_output=True, text=True, check=False)
        seen += done.stdout
        assert done.returncode == 0, (command[-1], seen, done.stderr)
    assert [words for words in SAYS[page.stem] if words not in seen] == []


@pytest.mark.slow
@pytest.mark.parametrize("script", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_is_a_script_that_runs(script: Path, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout
