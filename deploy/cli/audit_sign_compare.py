"""More of ``fedveil audit``: pages on paper, a site's signature and local report, single rows, two parties' copies."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from fedveil.common import canonical
from fedveil.common.errors import UsageError, VerificationError

Report = Annotated[Path, typer.Argument(help="report.json, or the run's folder.")]
_KEY_FILE = 257
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
PIN = "The consortium's public key (64 hex digits) or a file that holds it, from a trusted source."
Pin = Annotated[str | None, typer.Option(help=PIN)]
Lang = Annotated[str, typer.Option(help="Language: en or zh.")]


def pdf(
    report: Report,
    lang: Lang = "en",
    out: Annotated[Path | None, typer.Option(help="The PDF to write. By default beside the report.")] = None,
    consortium_key: Pin = None,
) -> None:
    """Print the page of a report as PDF (A4), by an installed headless Chromium. Exit code 60 if a check fails."""
    from fedveil.privacy.report import pdf as printing
    from fedveil.privacy.report.render import load, page_path, render_html
    from fedveil.privacy.report.verify import verify_report

    key = pinned(consortium_key)
    path = file_of(report)
    found = verify_report(path, consortium_key=key)
    target = out or page_path(path, lang).with_suffix(".pdf")
    printing.require_writable(target)
    with tempfile.TemporaryDirectory(
        prefix="print-", dir=target.parent
    ) as folder:  # the pages beside the report stay what they are
        page = Path(folder) / page_path(path, lang).name
        page.write_text(render_html(load(path), lang, found), encoding="utf-8")
        _say(f"{printing.print_page(page, target)}")
    found.raise_for_failure()


def sign(
    report: Report,
    key: Annotated[Path, typer.Option(help="The site's signing.key.")],
    consortium_key: Pin = None,
    ledger: Annotated[
        Path | None, typer.Option(help="The site's own ledger. Sign only if the report was made from it.")
    ] = None,
) -> None:
    """Verify a report and add this site's signature to signatures.json beside it."""
    from fedveil.common import identity
    from fedveil.deploy.ledger_file import require_file
    from fedveil.privacy.report.bundle import read_bounded
    from fedveil.privacy.report.countersign import countersign

    if ledger is not None:
        require_file(ledger)
    own = None if ledger is None else read_bounded(ledger, 1 << 28)
    site = countersign(file_of(report), identity.load_signing_key(key), pinned(consortium_key), own)
    _say(f"signed by {site}")


def row(
    proof: Annotated[Path, typer.Argument(help="A proof file, from 'fedveil ledger prove'.")],
    report: Annotated[Path, typer.Option(help="report.json, in one folder with roster.json.")],
    consortium_key: Pin = None,
) -> None:
    """Check one row against the journal's head that a report names. The other rows are not needed."""
    from fedveil.deploy.ledger_file import require_file
    from fedveil.privacy.report import row_proof

    require_file(proof, "'fedveil ledger prove' writes a proof")
    found = row_proof.check(proof, file_of(report), pinned(consortium_key))
    _say(f"row {found.n} of {found.owner} holds: {found.kind} {canonical.dumps(found.body).decode()}")


