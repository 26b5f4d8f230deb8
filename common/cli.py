"""The command ``fedveil``: loads a sub-command when it is called, and turns errors into words and exit codes."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NoReturn

import click
import typer
from typer import core
from typer.utils import get_params_from_function

from fedveil.common.errors import FedveilError, PlanError, StoreError, trace

# Every command with the line that "fedveil --help" shows for it. The module deploy/cli/NAME.py holds it, under the
# name "app" (a group) or NAME (a function). No module is imported for this list.
COMMANDS = {
    "audit": "Check a privacy report from its journals alone, or write it again.",
    "client": "Run a site: its own data, its own limits, outbound connections only.",
    "compare": "Compare finished runs: settings, ε, metrics and baselines, as a table and a page.",
    "data": "The data contract and a site's own table.",
    "demo": "Train one model over four hospitals at ε = 1: real processes, mTLS, a secure sum, a report to check.",
    "ledger": "A site's privacy ledger: what was spent, what is left.",
    "plan": "Show the privacy plan of federation.toml before a run: noise, steps, ε, fallback ε.",
    "provision": "Make keys, certificates and rosters of a consortium, and revoke members.",
    "server": "Coordinate a run: admit sites, add ciphertexts, open only sums.",
    "simulate": "Train over many virtual clients in one process. The run's folder then holds a report to check.",
    "stats": "Ask all sites for statistics of their rows in one secure sum. Each site must allow the task 'stats'.",
    "superlink": "Run server and sites under Flower's SuperLink. App bundles from the network are never run.",
    "track": "Show a run in MLflow or TensorBoard: settings, the plan's numbers, public metrics and ε of each round.",
}
# The smallest extra with which a command works. If several entries fit, the one with the most words counts.
EXTRAS = {
    "audit": "audit",
    "audit attacks": "sim",
    "audit conformance": "client",
    "audit one-run": "client",
    "client": "client",
    "compare": "sim",
    "data": "anon",
    "demo": "sim",
    "ledger": "audit",
    "plan": "audit",
    "server": "server",
    "server monitor": "audit",
    "simulate": "sim",
    "stats": "server",
    "superlink": "server",
    "superlink site": "client",
    "track": "client",
}
_WORDS = "fedveil.words"
# Help and error messages are shown as click writes them. Typer's frames would load rich's Markdown and tracebacks,
# and that takes longer than all the rest of a start. Crashes are still shown by rich.
core.HAS_RICH = False


class Group(core.TyperGroup):
    """A group of commands whose help shows their first paragraphs in full, and their arguments' help."""

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command ``cmd_name``; None if there is none."""
        return with_argument_help(super().get_command(ctx, cmd_name))

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The names, each with a paragraph; none of the commands is loaded for it."""
        shown = {n: c.short_help or c.help or "" for n, c in self.commands.items() if not c.hidden}
        with formatter.section("Commands"):
            formatter.write_dl([(n, " ".join(text.partition("\n\n")[0].split())) for n, text in shown.items()])


def with_argument_help(command: click.Command | None) -> click.Command | None:
    """``command`` with the help of its arguments. Typer 0.20 writes that help, and click 8.5 then removes it."""
    function = getattr(command.callback, "__wrapped__", None) if command is not None else None
    if command is not None and function is not None:
        given = get_params_from_function(function)
        for p in command.params:
            if isinstance(p, core.TyperArgument) and p.name in given:
                p.help = given[p.name].default.help
        command.format_arguments = lambda ctx, formatter: None  # click's own list, beside the one by typer
    return command


