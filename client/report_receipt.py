"""The federation's report at this site: verified as an auditor would do it, kept, and signed.

The report comes with all files that are needed to check it, from a server that this site does not trust. It is signed
only if every check passes under the consortium's key that this site has pinned, and only if the report was made from
this site's own ledger as it is on this disk.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from fedveil.client.session import Session, Site
from fedveil.common import canonical, identity
from fedveil.common.errors import ProtocolError, VerificationError
from fedveil.common.files import sync_folder
from fedveil.common.wire import Packet
from fedveil.privacy.report import handover
from fedveil.privacy.report.bundle import JOURNALS, REPORT
from fedveil.privacy.report.countersign import see, sign
from fedveil.privacy.report.signatures import SIGNATURES

REFUSED = ".refused"
MAX_REFUSED = 8  # sessions


def report(site: Site, request: Packet) -> Packet:
    """Verify, keep and sign the report of a session that has ended. If the same report comes again, it is signed again.

    Raises:
        ProtocolError: the session has not ended here, another report of it was signed, or this site keeps no reports.
        WireError: what came is not a report with its files.
        VerificationError: a check failed, or the report is of another run. What came is kept beside, as evidence.
    """
    h = request.expect(handover.KIND).header
    session = site.session(h.get("session"))
    if site.reports is None:
        raise ProtocolError("this site keeps no reports")
    if not session.ended:
        raise ProtocolError("a report of a session that has not ended here")
    files = handover.unpacked(request, site.roster)
    folder = site.reports / session.id
    known = folder.exists()
    if known and (folder / REPORT).read_bytes() != files[REPORT]:
        raise ProtocolError("another report of this session was signed here")
    draft = folder.with_name(f".{session.id}.part")
    try:
        _write(draft, files)
        statement = _signed(site, session, draft)
        if not known:
            identity.write_secret(draft / SIGNATURES, canonical.dumps({site.id: statement}) + b"\n")
            _rename(draft, folder)
    except VerificationError:
        _keep_as_evidence(draft, folder.with_name(session.id + REFUSED))
        raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return Packet({"kind": "signed", "statement": statement})


def digest(site: Site, session: Session) -> str:
    """The digest of the report of ``session`` that this site has verified and kept.

    Raises:
        ProtocolError: it has none.
    """
    path = None if site.reports is None else site.reports / session.id / REPORT
    if path is None or not path.is_file():
        raise ProtocolError("this site has kept no report of that session")
    return canonical.digest(canonical.loads(path.read_bytes(), limit=handover.LIMIT))


def _signed(site: Site, session: Session, draft: Path) -> dict[str, Any]:
    seen = see(draft / REPORT, site.consortium)
    if (seen.session, seen.roster.hash) != (session.id, site.roster.hash):
        raise VerificationError("the report is of another session or roster than this site's")
    if seen.document["payload"]["hashes"]["plan"] != session.plan_hash:
        raise VerificationError("the report is of another plan than the one this site signed")
    ledger = b"".join(row.line() for row in site.ledger.journal.rows)
    return sign(seen, site.key, ledger)[1]


def _write(folder: Path, files: dict[str, bytes]) -> None:
    """``files`` in a new folder, readable by this site alone."""
    shutil.rmtree(folder, ignore_errors=True)
    for made in (folder.parent, folder, folder / JOURNALS):
        made.mkdir(mode=0o700, exist_ok=True)
    for name, data in files.items():  # the names are from a closed table
        identity.write_secret(folder / name, data)


def _keep_as_evidence(draft: Path, folder: Path) -> None:
    """Keep a session's first report that failed, of few sessions only: nobody fills the disk or hides the evidence."""
    if not folder.exists() and sum(1 for _ in folder.parent.glob(f"*{REFUSED}")) < MAX_REFUSED:
        _rename(draft, folder)


def _rename(draft: Path, folder: Path) -> None:
    """Make ``draft`` the new ``folder``: after a crash all of it is there, or nothing."""
    for made in (draft / JOURNALS, draft):
        sync_folder(made)
    os.replace(draft, folder)
    sync_folder(folder.parent)
