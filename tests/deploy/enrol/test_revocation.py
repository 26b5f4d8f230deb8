"""Who is not a member any more: at the server, at the sites, over restarts, and in the next roster."""

from __future__ import annotations

import datetime
import errno
import shutil
from pathlib import Path

import pytest
from cryptography import x509
from typer.testing import CliRunner

from fedveil.common import canonical, identity
from fedveil.common.errors import IdentityError
from fedveil.common.identity import Revocations
from fedveil.deploy.cli.client import app as site_commands
from fedveil.deploy.enrol import consortium
from fedveil.deploy.enrol import join as enrol
from fedveil.deploy.enrol.gate import Doorkeeper
from fedveil.deploy.enrol.revoked import Revoked, take_revoked

NAMES = ("server", "east", "west")


def certificate(folder: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate((folder / "tls.pem").read_bytes())


class TestRevocation:
    def test_a_revoked_member_is_gone_for_good(self, members):
        made = consortium.revoke(members.consortium, "east")
        assert (made.number, made.sites) == (1, {"east"})
        enrol.renew(members.home / "east")
        with pytest.raises(IdentityError, match="revoked"):
            members.sign("east")
        assert [m.site for m in consortium.publish(members.consortium).sites] == ["west"]
        with pytest.raises(IdentityError, match="not a member"):
            consortium.revoke(members.consortium, "east")

    def test_a_key_alone(self, members):
        made = consortium.revoke(members.consortium, "east", key_only=True)
        assert made.sites == frozenset()
        east = members.home / "east"
        enrol.renew(east)
        with pytest.raises(IdentityError, match="revoked"):
            members.sign("east")
        before = (members.consortium / "roster.json").read_bytes()
        with pytest.raises(IdentityError, match="'east' was revoked and not replaced"):
            members.publish()  # a roster that still names the key
        assert (members.consortium / "roster.json").read_bytes() == before
        enrol.renew(east, rotate=True)
        enrol.install(east, members.sign("east"))
        made = members.publish()
        assert made.version == 2
        assert made.member("east").tls_key == identity.spki_sha256((east / "tls.pem").read_bytes())
        assert consortium.revoke(members.consortium, "west").number == 2

    def test_the_doorkeeper_reads_the_list_while_it_works(self, members, caplog):
        server, pems = members.home / "server", {}
        for name in ("east", "west"):
            pems[name] = (members.home / name / "tls.pem").read_bytes()
        keeper = Doorkeeper(server)
        for name, pem in pems.items():
            keeper(name, pem)  # type: ignore[arg-type]
        consortium.revoke(members.consortium, "east")
        (server / "revoked.json").write_bytes((members.consortium / "revoked.json").read_bytes())
        with pytest.raises(IdentityError, match="'east' was revoked"):
            keeper("east", pems["east"])  # type: ignore[arg-type]
        keeper("west", pems["west"])  # type: ignore[arg-type]
        # a list that does not hold, an older one, or none at all changes nothing
        first = (server / "revoked.json").read_bytes()
        consortium.revoke(members.consortium, "west")
        (server / "revoked.json").write_bytes((members.consortium / "revoked.json").read_bytes())
        with pytest.raises(IdentityError):
            keeper("west", pems["west"])  # type: ignore[arg-type]
        for bad in (first, b"", b"{}", b"junk" * 9, first.replace(b'"number":1', b'"number":9')):
            (server / "revoked.json").write_bytes(bad)
            with pytest.raises(IdentityError, match="revoked"):
                keeper("west", pems["west"])  # type: ignore[arg-type]
            assert keeper.number == 2
        (server / "revoked.json").unlink()
        with pytest.raises(IdentityError, match="revoked"):
            keeper("east", pems["east"])  # type: ignore[arg-type]
        assert "stays in force" in caplog.text

    @pytest.mark.parametrize("elsewhere", [False, True])
    def test_an_older_list_is_not_taken_after_a_restart(self, members, tmp_path, caplog, elsewhere):
        server, pems = members.home / "server", {}
        kept = tmp_path / "runs" if elsewhere else None
        for name in ("east", "west"):
            pems[name] = (members.home / name / "tls.pem").read_bytes()
            consortium.revoke(members.consortium, name)
            shutil.copy(members.consortium / "revoked.json", tmp_path / f"{name}.json")
        shutil.copy(tmp_path / "west.json", server / "revoked.json")  # list 2: both of them
        assert Doorkeeper(server, kept=kept).number == 2
        for replaced in (tmp_path / "east.json", None):  # by list 1, or by none
            (server / "revoked.json").unlink()
            if replaced:
                shutil.copy(replaced, server / "revoked.json")
            keeper = Doorkeeper(server, kept=kept)
            assert keeper.number == 2
            with pytest.raises(IdentityError, match="revoked"):
                keeper("west", pems["west"])  # type: ignore[arg-type]
        assert "stays in force" in caplog.text

    def test_a_list_taken_while_the_server_worked_is_kept_too(self, members, tmp_path):
        server = members.home / "server"
        keeper = Doorkeeper(server)
        consortium.revoke(members.consortium, "east")
        shutil.copy(members.consortium / "revoked.json", server)
        assert keeper.number == 1
        (server / "revoked.json").unlink()
        assert Doorkeeper(server).number == 1

    @pytest.mark.parametrize("changed", [True, False], ids=["another mode", "the file as it was"])
    def test_a_list_that_could_not_be_read_when_it_came_is_looked_at_again(self, members, monkeypatch, caplog, changed):
        """As with root's copy, mode 0600, and its mode set afterwards: neither its time nor its size changes."""
        server, unreadable = members.home / "server", True

        def opened(path, *arguments, **more):
            if unreadable and path.name == "revoked.json":
                raise PermissionError(errno.EACCES, "Permission denied")
            return open_(path, *arguments, **more)

        look, open_ = Revoked(server), Path.open
        consortium.revoke(members.consortium, "east")
        shutil.copy(members.consortium / "revoked.json", server)
        with monkeypatch.context() as m:
            m.setattr(Path, "open", opened)
            for _ in range(5):
                assert look().number == 0
            unreadable = False
            if changed:
                (server / "revoked.json").chmod(0o644)
            assert look().number == 1
        assert caplog.text.count("is not taken") == 1, "said once"

    def test_two_lists_of_one_number_are_not_mixed(self, members, caplog):
        server = members.home / "server"
        key = identity.load_signing_key(members.consortium / "consortium.key")
        for site in ("east", "west"):
            made = identity.sign_revocations(Revocations(1, frozenset([site]), frozenset()), key)
            (server / "revoked.json").write_bytes(canonical.dumps(made))
            Doorkeeper(server)("west", (members.home / "west" / "tls.pem").read_bytes())  # type: ignore[arg-type]
        assert "stays in force" in caplog.text

    def test_a_list_that_cannot_be_kept(self, members, tmp_path, caplog):
        server, nowhere = members.home / "server", tmp_path / "file"
        nowhere.touch()
        keeper = Doorkeeper(server, kept=nowhere)
        consortium.revoke(members.consortium, "east")
        shutil.copy(members.consortium / "revoked.json", server)
        assert keeper.number == 1  # in force all the same, and said
        assert "cannot be kept" in caplog.text
        with pytest.raises(IdentityError, match="cannot be kept"):
            Doorkeeper(server, kept=nowhere)

    @pytest.mark.parametrize("text", [b"", b"{}", b"[]"])
    def test_a_kept_list_that_was_spoilt_stops_the_server(self, members, text):
        server = members.home / "server"
        consortium.revoke(members.consortium, "east")
        shutil.copy(members.consortium / "revoked.json", server)
        Doorkeeper(server)
        [kept] = server.glob("revoked.seen.*")
        kept.write_bytes(text)
        with pytest.raises(IdentityError):
            Doorkeeper(server)

    def test_two_consortia_that_share_a_folder_of_runs(self, members, tmp_path, new_members):
        others = new_members(tmp_path / "others")
        for m in (members, others):
            for name in () if m is members else NAMES:
                m.admit(name)
            consortium.revoke(m.consortium, "east")
            shutil.copy(m.consortium / "revoked.json", m.home / "server")
        for m in (members, others, members):
            assert Doorkeeper(m.home / "server", kept=tmp_path / "runs").number == 1

    def test_a_site_takes_lists_forward_only(self, members, tmp_path):
        east, lists = members.home / "east", []
        for name in ("west", "east"):
            consortium.revoke(members.consortium, name)
            lists.append(tmp_path / f"{name}.json")
            shutil.copy(members.consortium / "revoked.json", lists[-1])
        look = Revoked(east, tmp_path / "state", keeps=False)
        assert look() == Revocations(0, frozenset(), frozenset())
        for file in (lists[0], lists[0], lists[1]):
            assert take_revoked(east, file) == look()
        assert look().sites == {"east", "west"}
        assert not (tmp_path / "state").exists()
        before = (east / "revoked.json").read_bytes()
        for bad in (lists[0], members.consortium / "roster.json", tmp_path / "nothing"):
            with pytest.raises(IdentityError):
                take_revoked(east, bad)
        assert (east / "revoked.json").read_bytes() == before
        with pytest.raises(IdentityError, match="pinned"):
            take_revoked(tmp_path, lists[1])
        told = CliRunner().invoke(site_commands, ["join", str(east), "--revoked", str(lists[1])])
        assert told.output == "revocation list 2: 2 members, 2 keys\n"

    def test_a_list_that_does_not_hold_stops_a_server_at_its_start(self, members):
        (members.home / "server" / "revoked.json").write_text("{}")
        with pytest.raises(IdentityError):
            Doorkeeper(members.home / "server")

    def test_a_certificate_ends_when_it_expires(self, members):
        pem = (members.home / "east" / "tls.pem").read_bytes()
        ends = certificate(members.home / "east").not_valid_after_utc
        now = [ends - datetime.timedelta(seconds=1)]
        keeper = Doorkeeper(members.home / "server", now=lambda: now[0])
        keeper("east", pem)  # type: ignore[arg-type]
        now[0] = ends + datetime.timedelta(seconds=1)
        with pytest.raises(IdentityError, match="expired"):
            keeper("east", pem)  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        "change",
        [
            {"number": 0},
            {"number": "1"},
            {"number": True},
            {"sites": ["../x"]},
            {"sites": 3},
            {"tls_keys": ["zz"]},
            {"v": 2},
        ],
    )
    def test_malformed_lists(self, change):
        key = identity.new_signing_key()
        document = identity.sign_revocations(Revocations(1, frozenset(["a"]), frozenset()), key)
        public = identity.public_hex(key)
        assert identity.open_revocations(document, public).sites == {"a"}
        forged = identity.signed(key, "fedveil/revoked/1", {**document["payload"], **change})
        with pytest.raises(IdentityError):
            identity.open_revocations(forged, public)
        roster_domain = identity.signed(key, "fedveil/roster/1", document["payload"])
        with pytest.raises(IdentityError):  # a signature for another purpose is worth nothing
            identity.open_revocations(roster_domain, public)
