"""A consortium's first day: authority, server and site folders, and the roster that binds names to keys.

::

    OUT/consortium/    ca.key ca.pem consortium.key consortium.pub     stays with whoever enrols members
    OUT/server/        signing.key tls.key tls.pem ca.pem roster.json consortium.pub
    OUT/sites/<id>/    the same six files, one folder for each institution

TLS: ECDSA P-256 with SHA-256, leaf certificates for one role each (``serverAuth`` with the host's names, or
``clientAuth`` with ``fedveil://site/<id>``). Identity: Ed25519 keys and a roster signed by the consortium's key.
Private keys are written once, with mode 0600. Every key is made here and must then be carried to its owner by a
channel the consortium trusts.
"""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives import serialization as ser
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedveil.common import canonical, identity
from fedveil.common.errors import ConfigError, FedveilError, IdentityError
from fedveil.common.identity import Member, Roster
from fedveil.common.units import MAX_DAYS, MAX_SITES, SiteId, site_id
from fedveil.deploy.transport import TlsFiles

MAX_ROSTER_BYTES = 4 << 20
_JOIN = "install the consortium's answer: 'fedveil client join FOLDER --reply reply.json'"
_SKEW = datetime.timedelta(minutes=10)  # a member's clock may run behind the one that made its certificate


def make_consortium(
    out: Path, sites: Sequence[str], *, consortium: str, host: str = "localhost", days: int = 30
) -> Roster:
    """Make every key, certificate and the signed roster of a new consortium below ``out``.

    Args:
        sites: the members' names, 1 to 10,000, each once; their order fixes the roster's.
        consortium: a name, 1 to 64 printable characters.
        host: DNS name or IP address by which sites reach the server (``localhost``, 127.0.0.1 and ::1 always work).
        days: how long the certificates hold, 1 to 3650.

    Raises:
        ConfigError: an argument outside its bounds.
        IdentityError: ``out`` holds one of the files already; nothing is overwritten.
    """
    members = [site_id(s) for s in sites]
    if not 0 < len(members) <= MAX_SITES or len(set(members)) != len(members) or identity.SERVER in members:
        raise ConfigError(
            f"{len(members)} site names, {len(set(members))} different",
            hint=f"name 1 to {MAX_SITES} sites, each once and none of them 'server'",
        )
    if not (0 < len(consortium) <= 64 and consortium.isprintable()):
        raise ConfigError("the consortium's name is empty, too long or not printable", hint="1 to 64 characters")
    if not 0 < days <= MAX_DAYS:
        raise ConfigError(f"days = {days} cannot be used", hint=f"--days takes 1 to {MAX_DAYS}")
    _server_names(host)  # refused before anything is written
    for folder in ("consortium", "server", "sites"):
        if (out / folder).exists():
            raise IdentityError(
                f"{out / folder} exists already", hint="choose an empty folder; keys are never replaced"
            )
    authority = Authority(consortium, days)
    key = identity.new_signing_key()
    _private(out / "consortium" / "ca.key", authority.key)
    _public(out / "consortium" / "ca.pem", authority.pem)
    identity.save_signing_key(out / "consortium" / "consortium.key", key)
    server = _member(out / "server", identity.SERVER, authority, host)
    rows = tuple(_member(out / "sites" / m, m, authority) for m in members)
    roster = Roster(consortium, server, rows)
    document = canonical.dumps(identity.sign_roster(roster, key)) + b"\n"
    pin = identity.public_hex(key).encode() + b"\n"
    _public(out / "consortium" / "consortium.pub", pin)
    _public(out / "consortium" / "roster.json", document)
    for folder in (out / "server", *(out / "sites" / m for m in members)):
        _public(folder / "ca.pem", authority.pem)
        _public(folder / "roster.json", document)
        _public(folder / "consortium.pub", pin)
    return roster


