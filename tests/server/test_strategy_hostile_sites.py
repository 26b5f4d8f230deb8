"""Sites that refuse, vanish, lie about who they are, or hand in ledgers that do not hold."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from flwr.app import RecordDict

from fedveil.common import canonical, identity
from fedveil.common.errors import BudgetExhausted, IdentityError, ProtocolError, RunAborted, WireError
from fedveil.common.journal import Journal, parse
from fedveil.common.wire import Packet
from fedveil.privacy.joining import JOIN
from fedveil.privacy.optimiser import ModelState
from fedveil.privacy.report.build import build_report
from fedveil.privacy.report.verify import verify_report
from fedveil.privacy.secagg.keysum_common import sign_header
from fedveil.privacy.secagg.plain import PlainServer


def verified(r):
    for site in r.sites.values():
        site.ledger.close()
    build_report(r.folder, r.world.server)
    result = verify_report(r.folder / "report.json")
    assert result.ok, result.failed
    return {c.name: c.detail for c in result.checks}


def lost(action, indices, reply=False):
    """Loses requests (or replies) of one kind to some sites."""

    def drop(site, message):
        m = message.metadata
        return m.message_type == action and bool(m.reply_to_message_id) is reply and int(site[-4:]) - 1 in indices

    return drop


class TestHonest:
    @pytest.mark.parametrize("sum", ["plain", "keysum", "sharedkey"])
    def test_every_step_is_applied_and_charged_once(self, run, sum):
        r = run(sum=sum)
        assert r.go() == "COMPLETED"
        assert [b["round"] for b in r.bodies("round.applied")] == [1, 2, 3, 4]
        assert [r.spends(i) for i in range(4)] == [[1, 2, 3, 4]] * 4
        assert verified(r)["ledgers delivered"] == "all 4"

    def test_the_model_is_what_the_optimiser_makes_of_the_opened_sums(self, run, monkeypatch):
        sums, opened = {}, PlainServer.result

        def kept(self):
            sums[self._round], members = opened(self)
            return sums[self._round], members

        monkeypatch.setattr(PlainServer, "result", kept)
        r = run()
        r.go()
        weights = velocity = np.zeros(8)
        for s in sums.values():
            velocity = r.plan.optimizer.momentum * velocity + s * r.plan.grid / (r.plan.sample_rate * r.plan.records)
            weights = weights - r.plan.optimizer.learning_rate * velocity
        assert len(sums) == 4
        np.testing.assert_array_equal(
            np.frombuffer((r.folder / "model.f32").read_bytes(), "<f4"), weights.astype("<f4")
        )


class TestJoining:
    def test_a_refusal_ends_the_run_before_anything_is_charged(self, run):
        r = run()
        r.site(2).limits = r.site(2).limits.model_copy(update={"min_noise_multiplier": 99.0})
        with pytest.raises(RunAborted, match=r"site-0003 does not take part: noise multiplier"):
            r.go()
        assert (
            r.bodies("join.refused")[0] | {"site": "site-0003", "code": "PolicyRefusal"} == r.bodies("join.refused")[0]
        )
        assert [r.spends(i) for i in range(4)] == [[]] * 4

    def test_a_budget_that_is_gone_keeps_its_name(self, run):
        r = run(cap=0.5)
        with pytest.raises(BudgetExhausted, match="does not take part"):
            r.go()

    def test_two_sites_with_one_identity(self, run):
        r = run(speaks_as=lambda i: 1 if i == 2 else i)
        with pytest.raises(IdentityError, match="two sites speak as 'site-0002'"):
            r.go()
        assert not r.bodies("run.joined")

    def test_a_forged_statement(self, run):
        stranger = identity.new_signing_key()

        def lie(index, action, packet):
            if index != 1 or action != "query.join":
                return packet
            document = identity.signed(stranger, JOIN, packet.header["statement"]["payload"])
            return Packet({**packet.header, "statement": document})

        with pytest.raises(IdentityError):
            run(lie=lie).go()

    def test_a_statement_about_another_plan(self, run):
        r = run()

        def lie(index, action, packet):
            if index != 1 or action != "query.join":
                return packet
            payload = {**packet.header["statement"]["payload"], "plan_hash": "0" * 64}
            return Packet({**packet.header, "statement": identity.signed(r.world.keys[1], JOIN, payload)})

        r.lie = lie
        with pytest.raises(ProtocolError, match="another plan"):
            r.go()

    @pytest.mark.parametrize("statement", [None, [], {}, {"payload": 3}, {"payload": {"site": 7}}, "x"])
    def test_a_malformed_statement(self, run, statement):
        def lie(index, action, packet):
            return Packet({"kind": "joined", "statement": statement}) if action == "query.join" else packet

        with pytest.raises(ProtocolError):
            run(lie=lie).go()

    def test_another_kind_of_answer(self, run):
        with pytest.raises(WireError):
            run(lie=lambda i, a, p: Packet({"kind": "hello"})).go()

    def test_a_lost_answer_is_asked_for_again(self, run):
        first = []
        drop = lost("query.join", {2}, reply=True)
        r = run(drop=lambda s, m: not first and drop(s, m) and not first.append(1))
        assert r.go() == "COMPLETED"
        assert first
        assert verified(r)

    def test_a_site_that_never_answers_is_named_when_the_time_is_over(self, run):
        r = run(drop=lost("query.join", {2}), options={"join_timeout": 0.3})
        with pytest.raises(RunAborted, match="did not join in time: site-0003"):
            r.go()


class TestRounds:
    def test_one_site_may_drop_out(self, run):
        r = run(drop=lost("train.contribute", {3}))
        assert r.go() == "COMPLETED"
        assert [b["members"] for b in r.bodies("round.applied")] == [["site-0001", "site-0002", "site-0003"]] * 4
        sigma = r.bodies("round.applied")[0]["noise_multiplier"]
        assert sigma == pytest.approx(r.plan.noise_multiplier)
        assert r.spends(3) == []
        assert verified(r)

    def test_two_are_too_many_and_lost_rounds_are_charged(self, run):
        r = run(drop=lost("train.contribute", {2, 3}))
        assert r.go() == "ABORTED"
        assert [b["round"] for b in r.bodies("round.aborted")] == [1, 2, 3]
        assert r.spends(0) == [1, 2, 3]
        assert r.bodies("run.end")[0]["model_hash"] == r.bodies("run.open")[0]["model_hash"]
        assert verified(r)

    def test_lost_answers_are_charged_too_and_never_released_again(self, run):
        r = run(drop=lost("train.contribute", {1}, reply=True))
        assert r.go() == "COMPLETED"
        assert r.spends(1) == [1, 2, 3, 4]
        assert verified(r)

    def test_a_contribution_in_another_sites_name_is_that_sites_refusal(self, run):
        def lie(index, action, packet):
            if index != 1 or action != "train.contribute":
                return packet
            return Packet({**packet.header, "site": "site-0001"}, packet.buffers)

        r = run(lie=lie)
        assert r.go() == "COMPLETED"
        assert r.bodies("round.applied")[0]["members"] == ["site-0001", "site-0003", "site-0004"]
        assert {(b["site"], b["code"]) for b in r.bodies("site.refused")} == {("site-0002", "SecureSumError")}

    @pytest.mark.parametrize(
        "change",
        [{"round": 2}, {"nonce": "other"}, {"session": "0" * 64}, {"kind": "else"}],
        ids=lambda c: next(iter(c)),
    )
    def test_a_contribution_to_something_else_is_refused(self, run, change):
        def lie(index, action, packet):
            if index or action != "train.contribute":
                return packet
            return Packet({**packet.header, **change}, packet.buffers)

        r = run(lie=lie, steps=2)
        assert r.go() == "COMPLETED"
        assert all("site-0001" not in b["members"] for b in r.bodies("round.applied")) or change == {"round": 2}
        assert any(b["site"] == "site-0001" for b in r.bodies("site.refused"))

    @pytest.mark.parametrize("data", [b"", b"\0" * 63, b"\0" * 65])
    def test_a_contribution_of_another_length_is_refused(self, run, data):
        def lie(index, action, packet):
            return Packet(packet.header, {"values": data}) if not index and action == "train.contribute" else packet

        r = run(lie=lie, steps=2)
        assert r.go() == "COMPLETED"
        assert all("site-0001" not in b["members"] for b in r.bodies("round.applied"))

    def test_a_model_that_leaves_the_numbers_is_not_applied(self, run, monkeypatch):
        monkeypatch.setattr(ModelState, "after", lambda self, plan, _: self.step(plan, np.full(8, np.nan)))
        r = run()
        assert r.go() == "ABORTED"
        assert {b["reason"] for b in r.bodies("round.aborted")} == {"the model diverged"}
        assert np.isfinite(np.frombuffer((r.folder / "model.f32").read_bytes(), "<f4")).all()

    def test_a_spent_budget_at_enough_sites_ends_the_run_normally(self, run):
        r = run(cap=2.0)  # the filter does not carry all four steps of a plan whose PLD value is the cap
        assert r.go() == "BUDGET_EXHAUSTED"
        carried = r.bodies("run.end")[0]["steps_done"]
        assert 0 < carried < 4
        assert [r.spends(i) for i in range(4)] == [list(range(1, carried + 1))] * 4
        assert verified(r)


class TestLedgersAtTheEnd:
    def handing_in(self, index, change):
        def lie(i, action, packet):
            if i != index or action != "query.finish":
                return packet
            return Packet(packet.header, {"journal": change(packet.buffers["journal"])})

        return lie

    @pytest.mark.parametrize(
        "change",
        [
            lambda b: b"",
            lambda b: b[:-1],
            lambda b: b.replace(b'"round":2', b'"round":3', 1),
            lambda b: b"".join(b.splitlines(keepends=True)[:-3]) + b.splitlines(keepends=True)[-1],
            lambda b: b"\xff\xfe\n",
            lambda b: _upper(b),
        ],
        ids=["empty", "cut", "changed", "removed", "garbage", "upper case"],
    )
    def test_a_ledger_that_does_not_hold_counts_as_missing_and_costs_nobody_the_report(self, run, change):
        r = run(lie=self.handing_in(1, change))
        assert r.go() == "COMPLETED"
        assert sorted(r.bodies("run.end")[0]["heads"]) == ["site-0001", "site-0003", "site-0004"]
        assert verified(r)["ledgers delivered"] == "not delivered: site-0002"

    def test_another_sites_ledger_is_not_ones_own(self, run):
        r = run()
        r.lie = self.handing_in(1, lambda b: b"".join(x.line() for x in r.site(0).ledger.journal.rows))
        r.go()
        assert "site-0002" not in r.bodies("run.end")[0]["heads"]

    def test_a_correctly_signed_ledger_that_breaks_the_rules_is_no_better(self, run):
        r = run()

        def lie(i, action, packet):
            if i == 1 and action == "query.finish":
                ledger = r.site(1).ledger
                ledger.journal.append("spend", {"session": r.job.session, "round": 9, "plan_hash": r.plan.hash,
                                                "event": r.plan.event.to_json()})  # fmt: skip
                return Packet(packet.header, {"journal": b"".join(x.line() for x in ledger.journal.rows)})
            return packet

        r.lie = lie
        r.go()
        assert "site-0002" not in r.bodies("run.end")[0]["heads"]
        assert verified(r)["ledgers delivered"] == "not delivered: site-0002"

    @pytest.mark.parametrize(("kind", "change"), [
        ("session.end", {"status": "ABORTED"}), ("model", {"model_hash": "f" * 64}), ("model", {"round": 1}),
        ("spend", {"plan_hash": "f" * 64}), ("model", {"model_hash": []}), ("session.end", {"status": {}}),
    ])  # fmt: skip
    def test_a_ledger_that_tells_another_run_costs_nobody_the_report(self, run, monkeypatch, kind, change):
        """A member's own rows, well signed, that an auditor would refuse: its ledger is missing, as if it were down."""
        r = run()
        append, add = Journal.append, Journal.add
        said = lambda journal, row, body: {**body, **(change if (row, journal.owner) == (kind, "site-0002") else {})}  # noqa: E731
        monkeypatch.setattr(Journal, "append", lambda j, row, body: append(j, row, said(j, row, body)))
        monkeypatch.setattr(Journal, "add", lambda j, row, body: add(j, row, said(j, row, body)))
        assert r.go() == "COMPLETED"
        assert sorted(r.bodies("run.end")[0]["heads"]) == ["site-0001", "site-0003", "site-0004"]
        assert verified(r)["ledgers delivered"] == "not delivered: site-0002"

    @pytest.mark.parametrize("action", ["query.begin", "query.finish"])
    def test_an_answer_that_is_no_packet_is_that_sites_refusal(self, run, action):
        r = run(lie=lambda i, a, p: RecordDict({}) if (i, a) == (1, action) else p, sum="keysum", steps=2)
        assert r.go() == "COMPLETED"
        assert [(b["site"], b["code"]) for b in r.bodies("site.refused")] == [("site-0002", "WireError")]
        assert ("site-0002" in r.bodies("run.end")[0]["heads"]) is (action == "query.begin")


