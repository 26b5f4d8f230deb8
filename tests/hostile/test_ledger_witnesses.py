"""Who may say of a site that its ledger was set back or replaced: the site itself, by what it signed; nobody else.

After the attack `a02_accuse`: one member says in its signed statement that it has seen later journals of all others.
"""

from __future__ import annotations

import secrets
import shutil
import time
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import pytest

from fedveil.client import round as line
from fedveil.client import witness
from fedveil.client.app import make_app as client_app
from fedveil.client.peers import PeerHeads
from fedveil.client.session import Site
from fedveil.common import identity
from fedveil.common.errors import BudgetExhausted, HelperRefusal, JournalError, ProtocolError, VerificationError
from fedveil.common.journal import Copy, Head, parse
from fedveil.common.units import Delta, Epsilon, SiteId
from fedveil.common.wire import Packet
from fedveil.common.workload.model import ModelSpec
from fedveil.deploy.lab import datasets, virtual_sites
from fedveil.deploy.transport.inprocess import run_inprocess
from fedveil.privacy.joining import JOIN, check_copies, heads_in
from fedveil.privacy.plan import Optimizer, make_plan
from fedveil.server import admission
from fedveil.server import job as jobs
from fedveil.server.app import make_app as server_app

SPLIT = datasets.load("trivial", 4, 0)
PLAN = make_plan(
    sites=4, records=SPLIT.records, epsilon=2.0, steps=2, clip=1.0, contract_hash="0" * 64,
    model=ModelSpec(name="logistic", inputs=SPLIT.inputs, classes=2), optimizer=Optimizer(learning_rate=0.5),
)  # fmt: skip
FIRST = 0  # the site whose ledger is accused, or replaced


class Four:
    """Four sites on disk, over any number of runs. Their ledgers and what they remember of each other stay."""

    def __init__(self, folder: Any) -> None:
        self.folder, self.world, self.runs = folder, virtual_sites.World.make(4), 0
        self.sites = [self.open(i) for i in range(4)]

    def open(self, i: int, cap: float = 20.0) -> Site:
        X, y = SPLIT.parts[i]
        w = self.world
        site = virtual_sites.make_site(w.roster, i, w.keys[i], PLAN, X, y, self.folder, cap=cap, durable=True)
        site.peers = PeerHeads(self.folder / f"peers-{i}.json", w.roster)
        return site

    def ledger(self, i: int = FIRST) -> Any:
        return self.folder / "ledgers" / f"{self.world.sites[i]}.jsonl"

    def replace(self, change: Callable[[Any], Any], cap: float = 20.0) -> None:
        """While the first site is stopped, something happens to its ledger."""
        self.sites[FIRST].ledger.close()
        change(self.ledger())
        time.sleep(1.1)  # a new ledger's first row differs from the old one's by its second alone
        self.sites[FIRST] = self.open(FIRST, cap)

    def run(self) -> tuple[list[tuple[str, str]], list[list[SiteId]], str]:
        """Who refused to take part and why, the sets whose sums were applied, and how the run ended."""
        self.runs += 1
        w = self.world
        job = jobs.create(self.folder / f"run-{self.runs}", PLAN, w.roster, w.server, documents=w.documents())
        self.job = job

        @contextmanager
        def resolve(context):
            yield self.sites[int(context.node_config["partition-id"])]

        server, strategy = server_app(job)
        run_inprocess(server, client_app(resolve), w.sites, lambda _: {})
        refused = [(r.body["site"], r.body["code"]) for r in job.journal.of_kind("site.refused")]
        return refused, [r.body["members"] for r in job.journal.of_kind("round.applied")], strategy.status

    def spent(self, i: int = FIRST) -> int:
        return sum(r.body["session"] == self.job.session for r in self.sites[i].ledger.journal.of_kind("spend"))


@pytest.fixture
def four(tmp_path):
    made = Four(tmp_path)
    assert made.run() == ([], [made.world.sites] * 2, "COMPLETED")
    yield made
    for site in made.sites:
        site.ledger.close()


# -- forged copies -----------------------------------------------------------------------------------------------------


def later(four: Four, victim: Site) -> Copy:
    return Copy(Head(10**6, "ab" * 32), victim.ledger.journal.rows[0].hash, victim.data_set)


