"""What a site takes of the sums that a server sends, and what it does when they do not lead to the named state."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from fedveil.client import round as line
from fedveil.common.errors import ProtocolError, SecureSumError, StateMismatch, StoreError, SumTooLong, WireError
from fedveil.common.wire import Packet
from fedveil.privacy import norm_cap
from fedveil.privacy.optimiser import ModelState
from fedveil.privacy.start import start

FIRST, SECOND = np.arange(8) - 3, 7 * np.arange(8)


def after(w, *sums) -> ModelState:
    """The state that an honest site comes to."""
    state = start(w.plan)
    for values in sums:
        state = state.after(w.plan, np.asarray(values, np.int64))
    return state


def held(w, index: int = 0):
    site = w.sites[index]
    return site.model(site.session(w.session)).held


def test_a_round_is_computed_from_the_sums_before_it_and_names_the_state(world):
    w = world().begin()
    one, two = w.opened(1, FIRST), w.opened(2, SECOND)
    answers = [
        line.contribute(w.sites[0], w.request(1)),
        line.contribute(w.sites[0], w.request(2, [one], state=after(w, FIRST).digest)),
        line.contribute(w.sites[0], w.request(3, [one, two], state=after(w, FIRST, SECOND).digest)),  # one it has
    ]
    named = [start(w.plan).digest, after(w, FIRST).digest, after(w, FIRST, SECOND).digest]
    assert len(set(named)) == 3
    assert [a.header["state"] for a in answers] == named
    assert [r.body["state"] for r in w.sites[0].ledger.journal.of_kind("spend")] == named
    assert np.array_equal(held(w).state.weights, after(w, FIRST, SECOND).weights)


def test_a_late_site_takes_several_sums_at_once_and_a_restarted_one_goes_on(world):
    w = world().begin()
    named = after(w, FIRST, SECOND).digest
    request = w.request(3, [w.opened(1, FIRST), w.opened(2, SECOND)], state=named)
    assert line.contribute(w.sites[0], request).header["state"] == named
    site = w.reopen(0)
    asked = Packet({"kind": "apply", "session": w.session})
    assert line.apply(site, asked).header == {"kind": "applied", "round": 2, "state": named}
    line.begin(site, Packet({"kind": "begin", "session": w.session, "joins": w.statements()}))
    assert line.contribute(site, w.request(4, state=named)).header["state"] == named


@pytest.mark.parametrize(
    ("sums", "named"),
    [
        ([FIRST + 1], [FIRST]), ([FIRST], [FIRST + 1]), ([], [FIRST]), ([FIRST], []), ([FIRST, SECOND], [FIRST]),
        ([SECOND], [FIRST, SECOND]),
    ],
    ids=["another sum", "another name", "no sum", "the start", "one too many", "one skipped"],
)  # fmt: skip
def test_what_does_not_lead_to_the_named_state_changes_nothing(world, sums, named):
    w = world().begin()
    before = held(w)
    packets = [w.opened(i + 1, s) for i, s in enumerate(sums)]
    with pytest.raises(StateMismatch, match="this site's model"):
        line.contribute(w.sites[0], w.request(3, packets, state=after(w, *named).digest))
    assert held(w) is before
    assert w.spends() == []
    line.contribute(w.sites[0], w.request(3, [w.opened(2, FIRST)], state=after(w, FIRST).digest))  # negative control
    assert w.spends() == [3]


def test_an_answer_to_apply_says_where_the_site_stands_whatever_came(world):
    w = world().begin()
    wrong = w.request(1, [w.opened(1, FIRST)], kind="apply", state="0" * 64)
    stands = {"kind": "applied", "round": 0, "state": start(w.plan).digest}
    assert line.apply(w.sites[0], wrong).header == stands
    right = w.request(1, [w.opened(1, FIRST)], kind="apply", state=after(w, FIRST).digest)
    assert line.apply(w.sites[0], right).header == {**stands, "round": 1, "state": after(w, FIRST).digest}


def test_a_sum_over_the_norms_cap_is_not_stepped_on(world, monkeypatch):
    w = world().begin()
    much = np.zeros(8, np.int64)
    much[:] = norm_cap.cap(w.plan, 4) // 2
    request = w.request(2, [w.opened(1, much)], state=after(w, much).digest)
    with pytest.raises(SumTooLong, match="longer than"):
        line.contribute(w.sites[0], request)
    assert (w.spends(), held(w).round) == ([], 0)
    monkeypatch.setattr(norm_cap, "cap", lambda *_: 1 << 40)  # negative control
    line.contribute(w.sites[0], request)
    assert (w.spends(), held(w).round) == ([2], 1)


SUM = {"kind": "sum/opened"}


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "sum/other"}, {"session": "0" * 64}, {"round": 0}, {"round": 5}, {"round": True}, {"round": "1"},
        {"members": []}, {"members": ["site-1", "site-2"]}, {"members": ["site-2", "site-1", "site-3"]},
        {"members": ["site-1", "site-1", "site-2", "site-3"]}, {"members": ["site-1", "site-2", "site-9"]},
        {"members": [1, 2, 3]}, {"members": None}, {"more": 1}, {"members": {"site-1": 1}},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("sum_", ["plain", "keysum"])
def test_a_malformed_sum_is_refused_before_the_charge(world, sum_, change):
    w = world(sum=sum_).begin()
    good = w.opened(1, FIRST)
    request = w.request(2, [good], state=after(w, FIRST).digest)
    request.header["sums"] = [{**good.header, **change}]
    with pytest.raises(ProtocolError):
        line.contribute(w.sites[0], request)
    assert (w.spends(), held(w).round) == ([], 0)


@pytest.mark.parametrize(
    "data", [b"", b"\0" * 31, b"\0" * 33, b"\0" * 64, np.full(8, 2**31 - 1, "<i4").tobytes(), None], ids=repr
)
def test_values_of_another_length_or_beyond_the_bound_are_refused(world, data):
    w = world(sum="plain").begin()
    assert w.plan.bound < 2**31 - 1
    request = w.request(2, [w.opened(1, FIRST)], state=after(w, FIRST).digest)
    buffers = {} if data is None else {"sum_0": data}
    with pytest.raises((WireError, SecureSumError)):
        line.contribute(w.sites[0], Packet(request.header, buffers))
    assert w.spends() == []


@pytest.mark.parametrize("sums", [7, {}, "x", [7], [{}], [{"kind": []}], [SUM], [SUM] * 33])
def test_a_malformed_list_of_sums_is_refused(world, sums):
    w = world().begin()
    with pytest.raises(ProtocolError):
        line.contribute(w.sites[0], Packet({**w.request(2).header, "sums": sums}))
    assert w.spends() == []


@pytest.mark.parametrize("state", [None, 7, "", "x" * 64, "a" * 63, ["a" * 64]])
def test_a_request_without_a_state_is_refused(world, state):
    w = world().begin()
    with pytest.raises(WireError, match="model state"):
        line.contribute(w.sites[0], w.request(1, state=state))
    assert w.spends() == []


def test_a_session_ends_with_this_sites_own_model(world):
    w = world().begin()
    line.contribute(w.sites[0], w.request(1))
    end, brought = after(w, FIRST), w.request(1, [w.opened(1, FIRST)])
    finish = w.finish(state=end.digest, model_hash=end.hash, sums=brought.header["sums"])
    with pytest.raises(StateMismatch, match="another model"):
        line.finish(w.sites[0], Packet({**finish.header, "model_hash": "d" * 64}, brought.buffers))
    assert not list(w.sites[0].ledger.journal.of_kind("model", "session.end"))
    line.finish(w.sites[0], Packet(finish.header, brought.buffers))
    assert [r.body["model_hash"] for r in w.sites[0].ledger.journal.of_kind("model")] == [end.hash]


class TestTheState:
    def test_its_hash_speaks_of_all_that_the_next_step_depends_on(self):
        base = ModelState(np.array([1.0, -2.0]), (np.array([0.5, 0.0]),), 3)
        tiny = np.array([1e-300, 0.0])
        others = [
            dataclasses.replace(base, weights=base.weights + np.spacing(1.0)),
            dataclasses.replace(base, moments=(base.moments[0] + tiny + np.spacing(0.5),)),
            dataclasses.replace(base, moments=(base.moments[0] + np.array([0.0, 5e-324]),)),
            dataclasses.replace(base, steps=4),
            ModelState(np.array([1.0, -2.0, 0.5]), (np.array([0.0, 0.0, 0.0]),), 3),
            dataclasses.replace(base, moments=(*base.moments, np.zeros(2))),
            dataclasses.replace(base, average=np.zeros(2)),
        ]
        assert len({s.digest for s in (base, *others)}) == 8
        assert base.digest == dataclasses.replace(base).digest

    def test_what_is_stored_is_read_back_and_nothing_else_is(self):
        base = ModelState(np.array([1.0, -2.0]), (np.array([0.5, 5e-324]),), 3)
        back = ModelState.load(base.data)
        assert (back.digest, back.steps) == (base.digest, 3)
        for cut in range(len(base.data)):
            with pytest.raises(StoreError, match="damaged"):
                ModelState.load(base.data[:cut])
        with pytest.raises(StoreError, match="damaged"):
            ModelState.load(base.data + b"\0")
