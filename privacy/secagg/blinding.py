"""Group blinding: sums that the server opens and cannot read.

The sites of a session share a group key that the server never sees: the first joined site makes it and seals it for
every other. From it each site makes a stream of its own, uniform modulo q, and adds it to its ciphertext. The opened
sum is then blinded by the sum of the members' streams. Every site can compute this sum, the server cannot. One site
together with the server removes it. A stream is bound to (session, round, nonce, site) and a site contributes once to
each, so that no stream is ever used for two plaintexts.

The blinding covers delta * message + errors, not the message alone: so the members' errors do not show either.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedveil.common import canonical
from fedveil.common.errors import SecureSumError
from fedveil.common.units import SiteId
from fedveil.common.wire import sha256
from fedveil.privacy.secagg import lattice
from fedveil.privacy.secagg.sealed import TAG_BYTES, SessionKey
from fedveil.privacy.secagg.store import Store

KEY_BYTES = 32
BOX_BYTES = KEY_BYTES + TAG_BYTES
_CONTEXT = ["keysum/group"]


class GroupKey:
    """One site's copy of the group key of one session, kept in its store."""

    def __init__(self, session: SessionKey, store: Store) -> None:
        self._session, self._store = session, store

    def deal(self, others: Iterable[SiteId]) -> list[bytes]:
        """Make the key, or take the one made before, and seal it for ``others``: a box of 48 bytes each."""
        key = self._store.get(self._name)
        if key is None:
            key = os.urandom(KEY_BYTES)
            self._store.put(self._name, key)
        return [self._session.seal(site, _CONTEXT, key) for site in others]

    def take(self, lead: SiteId, box: bytes) -> None:
        """Open and keep what ``lead`` dealt; :class:`SecureSumError` for another key than the one taken before."""
        self._store.put(self._name, self._session.unseal(lead, _CONTEXT, box))

    def stream(self, session: str, round: int, nonce: str, site: SiteId) -> lattice.Uniform:
        """The blinding of ``site`` in ``round``; :class:`SecureSumError` if this site has no group key."""
        info = canonical.dumps([session, round, nonce, site])
        return lattice.Uniform(lattice.Stream(HKDF(SHA256(), 32, b"fedveil/blinding/1", info).derive(self._key)))

    def streams(self, session: str, round: int, nonce: str, sites: Sequence[SiteId]) -> list[lattice.Uniform]:
        """The blindings of several sites."""
        return [self.stream(session, round, nonce, site) for site in sites]

    def destroy(self) -> None:
        """Erase the key."""
        self._store.erase(self._name)

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the key, to tell two keys apart within this process; it never leaves it."""
        return sha256(self._key)

    @property
    def _key(self) -> bytes:
        key = self._store.get(self._name)
        if key is None:
            raise SecureSumError("this site has no group key", hint="the first site deals it when the session begins")
        return key

    @property
    def _name(self) -> str:
        return self._session.name("group")