FORGERIES: dict[str, Callable[[Four, Site], Copy]] = {
    "without a signature": later,
    "signed by the accuser": lambda f, v: later(f, v).by(v.id, f.world.keys[3]),
    "signed in the accuser's name": lambda f, v: later(f, v).by(f.world.sites[3], f.world.keys[3]),
    "a true signature under another number of rows": lambda f, v: v.head._replace(head=Head(10**6, v.head.head.hash)),
    "a true signature under another hash": lambda f, v: v.head._replace(head=Head(v.head.head.rows, "ab" * 32)),
    "a true signature under another ledger": lambda f, v: v.head._replace(ledger="cd" * 32),
    "a true signature under another data set": lambda f, v: v.head._replace(ledger="cd" * 32, data_set="ef" * 32),
    "a signed row instead of a signed head": lambda f, v: later(f, v)._replace(
        signature=v.ledger.journal.rows[-1].sig
    ),
}  # fmt: skip


def statements(four: Four, forge: Callable[[Four, Site], Copy]) -> tuple[str, dict[SiteId, Any]]:
    session = secrets.token_hex(32)
    header = {"kind": "join", "session": session, "plan": PLAN.to_json(), "roster_hash": four.world.roster.hash,
              "contract_hash": "0" * 64}  # fmt: skip
    joins = {s.id: line.join(s, Packet(header)).header["statement"] for s in four.sites}
    evil = joins[four.sites[3].id]["payload"]
    evil["peers"] = {v.id: [forge(four, v).to_json()] for v in four.sites[:3]}
    joins[four.sites[3].id] = identity.signed(four.world.keys[3], JOIN, evil)
    return session, joins


@pytest.mark.parametrize("how", FORGERIES)
def test_made_up_copies_make_no_honest_site_refuse(four, how) -> None:
    session, joins = statements(four, FORGERIES[how])
    for site in four.sites[:3]:
        line.begin(site, Packet({"kind": "begin", "session": session, "joins": joins}))
        assert site.session(session).begun
        assert not site.session(session).barred
    with pytest.raises(
        ProtocolError, match=f"statement of '{four.world.sites[3]}' is malformed.*'{four.world.sites[0]}'"
    ):
        check_copies(joins[four.world.sites[3]], four.world.sites[3], four.world.roster)
    told = heads_in(joins, four.world.roster)
    assert told[four.world.sites[3]].copies == dict.fromkeys(four.world.sites[:3], {})


def test_a_server_does_not_take_such_a_statement(four, monkeypatch) -> None:
    """By its name, before anybody was charged."""
    evil = four.sites[3].peers
    monkeypatch.setattr(evil, "copies", lambda: {v.id: [later(four, v).to_json()] for v in four.sites[:3]})
    monkeypatch.setattr("fedveil.client.egress.forms.check_copies", lambda *_: None)  # its program is another one
    with pytest.raises(ProtocolError, match=f"statement of '{four.world.sites[3]}' is malformed"):
        four.run()
    assert [four.spent(i) for i in range(4)] == [0] * 4


def test_the_broken_version_is_stopped_by_one_member(four, monkeypatch) -> None:
    """The control: where a copy is believed without its owner's signature, every honest site refuses."""
    session, joins = statements(four, later)
    monkeypatch.setattr("fedveil.privacy.joining.genuine", lambda *_: True)
    for site in four.sites[:3]:
        with pytest.raises(HelperRefusal, match="back in time"):
            line.begin(site, Packet({"kind": "begin", "session": session, "joins": joins}))


# -- a ledger that was deleted ----------------------------------------------------------------------------------------


def out(four: Four) -> tuple[list[tuple[str, str]], list[list[SiteId]], str]:
    first, *others = four.world.sites
    return [(first, "FreshLedger")], [others] * 2, "COMPLETED"


def test_a_deleted_ledger_is_no_new_budget_and_the_others_go_on(four) -> None:
    four.replace(lambda ledger: ledger.unlink())
    for _ in range(2):  # it is not forgotten by a run in which the site refused
        refused, sets, status = four.run()
        assert (refused, sets, status) == out(four)
        assert four.spent() == 0


def test_the_server_leaves_out_a_site_whose_program_does_not_refuse(four, monkeypatch) -> None:
    check = witness.check_own
    monkeypatch.setattr(
        witness, "check_own", lambda site, *a: None if site == four.world.sites[FIRST] else check(site, *a)
    )
    four.replace(lambda ledger: ledger.unlink())
    assert four.run() == out(four)
    assert four.spent() == 0


def test_peers_open_no_sum_with_it_though_site_and_server_are_one(four, monkeypatch) -> None:
    check = witness.check_own
    monkeypatch.setattr(
        witness, "check_own", lambda site, *a: None if site == four.world.sites[FIRST] else check(site, *a)
    )
    monkeypatch.setattr(admission, "_leave_out", lambda *_: None)
    four.replace(lambda ledger: ledger.unlink())
    refused, sets, _ = four.run()
    assert (sets, {code for _, code in refused}) == ([], {"FreshLedger"})


