"""However many sites there are, their statements fit into the message that begins a run, and miss nobody."""

from __future__ import annotations

from collections import Counter
from functools import cache
from hashlib import sha256
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedveil.client.peers import PeerHeads
from fedveil.common import canonical, flwr_adapter, identity
from fedveil.common.errors import HelperRefusal
from fedveil.common.identity import Member, Roster
from fedveil.common.journal import Copy, Head
from fedveil.common.units import SiteId
from fedveil.common.wire import Limits, Packet
from fedveil.privacy.joining import JOIN, MAX_IMPORTS, MAX_LEDGERS, heads_in, heads_of, seen_of, share
from fedveil.privacy.secagg.rollback import check_head

KEY = identity.new_signing_key()
SIGNER, SERVER = identity.public_hex(KEY), identity.public_hex(identity.new_signing_key())


def roster_of(n: int, length: int = 12) -> Roster:
    names = (SiteId(f"{i:0{length}d}") for i in range(n))
    members = (Member(s, identity.public_hex(key_of(s))) for s in names)
    return Roster("many", Member(identity.SERVER, SERVER), tuple(members))


def key_of(site: str) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(sha256(site.encode()).digest())


@cache
def head(site: str, rows: int, rank: int) -> Copy:
    """Of a site's ledger number ``rank``; the last one moved last."""
    return Copy(Head(rows, f"{rows:064x}"), f"{rank:064x}", f"{rank:064x}").by(site, key_of(site))


def remembered(roster: Roster, own: SiteId, ledgers: int) -> PeerHeads:
    peers = PeerHeads(roster=roster)
    for rank in range(ledgers):
        peers.keep({m.site: head(m.site, 1 << 21, rank) for m in roster.sites if m.site != own})
    return peers


def statement(roster: Roster, own: SiteId, peers: PeerHeads, rows: int = 1 << 21, rank: int = 0) -> dict[str, Any]:
    """A statement as long as one can be."""
    hashes = dict.fromkeys(("session", "plan_hash", "roster_hash", "contract_hash"), "a" * 64)
    mine = head(own, rows, rank)
    at = {"head": list(mine.head), "ledger": mine.ledger, "data_set": mine.data_set, "head_signature": mine.signature}
    at["imports"] = [["a" * 64, 1 << 21]] * MAX_IMPORTS
    payload = {"v": 1, **hashes, "site": own, "fields": {"x25519": "a" * 64}, **at, "peers": peers.copies()}
    return {"payload": payload, "signer": SIGNER, "signature": "a" * 128}


@pytest.mark.parametrize(("n", "ledgers"), [(40, 4), (60, 4), (120, 2), (120, 4), (200, 1), (200, 4)])
def test_a_run_of_many_sites_can_begin(n, ledgers):
    roster = roster_of(n)
    sites = [m.site for m in roster.sites]
    joins = {s: statement(roster, s, remembered(roster, s, ledgers)) for s in sites}
    begin = {"kind": "begin", "session": "a" * 64, "joins": joins}
    size = len(canonical.dumps(begin))
    flwr_adapter.to_record(Packet(begin))  # within the limit of a header
    assert size <= Limits.header * 3 // 4 + 200
    # no byte is left unused where there is something to say
    carried = sum(len(e) for d in joins.values() for e in d["payload"]["peers"].values())
    assert carried == n * (n - 1) * ledgers or size > Limits.header * 0.7
    # the newest ledger of everybody comes before the second newest of anybody
    for s in sites:
        copies = heads_of(joins[s]["payload"]["peers"])
        lengths = {len(copies.get(o, {})) for o in sites if o != s}
        assert max(lengths) - min(lengths) <= 1
        for by in copies.values():
            assert list(by) == [f"{rank:064x}" for rank in range(ledgers - len(by), ledgers)]
    # every site's newest ledger is known to several; each copy is its owner's word, so one is enough
    seen = Counter(o for d in joins.values() for o in d["payload"]["peers"])
    assert min(seen[s] for s in sites) >= min(n - 1, 10)


