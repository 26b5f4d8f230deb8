"""A round only goes forward, whatever arrives in whatever order."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fedveil.common.errors import FedveilError, ProtocolError, RunAborted, SecureSumError
from fedveil.common.units import SiteId
from fedveil.common.wire import Packet
from fedveil.privacy.secagg.interface import ServerSum
from fedveil.server.rounds import Phase, Round

A, B, C, D = (SiteId(s) for s in "abcd")
PACKET = Packet({"kind": "x"})


class FakeSum(ServerSum):
    """Takes everything, remembers the calls, and opens to ones."""

    def __init__(self, fails: str = "", members: int = 4) -> None:
        self.fails, self.calls, self.added = fails, list[str](), list[SiteId]()
        self._count = members
        self.wrong: tuple[SiteId, ...] = ()
        self.lacking: tuple[SiteId, ...] = ()

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if name == self.fails:
            raise SecureSumError(f"{name} failed")

    def begin(self, joins: Any, replies: Any) -> dict[SiteId, Packet]:
        return {}

    def start_round(self, round: int, nonce: str, state: str = "") -> None:
        self._call("start_round")

    def add(self, site: SiteId, packet: Packet) -> None:
        self._call("add")
        self.added.append(site)

    @property
    def members(self) -> tuple[SiteId, ...]:
        return tuple(self.added)

    def agree_requests(self) -> dict[SiteId, Packet]:
        self._call("agree_requests")
        return dict.fromkeys(self.added, PACKET)

    def add_agreement(self, site: SiteId, packet: Packet) -> None:
        self._call("add_agreement")

    def open_requests(self) -> dict[SiteId, Packet]:
        self._call("open_requests")
        return dict.fromkeys(self.added, PACKET)

    def add_answer(self, site: SiteId, packet: Packet) -> None:
        self._call("add_answer")

    def fingerprint_requests(self) -> dict[SiteId, Packet]:
        self._call("fingerprint_requests")
        return dict.fromkeys(self.added, PACKET)

    def add_fingerprint(self, site: SiteId, packet: Packet) -> None:
        self._call("add_fingerprint")

    def result(self) -> tuple[np.ndarray, tuple[SiteId, ...]]:
        self._call("result")
        return np.arange(8), tuple(self.added)[: self._count]

    def opened(self) -> Packet:
        self._call("opened")
        return PACKET

    @property
    def suspects(self) -> tuple[SiteId, ...]:
        return self.wrong

    @property
    def unvouched(self) -> tuple[SiteId, ...]:
        return self.lacking


@pytest.fixture
def plan(plans):
    return plans()


class FakeRound(Round):
    """A round over a fake sum that the tests may look into."""

    fake: FakeSum


def collected(plan, fake, sites=(A, B, C, D)):
    r = FakeRound(plan, fake, 1, "nonce")
    r.fake = fake
    for s in sites:
        r.collect(s, PACKET)
    return r


# What may be called in each phase; everything else is refused and changes nothing.
ALLOWED = {
    Phase.COLLECTING: {"collect", "close"},
    Phase.AGREEING: {"agree", "ask"},
    Phase.OPENING: {"answer", "verify"},
    Phase.VERIFYING: {"fingerprint", "opened"},
    Phase.DONE: set(),
    Phase.ABORTED: set(),
}
CALLS = {
    "collect": lambda r: r.collect(A, PACKET),
    "close": lambda r: r.close(),
    "agree": lambda r: r.agree(A, PACKET),
    "ask": lambda r: r.ask(),
    "answer": lambda r: r.answer(A, PACKET),
    "verify": lambda r: r.verify(),
    "fingerprint": lambda r: r.fingerprint(A, PACKET),
    "opened": lambda r: r.opened(),
}


def at(plan, phase):
    if phase is Phase.ABORTED:
        r = collected(plan, FakeSum(), (A, B))
        with pytest.raises(RunAborted):
            r.close()
        return r
    r = collected(plan, FakeSum())
    for step in (r.close, r.ask, r.verify, r.opened)[: phase - 1]:
        step()
    return r


@pytest.mark.parametrize("phase", Phase)
@pytest.mark.parametrize("call", CALLS)
def test_forward_only(plan, phase, call):
    r = at(plan, phase)
    assert r.phase is phase
    made = len(r.fake.calls)
    if call in ALLOWED[phase]:
        CALLS[call](r)
        assert r.phase >= phase
    else:
        with pytest.raises(ProtocolError, match=phase.name):
            CALLS[call](r)
        assert r.phase is phase
        assert len(r.fake.calls) == made


def test_the_result_is_in_grid_units(plan):
    packet, values = at(plan, Phase.VERIFYING).opened()
    assert packet is PACKET
    np.testing.assert_array_equal(values, np.arange(8))


@pytest.mark.parametrize(("sites", "enough"), [((A, B, C, D), True), ((A, B, C), True), ((A, B), False), ((), False)])
def test_fewer_than_n_minus_d_members_are_an_abort(plan, sites, enough):
    r = collected(plan, FakeSum(), sites)
    if enough:
        assert set(r.close()) == set(sites)
    else:
        with pytest.raises(RunAborted, match=f"{len(sites)} of at least 3"):
            r.close()
        assert r.phase is Phase.ABORTED


def test_a_sum_that_lost_members_on_the_way_is_not_applied(plan):
    r = collected(plan, FakeSum(members=2))
    r.close()
    r.ask()
    r.verify()
    with pytest.raises(RunAborted, match="2 sites, fewer than 3"):
        r.opened()


@pytest.mark.parametrize(("fails", "at"), [("open_requests", 1), ("fingerprint_requests", 2), ("result", 3)])
def test_a_sum_that_cannot_be_opened_is_an_abort(plan, fails, at):
    r = collected(plan, FakeSum(fails))
    r.close()
    steps = [r.ask, r.verify, r.opened][:at]
    for step in steps[:-1]:
        step()
    with pytest.raises(RunAborted, match=f"{fails} failed"):
        steps[-1]()
    assert r.phase is Phase.ABORTED


def test_a_member_that_does_not_vouch_is_named_and_the_round_is_lost(plan):
    r = collected(plan, FakeSum("opened"))
    for step in (r.close, r.ask, r.verify):
        step()
    r.refuse(C, FedveilError("its own words"))
    r.fake.lacking = (B, C)
    with pytest.raises(RunAborted, match="opened failed"):
        r.opened()
    assert {s: e.code for s, e in r.refusals.items()} == {B: "UnverifiedOpening", C: "FedveilError"}


@pytest.mark.parametrize("fails", ["add", "add_agreement", "add_answer", "add_fingerprint"])
def test_a_bad_message_is_its_senders_refusal_and_no_more(plan, fails):
    fake = FakeSum(fails)
    r = Round(plan, fake, 1, "nonce")
    r.collect(A, PACKET)
    fake.added = [A, B, C]
    r.close()
    r.agree(A, PACKET)
    r.ask()
    r.answer(A, PACKET)
    r.verify()
    r.fingerprint(A, PACKET)
    assert {s: e.message for s, e in r.refusals.items()} == {A: f"{fails} failed"}
    assert r.opened()[0] is PACKET


def test_a_corrected_answer_is_counted_against_its_helper(plan):
    r = at(plan, Phase.VERIFYING)
    r.fake.wrong = (B,)
    r.opened()
    assert set(r.refusals) == {B}


def test_an_error_that_a_site_reports_is_kept(plan):
    r = Round(plan, FakeSum(), 1, "nonce")
    error = FedveilError("no")
    r.refuse(D, error)
    assert r.refusals == {D: error}


@pytest.mark.parametrize("number", [0, 5, -1])
def test_no_round_outside_the_plan(plan, number):
    with pytest.raises(ProtocolError, match="outside the plan"):
        Round(plan, FakeSum(), number, "nonce")
