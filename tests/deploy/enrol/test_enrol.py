"""Enrolment: private keys stay where they are made; who is admitted, renewed, rotated; and who is not."""

from __future__ import annotations

import base64
import datetime
import json
import stat
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives import serialization as ser
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID
from typer.testing import CliRunner

from fedveil.common import canonical, identity
from fedveil.common.errors import ConfigError, FedveilError, IdentityError
from fedveil.deploy.cli.provision import app as provision
from fedveil.deploy.enrol import consortium
from fedveil.deploy.enrol import join as enrol
from fedveil.deploy.enrol.provision import load_roster, load_tls, make_consortium

NAMES = ("server", "east", "west")


def certificate(folder: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate((folder / "tls.pem").read_bytes())


def test_every_member_ends_with_what_a_run_needs(members: Any) -> None:
    for name in NAMES:
        folder = members.home / name
        load_tls(folder)
        roster = load_roster(folder)
        assert roster.version == 1
        assert [m.site for m in roster.sites] == ["east", "west"]
        member = roster.server if name == "server" else roster.member(name)
        assert member.signing_key == identity.public_hex(identity.load_signing_key(folder / "signing.key"))
        assert member.tls_key == identity.spki_sha256((folder / "tls.pem").read_bytes())
        assert stat.S_IMODE((folder / "tls.key").stat().st_mode) == 0o600
        assert not (folder / "request.json").exists()
    names = certificate(members.home / "server").extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert "fl.example.org" in names.get_values_for_type(x509.DNSName)


def test_no_private_key_leaves_a_member(members: Any) -> None:
    secrets = []
    for name in NAMES:
        for key, at in (("signing.key", 24), ("tls.key", 50)):  # behind what every key of the kind begins with
            body = "".join((members.home / name / key).read_text().split("\n")[1:-2])
            secrets.append(body[at : at + 36])
    assert len(set(secrets)) == 6
    outside = [p for p in members.home.rglob("*") if p.is_file() and p.parent.name not in NAMES]
    assert any(p.name == "ca.key" for p in outside)
    for path in outside:
        text = path.read_text().replace("\n", "")
        assert not any(s in text for s in secrets), path


class TestAdmission:
    def test_a_stranger_needs_the_fingerprint_that_was_read_out(self, tmp_path, new_members):
        m = new_members(tmp_path)
        heard = m.ask("east")
        for wrong in ("", "0" * 32, heard[:-1], heard.replace(" ", "")[:-4]):
            with pytest.raises(IdentityError, match="fingerprint"):
                m.sign("east", wrong)
        assert m.sign("east", heard.upper().replace(" ", "  ")).exists()

    def test_a_request_swapped_on_the_way_is_noticed(self, tmp_path, new_members):
        m = new_members(tmp_path)
        heard = m.ask("east")
        enrol.request(tmp_path / "thief", "east")
        (tmp_path / "east" / "request.json").write_bytes((tmp_path / "thief" / "request.json").read_bytes())
        with pytest.raises(IdentityError, match="fingerprint"):
            m.sign("east", heard)

    def test_a_name_in_use_is_not_given_twice(self, members, tmp_path):
        heard = enrol.request(tmp_path / "again", "east")
        with pytest.raises(IdentityError, match="not signed with the identity"):
            consortium.sign_request(
                members.consortium, tmp_path / "again" / "request.json", tmp_path / "r", heard=heard
            )

    def test_a_request_may_not_use_the_keys_of_another_member(self, members, tmp_path):
        folder = tmp_path / "twin"
        enrol.request(folder, "twin")
        for key in ("signing.key", "tls.key"):
            (folder / key).write_bytes((members.home / "east" / key).read_bytes())
            heard = enrol._write_request(folder, "twin", "tls.key", "")
            with pytest.raises(IdentityError, match="uses a key of 'east'"):
                consortium.sign_request(members.consortium, folder / "request.json", tmp_path / "r", heard=heard)

    @pytest.mark.parametrize(
        "change", ["name", "signature", "rsa", "curve", "unknown curve", "extra", "junk", "signer", "version"]
    )
    def test_malformed_requests(self, tmp_path, change, new_members):
        m = new_members(tmp_path)
        m.ask("east")
        key = identity.load_signing_key(tmp_path / "east" / "signing.key")
        path = tmp_path / "east" / "request.json"
        document = json.loads(path.read_text())
        payload = document["payload"]
        other = {"rsa": rsa.generate_private_key(65537, 2048), "curve": ec.generate_private_key(ec.SECP384R1())}
        if change in other or change == "name":
            signer = other.get(change) or ec.generate_private_key(ec.SECP256R1())
            subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "west" if change == "name" else "east")])
            csr = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(signer, hashes.SHA256())
            payload["csr"] = csr.public_bytes(ser.Encoding.PEM).decode()
        elif change == "signature":
            lines = payload["csr"].split("\n")
            at = len(lines) - 3
            lines[at] = lines[at][:-1] + ("A" if lines[at][-1] != "A" else "B")
            payload["csr"] = "\n".join(lines)
        elif change == "unknown curve":
            der = x509.load_pem_x509_csr(payload["csr"].encode()).public_bytes(ser.Encoding.DER)
            name = bytes.fromhex("06082a8648ce3d0301")  # followed by 07: P-256; nothing is known under 7f
            body = base64.encodebytes(der.replace(name + b"\x07", name + b"\x7f")).decode()
            payload["csr"] = f"-----BEGIN CERTIFICATE REQUEST-----\n{body}-----END CERTIFICATE REQUEST-----\n"
        elif change == "extra":
            payload["ca"] = True
        elif change == "version":
            payload["v"] = 2
        elif change == "junk":
            payload["csr"] = "-----BEGIN"
        document = identity.signed(identity.new_signing_key() if change == "signer" else key, enrol.ASKED, payload)
        path.write_bytes(canonical.dumps(document))
        with pytest.raises(IdentityError):
            m.sign("east", enrol.fingerprint(document))
        assert not json.loads((m.consortium / "members.json").read_text())["members"]

    @pytest.mark.parametrize("site", ["../x", "", "A", "a b"])
    def test_names(self, tmp_path, site):
        with pytest.raises(ConfigError):
            enrol.request(tmp_path / "x", site)
        assert not (tmp_path / "x").exists()

    def test_only_the_server_has_a_host(self, tmp_path):
        with pytest.raises(IdentityError, match="host"):
            enrol.request(tmp_path / "a", "east", host="h")
        with pytest.raises(IdentityError, match="host"):
            enrol.request(tmp_path / "b", "server")
        assert not (tmp_path / "a").exists()
        assert not (tmp_path / "b").exists(), "keys were made for a request that was refused"
        enrol.request(tmp_path / "b", "server", host="fl.example.org")

    @pytest.mark.parametrize("empty", [False, True])
    @pytest.mark.parametrize("lost", ["request.json", "tls.key", "signing.key"])
    def test_what_an_interruption_left_out_is_made(self, tmp_path, new_members, lost, empty):
        """Until the answer is installed: a request that got lost, or keys of which only one was written."""
        m = new_members(tmp_path)
        m.ask("east")
        kept = {k: (tmp_path / "east" / k).read_bytes() for k in ("signing.key", "tls.key") if k != lost}
        (tmp_path / "east" / lost).unlink()
        if empty:
            (tmp_path / "east" / lost).touch(0o600)
        heard = m.ask("east")
        assert all((tmp_path / "east" / k).read_bytes() == v for k, v in kept.items())
        enrol.install(tmp_path / "east", m.sign("east", heard), consortium_key=m.pin.upper())
        load_tls(tmp_path / "east")

    def test_keys_are_made_once(self, members):
        before = (members.home / "east" / "signing.key").read_bytes()
        with pytest.raises(IdentityError, match="enrolled member's"):
            members.ask("east")
        assert (members.home / "east" / "signing.key").read_bytes() == before
        with pytest.raises(IdentityError, match="not empty"):
            consortium.found(members.consortium, "again")
        with pytest.raises(IdentityError, match="not empty"):
            consortium.found(members.home / "east" / "tls.pem", "a file")

    def test_the_server_is_not_shut_out_for_good(self, members):
        with pytest.raises(IdentityError, match="under its name") as e:
            consortium.revoke(members.consortium, "server")
        assert "--key-only" in e.value.hint
        assert not (members.consortium / "revoked.json").exists()
        assert consortium.revoke(members.consortium, "server", key_only=True).number == 1

    @pytest.mark.parametrize(
        "bad", [{"v": 1}, [], {"v": 1, "consortium": "c", "version": 0, "members": {"east": {"signing_key": "a"}}}]
    )
    def test_a_list_of_members_that_is_none(self, members, bad):
        (members.consortium / "members.json").write_bytes(canonical.dumps(bad))
        with pytest.raises(IdentityError, match="not a list of members"):
            consortium.publish(members.consortium)


