"""A server that deviates: what a site refuses to sign or to open, whatever order the requests come in."""

from __future__ import annotations

import secrets
from typing import Any

import numpy as np
import pytest

from fedveil.common import canonical, flwr_adapter, identity
from fedveil.common.errors import HelperRefusal, SecureSumError, WireError
from fedveil.common.identity import SERVER, Member, Roster, new_signing_key, public_hex
from fedveil.common.units import SiteId
from fedveil.common.wire import Limits, Packet
from fedveil.privacy.secagg import keysum_common as messages
from fedveil.privacy.secagg.interface import SumSpec
from fedveil.privacy.secagg.keysum_server import KeysumServer
from fedveil.privacy.secagg.keysum_site import KeysumSite
from fedveil.privacy.secagg.store import MemoryStore

N_SITES = 5
NAMES = [SiteId(f"s{i}") for i in range(N_SITES)]
KEYS = {name: new_signing_key() for name in NAMES}
ROSTER = Roster(
    "hostile", Member(SERVER, public_hex(new_signing_key())), tuple(Member(n, public_hex(KEYS[n])) for n in NAMES)
)


class World:
    """Five sites (T = 4, at least 3 members) and a server, joined; a round is contributed to by all."""

    def __init__(self) -> None:
        self.spec = SumSpec("keysum", secrets.token_hex(32), "b" * 64, ROSTER, 4, 3, 6, 1000, 10)
        self.stores = {n: MemoryStore() for n in NAMES}
        self.sites = {n: KeysumSite(self.spec, n, KEYS[n], self.stores[n]) for n in NAMES}
        self.server = KeysumServer(self.spec)
        joins = {n: s.join_fields() for n, s in self.sites.items()}
        self.server.begin(joins, {n: s.begin(joins) for n, s in self.sites.items()})

    def contribute(self, round: int = 1, names=NAMES) -> dict[SiteId, Packet]:
        self.server.start_round(round, "n")
        packets = {n: self.sites[n].contribute(round, "n", np.arange(6)) for n in names}
        for n, p in packets.items():
            self.server.add(n, p)
        return packets

    def agree(self, request: Packet | None = None) -> dict[SiteId, Packet]:
        requests = self.server.agree_requests()
        return {n: self.sites[n].agree(request or requests[n]) for n in NAMES}

    def opened(self, round: int = 1) -> dict[SiteId, Packet]:
        """Requests to open an honest round, all sites having agreed."""
        self.contribute(round)
        for n, p in self.agree().items():
            self.server.add_agreement(n, p)
        return self.server.open_requests()


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture(params=["made here", "read from bytes"], autouse=True)
def read(request, monkeypatch):
    """Requests as they come from the wire too: what was read from the same bytes is not verified a second time."""
    if request.param == "made here":
        return

    def of(packet: Packet) -> Packet:
        try:
            return flwr_adapter.from_record(flwr_adapter.to_record(packet), Limits())
        except WireError:  # nothing that the wire would carry
            return packet

    for name in ("agree", "open"):
        honest = getattr(KeysumSite, name)
        monkeypatch.setattr(KeysumSite, name, lambda site, packet, *a, honest=honest: honest(site, of(packet), *a))


def changed(packet: Packet, **fields: Any) -> Packet:
    return Packet({**packet.header, **fields}, packet.buffers)


# ---- agreement


def test_an_honest_announcement_is_signed_and_signed_alike_again(world):
    world.contribute()
    request = world.server.agree_requests()[NAMES[0]]
    assert world.sites[NAMES[0]].agree(request) == world.sites[NAMES[0]].agree(request)


def test_a_second_set_of_members_in_one_round_is_refused_even_after_a_restart(world):
    world.contribute()
    request = world.server.agree_requests()[NAMES[0]]
    fewer = changed(request, members=request.header["members"][:-1])
    site = world.sites[NAMES[0]]
    site.agree(request)
    for helper in (site, KeysumSite(world.spec, NAMES[0], KEYS[NAMES[0]], world.stores[NAMES[0]])):
        with pytest.raises(HelperRefusal, match="other members"):
            helper.agree(fewer)
        helper.agree(request)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_fewer_members_than_the_minimum_are_refused(world, count):
    world.contribute()
    request = world.server.agree_requests()[NAMES[0]]
    with pytest.raises(HelperRefusal, match="fewer"):
        world.sites[NAMES[0]].agree(changed(request, members=request.header["members"][:count]))


