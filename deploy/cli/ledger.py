"""``fedveil ledger``: read a site's budget. Only ``import`` writes to a ledger, and only ever adds to what is spent."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fedveil.common import canonical
from fedveil.common.cli import Group
from fedveil.common.errors import UsageError

app = typer.Typer(cls=Group, no_args_is_help=True, help="A site's privacy ledger: what was spent, what is left.")

File = Annotated[Path, typer.Argument(help="A site's ledger (ledger.jsonl).")]
KEY = "The site's public key: 64 hex digits, or a roster.json that names it."
Public = Annotated[str | None, typer.Option(help=f"{KEY} With it, signatures are checked.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def show(file: File, public: Public = None, as_json: Json = False) -> None:
    """Show lineage, cap, ε spent and left, and what each session cost."""
    from fedveil.deploy.ledger_file import read_rows, summary

    rows = read_rows(file, public)
    found = summary(rows, checked=public is not None)
    if as_json:
        sys.stdout.write(canonical.dumps(found).decode() + "\n")
        return
    _show(found)


@app.command()
def verify(
    file: File,
    public: Annotated[str, typer.Option(help=KEY)],
    as_json: Json = False,
) -> None:
    """Check numbers, hash chain and signatures, and that the cap was never exceeded. Exit code 60 if a check fails."""
    from rich.console import Console

    from fedveil.deploy.ledger_file import read_rows, summary

    found = summary(read_rows(file, public), checked=True)
    if as_json:
        sys.stdout.write(canonical.dumps(found).decode() + "\n")
        return
    Console(highlight=False).print(
        f"{found['head'][0]} rows, chain and signatures hold; filter ε = {found['epsilon_spent']:.4f} "
        f"of {found['cap_epsilon']:g}; head {found['head'][1]}",
        markup=False, soft_wrap=True,
    )  # fmt: skip


@app.command()
def export(
    file: File,
    public: Public = None,
    out: Annotated[Path | None, typer.Option(help="The new file to write. By default standard output.")] = None,
) -> None:
    """Print the ledger as one JSON document: summary, head and every row. All of it may leave the site."""
    from fedveil.deploy.ledger_file import read_rows, summary

    rows = read_rows(file, public)
    document = {
        "v": 1,
        "summary": summary(rows, checked=public is not None),
        "rows": [canonical.loads(r.line()) for r in rows],
    }
    data = canonical.dumps(document) + b"\n"
    if out is None:
        sys.stdout.write(data.decode())
        return
    _write_new(out, data)


@app.command()
def prove(
    file: File,
    row: Annotated[int, typer.Argument(help="The row's number, from 0.")],
    out: Annotated[Path, typer.Option(help="The new file for the proof.")],
    rows: Annotated[
        int | None,
        typer.Option(help="Prove it for the first ROWS rows: the number that the report names. By default all."),
    ] = None,
) -> None:
    """Write a proof that one row stands in this ledger. 'fedveil audit row' checks it without the other rows."""
    from fedveil.deploy.ledger_file import require_file
    from fedveil.privacy.report.row_proof import prove as proof_of

    require_file(file)
    _write_new(out, canonical.dumps(proof_of(file, row, rows)) + b"\n")


@app.command("import")
def import_(
    file: Annotated[
        Path, typer.Argument(help="The older ledger (ledger.jsonl). With --lost: a peers.json or joins.json.")
    ],
    into: Annotated[
        Path, typer.Option(help="The ledger that counts its spending from now on. A run must have opened it.")
    ],
    key: Annotated[Path, typer.Option(help="The signing.key of the site that owns --into.")],
    public: Annotated[str, typer.Option(help="The older ledger's public key, or a roster.json that names it.")] = "",
    old_key: Annotated[Path | None, typer.Option(help="The older ledger's signing.key, if it is not --key.")] = None,
    left_open: Annotated[
        bool, typer.Option("--left-open", help="Do not close the older ledger: its key is lost, or FILE is a copy.")
    ] = False,
    lost: Annotated[
        bool,
        typer.Option("--lost", help="The older ledger is lost: charge its whole cap. FILE holds a signed head of it."),
    ] = False,
    cap: Annotated[
        float | None, typer.Option(help="With --lost: the largest ε cap that the lost ledger may have had.")
    ] = None,
    delta: Annotated[float | None, typer.Option(help="With --lost: its δ, if it is not that of --into.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="With --lost: do not ask.")] = False,
) -> None:
    """Close an older ledger of the same people's records, and count here what it has spent. Once for each ledger.

    The total only grows. If this is interrupted, give the command again. With --left-open, whoever has the older
    ledger and its key can still spend from it: remove both.

    With --lost the older ledger is not needed, only a head of it that the site has signed: in the peers.json of a
    member that has seen it, or in the joins.json of a run's folder. Its whole cap is charged, for good. Usually
    nothing is left then, until the cap of the new ledger is raised.
    """
    from rich.console import Console

    from fedveil.deploy import ledger_file

    say = Console(highlight=False)
    if not lost:
        if cap is not None or delta is not None or yes:
            raise UsageError("--cap, --delta and --yes go with --lost", hint="leave them out, or give --lost")
        done = ledger_file.import_into(file, into, key, public=public, old_key=old_key, left_open=left_open)
        say.print(
            f"{done.lineage} imported: filter ε {done.before:.4f} before, {done.after:.4f} now, of {done.cap:g}; "
            f"the older ledger is {'LEFT OPEN' if left_open else 'closed'}",
            markup=False, soft_wrap=True,
        )  # fmt: skip
        return
    if cap is None or left_open or old_key is not None:
        raise UsageError(
            "--lost goes with --cap, and without --left-open and --old-key",
            hint="name the largest cap that the lost ledger may have had: an earlier report says what it was",
        )
    if not yes and not typer.confirm(f"Charge ε = {cap:g} to {into} for good, for each lost ledger in {file}?"):
        raise UsageError("nothing was charged", hint="give --yes, or answer y")
    for one in ledger_file.charge_lost(file, into, key, cap=cap, delta=delta, public=public):
        say.print(
            f"lost ledger {one.lineage} charged at its cap: ε {one.before:.4f} before, {one.after:.4f} now, of "
            f"{one.cap:g}",
            markup=False, soft_wrap=True,
        )  # fmt: skip


def _write_new(out: Path, data: bytes) -> None:
    try:
        with os.fdopen(os.open(out, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as f:
            f.write(data)
    except OSError as e:
        raise UsageError(
            f"{out} cannot be written: {e.strerror}", hint="name a new file in a folder that exists"
        ) from e


def _show(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    head = Table(title=f"Ledger of {_plain(found['lineage'])}", title_justify="left", show_header=False, box=None)
    head.add_column(style="dim")
    head.add_column(overflow="fold")
    head.add_row("site, unit", f"{_plain(found['owner'])}, {_plain(found['unit'])}")
    head.add_row("cap", f"ε = {found['cap_epsilon']:g} at δ = {found['delta']:g}, Rényi order {found['order']:g}")
    head.add_row("spent", f"ε = {found['epsilon_spent']:.4f} over {found['steps']} steps (RDP filter, all runs)")
    if found["imported"]:
        steps = sum(found["imported"].values())
        head.add_row("imported", f"{steps} steps of {len(found['imported'])} older ledgers, counted in what is spent")
    if found["lost"]:
        caps = ", ".join(f"{name[:16]}... at ε = {cap:g}" for name, cap in found["lost"].items())
        head.add_row("lost", f"{caps}: charged at the whole cap, counted in what is spent")
    if found["closed_for"]:
        head.add_row("closed", f"for good; ledger {found['closed_for'][:16]}... counts it")
    head.add_row("left", f"{found['fraction_left']:.1%} of the Rényi budget")
    checked = (
        "chain and signatures hold"
        if found["signatures_checked"]
        else "the chain holds, signatures NOT checked (give --public)"
    )
    head.add_row("journal", f"{found['head'][0]} rows, {checked}")
    console.print(head)
    if not found["sessions"]:
        return
    table = Table("session", "steps", "mechanism", "ε after", "handed on", "ended", header_style="bold")
    for name, s in found["sessions"].items():
        after = f"{s['epsilon_after']:.4f}" if "epsilon_after" in s else "-"
        refused = f" (refused {s['refused']} times)" if s["refused"] else ""
        table.add_row(
            _plain(name[:16]), str(sum(s["events"].values())), "\n".join(s["events"]) or "-", after,
            str(s["committed"]), _plain(s["status"] or "open") + refused,
        )  # fmt: skip
    console.print(table)


def _plain(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text).replace("[", "\\[")
