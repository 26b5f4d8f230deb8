"""``fedveil audit``: check a report, write it again from its journals, show it."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedveil.common import canonical
from fedveil.common.cli import Group
from fedveil.common.errors import UsageError
from fedveil.deploy.cli import audit_evidence as measured
from fedveil.deploy.cli import audit_sign_compare
from fedveil.deploy.cli.audit_readd import readd
from fedveil.deploy.cli.audit_sign_compare import plain

if TYPE_CHECKING:
    from fedveil.privacy.report.verify import Verification

app = typer.Typer(
    cls=Group, no_args_is_help=True, help="Check a privacy report from its journals alone, or write it again."
)

_SHOWN = 24


@app.command()
def verify(
    report: Annotated[Path, typer.Argument(help="report.json in the folder of its run, or that folder.")],
    consortium_key: audit_sign_compare.Pin = None,
    require_signatures: Annotated[
        int, typer.Option(min=0, help="Fail unless at least so many sites signed this very report.")
    ] = 0,
    auditor: Annotated[
        str | None,
        typer.Option(
            help="SHA-256 fingerprint (64 hex digits) of an auditor's key. Fail unless its audit is attached."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the checks as JSON.")] = False,
) -> None:
    """Recompute everything that the report claims. Exit code 0 if every check passed, 60 if not."""
    from fedveil.privacy.report.verify import verify_report

    path = audit_sign_compare.file_of(report)
    key = audit_sign_compare.pinned(consortium_key)
    if auditor is not None and not re.fullmatch("[0-9a-fA-F]{64}", auditor):
        raise UsageError(
            "--auditor takes a fingerprint of 64 hexadecimal digits",
            hint="the auditor names it; 'fedveil audit verify' prints the one of an attached audit",
        )
    result = verify_report(path, consortium_key=key, require_signatures=require_signatures, auditor=auditor)
    if as_json:
        sys.stdout.write(canonical.dumps(result.to_json()).decode() + "\n")
    else:
        _show(result)
    result.raise_for_failure()


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="The run's folder.")],
    key: Annotated[Path | None, typer.Option(help="The server's signing.key. A simulated run holds its own.")] = None,
    audit: Annotated[
        list[Path] | None,
        typer.Option(help="Result of an empirical audit (JSON), to be kept in RUN/audit.json. May be repeated."),
    ] = None,
) -> None:
    """Write RUN/report.json again from the journals of the run, and its pages and cards beside it."""
    from fedveil.common import identity
    from fedveil.deploy.ledger_file import require_file
    from fedveil.privacy.report.build import build_report
    from fedveil.privacy.report.bundle import REPORT, SIMULATED_KEY
    from fedveil.privacy.report.results import attach
    from fedveil.privacy.report.signatures import SIGNATURES

    if not run.is_dir():
        raise UsageError(f"{run} is not a folder", hint="give the folder of a run that has ended")
    found = key or run / SIMULATED_KEY
    if key is None and not found.exists():
        raise UsageError(
            f"{run} does not hold the server's key, which signs the report", hint="give --key SERVER/signing.key"
        )
    for file in audit or ():
        require_file(file, "'fedveil audit conformance --json' and 'one-run --json' print such results")
    if audit is not None:
        attach(run, audit)
    signed = (run / SIGNATURES).exists()
    build_report(run, identity.load_signing_key(found))
    if signed:
        typer.echo(f"the sites signed the report before this one ({SIGNATURES}.old): 'fedveil audit sign' signs again")
    render(run / REPORT)


@app.command()
def render(
    report: Annotated[Path, typer.Argument(help="report.json, or the run's folder.")],
    lang: Annotated[str, typer.Option(help="Language of the page: en, zh or all.")] = "all",
    consortium_key: audit_sign_compare.Pin = None,
) -> None:
    """Write report.html (English), report.zh.html (Chinese) and the cards. Exit code 60 if a check fails."""
    from rich.console import Console

    from fedveil.privacy.report.catalogue import LANGUAGES
    from fedveil.privacy.report.render import page_path, render_report
    from fedveil.privacy.report.verify import verify_report

    path, langs = audit_sign_compare.file_of(report), LANGUAGES if lang == "all" else (lang,)
    found = verify_report(path, consortium_key=audit_sign_compare.pinned(consortium_key))
    render_report(path, langs, verification=found)
    for x in langs:
        Console().print(f"{page_path(path, x)}", markup=False, highlight=False, soft_wrap=True)
    found.raise_for_failure()


def _show(result: Verification) -> None:
    from rich.console import Console
    from rich.table import Table

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
            "[green]ok[/]" if c.passed else "[bold red]FAILED[/]", plain(c.name), plain(c.compared), plain(c.detail)
        )
    console.print(table)
    console.print(plain(f"{result.passed} of {len(result.checks)} checks passed; recomputed with:"))
    for accountant in result.accountants:
        console.print(f"  {plain(accountant)}")
    for c in result.failures:
        console.print(f"[bold red]MISMATCH[/] {plain(c.name)}: {plain(c.detail)}")
    if ledgers > _SHOWN:
        console.print(f"{ledgers - _SHOWN} more ledgers passed and are not listed.")
    if not result.ok:
        return
    if result.simulated:
        console.print("[bold red]SIMULATED[/]: the run protected nobody; its numbers are for study only.")
    console.print("[bold green]Every check passed.[/]", plain(result.claim))
    console.print(plain(f"Signed by the server, and by {len(result.countersigned)} of {result.sites} sites."))
    for part, fingerprint in result.auditors.items():
        by = f"signed by the auditor's key with SHA-256 {fingerprint}" if fingerprint else "unsigned"
        console.print(f"Attached audit, {part.replace('_', '-')}: {by}.", soft_wrap=True)
    console.print("report.json and the journals were checked. Its pages and cards were not.")
    if not result.pinned:
        console.print(
            "[yellow]The consortium's key was taken from the bundle.[/] Whoever forged the other files could have "
            "forged it too: give --consortium-key from a source you trust."
        )


for _command in (
    audit_sign_compare.pdf,
    audit_sign_compare.sign,
    audit_sign_compare.row,
    audit_sign_compare.compare,
    audit_sign_compare.local,
    audit_sign_compare.schema,
    readd,
):
    app.command()(_command)
for _command in (measured.attacks, measured.conformance, measured.one_run):
    app.command()(_command)
