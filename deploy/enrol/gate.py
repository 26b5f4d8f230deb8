"""Who may stay connected: the server checks every certificate again and again while a run goes on.

The TLS handshake checks a certificate once, but a run can last for days. So the check is made again at every call, and
every second for every open session (:func:`fedveil.deploy.transport.grpc_grid.serve`). A revocation list takes effect
within a second after its file is replaced, and a certificate ends when it expires.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from cryptography import x509

from fedveil.common import identity
from fedveil.common.errors import IdentityError
from fedveil.common.units import SiteId
from fedveil.deploy.enrol.revoked import Revoked


def _utc_now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


class Doorkeeper:
    """Raises :class:`IdentityError` for a site whose certificate has expired or was revoked.

    Args:
        folder: the server's identity folder; ``revoked.json`` may come, and be replaced, at any time.
        kept: the folder in which the newest list is kept over restarts; see :class:`Revoked`.

    Raises:
        IdentityError: there is a list at the start, and it does not hold.
    """

    def __init__(
        self, folder: Path, now: Callable[[], datetime.datetime] = _utc_now, *, kept: Path | None = None
    ) -> None:
        self._revoked, self._now = Revoked(folder, kept), now

    def __call__(self, site: SiteId, pem: bytes) -> None:
        """Look at one certificate (PEM) of a site that the TLS handshake has authenticated."""
        spki, ends = _parts(pem)
        self._revoked().refuse(site, spki)
        if self._now() > ends:
            raise IdentityError(f"the certificate of {site!r} has expired", hint="fedveil client renew")

    @property
    def number(self) -> int:
        """The number of the list in force; 0 without one."""
        return self._revoked().number


@lru_cache(maxsize=8192)
def _parts(pem: bytes) -> tuple[str, datetime.datetime]:
    return identity.spki_sha256(pem), x509.load_pem_x509_certificate(pem).not_valid_after_utc
