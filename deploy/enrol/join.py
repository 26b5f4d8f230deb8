"""A member's side of enrolment: its keys are made here and stay here; what travels is public and signed.

::

    request(folder, site)      signing.key, tls.key (0600) and request.json -> to the consortium, by any way
    install(folder, reply)     reply.json <- from the consortium: certificate, authority, its pinned key, roster
    renew(folder)              another request.json under the same keys, before the certificate expires
    renew(folder, rotate=True) ... under a new TLS key, which waits as tls.key.next until the answer comes
    take_roster(folder, file)  a later version of the roster; never an earlier one

A request is a PKCS#10 certificate request (RFC 2986: it proves that the member holds the TLS key) inside a document
signed with the member's Ed25519 identity. A first request is believed because its fingerprint was compared over another
channel; every later one because it is signed with the identity on the roster.
"""

from __future__ import annotations

import datetime
import os
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives import serialization as ser
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from fedveil.common import canonical, identity
from fedveil.common.errors import FedveilError, IdentityError
from fedveil.common.files import write_durably
from fedveil.common.identity import Roster
from fedveil.common.units import site_id
from fedveil.deploy.enrol.provision import MAX_ROSTER_BYTES, load_roster

REQUEST = "request.json"
ASKED, ANSWERED = "fedveil/enrol/1", "fedveil/enrolled/1"
MAX_REQUEST_BYTES = 1 << 16
RENEW_WITHIN = 1 / 3  # the part of a certificate's life that is left when it should be renewed
_NEXT = ".next"


def request(folder: Path, site: str, *, host: str = "") -> str:
    """Make a new member's keys and its ``request.json``; returns the request's fingerprint, to be read out.

    In the folder of a member that is not admitted yet it makes what is missing, so a lost request can be made again.

    Args:
        folder: new or empty.
        site: the member's name; ``server`` for the coordinator.
        host: DNS name or IP address by which sites reach the server; for ``server`` only.

    Raises:
        ConfigError: not a valid name.
        IdentityError: the folder is an enrolled member's; a host for a site, or none for the server.
    """
    member = site_id(site)
    _require_host(member, host)
    if (folder / "tls.pem").exists():
        raise IdentityError(
            f"{folder} is an enrolled member's", hint="'fedveil client renew' asks for a new certificate"
        )
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for name in ("signing.key", "tls.key"):
        if (folder / name).exists() and not (folder / name).stat().st_size:
            (folder / name).unlink()  # an empty file: no key was ever written to it
    if not (folder / "signing.key").exists():
        identity.save_signing_key(folder / "signing.key", identity.new_signing_key())
    if not (folder / "tls.key").exists():
        _new_tls_key(folder / "tls.key")
    return _write_request(folder, member, "tls.key", host)


def renew(folder: Path, *, rotate: bool = False, host: str = "") -> str:
    """Write a ``request.json`` for an enrolled member; returns its fingerprint.

    Args:
        rotate: under a new TLS key; the roster then gets a new version.

    Raises:
        IdentityError: the folder is not an enrolled member's.
    """
    member = _enrolled(folder)
    _require_host(member, host)
    name = "tls.key"
    if rotate:
        name += _NEXT
        if not (folder / name).exists():
            _new_tls_key(folder / name)
    return _write_request(folder, member, name, host)


def install(folder: Path, reply: Path, *, consortium_key: str = "") -> x509.Certificate:
    """Take the consortium's answer; returns the certificate that is now in force.

    Args:
        consortium_key: 64 hexadecimal digits, as heard from somebody trusted. Needed the first time, when it is pinned.

    Raises:
        IdentityError: the answer is not signed by the pinned key, is another member's, fits none of the folder's TLS
            keys, or its roster is older than the one held.
    """
    consortium_key = consortium_key.strip().lower()
    pin_file = folder / "consortium.pub"
    pin = pin_file.read_text(encoding="ascii").strip() if pin_file.exists() else consortium_key
    if not pin or (consortium_key and pin != consortium_key):
        raise IdentityError(
            "no consortium key is pinned here" if not pin else f"another consortium key is pinned in {pin_file}",
            hint="give --consortium-key, as read out by the consortium",
        )
    said = identity.opened(read_document(reply), ANSWERED, pin, what="the consortium's answer")
    key = identity.load_signing_key(folder / "signing.key")
    try:
        pem, ca = str(said["certificate"]).encode(), str(said["ca"]).encode()
        certificate, authority = x509.load_pem_x509_certificate(pem), x509.load_pem_x509_certificate(ca)
        certificate.verify_directly_issued_by(authority)
        ours = said["signing_key"] == identity.public_hex(key)
    except Exception as e:  # the library raises several unrelated classes here
        raise IdentityError("the consortium's answer is malformed", hint="ask for it again") from e
    if not ours:
        raise IdentityError("the answer was made for another member's identity", hint="use this member's own answer")
    if (folder / "ca.pem").exists() and (folder / "ca.pem").read_bytes() != ca:
        raise IdentityError("the answer comes from another authority than the one in use", hint="enrol in a new folder")
    name = _fitting_key(folder, identity.spki_sha256(pem))
    if said.get("roster") is not None:
        _check_roster(folder, said["roster"], pin)
    if name.endswith(_NEXT):
        os.replace(folder / name, folder / "tls.key")
    for file, data in (("tls.pem", pem), ("ca.pem", ca), ("consortium.pub", pin.encode() + b"\n")):
        write_durably(folder / file, data)
    if said.get("roster") is not None:
        write_durably(folder / "roster.json", canonical.dumps(said["roster"]) + b"\n")
    (folder / REQUEST).unlink(missing_ok=True)
    return certificate


