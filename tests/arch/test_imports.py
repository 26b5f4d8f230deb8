"""The rooms' order and the one import name, as the tools enforce them; each with a fault that they must see."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


def ruff(tmp_path: Path, code: str) -> str:
    """Ruff's verdict on ``code`` under this project's rules."""
    done = subprocess.run(
        [str(BIN / "ruff"), "check", "--config", str(ROOT / "pyproject.toml"), "--no-cache", "--output-format",
         "concise", "--stdin-filename", str(tmp_path / "sample.py"), "-"],
        input=f'"""A module."""\n\n{code}\n', capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode in (0, 1), done.stderr
    return done.stdout


@pytest.mark.parametrize("room", ["common", "privacy", "client", "server", "deploy"])
def test_a_room_has_one_import_name(tmp_path: Path, room: str) -> None:
    for code in (f"import {room}", f"import {room}.x", f"from {room} import x", f"from {room}.x import y"):
        assert "TID251" in ruff(tmp_path, code), code
    assert "TID251" not in ruff(tmp_path, f"import fedveil.{room}")


@pytest.mark.parametrize("module", ["pickle", "tenseal", "numpy.random"])
def test_what_no_module_may_touch(tmp_path: Path, module: str) -> None:
    assert "TID251" in ruff(tmp_path, f"import {module}")


def lint_imports() -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(BIN / "lint-imports"), "--no-cache", "--config", str(ROOT / "pyproject.toml")],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT / "src")}, capture_output=True, text=True,
    )  # fmt: skip


def test_the_rooms_import_in_one_direction() -> None:
    done = lint_imports()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "rooms: common <- privacy <- client | server <- deploy KEPT" in done.stdout


@pytest.mark.parametrize(
    ("importer", "imported", "contract"),
    [
        ("fedveil.common.journal", "fedveil.privacy.ledger", "rooms:"),
        ("fedveil.privacy.secagg.shamir", "fedveil.privacy.dp.noise", "the mechanisms"),
        ("fedveil.server.rounds", "fedveil.privacy.secagg.keysum_site", "the server never"),
        ("fedveil.client.round", "fedveil.privacy.secagg.keysum_server", "the site never"),
        ("fedveil.privacy.report.verify", "torch", "the auditor's path"),
        ("fedveil.deploy.site_process", "fedveil.deploy.lab.seeded_noise", "no real site"),
        ("fedveil.privacy.plan_figures", "fedveil.privacy.plan", "no circles"),  # between two modules
        ("fedveil.client.records.read.values", "fedveil.client.records.judge.hipaa", "no circles"),  # of sub-rooms
    ],
)
def test_a_forbidden_import_would_be_seen(importer: str, imported: str, contract: str, tmp_path: Path) -> None:
    """A copy of the tree with one import added breaks the contract that forbids it."""
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in ("common", "privacy", "client", "server", "deploy", "src"):
        subprocess.run(["cp", "-a", str(ROOT / name), str(tree / name)], check=True)
    path = tree.joinpath(*importer.split(".")[1:]).with_suffix(".py")
    path.write_text(path.read_text() + f"\nimport {imported}\n")
    done = subprocess.run(
        [str(BIN / "lint-imports"), "--no-cache", "--config", str(ROOT / "pyproject.toml")],
        cwd=tree, env={**os.environ, "PYTHONPATH": str(tree / "src")}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode != 0
    assert [x for x in done.stdout.splitlines() if x.startswith(contract) and x.endswith("BROKEN")], done.stdout