def _upper(data: bytes) -> bytes:
    """The signature of the last row in upper case: the same bytes to a lenient parser."""
    rows = parse(data)
    changed = dataclasses.replace(rows[-1], sig=rows[-1].sig.upper())
    assert canonical.dumps(changed.sig) != canonical.dumps(rows[-1].sig)
    return b"".join(x.line() for x in [*rows[:-1], changed])


class TestVouching:
    """Members of ``keysum`` that do not vouch for an opened sum."""

    def test_a_round_without_every_fingerprint_is_lost_and_the_member_is_left_out_after_two(self, run):
        r = run(drop=lost("train.fingerprint", {1}), sum="keysum")
        assert r.go() == "COMPLETED"
        aborted = r.bodies("round.aborted")
        assert [b["round"] for b in aborted] == [1, 2]
        assert {b["reason"] for b in aborted} == {
            "round 1: no fingerprint from site-0002", "round 2: no fingerprint from site-0002"
        }  # fmt: skip
        said = [(b["round"], b["site"], b["code"]) for b in r.bodies("site.refused")]
        assert said == [(1, "site-0002", "UnverifiedOpening"), (2, "site-0002", "UnverifiedOpening")]
        others = ["site-0001", "site-0003", "site-0004"]
        assert [(b["round"], b["members"]) for b in r.bodies("round.applied")] == [(3, others), (4, others)]
        assert [r.spends(0), r.spends(1)] == [[1, 2, 3, 4], [1, 2]]

    def test_more_of_them_than_may_be_missing_end_the_run(self, run):
        r = run(drop=lost("train.fingerprint", {1, 2}, reply=True), sum="keysum")
        assert r.go() == "ABORTED"
        assert not r.bodies("round.applied")
        assert not r.job.state.weights.any()
        assert [b["round"] for b in r.bodies("round.open")] == [1, 2], "a round that cannot open charges nobody"
        assert r.spends(0) == [1, 2]

    def test_a_wrong_fingerprint_is_named_where_the_ciphertexts_are_kept(self, run):
        def lie(index, action, packet):
            if (index, action) != (1, "train.fingerprint"):
                return packet
            header = {k: v for k, v in packet.header.items() if k != "signature"} | {"fingerprint": "0" * 70}
            return Packet(sign_header(r.world.keys[1], header))

        r = run(lie=lie, sum="keysum", options={"keep_ciphertexts": True})
        assert r.go() == "COMPLETED"
        assert "that of site-0002 is wrong" in r.bodies("round.aborted")[0]["reason"]
        assert [b["round"] for b in r.bodies("round.applied")] == [3, 4]
        r = run(lie=lie, sum="keysum")
        assert r.go() == "ABORTED"  # nobody can be named, so nobody is left out
        assert all("one of the members is wrong, or the sum" in b["reason"] for b in r.bodies("round.aborted"))
