"""``fedveil data``: a site's own table, from a first look to a verified release. Nothing here touches the network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedveil.common.cli import Group
from fedveil.deploy.cli import data_contract as cli_contract
from fedveil.deploy.cli.data_source import (
    ContractOption,
    CorrectionsOption,
    DecimalOption,
    DelimiterOption,
    EncodingOption,
    FhirOption,
    QueryOption,
    SignerOption,
    TableArgument,
    ThousandsOption,
    UrlOption,
    WorkOption,
    cells,
    progress_of,
)

if TYPE_CHECKING:
    from fedveil.client.records.release.pipeline import Ingested

app = typer.Typer(cls=Group, help="The data contract and a site's own table.", no_args_is_help=True)
app.add_typer(cli_contract.app, name="contract")
app.command("contract-sign", hidden=True)(cli_contract.sign)


@app.command("profile")
def profile(
    table: Annotated[Path, typer.Argument(help="A table: .csv, .tsv, .parquet or .arrow.")],
    encoding: EncodingOption = "auto",
    delimiter: DelimiterOption = "auto",
    out: Annotated[Path | None, typer.Option(help="Write the profile to this new file (JSON, mode 0600).")] = None,
) -> None:
    """Describe the columns of a table. No contract is needed, and no value is shown."""
    from rich.console import Console
    from rich.table import Table

    from fedveil.client.records.judge.profile import profile as profiled
    from fedveil.client.records.read.source_options import dialect_of
    from fedveil.common.identity import write_secret

    with progress_of(table) as progress:
        found = profiled(table, dialect_of(encoding, delimiter, ".", ""), progress)
    if out is not None:
        write_secret(out, found.to_json().encode())
    lines = Table("column", "looks like", "empty", "distinct", "look at", title=f"{found.rows} rows")
    for c in found.columns:
        lines.add_row(*cells(c.name, c.looks_like, c.empty, c.distinct, "; ".join(c.remarks)))
    Console().print(lines)


@app.command("check")
def check(
    table: TableArgument,
    contract: ContractOption,
    signer_public: SignerOption,
    work: WorkOption,
    encoding: EncodingOption = "auto",
    delimiter: DelimiterOption = "auto",
    decimal: DecimalOption = ".",
    thousands: ThousandsOption = "",
    query: QueryOption = "",
    url_file: UrlOption = None,
    fhir: FhirOption = None,
    corrections: CorrectionsOption = None,
    against: Annotated[
        Path | None, typer.Option(help="Work folder of an earlier check. Reports which columns have moved since.")
    ] = None,
    against_public: Annotated[
        str,
        typer.Option(
            help="Public key that signed the earlier check's lineage record. Without it, who made it is not checked."
        ),
    ] = "",
) -> None:
    """Run the whole ingestion on this machine; nothing leaves it. Exit code 0 if the table can be used."""
    from rich.console import Console

    from fedveil.client.records.judge import drift
    from fedveil.client.records.read.source_options import dialect_of, source_of

    dialect = dialect_of(encoding, delimiter, decimal, thousands)
    before = drift.earlier(against, against_public) if against else None
    source = source_of(table, query, url_file, fhir)
    result = _ingest(source, contract, signer_public, work, dialect, corrections, before)
    _show(result.evidence, "types, bounds and values")
    _notes(result.report.notes)
    Console().print(f"verified release and reports: {work}", markup=False, soft_wrap=True)


def _ingest(
    source: Any,
    contract: Path,
    signer_public: str,
    work: Path,
    dialect: Any,
    corrections: Path | None,
    before: dict[str, Any] | None = None,
) -> Ingested:
    from fedveil.client.records.lineage import site_secret
    from fedveil.client.records.read import corrections as declared
    from fedveil.client.records.read.sources import Rules
    from fedveil.client.records.release.pipeline import ingest
    from fedveil.common.contract import load_signed

    agreed = load_signed(contract, signer_public)
    secret = site_secret(work)
    own = declared.load(corrections) if corrections else ()
    with progress_of(source) as progress:
        rules = Rules(own, secret, progress=progress)
        return ingest(source, agreed, work, secret=secret, dialect=dialect, rules=rules, before=before)


def _show(evidence: dict[str, Any], first: str) -> None:
    from rich.console import Console
    from rich.table import Table

    lines = Table("check", "required", "result")
    lines.add_row(first, "contract", "pass")
    for name, criterion in evidence["criteria"].items():
        lines.add_row(*cells(name, criterion["required"], "pass" if criterion["met"] else "fail"))
    factor = evidence["stability_factor"]
    lines.add_row("records changed by one record", "-", "not bounded" if factor is None else str(factor))
    Console().print(lines)


def _notes(notes: Sequence[str]) -> None:
    from rich.console import Console

    for note in notes:
        Console().print(f"note: {note}", markup=False, soft_wrap=True)


@app.command("anonymize")
def anonymize(
    table: TableArgument,
    contract: ContractOption,
    signer_public: SignerOption,
    work: WorkOption,
    method: Annotated[
        str, typer.Option(help="Recoding: fixed (the contract's levels), auto, mondrian, optimal or peel.")
    ] = "fixed",
    out: Annotated[
        Path | None, typer.Option(help="The new release, .csv or .parquet. By default in the work folder.")
    ] = None,
    encoding: EncodingOption = "auto",
    delimiter: DelimiterOption = "auto",
    decimal: DecimalOption = ".",
    thousands: ThousandsOption = "",
    query: QueryOption = "",
    url_file: UrlOption = None,
    fhir: FhirOption = None,
    corrections: CorrectionsOption = None,
) -> None:
    """Check a table, recode it until the contract's k, l and t hold, write it, and verify what was written."""
    from rich.console import Console

    from fedveil.client.records.read.source_options import dialect_of, source_of

    dialect = dialect_of(encoding, delimiter, decimal, thousands)
    source = source_of(table, query, url_file, fhir)
    if method == "fixed" and out is None:
        result = _ingest(source, contract, signer_public, work, dialect, corrections)
        _show(result.evidence, "types, bounds and values")
        _notes(result.report.notes)
        Console().print(f"verified release: {result.released}", markup=False, soft_wrap=True)
        return
    _anonymize_by(method, source, contract, signer_public, work, out or work / "anonymized.csv", dialect, corrections)


