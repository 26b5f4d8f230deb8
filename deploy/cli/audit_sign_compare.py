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
Lang = Annotated[str, typer.Option(help="en or zh")]


def pdf(
    report: Report,
    lang: Lang = "en",
    out: Annotated[Path | None, typer.Option(help="The PDF.")] = None,
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
        Path | None, typer.Option(help="The site's own ledger: signed only if the report was made from it.")
    ] = None,
) -> None:
    """Verify a report and add this site's signature under it, in signatures.json beside it."""
    from fedveil.common import identity
    from fedveil.privacy.report.bundle import read_bounded
    from fedveil.privacy.report.countersign import countersign

    own = None if ledger is None else read_bounded(ledger, 1 << 28)
    site = countersign(file_of(report), identity.load_signing_key(key), pinned(consortium_key), own)
    _say(f"signed by {site}")


def row(
    proof: Annotated[Path, typer.Argument(help="A proof file, from 'fedveil ledger prove'.")],
    report: Annotated[Path, typer.Option(help="report.json beside its roster.json.")],
    consortium_key: Pin = None,
) -> None:
    """Check that one row stands in the journal that a report names, without the rest of that journal."""
    from fedveil.privacy.report import row_proof

    found = row_proof.check(proof, file_of(report), pinned(consortium_key))
    _say(f"row {found.n} of {found.owner} holds: {found.kind} {canonical.dumps(found.body).decode()}")


def compare(
    held: Annotated[
        Path, typer.Argument(help="What was held earlier: a journal, a site's peers.json, a run's folder.")
    ],
    shown: Annotated[Path, typer.Argument(help="What is shown now: one of the same.")],
    public: Annotated[str | None, typer.Option(help="The owner's public key, for two files of one journal.")] = None,
    as_json: Json = False,
) -> None:
    """Find a fork, a rewritten row or a cut tail between two copies. Exit code 0 if there is none, 60 if there is."""
    from fedveil.privacy.report import compare as comparing

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
                "which anybody can make anew. Name the owner's key with --public."
            )
    if bad := next((f for f in found if f.bad), None):
        raise VerificationError(f"{bad.owner}: {bad.verdict}: {bad.detail}", hint="keep both copies as evidence")


def local(
    folder: Annotated[
        Path, typer.Argument(help="The site's private folder of ingestion (quality.json, lineage.json).")
    ],
    ledger: Annotated[Path, typer.Option(help="The site's ledger (ledger.jsonl).")],
    report: Annotated[Path | None, typer.Option(help="The federation's report.json, if there is one.")] = None,
    public: Annotated[str | None, typer.Option(help="The site's public key: checks the ledger.")] = None,
) -> None:
    """Write the site's own report (quality, loss, risk, counts). It stays at the site: mode 0600."""
    from fedveil.common.journal import parse, verify_rows
    from fedveil.privacy.report import local as locals_
    from fedveil.privacy.report.bundle import read_bounded

    if not folder.is_dir():
        raise UsageError(f"{folder} is no folder", hint="the site's folder of ingestion, with quality.json in it")
    rows = parse(read_bounded(ledger, 1 << 28))
    if not rows:
        raise VerificationError(f"{ledger} is empty")
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
    """The report's file, given it or its folder."""
    from fedveil.privacy.report.bundle import REPORT

    return report / REPORT if report.is_dir() else report


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
            f"{option} is neither 64 hexadecimal digits nor a small file that holds them and nothing else",
            hint="ask the consortium for its key again" if option == "--consortium-key" else "",
        ) from e


def plain(text: str) -> str:
    """Text of a report as text: no markup, no control characters reach the terminal."""
    return "".join(c if c.isprintable() else " " for c in text).replace("[", "\\[")


def _say(text: str) -> None:
    from rich.console import Console

    Console().print("".join(c if c.isprintable() else " " for c in text), markup=False, highlight=False, soft_wrap=True)