def take_roster(folder: Path, file: Path) -> Roster:
    """Install a roster: signed by the pinned key, and no older than the one held.

    Raises:
        IdentityError: it is not.
    """
    try:
        pin = (folder / "consortium.pub").read_text(encoding="ascii").strip()
    except (OSError, ValueError) as e:
        raise IdentityError(
            f"{folder} has no pinned consortium key", hint="install the consortium's answer first"
        ) from e
    document = read_document(file)
    made = _check_roster(folder, document, pin)
    write_durably(folder / "roster.json", canonical.dumps(document) + b"\n")
    return made


def due(folder: Path, now: datetime.datetime | None = None) -> tuple[float, bool]:
    """Days for which a member's certificate still holds (negative: expired), and whether to renew it now."""
    certificate = x509.load_pem_x509_certificate((folder / "tls.pem").read_bytes())
    at = now or datetime.datetime.now(datetime.UTC)
    left = certificate.not_valid_after_utc - at
    life = certificate.not_valid_after_utc - certificate.not_valid_before_utc
    return left / datetime.timedelta(days=1), left < life * RENEW_WITHIN


def read_document(path: Path, limit: int = MAX_ROSTER_BYTES) -> Any:
    """A JSON file of bounded size.

    Raises:
        IdentityError: it cannot be read or is no JSON.
    """
    try:
        with path.open("rb") as f:
            return canonical.loads(f.read(limit + 1), limit=limit)
    except OSError as e:
        raise IdentityError(f"{path} cannot be read: {e.strerror}", hint="check the path and its permissions") from e
    except FedveilError as e:
        raise IdentityError(f"{path} is malformed: {e.message}", hint="copy it again") from e


def fingerprint(document: Any) -> str:
    """What two persons compare of a request: 32 digits of its hash (128 bits), in groups of four."""
    digits = canonical.digest(document)[:32]
    return " ".join(digits[i : i + 4] for i in range(0, 32, 4))


def _require_host(member: str, host: str) -> None:
    if (member == identity.SERVER) != bool(host):
        raise IdentityError(
            "the server's request has to name a host, and no other request may",
            hint="give --host with --site server, and only there",
        )


def _write_request(folder: Path, member: str, tls: str, host: str) -> str:
    key = identity.load_signing_key(folder / "signing.key")
    csr = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, member)]))
        .sign(_tls_key(folder / tls), hashes.SHA256())
    )
    payload = {
        "v": 1, "site": member, "host": host, "signing_key": identity.public_hex(key),
        "csr": csr.public_bytes(ser.Encoding.PEM).decode(),
    }  # fmt: skip
    document = identity.signed(key, ASKED, payload)
    write_durably(folder / REQUEST, canonical.dumps(document) + b"\n")
    return fingerprint(document)


def _enrolled(folder: Path) -> str:
    try:
        certificate = x509.load_pem_x509_certificate((folder / "tls.pem").read_bytes())
        name = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value
    except (OSError, ValueError, IndexError) as e:
        raise IdentityError(f"{folder} is not an enrolled member's", hint="enrol first: 'fedveil client join'") from e
    return site_id(str(name))


def _new_tls_key(path: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    identity.write_secret(path, key.private_bytes(ser.Encoding.PEM, ser.PrivateFormat.PKCS8, ser.NoEncryption()))


def _tls_key(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        if path.stat().st_mode & 0o077:
            raise IdentityError(f"{path} can be read by others", hint=f"chmod 600 {path}")
        key = ser.load_pem_private_key(path.read_bytes(), None)
    except (OSError, ValueError, TypeError) as e:
        raise IdentityError(
            f"no TLS key could be read from {path}", hint="restore it from a backup, or enrol anew"
        ) from e
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise IdentityError(
            f"{path} does not hold an elliptic curve key", hint="restore it from a backup, or enrol anew"
        )
    return key


def _fitting_key(folder: Path, spki: str) -> str:
    """The name of the TLS key that a certificate was issued for."""
    for name in ("tls.key" + _NEXT, "tls.key"):
        if (folder / name).exists():
            der = _tls_key(folder / name).public_key()
            raw = der.public_bytes(ser.Encoding.DER, ser.PublicFormat.SubjectPublicKeyInfo)
            if canonical.sha256_hex(raw) == spki:
                return name
    raise IdentityError(
        "the certificate is for another TLS key than this folder's", hint="ask for a new one: 'fedveil client renew'"
    )


def _check_roster(folder: Path, document: Any, pin: str) -> Roster:
    """The roster of a document, once its signature holds and it is not older than the one in the folder."""
    made = identity.open_roster(document, pin)
    if (folder / "roster.json").exists():
        held = load_roster(folder)
        if made.version < held.version or (made.version == held.version and made.hash != held.hash):
            raise IdentityError(
                f"roster version {made.version} does not follow version {held.version}, which is in use",
                hint="a roster only goes forward: ask for the latest one",
            )
    return made
