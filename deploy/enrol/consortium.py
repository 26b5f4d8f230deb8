"""The consortium's side of enrolment: admits members, renews certificates, signs rosters and who is revoked.

::

    FOLDER/ca.key ca.pem consortium.key consortium.pub     made once by found(); keep them offline
    FOLDER/members.json     who was admitted, with which public keys; the next roster is made of it
    FOLDER/roster.json      the latest signed roster        FOLDER/revoked.json     the latest signed revocation list

No private key of a member ever comes here.
"""

from __future__ import annotations

import hmac
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization as ser
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.x509.oid import NameOID

from fedveil.common import canonical, identity
from fedveil.common.errors import MALFORMED, ConfigError, IdentityError
from fedveil.common.files import write_durably
from fedveil.common.identity import Member, Revocations, Roster
from fedveil.common.units import MAX_DAYS, site_id
from fedveil.deploy.enrol.join import ANSWERED, ASKED, MAX_REQUEST_BYTES, fingerprint, read_document
from fedveil.deploy.enrol.provision import Authority

_MEMBERS = "members.json"


def found(folder: Path, consortium: str, days: int = MAX_DAYS) -> str:
    """Make an authority and the consortium's signing key. Returns the key's public half, which every member pins.

    Raises:
        ConfigError: a name or number of days outside its bounds.
        IdentityError: the folder holds one already.
    """
    if not (0 < len(consortium) <= 64 and consortium.isprintable()) or not 0 < days <= MAX_DAYS:
        raise ConfigError(
            "the consortium's name or days cannot be used",
            hint=f"a name has 1 to 64 characters; --days takes 1 to {MAX_DAYS}",
        )
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise IdentityError(f"{folder} is not empty", hint="choose a new folder; keys are never replaced")
    authority, key = Authority(consortium, days), identity.new_signing_key()
    pem = authority.key.private_bytes(ser.Encoding.PEM, ser.PrivateFormat.PKCS8, ser.NoEncryption())
    identity.write_secret(folder / "ca.key", pem)
    identity.save_signing_key(folder / "consortium.key", key)
    write_durably(folder / "ca.pem", authority.pem)
    write_durably(folder / "consortium.pub", identity.public_hex(key).encode() + b"\n")
    _write(folder, {"v": 1, "consortium": consortium, "version": 0, "members": {}})
    return identity.public_hex(key)


def sign_request(folder: Path, request: Path, out: Path, *, heard: str = "", days: int = 30) -> str:
    """Answer a member's request with a certificate; returns what was done, in words.

    Args:
        out: receives the answer; must not exist.
        heard: the request's fingerprint, as the member read it out. Needed for a member that was not admitted before.

    Raises:
        IdentityError: the request is malformed or not signed; its name or key is another's or was revoked; its
            fingerprint is another one; or it is a renewal that is not signed with the member's own identity.
    """
    if not 0 < days <= MAX_DAYS:
        raise ConfigError(f"days = {days} cannot be used", hint=f"--days takes 1 to {MAX_DAYS}")
    if out.exists():
        raise IdentityError(f"{out} exists already", hint="name a new file")
    state, document = _read(folder), read_document(request, MAX_REQUEST_BYTES)
    site, host, public, key, spki = _opened(document)
    _revocations(folder).refuse(site, spki)
    known = state["members"].get(site)
    _not_taken(state["members"], site, public, spki)
    if known is None:
        _compare(document, heard)
        done = f"{site} is admitted; sign a roster when everybody is"
    elif known["signing_key"] != public:
        raise IdentityError(
            f"the request is not signed with the identity of {site!r}", hint="revoke the member and admit another name"
        )
    elif known["tls_key"] != spki:
        done = f"{site} has a new TLS key; sign the next version of the roster before it connects"
    else:
        done = f"{site} has a new certificate"
    pem = Authority.load(folder, days).issue_to(site, key, host)
    state["members"][site] = {"signing_key": public, "tls_key": spki}
    roster = read_document(folder / "roster.json") if (folder / "roster.json").exists() else None
    payload = {
        "v": 1, "site": site, "signing_key": public, "certificate": pem.decode(),
        "ca": (folder / "ca.pem").read_text(), "roster": roster,
    }  # fmt: skip
    _write(folder, state)
    write_durably(out, canonical.dumps(identity.signed(_key(folder), ANSWERED, payload)) + b"\n")
    return done


def publish(folder: Path) -> Roster:
    """Sign the next version of the roster: everybody who was admitted, in the order of their names.

    Raises:
        IdentityError: the server or every site is missing; or a member's TLS key was revoked and not replaced yet:
            whoever pins the roster would go on to trust that key.
    """
    state, revoked = _read(folder), _revocations(folder)
    for name, m in state["members"].items():
        if m["tls_key"] in revoked.tls_keys or name in revoked.sites:
            raise IdentityError(
                f"the TLS key of {name!r} was revoked and not replaced",
                hint="let it make a new one ('fedveil client renew --rotate', then sign-csr), or revoke the member",
            )
    members = {s: Member(site_id(s), m["signing_key"], m["tls_key"]) for s, m in sorted(state["members"].items())}
    server = members.pop(identity.SERVER, None)
    if server is None or not members:
        raise IdentityError(
            "a roster needs the server and at least one site", hint="admit them with 'fedveil provision sign-csr'"
        )
    state["version"] += 1
    made = Roster(state["consortium"], server, tuple(members.values()), state["version"])
    _write(folder, state)
    write_durably(folder / "roster.json", canonical.dumps(identity.sign_roster(made, _key(folder))) + b"\n")
    return made


