"""``fedveil audit``: check a report, write it again from its journals, show it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from fedveil.common import canonical, identity
from fedveil.common.errors import UsageError
from fedveil.privacy.report.build import build_report
from fedveil.privacy.report.bundle import REPORT
from fedveil.privacy.report.verify import Verification, verify_report

app = typer.Typer(no_args_is_help=True, help="Check a privacy report from its journals alone, or write it again.")

_SHOWN = 24


@app.command()
def verify(
    report: Annotated[Path, typer.Argument(help="report.json, beside the files of its run; or that folder.")],
    consortium_key: Annotated[
        str | None,
        typer.Option(
            help="The consortium's public key (64 hex digits) or a file that holds it, from a trusted source."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the checks as JSON.")] = False,
) -> None:
    """Recompute everything the report claims. Exit code 0 if every check passed, 60 if not."""
    path = report / REPORT if report.is_dir() else report
    result = verify_report(path, consortium_key=_key(consortium_key))
    if as_json:
        sys.stdout.write(canonical.dumps(result.to_json()).decode() + "\n")
    else:
        _show(result)
    result.raise_for_failure()


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="The run's folder.")],
    key: Annotated[Path, typer.Option(help="The server's signing key.")],
) -> None:
    """Write RUN/report.json again from the journals of the run, and RUN/report.html beside it."""
    build_report(run, identity.load_signing_key(key))
    render(run / REPORT)


@app.command()
def render(report: Annotated[Path, typer.Argument(help="report.json")]) -> None:
    """Write report.html beside report.json."""
    try:
        from fedveil.privacy.report.render import render_report  # an auditor needs no jinja2
    except ModuleNotFoundError as e:
        raise UsageError(f"rendering needs {e.name}", hint="pip install 'fedveil[server]'") from e
    Console().print(f"{render_report(report)}", markup=False, highlight=False, soft_wrap=True)


def _key(value: str | None) -> str | None:
    """A key given as digits or as the file that holds them."""
    if value is None or len(value.strip()) == 64:
        return value
    path = Path(value)
    if not path.is_file() or path.stat().st_size > 256:
        raise UsageError("--consortium-key is neither 64 hexadecimal digits nor a small file that holds them")
    return path.read_text(encoding="ascii", errors="replace").strip()


def _show(result: Verification) -> None:
    console = Console(highlight=False)
    table = Table(title="fedveil audit verify", title_justify="left", show_lines=False, header_style="bold")
    for name in ("", "check", "what was compared", "found"):
        table.add_column(name, overflow="fold")
    ledgers = 0
    for c in result.checks:
        ledgers += c.passed and c.name.startswith("ledger of ")
        if c.passed and c.name.startswith("ledger of ") and ledgers > _SHOWN:
            continue
        table.add_row(
            "[green]ok[/]" if c.passed else "[bold red]FAILED[/]", _plain(c.name), _plain(c.compared), _plain(c.detail)
        )
    console.print(table)
    if ledgers > _SHOWN:
        console.print(f"{ledgers - _SHOWN} more ledgers passed and are not listed.")
    if not result.ok:
        return
    if result.simulated:
        console.print("[bold red]SIMULATED[/]: the run protected nobody; its numbers are for study only.")
    console.print("[bold green]Every check passed.[/]", _plain(result.claim))
    if not result.pinned:
        console.print(
            "[yellow]The consortium's key was taken from the bundle.[/] Whoever made all of its files could have made "
            "it too: give --consortium-key from a source you trust."
        )


def _plain(text: str) -> str:
    """Text of a report as text: no markup, no control characters reach the terminal."""
    return "".join(c if c.isprintable() else " " for c in text).replace("[", "\\[")
