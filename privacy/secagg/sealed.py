"""A site's key of one session, and boxes from one site to another through the server.

Every session has fresh X25519 keys, announced in the sites' signed join statements and destroyed at the end. Someone
who records the traffic and later steals a site's disk can open nothing. A box is AES-256-GCM under HKDF-SHA256 of the
two sites' X25519 secret; the context (who to whom, what for) is bound in as the derivation's ``info``, and every
context is used once, so that the nonce can be constant.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedveil.common import canonical
from fedveil.common.errors import IdentityError, SecureSumError
from fedveil.common.units import SiteId
from fedveil.privacy.secagg.interface import SumSpec, is_hex
from fedveil.privacy.secagg.store import Store

TAG_BYTES = 16
_NONCE = bytes(12)


class Joins:
    """The X25519 keys of the joined sites, in roster order; one digest stands for them and the session's figures.

    ``helpers`` are the joined sites that receive shares.

    Raises:
        SecureSumError: a site is not on the roster, a key is malformed or used twice, or too few sites joined.
    """

    def __init__(self, spec: SumSpec, fields: Mapping[SiteId, Mapping[str, Any]]) -> None:
        keys: dict[SiteId, str] = {}
        for member in spec.roster.sites:
            if member.site in fields:
                key = fields[member.site].get("x25519")
                if not is_hex(key, 64):
                    raise SecureSumError(f"the join statement of {member.site!r} holds no X25519 key")
                keys[member.site] = str(key)
        if len(keys) != len(fields):
            raise SecureSumError("a site that is not on the roster joined")
        if len(set(keys.values())) != len(keys):
            raise SecureSumError("two sites joined with one X25519 key", hint="every site makes its own")
        self.keys = keys
        self.sites = tuple(keys)
        self.helpers = tuple(site for site in spec.all_helpers if site in keys)
        for what, have, need in (
            ("sites", len(keys), spec.min_members),
            ("helpers", len(self.helpers), spec.threshold),
        ):
            if have < need:
                raise SecureSumError(f"{have} {what} joined; {need} are needed", hint="wait for more sites")
        self.digest = canonical.digest([spec.figures, keys])


class SessionKey:
    """One site's X25519 key of one session, kept in its store until :meth:`destroy`."""

    def __init__(self, spec: SumSpec, site: SiteId, store: Store) -> None:
        self._spec, self._site, self._store = spec, site, store
        self._prefix = f"{spec.session}-{spec.roster.index(site)}"
        self.joins: Joins | None = None
        self._private: X25519PrivateKey | None = None
        self._first = canonical.dumps([spec.plan_hash, spec.roster.hash, spec.session])[:-1] + b","
        self._shared: dict[SiteId, bytes] = {}  # with each peer; dropped with the private key
        raw = store.get(self.name("x25519"))
        if raw is not None and not self.ended:
            self._private = X25519PrivateKey.from_private_bytes(raw)
        fields = store.get(self.name("joins"))
        if fields is not None:
            self.joins = Joins(spec, canonical.loads(fields))

    def name(self, what: str, round: int | None = None) -> str:
        """The name in the store of this site's ``what`` of this session (and round)."""
        return f"{self._prefix}-{what}" if round is None else f"{self._prefix}-{what}-{round}"

    @property
    def ended(self) -> bool:
        """True once the session's secrets were destroyed."""
        return self._store.get(self.name("ended")) is not None

    def public(self) -> str:
        """The public key, hex; made and stored on the first call."""
        if self._private is None:
            if self.ended:
                raise _ended()
            key = X25519PrivateKey.generate()
            self._store.put(self.name("x25519"), key.private_bytes_raw())
            self._private = key
        return self._private.public_key().public_bytes_raw().hex()

    def join(self, fields: Mapping[SiteId, Mapping[str, Any]]) -> Joins:
        """Take the sites' keys; :class:`SecureSumError` if they differ from those taken before."""
        joins = Joins(self._spec, fields)
        if joins.keys.get(self._site) != self.public():
            raise SecureSumError(f"site {self._site!r} is not among the joined sites under its own key")
        self._store.put(self.name("joins"), canonical.dumps({s: {"x25519": k} for s, k in joins.keys.items()}))
        self.joins, self._shared = joins, {}
        return joins

    def seal(self, receiver: SiteId, context: list[Any], data: bytes) -> bytes:
        """``data`` in a box from this site to ``receiver``, 16 bytes longer."""
        return self._box(receiver, context, self._site, receiver).encrypt(_NONCE, data, None)

    def unseal(self, sender: SiteId, context: list[Any], box: bytes) -> bytes:
        """What ``sender`` sealed for this site; :class:`SecureSumError` if the box or its context differ."""
        try:
            return self._box(sender, context, sender, self._site).decrypt(_NONCE, box, None)
        except InvalidTag as e:
            raise SecureSumError(f"a box from {sender!r} does not open") from e

    def destroy(self) -> None:
        """Erase the private key for good; the session stays ended."""
        self._store.put(self.name("ended"), b"ended")
        self._store.erase(self.name("x25519"))
        self._private, self._shared = None, {}

    def _box(self, peer: SiteId, context: list[Any], sender: SiteId, receiver: SiteId) -> AESGCM:
        if self._private is None:
            raise _ended()
        if self.joins is None or peer not in self.joins.keys:
            raise SecureSumError(f"site {peer!r} did not join this session")
        shared = self._shared.get(peer)
        if shared is None:
            try:
                shared = self._private.exchange(X25519PublicKey.from_public_bytes(bytes.fromhex(self.joins.keys[peer])))
            except ValueError as e:
                raise IdentityError(f"the X25519 key of {peer!r} is degenerate") from e
            self._shared[peer] = shared
        # The canonical list, put together: the names of sites hold nothing that JSON escapes.
        info = self._first + b'"%b","%b",' % (sender.encode(), receiver.encode()) + _tail(*context)
        return AESGCM(HKDF(SHA256(), 32, b"fedveil/box/1", info).derive(shared))


def _ended() -> SecureSumError:
    return SecureSumError("this session has no key", hint="it ended here, or was never joined: start a new session")


@lru_cache(maxsize=1024)  # one context is that of a site's boxes for all others
def _tail(*context: str | int) -> bytes:
    """How a canonical list with these last entries goes on and ends."""
    return canonical.dumps(context)[1:]
