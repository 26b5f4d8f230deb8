"""The report's way to the sites: a whole run in process whose server offers its report, and servers that cheat."""

from __future__ import annotations

import os
import shutil
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fedveil.client import report_receipt
from fedveil.client.app import make_app as client_app
from fedveil.client.egress.forms import Forms
from fedveil.client.session import Site
from fedveil.common import canonical, flwr_adapter, identity
from fedveil.common.errors import PolicyRefusal, ProtocolError, VerificationError, WireError
from fedveil.common.journal import Journal
from fedveil.common.units import SiteId
from fedveil.common.wire import Packet
from fedveil.deploy.lab import datasets, simulate, virtual_sites
from fedveil.deploy.lab.simulate import Config
from fedveil.deploy.transport.inprocess import run_inprocess
from fedveil.privacy.report import handover, signatures
from fedveil.privacy.report.build import build_report
from fedveil.privacy.report.bundle import REPORT
from fedveil.privacy.report.countersign import see
from fedveil.privacy.report.verify import verify_report
from fedveil.server import job as jobs
from fedveil.server.app import make_app as server_app


@dataclass
class Run:
    """Four virtual sites that keep reports, and the run they took part in."""

    folder: Path
    world: virtual_sites.World
    sites: list[Site]
    session: str = ""

    @property
    def consortium(self) -> str:
        return identity.public_hex(self.world.consortium)

    def packet(self, folder: Path | None = None) -> Packet:
        return handover.packed(folder or self.folder, self.session)

    def rebuilt(self, tmp_path: Path, change) -> Path:
        """A copy of the run whose server changed something and signed a report of it."""
        copy = tmp_path / "copy"
        shutil.copytree(self.folder, copy)
        change(copy)
        return copy


def finished(folder: Path) -> Run:
    flwr_adapter.quiet_flower()
    config = Config(clients=4, dataset="trivial", sum="plain", steps=2)
    split = datasets.load("trivial", 4, 0)
    plan = simulate.make_plan(config, split)
    world = virtual_sites.World.make(4)
    run = Run(folder / "run", world, [])

    def make(i: int) -> Site:
        site = virtual_sites.make_site(world.roster, i, world.keys[i], plan, *split.parts[i], folder, cap=8.0)
        site.reports, site.consortium = folder / "kept" / site.id, run.consortium
        site.reports.mkdir(parents=True)
        return site

    kept = virtual_sites.Kept(make)
    run.sites = kept.sites
    job = jobs.create(
        run.folder, plan, world.roster, world.server, documents=world.documents(), durable=False, engine="inprocess",
        countersigned=True,
    )  # fmt: skip
    run.session = job.session
    run_inprocess(server_app(job)[0], client_app(kept.resolve), world.sites, lambda _: {})
    return run


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    run = finished(tmp_path_factory.mktemp("seen"))
    yield run
    for site in run.sites:
        site.ledger.close()


@pytest.fixture
def site(honest, tmp_path) -> Site:
    """The second site, as if the report had not come yet."""
    one = honest.sites[1]
    one.reports = tmp_path / "reports"
    return one


def test_every_site_verifies_and_signs_and_keeps_what_it_signed(honest):
    found = verify_report(honest.folder / REPORT, consortium_key=honest.consortium)
    assert found.ok, found.failed
    assert found.countersigned == tuple(honest.world.sites)
    assert found.sites == 4
    for name in honest.world.sites:
        kept = honest.folder.parent / "kept" / name / honest.session
        assert (kept / REPORT).read_bytes() == (honest.folder / REPORT).read_bytes()
        own = verify_report(kept / REPORT, consortium_key=honest.consortium)
        assert own.ok
        assert own.countersigned == (name,)
        assert all(stat.S_IMODE(p.stat().st_mode) & 0o077 == 0 for p in (kept, *kept.rglob("*")))


