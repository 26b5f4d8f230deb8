"""Sums that the server opens and cannot read."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fedveil.common.errors import ProtocolError, SecureSumError, UnverifiedOpening, WireError
from fedveil.common.wire import Packet, sha256
from fedveil.privacy.secagg import lattice, shamir
from fedveil.privacy.secagg.keysum_common import sign_header
from fedveil.privacy.secagg.keysum_opening import Opening
from fedveil.privacy.secagg.params import N, Q
from fedveil.privacy.secagg.store import DirectoryStore, MemoryStore


@pytest.fixture
def blind(session):
    return lambda n=4, **more: session("keysum", n, reveal_to="sites", **more)


def test_every_site_reads_the_blinded_sum_and_the_server_does_not(blind):
    s = blind(length=30_000, bound=1447)
    rows = np.arange(120_000).reshape(4, -1) % 701 - 350
    s.sum(1, dict(zip(s.names, rows, strict=True)))
    packet = s.server.opened()
    for name in s.names:
        values, members = s.site(name).opened(packet)
        assert np.array_equal(values, rows.sum(0))
        assert members == tuple(s.names)
    with pytest.raises(SecureSumError, match="sites only"):
        s.server.result()


def test_what_the_server_holds_is_uniform_also_for_a_sum_of_zeros(blind):
    s = blind(length=16 * 4 * N, bound=1447)
    s.sum(1, dict.fromkeys(s.names, np.zeros(s.spec.length, np.int64)))
    held = lattice.from_bytes(Opening.parse(s.spec, s.server.opened()).phases).reshape(-1)
    counts = np.bincount((held.astype(np.float64) * 64 / Q).astype(int), minlength=64)
    expected = held.size / 64
    assert float(((counts - expected) ** 2 / expected).sum()) < 63 + 8 * math.sqrt(2 * 63)
    # Neighbours share nothing: a scalar blinding would leave differences small.
    difference = np.abs(np.diff(held.astype(np.float64)))
    assert np.median(difference) > Q / 8


def test_drop_outs_are_left_out_of_the_blinding(blind):
    s = blind(5, length=10)
    for round, members in enumerate(([0, 1], [1, 3, 4], [0, 2]), 1):
        chosen = [s.names[i] for i in members]
        got, opened = s.sum(round, {n: np.full(10, 3) for n in chosen})
        assert got.tolist() == [3 * len(chosen)] * 10
        assert opened == tuple(chosen)


def test_blindings_differ_by_session_round_nonce_and_site_and_are_the_same_at_every_site(blind):
    s = blind(3)
    group = s.site(s.names[0])._group
    labels = [(x, r, n, site) for x in ("a", "b") for r in (1, 2) for n in ("n", "m") for site in s.names[:2]]
    heads = {group.stream(*label).take(1)[0, :4].tobytes() for label in labels}
    assert len(heads) == len(labels)
    other = s.site(s.names[2])._group
    assert np.array_equal(group.stream(*labels[0]).take(1), other.stream(*labels[0]).take(1))


def test_the_group_key_is_sealed_for_every_site_and_gone_after_the_session(blind, tmp_path):
    names = [f"site-{i}" for i in range(3)]
    stores = {n: DirectoryStore(tmp_path / n) for n in names}
    s = blind(3, stores=stores, restart=True, length=4)
    got, _ = s.sum(1, dict.fromkeys(s.names, np.arange(4)))
    assert got.tolist() == [0, 3, 6, 9]
    keys = {p.read_bytes() for p in tmp_path.rglob("*-group")}
    assert len(keys) == 1
    boxes = s.site(s.names[0]).begin({n: {"x25519": k} for n, k in s.site(s.names[0])._joined().keys.items()})
    assert keys.pop() not in boxes.buffers["boxes"]
    for n in s.names:
        s.site(n).end()
    assert not list(tmp_path.rglob("*-group"))


def test_a_site_without_the_group_key_neither_contributes_nor_reads(blind):
    s = blind(3, length=4)
    s.sum(1, dict.fromkeys(s.names, np.arange(4)))
    s.stores[s.names[1]].erase(f"{s.spec.session}-1-group")
    for act in (
        lambda: s.site(s.names[1]).contribute(2, "n", np.arange(4)),
        lambda: s.site(s.names[1]).opened(s.server.opened()),
    ):
        with pytest.raises(SecureSumError, match="no group key"):
            act()


def test_a_dealt_key_that_is_not_the_lead_sites_or_comes_unasked_is_refused(blind, session):
    s = blind(3, length=4)
    header = {"kind": "keysum/group", "session": s.spec.session, "round": 0}
    box = s.site(s.names[1])._session.seal(s.names[2], ["keysum/group"], bytes(32))
    with pytest.raises(SecureSumError, match="does not open"):
        s.site(s.names[2]).receive(Packet(header, {"box": box}))
    lead = s.site(s.names[0])._session.seal(s.names[2], ["keysum/group"], bytes(32))
    with pytest.raises(SecureSumError, match="other bytes"):
        s.site(s.names[2]).receive(Packet(header, {"box": lead}))
    for bad in (b"", lead[:-1], lead + b"\0"):
        with pytest.raises(ProtocolError):
            s.site(s.names[2]).receive(Packet(header, {"box": bad}))
    plain = session("keysum", 3)
    for site in (s.site(s.names[0]), plain.site(plain.names[1])):
        with pytest.raises(SecureSumError, match="did not expect"):
            site.receive(Packet(header, {"box": lead}))


def test_a_blinded_sum_that_was_changed_or_wrongly_labelled_is_refused(blind):
    s = blind(4, length=5, min_members=3)
    s.sum(1, dict.fromkeys(s.names, np.arange(5)))
    packet = s.server.opened()
    site, h = s.site(s.names[0]), packet.header
    data = packet.buffers["opening"]
    flipped = data[:5] + bytes([data[5] ^ 64]) + data[6:]
    for bad in (
        Packet(h, {"opening": flipped}),
        Packet(h, {"opening": data[:-7]}),
        Packet({**h, "members": h["members"][:-1]}, packet.buffers),
        Packet({**h, "members": h["members"][:2]}, packet.buffers),
        Packet({**h, "helpers": h["helpers"][:-1]}, packet.buffers),
        Packet({**h, "sum": "0" * 64}, packet.buffers),
        Packet({**h, "round": 2}, packet.buffers),
        Packet({**h, "nonce": "m"}, packet.buffers),
        Packet({**h, "kind": "keysum/members"}, packet.buffers),
        Packet(h),
    ):
        with pytest.raises(ProtocolError):
            site.opened(bad)
    assert site.opened(packet)[0].tolist() == [0, 4, 8, 12, 16]


@pytest.mark.parametrize("seen_by", ["server", "site"])
def test_a_wrong_answer_among_exactly_enough_is_seen_by_the_server_or_by_the_sites(blind, seen_by):
    """It can be tuned so that the key stays small; then the errors, which only sites see, give it away."""
    s = blind(3, length=5)
    s.collect(1, dict.fromkeys(s.names, np.arange(5)))
    helpers = s.names[:2]
    # Interpolating at zero from the points 1 and 2 gives weights 2 and -1.
    shift = 30_000 if seen_by == "server" else 1
    for n, packet in s.answers(helpers).items():
        if n == helpers[1]:
            wrong = np.frombuffer(packet.buffers["answer"], "<u2").astype(np.int64)
            wrong[9] = (wrong[9] + shift) % shamir.P
            data = wrong.astype("<u2").tobytes()
            header = {k: v for k, v in packet.header.items() if k != "signature"} | {"answer": sha256(data)}
            packet = Packet(sign_header(s.site(n)._signing_key, header), {"answer": data})
        s.server.add_answer(n, packet)
    if seen_by == "server":
        with pytest.raises(SecureSumError, match="wrong"):
            s.server.fingerprint_requests()
    else:
        s.vouch()
        packet = s.server.opened()
        for n in s.names:
            with pytest.raises(UnverifiedOpening, match="honest sites"):
                s.site(n).opened(packet)


def test_the_deal_is_checked_by_the_server_and_only_keysum_can_blind(blind, session):
    s = blind(3)
    joins = {n: s.site(n).join_fields() for n in s.names}
    replies = {n: s.site(n).begin(joins) for n in s.names}
    lead = s.names[0]
    for bad in (
        {n: p for n, p in replies.items() if n != lead},
        {**replies, lead: Packet({"kind": "sum/ready"})},
        {**replies, lead: Packet(replies[lead].header, {"boxes": b"x"})},
    ):
        with pytest.raises(ProtocolError):
            s.server.begin(joins, bad)
    for protocol, reveal_to in (("sharedkey", "sites"), ("plain", "sites"), ("keysum", "nobody")):
        with pytest.raises(SecureSumError, match="reveal"):
            session(protocol, 3, reveal_to=reveal_to)
    plain = session("keysum", 3)
    plain.sum(1, dict.fromkeys(plain.names, np.zeros(10, np.int64)))
    with pytest.raises(WireError, match="'keysum/opened' was expected"):
        plain.site(lead).opened(Packet({"kind": "sum/opened"}))
    assert isinstance(plain.stores[lead], MemoryStore)
