"""The newest revocation list that a member has seen: it only goes forward, also over a restart.

A signed list says nothing of its age. Whoever can put files into a member's folder, or keep new ones out, could hand it
an older list, on which a site is not yet revoked. So the newest list is kept, whole and signed, in a second place that
the process owns, and stays in force whatever lies in the first.
"""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Any

from fedveil.common import canonical, identity
from fedveil.common.errors import IdentityError
from fedveil.common.files import write_durably
from fedveil.common.identity import Revocations
from fedveil.deploy.enrol.join import read_document

REVOKED = "revoked.json"
_KEPT = "revoked.seen.{}.json"
NOBODY = Revocations(0, frozenset(), frozenset())
_LOG = logging.getLogger("fedveil.identity")
_Stamp = tuple[int, int, int, int]  # time of modification, time of change, size, inode


def take_revoked(folder: Path, file: Path) -> Revocations:
    """Install a revocation list in a member's folder: signed by the pinned key, and no older than the one there.

    Raises:
        IdentityError: it is not.
    """
    pin, document = _pinned(folder), read_document(file)
    made = identity.open_revocations(document, pin)
    held = identity.open_revocations(read_document(folder / REVOKED), pin) if (folder / REVOKED).exists() else NOBODY
    if made.number < held.number or (made.number == held.number and made != held):
        raise IdentityError(
            f"revocation list {made.number} does not follow list {held.number}, which is in use",
            hint="a list only goes forward: ask for the latest one",
        )
    write_durably(folder / REVOKED, canonical.dumps(document) + b"\n")
    return made


class Revoked:
    """The list in force. Each call looks whether a newer one has come.

    Args:
        folder: a member's identity folder with the consortium's pinned key; ``revoked.json`` may come there, and be
            replaced, at any time. A list that is not signed by that key, or is not newer, is not taken, and logged.
        kept: the folder in which the newest list of each consortium is kept; by default ``folder``. The process must be
            able to write there.
        keeps: if False, this only looks and writes nothing.

    Raises:
        IdentityError: a list at the start, or the kept one, does not hold; or it cannot be kept.
    """

    def __init__(self, folder: Path, kept: Path | None = None, *, keeps: bool = True) -> None:
        self._path, self._pin, self._keeps = folder / REVOKED, _pinned(folder), keeps
        self._kept = (kept or folder) / _KEPT.format(self._pin[:16])
        self._lock = threading.Lock()
        self._stamped: _Stamp | None = None  # of the file that was read last
        self._unread: _Stamp | None = None  # of the one that could not be read
        self._now = NOBODY
        if self._kept.exists():
            self._now = identity.open_revocations(read_document(self._kept), self._pin)
        if (stamp := self._stamp()) is not None:
            document = read_document(self._path)
            found = identity.open_revocations(document, self._pin)
            self._stamped = stamp
            if self._is_newer(found):
                self._keep(document)
                self._now = found

    def __call__(self) -> Revocations:
        """The list in force now."""
        stamp = self._stamp()
        if stamp is None or stamp == self._stamped:
            return self._now
        with self._lock:
            if stamp != self._stamped:
                self._take(stamp)
            return self._now

    def _take(self, stamp: _Stamp) -> None:
        try:
            document = read_document(self._path)
        except IdentityError as e:  # this may pass: the file is tried again, and logged once
            if stamp != self._unread:
                self._unread = stamp
                _LOG.error("%s is not taken: %s", self._path, e)
            return
        self._stamped = stamp
        try:
            found = identity.open_revocations(document, self._pin)
        except IdentityError as e:
            _LOG.error("%s is not taken: %s", self._path, e)
            return
        if not self._is_newer(found):
            return
        self._now = found  # in force at once, whether it can be kept or not
        try:
            self._keep(document)
        except IdentityError as e:
            _LOG.error("%s; after a restart an older list would be taken", e)

    def _is_newer(self, found: Revocations) -> bool:
        if found.number < self._now.number or (found.number == self._now.number and found != self._now):
            _LOG.error("%s: list %d is not newer than list %d, which stays in force", self._path, found.number,
                       self._now.number)  # fmt: skip
        return found.number > self._now.number

    def _keep(self, document: Any) -> None:
        if not self._keeps:
            return
        try:
            write_durably(self._kept, canonical.dumps(document) + b"\n")
        except OSError as e:
            raise IdentityError(f"the revocation list cannot be kept in {self._kept}: {e.strerror}") from e

    def _stamp(self) -> _Stamp | None:
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino


def _pinned(folder: Path) -> str:
    try:
        return (folder / "consortium.pub").read_text(encoding="ascii").strip()
    except (OSError, ValueError) as e:
        raise IdentityError(f"{folder} has no pinned consortium key", hint="enrol first: fedveil client join") from e
