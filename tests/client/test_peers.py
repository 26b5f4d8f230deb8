"""A site restored from a backup is noticed by its peers' copies of its journal, and refuses to help."""

from __future__ import annotations

import shutil
from contextlib import contextmanager

import pytest

from fedveil.client.app import make_app as client_app
from fedveil.client.peers import PeerHeads
from fedveil.common import canonical
from fedveil.common import flwr_adapter as flower
from fedveil.common.errors import FedveilError, HelperRefusal, JournalError, ProtocolError
from fedveil.common.journal import Head
from fedveil.common.units import SiteId
from fedveil.common.workload.model import ModelSpec
from fedveil.deploy.lab import datasets, virtual_sites
from fedveil.deploy.transport.inprocess import run_inprocess
from fedveil.privacy.joining import MAX_LEDGERS, Copy, heads_in, heads_of
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
    site = virtual_sites.make_site(world.roster, index, world.keys[index], plan, X, y, state, cap=20.0, durable=True)
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


@pytest.mark.parametrize("between", [False, True], ids=["at once", "after a run on their other data sets"])
def test_a_restored_site_refuses_and_the_others_go_on(tmp_path, between):
    world, state = virtual_sites.World.make(4), tmp_path / "state"
    peers = [PeerHeads(tmp_path / f"peers-{i}.json") for i in range(4)]
    sites = [make(world, i, state, peers[i]) for i in range(4)]
    ledger = state / "ledgers" / f"{world.sites[0]}.jsonl"
    run(world, tmp_path / "one", sites)
    shutil.copy(ledger, tmp_path / "backup")
    run(world, tmp_path / "two", sites)
    for site in sites:
        site.ledger.close()
    if between:
        others = [make(world, i, tmp_path / "others", PeerHeads(tmp_path / f"peers-{i}.json")) for i in range(4)]
        run(world, tmp_path / "between", others)
        for site in others:
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
    world, state = virtual_sites.World.make(4), tmp_path / "state"
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
    assert PeerHeads(path).copies() == {A: [[5, "a" * 64, one]], B: [[1, "b" * 64, one]]}
    peers.keep({A: Copy(Head(1, "d" * 64), two)})  # another data set's ledger has its own count
    assert PeerHeads(path).copies()[A] == [[5, "a" * 64, one], [1, "d" * 64, two]]
    peers.keep({A: Copy(Head(6, "e" * 64), one)})  # what moved last stands last
    assert PeerHeads(path).copies()[A] == [[1, "d" * 64, two], [6, "e" * 64, one]]


def test_a_site_with_two_data_sets_cannot_wind_one_back_behind_the_other(tmp_path):
    peers = PeerHeads(tmp_path / "peers.json")
    one, two = "1" * 64, "2" * 64
    peers.follow({A: Copy(Head(9, "a" * 64), one)})
    peers.follow({A: Copy(Head(3, "b" * 64), two)})  # a run on its other ledger in between
    for again in (peers, PeerHeads(tmp_path / "peers.json")):
        for rows, last in ((8, "c"), (9, "c")):
            with pytest.raises(HelperRefusal, match="back in time"):
                again.follow({A: Copy(Head(rows, last * 64), one)})
        again.follow({A: Copy(Head(3, "b" * 64), two), B: Copy(Head(1, "e" * 64), one)})
    peers.follow({A: Copy(Head(10, "c" * 64), one)})


def test_ledgers_without_end_cost_a_bounded_memory(tmp_path):
    peers = PeerHeads(tmp_path / "peers.json")
    for n in range(50):
        peers.keep({A: Copy(Head(n, "a" * 64), f"{n:064x}"), B: Copy(Head(n, "b" * 64), "1" * 64)})
    held = PeerHeads(tmp_path / "peers.json").copies()
    assert [entry[0] for entry in held[A]] == list(range(50 - MAX_LEDGERS, 50))
    assert held[B] == [[49, "b" * 64, "1" * 64]]


def test_what_was_written_when_one_ledger_was_remembered_is_read(tmp_path):
    (tmp_path / "peers.json").write_bytes(canonical.dumps({A: [5, "a" * 64, "1" * 64]}))
    with pytest.raises(HelperRefusal):
        PeerHeads(tmp_path / "peers.json").follow({A: Copy(Head(4, "b" * 64), "1" * 64)})


def test_peers_of_a_site_restored_on_one_of_two_ledgers_say_so_when_a_run_begins():
    """Statements: the copies that count are those of the ledger with which a site takes part this time."""
    one, two = "1" * 64, "2" * 64
    statement = lambda ledger, peers: {"payload": {"head": [2, "c" * 64], "ledger": ledger, "peers": peers}}  # noqa: E731
    copies = {A: [[9, "a" * 64, one], [3, "b" * 64, two]], "gone": [[1, "a" * 64, one]]}
    for ledger, rows in ((one, 9), (two, 3)):
        found = heads_in({A: statement(ledger, {}), B: statement("3" * 64, copies)})
        assert {s: c.head.rows for s, c in found[B][1].items()} == {A: rows}
        assert found[A] == (Copy(Head(2, "c" * 64), ledger), {})
    assert heads_in({A: statement("4" * 64, {}), B: statement("3" * 64, copies)})[B][1] == {}


@pytest.mark.parametrize("entries", [
    [], [[]], [[1, "a" * 64]], [[1, "a" * 64, "1" * 64]] * 2,
    [[i, "a" * 64, f"{i:064x}"] for i in range(MAX_LEDGERS + 1)], [[True, "a" * 64, "1" * 64]], [1, 2], {"1": 2},
    None, 5,
])  # fmt: skip
def test_heads_that_no_honest_peer_sends(entries):
    with pytest.raises(ProtocolError):
        heads_of({"a": entries})


@pytest.mark.parametrize("text", [b"", b"[]", b'{"a":[1]}', b'{"a":[-1,"' + b"0" * 64 + b'"]}', b'{"A b":[1,"x"]}'])
def test_a_file_that_is_something_else_is_refused(tmp_path, text):
    (tmp_path / "peers.json").write_bytes(text)
    with pytest.raises((JournalError, FedveilError)):
        PeerHeads(tmp_path / "peers.json")
