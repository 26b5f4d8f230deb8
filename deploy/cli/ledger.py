"""``fedveil ledger``: read a site's budget. Only ``import`` writes to a ledger, and only ever adds to what is spent."""

from __future__ import annotations

import os
import re
import stat
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from rich.console import Console
from rich.table import Table

from fedveil.common import canonical, fields, identity
from fedveil.common.errors import FedveilError, UsageError, VerificationError
from fedveil.common.journal import GENESIS, Row, parse, verify_rows, without_torn_end
from fedveil.common.units import Delta, Epsilon
from fedveil.privacy.ledger import Ledger, Tally
from fedveil.privacy.report.bundle import read_bounded
from fedveil.privacy.report.charges import bounded

app = typer.Typer(no_args_is_help=True, help="A site's privacy ledger: what was spent, what is left.")
_LIMIT = 1 << 28

_ROSTER_LIMIT = 1 << 22

File = Annotated[Path, typer.Argument(help="A site's ledger (ledger.jsonl).")]
KEY = "The site's public key: 64 hex digits, or a roster.json that names it."
Public = Annotated[str | None, typer.Option(help=f"{KEY} Checks signatures, too.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def show(file: File, public: Public = None, as_json: Json = False) -> None:
    """Lineage, cap, ε spent and left, and what each session cost."""
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
    """Check numbering, chain, every signature and that the budget was never exceeded. Exit code 60 if not."""
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
    out: Annotated[Path | None, typer.Option(help="Where to write; by default to standard output.")] = None,
) -> None:
    """The ledger as one JSON document: summary, head and every row. All of it may leave the site."""
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
    out: Annotated[Path, typer.Option(help="Where to write the proof.")],
    rows: Annotated[
        int | None, typer.Option(help="Among so many first rows: what the report names. By default all there are.")
    ] = None,
) -> None:
    """Write a proof that one row stands in this journal; 'fedveil audit row' checks it without the other rows."""
    from fedveil.privacy.report.row_proof import prove as proof_of

    _require_file(file)
    _write_new(out, canonical.dumps(proof_of(file, row, rows)) + b"\n")


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="The older ledger (ledger.jsonl).")],
    into: Annotated[Path, typer.Option(help="The ledger that shall count it from now on; must have been opened.")],
    key: Annotated[Path, typer.Option(help="The signing.key of the site that owns --into.")],
    public: Annotated[str, typer.Option(help="The older ledger's public key (or a roster.json that names it).")] = "",
    old_key: Annotated[Path | None, typer.Option(help="The older ledger's signing.key, if it is not --key.")] = None,
    left_open: Annotated[
        bool, typer.Option("--left-open", help="Its key is lost, or FILE is a copy: the older ledger is not closed.")
    ] = False,
) -> None:
    """Close an older ledger of the same people's records, and count what it has spent. Once for a ledger.

    The total only grows. If this is interrupted, give the command again. With --left-open whoever has the older
    ledger and its key can go on spending from it, beside the new one: remove both.
    """
    if left_open and (old_key is not None or not public):
        raise UsageError("--left-open needs the --public half of the older ledger's key, and not the key itself")
    public = _key(public, _bounded_rows(file)) if public else ""
    held, owner = _bounded_rows(into), identity.load_signing_key(key)
    now, old = tally_of(held), identity.load_signing_key(old_key) if old_key else owner
    if now.filter is None:
        raise VerificationError(f"{into}: the ledger was never opened")
    if not left_open and public and public != identity.public_hex(old):
        raise UsageError(
            "the key at hand is not that of the older ledger, which could not be closed",
            hint="--old-key FILE closes it; --left-open where its key is lost",
        )
    ledger = Ledger.open(
        into, held[0].owner, owner, lineage=now.lineage, cap=Epsilon(now.filter.epsilon),
        delta=Delta(now.filter.delta), unit=now.unit,
    )  # fmt: skip
    try:
        before = ledger.tally.epsilon
        done = ledger.adopt(_bounded_rows(file), public) if left_open else _taken_over(ledger, file, old)
        after = ledger.tally.epsilon
    finally:
        ledger.close()
    Console(highlight=False).print(
        f"{done.body['lineage']} imported: filter ε {before:.4f} before, {after:.4f} now, of {now.filter.epsilon:g}; "
        f"the older ledger is {'LEFT OPEN' if left_open else 'closed'}",
        markup=False, soft_wrap=True,
    )  # fmt: skip


def _taken_over(ledger: Ledger, file: Path, key: Ed25519PrivateKey) -> Row:
    _bounded_rows(file)
    return ledger.take_over(file, key)


def _bounded_rows(file: Path) -> list[Row]:
    """The rows of a ledger's file, without what a crash left behind the last one; no signature is checked."""
    _require_file(file)
    try:
        data = read_bounded(file, _LIMIT)
        rows = parse(data[: data.rfind(b"\n") + 1])
        for row in rows:
            bounded(row)
    except FedveilError as e:
        raise VerificationError(f"{file}: {e.message}", hint="keep the file as evidence; do not edit it") from e
    return rows


