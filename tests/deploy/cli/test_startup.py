"""Help is quick: no command's module reads a library, and the list of commands reads no module."""

from __future__ import annotations

import subprocess
import sys

import pytest
import typer

from fedveil.common.cli import COMMANDS, build, load

HEAVY = {
    "cryptography", "dp_accounting", "flwr", "grpc", "jinja2", "matplotlib", "numpy", "opacus", "pyarrow", "pydantic",
    "rich", "scipy", "sklearn", "tenseal", "torch",
}  # fmt: skip
_HELP = """
import sys, click, typer
from typer.testing import CliRunner
from fedveil.common.cli import build

def walk(command, words):
    done = CliRunner().invoke(build(), [*words, "--help"])
    assert done.exit_code == 0 and "Usage:" in done.output, (words, done.output, done.exception)
    print("shown", *words)
    if isinstance(command, click.Group):
        for name in command.commands:
            walk(command.get_command(click.Context(command), name), [*words, name])

app = typer.main.get_command(build())
words = sys.argv[1:]
walk(app.get_command(click.Context(app), words[0]) if words else click.Command("fedveil"), words)
print("modules", *sys.modules)
"""


def modules(code: str, *words: str) -> tuple[list[str], set[str]]:
    """The helps that ``code`` shows, and what is loaded in its process at the end."""
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *shown, last = done.stdout.splitlines()
    return shown, set(last.split())


@pytest.mark.parametrize("name", COMMANDS)
def test_no_help_loads_a_library(name: str) -> None:
    shown, loaded = modules(_HELP, name)
    assert f"shown {name}" in shown
    assert not HEAVY & {m.partition(".")[0] for m in loaded}
    assert not {m for m in loaded if m.startswith(("fedveil.client", "fedveil.server", "fedveil.privacy"))}
    if name == "data":
        assert "shown data contract init" in shown
    if name == "audit":
        assert "shown audit one-run" in shown


def test_the_list_of_commands_loads_none_of_them() -> None:
    shown, loaded = modules(_HELP)
    assert shown == ["shown"]
    assert not {m for m in loaded if m.startswith("fedveil.deploy")}
    assert not HEAVY & loaded


def test_the_package_itself_loads_nothing() -> None:
    _, loaded = modules("import sys, fedveil; print('modules', *sys.modules)")
    assert not {m for m in loaded if m.startswith("fedveil.")}
    assert not (HEAVY | {"typer", "click"}) & loaded


def test_a_library_would_be_seen() -> None:
    _, loaded = modules("import numpy\n" + _HELP, "plan")
    assert "numpy" in HEAVY & loaded


@pytest.mark.parametrize("name", COMMANDS)
def test_the_list_says_what_the_command_says(name: str) -> None:
    assert " ".join((load(name).help or "").partition("\n\n")[0].split()) == COMMANDS[name]


def test_every_command_is_listed_with_its_whole_line(capsys: pytest.CaptureFixture[str]) -> None:
    typer.main.get_command(build()).main(["--help"], standalone_mode=False)
    shown = " ".join(capsys.readouterr().out.split())
    for name, line in COMMANDS.items():
        assert f"{name} {line}" in shown


def test_an_argument_has_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["audit", "verify"], ["data", "contract", "init"], ["plan"]):
        typer.main.get_command(build()).main([*words, "--help"], standalone_mode=False)
        shown = capsys.readouterr().out
        assert shown.count("rguments:\n") == 1, "one list of them"
        assert "[required]" in shown
        assert {"verify": "report.json in the folder", "init": "A sample of the table", "plan": "federation.toml"}[
            words[-1]
        ] in shown