def load_tls(folder: Path) -> TlsFiles:
    """The TLS files of a member's folder.

    Raises:
        IdentityError: one is missing or malformed, the key can be read by others or belongs to another
            certificate, or the certificate is expired or not from this authority.
    """
    files = TlsFiles(folder / "ca.pem", folder / "tls.pem", folder / "tls.key")
    try:
        ca = x509.load_pem_x509_certificate(files.ca.read_bytes())
        certificate = x509.load_pem_x509_certificate(files.certificate.read_bytes())
        if files.key.stat().st_mode & 0o077:
            raise IdentityError(f"{files.key} can be read by others", hint=f"chmod 600 {files.key}")
        key = ser.load_pem_private_key(files.key.read_bytes(), None)
    except (OSError, ValueError, TypeError) as e:
        raise IdentityError(f"{folder} lacks usable TLS files", hint=_JOIN) from e
    if _spki(key.public_key()) != _spki(certificate.public_key()):
        raise IdentityError(f"{files.key} is not the key of {files.certificate}", hint="copy the folder again, whole")
    try:
        certificate.verify_directly_issued_by(ca)
    except Exception as e:  # the library raises several unrelated classes here
        raise IdentityError(
            f"{files.certificate} was not issued by {files.ca}", hint="use the two files of one consortium"
        ) from e
    now = datetime.datetime.now(datetime.UTC)
    if not certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc:
        raise IdentityError(
            f"{files.certificate} holds from {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} to "
            f"{certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC, which is not now",
            hint="ask the consortium for a new certificate, and check this machine's clock",
        )
    return files


def load_roster(folder: Path) -> Roster:
    """The roster of a member's folder, its signature checked against the pinned ``consortium.pub``.

    Raises:
        IdentityError: a file is missing, malformed or too large, or the signature does not hold.
    """
    try:
        pin = (folder / "consortium.pub").read_text(encoding="ascii").strip()
        with (folder / "roster.json").open("rb") as f:
            document = canonical.loads(f.read(MAX_ROSTER_BYTES + 1), limit=MAX_ROSTER_BYTES)
    except (OSError, ValueError) as e:
        raise IdentityError(f"{folder} lacks roster.json or consortium.pub", hint=_JOIN) from e
    except FedveilError as e:
        raise IdentityError(f"{folder / 'roster.json'} is malformed: {e.message}", hint="copy it again") from e
    return identity.open_roster(document, pin)


class Authority:
    """The consortium's certificate authority: signs leaf certificates, no further authorities.

    Args:
        days: how long its own certificate holds, and those that it issues.
    """

    def __init__(self, consortium: str, days: int) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self._start, self._end = _holding(days)
        self._name = _name(f"{consortium} authority"[:64])
        self._issuer = x509.SubjectKeyIdentifier.from_public_key(self.key.public_key())
        builder = self._builder(self._name, self.key.public_key()).add_extension(x509.BasicConstraints(True, 0), True)
        builder = builder.add_extension(_usage(ca=True), True)
        self.pem = builder.sign(self.key, hashes.SHA256()).public_bytes(ser.Encoding.PEM)

    @classmethod
    def load(cls, folder: Path, days: int) -> Authority:
        """The authority in ``folder``; what it issues holds ``days``, and never longer than its own certificate.

        Raises:
            IdentityError: ``ca.key`` or ``ca.pem`` is missing, malformed, readable by others, or has expired.
        """
        self = cls.__new__(cls)
        try:
            if (folder / "ca.key").stat().st_mode & 0o077:
                raise IdentityError(f"{folder / 'ca.key'} can be read by others", hint=f"chmod 600 {folder / 'ca.key'}")
            key = ser.load_pem_private_key((folder / "ca.key").read_bytes(), None)
            self.pem = (folder / "ca.pem").read_bytes()
            certificate = x509.load_pem_x509_certificate(self.pem)
        except (OSError, ValueError, TypeError) as e:
            raise IdentityError(
                f"{folder} is not a consortium's folder", hint="name the folder that 'fedveil provision found' made"
            ) from e
        if not isinstance(key, ec.EllipticCurvePrivateKey) or _spki(key.public_key()) != _spki(
            certificate.public_key()
        ):
            raise IdentityError(f"{folder / 'ca.key'} is not the key of ca.pem", hint="restore the folder, whole")
        self.key, self._name = key, certificate.subject
        self._issuer = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
        self._start, end = _holding(days)
        self._start = max(self._start, certificate.not_valid_before_utc)
        self._end = min(end, certificate.not_valid_after_utc)
        if self._end <= self._start + _SKEW:
            raise IdentityError(
                f"the authority in {folder} has expired",
                hint="found a new consortium, and let every member enrol there",
            )
        return self

    def issue(
        self, name: str, key: ec.EllipticCurvePublicKey, names: list[x509.GeneralName], role: x509.ObjectIdentifier
    ) -> bytes:
        """A PEM leaf certificate for one role."""
        builder = self._builder(_name(name), key).add_extension(x509.BasicConstraints(False, None), True)
        builder = builder.add_extension(_usage(ca=False), True)
        builder = builder.add_extension(x509.ExtendedKeyUsage([role]), True)
        builder = builder.add_extension(x509.SubjectAlternativeName(names), False)
        return builder.sign(self.key, hashes.SHA256()).public_bytes(ser.Encoding.PEM)

    def issue_to(self, member: str, key: ec.EllipticCurvePublicKey, host: str) -> bytes:
        """The certificate of a site, or of the server at ``host``."""
        if member == identity.SERVER:
            return self.issue(member, key, _server_names(host), ExtendedKeyUsageOID.SERVER_AUTH)
        return self.issue(member, key, _site_names(member), ExtendedKeyUsageOID.CLIENT_AUTH)

    def _builder(self, name: x509.Name, public: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(self._name)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(self._start)
            .not_valid_after(self._end)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(self._issuer), False)
        )


