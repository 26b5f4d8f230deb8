"""A late site takes a whole state only if more than t + d members named it, signed; and it only moves forward."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fedveil.client import round as line
from fedveil.common.errors import FedveilError, ProtocolError, SecureSumError, StateMismatch, WireError
from fedveil.common.wire import Packet, sha256
from fedveil.privacy.optimiser import ModelState
from fedveil.privacy.secagg.interface import SumSpec
from fedveil.privacy.secagg.keysum_common import sign_header
from fedveil.privacy.secagg.named_state import NAMED, WHOLE, pack
from fedveil.privacy.start import start

FIRST, SECOND, THIRD = np.arange(8) - 3, 7 * np.arange(8), np.arange(8) % 3


class Late:
    """Site 0 is at the start; the three others took two sums and contributed to round 3."""

    def __init__(self, w: Any) -> None:
        self.w, self.site = w.begin(), w.sites[0]
        self.states = [start(w.plan)]
        for values in (FIRST, SECOND, THIRD):
            self.states.append(self.states[-1].after(w.plan, values))
        self.headers = self.of_round(3, 2)

    def of_round(self, round_: int, sums: int) -> list[dict[str, Any]]:
        """What the three others sign in a round after so many sums."""
        packets = [self.w.opened(i + 1, values) for i, values in enumerate((FIRST, SECOND, THIRD)[:sums])]
        request = self.w.request(round_, packets, state=self.states[sums].digest)
        return [line.contribute(site, request).header for site in self.w.sites[1:]]

    def message(self, named: Any = None, data: bytes | None = None, state: str = "") -> Packet:
        named = pack(3, "nonce-3", self.headers) if named is None else named
        header = {"kind": "apply", "session": self.w.session, "state": state or self.states[2].digest, "sums": []}
        return Packet({**header, NAMED: named}, {WHOLE: self.states[2].data if data is None else data})

    @property
    def held(self):
        return self.site.model(self.site.session(self.w.session)).held

    def refused(self, message: Packet, error: type[FedveilError], words: str) -> None:
        before = self.held
        with pytest.raises(error, match=words):
            line.contribute(self.site, Packet({**self.w.request(4).header, **message.header, "kind": "contribute"},
                                              message.buffers))  # fmt: skip
        assert self.held is before
        assert self.w.spends() == []


@pytest.fixture
def late(world) -> Late:
    return Late(world())


@pytest.mark.parametrize("sum_", ["keysum", "sharedkey"])
def test_a_state_that_enough_members_named_is_taken_and_the_next_sum_goes_on(world, sum_):
    w = world(sum=sum_)
    if sum_ == "sharedkey":  # the first site deals the key through the server
        return shared(w)
    late = Late(w)
    assert line.apply(late.site, late.message()).header == {
        "kind": "applied", "round": 2, "state": late.states[2].digest,
    }  # fmt: skip
    assert late.held.state.data == late.states[2].data
    request = w.request(4, [w.opened(3, THIRD)], state=late.states[3].digest)
    assert line.contribute(late.site, request).header["state"] == late.states[3].digest
    again = w.reopen(0)
    assert line.apply(again, Packet({"kind": "apply", "session": w.session})).header["state"] == late.states[3].digest


def shared(w: Any) -> None:
    """The same under one shared key, whose headers have another form; and a header that another site's key signed."""
    joins = w.statements()
    replies = {s.id: line.begin(s, Packet({"kind": "begin", "session": w.session, "joins": joins})) for s in w.sites}
    boxes = replies[w.sites[0].id].buffers["boxes"]
    size = len(boxes) // 3
    for i, site in enumerate(w.sites[1:]):
        key = Packet(
            {"kind": "sharedkey/key", "session": w.session, "plan_hash": w.plan.hash, "round": 0},
            {"box": boxes[i * size : (i + 1) * size]},
        )
        site.session(w.session).sum.receive(key)
    w.begin = lambda: w
    late = Late(w)
    forged = copy.deepcopy(late.headers)
    forged[1] |= {"state": late.states[1].digest}
    late.refused(late.message(pack(3, "nonce-3", forged)), SecureSumError, "sharedkey/sealed of 'site-3'")
    line.apply(late.site, late.message())
    assert late.held.name == late.states[2].digest


Change = Callable[[Late], Packet]


def fewer(late: Late) -> Packet:
    return late.message(pack(3, "nonce-3", late.headers[:2]))


def twice(late: Late) -> Packet:
    return late.message(pack(3, "nonce-3", [*late.headers[:2], late.headers[0]]))


def altered(late: Late) -> Packet:
    headers = [*late.headers[:2], {**late.headers[2], "state": late.states[1].digest}]
    return late.message(pack(3, "nonce-3", headers))


def divided(late: Late) -> Packet:
    """A colluder signs again, for another state: one round, two states."""
    other = {k: v for k, v in late.headers[2].items() if k != "signature"} | {"state": late.states[1].digest}
    return late.message(pack(3, "nonce-3", [*late.headers[:2], sign_header(late.w.keys[3], other)]))


def unnamed(late: Late) -> Packet:
    plain = [{k: v for k, v in h.items() if k not in ("signature", "state")} for h in late.headers]
    signed = [sign_header(late.w.keys[i + 1], h) for i, h in enumerate(plain)]
    return late.message(pack(3, "nonce-3", signed))


def another_round(late: Late) -> Packet:
    return late.message(pack(4, "nonce-3", late.headers))