def test_members_announced_twice_or_out_of_order_are_refused(world):
    world.contribute()
    request = world.server.agree_requests()[NAMES[4]]
    a, b, c, *_ = request.header["members"]
    for members in ([a, a, b], [a, b, b], [c, b, a]):
        with pytest.raises(HelperRefusal, match="twice"):
            world.sites[NAMES[4]].agree(changed(request, members=members))


@pytest.mark.parametrize("field", ["round", "nonce", "site", "session", "plan_hash", "roster_hash", "joins"])
def test_an_altered_header_is_refused_field_by_field(world, field):
    world.contribute()
    request = world.server.agree_requests()[NAMES[4]]
    first, *others = request.header["members"]
    other = {"round": 2, "nonce": "m", "site": "s1"}.get(field, "c" * 64)
    with pytest.raises(HelperRefusal):
        world.sites[NAMES[4]].agree(changed(request, members=[{**first, field: other}, *others]))


@pytest.mark.parametrize("field", ["ciphertext", "shares", "signature"])
def test_altered_hashes_and_signatures_break_the_members_signature(world, field):
    world.contribute()
    request = world.server.agree_requests()[NAMES[4]]
    first, *others = request.header["members"]
    value = first[field]
    forged = ["0" * 64, *value[1:]] if field == "shares" else "0" * len(value)
    with pytest.raises(HelperRefusal, match="signature"):
        world.sites[NAMES[4]].agree(changed(request, members=[{**first, field: forged}, *others]))


@pytest.mark.parametrize(
    "members",
    [None, {}, "x", 5, [1, 2, 3], [None] * 3, [{}] * 3, [[]] * 3, [{"site": []}] * 3, [{"site": "s0"}] * 9],
)
def test_malformed_announcements_are_refused(world, members):
    world.contribute()
    request = world.server.agree_requests()[NAMES[4]]
    with pytest.raises(HelperRefusal):
        world.sites[NAMES[4]].agree(changed(request, members=members))


@pytest.mark.parametrize(
    "fields",
    [
        {"session": "a" * 64},
        {"round": 2},
        {"round": True},
        {"round": "1"},
        {"round": 10**9},
        {"nonce": "m"},
        {"nonce": 1},
    ],
)
def test_an_announcement_for_another_round_or_session_is_refused(world, fields):
    world.contribute()
    request = world.server.agree_requests()[NAMES[4]]
    with pytest.raises(HelperRefusal):
        world.sites[NAMES[4]].agree(changed(request, **fields))


def test_a_header_of_an_earlier_round_is_refused(world):
    old = world.contribute(1)
    world.contribute(2)
    request = world.server.agree_requests()[NAMES[4]]
    members = [old[NAMES[0]].header, *request.header["members"][1:]]
    with pytest.raises(HelperRefusal, match="round"):
        world.sites[NAMES[4]].agree(changed(request, members=members))


def test_a_site_refuses_a_set_that_holds_itself_without_its_contribution(world):
    """The server replays a contribution that the site's key signed, but which this installation never made."""
    world.contribute()
    request = world.server.agree_requests()[NAMES[0]]
    thief = KeysumSite(world.spec, NAMES[0], KEYS[NAMES[0]], MemoryStore())
    thief._session.joins = world.sites[NAMES[0]]._session.joins
    with pytest.raises(HelperRefusal, match="did not make"):
        thief.agree(request)


# ---- opening


def test_an_honest_sum_opens_and_a_repeated_request_gets_the_same_bytes(world):
    requests = world.opened()
    first = {n: world.sites[n].open(requests[n]) for n in NAMES}
    again = KeysumSite(world.spec, NAMES[0], KEYS[NAMES[0]], world.stores[NAMES[0]])
    assert again.open(requests[NAMES[0]]) == first[NAMES[0]]
    for n, p in first.items():
        world.server.add_answer(n, p)
    values, members = world.server.result()
    assert values.tolist() == [0, 5, 10, 15, 20, 25]
    assert members == tuple(NAMES)


