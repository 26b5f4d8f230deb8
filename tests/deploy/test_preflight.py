"""The checks before a run: each failure is found, has a remedy and an exit code, and tells no count."""

from __future__ import annotations

import json
import re
import shutil
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from fedveil.common import canonical, identity
from fedveil.common import settings as files
from fedveil.common.errors import IdentityError
from fedveil.common.identity import Revocations
from fedveil.common.settings import SiteSettings
from fedveil.common.units import Delta, Epsilon
from fedveil.deploy import preflight, site_process
from fedveil.deploy.cli.client import app
from fedveil.deploy.enrol.provision import make_consortium
from fedveil.deploy.lab import demo_hospitals
from fedveil.deploy.preflight import Finding, Preflight
from fedveil.privacy.dp.events import SampledGaussian
from fedveil.privacy.ledger import Ledger

EAST = "hospital-east"


@pytest.fixture(scope="module")
def laid_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("world") / "home"
    home.mkdir()
    demo_hospitals.lay_out(home, 1, seed=0)
    return home


@pytest.fixture
def home(laid_out: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(laid_out, tmp_path / "home"))


@pytest.fixture
def listening(home: Path) -> Iterator[int]:
    """A port at which the roster's server shakes hands and hangs up."""
    with Serving(home / "pki" / "server") as port:
        point(home, port)
        yield port


class Serving:
    """A TLS server with a member's files."""

    def __init__(self, folder: Path) -> None:
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(folder / "tls.pem", folder / "tls.key")
        self.context.load_verify_locations(folder / "ca.pem")
        self.context.verify_mode = ssl.CERT_REQUIRED
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.socket.settimeout(0.1)
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self.over.is_set():
            try:
                raw, _ = self.socket.accept()
            except TimeoutError:
                continue
            with raw:
                raw.settimeout(60)
                try:
                    self.context.wrap_socket(raw, server_side=True).close()
                except OSError:
                    continue

    def __enter__(self) -> int:
        self.thread.start()
        return int(self.socket.getsockname()[1])

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join()
        self.socket.close()


def toml(home: Path) -> Path:
    return home / EAST / "site.toml"


def edit(home: Path, old: str, new: str) -> None:
    text = toml(home).read_text()
    assert old in text
    toml(home).write_text(text.replace(old, new))


def point(home: Path, port: int) -> None:
    edit(home, "127.0.0.1:1", f"127.0.0.1:{port}")


def loaded(home: Path) -> SiteSettings:
    return files.load(toml(home), SiteSettings)


def findings(home: Path, **options: bool) -> dict[str, Finding]:
    return {f.check: f for f in Preflight(loaded(home), **options).run()}


def failed(home: Path, **options: bool) -> dict[str, Finding]:
    out = {c: f for c, f in findings(home, **options).items() if f.ok is False}
    assert all(f.remedy and f.exit_code for f in out.values())
    return out


def test_a_site_that_is_ready(home, listening):
    found = findings(home)
    assert {c for c, f in found.items() if f.ok} == {
        "certificate", "roster", "clock", "dns", "port", "tls", "contract", "disk", "ledger", "data",
    }  # fmt: skip
    assert found["gpu"].ok is None
    assert not (home / EAST / "state" / "ledger.jsonl").exists()  # nothing is opened, nothing is charged
    assert not (home / EAST / "state" / "check" / "released.csv").exists()
    rows = len((home / EAST / "patients.csv").read_text().splitlines()) - 1
    assert not any(str(rows) in re.findall(r"\d+", f.message) for f in found.values())  # a port may hold the digits


def test_the_command(home, listening):
    result = CliRunner().invoke(app, ["check", str(toml(home)), "--json"])
    assert result.exit_code == 0, result.output
    document = json.loads(result.output)
    assert document["ok"]
    assert [c["check"] for c in document["checks"]][:2] == ["certificate", "roster"]
    (home / "pki" / "sites" / EAST / "tls.key").chmod(0o644)
    result = CliRunner().invoke(app, ["check", str(toml(home)), "--offline"])
    assert result.exit_code == 30
    assert "chmod 600" in result.output


