"""A server that lies, repeats, reorders or asks for more than was signed: refused, and never charged for."""

from __future__ import annotations

import pytest

from fedveil.client import round as line
from fedveil.common import identity
from fedveil.common.errors import (
    BudgetExhausted,
    FedveilError,
    IdentityError,
    JournalError,
    PlanError,
    PolicyRefusal,
    ProtocolError,
    SecureSumError,
    WireError,
)
from fedveil.common.wire import Packet
from fedveil.privacy.joining import JOIN

NAMES = [
    "",
    "a" * 63,
    "A" * 64,
    "g" * 64,
    "../" * 21 + "a",
    "/" * 64,
    "." * 64,
    "0" * 65,
    None,
    7,
    ["a" * 64],
    "é" * 64,
]


class TestJoining:
    def test_the_statement_is_signed_over_plan_roster_and_contract(self, world):
        w = world()
        for s in w.sites:
            document = line.join(s, w.proposal()).header["statement"]
            payload = identity.opened(document, JOIN, w.roster.member(s.id).signing_key, what="a statement")
            assert payload["plan_hash"] == w.plan.hash
            assert (payload["session"], payload["site"]) == (w.session, s.id)
            assert (payload["roster_hash"], payload["contract_hash"]) == (w.roster.hash, "c" * 64)

    @pytest.mark.parametrize("steps", [5, 3])
    def test_a_second_plan_for_the_same_session_is_refused(self, world, steps):
        w, other = world(), world(steps=steps)
        line.join(w.sites[0], w.proposal())
        with pytest.raises(ProtocolError, match="another plan"):
            line.join(w.sites[0], w.proposal(plan=other.plan.to_json()))
        # nor after a restart
        with pytest.raises(ProtocolError, match="another plan"):
            line.join(w.reopen(0), w.proposal(plan=other.plan.to_json()))

    @pytest.mark.parametrize(
        ("field", "factor"),
        [("noise_multiplier", 0.5), ("steps", 2), ("grid", 1e-11), ("clamp", 1e10), ("records", 1e7), ("clip", 1e-6)],
    )
    def test_a_tampered_plan_is_inconsistent(self, world, field, factor):
        w = world()
        value = w.plan.to_json()
        value[field] = type(value[field])(value[field] * factor)
        with pytest.raises(PlanError):
            line.join(w.sites[0], w.proposal(plan=value))
        assert not list(w.sites[0].ledger.journal.of_kind("plan.accepted"))

    @pytest.mark.parametrize("value", [None, [], "plan", {}, {"v": 1}, {"v": 2}, {"v": 3}])
    def test_a_malformed_plan_is_refused(self, world, value):
        w = world()
        with pytest.raises(PlanError, match="version 1" if value == {"v": 1} else "malformed"):
            line.join(w.sites[0], w.proposal(plan=value))

    @pytest.mark.parametrize(
        ("limits", "said"),
        [
            ({"max_epsilon": 1.9}, "epsilon"),
            ({"delta": 1e-6}, "delta"),
            ({"min_noise_multiplier": 50.0}, "noise multiplier"),
            ({"min_sites": 5}, "4 sites"),
            ({"min_honest": 3}, "honest"),
            ({"max_fallback_epsilon": 1.0}, "fallback"),
            ({"modes": ("local",)}, "mode"),
            ({"sums": ("sharedkey",)}, "sum"),
        ],
    )
    def test_the_sites_own_limits_are_not_for_the_server_to_lift(self, world, limits, said):
        w = world(limits=limits)
        with pytest.raises(PolicyRefusal, match=said):
            line.join(w.sites[0], w.proposal())
        assert not list(w.sites[0].ledger.journal.of_kind("plan.accepted"))

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"roster_hash": "b" * 64}, "roster"),
            ({"contract_hash": "b" * 64}, "contract"),
            ({"roster_hash": 7}, "roster"),
        ],
    )
    def test_another_roster_or_contract_is_refused(self, world, change, said):
        w = world()
        with pytest.raises(ProtocolError, match=said):
            line.join(w.sites[0], w.proposal(**change))

    def test_a_plan_for_other_features_or_more_sites_is_refused(self, world):
        w = world()
        wide = w.plan.to_json()
        wide["model"]["inputs"] = 2
        with pytest.raises((ProtocolError, PlanError)):
            line.join(w.sites[0], w.proposal(plan=wide))
        with pytest.raises(ProtocolError, match="5 sites"):
            line.join(w.sites[0], w.proposal(plan=world(sites=5).plan.to_json()))

    def test_a_ledger_of_records_does_not_join_a_plan_for_clients(self, world):
        w = world(limits={"modes": ("client", "distributed")})
        other = world(mode="client", few_clients=True, limits={"min_noise_multiplier": 0.0})
        with pytest.raises(PolicyRefusal, match="each record, the plan each client"):
            line.join(w.sites[0], w.proposal(plan=other.plan.to_json()))

    def test_a_budget_that_carries_no_step_is_said_before_anything_is_signed(self, world):
        w = world()
        for n in range(1, w.sites[0].ledger.affords(w.plan.event) + 1):
            w.sites[0].ledger.reserve("e" * 64, n, w.plan.hash, w.plan.event)
        before = w.spends()
        with pytest.raises(BudgetExhausted):
            line.join(w.sites[0], w.proposal())
        with pytest.raises(ProtocolError, match="not joined"):
            line.contribute(w.sites[0], w.request())
        assert w.spends() == before


