"""Who may stay connected: the server's look at every certificate, again and again while a run goes on.

The TLS handshake looks at a certificate once. A run can last for days: this is asked at every call and every second
for every open session (:func:`fedveil.deploy.transport.grpc_grid.serve`), so that a revocation list takes effect
within a second of its file being replaced, and a certificate ends when it expires.
"""

from __future__ import annotations

import datetime
import logging
import threading
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from cryptography import x509

from fedveil.common import identity
from fedveil.common.errors import IdentityError
from fedveil.common.identity import Revocations
from fedveil.common.units import SiteId
from fedveil.deploy.enrol import read_document

REVOKED = "revoked.json"
_LOG = logging.getLogger("fedveil.server")


def _utc_now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


class Doorkeeper:
    """Raises :class:`IdentityError` for a site whose certificate has expired or was revoked.

    Args:
        folder: the server's identity folder; ``revoked.json`` may come, and be replaced, at any time. A list that is
            not signed by the pinned key, or has a lower number than the one in force, is not taken; the old one stays.

    Raises:
        IdentityError: there is a list at the start, and it does not hold.
    """

    def __init__(self, folder: Path, now: Callable[[], datetime.datetime] = _utc_now) -> None:
        self._path, self._now = folder / REVOKED, now
        self._pin = (folder / "consortium.pub").read_text(encoding="ascii").strip()
        self._lock = threading.Lock()
        self._seen: tuple[int, int, int] | None = None
        self._revoked = Revocations(0, frozenset(), frozenset())
        if (seen := self._stamp()) is not None:
            self._seen, self._revoked = seen, identity.open_revocations(read_document(self._path), self._pin)

    def __call__(self, site: SiteId, pem: bytes) -> None:
        """Look at one certificate (PEM) of a site that the TLS handshake has authenticated."""
        self._read_again()
        spki, ends = _parts(pem)
        self._revoked.refuse(site, spki)
        if self._now() > ends:
            raise IdentityError(f"the certificate of {site!r} has expired", hint="fedveil client renew")

    @property
    def number(self) -> int:
        """Of the list in force; 0 without one."""
        return self._revoked.number

    def _stamp(self) -> tuple[int, int, int] | None:
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino

    def _read_again(self) -> None:
        seen = self._stamp()
        if seen is None or seen == self._seen:
            return
        with self._lock:
            if seen == self._seen:
                return
            try:
                found = identity.open_revocations(read_document(self._path), self._pin)
            except IdentityError as e:
                _LOG.error("%s is not taken: %s", self._path, e)
            else:
                if found.number < self._revoked.number:
                    _LOG.error("%s is older than list %d, which stays in force", self._path, self._revoked.number)
                else:
                    self._revoked = found
            self._seen = seen


@lru_cache(maxsize=8192)
def _parts(pem: bytes) -> tuple[str, datetime.datetime]:
    return identity.spki_sha256(pem), x509.load_pem_x509_certificate(pem).not_valid_after_utc