class TestTheServer:
    def test_nobody_listens(self, home):
        found = failed(home)
        assert set(found) == {"port", "tls"}
        assert found["port"].exit_code == 80
        assert failed(home, offline=True) == {}

    def test_a_name_without_an_address(self, home, monkeypatch):
        edit(home, "127.0.0.1:1", "no-such-host.invalid:8443")

        def nowhere(*_: object, **__: object) -> None:
            raise socket.gaierror(8, "unknown")

        monkeypatch.setattr(socket, "getaddrinfo", nowhere)
        assert "DNS" in failed(home)["dns"].remedy

    def test_a_server_of_another_consortium(self, home, tmp_path):
        make_consortium(tmp_path / "foreign", ["a"], consortium="foreign", host="127.0.0.1")
        with Serving(tmp_path / "foreign" / "server") as port:
            point(home, port)
            found = failed(home)
        assert set(found) == {"tls"}
        assert "not accepted" in found["tls"].message

    def test_a_member_that_poses_as_the_server(self, home):
        with Serving(home / "pki" / "sites" / "hospital-west") as port:
            point(home, port)
            assert set(failed(home)) == {"tls"}

    def test_a_peer_that_speaks_no_tls(self, home):
        with socket.create_server(("127.0.0.1", 0)) as plain:

            def answer() -> None:
                for _ in range(2):
                    connection, _ = plain.accept()
                    with connection:
                        connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                        connection.close()

            thread = threading.Thread(target=answer)
            thread.start()
            point(home, int(plain.getsockname()[1]))
            found = failed(home)
            thread.join()
        assert "proxy" in found["tls"].remedy


class TestIdentity:
    def test_another_members_keys(self, home):
        edit(home, 'identity = "../pki/sites/hospital-east"', 'identity = "../pki/sites/hospital-west"')
        assert set(failed(home, offline=True)) == {"roster"}

    def test_no_folder(self, home):
        shutil.rmtree(home / "pki" / "sites" / EAST)
        assert {"certificate", "roster", "contract"} <= set(failed(home, offline=True))

    def test_a_revoked_peer_and_a_revoked_key(self, home):
        key = identity.load_signing_key(home / "pki" / "consortium" / "consortium.key")
        where = home / "pki" / "sites" / EAST / "revoked.json"
        theirs = identity.spki_sha256((home / "pki" / "sites" / "hospital-west" / "tls.pem").read_bytes())
        for sites, keys in (({"hospital-west"}, ()), ((), {theirs})):
            made = Revocations(1, frozenset(sites), frozenset(keys))
            where.write_bytes(canonical.dumps(identity.sign_revocations(made, key)))
            found = failed(home, offline=True)
            assert set(found) == {"roster"}
            assert "'hospital-west' was revoked" in found["roster"].message
        where.write_bytes(b"{}")
        assert set(failed(home, offline=True)) == {"roster"}

    def test_a_site_looks_at_the_list_in_its_folder(self, home):
        site, _ = site_process.prepare(loaded(home))
        try:
            key = identity.load_signing_key(home / "pki" / "consortium" / "consortium.key")
            made = Revocations(1, frozenset({"hospital-west"}), frozenset())
            where = home / "pki" / "sites" / EAST / "revoked.json"
            site.not_revoked({"hospital-west"})
            where.write_bytes(canonical.dumps(identity.sign_revocations(made, key)))
            for _ in range(2):  # also when it is taken away again
                with pytest.raises(IdentityError, match="hospital-west"):
                    site.not_revoked({"hospital-west"})
                where.unlink(missing_ok=True)
        finally:
            site.ledger.close()

    def test_a_certificate_that_ends_soon_is_said(self, home, monkeypatch):
        monkeypatch.setattr(preflight, "due", lambda _: (2.5, True))
        assert "renew it now" in findings(home, offline=True)["certificate"].message

    def test_a_clock_that_is_behind(self, home, monkeypatch):
        ledger(home).close()
        now = time.time()
        monkeypatch.setattr(preflight.time, "time", lambda: now - 3600)
        assert "behind the last row" in failed(home, offline=True)["clock"].message
        monkeypatch.setattr(preflight.time, "time", lambda: 0.0)
        assert "years" in failed(home, offline=True)["clock"].message


def ledger(home: Path, **more) -> Ledger:
    s = loaded(home)
    key = identity.load_signing_key(s.site.identity / "signing.key")
    values = {"lineage": s.site.lineage, "cap": Epsilon(s.limits.max_epsilon), "delta": Delta(s.limits.delta)} | more
    return Ledger.open(s.site.state / "ledger.jsonl", s.site.id, key, **values)


