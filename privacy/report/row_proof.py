"""One row of a journal shown without the others: an inclusion proof against the root that a report names (RFC 6962).

A proof file holds the row, its place, and at most some twenty hashes. It is checked with the report, the roster and the
consortium's key alone; the rest of the ledger stays at the site.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedveil.common import canonical, fields, identity, merkle
from fedveil.common.errors import FedveilError, IdentityError, VerificationError
from fedveil.common.journal import DOMAIN, Row, parse
from fedveil.privacy.report import bundle as bundles
from fedveil.privacy.report.build import DOMAIN as REPORT_DOMAIN
from fedveil.privacy.report.bundle import PIN, ROSTER

MAX_PROOF_BYTES = 1 << 22
_LIMIT = 1 << 28


def prove(ledger: Path, index: int, size: int | None = None) -> dict[str, Any]:
    """The inclusion proof of row ``index`` among the first ``size`` rows of a journal's file (by default: all).

    Raises:
        VerificationError: the file is no journal, or has no such row.
    """
    data = bundles.read_bounded(ledger, _LIMIT)
    rows, leaves = parse(data), bundles.lines(data)
    size = len(leaves) if size is None else size
    if not 0 <= index < size <= len(leaves):
        raise VerificationError(
            f"there is no row {index} of {size}: the journal has {len(leaves)}", hint="rows count from 0"
        )
    path = merkle.prove(leaves[:size], index)
    return {
        "v": 1,
        "owner": rows[index].owner,
        "index": index,
        "size": size,
        "row": canonical.loads(leaves[index]),
        "path": [h.hex() for h in path],
    }


def check(proof: Path, report: Path, consortium_key: str | None) -> Row:
    """The proved row, once roster, report, inclusion and the row's own signature hold.

    Args:
        report: ``report.json``; only ``roster.json`` (and ``consortium.pub``, if no key is given) are read beside it.

    Raises:
        VerificationError: naming what does not hold.
    """
    value = _load(proof, MAX_PROOF_BYTES)
    index = fields.integer(value, "index", "the proof", high=merkle.MAX_LEAVES)
    size = fields.integer(value, "size", "the proof", high=merkle.MAX_LEAVES)
    path = value.get("path")
    if value.get("v") != 1 or not isinstance(path, list) or len(path) > merkle.MAX_LEAVES.bit_length():
        raise VerificationError("the proof is malformed")
    hashes = [bytes.fromhex(fields.hexadecimal({"h": h}, "h", "the proof")) for h in path]
    leaf = canonical.dumps(value.get("row"))
    row = _row(leaf)
    public, payload = _trusted(report, consortium_key, row.owner)
    claimed = fields.mapping(fields.mapping(payload.get("hashes"), "hashes").get("roots"), "roots")
    heads = fields.mapping(payload["hashes"].get("heads"), "heads")
    count, _ = fields.head(heads.get(row.owner), f"the report's head of {row.owner}")
    if row.n != index or value.get("owner") != row.owner:
        raise VerificationError("the proof speaks of another row than it holds")
    if size != count:
        raise VerificationError(
            f"the proof is for {size} rows, the report names {count}",
            hint=f"make it with 'fedveil ledger prove --rows {count}'",
        )
    merkle.verify(bytes.fromhex(fields.hexadecimal(claimed, row.owner, "roots")), leaf, index, size, hashes)
    core = {k: v for k, v in fields.mapping(value["row"], "the row").items() if k not in ("hash", "sig")}
    if canonical.digest(core) != row.hash:
        raise VerificationError(f"row {row.n} was changed: its hash differs")
    try:
        identity.verify(public, DOMAIN, row.hash.encode(), bytes.fromhex(row.sig), what=f"row {row.n}")
    except IdentityError as e:
        raise VerificationError(e.message) from e
    return row


def _row(leaf: bytes) -> Row:
    try:
        return parse(leaf + b"\n")[0]
    except VerificationError as e:
        raise VerificationError("the proof does not hold a well-formed journal row") from e


def _trusted(report: Path, consortium_key: str | None, owner: str) -> tuple[str, dict[str, Any]]:
    """The owner's key on the roster and the payload of the report, both with their signatures checked."""
    try:
        beside = consortium_key is None
        pin = bundles.read_bounded(report.with_name(PIN), 256).decode("ascii") if beside else consortium_key
        key = fields.public_key(pin, PIN if beside else "the consortium's key that was given")
        roster = identity.open_roster(_load(report.with_name(ROSTER), 1 << 22), key)
        payload = identity.opened(_load(report, _LIMIT), REPORT_DOMAIN, roster.server.signing_key, what=report.name)
        key = roster.server.signing_key if owner == identity.SERVER else roster.member(owner).signing_key
    except (IdentityError, UnicodeDecodeError) as e:
        raise VerificationError(e.message if isinstance(e, IdentityError) else f"{PIN} is not text") from e
    return key, fields.mapping(payload, report.name)


def _load(path: Path, limit: int) -> dict[str, Any]:
    try:
        return fields.mapping(canonical.loads(bundles.read_bounded(path, limit), limit=limit), path.name)
    except VerificationError:
        raise
    except FedveilError as e:
        raise VerificationError(f"{path.name}: {e.message}") from e
