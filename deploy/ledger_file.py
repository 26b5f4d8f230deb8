"""A site's ledger as a file that somebody names: read, checked, added up, taken over by another one."""

from __future__ import annotations

import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedveil.common import canonical, fields, identity
from fedveil.common.errors import MALFORMED, FedveilError, UsageError, VerificationError
from fedveil.common.journal import GENESIS, Copy, Row, parse, verify_rows, without_torn_end
from fedveil.common.units import Delta, Epsilon, SiteId
from fedveil.privacy.joining import heads_of
from fedveil.privacy.ledger import Ledger
from fedveil.privacy.report.bundle import read_bounded
from fedveil.privacy.report.charges import bounded
from fedveil.privacy.tally import Tally

_LIMIT = 1 << 28
_ROSTER_LIMIT = 1 << 22


@dataclass(frozen=True)
class Imported:
    """What an older ledger added: its lineage, the importing filter's ε before and after, and its cap."""

    lineage: str
    before: float
    after: float
    cap: float


def import_into(
    file: Path, into: Path, key: Path, *, public: str = "", old_key: Path | None = None, left_open: bool = False
) -> Imported:
    """Close the ledger ``file`` and count in ``into`` what it has spent; repeated, it adds nothing.

    Args:
        file: the older ledger.
        into: the ledger that counts it from now on; it must have been opened.
        key: the private key of the owner of ``into``.
        public: the older ledger's public key, or a roster that names it; empty: that of the private key at hand.
        old_key: the older ledger's private key, if it is not ``key``.
        left_open: do not close ``file``, whose key is lost or which is a copy; needs ``public``.

    Raises:
        UsageError: arguments that do not go together, or a file that cannot be read.
        VerificationError: one of the ledgers is malformed or forged, or ``into`` was never opened.
        FedveilError: the import breaks a rule of the ledger.
    """
    if left_open and (old_key is not None or not public):
        raise UsageError(
            "--left-open goes with the older ledger's --public key, and without --old-key",
            hint="give --public; its private key is not used",
        )
    public = _key(public, _bounded_rows(file)) if public else ""
    held, owner = _bounded_rows(into), identity.load_signing_key(key)
    now, old = tally_of(held), identity.load_signing_key(old_key) if old_key else owner
    if now.filter is None:
        raise VerificationError(f"{into}: the ledger was never opened", hint="a site's first run opens its ledger")
    if not left_open and public and public != identity.public_hex(old):
        raise UsageError(
            "the key is not that of the older ledger, which was therefore not closed",
            hint="give its key with --old-key; if that is lost, give --left-open",
        )
    ledger = Ledger.open(
        into, held[0].owner, owner, lineage=now.lineage, cap=Epsilon(now.filter.epsilon),
        delta=Delta(now.filter.delta), unit=now.unit,
    )  # fmt: skip
    try:
        before, older = ledger.tally.epsilon, _bounded_rows(file)
        done = ledger.adopt(older, public) if left_open else ledger.take_over(file, old)
        after = ledger.tally.epsilon
    finally:
        ledger.close()
    return Imported(str(done.body["lineage"]), before, after, now.filter.epsilon)