def another_nonce(late: Late) -> Packet:
    return late.message(pack(3, "nonce-4", late.headers))


def other_bytes(late: Late) -> Packet:
    return late.message(data=late.states[1].data)


def one_bit(late: Late) -> Packet:
    data = bytearray(late.states[2].data)
    data[-1] ^= 1
    return late.message(data=bytes(data))


def cut(late: Late) -> Packet:
    return late.message(data=late.states[2].data[:-1])


def no_bytes(late: Late) -> Packet:
    return Packet(late.message().header)


def another_name(late: Late) -> Packet:
    return late.message(state=late.states[1].digest)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (fewer, SecureSumError, "2 members name a model state; 3 are needed"), (twice, SecureSumError, "twice"),
        (altered, SecureSumError, "not signed|signature"), (divided, SecureSumError, "do not all name one"),
        (unnamed, SecureSumError, "do not all name one"), (another_round, SecureSumError, "another round"),
        (another_nonce, SecureSumError, "another nonce"), (other_bytes, StateMismatch, "another model state"),
        (one_bit, StateMismatch, "another model state"), (cut, WireError, "bytes instead of"),
        (no_bytes, WireError, "missing"), (another_name, StateMismatch, "the server names"),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)  # fmt: skip
def test_what_does_not_hold_moves_nothing(late, change, error, words):
    late.refused(change(late), error, words)
    line.apply(late.site, late.message())  # negative control
    assert late.held.name == late.states[2].digest


def named_by_all(late: Late, state: ModelState, round_: int = 3) -> Packet:
    """All three others collude: more than t + d, which is beyond what the plan assumes."""
    headers = [{k: v for k, v in h.items() if k != "signature"} | {"state": state.digest} for h in late.headers]
    signed = [sign_header(late.w.keys[i + 1], h) for i, h in enumerate(headers)]
    return late.message(pack(round_, "nonce-3", signed), state.data, state.digest)


@pytest.mark.parametrize(
    ("values", "steps", "error"),
    [
        (np.nan, 2, WireError), (np.inf, 2, WireError), (0.0, 0, ProtocolError), (0.0, 3, ProtocolError),
        (0.0, 2**63, ProtocolError),
    ],
    ids=str,
)  # fmt: skip
def test_even_of_colluders_only_a_later_finite_state_is_taken(late, values, steps, error):
    zeros = np.zeros(8)
    for state in (ModelState(zeros + values, (zeros,), steps), ModelState(zeros, (zeros + values,), steps)):
        late.refused(named_by_all(late, state), error, ".")
    wrong = b"x" * len(late.states[2].data)
    state = late.states[2]
    state.__dict__.update(data=wrong, digest=sha256(wrong))
    late.refused(named_by_all(late, state), WireError, "malformed")


def test_a_model_only_moves_forward(late):
    w = late.w
    ahead = w.request(4, [w.opened(i + 1, v) for i, v in enumerate((FIRST, SECOND, THIRD))], kind="apply",
                      state=late.states[3].digest)  # fmt: skip
    line.apply(late.site, ahead)
    before = late.held
    with pytest.raises(ProtocolError, match="not later than this site's after round 3"):
        line.apply(late.site, late.message())
    assert late.held is before


@pytest.mark.parametrize(
    "named",
    [7, [], {}, {"round": 3}, pack(3, "nonce-3", []), {"round": True, "nonce": "nonce-3", "members": []},
     {"round": 3, "nonce": 3, "members": []}, {"round": 3, "nonce": "nonce-3", "members": "abc"},
     pack(3, "nonce-3", [{}] * 3), {**pack(3, "nonce-3", []), "members": [7] * 3}, pack(99, "nonce-3", [{}] * 3),
     pack(3, "", [{}] * 3), pack(3, "nonce-3", [{"site": []}] * 3), pack(3, "nonce-3", [{}] * 5),
     {**pack(3, "nonce-3", []), "more": 1}],
    ids=str,
)  # fmt: skip
def test_malformed_names_are_refused(late, named):
    late.refused(late.message(named), ProtocolError, ".")


@pytest.mark.parametrize("plan", [{"reveal_to": "sites"}, {"mode": "local", "sum": "none"}, {"sum": "plain"}], ids=str)
def test_where_states_have_no_signed_names_none_is_taken_as_a_whole(world, plan):
    w = world(**plan)
    for s in w.sites if plan.get("sum") in ("plain", "none") else w.begin().sites:
        line.join(s, w.proposal())
    site, state = w.sites[0], start(w.plan)
    header = {"kind": "apply", "session": w.session, "state": state.digest, "sums": []}
    with pytest.raises(SecureSumError, match="a model state as a whole"):
        line.apply(site, Packet({**header, NAMED: pack(1, "n", [{}] * 4)}, {WHOLE: state.data}))


def test_the_broken_version_takes_what_one_colluder_made_up(late, monkeypatch):
    """The control: where one member's word is enough, the server and one site choose everybody's model."""
    made_up = ModelState(np.full(8, 99.0), (np.zeros(8),), 2)
    other = {k: v for k, v in late.headers[0].items() if k != "signature"} | {"state": made_up.digest}
    one = pack(3, "nonce-3", [sign_header(late.w.keys[1], other)])
    late.refused(late.message(one, made_up.data, made_up.digest), SecureSumError, "1 members name")
    monkeypatch.setattr(SumSpec, "quorum", 1)
    line.apply(late.site, late.message(one, made_up.data, made_up.digest))
    assert late.held.name == made_up.digest