def test_the_same_report_again_is_signed_again_and_another_is_not(honest, site, tmp_path):
    first, again = (report_receipt.report(site, honest.packet()) for _ in range(2))
    assert first == again

    def rewrite(copy: Path) -> None:
        payload = build_report(copy, honest.world.server)["payload"] | {"written_at": 1}
        document = identity.signed(honest.world.server, "fedveil/report/1", payload)
        (copy / REPORT).write_bytes(canonical.dumps(document) + b"\n")

    other = honest.rebuilt(tmp_path, rewrite)
    assert verify_report(other / REPORT, consortium_key=honest.consortium).ok, "only that it is a second one is wrong"
    with pytest.raises(ProtocolError, match="another report"):
        report_receipt.report(site, honest.packet(other))


def payload_changed(**changes: Any):
    def change(run: Run, copy: Path) -> None:
        payload = canonical.loads((copy / REPORT).read_bytes())["payload"]
        for path, value in changes.items():
            at = payload
            *way, last = path.split("__")
            for step in way:
                at = at[step]
            at[last] = value
        document = identity.signed(run.world.server, "fedveil/report/1", payload)
        (copy / REPORT).write_bytes(canonical.dumps(document))

    return change


def ledger_cut(run: Run, copy: Path) -> None:
    path = copy / "journals" / "site-0002.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))


def ledger_gone(run: Run, copy: Path) -> None:
    (copy / "journals" / "site-0002.jsonl").unlink()


LIES = {
    "a smaller epsilon": payload_changed(claim__epsilon=0.1),
    "a charge less": payload_changed(sites__x=None),
    "another session": payload_changed(session="0" * 64),
    "this site's ledger is cut": ledger_cut,
    "this site's ledger is left out": ledger_gone,
}


@pytest.mark.parametrize("lie", LIES)
def test_nothing_that_fails_a_check_is_signed_and_what_came_is_kept(honest, site, tmp_path, lie):
    copy = honest.rebuilt(tmp_path, lambda c: LIES[lie](honest, c))
    with pytest.raises(VerificationError):
        report_receipt.report(site, honest.packet(copy))
    assert {p.name for p in site.reports.iterdir()} == {f"{honest.session}.refused"}
    with pytest.raises(ProtocolError, match="kept no report"):
        report_receipt.digest(site, site.session(honest.session))


def test_a_consistent_story_about_another_ledger_of_this_site_is_not_signed(honest, site):
    """All checks pass: the keys are right. Only the site itself knows that it has another ledger."""
    assert see(honest.folder / REPORT, honest.consortium)
    row = site.ledger.journal.rows.pop()
    try:
        with pytest.raises(VerificationError, match="is not this site's"):
            report_receipt.report(site, honest.packet())
    finally:
        site.ledger.journal.rows.append(row)
    assert report_receipt.report(site, honest.packet()).kind == "signed"


def test_another_consortiums_story_is_not_signed(honest, site, monkeypatch):
    monkeypatch.setattr(site, "consortium", identity.public_hex(identity.new_signing_key()))
    with pytest.raises(VerificationError, match="roster"):
        report_receipt.report(site, honest.packet())


def test_no_report_before_the_end_and_none_without_a_folder(honest, site, monkeypatch):
    session = site.session(honest.session)
    monkeypatch.setattr(session, "ended", False)
    with pytest.raises(ProtocolError, match="not ended"):
        report_receipt.report(site, honest.packet())
    monkeypatch.setattr(site, "reports", None)
    with pytest.raises(ProtocolError, match="keeps no reports"):
        report_receipt.report(site, honest.packet())
    with pytest.raises(ProtocolError):
        report_receipt.report(site, Packet({**honest.packet().header, "session": "f" * 64}, honest.packet().buffers))


LISTINGS = {
    "no list": lambda files: "report.json",
    "a path": lambda files: [["../../evil", files[0][1]], *files[1:]],
    "an absolute path": lambda files: [["/tmp/evil", files[0][1]], *files[1:]],
    "a stranger's ledger": lambda files: [*files, ["journals/mallory.jsonl", 0]],
    "twice": lambda files: [*files, files[0]],
    "too short": lambda files: [[files[0][0], files[0][1] - 1], *files[1:]],
    "too long": lambda files: [[files[0][0], files[0][1] + 1], *files[1:]],
    "negative": lambda files: [[files[0][0], -1], *files[1:]],
    "a truth value": lambda files: [[files[0][0], True], *files[1:]],
    "no report": lambda files: files[1:],
    "many": lambda files: files * 100,
    "names that are none": lambda files: [[7, 7]],
}