def revoke(folder: Path, site: str, *, key_only: bool = False) -> Revocations:
    """Shut out a member, or one of its TLS keys. Returns the new list.

    Raises:
        IdentityError: it is not a member; or it is the server, whose name no other member can take.
    """
    if site == identity.SERVER and not key_only:
        raise IdentityError(
            "the server cannot be revoked whole: nobody else could be admitted under its name",
            hint="--key-only revokes its TLS key; if its signing key was stolen, found a new consortium",
        )
    state, old = _read(folder), _revocations(folder)
    known = state["members"].get(site)
    if known is None:
        raise IdentityError(f"{site[:64]!r} is not a member", hint=f"one of {', '.join(state['members'])}"[:512])
    sites = old.sites if key_only else old.sites | {site}
    made = Revocations(old.number + 1, sites, old.tls_keys | {known["tls_key"]})
    # The list comes first: if this stops in between, the member is shut out and the command can be given again.
    write_durably(folder / "revoked.json", canonical.dumps(identity.sign_revocations(made, _key(folder))) + b"\n")
    if not key_only:
        del state["members"][site]
        _write(folder, state)
    return made


def _opened(document: Any) -> tuple[str, str, str, ec.EllipticCurvePublicKey, str]:
    """Name, host, identity, TLS key and its SHA-256 of a request whose two signatures hold."""
    try:
        public = str(document["payload"]["signing_key"])
        said = identity.opened(document, ASKED, public, what="the request")
        if set(said) != {"v", "site", "host", "signing_key", "csr"} or said["v"] != 1:
            raise TypeError
        site, host = site_id(said["site"]), str(said["host"])
        csr = x509.load_pem_x509_csr(said["csr"].encode())
        name = csr.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value
        key = csr.public_key()
        ok = csr.is_signature_valid and name == site and isinstance(key, ec.EllipticCurvePublicKey)
    except (*MALFORMED, UnsupportedAlgorithm, x509.InvalidVersion, ConfigError) as e:
        raise IdentityError(
            "the request is malformed", hint="'fedveil client join' and 'fedveil client renew' write one"
        ) from e
    if not (ok and isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1)):
        raise IdentityError("the certificate request is not signed with its own key, or names another member")
    raw = key.public_bytes(ser.Encoding.DER, ser.PublicFormat.SubjectPublicKeyInfo)
    return site, host, public, key, canonical.sha256_hex(raw)


def _not_taken(members: dict[str, dict[str, str]], site: str, public: str, spki: str) -> None:
    for other, m in members.items():
        if other != site and (m["signing_key"] == public or m["tls_key"] == spki):
            raise IdentityError(f"the request of {site!r} uses a key of {other!r}", hint="every member makes its own")


def _compare(document: Any, heard: str) -> None:
    own = fingerprint(document)
    if not hmac.compare_digest("".join(heard.split()).lower(), own.replace(" ", "")):
        raise IdentityError(
            "the fingerprint is not that of the request" if heard else "a new member needs its fingerprint",
            hint="have the member read its own out, and give it with --fingerprint",
        )


def _revocations(folder: Path) -> Revocations:
    path = folder / "revoked.json"
    if not path.exists():
        return Revocations(0, frozenset(), frozenset())
    return identity.open_revocations(read_document(path), identity.public_hex(_key(folder)))


def _key(folder: Path) -> Ed25519PrivateKey:
    return identity.load_signing_key(folder / "consortium.key")


def _read(folder: Path) -> dict[str, Any]:
    """The members so far. If the consortium was made at once, these are the members of its roster."""
    path = folder / _MEMBERS
    if path.exists():
        return _members(read_document(path), path)
    roster = identity.open_roster(read_document(folder / "roster.json"), identity.public_hex(_key(folder)))
    rows = {m.site: {"signing_key": m.signing_key, "tls_key": m.tls_key} for m in (roster.server, *roster.sites)}
    return {"v": 1, "consortium": roster.consortium, "version": roster.version, "members": rows}


def _members(document: Any, path: Path) -> dict[str, Any]:
    """The document if it is what :func:`_write` writes.

    Raises:
        IdentityError: it is not.
    """
    ok = isinstance(document, dict) and document.keys() == {"v", "consortium", "version", "members"}
    members = document["members"] if ok and document["v"] == 1 else None
    keys = {"signing_key", "tls_key"}
    if not isinstance(members, dict) or not all(isinstance(m, dict) and m.keys() == keys for m in members.values()):
        raise IdentityError(f"{path} is not a list of members", hint="restore it from a backup of this folder")
    return document


def _write(folder: Path, state: dict[str, Any]) -> None:
    write_durably(folder / _MEMBERS, canonical.dumps(state) + b"\n")