class TestTheLedger:
    def test_one_with_budget_left(self, home):
        with_one = ledger(home)
        with_one.reserve("e" * 64, 1, "p" * 64, SampledGaussian(1.0, 20.0))
        with_one.close()
        found = findings(home, offline=True)["ledger"]
        assert found.ok
        assert found.message.startswith("epsilon 0.")

    def test_one_that_is_held(self, home):
        held = ledger(home)
        found = findings(home, offline=True)
        held.close()
        assert (found["ledger"].ok, found["data"].ok) == (False, None)
        assert "running" in found["ledger"].remedy

    def test_one_that_is_spent(self, home):
        spent = ledger(home)
        while spent.affords(SampledGaussian(1.0, 20.0)):
            spent.reserve("e" * 64, len(spent.tally.by_round) + 1, "p" * 64, SampledGaussian(1.0, 20.0))
        spent.close()
        edit(home, "max_epsilon = 1.1", "max_epsilon = 0.5")
        assert failed(home, offline=True)["ledger"].exit_code == 3

    def test_one_that_was_closed(self, home):
        old, new = ledger(home), home / "new.jsonl"
        path, key = old.journal.path, identity.load_signing_key(loaded(home).site.identity / "signing.key")
        old.close()
        taker = Ledger.open(new, EAST, key, lineage="x", cap=Epsilon(1.0), delta=Delta(1e-5))
        taker.take_over(path, key)
        taker.close()
        assert "was closed" in failed(home, offline=True)["ledger"].message

    def test_one_that_was_edited_or_is_another_data_sets(self, home):
        ledger(home).close()
        path = home / EAST / "state" / "ledger.jsonl"
        before = path.read_bytes()
        path.write_bytes(before.replace(b'"cap_epsilon":1.1', b'"cap_epsilon":9.9'))
        assert "ledger" in failed(home, offline=True)
        path.unlink()
        ledger(home, lineage="others").close()
        assert "another data set" in failed(home, offline=True)["ledger"].message
        path.unlink()
        ledger(home, data_set="9" * 64).close()
        assert "than the one that the contract names" in failed(home, offline=True)["ledger"].message