@pytest.mark.parametrize("listing", LISTINGS)
def test_other_files_than_a_runs_are_not_written(honest, site, listing):
    packet = honest.packet()
    files = LISTINGS[listing](packet.header["files"])
    with pytest.raises(WireError):
        report_receipt.report(site, Packet({**packet.header, "files": files}, packet.buffers))
    assert not site.reports.exists()
    with pytest.raises(WireError, match="one buffer"):
        report_receipt.report(site, Packet(packet.header, {**packet.buffers, "more": b""}))


def test_what_is_too_large_is_not_sent(honest, monkeypatch):
    monkeypatch.setattr(handover, "ALL_COPIES", 3 * sum(n for _, n in honest.packet().header["files"]))
    assert handover.packed(honest.folder, honest.session, 3)
    with pytest.raises(VerificationError, match="to 4 sites"):
        handover.packed(honest.folder, honest.session, 4)


class TestTheGate:
    def check(self, run: Run, site: Site, packet: Packet) -> None:
        Forms().check(packet, "report", run.packet(), site)

    def test_the_signature_leaves_and_nothing_beside_it(self, honest, site):
        answer = report_receipt.report(site, honest.packet())
        self.check(honest, site, answer)
        with pytest.raises(PolicyRefusal):
            self.check(honest, site, Packet({**answer.header, "rows": 41}))
        with pytest.raises(PolicyRefusal):
            self.check(honest, site, Packet(answer.header, {"rows": b"41"}))

    @pytest.mark.parametrize("change", [{"report": "0" * 64}, {"rows": 41}, {"session": "f" * 64}, {"site": "other"}])
    def test_a_statement_about_anything_else_does_not(self, honest, site, change):
        document = canonical.loads((honest.folder / REPORT).read_bytes())
        report_receipt.report(site, honest.packet())
        body = {**signatures.statement(site.id, honest.session, canonical.digest(document)), **change}
        statement = identity.signed(site.key, signatures.DOMAIN, body)
        with pytest.raises(PolicyRefusal):
            self.check(honest, site, Packet({"kind": "signed", "statement": statement}))


def test_a_site_that_signs_wrongly_does_not_spoil_the_report(tmp_path, monkeypatch, caplog):
    """One sends rubbish, one signs another report, one fails: the others' signatures are kept and the report holds."""
    real = report_receipt.report

    def signing(site: Site, request: Packet) -> Packet:
        answer = real(site, request)
        if site.id == "site-0001":
            return Packet({"kind": "signed", "statement": 7})
        if site.id == "site-0002":
            body = signatures.statement(site.id, request.header["session"], "e" * 64)
            return Packet({"kind": "signed", "statement": identity.signed(site.key, signatures.DOMAIN, body)})
        if site.id == "site-0003":
            raise ValueError("no")
        return answer

    monkeypatch.setattr(report_receipt, "report", signing)
    monkeypatch.setattr(Forms, "check", lambda *_: None)
    run = finished(tmp_path)
    for site in run.sites:
        site.ledger.close()
    found = verify_report(run.folder / REPORT)
    assert found.ok, found.failed
    assert found.countersigned == (SiteId("site-0004"),)
    assert caplog.text.count("did not sign the report") == 3