class _Commands(Group):
    """The sub-commands: listed from the table, imported one at a time."""

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command itself; its module is imported now."""
        return load(cmd_name) if cmd_name in self.commands else None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Keep the words for :meth:`invoke`. When an error arrives, the context of its sub-command no longer exists."""
        ctx.meta[_WORDS] = list(args)
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the sub-command. If a library is missing, the error names the extra that installs it.

        Raises:
            FedveilError: a library is not installed.
        """
        try:
            return super().invoke(ctx)
        except ModuleNotFoundError as e:
            library = (e.name or "?").partition(".")[0]
            if library == "fedveil":
                raise
            command, extra = needed(ctx.meta.get(_WORDS, ()))
            raise FedveilError(
                f"'fedveil {command}' needs the library {library}", hint=f"pip install 'fedveil[{extra}]'"
            ) from e


def needed(words: Sequence[str]) -> tuple[str, str]:
    """The command that ``words`` call, as far as :data:`EXTRAS` knows it, and its extra."""
    for n in range(len(words), 0, -1):
        command = " ".join(words[:n])
        if command in EXTRAS:
            return command, EXTRAS[command]
    return " ".join(words[:1]), "sim"


def load(name: str) -> click.Command:
    """The sub-command ``name``: one of :data:`COMMANDS`."""
    module = import_module(f"fedveil.deploy.cli.{name}")
    holder = typer.Typer(add_completion=False, suggest_commands=False)
    if isinstance(found := getattr(module, "app", None), typer.Typer):
        holder.add_typer(found, name=name)
    else:
        holder.command(name)(getattr(module, name))
    command = typer.main.get_group(holder).commands[name]
    with_argument_help(command)
    return command


def build() -> typer.Typer:
    """The application with every sub-command, none of which is imported yet."""
    # Locals of a crash can be record values: they are never printed.
    app = typer.Typer(
        cls=_Commands,
        suggest_commands=False,
        pretty_exceptions_show_locals=False,
        no_args_is_help=True,
        add_completion=False,
        help="Federated learning with a checkable privacy claim.",
    )
    for name, line in COMMANDS.items():
        app.command(name, help=line)(lambda: None)
    return app


def _run() -> None:
    """Run the application. An error about a path that cannot be used names the path."""
    try:
        try:
            build()(standalone_mode=True)
        finally:
            _flush()
    except BrokenPipeError:  # whoever read the output has seen enough
        sys.exit(1)
    except OSError as e:
        raise _store_error(e) from e


def _flush() -> None:
    """Write what is still buffered, while an error can still be reported. If that fails, it is not tried again."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


def _store_error(e: OSError) -> StoreError:
    """What the operating system refused, with the file or folder. If it names none: the line of code that asked."""
    if isinstance(e.filename, (str, bytes)):
        return StoreError(
            f"{os.fsdecode(e.filename)}: {e.strerror}", hint="check the path, its permissions and free disk space"
        )
    what = os.strerror(e.errno) if e.errno else "an input or output failed"
    return StoreError(
        f"{what} ({trace(e).rpartition(' > ')[2]})",
        hint="check free disk space and quotas, the limit on open files (ulimit -n), and where the output goes",
    )


_signals: list[int] = []  # those that came


def _unwind(number: int, _: object) -> NoReturn:
    """Leave as after an error, so that no unfinished file stays behind. The same signal again ends it at once."""
    signal.signal(number, signal.SIG_DFL)
    _signals.append(number)
    raise SystemExit(128 + number)


def main() -> None:
    """Entry point: a :class:`FedveilError` becomes two lines on stderr and its documented exit code.

    SIGTERM and SIGHUP end a command with 128 plus their number. Long-running commands have their own handlers.
    """
    try:
        _main()
    except BaseException:
        if _signals:  # a library in between may have made another error of it
            sys.exit(128 + _signals[0])
        raise


def _main() -> None:
    if sys.stdout is None:  # closed by whoever started this, who wants the exit code only
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:  # under nohup it is ignored, and stays so
            signal.signal(number, _unwind)
    try:
        _run()
    except FedveilError as e:
        from rich.console import Console
        from rich.markup import escape

        console = Console(stderr=True)
        console.print(f"[bold red]{e.code}[/]: {escape(e.message)}", highlight=False, soft_wrap=True)
        if e.hint:
            console.print("  what to do:", e.hint, markup=False, highlight=False, soft_wrap=True)
        if isinstance(e, PlanError) and e.nearest:
            nearest = ", ".join(f"{name} = {value}" for name, value in e.nearest.items())
            console.print("  the nearest that holds:", nearest, markup=False, highlight=False, soft_wrap=True)
        sys.exit(e.exit_code)
