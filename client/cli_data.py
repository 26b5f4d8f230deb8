"""``fedveil data``: sign the data contract, and check a site's table against it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="The data contract and a site's own table.", no_args_is_help=True)


@app.command("contract-sign")
def contract_sign(
    contract: Annotated[Path, typer.Argument(help="The draft, .toml or .json.")],
    key: Annotated[Path, typer.Option(help="The consortium's Ed25519 key (PEM, mode 0600).")],
    out: Annotated[Path, typer.Option(help="Where to write the signed contract (JSON); must not exist.")],
) -> None:
    """Check a draft contract and sign it for all sites."""
    from rich.console import Console

    from fedveil.common import canonical, identity
    from fedveil.common.contract import DataContract, sign_contract
    from fedveil.common.errors import UsageError

    draft = DataContract.load(contract)
    document = canonical.dumps(sign_contract(draft, identity.load_signing_key(key))) + b"\n"
    try:
        with out.open("xb") as f:
            f.write(document)
    except OSError as e:
        raise UsageError(f"{out} cannot be written: {e.strerror}", hint="name a new file") from e
    Console().print(f"signed {draft.name} {draft.version}: {draft.width} inputs, hash {draft.hash}", markup=False)


@app.command("check")
def check(
    table: Annotated[Path, typer.Argument(help="The site's table, .csv or .parquet.")],
    contract: Annotated[Path, typer.Option(help="The signed contract (JSON).")],
    signer_public: Annotated[str, typer.Option(help="The consortium's public key, 64 hexadecimal digits.")],
    work: Annotated[Path, typer.Option(help="Private folder of this site (mode 0700) for the reports.")],
) -> None:
    """Run the whole ingestion here: nothing leaves this machine. Exit code 0 means the table can be used."""
    from rich.console import Console
    from rich.table import Table

    from fedveil.client.ingest.lineage import site_secret
    from fedveil.client.ingest.pipeline import ingest
    from fedveil.common.contract import load_signed

    agreed = load_signed(contract, signer_public)
    result = ingest(table, agreed, work, secret=site_secret(work))
    lines = Table("check", "required", "result", title=f"{agreed.name} {agreed.version}")
    lines.add_row("types, bounds and values", "contract", "pass")
    for name, criterion in result.evidence["criteria"].items():
        lines.add_row(name, str(criterion["required"]), "pass" if criterion["met"] else "fail")
    factor = result.evidence["stability_factor"]
    lines.add_row("records changed by one record", "-", "not bounded" if factor is None else str(factor))
    Console().print(lines)
    Console().print(f"verified release and reports: {work}", markup=False, soft_wrap=True)
