"""Provisioning: who holds which file, what the certificates allow, and what is refused."""

import datetime
import ipaddress
import json
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID
from typer.testing import CliRunner

from fedveil.common import identity
from fedveil.common.errors import ConfigError, FedveilError, IdentityError
from fedveil.deploy.cli.provision import app as provision
from fedveil.deploy.enrol.provision import load_roster, load_tls, make_consortium

MEMBER_FILES = {"signing.key", "tls.key", "tls.pem", "ca.pem", "roster.json", "consortium.pub"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pki")
    make_consortium(out, ["north", "south"], consortium="Test – ü", host="fl.example.org")
    return out


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "c")
    return tmp_path / "c"


def members(out: Path) -> list[Path]:
    return [out / "server", out / "sites" / "north", out / "sites" / "south"]


def test_layout_and_modes(made: Path) -> None:
    assert {p.name for p in (made / "consortium").iterdir()} == {
        "ca.key",
        "ca.pem",
        "consortium.key",
        "consortium.pub",
        "roster.json",
    }
    for folder in members(made):
        assert {p.name for p in folder.iterdir()} == MEMBER_FILES
    keys = list(made.rglob("*.key"))
    assert len(keys) == 8
    assert {stat.S_IMODE(k.stat().st_mode) for k in keys} == {0o600}
    assert len({k.read_bytes() for k in keys}) == 8


def test_the_roster_binds_names_to_the_keys_in_the_folders(made: Path) -> None:
    rosters = [load_roster(folder) for folder in members(made)]
    assert len({r.hash for r in rosters}) == 1
    assert [m.site for m in rosters[0].sites] == ["north", "south"]
    for folder, member in zip(members(made), (rosters[0].server, *rosters[0].sites), strict=True):
        assert member.signing_key == identity.public_hex(identity.load_signing_key(folder / "signing.key"))
        assert member.tls_key == identity.spki_sha256((folder / "tls.pem").read_bytes())


def test_certificates_allow_one_role_each(made: Path) -> None:
    def parts(path: Path) -> tuple[x509.Certificate, x509.ExtendedKeyUsage, x509.SubjectAlternativeName]:
        c = x509.load_pem_x509_certificate(path.read_bytes())
        e = c.extensions
        assert not e.get_extension_for_class(x509.BasicConstraints).value.ca
        assert e.get_extension_for_class(x509.KeyUsage).value.digital_signature
        assert not e.get_extension_for_class(x509.KeyUsage).value.key_cert_sign
        assert isinstance(c.public_key(), ec.EllipticCurvePublicKey)
        return (
            c,
            e.get_extension_for_class(x509.ExtendedKeyUsage).value,
            e.get_extension_for_class(x509.SubjectAlternativeName).value,
        )

    certificate, usage, names = parts(made / "server" / "tls.pem")
    assert list(usage) == [ExtendedKeyUsageOID.SERVER_AUTH]
    assert names.get_values_for_type(x509.DNSName) == ["localhost", "fl.example.org"]
    assert ipaddress.ip_address("127.0.0.1") in names.get_values_for_type(x509.IPAddress)
    assert 29 <= (certificate.not_valid_after_utc - certificate.not_valid_before_utc).days <= 31
    _, usage, names = parts(made / "sites" / "north" / "tls.pem")
    assert list(usage) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == ["fedveil://site/north"]
    ca = x509.load_pem_x509_certificate((made / "consortium" / "ca.pem").read_bytes())
    assert ca.extensions.get_extension_for_class(x509.BasicConstraints).value.path_length == 0


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl command as an independent judge")
def test_openssl_accepts_the_chains_for_their_purpose_only(made: Path) -> None:
    def accepted(member: Path, purpose: str) -> bool:
        command = [
            "openssl",
            "verify",
            "-x509_strict",
            "-purpose",
            purpose,
            "-CAfile",
            member / "ca.pem",
            member / "tls.pem",
        ]
        return subprocess.run(command, capture_output=True).returncode == 0

    assert accepted(made / "server", "sslserver")
    assert not accepted(made / "server", "sslclient")
    assert accepted(made / "sites" / "north", "sslclient")
    assert not accepted(made / "sites" / "north", "sslserver")


def test_nothing_is_overwritten(copy: Path) -> None:
    before = {p: p.read_bytes() for p in copy.rglob("*") if p.is_file()}
    with pytest.raises(IdentityError, match="exists already"):
        make_consortium(copy, ["north"], consortium="again")
    shutil.rmtree(copy / "consortium")
    shutil.rmtree(copy / "server")
    with pytest.raises(IdentityError, match="exists already"):
        make_consortium(copy, ["other"], consortium="again")
    assert all(p.read_bytes() == data for p, data in before.items() if p.exists())
    assert not (copy / "consortium").exists()