def test_a_peer_remembers_by_itself(four, monkeypatch) -> None:
    """Where no statement has room for the copy, the peers' own memory is enough."""
    monkeypatch.setattr(PeerHeads, "copies", lambda _: {})
    four.replace(lambda ledger: ledger.unlink())
    refused, sets, _ = four.run()
    assert (sets, {code for _, code in refused}) == ([], {"FreshLedger"})


def test_restored_from_the_folder_of_the_last_run_it_takes_part_again(four) -> None:
    kept = four.folder / "run-1" / "journals" / f"{four.world.sites[FIRST]}.jsonl"
    four.replace(lambda ledger: shutil.copy(kept, ledger))
    assert four.run() == ([], [four.world.sites] * 2, "COMPLETED")


def test_a_new_ledger_that_counts_the_old_one_takes_part(four, tmp_path) -> None:
    kept = tmp_path / "old.jsonl"
    four.replace(lambda ledger: shutil.move(ledger, kept))
    site = four.sites[FIRST]
    site.ledger.take_over(kept, site.key)
    assert four.run() == ([], [four.world.sites] * 2, "COMPLETED")
    assert len(site.ledger.tally.events) == 4, "two rounds of each run"


def test_an_import_of_a_copy_from_before_the_last_known_row_does_not_do(four, tmp_path) -> None:
    backup = tmp_path / "backup.jsonl"
    shutil.copy(four.ledger(), backup)
    assert four.run() == ([], [four.world.sites] * 2, "COMPLETED")
    four.replace(lambda ledger: ledger.unlink())
    site = four.sites[FIRST]
    site.ledger.adopt(parse(backup.read_bytes()), identity.public_hex(site.key))
    assert four.run() == out(four)


def test_what_an_import_carries_along_is_covered_up_to_the_same_row(four, tmp_path) -> None:
    """Two imports, one after the other, and the peers have met the oldest ledger only."""
    oldest, middle = tmp_path / "oldest.jsonl", tmp_path / "middle.jsonl"
    rows = len(four.sites[FIRST].ledger.journal.rows)
    four.replace(lambda ledger: shutil.move(ledger, oldest))
    four.sites[FIRST].ledger.take_over(oldest, four.sites[FIRST].key)
    four.replace(lambda ledger: shutil.move(ledger, middle), cap=21.0)  # else its first row may be the same
    site = four.sites[FIRST]
    site.ledger.take_over(middle, site.key)
    first = parse(oldest.read_bytes())[0].hash
    assert site.ledger.tally.covers[first] == rows + 1, "the row that closed it, too"
    assert four.run() == ([], [four.world.sites] * 2, "COMPLETED")


def test_another_data_set_has_a_ledger_of_its_own(four, monkeypatch) -> None:
    monkeypatch.setattr(virtual_sites, "LINEAGE", "another data set")
    for site in four.sites:
        site.ledger.close()
    four.folder = four.folder / "other"
    for i in range(4):
        four.folder.mkdir(exist_ok=True)
        shutil.copy(four.folder.parent / f"peers-{i}.json", four.folder)
    four.sites = [four.open(i) for i in range(4)]
    assert four.run() == ([], [four.world.sites] * 2, "COMPLETED")


# -- what a contribution says ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [
    lambda head, key: head._replace(head=Head(head.head.rows + 1, head.head.hash)),
    lambda head, key: head._replace(signature=""),
    lambda head, key: head.by("site-0002", key),
], ids=["another number", "none", "another name"])  # fmt: skip
def test_a_contribution_whose_head_its_site_has_not_signed_is_not_taken(four, monkeypatch, change) -> None:
    head = Site.head.fget
    assert head is not None
    first, *others = four.world.sites
    monkeypatch.setattr(Site, "head", property(lambda s: change(head(s), s.key) if s.id == first else head(s)))
    monkeypatch.setattr("fedveil.client.egress.forms._own_head", lambda *_: True)
    refused, sets, status = four.run()
    assert (sets, status) == ([others] * 2, "COMPLETED")
    assert {s for s, _ in refused} == {first}


