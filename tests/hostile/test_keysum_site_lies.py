"""Sites that deviate: what the server refuses to add, and wrong shares that show when a sum is opened."""

from __future__ import annotations

import secrets
from typing import Any

import numpy as np
import pytest

from fedveil.common.errors import ProtocolError, SecureSumError
from fedveil.common.identity import SERVER, Member, Roster, new_signing_key, public_hex
from fedveil.common.units import SiteId
from fedveil.common.wire import Packet, sha256
from fedveil.privacy.secagg import keysum_common as messages
from fedveil.privacy.secagg import shamir
from fedveil.privacy.secagg.interface import SumSpec
from fedveil.privacy.secagg.keysum_server import KeysumServer
from fedveil.privacy.secagg.keysum_site import KeysumSite
from fedveil.privacy.secagg.store import MemoryStore

NAMES = [SiteId(f"s{i}") for i in range(5)]
KEYS = {name: new_signing_key() for name in NAMES}
ROSTER = Roster(
    "hostile", Member(SERVER, public_hex(new_signing_key())), tuple(Member(n, public_hex(KEYS[n])) for n in NAMES)
)


class World:
    """Five joined sites, T = 3, and a server in round 1."""

    def __init__(self) -> None:
        self.spec = SumSpec("keysum", secrets.token_hex(32), "b" * 64, ROSTER, 3, 3, 6, 1000, 10)
        self.sites = {n: KeysumSite(self.spec, n, KEYS[n], MemoryStore()) for n in NAMES}
        self.server = KeysumServer(self.spec)
        joins = {n: s.join_fields() for n, s in self.sites.items()}
        self.server.begin(joins, {n: s.begin(joins) for n, s in self.sites.items()})
        self.server.start_round(1, "n")

    def contribution(self, name: SiteId) -> Packet:
        return self.sites[name].contribute(1, "n", np.arange(6))

    def answers(self) -> dict[SiteId, Packet]:
        """Honest answers of all five sites to an honest round."""
        for n in NAMES:
            self.server.add(n, self.contribution(n))
        for n, request in self.server.agree_requests().items():
            self.server.add_agreement(n, self.sites[n].agree(request))
        return {n: self.sites[n].open(request) for n, request in self.server.open_requests().items()}

    def false_answer(self, name: SiteId, answer: Packet, values: np.ndarray) -> Packet:
        data = values.astype("<u2").tobytes()
        return resigned(name, answer, {"answer": sha256(data)}, {"answer": data})


def resigned(name: SiteId, packet: Packet, fields: dict[str, Any], buffers: dict[str, bytes] | None = None) -> Packet:
    """``packet`` changed by the site that signs it."""
    header = {k: v for k, v in packet.header.items() if k != "signature"} | fields
    return Packet(messages.sign_header(KEYS[name], header), buffers or packet.buffers)


@pytest.fixture
def world() -> World:
    return World()


def refused(world: World, name: SiteId, packet: Packet, match: str | None = None) -> None:
    before = world.server.members
    with pytest.raises(ProtocolError, match=match):
        world.server.add(name, packet)
    assert world.server.members == before


# ---- contributions


