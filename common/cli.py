"""The command ``fedveil``: finds the rooms' sub-commands and turns errors into words and exit codes."""

from __future__ import annotations

import os
import sys
from importlib.metadata import entry_points

import typer
from rich.console import Console
from rich.markup import escape

from fedveil.common.errors import FedveilError, PlanError, StoreError

GROUP = "fedveil.commands"


def build() -> typer.Typer:
    """The application with every sub-command whose extra is installed.

    A sub-command that lacks a library stays visible and says which extra to install.
    """
    # Locals of a crash can be record values: they are never printed.
    app = typer.Typer(
        pretty_exceptions_show_locals=False,
        no_args_is_help=True,
        add_completion=False,
        help="Federated learning with a checkable privacy claim.",
    )
    for ep in sorted(entry_points(group=GROUP), key=lambda e: e.name):
        try:
            command = ep.load()
        except ModuleNotFoundError as e:
            if (e.name or "").partition(".")[0] == "fedveil":
                raise
            app.command(ep.name, help=f"(needs the library {e.name})")(_missing(ep.name, e.name or "?"))
            continue
        if isinstance(command, typer.Typer):
            app.add_typer(command, name=ep.name)
        else:
            app.command(ep.name)(command)
    return app


def _missing(command: str, library: str):
    def run() -> None:
        raise FedveilError(
            f"'fedveil {command}' needs {library}", hint="pip install 'fedveil[sim]' installs every part"
        )

    return run


def _run() -> None:
    """The application; a library that only a command's own imports ask for is named like one missing at the start."""
    try:
        build()(standalone_mode=True)
    except OSError as e:
        if e.filename is None:  # no file or folder that somebody named: a fault of the program
            raise
        raise StoreError(
            f"{os.fsdecode(e.filename)}: {e.strerror}", hint="check the path, its permissions and free disk space"
        ) from e
    except ModuleNotFoundError as e:
        library = (e.name or "?").partition(".")[0]
        if library == "fedveil":
            raise
        raise FedveilError(
            f"this command needs {library}", hint="pip install 'fedveil[sim]' installs every part"
        ) from e


def main() -> None:
    """Entry point: a :class:`FedveilError` becomes two lines on stderr and its documented exit code."""
    try:
        _run()
    except FedveilError as e:
        console = Console(stderr=True)
        console.print(f"[bold red]{e.code}[/]: {escape(e.message)}", highlight=False, soft_wrap=True)
        if e.hint:
            console.print("  what to do:", e.hint, markup=False, highlight=False, soft_wrap=True)
        if isinstance(e, PlanError) and e.nearest:
            nearest = ", ".join(f"{name} = {value}" for name, value in e.nearest.items())
            console.print("  the nearest that holds:", nearest, markup=False, highlight=False, soft_wrap=True)
        sys.exit(e.exit_code)