def test_a_contribution_from_another_ledger_than_the_one_it_joined_with(four, monkeypatch) -> None:
    head = Site.head.fget
    assert head is not None
    first = four.world.sites[FIRST]
    other = lambda h, key: h._replace(ledger=secrets.token_hex(32)).by(first, key)  # noqa: E731
    monkeypatch.setattr(Site, "head", property(lambda s: other(head(s), s.key) if s.id == first else head(s)))
    monkeypatch.setattr("fedveil.client.egress.forms._own_head", lambda *_: True)
    refused, sets, _ = four.run()
    assert (sets, {code for s, code in refused if s != first}) == ([], {"FreshLedger"})


def test_a_statement_about_another_data_set(four, monkeypatch) -> None:
    first = four.world.sites[FIRST]
    mine = Site.data_set.fget
    assert mine is not None
    monkeypatch.setattr(Site, "data_set", property(lambda s: "9" * 64 if s.id == first else mine(s)))
    assert four.run() == out(four)
    assert four.spent() == 0


# -- what was signed is written down ---------------------------------------------------------------------------------


def test_every_site_notes_the_set_that_it_signs_before_the_signature_leaves(four, monkeypatch) -> None:
    for site in four.sites:
        rows = list(site.ledger.journal.of_kind("agreed"))
        assert [r.body["round"] for r in rows] == [1, 2]
        assert rows[0].body["digest"] != rows[1].body["digest"]
    assert len({tuple(r.body["digest"] for r in s.ledger.journal.of_kind("agreed")) for s in four.sites}) == 1
    monkeypatch.setattr(witness, "note_agreed", lambda *_: None)
    refused, sets, _ = four.run()
    assert (sets, {code for _, code in refused}) == ([], {"PolicyRefusal"}), "the gate lets no unwritten one out"


def test_a_second_set_of_a_round_is_never_written(four) -> None:
    ledger, session = four.sites[0].ledger, four.job.session
    names = [SiteId(s) for s in four.world.sites]
    digest = next(r.body["digest"] for r in ledger.journal.of_kind("agreed"))
    before = ledger.head
    witness.note_agreed(ledger, session, 1, names, digest)
    assert ledger.head == before
    for said in ((names[1:], digest), (names, "a" * 64)):
        with pytest.raises(VerificationError, match="another set"):
            witness.note_agreed(ledger, session, 1, *said)
    assert ledger.head == before


def test_a_ledger_dated_in_the_future_joins_no_run(four) -> None:
    site = four.sites[0]
    site.ledger.journal._clock = lambda: site.ledger.journal.rows[-1].at - 90_000.0
    with pytest.raises(JournalError, match="more than a day ahead"):
        witness.told(site.ledger, site.data_set, site.peers)
    site.ledger.journal._clock = lambda: site.ledger.journal.rows[-1].at - 80_000.0
    witness.told(site.ledger, site.data_set, site.peers)


# -- a ledger that is lost for good ----------------------------------------------------------------------------------


def test_a_lost_ledger_is_charged_at_its_cap_and_a_higher_one_lets_the_site_go_on(four, caplog) -> None:
    """The charge needs a head that a peer holds. Under the old cap nothing is left; the peers tell what they see."""
    first = four.world.sites[FIRST]
    four.replace(lambda ledger: ledger.unlink(), cap=20.5)
    assert four.run() == out(four)
    site = four.sites[FIRST]
    [known] = four.sites[1].peers.of(first)
    site.ledger.charge_lost(known, first, identity.public_hex(site.key), Epsilon(20.5), Delta(PLAN.delta))
    assert site.ledger.affords(PLAN.event) == 0
    with pytest.raises(BudgetExhausted):
        four.run()
    site.ledger.close()
    four.sites[FIRST] = four.open(FIRST, cap=30.0)
    caplog.clear()
    assert four.run() == ([], [four.world.sites] * 2, "COMPLETED")
    assert f"{first} has lost its ledger {known.ledger[:16]}...: it counts that one as having spent its" in caplog.text
    assert four.sites[FIRST].ledger.tally.epsilon > 20.5


def test_a_later_head_of_the_lost_ledger_is_covered_too(four) -> None:
    first = four.world.sites[FIRST]
    [early] = four.sites[1].peers.of(first)
    assert four.run() == ([], [four.world.sites] * 2, "COMPLETED")
    [known] = four.sites[1].peers.of(first)
    assert known.head.rows > early.head.rows
    four.replace(lambda ledger: ledger.unlink())
    site = four.sites[FIRST]
    site.ledger.charge_lost(early, first, identity.public_hex(site.key), Epsilon(20.0), Delta(PLAN.delta))
    site.ledger.close()
    four.sites[FIRST] = four.open(FIRST, cap=30.0)
    assert four.run() == ([], [four.world.sites] * 2, "COMPLETED")
