"""Every site steps a model of its own: all end with one, stragglers catch up, and a blind server has none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from flwr.app import Message

from fedveil.client.app import make_app as client_app
from fedveil.client.own_model import OwnModel
from fedveil.client.round import apply
from fedveil.client.session import Site
from fedveil.common import flwr_adapter
from fedveil.common.errors import FedveilError, JournalError, PlanError, ProtocolError
from fedveil.common.units import SiteId
from fedveil.common.wire import Limits, Packet
from fedveil.common.workload.model import ModelSpec
from fedveil.deploy.lab import datasets, simulate, virtual_sites
from fedveil.deploy.transport.inprocess import run_inprocess
from fedveil.privacy.optimiser import ModelState
from fedveil.privacy.plan import Optimizer, Sum, make_plan
from fedveil.privacy.report.verify import verify_report
from fedveil.privacy.secagg.opened_sum import sums_in, with_sums
from fedveil.privacy.secagg.store import MemoryStore
from fedveil.server import job as jobs
from fedveil.server import opened_sums
from fedveil.server.app import make_app as server_app


def plan_of(split, reveal_to: Literal["server", "sites"] = "sites", sum_: Sum = "keysum"):
    return make_plan(
        sum=sum_, sites=4, records=split.records, epsilon=2.0, steps=4, clip=1.0, contract_hash="0" * 64,
        model=ModelSpec(name="logistic", inputs=split.inputs, classes=2), optimizer=Optimizer(learning_rate=0.5),
        reveal_to=reveal_to,
    )  # fmt: skip


def run(folder: Path, reveal_to: Literal["server", "sites"] = "sites", drop=None, sum_: Sum = "keysum", sites=None,
        durable: bool = False):  # fmt: skip
    split = datasets.load("trivial", 4, 0)
    plan = plan_of(split, reveal_to, sum_)
    world = virtual_sites.World.make(4)
    job = jobs.create(folder, plan, world.roster, world.server, documents=world.documents(), durable=durable)
    server, _ = server_app(job)
    kept = virtual_sites.Kept(
        lambda i: virtual_sites.make_site(world.roster, i, world.keys[i], plan, *split.parts[i], folder, cap=9.0)
    )

    def watched(site: SiteId, message: Message) -> bool:
        if sites is not None:
            sites[:] = kept.sites
        return drop is not None and drop(site, message)

    run_inprocess(server, client_app(kept.resolve), world.sites, lambda _: {}, drop=watched)
    return job, kept.sites


def weights(job, site):
    return site.model(site.session(job.session)).held.state.weights


def test_all_sites_have_one_model_and_the_server_none(tmp_path):
    job, sites = run(tmp_path / "run")
    first = weights(job, sites[0])
    assert np.abs(first).max() > 0
    assert all(np.array_equal(first, weights(job, s)) for s in sites[1:])
    assert not (tmp_path / "run" / "model.f32").exists()
    assert not job.state.weights.any()  # the public initialisation, untouched
    known = {first.astype("<f4").tobytes()[:64], first.tobytes()[:64]}
    for path in (tmp_path / "run").rglob("*"):
        if path.is_file() and "sites" not in path.parts:
            assert not any(k in path.read_bytes() for k in known), path


def test_the_report_of_such_a_run_verifies(tmp_path):
    config = simulate.Config(clients=4, dataset="trivial", reveal_to="sites")
    outcome = simulate.run(config, tmp_path / "run")
    assert outcome.metrics["accuracy"] > 0
    assert verify_report(tmp_path / "run" / "report.json").ok


@pytest.mark.parametrize("reveal_to", ["sites", "server"])
def test_a_site_that_missed_rounds_is_given_their_sums(tmp_path, reveal_to):
    late, lost = SiteId("site-0003"), []

    def drop(site: SiteId, message: Message) -> bool:
        meta = message.metadata
        if site == late and meta.message_type == "train.contribute" and meta.group_id in ("2", "3"):
            lost.append(meta.group_id)
            return not meta.reply_to_message_id
        return False

    job, sites = run(tmp_path / "run", reveal_to, drop=drop)
    assert lost == ["2", "3"]
    assert [r.body["round"] for r in next(s for s in sites if s.id == late).ledger.journal.of_kind("spend")] == [1, 4]
    assert all(np.array_equal(weights(job, sites[0]), weights(job, s)) for s in sites)


@pytest.mark.parametrize("reveal_to", ["sites", "server"])
def test_a_site_whose_model_was_lost_is_asked_where_it_stands(tmp_path, reveal_to, monkeypatch):
    monkeypatch.setattr(opened_sums, "MAX_SUMS", 1)  # so that one message does not bring everything

    def drop(site: SiteId, message: Message) -> bool:
        meta = message.metadata
        asked = meta.message_type == "train.contribute" and not meta.reply_to_message_id
        if site == "site-0002" and asked and meta.group_id == "4":
            session = next(iter(sites[1]._sessions.values()))
            start = sites[1].start(session.plan)
            session.model = OwnModel(session.plan, session.sum, MemoryStore(), start)  # as if its disk were empty
        return False

    sites: list[Site] = []
    job, found = run(tmp_path / "run", reveal_to, drop=drop, sites=sites)
    refused = [r.body for r in job.journal.of_kind("site.refused")]
    assert [(r["site"], r["round"], r["code"]) for r in refused] == [("site-0002", 4, "StateMismatch")]
    assert all(np.array_equal(weights(job, found[0]), weights(job, s)) for s in found)


def test_a_site_refuses_an_altered_sum_and_a_sum_of_no_round(tmp_path):
    job, sites = run(tmp_path / "run")
    site = sites[0]
    model = site.model(site.session(job.session))
    before = model.held
    inner = Packet({"kind": "keysum/opened", "round": 4}, {"opening": b""})
    ask = {"kind": "apply", "session": job.session, "state": before.name}
    apply(site, with_sums(ask, {}, [inner]))  # of a round it has: nothing happens
    assert model.held is before
    with pytest.raises(ProtocolError, match="not in the plan"):
        apply(site, with_sums(ask, {}, [Packet({**inner.header, "round": 99}, inner.buffers)]))
    model.held = replace(before, round=3)  # as if round 4 had not come yet
    with pytest.raises(FedveilError):
        apply(site, with_sums(ask, {}, [Packet(inner.header, {"opening": b"\0" * 64})]))
    assert model.held.name == before.name


def test_only_keysum_can_hide_sums_from_the_server():
    with pytest.raises(PlanError, match="keysum"):
        plan_of(datasets.load("trivial", 4, 0), sum_="plain")


@pytest.mark.parametrize("sum_", ["keysum", "sharedkey", "plain"])
def test_every_site_ends_with_the_servers_model(tmp_path, sum_):
    job, sites = run(tmp_path / "run", "server", sum_=sum_)
    assert all(np.array_equal(job.state.weights, weights(job, s)) for s in sites)
    assert (tmp_path / "run" / "model.f32").read_bytes() == job.state.sent()
    opened = [r.body["state"] for r in job.journal.of_kind("round.open")]
    assert len(set(opened)) == 4
    for s in sites:  # the signed charges name the states that the sums were computed from
        assert [r.body["state"] for r in s.ledger.journal.of_kind("spend")] == opened


def brought(folder: Path, monkeypatch, sum_: Sum, reveal_to: Literal["server", "sites"] = "server", broken=None):
    """A run in which one site misses more rounds than one message brings; what it is sent by ``apply``."""
    monkeypatch.setattr(opened_sums, "MAX_SUMS", 1)
    late, sent, now = SiteId("site-0003"), list[Packet](), [0]

    def drop(site: SiteId, message: Message) -> bool:
        """It hears nothing from round 2 to the end of round 3."""
        meta = message.metadata
        if meta.message_type == "train.contribute":
            now[0] = int(meta.group_id)
        if site != late or meta.reply_to_message_id:
            return False
        away = now[0] in (2, 3) and not (now[0] == 3 and meta.message_type == "query.apply")
        if meta.message_type == "query.apply" and not away:
            sent.append(flwr_adapter.from_record(message.content, Limits()))
        if broken is not None:
            broken()
        return away

    job, sites = run(folder, reveal_to, drop=drop, sum_=sum_, durable=True)
    assert all(np.array_equal(weights(job, sites[0]), weights(job, s)) for s in sites)
    return job, sent


@pytest.mark.parametrize("sum_", ["keysum", "sharedkey"])
def test_a_site_that_lacks_more_than_fits_is_brought_a_state_that_the_others_named(tmp_path, monkeypatch, sum_):
    job, [message] = brought(tmp_path / "run", monkeypatch, sum_)
    assert sums_in(message) == []
    named = message.header["named"]
    after_two = [r.body["state"] for r in job.journal.of_kind("round.applied")][1]
    assert (named["round"], len(named["members"])) == (3, 3)
    assert {h["state"] for h in named["members"]} == {after_two} == {message.header["state"]}


@pytest.mark.parametrize(("sum_", "reveal_to"), [("keysum", "sites"), ("plain", "server")])
def test_where_no_state_has_a_signed_name_sums_are_brought_one_after_the_other(tmp_path, monkeypatch, sum_, reveal_to):
    _, sent = brought(tmp_path / "run", monkeypatch, sum_, reveal_to)
    assert [[p.header["round"] for p in sums_in(m)] for m in sent] == [[1], [2]]
    assert not (tmp_path / "run" / opened_sums.NAMED_FILE).exists()


def test_without_the_checkpoint_sums_are_brought(tmp_path, monkeypatch):
    def broken():
        for path in (tmp_path / "run" / "checkpoints").glob("*.state"):
            path.unlink()

    _, sent = brought(tmp_path / "run", monkeypatch, "keysum", broken=broken)
    assert [[p.header["round"] for p in sums_in(m)] for m in sent] == [[1], [2]]


def test_a_server_that_was_restarted_still_has_what_the_members_signed(tmp_path, monkeypatch):
    job, _ = brought(tmp_path / "run", monkeypatch, "keysum")
    job.durable = True
    again = opened_sums.opened_sums(job)
    kept = again._named
    assert kept is not None
    assert (kept["round"], len(kept["members"])) == (4, 4)
    message, _ = again._next(0)
    assert message.header["named"] == kept
    assert ModelState.load(message.buffers["whole"]).digest == kept["members"][0]["state"]
    (tmp_path / "run" / opened_sums.NAMED_FILE).write_bytes(b"{")
    with pytest.raises(JournalError, match="damaged"):
        opened_sums.opened_sums(job)