@pytest.mark.parametrize("kind", ["join", "begin", "deal", "contribute", "agree", "open_sum", "fingerprint", "finish"])
def test_a_session_is_a_name_and_never_a_path(world, kind):
    w = world().begin()
    own = w.folder / "site-1"
    before = sorted(own.rglob("*"))
    request = {"join": w.proposal(), "contribute": w.request(), "finish": w.finish()}.get(
        kind, Packet({"kind": kind, "joins": {}, "packet": {}})
    )
    for name in NAMES:
        with pytest.raises(ProtocolError, match="64 lower-case"):
            getattr(line, kind)(w.sites[0], Packet({**request.header, "session": name}, request.buffers))
    assert sorted(own.rglob("*")) == before


@pytest.mark.parametrize("kind", ["begin", "deal", "contribute", "agree", "open_sum", "fingerprint", "finish"])
def test_an_unknown_session_is_refused_and_leaves_nothing_behind(world, kind):
    w = world()
    request = {"contribute": w.request(), "finish": w.finish()}.get(
        kind, Packet({"kind": kind, "session": w.session, "joins": {}, "packet": {}})
    )
    with pytest.raises(ProtocolError, match="not joined"):
        getattr(line, kind)(w.sites[0], request)
    assert not (w.folder / "site-1" / "sessions").exists()
    assert w.spends() == []