def test_names_of_any_length_and_consortia_of_any_size():
    for n in (4, 90, 400, 1000, 4000):
        roster = roster_of(n, 64)
        own = roster.sites[0].site
        size = len(canonical.dumps({own: statement(roster, own, remembered(roster, own, MAX_LEDGERS))}))
        assert size * n <= max(Limits.header * 3 // 4, 2176 * n)
    assert share(4096) == 0


@pytest.mark.parametrize("rank", [0, MAX_LEDGERS - 1], ids=["an older ledger", "the newest"])
@pytest.mark.parametrize("n", [40, 200])
def test_a_restored_site_finds_its_later_head_among_those_that_are_carried(n, rank):
    """At 40 sites every ledger is carried. At 200 the newest one of each is, by many."""
    roster = roster_of(n)
    back, *others = [m.site for m in roster.sites]
    joins = {s: statement(roster, s, remembered(roster, s, MAX_LEDGERS)) for s in others}
    for rows in (1 << 20, 1 << 21):
        joins[back] = statement(roster, back, PeerHeads(), rows, rank)
        told = heads_in(joins, roster)
        own, ledger = told[back].own.head, told[back].own.ledger
        copies = {s: copy.head for s, copy in seen_of(told, back) if copy.ledger == ledger}
        assert len(copies) >= 10 or (n, rank) == (200, 0)
        if not copies:
            return  # what is then left is the comparison in every round
        if rows == 1 << 21:
            check_head(own, copies, need=1, hash_at=lambda r: f"{r:064x}")
        else:
            with pytest.raises(HelperRefusal, match="back in time"):
                check_head(own, copies, need=1, hash_at=lambda r: f"{r:064x}")


def test_what_is_carried_changes_with_every_run_and_not_within_a_statement():
    roster = roster_of(200)
    sites = [m.site for m in roster.sites]
    one, other = remembered(roster, sites[0], 1), remembered(roster, sites[0], 1)
    assert one.copies() == one.copies(), "the egress gate compares"
    assert set(one.copies()) != set(other.copies()), "no two sites choose alike"
    covered, before = set[str](), None
    for rows in range(1, 120):
        carried = set(one.copies())
        assert carried != before
        covered, before = covered | carried, carried
        one.keep({sites[1]: head(sites[1], (1 << 21) + rows, 0)})  # a run: journals have moved
    assert covered == set(sites[1:])


def test_who_has_left_is_remembered_and_not_carried(tmp_path):
    roster, gone = roster_of(4), SiteId("gone")
    first, second = (m.site for m in roster.sites[:2])
    peers = PeerHeads(tmp_path / "peers.json", roster)
    peers.keep({first: head(first, 3, 0), gone: head(gone, 7, 0)})
    for again in (peers, PeerHeads(tmp_path / "peers.json", roster)):
        assert set(again.copies()) == {first}
        with pytest.raises(HelperRefusal, match="back in time"):
            again.follow({gone: head(gone, 6, 0)})
    assert set(canonical.loads((tmp_path / "peers.json").read_bytes())) == {first, gone}
    peers.keep({second: head(second, 1, 0)})
    assert set(PeerHeads(tmp_path / "peers.json").copies()) == {first, second, gone}


def test_everything_is_kept_on_disk_whatever_is_carried(tmp_path):
    roster = roster_of(200)
    peers = PeerHeads(tmp_path / "peers.json", roster)
    for rank in range(MAX_LEDGERS):
        peers.keep({m.site: head(m.site, 5, rank) for m in roster.sites})
    assert len(peers.copies()) < 200
    again = PeerHeads(tmp_path / "peers.json", roster)
    for rank in range(MAX_LEDGERS):
        for m in roster.sites:
            with pytest.raises(HelperRefusal, match="back in time"):
                again.follow({m.site: head(m.site, 4, rank)})


def test_a_signed_statement_is_as_long_as_was_reckoned():
    roster = roster_of(4)
    own = roster.sites[0].site
    built = statement(roster, own, PeerHeads())
    signed = identity.signed(KEY, JOIN, built["payload"])
    assert len(canonical.dumps(signed)) == len(canonical.dumps(built))
