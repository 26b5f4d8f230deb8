"""A finished report on its way to a site: ``report.json`` and the files it is checked beside, in one bounded buffer.

A site gets all that an auditor gets (the model's weights and a run's estimates left out), so that its signature says
"verified" and not "received". Nothing in it is new to the site's peers: it is what the run's folder shows to anybody.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedveil.common.errors import VerificationError, WireError
from fedveil.common.identity import Roster
from fedveil.common.wire import Packet
from fedveil.privacy.report import bundle as bundles
from fedveil.privacy.report.bundle import CONTRACT, JOINS, JOURNAL, METRICS, PIN, PLAN, REPORT, ROSTER, journal_name
from fedveil.privacy.report.results import AUDIT

KIND, BUFFER = "report", "files"
LIMIT = 1 << 26  # bytes; a site spends about 0.2 ms on each row
ALL_COPIES = 1 << 31
_FIXED = (REPORT, PLAN, ROSTER, JOINS, PIN, JOURNAL, CONTRACT, METRICS, AUDIT)
_NEEDED = frozenset((REPORT, PLAN, ROSTER, JOINS, PIN, JOURNAL))


def packed(run: Path, session: str, copies: int = 1) -> Packet:
    """What is sent to every site.

    Raises:
        VerificationError: the folder is incomplete, or holds more than :data:`LIMIT` bytes, or more than
            :data:`ALL_COPIES` would leave the server.
    """
    files = {REPORT: bundles.read_bounded(run / REPORT, LIMIT), **bundles.read(run).files}
    size = sum(map(len, files.values()))
    if size > LIMIT or size * copies > ALL_COPIES:
        raise VerificationError(
            f"the run's files ({size} bytes) are too large to be sent to {copies} sites",
            hint="give each site a copy of the folder, to be signed with 'fedveil audit sign'",
        )
    listing = [[name, len(data)] for name, data in files.items()]
    return Packet({"kind": KIND, "session": session, "files": listing}, {BUFFER: b"".join(files.values())})


def unpacked(packet: Packet, roster: Roster) -> dict[str, bytes]:
    """The files of a packet, by name relative to the run's folder.

    Raises:
        WireError: other files than a run's; lengths that are not the buffer's; more than :data:`LIMIT` bytes.
    """
    data = packet.buffers.get(BUFFER, b"")
    listing = packet.header.get("files")
    if set(packet.buffers) != {BUFFER} or len(data) > LIMIT:
        raise WireError(f"a report that is not one buffer of at most {LIMIT} bytes")
    known = {*_FIXED, *(journal_name(m.site) for m in roster.sites)}
    if not isinstance(listing, list) or len(listing) > len(known):
        raise WireError("a report with a malformed list of files")
    out: dict[str, bytes] = {}
    at = 0
    for entry in listing:
        name, size = _entry(entry)
        if name not in known or name in out:
            raise WireError("a report with a file that does not belong to it, or twice")
        out[name] = data[at : at + size]
        at += size
    if at != len(data) or not _NEEDED <= out.keys():
        raise WireError("a report that is incomplete, or whose files have other lengths")
    return out


def _entry(entry: Any) -> tuple[str, int]:
    if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[0], str):
        raise WireError("a report with a malformed list of files")
    if type(entry[1]) is not int or not 0 <= entry[1] <= LIMIT:
        raise WireError("a report with a malformed list of files")
    return entry[0], entry[1]