def _holding(days: int) -> tuple[datetime.datetime, datetime.datetime]:
    start = datetime.datetime.now(datetime.UTC) - _SKEW
    return start, start + datetime.timedelta(days=days) + _SKEW


def _member(folder: Path, site: SiteId, authority: Authority, host: str = "localhost") -> Member:
    signing, tls = identity.new_signing_key(), ec.generate_private_key(ec.SECP256R1())
    pem = authority.issue_to(site, tls.public_key(), host)
    identity.save_signing_key(folder / "signing.key", signing)
    _private(folder / "tls.key", tls)
    _public(folder / "tls.pem", pem)
    return Member(site, identity.public_hex(signing), identity.spki_sha256(pem))


def _site_names(site: str) -> list[x509.GeneralName]:
    return [x509.UniformResourceIdentifier(f"fedveil://site/{site}")]


def _server_names(host: str) -> list[x509.GeneralName]:
    addresses = [ipaddress.ip_address("127.0.0.1"), ipaddress.ip_address("::1")]
    hosts = ["localhost"]
    try:
        address = ipaddress.ip_address(host)
        addresses += [address] if address not in addresses else []
    except ValueError:
        if not (0 < len(host) <= 253 and host.isascii() and host.replace("-", "a").replace(".", "a").isalnum()):
            raise ConfigError(
                f"host {host[:80]!r} is neither a DNS name nor an IP address", hint="leave the port out"
            ) from None
        hosts += [host] if host not in hosts else []
    return [*map(x509.DNSName, hosts), *map(x509.IPAddress, addresses)]


def _usage(*, ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(not ca, False, False, False, False, ca, ca, False, False)


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _spki(key: object) -> bytes:
    return key.public_bytes(ser.Encoding.DER, ser.PublicFormat.SubjectPublicKeyInfo)  # type: ignore[attr-defined]


def _private(path: Path, key: ec.EllipticCurvePrivateKey | Ed25519PrivateKey) -> None:
    pem = key.private_bytes(ser.Encoding.PEM, ser.PrivateFormat.PKCS8, ser.NoEncryption())
    identity.write_secret(path, pem)


def _public(path: Path, data: bytes) -> None:
    try:
        with path.open("xb") as f:
            f.write(data)
    except FileExistsError as e:
        raise IdentityError(f"{path} exists already", hint="move it away first") from e