def _anonymize_by(
    method: str, source: Any, contract: Path, signer: str, work: Path, out: Path, dialect: Any, corrections: Path | None
) -> None:
    from typing import get_args

    from fedveil.client.records import lineage
    from fedveil.client.records.read import corrections as declared
    from fedveil.client.records.read.sources import Rules
    from fedveil.client.records.release import publish
    from fedveil.common.contract import load_signed
    from fedveil.common.errors import UsageError
    from fedveil.privacy.anonymization.anonymizer import Method

    if method not in get_args(Method):
        raise UsageError(f"method {method[:32]!r} is unknown", hint=f"one of {', '.join(get_args(Method))}")
    agreed = load_signed(contract, signer)
    secret = lineage.site_secret(work)
    with progress_of(source) as progress:
        rules = Rules(declared.load(corrections) if corrections else (), secret, progress=progress)
        published = publish.publish(
            source, agreed, work, method, out,  # pyright: ignore[reportArgumentType]
            secret=secret, dialect=dialect, rules=rules,
        )  # fmt: skip
    done = published.release
    _notes(published.report.notes)
    _findings(done.findings)
    _outcome(done.outcome, done.stability, done.path)


def _findings(found: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    lines = Table("criterion", "column", "required", "result", "worst class")
    for f in found.findings:
        lines.add_row(*cells(f.name, f.column or "-", f.required, "pass" if f.met else "fail", f"{f.worst:.4g}"))
    Console().print(lines)


@app.command("anonymize-parquet")
def anonymize_parquet(
    table: Annotated[Path, typer.Argument(help="A Parquet file of any length. It is read piece by piece.")],
    out: Annotated[Path, typer.Argument(help="The new release, .parquet.")],
    spec: Annotated[Path, typer.Option(help="TOML file with the columns' roles and the criteria (docs/data.md).")],
) -> None:
    """Anonymise a Parquet table that has no contract, and verify what was written."""
    from fedveil.client.records.release import anonymize as release
    from fedveil.privacy.anonymization import spec_file
    from fedveil.privacy.anonymization.stability import stability
    from fedveil.privacy.anonymization.stream import anonymize_parquet

    release.require_new(out, (".parquet",))
    task = spec_file.load(spec)
    done = anonymize_parquet(
        table, out, task.spec, task.models, method=task.method, suppression_limit=task.suppression_limit
    )
    _findings(done.findings)
    _outcome(done.outcome, stability(task.method, task.models, suppression_limit=task.suppression_limit), out)


def _outcome(found: Any, stability: Any, path: Path) -> None:
    from rich.console import Console

    lines = (
        f"{found.method}: {found.suppressed} of {found.rows} rows suppressed, {found.classes} classes, "
        f"information loss {found.ncp:.4f}",
        stability.sentence,
        f"verified release: {path}",
    )
    for line in lines:
        Console().print(line, markup=False, soft_wrap=True)


@app.command("verify")
def verify(
    released: Annotated[Path, typer.Argument(help="A released table, .csv or .parquet.")],
    contract: ContractOption,
    signer_public: SignerOption,
) -> None:
    """Read a released table again and check every criterion of the contract on it, however it was made."""
    from fedveil.client.records.release import anonymize as release
    from fedveil.common.contract import load_signed

    _findings(release.verify(released, load_signed(contract, signer_public)))


@app.command("risk")
def risk(
    released: Annotated[Path, typer.Argument(help="A released table, .csv or .parquet.")],
    contract: ContractOption,
    signer_public: SignerOption,
) -> None:
    """Estimate the re-identification risk of a released table. The figures stay at the site."""
    from rich.console import Console
    from rich.table import Table

    from fedveil.client.records.release import anonymize as release
    from fedveil.common.contract import load_signed

    found = release.risk(released, load_signed(contract, signer_public))
    lines = Table("attacker", "risk", title=f"{found.rows} rows in {found.classes} classes")
    lines.add_row("prosecutor: highest", f"{found.prosecutor:.4f}")
    lines.add_row("journalist: at most", f"{found.prosecutor:.4f}")
    lines.add_row("marketer: expected share", f"{found.marketer:.4f}")
    lines.add_row("rows alone in their class", f"{found.unique:.4f}")
    Console().print(lines)


@app.command("report")
def report(
    work: Annotated[Path, typer.Argument(help="The work folder of an earlier 'check' or 'anonymize'.")],
    public: Annotated[
        str,
        typer.Option(
            help="The site's public key, if the site's own key signed the lineage record. By default the folder's key."
        ),
    ] = "",
) -> None:
    """Show the quality report of a work folder, and check that report and release are unchanged."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from fedveil.client.records.release import pipeline, publish

    quality, vouched = publish.reports(work, public)
    console = Console()
    stages = Table("stage", "rows", "left", "found", title="stages")
    for s in quality["stages"]:
        stages.add_row(
            *cells(*(s.get(key, "") for key in ("stage", "rows", "left")), s.get("found", s.get("cells", "")))
        )
    console.print(stages)
    columns = Table(*map(escape, quality["columns"][0]), title="columns")
    for c in quality["columns"]:
        columns.add_row(*cells(*c.values()))
    console.print(columns)
    if quality["drift"]:
        moves = Table(*map(escape, quality["drift"][0]), title="against the earlier table")
        for d in quality["drift"]:
            moves.add_row(*cells(*("-" if v is None else v for v in d.values())))
        console.print(moves)
    for p in quality["problems"]:
        console.print(f"{p['code']}: {p['column']}: {p['cells']} cells {p['what']}: {p['remedy']}", markup=False)
    for note in quality["notes"]:
        console.print(f"note: {note}", markup=False)
    console.print(vouched, markup=False, soft_wrap=True)
    console.print(f"with plots: {work / pipeline.QUALITY_HTML}", markup=False, soft_wrap=True)