def test_fewer_signatures_than_the_threshold_open_nothing(world):
    request = world.opened()[NAMES[0]]
    three = dict(list(request.header["agreements"].items())[:3])
    with pytest.raises(HelperRefusal, match="threshold"):
        world.sites[NAMES[0]].open(changed(request, agreements=three))


def test_forged_and_borrowed_agreements_open_nothing(world):
    request = world.opened()[NAMES[0]]
    good = request.header["agreements"]
    stranger = new_signing_key()
    header = messages.agreement_header(world.spec, 1, NAMES[1], request.header["digest"])
    forged = identity.sign(stranger, "fedveil/agree/1", canonical.dumps(header)).hex()
    other_purpose = identity.sign(KEYS[NAMES[1]], "fedveil/answer/1", canonical.dumps(header)).hex()
    for fourth in (
        {NAMES[1]: forged},
        {NAMES[1]: other_purpose},
        {NAMES[1]: good[NAMES[2]]},
        {NAMES[1]: ""},
        {NAMES[1]: 7},
        {"stranger": forged},
    ):
        agreements = {n: good[n] for n in (NAMES[0], NAMES[2], NAMES[3])} | fourth
        with pytest.raises(HelperRefusal):
            world.sites[NAMES[0]].open(changed(request, agreements=agreements))
    for malformed in (None, [], list(good.items()), "x", {str(i): "0" * 128 for i in range(99)}):
        with pytest.raises(HelperRefusal):
            world.sites[NAMES[0]].open(changed(request, agreements=malformed))


def test_agreements_on_another_set_do_not_open_this_one(world):
    """Two announcements: sites 0-1 see all members, 2-4 see four of them; neither set has T signatures."""
    packets = world.contribute()
    full = world.server.agree_requests()[NAMES[0]]
    fewer = changed(full, members=full.header["members"][:-1])
    signed = {n: world.sites[n].agree(full if n in NAMES[:2] else fewer) for n in NAMES}
    digest = {n: p.header["digest"] for n, p in signed.items()}
    agreements = {n: p.header["signature"] for n, p in signed.items()}
    assert len(set(digest.values())) == 2
    for n in NAMES:
        count = 5 if n in NAMES[:2] else 4
        at = NAMES.index(n) * messages.BOX_BYTES
        shares = b"".join(packets[m].buffers["shares"][at : at + messages.BOX_BYTES] for m in NAMES[:count])
        for claimed in set(digest.values()):
            request = Packet(
                {
                    "kind": messages.OPEN,
                    "session": world.spec.session,
                    "round": 1,
                    "digest": claimed,
                    "agreements": agreements,
                },
                {"shares": shares},
            )
            with pytest.raises(HelperRefusal):
                world.sites[n].open(request)


def test_a_site_that_did_not_agree_does_not_open(world):
    world.contribute()
    for n in NAMES[:4]:
        world.server.add_agreement(n, world.sites[n].agree(world.server.agree_requests()[n]))
    request = world.server.open_requests()[NAMES[0]]
    with pytest.raises(HelperRefusal, match="agreed to no members"):
        world.sites[NAMES[4]].open(request)


def test_altered_swapped_replayed_and_missing_shares_are_refused(world):
    old = world.opened(1)[NAMES[0]].buffers["shares"]
    request = world.opened(2)[NAMES[0]]
    other = world.server.open_requests()[NAMES[1]].buffers["shares"]
    good, box = request.buffers["shares"], messages.BOX_BYTES
    flipped = bytearray(good)
    flipped[100] ^= 1
    for shares in (
        bytes(flipped),
        good[box : 2 * box] + good[:box] + good[2 * box :],
        old,
        other,
        good[:-box],
        good[:-1],
        good + b"\0",
        b"",
    ):
        with pytest.raises(HelperRefusal):
            world.sites[NAMES[0]].open(Packet(request.header, {"shares": shares}))
    with pytest.raises(HelperRefusal):
        world.sites[NAMES[0]].open(Packet(request.header))
    world.sites[NAMES[0]].open(request)