@pytest.mark.parametrize(
    ("sites", "more"),
    [
        ([], {}),
        (["a", "a"], {}),
        (["server"], {}),
        (["../a"], {}),
        (["A"], {}),
        (["a"], {"days": 0}),
        (["a"], {"days": 99_999}),
        (["a"], {"host": "host:8080"}),
        (["a"], {"host": ""}),
        (["a"], {"consortium": ""}),
        (["a"], {"consortium": "x\n"}),
    ],
)
def test_wrong_arguments_write_nothing(tmp_path: Path, sites: list[str], more: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        make_consortium(tmp_path / "o", sites, **({"consortium": "c"} | more))  # type: ignore[arg-type]
    assert not (tmp_path / "o").exists()


def test_load_tls_gives_the_files(made: Path) -> None:
    files = load_tls(made / "server")
    assert (files.ca.name, files.certificate.name, files.key.name) == ("ca.pem", "tls.pem", "tls.key")


def test_load_tls_refuses_what_does_not_belong_together(copy: Path, tmp_path: Path) -> None:
    north, south = copy / "sites" / "north", copy / "sites" / "south"
    (north / "tls.key").chmod(0o640)
    with pytest.raises(IdentityError, match="read by others"):
        load_tls(north)
    (north / "tls.key").write_bytes((south / "tls.key").read_bytes())
    (north / "tls.key").chmod(0o600)
    with pytest.raises(IdentityError, match="not the key"):
        load_tls(north)
    (south / "ca.pem").unlink()
    with pytest.raises(IdentityError, match="lacks"):
        load_tls(south)
    make_consortium(tmp_path / "foreign", ["south"], consortium="foreign")
    shutil.copy(tmp_path / "foreign" / "consortium" / "ca.pem", south / "ca.pem")
    with pytest.raises(IdentityError, match="not issued"):
        load_tls(south)


def test_an_expired_certificate_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedveil.deploy.enrol.provision._SKEW", datetime.timedelta(days=40))
    monkeypatch.setattr("fedveil.deploy.enrol.provision.Authority._builder", _expired_builder)
    make_consortium(tmp_path, ["a"], consortium="c", days=1)
    with pytest.raises(IdentityError, match="which is not now"):
        load_tls(tmp_path / "server")


def _expired_builder(self, name, public):  # type: ignore[no-untyped-def]
    start = self._start
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(self._name).public_key(public)
    builder = builder.serial_number(x509.random_serial_number()).not_valid_before(start)
    return builder.not_valid_after(start + datetime.timedelta(days=1))


def test_load_roster_checks_the_pinned_signature(copy: Path, tmp_path: Path) -> None:
    north = copy / "sites" / "north"
    document = json.loads((north / "roster.json").read_bytes())
    document["payload"]["sites"][1]["signing_key"] = "0" * 64
    (north / "roster.json").write_text(json.dumps(document))
    with pytest.raises(IdentityError, match="signature"):
        load_roster(north)
    make_consortium(tmp_path / "foreign", ["north"], consortium="foreign")
    shutil.copy(tmp_path / "foreign" / "server" / "roster.json", north / "roster.json")
    with pytest.raises(IdentityError, match="pinned"):
        load_roster(north)
    for junk in (b"", b"{", b"[]", b"\xff"):
        (north / "roster.json").write_bytes(junk)
        with pytest.raises(IdentityError):
            load_roster(north)
    (north / "roster.json").unlink()
    with pytest.raises(IdentityError, match="lacks"):
        load_roster(north)


def test_the_command(tmp_path: Path) -> None:
    app = provision
    args = [str(tmp_path / "o"), "--site", "a", "--site", "b", "--host", "10.0.0.7", "--consortium", "hearts"]
    result = CliRunner().invoke(app, args)
    assert result.exit_code == 0, result.output
    roster = load_roster(tmp_path / "o" / "sites" / "b")
    assert roster.consortium == "hearts"
    assert roster.hash in result.output
    names = x509.load_pem_x509_certificate((tmp_path / "o" / "server" / "tls.pem").read_bytes())
    san = names.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert ipaddress.ip_address("10.0.0.7") in san.get_values_for_type(x509.IPAddress)
    again = CliRunner().invoke(app, args)
    assert isinstance(again.exception, FedveilError)