def cut(run: Run, copy: Path) -> None:
    """The same run as if it had ended before round 2: every file agrees with every other, and all of it is signed."""
    heads = {}
    for name in run.world.sites:
        path = copy / "journals" / f"{name}.jsonl"
        lines = path.read_bytes().splitlines(keepends=True)
        rows = [canonical.loads(line) for line in lines]
        at = next(i for i, r in enumerate(rows) if r["kind"] == "spend" and r["body"]["round"] == 2)
        path.write_bytes(b"".join(lines[:at]))
        heads[name] = [at, rows[at - 1]["hash"]]
    path = copy / "journal.jsonl"
    items = [(r["kind"], r["body"]) for r in map(canonical.loads, path.read_bytes().splitlines())]
    at = next(i for i, (kind, body) in enumerate(items) if kind == "round.open" and body["round"] == 2)
    before = next(body for kind, body in reversed(items[:at]) if kind == "round.applied")
    end = {**items[-1][1], "status": "ABORTED", "steps_done": 1, "model_hash": before["model_hash"], "heads": heads}
    path.unlink()
    with Journal.open(path, "server", run.world.server, durable=False) as journal:
        for kind, body in [*items[:at], ("run.end", end)]:
            journal.append(kind, body)
    metrics = copy / "metrics.jsonl"
    metrics.write_bytes(b"".join(metrics.read_bytes().splitlines(keepends=True)[:1]))
    for name in (REPORT, "model.f32", signatures.SIGNATURES):
        (copy / name).unlink(missing_ok=True)
    build_report(copy, run.world.server)


def test_a_report_that_leaves_out_a_round_is_not_signed(honest, site, tmp_path):
    copy = honest.rebuilt(tmp_path, lambda folder: cut(honest, folder))
    failed = verify_report(copy / REPORT, consortium_key=honest.consortium).failed
    assert failed is not None
    assert "tail was cut" in failed.detail  # whoever verifies sees it, not only the site whose ledger it is
    with pytest.raises(VerificationError, match="tail was cut"):
        report_receipt.report(site, honest.packet(copy))
    assert not (site.reports / honest.session).exists()
    assert report_receipt.report(site, honest.packet()).kind == "signed"  # the whole one is


def junk(run: Run) -> Packet:
    packet = run.packet()
    listing = [[name, 1] for name, _ in packet.header["files"]]
    return Packet({**packet.header, "files": listing}, {"files": b"x" * len(listing)})


def test_the_first_report_that_failed_stays_as_evidence(honest, site, tmp_path):
    copy = honest.rebuilt(tmp_path, lambda folder: cut(honest, folder))
    with pytest.raises(VerificationError):
        report_receipt.report(site, honest.packet(copy))
    kept = site.reports / (honest.session + report_receipt.REFUSED) / REPORT
    evidence = kept.read_bytes()
    with pytest.raises(VerificationError):
        report_receipt.report(site, junk(honest))
    assert kept.read_bytes() == evidence == (copy / REPORT).read_bytes()
    assert sorted(p.name for p in site.reports.iterdir()) == [honest.session + report_receipt.REFUSED]


def test_evidence_of_many_sessions_does_not_fill_the_disk(honest, site):
    site.reports.mkdir()
    for n in range(report_receipt.MAX_REFUSED):
        (site.reports / f"{n:064x}{report_receipt.REFUSED}").mkdir()
    with pytest.raises(VerificationError):
        report_receipt.report(site, junk(honest))
    assert len(list(site.reports.iterdir())) == report_receipt.MAX_REFUSED


def test_a_crash_while_a_report_is_signed_again_forgets_nothing(honest, site, tmp_path, monkeypatch):
    first, real = report_receipt.report(site, honest.packet()), report_receipt._signed

    def rewrite(copy: Path) -> None:
        payload = build_report(copy, honest.world.server)["payload"] | {"written_at": 1}
        document = identity.signed(honest.world.server, "fedveil/report/1", payload)
        (copy / REPORT).write_bytes(canonical.dumps(document) + b"\n")

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as m:  # within whatever follows the signature
        m.setattr(os, "replace", killed)
        m.setattr(
            report_receipt, "_signed", lambda *a: (real(*a), m.setattr(report_receipt.shutil, "rmtree", killed))[0]
        )
        with pytest.raises(KeyboardInterrupt):
            report_receipt.report(site, honest.packet())
    with pytest.raises(ProtocolError, match="another report"):
        report_receipt.report(site, honest.packet(honest.rebuilt(tmp_path, rewrite)))
    assert report_receipt.report(site, honest.packet()) == first
