"""Every definition of the rooms is reached by what a user can start, or has a reason; with planted faults."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).with_name("reach.py")
PROJECT = """
[project.scripts]
tool = "fedveil.common.cli:main"
[project.entry-points."fedveil.commands"]
app = "fedveil.deploy.app:app"
"""
TREE = {
    "src/fedveil/__init__.py": "",
    "src/fedveil/__main__.py": "from fedveil.common.cli import main\nmain()\n",
    "common/__init__.py": "from fedveil.common.used import passed_on\n",
    "common/cli.py": (
        "import fedveil.common as c\nfrom fedveil.common import used\n\ndef main():\n    c.passed_on(used.LIMIT)\n"
    ),
    "common/used.py": (
        "LIMIT = 1\n\nclass Base:\n    def called(self): ...\n    def template(self): ...\n"
        "    def by_name(self): ...\n\n"
        "def passed_on(x):\n    return getattr(Base(), 'by_name'), Base().called()\n"
    ),
    "common/page.html.j2": "<p>{{ base.template }} and not alone</p>",
    "deploy/__init__.py": "",
    "deploy/app.py": (
        "import typer\napp = typer.Typer()\n\n@app.command()\ndef command():\n    return later()\n\ndef later(): ...\n"
    ),
    "deploy/served.py": "print('a unit file starts this')\n",
    "deploy/unit.service": "ExecStart=python -m fedveil.deploy.served\n",
}


@pytest.fixture(scope="module")
def reach() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reach", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["reach"] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def found(
    reach: ModuleType, folder: Path, more: dict[str, str], kept: tuple[str, ...] = ()
) -> tuple[set[str], set[str]]:
    """Unexplained and stale names of a small tree with ``more`` in it: text is added to the files it is for."""
    (folder / "pyproject.toml").write_text(PROJECT)
    for name, text in (TREE | {k: TREE.get(k, "") + v for k, v in more.items()}).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    report = reach.report(reach.Source(folder), {"a reason": kept})
    return set(report.unexplained), set(report.stale)


def test_nothing_but_tests_reaches_nothing() -> None:
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


def test_a_planted_function_and_module_are_seen_in_this_tree(tmp_path: Path) -> None:
    """The same script on a copy of the rooms with a definition too many."""
    root = SCRIPT.parents[2]
    for name in ("common", "privacy", "client", "server", "deploy", "src", "pyproject.toml"):
        subprocess.run(["cp", "-a", str(root / name), str(tmp_path / name)], check=True)
    (tmp_path / "tests" / "arch").mkdir(parents=True)
    for name in ("reach.py", "reach.toml"):
        (tmp_path / "tests" / "arch" / name).write_bytes(SCRIPT.with_name(name).read_bytes())
    with (tmp_path / "common" / "merkle.py").open("a") as f:
        f.write("\n\ndef planted(n):\n    return planted(n - 1)\n")
    (tmp_path / "privacy" / "island.py").write_text("def shore():\n    return 1\n")
    done = subprocess.run([sys.executable, str(tmp_path / "tests" / "arch" / "reach.py")], capture_output=True,
                          text=True, env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"})  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert [line.split()[2].rstrip(":") for line in done.stdout.splitlines()] == [
        "common.merkle.planted",
        "privacy.island",
    ]


def test_what_is_reached(reach: ModuleType, tmp_path: Path) -> None:
    """Through an entry point, a re-export, a constant, getattr, a template, a decorator, a unit file, a late import."""
    late = {
        "deploy/late.py": "VALUE = 1\n",
        "deploy/app.py": "\ndef later():\n    from fedveil.deploy.late import VALUE as v\n    return v\n",
    }
    assert found(reach, tmp_path, late) == (set(), set())


USED, CLI = "common/used.py", "common/cli.py"
DEAD = {
    "a function": (USED, "\ndef dead(): ...\n", {"dead"}),
    "recursion": (USED, "\ndef dead():\n    return dead()\n", {"dead"}),
    "a dead caller": (USED, "\ndef a():\n    return b()\n\ndef b(): ...\n", {"a", "b"}),
    "a circle": (USED, "\ndef a():\n    b()\n\ndef b():\n    a()\n", {"a", "b"}),
    "a constant": (USED, "\nTOO_MANY = 2\n", {"TOO_MANY"}),
    "a method": (USED, "\nclass More(Base):\n    def dead(self): ...\n\nLIMIT = More()\n", {"More.dead"}),
    "a class": (USED, "\nclass Dead:\n    def called(self): ...\n", {"Dead"}),
    "a class that is only asked for": (
        USED, "\nclass Dead: ...\n\nLIMIT = isinstance(1, (int, Dead))\n", {"Dead"},
    ),
    "a word of a docstring": (USED, '\ndef dead():\n    """dead"""\n', {"dead"}),
    "a template's prose": (USED, "\nclass More:\n    def alone(self): ...\n\nLIMIT = More()\n", {"More.alone"}),
    "a local name": (CLI, "\ndef LIMIT(): ...\n\ndef x(LIMIT): ...\n\nx(1)\n", {"LIMIT"}),
    "an import without a use": (
        CLI, "\nfrom fedveil.common.used import dead\n\ndef dead(): ...\n", {"dead"},
    ),
    "a module": ("common/island.py", "def shore():\n    return 1\n", {"common.island"}),
    "a module that is only imported": (CLI, "\nimport fedveil.common.island\n", {"common.island"}),
}  # fmt: skip


@pytest.mark.parametrize("kind", DEAD)
def test_what_is_not_reached(reach: ModuleType, tmp_path: Path, kind: str) -> None:
    path, text, dead = DEAD[kind]
    room = "" if "module" in kind else f"{path.removesuffix('.py').replace('/', '.')}."
    names, more = {room + n for n in dead}, {path: text}
    if "only imported" in kind:
        more["common/island.py"] = "def shore(): ...\n"
    assert found(reach, tmp_path, more) == (names, set())


def test_a_reason_explains_what_its_name_leads_to_and_nothing_that_is_reached(
    reach: ModuleType, tmp_path: Path
) -> None:
    more = {"common/used.py": "\ndef a():\n    return b()\n\ndef b(): ...\n"}
    assert found(reach, tmp_path, more, ("common.used.a",)) == (set(), set())
    stale = ("common.used.b", "common.used.LIMIT", "common.used.gone")
    assert found(reach, tmp_path, more, ("common.used.a", *stale)) == (set(), set(stale))
