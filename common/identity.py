"""Keys, signatures and the roster: who may speak for whom.

Signatures are Ed25519 (RFC 8032) over ``domain || 0x00 || payload``, so a signature made for one purpose is not valid
for another. Private keys are written once, with mode 0600, and never overwritten. The consortium signs the roster,
and every site pins it. It binds a site's name to its signing key and to the key of its TLS certificate. That is the
SHA-256 of the SubjectPublicKeyInfo, so that a certificate can be renewed.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization as ser
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedveil.common import canonical
from fedveil.common.errors import MALFORMED, ConfigError, IdentityError
from fedveil.common.units import MAX_SITES, SiteId, site_id

SERVER = SiteId("server")
_ROSTER = "fedveil/roster/1"
_REVOKED = "fedveil/revoked/1"
MAX_VERSION = 1 << 31


def new_signing_key() -> Ed25519PrivateKey:
    """A fresh Ed25519 key from the operating system's randomness."""
    return Ed25519PrivateKey.generate()


def public_hex(key: Ed25519PrivateKey) -> str:
    """The public half as 64 hexadecimal digits."""
    return key.public_key().public_bytes(ser.Encoding.Raw, ser.PublicFormat.Raw).hex()


def write_secret(path: Path, data: bytes) -> None:
    """Create ``path`` with mode 0600 and write ``data``; an existing file is never overwritten."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError as e:
        raise IdentityError(
            f"{path} exists already", hint="move it away first, or name a new file: keys are never overwritten"
        ) from e
    with os.fdopen(fd, "wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())


def save_signing_key(path: Path, key: Ed25519PrivateKey) -> None:
    """Write ``key`` as unencrypted PKCS#8 PEM, mode 0600."""
    write_secret(path, key.private_bytes(ser.Encoding.PEM, ser.PrivateFormat.PKCS8, ser.NoEncryption()))


def load_signing_key(path: Path) -> Ed25519PrivateKey:
    """Read an Ed25519 key. A file that others may read is refused."""
    try:
        if path.stat().st_mode & 0o077:
            raise IdentityError(f"{path} can be read by others", hint=f"chmod 600 {path}")
        key = ser.load_pem_private_key(path.read_bytes(), None)
    except (OSError, ValueError, TypeError) as e:
        raise IdentityError(
            f"no signing key could be read from {path}",
            hint="restore it from a backup; a new member makes one with 'fedveil client join'",
        ) from e
    if not isinstance(key, Ed25519PrivateKey):
        raise IdentityError(
            f"{path} does not hold an Ed25519 key",
            hint="restore it from a backup; a new member makes one with 'fedveil client join'",
        )
    return key


def sign(key: Ed25519PrivateKey, domain: str, payload: bytes) -> bytes:
    """64-byte signature over ``domain || 0x00 || payload``."""
    return key.sign(domain.encode() + b"\0" + payload)


def verify(public: str, domain: str, payload: bytes, signature: bytes, *, what: str) -> None:
    """Raise :class:`IdentityError` naming ``what`` unless ``signature`` is ``public``'s over the payload.

    A signature that held is not computed again: its hash, with those of the key and of what is signed, is remembered.
    """
    signed = domain.encode() + b"\0" + payload
    lengths = b"%d %d " % (len(public), len(signature))
    known = hashlib.sha256(b"".join((lengths, public.encode(), signature, signed))).digest()
    if known in _held:
        return
    try:
        _public_key(public).verify(signature, signed)
    except (InvalidSignature, ValueError) as e:
        raise IdentityError(f"the signature of {what} does not hold") from e
    if len(_held) >= _MAX_HELD:
        _held.clear()
    _held.add(known)


# In a simulation every site verifies the same headers and statements, and the ledgers are verified several times.
_MAX_HELD = 1 << 16
_held: set[bytes] = set()


@lru_cache(maxsize=2 * MAX_SITES)
def _public_key(public: str) -> Ed25519PublicKey:
    return Ed25519PublicKey.from_public_bytes(bytes.fromhex(public))


