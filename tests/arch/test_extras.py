"""Every command says which extra it lacks: the smallest one with which it works.

The libraries that an extra does not bring are hidden from a process by an import hook, so that no second environment
is needed. What a command needs is read from the imports that its function makes when it is called.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from functools import cache
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from fedveil.common.cli import EXTRAS, needed

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

# Hides every library that is named; the standard library and fedveil itself stay.
HOOK = """\
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {absent!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
"""


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


# Their own imports would do with less: what they call reads public data (sklearn) and draws (matplotlib).
DEEPER = {"audit attacks", "compare", "simulate"}


@cache
def distributions(extra: str) -> frozenset[str]:
    """Every distribution that ``fedveil[extra]`` installs here; the empty extra is the bare installation."""
    found: set[tuple[str, str]] = set()
    texts = [*PROJECT["dependencies"], *(PROJECT["optional-dependencies"][extra] if extra else ())]
    todo = [(r.name, e) for r in map(Requirement, texts) for e in ("", *r.extras)]
    while todo:
        name, of = todo.pop()
        if (key := (_plain(name), of)) in found:
            continue
        found.add(key)
        if key[0] == "fedveil":
            lines = PROJECT["optional-dependencies"][of] if of else []
        else:
            try:
                lines = metadata.requires(name) or []
            except metadata.PackageNotFoundError:
                continue
        for r in map(Requirement, lines):
            if r.marker is None or r.marker.evaluate({"extra": of}):
                todo += [(r.name, e) for e in ("", *r.extras)]
    return frozenset(name for name, _ in found)


@cache
def absent(extra: str) -> tuple[str, ...]:
    """The top names of modules that are installed here and would not be with ``fedveil[extra]``."""
    there = distributions(extra)
    return tuple(
        sorted(
            top for top, held in metadata.packages_distributions().items()
            if top.isidentifier() and top != "fedveil" and not {_plain(d) for d in held} & there
            and not {_plain(d) for d in held} <= {"setuptools", "pip"}
        )
    )  # fmt: skip


_WALK = '''
import ast, importlib, inspect, json, sys, textwrap, types
import click, typer
from fedveil.common import cli

def leaves(command, words):
    if not isinstance(command, click.Group):
        yield words, command
        return
    for name in command.commands:
        yield from leaves(command.get_command(click.Context(command), name), (*words, name))

def imports(function, seen):
    """The import statements that a call of the function can reach inside deploy/cli."""
    if function in seen:
        return
    seen.add(function)
    names = vars(sys.modules[function.__module__])
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))):
        found = None
        if isinstance(node, ast.Import):
            yield from ((a.name, None) for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.module, a.name) for a in node.names)
        elif isinstance(node, ast.Name):
            found = names.get(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module = names.get(node.value.id)
            found = getattr(module, node.attr, None) if isinstance(module, types.ModuleType) else None
        if isinstance(found, types.FunctionType) and found.__module__.startswith("fedveil.deploy.cli"):
            yield from imports(inspect.unwrap(found), seen)

def missing(function):
    for module, name in imports(function, set()):
        try:
            found = importlib.import_module(module)
            if name and not hasattr(found, name):
                importlib.import_module(f"{module}.{name}")
        except ModuleNotFoundError as e:
            return e.name
    return ""

COMMANDS = {" ".join(words): c for words, c in leaves(typer.main.get_command(cli.build()), ())}
'''
_NEEDS = _WALK + "json.dump({n: missing(c.callback.__wrapped__) for n, c in COMMANDS.items()}, sys.stdout)"
# Calls every command with a value for each argument and required option, and some options besides.
_CALLS = (
    _WALK
    + """
from typer.testing import CliRunner
said = {}
for name, c in COMMANDS.items():
    words = []
    for p in c.params:
        value = "1" if p.type.name.startswith(("integer", "float")) else p.name
        if isinstance(p, click.Argument):
            words.append(value)
        elif p.required:
            words += [p.opts[0], value]
    words += ["--json"] if any("--json" in p.opts for p in c.params) else []
    helped = CliRunner().invoke(cli.build(), [*name.split(), "--help"])
    e = CliRunner().invoke(cli.build(), [*name.split(), *words]).exception
    said[name] = [helped.exit_code, type(e).__name__, getattr(e, "message", repr(e)), getattr(e, "hint", "")]
json.dump(said, sys.stdout)
"""
)


def run(code: str, extra: str, folder: Path) -> dict[str, list[str] | str]:
    """What ``code`` prints, as JSON, where only ``fedveil[extra]`` is installed."""
    done = subprocess.run(
        [sys.executable, "-c", HOOK.format(absent=set(absent(extra))) + code],
        cwd=folder, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def lacking(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """By extra and command: a library that the command asks for and that extra does not bring; or nothing."""
    folder = tmp_path_factory.mktemp("needs")
    return {e: run(_NEEDS, e, folder) for e in ("", *sorted(set(EXTRAS.values())))}  # type: ignore[misc]


def test_an_extra_holds_what_its_name_says() -> None:
    assert {"dp-accounting", "jinja2", "scipy"} <= distributions("audit")
    assert {"cryptography", "numpy", "pydantic", "rich", "typer"} <= distributions("")
    assert not {"scipy", "torch", "flwr", "jinja2", "pyarrow"} & distributions("")
    assert not {"torch", "flwr", "tenseal", "opacus", "pyarrow"} & distributions("audit")
    assert {"torch", "pyarrow", "jinja2"} <= distributions("server")
    assert {"torch", "flwr", "dp_accounting", "jinja2", "pyarrow", "sklearn", "duckdb"} <= set(absent(""))


def test_every_extra_that_is_named_exists() -> None:
    assert set(EXTRAS.values()) <= set(PROJECT["optional-dependencies"])


def test_every_command_has_the_smallest_extra_that_works(lacking: dict[str, dict[str, str]]) -> None:
    assert len(lacking[""]) > 40
    for name in lacking[""]:
        needs = {e for e in lacking if lacking[e][name]}  # the extras that do not do
        if not needs:
            continue
        command, extra = needed(name.split())
        assert command in EXTRAS, f"{name} needs {lacking[''][name]}"
        assert extra not in needs, f"{name} needs {lacking[extra][name]} beside {extra}"
        smaller = {e for e in lacking if distributions(e) < distributions(extra)}
        assert smaller <= needs or name in DEEPER, f"{name}: {smaller - needs} would do"


def test_a_command_says_what_to_install_whatever_its_arguments(
    lacking: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    said = run(_CALLS, "", tmp_path)
    assert set(said) == set(lacking[""])
    wanting = [name for name, library in lacking[""].items() if library]
    assert len(wanting) > 25
    for name in [*wanting, "simulate", "demo"]:
        helped, error, message, hint = said[name]
        command, extra = needed(name.split())
        assert error == "FedveilError", (name, error, message)
        assert message.startswith(f"'fedveil {command}' needs the library "), name
        assert hint == f"pip install 'fedveil[{extra}]'", name
    assert {s[0] for s in said.values()} == {0}, "--help works without any extra"


def test_the_words_on_the_terminal(tmp_path: Path) -> None:
    code = HOOK.format(absent={"dp_accounting"}) + (
        "sys.argv = ['fedveil', 'audit', 'verify', 'report.json', '--json']\n"
        "from fedveil.common.cli import main\nmain()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == (
        "FedveilError: 'fedveil audit' needs the library dp_accounting\n  what to do: pip install 'fedveil[audit]'\n"
    )
    assert done.stdout == ""
