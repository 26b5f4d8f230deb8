"""Runs whose sums only the sites read: all sites end with one model, the server with none, stragglers catch up."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from flwr.app import Message

from fedveil.client.app import make_app as client_app
from fedveil.client.round import apply
from fedveil.common.errors import FedveilError, PlanError, ProtocolError
from fedveil.common.units import SiteId
from fedveil.common.wire import Packet
from fedveil.common.workload.model import ModelSpec
from fedveil.deploy.lab import datasets, simulate, virtual_sites
from fedveil.deploy.transport.inprocess import run_inprocess
from fedveil.privacy.plan import Optimizer, Sum, make_plan
from fedveil.privacy.report.verify import verify_report
from fedveil.server import job as jobs
from fedveil.server.app import make_app as server_app


def plan_of(split, reveal_to: Literal["server", "sites"] = "sites", sum_: Sum = "keysum"):
    return make_plan(
        sum=sum_, sites=4, records=split.records, epsilon=2.0, steps=4, clip=1.0, contract_hash="0" * 64,
        model=ModelSpec(name="logistic", inputs=split.inputs, classes=2), optimizer=Optimizer(learning_rate=0.5),
        reveal_to=reveal_to,
    )  # fmt: skip


def run(folder: Path, reveal_to: Literal["server", "sites"] = "sites", drop=None):
    split = datasets.load("trivial", 4, 0)
    plan = plan_of(split, reveal_to)
    world = virtual_sites.World.make(4)
    job = jobs.create(folder, plan, world.roster, world.server, documents=world.documents(), durable=False)
    server, _ = server_app(job)
    resolve, sites = virtual_sites.keep(
        lambda i: virtual_sites.make_site(world.roster, i, world.keys[i], plan, *split.parts[i], folder, cap=9.0)
    )
    run_inprocess(server, client_app(resolve), world.sites, lambda _: {}, drop=drop)
    return job, sites


def weights(job, site):
    return site.revealed(site.session(job.session)).state.weights


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


def test_a_site_that_missed_a_sum_is_given_it_before_the_next_round(tmp_path):
    late, lost = SiteId("site-0003"), []

    def drop(site: SiteId, message: Message) -> bool:
        meta = message.metadata
        if site == late and meta.message_type == "query.apply" and not meta.reply_to_message_id and len(lost) < 2:
            lost.append(meta.group_id)
            return True
        return False

    job, sites = run(tmp_path / "run", drop=drop)
    assert len(lost) == 2
    assert all(np.array_equal(weights(job, sites[0]), weights(job, s)) for s in sites)


def test_a_site_refuses_an_altered_sum_and_a_round_from_another_model(tmp_path):
    job, sites = run(tmp_path / "run")
    inner = {"kind": "keysum/blinded", "round": 4}
    site = sites[0]
    model = site.revealed(site.session(job.session))
    before = model.name
    apply(
        site, Packet({"kind": "apply", "session": job.session, "packet": inner})
    )  # of a round it has: nothing happens
    assert model.name == before
    with pytest.raises(ProtocolError):
        apply(site, Packet({"kind": "apply", "session": job.session, "packet": {**inner, "round": 99}}))
    model.round = 3  # as if round 4 had not come yet
    with pytest.raises(FedveilError):
        apply(site, Packet({"kind": "apply", "session": job.session, "packet": inner}, {"blinded": b"\0" * 64}))
    assert model.name == before


def test_only_keysum_can_hide_sums_from_the_server():
    with pytest.raises(PlanError, match="keysum"):
        plan_of(datasets.load("trivial", 4, 0), sum_="plain")


def test_where_the_server_reads_the_sums_there_is_nothing_to_apply(tmp_path):
    job, sites = run(tmp_path / "run", reveal_to="server")
    with pytest.raises(ProtocolError):
        apply(sites[0], Packet({"kind": "apply", "session": job.session}))
    assert (tmp_path / "run" / "model.f32").exists()