class TestAnswers:
    def test_the_first_one_needs_the_consortiums_key(self, tmp_path, new_members):
        m = new_members(tmp_path)
        reply = m.sign("east", m.ask("east"))
        for wrong in ("", "0" * 64):
            with pytest.raises(IdentityError):
                enrol.install(tmp_path / "east", reply, consortium_key=wrong)
        assert not (tmp_path / "east" / "consortium.pub").exists()
        enrol.install(tmp_path / "east", reply, consortium_key=m.pin)
        with pytest.raises(IdentityError, match="pinned"):
            enrol.install(tmp_path / "east", reply, consortium_key="0" * 64)

    def test_another_members_answer_does_not_fit(self, members):
        enrol.renew(members.home / "west")
        reply = members.sign("west")
        with pytest.raises(IdentityError, match="another member"):
            enrol.install(members.home / "east", reply)

    def test_a_foreign_consortiums_answer(self, members, tmp_path, new_members):
        other = new_members(tmp_path / "other")
        reply = other.sign("east", other.ask("east"))
        with pytest.raises(IdentityError, match="pinned"):
            enrol.install(members.home / "east", reply)

    @pytest.mark.parametrize("junk", [b"", b"{", b"[]", b"{}", b'{"payload":{},"signer":"","signature":""}'])
    def test_junk(self, members, tmp_path, junk):
        (tmp_path / "junk").write_bytes(junk)
        before = {p: p.read_bytes() for p in (members.home / "east").iterdir()}
        with pytest.raises(FedveilError):
            enrol.install(members.home / "east", tmp_path / "junk")
        with pytest.raises(FedveilError):
            enrol.take_roster(members.home / "east", tmp_path / "junk")
        assert {p: p.read_bytes() for p in (members.home / "east").iterdir()} == before