class TestBeginning:
    def begin(self, w, joins):
        return line.begin(w.sites[0], Packet({"kind": "begin", "session": w.session, "joins": joins}))

    def test_a_forged_statement_is_refused(self, world):
        w = world()
        joins = w.statements()
        victim = w.roster.sites[1].site
        payload = dict(joins[victim]["payload"])
        payload["fields"] = {"x25519": "7" * 64}
        joins[victim] = identity.signed(identity.new_signing_key(), JOIN, payload)
        with pytest.raises(IdentityError):
            self.begin(w, joins)

    def test_a_key_swapped_under_an_honest_signature_is_refused(self, world):
        w = world()
        joins = w.statements()
        victim = w.roster.sites[1].site
        joins[victim] = {**joins[victim], "payload": {**joins[victim]["payload"], "fields": {"x25519": "7" * 64}}}
        with pytest.raises(IdentityError):
            self.begin(w, joins)

    def test_one_sites_statement_does_not_speak_for_another(self, world):
        w = world()
        joins = w.statements()
        a, b = (m.site for m in w.roster.sites[1:3])
        joins[a] = joins[b]
        with pytest.raises(FedveilError):
            self.begin(w, joins)

    def test_a_statement_of_another_session_is_refused(self, world):
        w = world()
        joins, own = w.statements(), w.session
        w.session = "5" * 64
        joins["site-2"] = line.join(w.sites[1], w.proposal()).header["statement"]
        w.session = own
        with pytest.raises(ProtocolError, match="another plan, roster or session"):
            self.begin(w, joins)

    @pytest.mark.parametrize("change", ["missing", "stranger", "none", "list"])
    def test_exactly_the_rosters_sites_take_part(self, world, change):
        w = world()
        joins = w.statements()
        if change == "missing":
            del joins["site-4"]
        elif change == "stranger":
            joins["site-9"] = joins["site-4"]
        with pytest.raises(ProtocolError):
            self.begin(w, {"missing": joins, "stranger": joins, "none": None, "list": list(joins.values())}[change])

    def test_the_statements_are_taken_once(self, world):
        w = world()
        joins = w.statements()
        self.begin(w, joins)
        self.begin(w, joins)
        again = dict(joins)
        other = dict(joins["site-2"]["payload"])
        other["fields"] = {"x25519": "7" * 64}
        again["site-2"] = identity.signed(w.keys[1], JOIN, other)  # site 2 itself cheats, with the server
        with pytest.raises(SecureSumError):
            self.begin(w, again)

    @pytest.mark.parametrize("packet", [None, [], "x", 3])
    def test_a_relayed_packet_without_a_header_is_refused(self, world, packet):
        w = world().begin()
        with pytest.raises(WireError):
            line.deal(w.sites[0], Packet({"kind": "deal", "session": w.session, "packet": packet}))

    def test_nothing_is_charged_before_everybody_was_told_who_joined(self, world):
        w = world()
        w.statements()
        with pytest.raises(ProtocolError, match="who joined"):
            line.contribute(w.sites[0], w.request())
        assert w.spends() == []


class TestRounds:
    def test_a_repeated_request_gets_the_same_bytes_and_is_charged_once(self, world):
        w = world().begin()
        first = line.contribute(w.sites[0], w.request())
        for _ in range(2):
            again = line.contribute(w.sites[0], w.request(state="0" * 64))
            assert (again.header, again.buffers) == (first.header, first.buffers)
        restarted = line.contribute(w.reopen(0), w.request())
        assert (restarted.header, restarted.buffers) == (first.header, first.buffers)
        assert w.spends() == [1]

    def test_fresh_noise_and_a_fresh_key_in_every_round(self, world):
        w = world().begin()
        a, b = (line.contribute(w.sites[0], w.request(n)).buffers for n in (1, 2))
        assert a["ciphertext"] != b["ciphertext"]
        assert a["shares"] != b["shares"]
        assert w.spends() == [1, 2]

    @pytest.mark.parametrize("later", [1, 3])
    def test_a_round_under_another_nonce_is_refused(self, world, later):
        w = world().begin()
        for n in range(1, later + 1):
            line.contribute(w.sites[0], w.request(n))
        with pytest.raises((ProtocolError, JournalError)):
            line.contribute(w.sites[0], w.request(1, nonce="another"))
        assert w.spends() == list(range(1, later + 1))

    def test_a_charged_round_whose_answer_was_lost_is_not_released_again(self, world, monkeypatch):
        w = world().begin()
        monkeypatch.setattr(type(w.sites[0].session(w.session).sum), "contribute", _crash)
        with pytest.raises(_Crash):
            line.contribute(w.sites[0], w.request())
        monkeypatch.undo()
        for site in (w.sites[0], w.reopen(0)):
            with pytest.raises(JournalError, match="charged before"):
                line.contribute(site, w.request())
        assert w.spends() == [1]
        assert not list(w.sites[0].ledger.journal.of_kind("commit"))
        line.contribute(w.sites[0], w.request(2))  # the next round is a new one

    @pytest.mark.parametrize("round_", [0, 5, -1, True, 1.0, "1", None, 1 << 70])
    def test_no_round_outside_the_plan(self, world, round_):
        w = world().begin()
        with pytest.raises(ProtocolError, match="outside the plan"):
            line.contribute(w.sites[0], w.request(round_))
        assert w.spends() == []

    @pytest.mark.parametrize("change", [{"plan_hash": "b" * 64}, {"plan_hash": None}])
    def test_no_round_under_another_plan(self, world, change):
        w = world().begin()
        with pytest.raises(ProtocolError, match="another plan"):
            line.contribute(w.sites[0], w.request(**change))
        assert w.spends() == []

    @pytest.mark.parametrize("nonce", ["", None, 7, "n" * 129, "né", "a\nb", ["n"]])
    def test_a_malformed_nonce_is_not_charged(self, world, nonce):
        w = world().begin()
        with pytest.raises(WireError, match="nonce"):
            line.contribute(w.sites[0], w.request(nonce=nonce))
        assert w.spends() == []

    def test_the_cap_ends_a_session_with_one_row_however_often_it_is_asked(self, world):
        w = world(cap=2.0)  # the filter needs more than the PLD value: not all four steps fit
        w.begin()
        carried = w.sites[0].ledger.affords(w.plan.event)
        assert 0 < carried < 4
        for n in range(1, carried + 1):
            line.contribute(w.sites[0], w.request(n))
        for n in (carried + 1, carried + 1, 4):
            with pytest.raises(BudgetExhausted):
                line.contribute(w.sites[0], w.request(n))
        with pytest.raises(BudgetExhausted):
            line.contribute(w.reopen(0), w.request(4))
        assert w.spends() == list(range(1, carried + 1))
        assert len(list(w.sites[0].ledger.journal.of_kind("refused"))) == 1