@pytest.mark.parametrize(
    "fields", [{"session": "a" * 64}, {"round": 2}, {"round": None}, {"digest": "0" * 64}, {"digest": None}]
)
def test_a_request_to_open_something_else_is_refused(world, fields):
    request = world.opened()[NAMES[0]]
    with pytest.raises(HelperRefusal):
        world.sites[NAMES[0]].open(changed(request, **fields))


def test_after_the_session_no_request_is_granted_and_recorded_shares_stay_sealed(world):
    requests = world.opened()
    site = world.sites[NAMES[0]]
    site.end()
    again = KeysumSite(world.spec, NAMES[0], KEYS[NAMES[0]], world.stores[NAMES[0]])
    for helper in (site, again):
        with pytest.raises(HelperRefusal):
            helper.open(requests[NAMES[0]])
        with pytest.raises(HelperRefusal):
            helper.agree(world.server.agree_requests()[NAMES[0]])
    assert all("x25519" not in name for name in world.stores[NAMES[0]]._data)


def test_another_set_of_joined_keys_is_refused(world):
    """The server may not swap a peer's key in the middle of a session, nor show two sites different keys."""
    joins = {n: s.join_fields() for n, s in world.sites.items()}
    swapped = {**joins, NAMES[1]: {"x25519": "11" * 32}}
    with pytest.raises(SecureSumError, match="other bytes"):
        world.sites[NAMES[0]].begin(swapped)
    for bad in (
        {**joins, "stranger": {"x25519": "11" * 32}},
        {**joins, NAMES[1]: {}},
        {**joins, NAMES[1]: {"x25519": 5}},
        {**joins, NAMES[1]: joins[NAMES[2]]},
        {**joins, NAMES[0]: {"x25519": "11" * 32}},
        {n: joins[n] for n in NAMES[:3]},
    ):
        with pytest.raises(SecureSumError):
            world.sites[NAMES[0]].begin(bad)


def test_a_degenerate_key_of_a_peer_is_an_error_not_a_known_secret(world):
    other = World()
    site = other.sites[NAMES[0]]
    fresh = KeysumSite(other.spec, NAMES[0], KEYS[NAMES[0]], MemoryStore())
    joins = {n: s.join_fields() for n, s in other.sites.items()} | {NAMES[0]: fresh.join_fields()}
    fresh.begin({**joins, NAMES[1]: {"x25519": "00" * 32}})
    with pytest.raises(identity.IdentityError):
        fresh.contribute(1, "n", np.arange(6))
    assert fresh.replay(1) is None
    assert site is not fresh


def test_requests_never_make_a_site_contribute_a_second_plaintext(world):
    site = world.sites[NAMES[0]]
    first = site.contribute(1, "n", np.arange(6))
    again = KeysumSite(world.spec, NAMES[0], KEYS[NAMES[0]], world.stores[NAMES[0]])
    for helper in (site, again):
        assert helper.contribute(1, "n", np.arange(6) + 1) == first
        for nonce in ("m", "N", "n "):
            with pytest.raises(SecureSumError, match="another nonce"):
                helper.contribute(1, nonce, np.arange(6) + 1)


def test_what_one_site_verified_is_verified_once_and_only_for_the_same_bytes_session_and_members(world, monkeypatch):
    world.contribute()
    request = world.server.agree_requests()[NAMES[0]]
    checked: list[str] = []
    honest = messages.check_contribution
    monkeypatch.setattr(messages, "check_contribution", lambda *a: checked.append("") or honest(*a))
    read = lambda packet: flwr_adapter.from_record(flwr_adapter.to_record(packet), Limits())  # noqa: E731
    for name in NAMES:
        world.sites[name].agree(read(request))
    assert len(checked) == len(NAMES)  # every header once, and not once a site
    forged = [{**h, "signature": "0" * 128} if h["site"] == NAMES[3] else h for h in request.header["members"]]
    with pytest.raises(HelperRefusal, match="signature"):
        world.sites[NAMES[0]].agree(read(changed(request, members=forged)))
    with pytest.raises(HelperRefusal):  # the same bytes in another session, which they were not signed for
        World().sites[NAMES[0]].agree(read(request))