class TestWhatWeBring:
    def test_a_contract_below_the_floor(self, home):
        edit(home, "[limits]", "[limits]\nmin_k = 11")
        assert "k = 5 is below this site's minimum, 11" in failed(home, offline=True)["contract"].message

    def test_an_unsigned_contract(self, home):
        document = json.loads((home / "contract.json").read_text())
        document["payload"]["k"] = 2
        (home / "contract.json").write_text(json.dumps(document))
        assert "contract" in failed(home, offline=True)

    def test_a_table_with_too_few_rows_or_a_missing_column(self, home):
        table = home / EAST / "patients.csv"
        lines = table.read_text().splitlines()
        table.write_text("\n".join(lines[:4]) + "\n")
        found = failed(home, offline=True)["data"]
        assert "k or l" in found.message
        assert "3" not in found.message + found.remedy.replace(str(home), "")
        table.write_text("\n".join(",".join(x.split(",")[:-1]) for x in lines) + "\n")
        assert failed(home, offline=True)["data"].exit_code == 21

    def test_a_disk_that_is_full_or_not_ours(self, home, monkeypatch):
        usage = shutil.disk_usage(home)
        monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: usage._replace(free=1 << 20))
        assert "1 GiB" in failed(home, offline=True)["disk"].message
        monkeypatch.setattr(preflight.os, "access", lambda *_: False)
        assert "written" in failed(home, offline=True)["disk"].message

    def test_a_gpu_that_is_not_there(self, home, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        found = failed(home, offline=True, gpu=True)
        assert set(found) == {"gpu"}
        assert "nvidia-smi" in found["gpu"].remedy
        edit(home, 'engine = "opacus"', 'engine = "opacus"\ndevice = "cuda"')
        assert set(failed(home, offline=True)) == {"gpu"}

    def test_a_fault_of_the_program_is_one_finding(self, home, monkeypatch):
        def fault(*_: object) -> None:
            raise RuntimeError("a value of a record")

        monkeypatch.setattr(preflight.policy, "check_contract", fault)
        found = failed(home, offline=True)
        assert found["contract"].message == "RuntimeError"


class TestThePreparedSite:
    def test_the_salt_is_made_once_with_the_ledger(self, home):
        s = loaded(home)
        site, data = site_process.prepare(s)
        site.ledger.close()
        salt = (s.site.state / "subject.salt").read_bytes()
        assert len(salt) == 32
        assert (s.site.state / "subject.salt").stat().st_mode & 0o777 == 0o600
        opened = next(site.ledger.journal.of_kind("ledger.open")).body
        assert len(opened["subject_salt"]) == 64
        again, _ = site_process.prepare(s)
        again.ledger.close()
        assert (s.site.state / "subject.salt").read_bytes() == salt
        from fedveil.client.records import lineage

        public = identity.public_hex(identity.load_signing_key(s.site.identity / "signing.key"))
        work = data.released.parent
        assert lineage.read_signed(work / "lineage.json", work / "lineage.sig", public)["released"]

    def test_a_ledger_without_a_salt_goes_on_without(self, home):
        ledger(home).close()
        site, _ = site_process.prepare(loaded(home))
        site.ledger.close()
        assert not (home / EAST / "state" / "subject.salt").exists()

    def test_another_version_of_the_data_set_is_another_ledger(self, home):
        edit(home, "[training]", '[data]\nversion = "2026-06"\n\n[training]')
        site, _ = site_process.prepare(loaded(home))
        site.ledger.close()
        assert next(site.ledger.journal.of_kind("ledger.open")).body["version"] == "2026-06"
        edit(home, '"2026-06"', '"2026-07"')
        with pytest.raises(Exception, match="another version"):
            site_process.prepare(loaded(home))

    def test_a_table_as_a_spreadsheet_writes_it(self, home):
        table = home / EAST / "patients.csv"
        table.write_bytes(table.read_text().replace(",", ";").replace(".", ",").encode("utf-16"))
        assert "data" in failed(home, offline=True)
        edit(home, "[training]", '[data]\nencoding = "utf-16"\ndelimiter = ";"\ndecimal = ","\n\n[training]')
        site, _ = site_process.prepare(loaded(home))
        site.ledger.close()
        assert failed(home, offline=True) == {}


def test_approvals_from_the_command_line(home, world_plan, tmp_path):
    invoke = CliRunner().invoke
    public = invoke(app, ["approver", str(tmp_path / "me.key")]).output.strip()
    edit(home, "[limits]", f'[limits]\napprovals = 1\napprovers = ["{public}"]')
    site, _ = site_process.prepare(loaded(home))
    with pytest.raises(Exception, match="approval of 1"):
        site.approvals.require(world_plan, site.head.ledger, [])  # type: ignore[union-attr]
    shown = json.loads(invoke(app, ["requests", str(toml(home)), "--json"]).output)
    assert shown[0]["plan_hash"] == world_plan.hash
    assert world_plan.hash in invoke(app, ["requests", str(toml(home))]).output
    result = invoke(
        app, ["approve", world_plan.hash[:10], "--key", str(tmp_path / "me.key"), "--settings", str(toml(home))]
    )
    assert result.exit_code == 0, result.output
    assert len(site.approvals.require(world_plan, site.head.ledger, [])) == 1  # type: ignore[union-attr]
    site.ledger.close()


@pytest.fixture
def world_plan(home: Path):
    from fedveil.common import contract as contracts
    from fedveil.privacy.planning import plan_from_settings

    pin = (home / "pki" / "server" / "consortium.pub").read_text().strip()
    federation = files.load(home / "federation.toml", files.Federation)
    return plan_from_settings(federation, contracts.load_signed(home / "contract.json", pin), 4)


def test_a_run_by_noise_multiplier(home, world_plan):
    from fedveil.common.errors import ConfigError
    from fedveil.privacy.planning import plan_from_settings

    path = home / "federation.toml"
    text = path.read_text()
    path.write_text(text.replace("epsilon = 1.0", "noise_multiplier = 40.0"))
    plan = plan_from_settings(files.load(path, files.Federation), demo_hospitals.contract(), 4)
    assert plan.noise_multiplier == 40.0
    assert plan.epsilon < world_plan.epsilon
    path.write_text(text.replace("epsilon = 1.0", "epsilon = 1.0\nnoise_multiplier = 40.0"))
    with pytest.raises(ConfigError, match="exactly one"):
        files.load(path, files.Federation)


def test_the_optimiser_of_a_federation_is_that_of_its_plan(home):
    from fedveil.common.errors import ConfigError, PlanError
    from fedveil.privacy.planning import plan_from_settings

    path = home / "federation.toml"
    text = path.read_text()
    head, _, rest = text.partition("[optimizer]\n")
    chosen = '[optimizer]\nname = "adam"\nschedule = [[1, 1.0], [4, 0.25]]\naveraging = 0.9\nsecond_moment = 0.95\n'
    path.write_text(head + chosen + rest)
    o = plan_from_settings(files.load(path, files.Federation), demo_hospitals.contract(), 4).optimizer
    assert (o.name, o.schedule, o.averaging, o.second_moment) == ("adam", ((1, 1.0), (4, 0.25)), 0.9, 0.95)
    path.write_text(head + "[optimizer]\nserver_rate = 0.5\n" + rest)
    with pytest.raises(PlanError, match="for mode 'client'"):
        plan_from_settings(files.load(path, files.Federation), demo_hospitals.contract(), 4)
    without = text.replace('public_test = "public.csv"\n', "")
    path.write_text(without.replace("[run]\n", "[run]\npatience = 3\n"))
    with pytest.raises(ConfigError, match="patience needs"):
        files.load(path, files.Federation)
