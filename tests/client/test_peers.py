"""A site restored from a backup is noticed by its peers' copies of its journal, and refuses to help."""

from __future__ import annotations

import shutil
from contextlib import contextmanager

import pytest

from fedveil.client.app import make_app as client_app
from fedveil.client.peers import PeerHeads
from fedveil.common import canonical, identity
from fedveil.common import flwr_adapter as flower
from fedveil.common.errors import FedveilError, FreshLedger, HelperRefusal, JournalError, ProtocolError
from fedveil.common.identity import SERVER, Member, Roster
from fedveil.common.journal import Copy, Head
from fedveil.common.units import SiteId
from fedveil.common.workload.model import ModelSpec
from fedveil.deploy.lab import datasets, virtual_sites
from fedveil.deploy.transport.inprocess import run_inprocess
from fedveil.privacy.joining import MAX_LEDGERS, heads_in, heads_of, left_out, seen_of
from fedveil.privacy.plan import Optimizer, make_plan
from fedveil.server import job as jobs
from fedveil.server.app import make_app as server_app

A, B = SiteId("a"), SiteId("b")
KEYS = {s: identity.new_signing_key() for s in (A, B)}
ROSTER = Roster(
    "two", Member(SERVER, "a" * 64), tuple(Member(s, identity.public_hex(k)) for s, k in KEYS.items())
)  # fmt: skip
ONE, TWO = "1" * 64, "2" * 64


def signed(site, rows, last, ledger, data_set=""):
    """A copy of a head in the form in which it travels: each ledger is of a data set of its own, unless it is named."""
    return Copy(Head(rows, last * 64), ledger, data_set or ledger).by(site, KEYS[site])


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
def test_a_restored_site_refuses_and_the_others_go_on(tmp_path, between, monkeypatch):
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
        monkeypatch.setattr(virtual_sites, "LINEAGE", "another data set")
        others = [make(world, i, tmp_path / "others", PeerHeads(tmp_path / f"peers-{i}.json")) for i in range(4)]
        run(world, tmp_path / "between", others)
        for site in others:
            site.ledger.close()
        monkeypatch.undo()
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
    five, first = signed(A, 5, "a", ONE), signed(B, 1, "b", ONE)
    peers.keep({A: five, B: first})
    peers.keep({A: signed(A, 4, "c", ONE)})
    assert PeerHeads(path).copies() == {A: [five.to_json()], B: [first.to_json()]}
    assert five.to_json() == [5, "a" * 64, ONE, ONE, five.signature]
    other, six = signed(A, 1, "d", TWO), signed(A, 6, "e", ONE)
    peers.keep({A: other})  # another data set's ledger has its own count
    assert PeerHeads(path).copies()[A] == [five.to_json(), other.to_json()]
    peers.keep({A: six})  # what moved last stands last
    assert PeerHeads(path).copies()[A] == [other.to_json(), six.to_json()]


def test_a_site_with_two_data_sets_cannot_wind_one_back_behind_the_other(tmp_path):
    peers = PeerHeads(tmp_path / "peers.json")
    peers.follow({A: signed(A, 9, "a", ONE)})
    peers.follow({A: signed(A, 3, "b", TWO)})  # a run on its other ledger in between
    for again in (peers, PeerHeads(tmp_path / "peers.json")):
        for rows, last in ((8, "c"), (9, "c")):
            with pytest.raises(HelperRefusal, match="back in time"):
                again.follow({A: signed(A, rows, last, ONE)})
        again.follow({A: signed(A, 3, "b", TWO), B: signed(B, 1, "e", ONE)})
    peers.follow({A: signed(A, 10, "c", ONE)})


def test_ledgers_without_end_cost_a_bounded_memory(tmp_path):
    peers = PeerHeads(tmp_path / "peers.json")
    for n in range(50):
        peers.keep({A: signed(A, n, "a", f"{n:064x}"), B: signed(B, n, "b", ONE)})
    held = PeerHeads(tmp_path / "peers.json").copies()
    assert [entry[0] for entry in held[A]] == list(range(50 - MAX_LEDGERS, 50))
    assert held[B] == [signed(B, 49, "b", ONE).to_json()]


def test_what_was_written_when_one_ledger_was_remembered_is_read(tmp_path):
    (tmp_path / "peers.json").write_bytes(canonical.dumps({A: [5, "a" * 64, "1" * 64]}))
    with pytest.raises(HelperRefusal):
        PeerHeads(tmp_path / "peers.json").follow({A: signed(A, 4, "b", ONE)})