def summary(rows: list[Row], *, checked: bool) -> dict[str, Any]:
    """What a ledger adds up to, as JSON.

    Args:
        rows: a parsed ledger.
        checked: whether its signatures were verified; only repeated in the result.

    Raises:
        VerificationError: a row that the ledger's rules do not allow.
    """
    tally, sessions = Tally(), dict[str, dict[str, Any]]()
    for row in rows:
        bounded(row)
        tally.feed(row)
        name = row.body.get("session")
        if not isinstance(name, str):
            continue
        s = sessions.setdefault(
            name[:128], {"accepted": False, "refused": 0, "status": "", "committed": 0, "events": {}}
        )
        if row.kind == "plan.accepted":
            s["accepted"] = True
        elif row.kind == "refused":
            s["refused"] += 1
        elif row.kind == "commit":
            s["committed"] += 1
        elif row.kind == "session.end":
            s["status"] = str(row.body.get("status", ""))[:32]
        elif row.kind == "spend":
            event = row.body["event"]
            key = f"q={event['sample_rate']:g} sigma={event['noise_multiplier']:.6g}"
            s["events"][key] = s["events"].get(key, 0) + 1
            s["epsilon_after"] = tally.epsilon
    if tally.filter is None:
        raise VerificationError("the ledger was never opened")
    f = tally.filter
    return {
        "lineage": tally.lineage,
        "owner": rows[0].owner,
        "unit": tally.unit,
        "cap_epsilon": f.epsilon,
        "delta": f.delta,
        "order": f.order,
        "epsilon_spent": tally.epsilon,
        "fraction_left": max(0.0, 1 - tally.spent / f.budget) if f.budget > 0 else 0.0,
        "steps": len(tally.by_round),
        "closed_for": tally.closed,
        "imported": {name: sum(n for _, n in events) for name, events in tally.imported.items()},
        "sessions": sessions,
        "head": [len(rows), rows[-1].hash],
        "signatures_checked": checked,
    }


def tally_of(rows: list[Row]) -> Tally:
    """What a ledger adds up to; :class:`VerificationError` for a row that its rules do not allow."""
    found = Tally()
    for row in rows:
        bounded(row)
        found.feed(row)
    if found.filter is None:
        raise VerificationError("the ledger was never opened")
    return found


def read_rows(file: Path, public: str | None) -> list[Row]:
    """The rows of a ledger's file: numbering and chain hold, and with the site's public key the signatures too.

    Raises:
        UsageError: there is no such file, or ``public`` is no key.
        VerificationError: empty, malformed, or forged; or cut off while its last row was written.
    """
    _require_file(file)
    try:
        data = read_bounded(file, _LIMIT)
        whole = without_torn_end(data)
        rows = parse(whole)
        if not rows and whole == data:
            raise VerificationError("the ledger is empty")
    except FedveilError as e:
        raise VerificationError(f"{file}: {e.message}", hint="keep the file as evidence; do not edit it") from e
    key = None if public is None else _key(public, rows)
    try:
        if rows:
            rows = _chained(rows) if key is None else verify_rows(rows, key, owner=rows[0].owner)
    except FedveilError as e:
        raise VerificationError(f"{file}: {e.message}", hint="keep the file as evidence; do not edit it") from e
    if whole != data:
        raise VerificationError(
            f"{file}: the last row was cut off while it was written; the {len(rows)} before it hold",
            hint="a power cut leaves this: the site's next start drops it, and notes that it did; then look again",
        )
    return rows


def _chained(rows: list[Row]) -> list[Row]:
    """What needs no key: every row is numbered, names its owner and the row before, and has its own hash."""
    before = GENESIS
    for i, r in enumerate(rows):
        core = {"v": 1, "n": r.n, "owner": r.owner, "at": r.at, "kind": r.kind, "body": r.body, "prev": r.prev}
        if (r.n, r.owner, r.prev) != (i, rows[0].owner, before):
            raise VerificationError(f"row {i} does not follow the one before: rows are missing, or were moved")
        if canonical.digest(core) != r.hash:
            raise VerificationError(f"row {i} was changed: its hash differs")
        before = r.hash
    return rows


def _key(public: str, rows: list[Row]) -> str:
    """The key that ``public`` is, or that the roster in the file ``public`` names for the owner of ``rows``.

    Raises:
        UsageError: it is neither.
    """
    if re.fullmatch("[0-9a-fA-F]{64}", key := public.strip()):
        return key.lower()
    try:
        signed = canonical.loads(read_bounded(Path(public), _ROSTER_LIMIT), limit=_ROSTER_LIMIT)
        roster = identity.roster_from_payload(fields.mapping(signed, "the roster").get("payload"))
        return roster.member(rows[0].owner if rows else "").signing_key
    except (FedveilError, OSError, ValueError) as e:
        raise UsageError(
            "--public is neither 64 hexadecimal digits nor a roster that names this ledger's owner",
            hint="the site's key, or the file roster.json of its identity folder or of the run",
        ) from e


def _require_file(file: Path) -> None:
    try:
        if not stat.S_ISREG(file.stat().st_mode):
            raise UsageError(f"{file} is no plain file", hint="a site's ledger is the file ledger.jsonl in its state")
        file.open("rb").close()
    except OSError as e:
        raise UsageError(
            f"{file} cannot be read: {e.strerror}", hint="a site's ledger is the file ledger.jsonl in its state"
        ) from e


def _write_new(out: Path, data: bytes) -> None:
    try:
        with os.fdopen(os.open(out, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as f:
            f.write(data)
    except OSError as e:
        raise UsageError(f"{out} cannot be written: {e.strerror}", hint="choose a new file name") from e


def _show(found: dict[str, Any]) -> None:
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