class TestRenewal:
    def test_a_renewal_keeps_the_keys_and_the_roster(self, members):
        east = members.home / "east"
        before, key = certificate(east), (east / "tls.key").read_bytes()
        roster = load_roster(east).hash
        enrol.renew(east)
        enrol.install(east, members.sign("east", days=7))  # no fingerprint: it is signed with the identity on record
        after = certificate(east)
        assert (east / "tls.key").read_bytes() == key
        assert after.serial_number != before.serial_number
        assert after.not_valid_after_utc < before.not_valid_after_utc
        load_tls(east)
        assert load_roster(east).hash == roster

    def test_a_renewal_by_somebody_else_is_refused(self, members):
        east = members.home / "east"
        enrol.renew(east)
        payload = json.loads((east / "request.json").read_text())["payload"]
        thief = identity.new_signing_key()
        payload["signing_key"] = identity.public_hex(thief)
        (east / "request.json").write_bytes(canonical.dumps(identity.signed(thief, enrol.ASKED, payload)))
        with pytest.raises(IdentityError, match="not signed with the identity"):
            members.sign("east")

    def test_when_it_is_due(self, members):
        east = members.home / "east"
        days, now = enrol.due(east)
        assert 29 < days <= 30.1
        assert not now
        ends = certificate(east).not_valid_after_utc
        assert enrol.due(east, ends - datetime.timedelta(days=9))[1]
        assert not enrol.due(east, ends - datetime.timedelta(days=11))[1]
        assert enrol.due(east, ends + datetime.timedelta(days=1))[0] < 0

    def test_no_certificate_outlives_the_authority(self, tmp_path, new_members):
        m = new_members(tmp_path / "m")
        short = tmp_path / "short"
        consortium.found(short, "short", days=3)
        m.consortium = short
        m.pin = (short / "consortium.pub").read_text().strip()
        enrol.install(tmp_path / "m" / "east", m.sign("east", m.ask("east"), days=365), consortium_key=m.pin)
        ca = x509.load_pem_x509_certificate((short / "ca.pem").read_bytes())
        assert certificate(tmp_path / "m" / "east").not_valid_after_utc <= ca.not_valid_after_utc