def spki_sha256(certificate_pem: bytes) -> str:
    """SHA-256 (hex) of a certificate's SubjectPublicKeyInfo: the identity that survives a renewal."""
    try:
        key = x509.load_pem_x509_certificate(certificate_pem).public_key()
    except (ValueError, UnsupportedAlgorithm, x509.InvalidVersion) as e:
        raise IdentityError("a certificate could not be parsed") from e
    spki = key.public_bytes(ser.Encoding.DER, ser.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(spki).hexdigest()


@dataclass(frozen=True)
class Member:
    """One line of the roster.

    Attributes:
        site: the member's name; ``server`` for the coordinator.
        signing_key: Ed25519 public key, hex.
        tls_key: SHA-256 of the TLS certificate's SubjectPublicKeyInfo, hex; empty in the simulator.
    """

    site: SiteId
    signing_key: str
    tls_key: str = ""


@dataclass(frozen=True)
class Roster:
    """The members of a consortium. Their order fixes their Shamir indices (first site: 1).

    ``version`` only goes forward: a member never goes back to an older roster.
    """

    consortium: str
    server: Member
    sites: tuple[Member, ...]
    version: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.version <= MAX_VERSION:
            raise IdentityError(f"a roster's version {self.version} is outside 1..2^31")
        if not 0 < len(self.sites) <= MAX_SITES:
            raise IdentityError(f"a roster of {len(self.sites)} sites is outside 1..{MAX_SITES}")
        for what, values in (
            ("site id", [m.site for m in self.sites] + [self.server.site]),
            ("signing key", [m.signing_key for m in self.sites] + [self.server.signing_key]),
            ("TLS key", [k for m in (*self.sites, self.server) if (k := m.tls_key)]),
        ):
            if len(set(values)) != len(values):
                raise IdentityError(f"two members of the roster share one {what}", hint="every member needs its own")

    @cached_property
    def payload(self) -> dict[str, Any]:
        """The JSON form that is signed. Version 1 is not written, so that the hash of such a roster is what it was."""
        member = lambda m: {"site": m.site, "signing_key": m.signing_key, "tls_key": m.tls_key}  # noqa: E731
        return {
            "v": 1,
            "consortium": self.consortium,
            "server": member(self.server),
            "sites": [member(m) for m in self.sites],
            **({"version": self.version} if self.version > 1 else {}),
        }

    @cached_property
    def hash(self) -> str:
        """SHA-256 (hex) of the canonical payload."""
        return canonical.digest(self.payload)

    @cached_property
    def _by_site(self) -> dict[str, int]:
        return {m.site: i for i, m in enumerate(self.sites)}

    def index(self, site: str) -> int:
        """Position of ``site``, 0-based; :class:`IdentityError` when it is not on the roster."""
        try:
            return self._by_site[site]
        except KeyError as e:
            raise IdentityError(f"site {site[:64]!r} is not on the roster of {self.consortium!r}") from e

    def member(self, site: str) -> Member:
        """The line of ``site``."""
        return self.sites[self.index(site)]

    def by_tls_key(self, spki: str) -> Member:
        """The member whose TLS key has this SHA-256; :class:`IdentityError` when there is none."""
        for m in self.sites:
            if m.tls_key and m.tls_key == spki:
                return m
        raise IdentityError("the certificate is not on the roster", hint="enrol the site first")


def roster_from_payload(payload: Any) -> Roster:
    """Parse the JSON form; every malformed part is an :class:`IdentityError`."""
    try:
        if payload["v"] != 1:
            raise IdentityError(f"roster version {payload['v']!r} is not known")
        member = lambda m: Member(site_id(m["site"]), _hex32(m["signing_key"]), _hex32(m["tls_key"], empty=True))  # noqa: E731
        version = payload.get("version", 1)
        if type(payload["consortium"]) is not str or type(payload["sites"]) is not list or type(version) is not int:
            raise TypeError
        return Roster(payload["consortium"], member(payload["server"]), tuple(map(member, payload["sites"])), version)
    except (*MALFORMED, ConfigError) as e:
        raise IdentityError("the roster is malformed") from e


def sign_roster(roster: Roster, consortium_key: Ed25519PrivateKey) -> dict[str, Any]:
    """The signed file: ``{"payload", "signer", "signature"}``."""
    return signed(consortium_key, _ROSTER, roster.payload)


def open_roster(document: Any, consortium_public: str) -> Roster:
    """Check the consortium's signature against the pinned key and parse."""
    return roster_from_payload(opened(document, _ROSTER, consortium_public, what="the roster"))


@dataclass(frozen=True)
class Revocations:
    """Who may not connect any more, although the certificate is still valid.

    Attributes:
        number: grows with every list. The list with the highest number is in force.
        sites: members that are shut out with every key.
        tls_keys: SHA-256 (hex) of the public keys of single certificates, whoever holds them.
    """

    number: int
    sites: frozenset[str]
    tls_keys: frozenset[str]

    def refuse(self, site: str, tls_key: str) -> None:
        """Raise :class:`IdentityError` if ``site`` or this key of it was revoked."""
        if site in self.sites or tls_key in self.tls_keys:
            raise IdentityError(
                f"{site!r} was revoked by the consortium (list {self.number})", hint="ask the consortium why"
            )


def sign_revocations(revoked: Revocations, consortium_key: Ed25519PrivateKey) -> dict[str, Any]:
    """The signed file."""
    payload = {"v": 1, "number": revoked.number, "sites": sorted(revoked.sites), "tls_keys": sorted(revoked.tls_keys)}
    return signed(consortium_key, _REVOKED, payload)


def open_revocations(document: Any, consortium_public: str) -> Revocations:
    """Check the consortium's signature against the pinned key and parse; :class:`IdentityError` otherwise."""
    payload = opened(document, _REVOKED, consortium_public, what="the revocation list")
    try:
        if payload["v"] != 1 or type(payload["number"]) is not int or not 0 < payload["number"] <= MAX_VERSION:
            raise TypeError
        sites, keys = ([*payload[name]] for name in ("sites", "tls_keys"))
        return Revocations(payload["number"], frozenset(map(site_id, sites)), frozenset(map(_hex32, keys)))
    except (*MALFORMED, ConfigError) as e:
        raise IdentityError("the revocation list is malformed") from e


def signed(key: Ed25519PrivateKey, domain: str, payload: Any) -> dict[str, Any]:
    """``{"payload", "signer", "signature"}``: a JSON payload with an Ed25519 signature over its canonical form."""
    return {
        "payload": payload,
        "signer": public_hex(key),
        "signature": sign(key, domain, canonical.dumps(payload)).hex(),
    }


def opened(document: Any, domain: str, public: str, *, what: str) -> Any:
    """The payload of :func:`signed`, after its signature by ``public`` was verified.

    A signed document can be written in one way only: it holds nothing unsigned, and its digits are lower-case.
    """
    try:
        payload, signer, signature = document["payload"], document["signer"], bytes.fromhex(document["signature"])
    except MALFORMED as e:
        raise IdentityError(f"{what} is not signed", hint="use the file as its sender made it") from e
    if len(document) != 3 or document["signature"] != signature.hex():
        raise IdentityError(
            f"{what} has more than payload, signer and signature, or its signature is not in lower-case digits"
        )
    if signer != public:
        raise IdentityError(f"{what} is signed by a key other than the pinned one")
    verify(public, domain, canonical.dumps(payload), signature, what=what)
    return payload


def _hex32(value: str, *, empty: bool = False) -> str:
    if empty and value == "":
        return ""
    try:
        if len(value) != 64 or value != value.lower() or len(bytes.fromhex(value)) != 32:
            raise ValueError
    except MALFORMED as e:
        raise IdentityError("a key on the roster is not 64 lower-case hexadecimal digits") from e
    return value
