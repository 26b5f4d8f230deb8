"""``fedveil data contract``: draft, sign and check the agreement."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedveil.common.cli import Group
from fedveil.deploy.cli.data_source import DelimiterOption, EncodingOption, cells

app = typer.Typer(cls=Group, help="The data contract: draft it from a sample, sign it, check it.", no_args_is_help=True)


@app.command("init")
def init(
    sample: Annotated[Path, typer.Argument(help="A sample of the table: .csv, .parquet or .arrow.")],
    out: Annotated[Path, typer.Option(help="The new file for the draft (.toml).")],
    name: Annotated[str, typer.Option(help="The contract's name.")] = "data",
    ask: Annotated[bool, typer.Option(help="Ask for every column's role, or leave all roles empty.")] = True,
    encoding: EncodingOption = "auto",
    delimiter: DelimiterOption = "auto",
) -> None:
    """Draft a contract from a sample. Roles are asked for, never guessed. Fill in empty ones before signing."""
    from rich.console import Console

    from fedveil.client.records.judge import draft, profile
    from fedveil.client.records.read.source_options import dialect_of
    from fedveil.common.errors import UsageError

    found = profile.profile(sample, dialect_of(encoding, delimiter, ".", ""))

    def asked(column: profile.ColumnProfile) -> str:
        if not ask:
            return ""
        typer.echo(f"\n{column.name}: looks like {column.looks_like}" + "".join(f"; {r}" for r in column.remarks))
        while True:
            role = typer.prompt(f"  role ({', '.join(draft.ROLES)}; empty: undecided)", default="", show_default=False)
            if role in ("", *draft.ROLES):
                return role
            typer.echo("  that is no role")

    text = draft.draft(found, name, asked)
    try:
        with out.open("x", encoding="utf-8") as f:
            f.write(text)
    except OSError as e:
        raise UsageError(f"{out} cannot be written: {e.strerror}", hint="name a new file") from e
    left = text.count('\nrole = ""\n')
    Console().print(
        f"draft in {out}: {left} of {len(found.columns)} columns still have no role", markup=False, soft_wrap=True
    )


@app.command("sign")
def sign(
    contract: Annotated[Path, typer.Argument(help="The draft, .toml or .json.")],
    key: Annotated[Path, typer.Option(help="The consortium's Ed25519 key (PEM, mode 0600).")],
    out: Annotated[Path, typer.Option(help="The new file for the signed contract (JSON).")],
) -> None:
    """Check a draft contract and sign it for all sites."""
    from rich.console import Console

    from fedveil.common import canonical, identity
    from fedveil.common.contract import DataContract, sign_contract
    from fedveil.common.errors import UsageError

    draft = DataContract.load(contract)
    draft.require_current()
    document = canonical.dumps(sign_contract(draft, identity.load_signing_key(key))) + b"\n"
    try:
        with out.open("xb") as f:
            f.write(document)
    except OSError as e:
        raise UsageError(f"{out} cannot be written: {e.strerror}", hint="name a new file") from e
    Console().print(f"signed {draft.name} {draft.version}: {draft.width} inputs, hash {draft.hash}", markup=False)


@app.command("check")
def check(
    contract: Annotated[
        Path, typer.Argument(help="A draft (.toml, .json), or a signed contract with --signer-public.")
    ],
    signer_public: Annotated[str, typer.Option(help="The consortium's public key, 64 hexadecimal digits.")] = "",
) -> None:
    """Check a contract and say what it means: inputs, criteria, and how many rows one record can change."""
    from rich.console import Console
    from rich.table import Table

    from fedveil.client.records.judge import stages
    from fedveil.common.contract import DataContract, load_signed

    agreed = load_signed(contract, signer_public) if signer_public else DataContract.load(contract)
    agreed.require_current()
    console = Console()
    columns = Table(
        "column", "role", "type", "released as", "inputs", title=cells(f"{agreed.name} {agreed.version}")[0]
    )
    for c in agreed.columns:
        released = (
            "-" if not c.loaded else f"{len(c.labels)} labels" if c.coded else f"{c.low:g} to {c.high:g} {c.unit}"
        )
        columns.add_row(*cells(c.name, c.role, c.type or "-", released, len(c.feature_names)))
    console.print(columns)
    steps = stages.stability(agreed)
    factor = stages.total(steps)
    console.print(
        f"k = {agreed.k}, l = {agreed.l}, t = {agreed.t if agreed.t is not None else '-'}; {agreed.width} inputs, "
        f"{agreed.classes} classes; one record changes "
        + ("a number of released rows that is not bounded" if factor is None else f"at most {factor} released rows")
        + (f"; k counts persons, with up to {agreed.rows_per_person} rows each" if agreed.rows_per_person else ""),
        markup=False, soft_wrap=True,
    )  # fmt: skip
    for step in steps:
        if step.factor != 1:
            console.print(f"  {step.stage}: {step.factor or 'not bounded'} ({step.why})", markup=False, soft_wrap=True)
    signature = "signature holds" if signer_public else "not signed: --signer-public was not given"
    console.print(f"{signature}; hash {agreed.hash}", markup=False, soft_wrap=True)
