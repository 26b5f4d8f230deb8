"""The wheel that users get is built through the sdist and holds the tree's modules, no more and no less."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from fedveil.common.cli import COMMANDS

ROOT = Path(__file__).parents[2]
ROOMS = ("common", "privacy", "client", "server", "deploy")
# What the auditor's extra does not install: nothing on his path may need it.
ABSENT = ("torch", "flwr", "tenseal", "opacus", "grpc", "sklearn", "matplotlib", "pyarrow", "ray")


def sources() -> set[str]:
    """Every module and template of the rooms, as it must lie in the wheel."""
    found = {f"fedveil/{p.name}" for p in (ROOT / "src" / "fedveil").glob("*.py*")}
    for room in ROOMS:
        for path in (ROOT / room).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith("."):
                found.add("fedveil/" + path.relative_to(ROOT).as_posix())
    return found


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist and the wheel that was built from the unpacked sdist; offline."""
    folder = tmp_path_factory.mktemp("dist")
    tree = folder / "tree"
    keep = shutil.ignore_patterns("__pycache__", ".*", "runs", "build", "dist", "docs")
    shutil.copytree(ROOT, tree, symlinks=True, ignore=keep)
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder / "out"), str(tree)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "out"


@pytest.fixture(scope="module")
def wheel(built: Path) -> zipfile.ZipFile:
    return zipfile.ZipFile(next(built.glob("*.whl")))


def test_there_is_something_to_compare() -> None:
    found = sources()
    assert {f"fedveil/{room}/__init__.py" for room in ROOMS} < found
    assert any(x.endswith(".j2") for x in found)
    assert len(found) > 80


def test_the_wheel_is_the_tree(wheel: zipfile.ZipFile) -> None:
    inside = {x for x in wheel.namelist() if ".dist-info/" not in x}
    assert inside == sources()
    for name in inside:
        parts = name.split("/")
        origin = ROOT / "src" / name if len(parts) == 2 else ROOT.joinpath(*parts[1:])
        assert wheel.read(name) == origin.read_bytes(), name


def test_no_generic_name_lands_in_site_packages(wheel: zipfile.ZipFile) -> None:
    tops = {x.split("/")[0] for x in wheel.namelist()}
    assert {x for x in tops if not x.endswith(".dist-info")} == {"fedveil"}


def test_the_sdist_holds_the_tests_and_the_licence(built: Path) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = {x.split("/", 1)[1] for x in archive.getnames() if "/" in x}
    assert {"LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml", "tests/arch/test_packaging.py"} < names


def test_every_command_is_inside(wheel: zipfile.ZipFile) -> None:
    assert {f"fedveil/deploy/cli/{name}.py" for name in COMMANDS} <= set(wheel.namelist())


@pytest.fixture(scope="module")
def unpacked(wheel: zipfile.ZipFile, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    wheel.extractall(folder)
    return folder


_GUARD = """\
import sys
hidden, absent = {hidden!r}, {absent!r}
sys.path[:] = [{folder!r}] + [p for p in sys.path if "site-packages" in p or not p.startswith(hidden)]
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in type(f).__module__ + type(f).__qualname__.lower()]
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in absent:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
"""


def python(folder: Path, code: str, absent: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Run ``code`` against the unpacked wheel: the repository hidden, the libraries of ``absent`` missing.

    A virtual environment inside the repository stays visible.
    """
    guard = _GUARD.format(hidden=str(ROOT), absent=absent, folder=str(folder))
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, "-c", guard + code], cwd=folder, env=environment, capture_output=True, text=True
    )


def test_the_command_line_runs_from_the_wheel(unpacked: Path) -> None:
    code = (
        "import fedveil, fedveil.common.cli as c; [c.load(x) for x in c.COMMANDS]; "
        "print(fedveil.__file__); print(c.__file__)"
    )
    done = python(unpacked, code)
    assert done.returncode == 0, done.stderr
    assert all(line.startswith(str(unpacked)) for line in done.stdout.split())


def test_an_auditor_needs_neither_torch_nor_flwr(unpacked: Path) -> None:
    code = (
        "import fedveil.common.cli as c, fedveil.privacy.report.verify, fedveil.privacy.report.render; "
        "c.load('audit'); print(c.__file__)"
    )
    done = python(unpacked, code, ABSENT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(unpacked))


def test_the_hook_does_hide_them(unpacked: Path) -> None:
    done = python(unpacked, "import fedveil.client.app", ABSENT)
    assert done.returncode != 0
    assert "ModuleNotFoundError" in done.stderr