def compare(
    held: Annotated[Path, typer.Argument(help="The earlier copy: a journal, a site's peers.json, or a run's folder.")],
    shown: Annotated[Path, typer.Argument(help="The copy shown now, of one of these kinds.")],
    public: Annotated[
        str | None,
        typer.Option(
            help="The journal owner's public key (64 hex digits, or a file). Checks signatures of two journal files."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare two copies of journals: find a fork, a changed row or missing last rows. Exit code 60 if one is found."""
    from fedveil.deploy.ledger_file import require_file
    from fedveil.privacy.report import compare as comparing

    for side in (held, shown):
        if not side.is_dir():
            require_file(side, "give a journal, a site's peers.json, or the folder of a run")
    found = comparing.compare(held, shown, pinned(public, "--public"))
    if as_json:
        sys.stdout.write(canonical.dumps(comparing.to_json(found)).decode() + "\n")
    else:
        from rich.console import Console
        from rich.table import Table

        table = Table("journal", "verdict", "row", "found", header_style="bold")
        for f in found:
            colour = "bold red" if f.bad else "green"
            table.add_row(
                plain(f.owner), f"[{colour}]{f.verdict}[/]", "-" if f.row is None else str(f.row), plain(f.detail)
            )
        console = Console(highlight=False)
        console.print(table)
        if unchecked := [f.owner for f in found if f.signatures is False]:
            console.print(
                f"[yellow]Signatures were NOT checked[/] ({plain(', '.join(unchecked))}): only the chains of hashes, "
                "which anybody could have made. Name the owner's key with --public."
            )
    if bad := next((f for f in found if f.bad), None):
        raise VerificationError(f"{bad.owner}: {bad.verdict}: {bad.detail}", hint="keep both copies as evidence")


def local(
    folder: Annotated[Path, typer.Argument(help="The site's private work folder, with quality.json and lineage.json.")],
    ledger: Annotated[Path, typer.Option(help="The site's ledger (ledger.jsonl).")],
    report: Annotated[Path | None, typer.Option(help="The federation's report.json, if there is one.")] = None,
    public: Annotated[str | None, typer.Option(help="The site's public key. Checks the ledger's signatures.")] = None,
) -> None:
    """Write the site's own report (quality, loss, risk, counts) into its work folder. It stays at the site."""
    from fedveil.common.journal import parse, verify_rows
    from fedveil.deploy.ledger_file import require_file
    from fedveil.privacy.report import local as locals_
    from fedveil.privacy.report.bundle import read_bounded

    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder", hint="give the work folder that holds the site's quality.json")
    require_file(ledger)
    rows = parse(read_bounded(ledger, 1 << 28))
    if not rows:
        raise VerificationError(f"{ledger} is empty", hint="name the ledger.jsonl of a site that took part in a run")
    if (key := pinned(public, "--public")) is not None:
        verify_rows(rows, key, owner=rows[0].owner)
    path = None if report is None else file_of(report)
    quasi = [] if path is None else locals_.quasi_identifiers(path.parent)
    for written in locals_.write(folder, locals_.collect(folder, rows, path, quasi)):
        _say(f"{written}")


def schema() -> None:
    """Print the JSON schema of report.json."""
    from fedveil.privacy.report.schema import schema as published

    sys.stdout.write(canonical.dumps(published()).decode() + "\n")


def file_of(report: Path) -> Path:
    """The report's file, given it or its folder.

    Raises:
        UsageError: there is no such file.
    """
    from fedveil.deploy.ledger_file import require_file
    from fedveil.privacy.report.bundle import REPORT

    path = report / REPORT if report.is_dir() else report
    require_file(path, "give report.json, or the folder of a finished run")
    return path


def pinned(value: str | None, option: str = "--consortium-key") -> str | None:
    """A key given as digits or as the file that holds them, lower-case; None if none was given.

    Raises:
        UsageError: it is neither. A file without a key in it is not "no key": who names one wants it used.
    """
    from fedveil.common import fields

    if value is None:
        return None
    try:
        path = Path(value)
        held = path.read_bytes()[:_KEY_FILE] if path.is_file() and path.stat().st_size < _KEY_FILE else value.encode()
        return fields.public_key(held.decode("ascii"), option)
    except (OSError, ValueError, VerificationError) as e:
        raise UsageError(
            f"{option} is not a public key: 64 hexadecimal digits, or a file that holds only these",
            hint=f"ask the {'consortium' if option == '--consortium-key' else 'owner'} for the key again",
        ) from e


def plain(text: str) -> str:
    """Text of a report as text: no markup, no control characters reach the terminal."""
    return "".join(c if c.isprintable() else " " for c in text).replace("[", "\\[")


def _say(text: str) -> None:
    from rich.console import Console

    Console().print("".join(c if c.isprintable() else " " for c in text), markup=False, highlight=False, soft_wrap=True)