def test_heads_without_a_signature_are_compared_with_and_not_passed_on(tmp_path):
    path = tmp_path / "peers.json"
    path.write_bytes(canonical.dumps({A: [[5, "a" * 64, ONE], [2, "a" * 64, TWO]]}))  # as older versions wrote it
    for peers in (PeerHeads(path), PeerHeads(path, ROSTER)):
        assert peers.copies() == {}
        with pytest.raises(HelperRefusal, match="back in time"):
            peers.follow({A: signed(A, 4, "b", ONE)})
    same = signed(A, 5, "a", ONE)
    peers.keep({A: same})  # the same head, now with its owner's word
    assert PeerHeads(path, ROSTER).copies() == {A: [same.to_json()]}


def test_what_another_key_has_signed_is_not_passed_on(tmp_path):
    """A site that enrolled anew has another key: what its old one signed is still compared with here."""
    peers = PeerHeads(tmp_path / "peers.json", ROSTER)
    peers.keep({A: Copy(Head(5, "a" * 64), ONE, ONE).by(A, KEYS[B]), B: signed(B, 1, "b", ONE)})
    assert set(peers.copies()) == {B}
    assert [copy.head.rows for copy in peers.of(A)] == [5]


def test_a_member_that_contributes_under_another_ledger_than_it_joined_with(tmp_path):
    peers = PeerHeads(tmp_path / "peers.json", ROSTER)
    peers.keep({A: signed(A, 5, "a", ONE, TWO)})
    with pytest.raises(FreshLedger, match="'a' contributes under another ledger"):
        peers.follow({A: signed(A, 9, "b", "3" * 64, TWO)})
    peers.follow({A: signed(A, 9, "b", "3" * 64, "4" * 64)})  # of another data set


def test_peers_of_a_site_restored_on_one_of_two_ledgers_say_so_when_a_run_begins():
    """Statements: the copies that count are those of the ledger with which a site takes part this time."""
    nine, three = signed(A, 9, "a", ONE), signed(A, 3, "b", TWO)
    hearsay = [[99, "a" * 64, "5" * 64], Copy(Head(98, "a" * 64), "6" * 64, ONE).by(A, KEYS[B]).to_json()]
    copies = {A: [nine.to_json(), three.to_json(), *hearsay], "gone": [[1, "a" * 64, ONE]]}
    for ledger in (ONE, TWO):
        found = heads_in({A: statement(A, ledger), B: statement(B, "3" * 64, copies)}, ROSTER)
        assert found[A].own == signed(A, 2, "c", ledger)
        assert seen_of(found, A) == [(B, nine), (B, three)], "and nothing that A has not signed"
        assert (seen_of(found, B), set(left_out(found, ledger))) == ([], {B})


def statement(site, ledger, peers=None, *, data_set="", imports=()):
    own = signed(site, 2, "c", ledger, data_set)
    said = {"head": list(own.head), "ledger": ledger, "data_set": own.data_set, "head_signature": own.signature}
    return {"payload": {**said, "imports": [list(i) for i in imports], "peers": peers or {}}}


@pytest.mark.parametrize(("imports", "out"), [
    ([], True), ([(ONE, 8)], True), ([(TWO, 9)], True), ([(ONE, 9)], False), ([(TWO, 1), (ONE, 12)], False),
])  # fmt: skip
def test_a_fresh_ledger_for_a_known_data_set_counts_the_known_one_or_is_out(imports, out):
    known = signed(A, 9, "a", ONE)
    told = heads_in(
        {A: statement(A, "3" * 64, data_set=ONE, imports=imports), B: statement(B, ONE, {A: [known.to_json()]})}, ROSTER
    )
    assert set(left_out(told, ONE)) == ({A} if out else set())
    own = heads_in({A: statement(A, "3" * 64, data_set=ONE, imports=imports), B: statement(B, ONE)}, ROSTER)
    assert left_out(own, ONE) == {}
    assert set(left_out(own, ONE, {A: [known], B: []}.__getitem__)) == ({A} if out else set()), "from memory"


@pytest.mark.parametrize("entries", [
    [], [[]], [[1, "a" * 64]], [[1, "a" * 64, ONE, ONE]], [[1, "a" * 64, ONE, ONE, ONE]],
    [[1 << 40, "a" * 64, ONE]], [[1, "a" * 64, "1" * 64]] * 2,
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
