"""A site restored from a backup is noticed by its peers' copies of its journal, and refuses to help."""

from __future__ import annotations

import shutil
from contextlib import contextmanager

import pytest

from fedveil.client.app import make_app as client_app
from fedveil.client.peers import PeerHeads
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
PLAN = make_plan(
    sites=4, records=SPLIT.records, epsilon=2.0, steps=2, clip=1.0, contract_hash="0" * 64,
    model=ModelSpec(name="logistic", inputs=SPLIT.inputs, classes=2), optimizer=Optimizer(learning_rate=0.5),
)  # fmt: skip


def make(world, index, state, peers):
    X, y = SPLIT.parts[index]
    site = simulation.make_site(world.roster, index, world.keys[index], PLAN, X, y, state, cap=20.0, durable=True)
    site.peers = peers
    return site


def run(world, folder, sites):
    job = jobs.create(folder, PLAN, world.roster, world.server, documents=world.documents(), durable=False)

    @contextmanager
    def resolve(context):
        yield sites[int(context.node_config["partition-id"])]

    server, strategy = server_app(job)
    run_inprocess(server, client_app(resolve), world.sites, lambda _: {})
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
