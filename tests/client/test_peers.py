"""A site restored from a backup is noticed by its peers' copies of its journal, and refuses to help."""

from __future__ import annotations

import shutil
from contextlib import contextmanager

import pytest

from fedveil.client.app import make_app as client_app
from fedveil.client.peers import PeerHeads
from fedveil.common import flwr_adapter as flower
from fedveil.common.errors import FedveilError, JournalError
from fedveil.common.journal import Head
from fedveil.common.model_spec import ModelSpec
from fedveil.common.units import SiteId
from fedveil.deploy import datasets, simulation
from fedveil.deploy.transport.inprocess import run_inprocess
from fedveil.privacy.joining import Copy
from fedveil.privacy.plan import Optimizer, make_plan
from fedveil.server import job as jobs
from fedveil.server.app import make_app as server_app

A, B = SiteId("a"), SiteId("b")
SPLIT = datasets.load("trivial", 4, 0)


def planned(steps):
    return make_plan(
        sites=4, records=SPLIT.records, epsilon=2.0, steps=steps, clip=1.0, contract_hash="0" * 64,
        model=ModelSpec(name="logistic", inputs=SPLIT.inputs, classes=2), optimizer=Optimizer(learning_rate=0.5),
    )  # fmt: skip


PLAN = planned(2)


def make(world, index, state, peers, plan=PLAN):
    X, y = SPLIT.parts[index]
    site = simulation.make_site(world.roster, index, world.keys[index], plan, X, y, state, cap=20.0, durable=True)
    site.peers = peers
    return site


def run(world, folder, sites, plan=PLAN, drop=None):
    job = jobs.create(folder, plan, world.roster, world.server, documents=world.documents(), durable=False)

    @contextmanager
    def resolve(context):
        yield sites[int(context.node_config["partition-id"])]

    server, strategy = server_app(job)
    run_inprocess(server, client_app(resolve), world.sites, lambda _: {}, drop=drop)
    return job, strategy


def test_a_restored_site_refuses_and_the_others_go_on(tmp_path):
    world, state = simulation.World.make(4), tmp_path / "state"
    peers = [PeerHeads(tmp_path / f"peers-{i}.json") for i in range(4)]
    sites = [make(world, i, state, peers[i]) for i in range(4)]
    ledger = state / "ledgers" / f"{world.sites[0]}.jsonl"
    run(world, tmp_path / "one", sites)
    shutil.copy(ledger, tmp_path / "backup")
    run(world, tmp_path / "two", sites)
    for site in sites:
        site.ledger.close()
    shutil.copy(tmp_path / "backup", ledger)  # the disk of the first site goes back to before the second run
    sites = [make(world, i, state, PeerHeads(tmp_path / f"peers-{i}.json")) for i in range(4)]
    job, strategy = run(world, tmp_path / "three", sites)
    refused = {r.body["site"]: r.body["code"] for r in job.journal.of_kind("site.refused") if "round" not in r.body}
    assert refused == {world.sites[0]: "HelperRefusal"}
    members = [r.body["members"] for r in job.journal.of_kind("round.applied")]
    assert members
    assert all(world.sites[0] not in m for m in members)
    assert strategy.status == "COMPLETED"


def journal_of(world, state):
    return state / "ledgers" / f"{world.sites[0]}.jsonl"


@pytest.mark.parametrize("restored", [True, False], ids=["restored", "only restarted"])
def test_a_site_restored_within_a_run_is_seen_in_the_next_round(tmp_path, restored):
    world, state = simulation.World.make(4), tmp_path / "state"
    plan = planned(4)
    sites = [make(world, i, state, PeerHeads(), plan) for i in range(4)]
    first = flower.node_id(world.sites[0])

    def restart(site, message):
        """Before its round 3 the first site is started again, with its journal as it was before round 2."""
        meta = message.metadata
        if (meta.dst_node_id, meta.message_type) == (first, "train.contribute"):
            if meta.group_id == "2":
                shutil.copy(journal_of(world, state), tmp_path / "backup")
            if meta.group_id == "3":
                sites[0].ledger.close()
                if restored:
                    shutil.copy(tmp_path / "backup", journal_of(world, state))
                sites[0] = make(world, 0, state, PeerHeads(), plan)
        return False

    job, strategy = run(world, tmp_path / "one", sites, plan, restart)
    refused = [(r.body["round"], r.body["code"]) for r in job.journal.of_kind("site.refused")]
    aborted = [r.body["round"] for r in job.journal.of_kind("round.aborted")]
    if restored:
        assert refused[:3] == [(3, "HelperRefusal")] * 3, "each of its three peers"
        assert 3 in aborted
    else:
        assert (refused, aborted, strategy.status) == ([], [], "COMPLETED")


def test_heads_only_move_forward_and_survive(tmp_path):
    path = tmp_path / "peers.json"
    peers = PeerHeads(path)
    one, two = "1" * 64, "2" * 64
    peers.keep({A: Copy(Head(5, "a" * 64), one), B: Copy(Head(1, "b" * 64), one)})
    peers.keep({A: Copy(Head(4, "c" * 64), one)})
    assert PeerHeads(path).copies() == {A: [5, "a" * 64, one], B: [1, "b" * 64, one]}
    peers.keep({A: Copy(Head(1, "d" * 64), two)})  # another data set's ledger has its own count
    assert PeerHeads(path).copies()[A] == [1, "d" * 64, two]


@pytest.mark.parametrize("text", [b"", b"[]", b'{"a":[1]}', b'{"a":[-1,"' + b"0" * 64 + b'"]}', b'{"A b":[1,"x"]}'])
def test_a_file_that_is_something_else_is_refused(tmp_path, text):
    (tmp_path / "peers.json").write_bytes(text)
    with pytest.raises((JournalError, FedveilError)):
        PeerHeads(tmp_path / "peers.json")