def charge_lost(
    file: Path, into: Path, key: Path, *, cap: float, delta: float | None = None, public: str = ""
) -> list[Imported]:
    """Charge in ``into`` the whole cap of every lost ledger of its owner and data set of which ``file`` holds a head.

    Args:
        file: heads that others keep: a member's ``peers.json``, or the ``joins.json`` of a run's folder.
        into: the ledger that is charged; it must have been opened.
        key: the private key of its owner.
        cap, delta: the largest cap that a lost ledger may have had, and its δ; None: that of ``into``.
        public: the key that signed the lost ledger, or a roster that names it; empty: that of the private key.

    Raises:
        UsageError: ``file`` cannot be read, or holds no head of such a ledger.
        VerificationError: ``into`` is malformed or was never opened, or the cap is below its own.
    """
    held, owner = _bounded_rows(into), identity.load_signing_key(key)
    now, signer = tally_of(held), _key(public, held) if public else identity.public_hex(owner)
    if now.filter is None:
        raise VerificationError(f"{into}: the ledger was never opened", hint="a site's first run opens its ledger")
    site, own = held[0].owner, held[0].hash
    known: dict[str, Copy] = {}
    for copy in _heads_of(file, SiteId(site)):
        fits = copy.data_set == (now.data_set or copy.data_set) and copy.ledger not in (own, *now.counted)
        newer = copy.ledger not in known or copy.head.rows > known[copy.ledger].head.rows
        if fits and newer and copy.signed_by(site, signer):
            known[copy.ledger] = copy
    if not known:
        raise UsageError(
            f"{file} holds no head of another ledger of this data set that {site!r} has signed and that is not counted",
            hint="give the peers.json of a member that has seen it, or the joins.json of a run; --public names an "
            "older key",
        )
    ledger = Ledger.open(
        into, site, owner, lineage=now.lineage, cap=Epsilon(now.filter.epsilon), delta=Delta(now.filter.delta),
        unit=now.unit,
    )  # fmt: skip
    done = list[Imported]()
    try:
        for name, copy in sorted(known.items()):
            before = ledger.tally.epsilon
            ledger.charge_lost(copy, site, signer, Epsilon(cap), Delta(now.filter.delta if delta is None else delta))
            done.append(Imported(f"{name[:16]}...", before, ledger.tally.epsilon, now.filter.epsilon))
    finally:
        ledger.close()
    return done


def _heads_of(file: Path, site: SiteId) -> list[Copy]:
    """Every head of the ledgers of ``site`` in a ``peers.json`` or ``joins.json``; no signature is checked."""
    require_file(file, hint="a member's state folder holds peers.json, a run's folder joins.json")
    try:
        value = fields.mapping(canonical.loads(read_bounded(file, _LIMIT)), file.name)
        statements = [s["payload"] for s in value.values() if isinstance(s, dict)]
        own = [[*p["head"], p["ledger"], p["data_set"], p["head_signature"]] for p in statements if p["site"] == site]
        kept = [heads_of(p["peers"]) for p in statements] if statements else [heads_of(value)]
    except (*MALFORMED, FedveilError) as e:
        raise UsageError(
            f"{file} is neither a list of journal heads nor the join statements of a run",
            hint="a member's state folder holds peers.json, a run's folder joins.json",
        ) from e
    return [*map(Copy.from_json, own), *(copy for by in kept for copy in by.get(site, {}).values())]


def _bounded_rows(file: Path) -> list[Row]:
    """The rows of a ledger's file, without what a crash left behind the last one; no signature is checked."""
    require_file(file)
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
    f, room = tally.filter, tally.room
    return {
        "lineage": tally.lineage,
        "owner": rows[0].owner,
        "unit": tally.unit,
        "cap_epsilon": f.epsilon,
        "delta": f.delta,
        "order": f.order,
        "epsilon_spent": tally.epsilon,
        "fraction_left": max(0.0, 1 - tally.spent / room.budget) if room and room.budget > 0 else 0.0,
        "steps": len(tally.by_round),
        "closed_for": tally.closed,
        "imported": {name: sum(n for _, n in events) for name, events in tally.imported.items()},
        "lost": {name: cap for name, (cap, _) in tally.lost.items()},
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
    require_file(file)
    try:
        data = read_bounded(file, _LIMIT)
        whole = without_torn_end(data)
        rows = parse(whole)
        if not rows:
            raise VerificationError("it holds no row of a ledger")
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
            f"{file}: the last row was cut off while it was written; the {len(rows)} before it are whole",
            hint="a power cut leaves this: the site's next start drops it and notes that; then look again",
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
            hint="give the site's key, or the roster.json of its identity folder or of the run",
        ) from e


def require_file(file: Path, hint: str = "a site's ledger is the file ledger.jsonl in its state folder") -> None:
    """Raise :class:`UsageError` with ``hint`` unless ``file`` is a plain file that can be read."""
    try:
        if not stat.S_ISREG(file.stat().st_mode):
            raise UsageError(f"{file} is not a plain file", hint=hint)
        file.open("rb").close()
    except OSError as e:
        raise UsageError(f"{file} cannot be read: {e.strerror}", hint=hint) from e