def test_altered_bytes_are_refused_and_the_sum_is_unharmed(world):
    for n in NAMES[1:]:
        world.server.add(n, world.contribution(n))
    good = world.contribution(NAMES[0])
    for name, data in good.buffers.items():
        for at in (0, len(data) // 2, len(data) - 1):
            altered = bytearray(data)
            altered[at] ^= 1
            refused(
                world, NAMES[0], Packet(good.header, {**good.buffers, name: bytes(altered)}), "not the one it signed"
            )
        for wrong in (b"", data[:-1], data + b"\0", data * 2):
            refused(world, NAMES[0], Packet(good.header, {**good.buffers, name: wrong}), "bytes instead of")
        refused(world, NAMES[0], Packet(good.header, {k: v for k, v in good.buffers.items() if k != name}), "missing")
    world.server.add(NAMES[0], good)
    for n, request in world.server.agree_requests().items():
        world.server.add_agreement(n, world.sites[n].agree(request))
    for n, request in world.server.open_requests().items():
        world.server.add_answer(n, world.sites[n].open(request))
    values, _ = world.server.result()
    assert values.tolist() == [0, 5, 10, 15, 20, 25]


@pytest.mark.parametrize(
    "fields",
    [
        {"round": 2},
        {"round": 1.0},
        {"round": True},
        {"nonce": "m"},
        {"session": "a" * 64},
        {"plan_hash": "a" * 64},
        {"roster_hash": "a" * 64},
        {"joins": "a" * 64},
        {"site": "s1"},
        {"site": "stranger"},
        {"site": None},
        {"ciphertext": "x"},
        {"ciphertext": None},
        {"shares": []},
        {"shares": None},
        {"shares": ["0" * 63] * 5},
        {"shares": [0] * 5},
        {"extra": 1},
    ],
)
def test_a_signed_header_that_says_something_else_is_refused(world, fields):
    refused(world, NAMES[0], resigned(NAMES[0], world.contribution(NAMES[0]), fields))


def test_signatures_missing_foreign_or_for_another_purpose_are_refused(world):
    good = world.contribution(NAMES[0])
    unsigned = {k: v for k, v in good.header.items() if k != "signature"}
    for signature in ("", "0" * 128, None, 5, world.contribution(NAMES[1]).header["signature"]):
        refused(world, NAMES[0], Packet({**unsigned, "signature": signature}, good.buffers))
    refused(world, NAMES[0], Packet(unsigned, good.buffers))
    refused(world, NAMES[0], Packet(messages.sign_header(KEYS[NAMES[1]], unsigned), good.buffers), "signature")


def test_a_site_contributes_once_and_not_in_anothers_name(world):
    good = world.contribution(NAMES[0])
    refused(world, NAMES[1], good, "another site's name")
    world.server.add(NAMES[0], good)
    refused(world, NAMES[0], good, "before")


def test_a_signed_coefficient_outside_the_ring_is_refused(world):
    good = world.contribution(NAMES[0])
    data = b"\xff" * 7 + good.buffers["ciphertext"][7:]
    bad = resigned(NAMES[0], good, {"ciphertext": sha256(data)}, {**good.buffers, "ciphertext": data})
    refused(world, NAMES[0], bad, "outside the ring")


def test_nothing_is_added_once_the_members_are_announced(world):
    for n in NAMES[:3]:
        world.server.add(n, world.contribution(n))
    world.server.agree_requests()
    refused(world, NAMES[3], world.contribution(NAMES[3]), "closed")


def test_rounds_of_the_server_only_go_forward(world):
    for round in (1, 0):
        with pytest.raises(SecureSumError, match="forward"):
            world.server.start_round(round, "x")


# ---- agreements and answers


def test_agreements_that_do_not_hold_are_not_counted(world):
    for n in NAMES:
        world.server.add(n, world.contribution(n))
    with pytest.raises(SecureSumError, match="not announced"):
        world.server.add_agreement(NAMES[0], Packet({"kind": messages.AGREEMENT}))
    requests = world.server.agree_requests()
    good = {n: world.sites[n].agree(requests[n]) for n in NAMES}
    for name, packet in (
        (NAMES[0], good[NAMES[1]]),
        (SiteId("stranger"), good[NAMES[1]]),
        (NAMES[0], resigned(NAMES[0], good[NAMES[0]], {"digest": "0" * 64})),
        (NAMES[0], resigned(NAMES[0], good[NAMES[0]], {"round": 2})),
        (NAMES[0], Packet({**good[NAMES[0]].header, "signature": "0" * 128})),
        (NAMES[0], Packet({"kind": messages.AGREEMENT})),
        (NAMES[0], Packet({})),
    ):
        with pytest.raises(ProtocolError):
            world.server.add_agreement(name, packet)
    for n in NAMES[:2]:
        world.server.add_agreement(n, good[n])
    world.server.add_agreement(NAMES[1], good[NAMES[1]])
    with pytest.raises(SecureSumError, match="2 sites agreed"):
        world.server.open_requests()


def test_answers_that_do_not_hold_are_not_counted(world):
    answers = world.answers()
    good = answers[NAMES[0]]
    large = np.full(4096, 65535)
    for name, packet in (
        (NAMES[1], good),
        (SiteId("stranger"), good),
        (NAMES[0], Packet(good.header, {"answer": good.buffers["answer"][:-1]})),
        (NAMES[0], Packet(good.header, {"answer": bytes(8192)})),
        (NAMES[0], Packet(good.header)),
        (NAMES[0], resigned(NAMES[0], good, {"round": 2})),
        (NAMES[0], resigned(NAMES[0], good, {"digest": "0" * 64})),
        (NAMES[0], world.false_answer(NAMES[0], good, large)),
    ):
        with pytest.raises(ProtocolError):
            world.server.add_answer(name, packet)
    world.server.add_answer(NAMES[0], good)
    with pytest.raises(SecureSumError, match="before"):
        world.server.add_answer(NAMES[0], good)
    world.server.add_answer(NAMES[1], answers[NAMES[1]])
    with pytest.raises(SecureSumError, match="3 are needed"):
        world.server.result()


def test_answers_of_another_round_are_refused(world):
    old = world.answers()[NAMES[0]]
    world.server.start_round(2, "n")
    for n in NAMES:
        world.server.add(n, world.sites[n].contribute(2, "n", np.arange(6)))
    for n, request in world.server.agree_requests().items():
        world.server.add_agreement(n, world.sites[n].agree(request))
    world.server.open_requests()
    with pytest.raises(SecureSumError):
        world.server.add_answer(NAMES[0], old)


def _values(answer: Packet) -> np.ndarray:
    return np.frombuffer(answer.buffers["answer"], "<u2").astype(np.int64)


@pytest.mark.parametrize("coefficients", [slice(None), slice(7, 8)])
@pytest.mark.parametrize("shift", [1, 30000])
def test_a_wrong_answer_among_exactly_the_threshold_is_seen_and_opens_nothing(world, coefficients, shift):
    answers = world.answers()
    wrong = _values(answers[NAMES[1]])
    wrong[coefficients] = (wrong[coefficients] + shift) % shamir.P
    answers[NAMES[1]] = world.false_answer(NAMES[1], answers[NAMES[1]], wrong)
    for n in NAMES[:3]:
        world.server.add_answer(n, answers[n])
    for _ in range(2):
        with pytest.raises(SecureSumError, match="wrong"):
            world.server.result()
    assert world.server.suspects == ()


@pytest.mark.parametrize("liars", [[0], [2], [4], [0, 1], [1, 3], [3, 4]])
def test_wrong_answers_are_set_aside_and_named_when_there_are_more_than_the_threshold(world, liars):
    answers = world.answers()
    for i in liars:
        wrong = (_values(answers[NAMES[i]]) + 5 + i) % shamir.P
        answers[NAMES[i]] = world.false_answer(NAMES[i], answers[NAMES[i]], wrong)
    for n, p in answers.items():
        world.server.add_answer(n, p)
    values, _ = world.server.result()
    assert values.tolist() == [0, 5, 10, 15, 20, 25]
    assert world.server.suspects == tuple(NAMES[i] for i in liars)


def test_a_site_that_deals_wrong_shares_of_its_key_spoils_the_round_and_is_seen(world, monkeypatch):
    honest = shamir.share
    monkeypatch.setattr(shamir, "share", lambda secret, t, n: honest(secret + 1, t, n))
    false = world.contribution(NAMES[0])
    monkeypatch.undo()
    world.server.add(NAMES[0], false)
    for n in NAMES[1:]:
        world.server.add(n, world.contribution(n))
    for n, request in world.server.agree_requests().items():
        world.server.add_agreement(n, world.sites[n].agree(request))
    for n, request in world.server.open_requests().items():
        world.server.add_answer(n, world.sites[n].open(request))
    with pytest.raises(SecureSumError, match="wrong"):
        world.server.result()


def test_answers_that_add_up_to_the_zero_key_are_an_error_not_a_crash(world):
    answers = world.answers()
    for n in NAMES[:3]:
        world.server.add_answer(n, world.false_answer(n, answers[n], np.zeros(4096, np.int64)))
    with pytest.raises(SecureSumError, match="wrong"):
        world.server.result()


def test_too_few_answers_say_nothing_about_the_sum_of_keys(world):
    """With two of three answers every sum of keys is still possible: some third answer leads to it."""
    answers = world.answers()
    known = np.stack([_values(answers[n]) for n in NAMES[:2]])
    for guess in (0, 1, -17, 30000):
        points = [0, 1, 2]
        values = np.stack([np.full(4096, guess % shamir.P), *known])
        third = shamir.interpolate(points, values, [3])
        back = shamir.interpolate([1, 2, 3], np.concatenate([known, third]))[0]
        assert (shamir.centred(back) == guess).all()
