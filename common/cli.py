"""The command ``fedveil``: finds the rooms' sub-commands and turns errors into words and exit codes."""

from __future__ import annotations

import os
import signal
import sys
from importlib.metadata import entry_points
from typing import NoReturn

import typer
from rich.console import Console
from rich.markup import escape

from fedveil.common.errors import FedveilError, PlanError, StoreError, trace

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
        try:
            build()(standalone_mode=True)
        finally:
            _flush()
    except BrokenPipeError:  # whoever read the output has seen enough
        sys.exit(1)
    except OSError as e:
        raise _store_error(e) from e
    except ModuleNotFoundError as e:
        library = (e.name or "?").partition(".")[0]
        if library == "fedveil":
            raise
        raise FedveilError(
            f"this command needs {library}", hint="pip install 'fedveil[sim]' installs every part"
        ) from e


def _flush() -> None:
    """Write what is still buffered while an error can be told; where it cannot be written, nothing tries again."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


def _store_error(e: OSError) -> StoreError:
    """What the operating system refused: which file or folder, or where that is not said which line asked for it."""
    if isinstance(e.filename, (str, bytes)):
        return StoreError(
            f"{os.fsdecode(e.filename)}: {e.strerror}", hint="check the path, its permissions and free disk space"
        )
    what = os.strerror(e.errno) if e.errno else "an input or output failed"
    return StoreError(
        f"{what} ({trace(e).rpartition(' > ')[2]})",
        hint="check free disk space and quotas, the limit on open files (ulimit -n), and where the output goes",
    )


def _unwind(number: int, _: object) -> NoReturn:
    """Leave as after an error, so that nothing half made stays behind; the same signal again ends it at once."""
    signal.signal(number, signal.SIG_DFL)
    raise SystemExit(128 + number)


def main() -> None:
    """Entry point: a :class:`FedveilError` becomes two lines on stderr and its documented exit code.

    SIGTERM and SIGHUP end a command with 128 plus their number; long-running ones have handlers of their own.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:  # under nohup it is ignored, and stays so
            signal.signal(number, _unwind)
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