class TestEnding:
    def test_a_session_ends_once_and_nothing_is_charged_afterwards(self, world):
        w = world().begin()
        line.contribute(w.sites[0], w.request())
        first = line.finish(w.sites[0], w.finish())
        assert line.finish(w.sites[0], w.finish(status="ABORTED")).buffers == first.buffers
        for site in (w.sites[0], w.reopen(0)):
            with pytest.raises(ProtocolError, match="has ended"):
                line.contribute(site, w.request(2))
            assert line.finish(site, w.finish()).buffers == first.buffers
        assert w.spends() == [1]
        assert len(list(w.sites[0].ledger.journal.of_kind("session.end"))) == 1

    def test_the_sessions_key_is_destroyed(self, world):
        w = world().begin()
        folder = w.folder / "site-1" / "sessions" / w.session
        key = next(p for p in folder.iterdir() if p.name.endswith("x25519"))
        secret = key.read_bytes()
        assert secret in b"".join(p.read_bytes() for p in folder.iterdir())
        line.finish(w.sites[0], w.finish())
        assert secret not in b"".join(p.read_bytes() for p in folder.iterdir())

    @pytest.mark.parametrize(
        "change",
        [
            {"model_hash": "x" * 64}, {"model_hash": "d" * 63}, {"model_hash": None}, {"status": "S" * 33},
            {"status": 7}, {"status": "a\x1b[2J"}, {"round": 5}, {"round": "1"},
        ],
    )  # fmt: skip
    def test_a_malformed_ending_changes_nothing(self, world, change):
        w = world().begin()
        head = w.sites[0].ledger.head
        with pytest.raises(ProtocolError):
            line.finish(w.sites[0], w.finish(**change))
        assert w.sites[0].ledger.head == head

    def test_every_message_names_its_kind(self, world):
        w = world().begin()
        for name in ("join", "begin", "deal", "contribute", "finish"):
            with pytest.raises(WireError):
                getattr(line, name)(w.sites[0], Packet({"kind": "else", "session": w.session}))


class _Crash(Exception):
    """Stands for kill -9 between charge and answer."""


def _crash(*_: object) -> None:
    raise _Crash