class TestRotation:
    def test_a_new_tls_key_needs_a_new_roster(self, members):
        east = members.home / "east"
        old = certificate(east)
        enrol.renew(east, rotate=True)
        assert (east / "tls.key.next").exists()
        load_tls(east)  # until the answer comes the old key is in use
        enrol.install(east, members.sign("east"))
        assert not (east / "tls.key.next").exists()
        load_tls(east)
        spki = identity.spki_sha256((east / "tls.pem").read_bytes())
        assert certificate(east).public_key() != old.public_key()
        assert load_roster(east).member("east").tls_key != spki
        made = members.publish()
        assert made.version == 2
        for name in NAMES:
            assert load_roster(members.home / name).member("east").tls_key == spki

    def test_a_roster_never_goes_back(self, members, tmp_path):
        first = (members.consortium / "roster.json").read_bytes()
        (tmp_path / "old").write_bytes(first)
        members.publish()
        east = members.home / "east"
        with pytest.raises(IdentityError, match="version 1 does not follow version 2"):
            enrol.take_roster(east, tmp_path / "old")
        assert load_roster(east).version == 2
        enrol.take_roster(east, members.consortium / "roster.json")  # the same again is fine
        twin = load_roster(east)
        forged = identity.Roster(twin.consortium, twin.server, twin.sites[:1], 2)
        key = identity.load_signing_key(members.consortium / "consortium.key")
        (tmp_path / "other").write_bytes(canonical.dumps(identity.sign_roster(forged, key)))
        with pytest.raises(IdentityError, match="does not follow"):
            enrol.take_roster(east, tmp_path / "other")

    @pytest.mark.parametrize("version", [0, -1, True, "2", 2.0, 1 << 40])
    def test_versions_are_whole_numbers(self, members, version):
        payload = {**load_roster(members.home / "east").payload, "version": version}
        with pytest.raises(IdentityError):
            identity.roster_from_payload(payload)


def test_a_consortium_made_at_once_renews_and_revokes_too(tmp_path: Path) -> None:
    make_consortium(tmp_path, ["a", "b", "c"], consortium="c")
    folder, a = tmp_path / "consortium", tmp_path / "sites" / "a"
    enrol.renew(a)
    consortium.sign_request(folder, a / "request.json", tmp_path / "reply.json")
    enrol.install(a, tmp_path / "reply.json")
    load_tls(a)
    consortium.revoke(folder, "b")
    assert consortium.publish(folder).version == 2
    assert [m.site for m in enrol.take_roster(a, folder / "roster.json").sites] == ["a", "c"]


def test_the_commands(tmp_path: Path) -> None:
    def ok(*arguments: object) -> str:
        result = CliRunner().invoke(provision, [str(a) for a in arguments])
        assert result.exit_code == 0, (result.output, result.exception)
        return result.output

    folder = tmp_path / "c"
    pin = (ok("found", folder, "--consortium", "hearts").split()[-1]).strip()
    for name, host in (("server", "h.example"), ("east", "")):
        heard = enrol.request(tmp_path / name, name, host=host)
        ok(
            "sign-csr",
            folder,
            tmp_path / name / "request.json",
            "--out",
            tmp_path / f"{name}.json",
            "--fingerprint",
            heard,
        )
        enrol.install(tmp_path / name, tmp_path / f"{name}.json", consortium_key=pin)
    assert "version 1" in ok("roster", folder)
    assert "list 1" in ok("revoke", folder, "east", "--key-only")
