"""A server that sends the sites another sum than that of their contributions: refused by name, and nothing has moved.

Each lie is what a server can make of an honest round with what it has: every message of it, and no site's key.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedveil.common.errors import HelperRefusal, SecureSumError, UnverifiedOpening
from fedveil.common.wire import Packet, sha256
from fedveil.privacy.secagg import _seal, lattice, residuals, shamir, verification
from fedveil.privacy.secagg import fingerprint as fingerprints
from fedveil.privacy.secagg import keysum_common as messages
from fedveil.privacy.secagg.keysum_opening import Answer, Opening, Vouched, answers_digest
from fedveil.privacy.secagg.params import Q, choose
from fedveil.privacy.secagg.server import server_sum

VALUES = np.arange(6)


class Round:
    """Five sites of which three open a sum; everything of one honest round is at hand."""

    def __init__(self, new_world: Any, members: int = 5, number: int = 1) -> None:
        self.w = new_world(5, 0, 3, 3)
        self.go(members, number)

    def go(self, members: int = 5, number: int = 1) -> Round:
        w = self.w
        w.packets = {s: w.sites[s].contribute(number, "n", VALUES) for s in w.names[:members]}
        w.server.start_round(number, "n")
        for s, p in w.packets.items():
            w.server.add(s, p)
        for s, request in w.server.agree_requests().items():
            w.server.add_agreement(s, w.sites[s].agree(request))
        for s, request in w.server.open_requests().items():
            w.server.add_answer(s, w.sites[s].open(request))
        self.asked = w.server.fingerprint_requests()
        self.told = {s: w.sites[s].fingerprint(request) for s, request in self.asked.items()}
        return self

    def opening(self) -> Opening:
        for s, packet in self.told.items():
            self.w.server.add_fingerprint(s, packet)
        return Opening.parse(self.w.spec, self.w.server.opened())

    def sum(self, o: Opening) -> np.ndarray:
        """The sum of ciphertexts that an opening claims."""
        p, key = choose(self.w.spec), verification._key(self.w.spec, o)
        a = lattice.PublicPolynomials(self.w.spec.session, o.round, o.nonce).take(p.blocks)
        x = lattice.from_bytes(o.phases)
        return lattice.reduce((x - _seal.engine(p.plain_bits).multiply(a, key)).view(np.int64))

    def shifted(self, o: Opening) -> Opening:
        """The phases of a sum that is one larger in its first value."""
        x = lattice.from_bytes(o.phases)
        x[0, 0] = (int(x[0, 0]) + choose(self.w.spec).delta) % Q
        return replace(o, phases=lattice.to_bytes(x))


def test_an_honest_sum_is_taken_by_every_site_and_verified_once(new_world, monkeypatch):
    r, calls, verify = Round(new_world), list[int](), verification.verify
    monkeypatch.setattr(verification, "verify", lambda *a: calls.append(1) or verify(*a))
    packet = r.opening().packet(r.w.spec)
    for site in r.w.sites.values():
        values, members = site.opened(packet)
        assert values.tolist() == (5 * VALUES).tolist()
        assert members == tuple(r.w.names)
        with pytest.raises(ValueError, match="read-only"):
            values[0] = 1
    assert len(calls) == 1
    data = packet.buffers["opening"]
    first = r.w.sites[r.w.names[0]]
    first.opened(Packet(dict(packet.header), {"opening": bytes(bytearray(data))}))  # equal bytes, other objects
    assert len(calls) == 1
    with pytest.raises(UnverifiedOpening):
        first.opened(Packet(packet.header, {"opening": data[:-1] + bytes([data[-1] ^ 1])}))
    assert len(calls) == 2


def x_alone(r: Round, o: Opening) -> Opening:
    return r.shifted(o)


def x_and_hash(r: Round, o: Opening) -> Opening:
    """Σc is replaced too, so that x, S and the hash fit: the challenge is another one."""
    o = r.shifted(o)
    return replace(o, total=sha256(lattice.to_bytes(r.sum(o))))


def x_that_any_error_would_hide(r: Round, o: Opening) -> Opening:
    """The server moves x within what rounding hides: the values stay."""
    x = lattice.from_bytes(o.phases)
    x[0, 0] = (int(x[0, 0]) + 1) % Q
    return replace(o, phases=lattice.to_bytes(x))


def hash_alone(r: Round, o: Opening) -> Opening:
    return replace(o, total="0" * 64)


def another_set(r: Round, o: Opening) -> Opening:
    members = dict(list(o.members.items())[:4])
    return replace(o, members=members)


def another_contribution(r: Round, o: Opening) -> Opening:
    last = r.w.names[4]
    return replace(o, members={**o.members, last: replace(o.members[last], digest="0" * 64)})


def another_nonce(r: Round, o: Opening) -> Opening:
    return replace(o, nonce="m")


def another_round(r: Round, o: Opening) -> Opening:
    """A later round opens with the fingerprints of the first."""
    before = o.members
    later = r.go(number=2).opening()
    return replace(later, members={s: replace(m, fingerprint=before[s].fingerprint) for s, m in later.members.items()})


def a_whole_row_of_another_round(r: Round, o: Opening) -> Opening:
    first = r.w.names[0]
    later = r.go(number=2).opening()
    return replace(later, members={**later.members, first: o.members[first]})


def a_fingerprint(r: Round, o: Opening) -> Opening:
    last = r.w.names[4]
    one = o.members[last].fingerprint
    return replace(o, members={**o.members, last: replace(o.members[last], fingerprint=((one[0] + 1) % Q, *one[1:]))})


def two_that_cancel(r: Round, o: Opening) -> Opening:
    (a, x), (b, y), *rest = o.members.items()
    more, less = ((f[0] + d) % Q for f, d in ((x.fingerprint, 1), (y.fingerprint, -1)))
    return replace(o, members={
        a: replace(x, fingerprint=(more, *x.fingerprint[1:])), b: replace(y, fingerprint=(less, *y.fingerprint[1:])),
        **dict(rest),
    })  # fmt: skip


def an_answer(r: Round, o: Opening) -> Opening:
    first, answer = next(iter(o.answers.items()))
    data = bytes([answer.shares[0] ^ 1]) + answer.shares[1:]
    return replace(o, answers={**o.answers, first: Answer(data, answer.signature)})


def an_answer_of_another_round(r: Round, o: Opening) -> Opening:
    later, first = r.go(number=2).opening(), next(iter(o.answers))
    return replace(later, answers={**later.answers, first: o.answers[first]})


def other_helpers_answers(r: Round, o: Opening) -> Opening:
    """Answers that are right and signed, and not the ones that the members were asked about."""
    named = [s for s in r.w.names if s not in o.answers][:1]
    request = {s: r.w.ask(s, r.w.names, {n: r.w.forge(n, r.w.digest(r.w.names)) for n in r.w.names}) for s in named}
    found = {s: r.w.sites[s].open(q) for s, q in request.items()}
    kept = dict(list(o.answers.items())[1:]) | {
        s: Answer(p.buffers["answer"], p.header["signature"]) for s, p in found.items()
    }
    return replace(o, answers={s: kept[s] for s in r.w.names if s in kept})


LIES: dict[str, tuple[Callable[[Round, Opening], Opening], str]] = {
    "another x": (x_alone, "not the one whose hash"),
    "another x within the errors": (x_that_any_error_would_hide, "not the one whose hash"),
    "another x and its sum": (x_and_hash, "fingerprint of 's0'"),
    "another hash": (hash_alone, "fingerprint of 's0'"),
    "another U": (another_set, "other members"),
    "another contribution in U": (another_contribution, "other members"),
    "another nonce": (another_nonce, "fingerprint of 's0'"),
    "fingerprints of another round": (another_round, "fingerprint of 's0'"),
    "a member's row of another round": (a_whole_row_of_another_round, "other members"),
    "a member's fingerprint": (a_fingerprint, "fingerprint of 's4'"),
    "two fingerprints that cancel": (two_that_cancel, "fingerprint of 's0'"),
    "an answer": (an_answer, "answer of 's0'"),
    "an answer of another round": (an_answer_of_another_round, "answer of 's0'"),
    "other helpers' answers": (other_helpers_answers, "fingerprint of 's0'"),
}


@pytest.mark.parametrize("what", LIES)
def test_a_lie_about_the_sum_is_refused_by_name(new_world, what):
    r, (lie, said) = Round(new_world), LIES[what]
    packet = lie(r, r.opening()).packet(r.w.spec)
    for site in r.w.sites.values():
        with pytest.raises(UnverifiedOpening, match=said):
            site.opened(packet)


@pytest.mark.parametrize("what", ["another U", "another contribution in U", "another x and its sum"])
def test_a_site_that_took_no_part_in_the_round_refuses_too(new_world, what):
    r = Round(new_world, members=5)
    site = r.w.sites[r.w.names[4]]
    site._store.erase(site._session.name("agreed", 1))  # it signed nothing
    with pytest.raises(UnverifiedOpening):
        site.opened(LIES[what][0](r, r.opening()).packet(r.w.spec))


def test_with_the_fingerprints_unchecked_another_sum_is_taken(new_world, monkeypatch):
    """The negative control: the lie is right in everything else."""
    r = Round(new_world)
    packet = x_and_hash(r, r.opening()).packet(r.w.spec)
    monkeypatch.setattr(verification, "_vouched", lambda spec, o: o.challenge(spec))
    monkeypatch.setattr(fingerprints, "added", lambda _: equal_to_all())
    assert r.w.sites[r.w.names[0]].opened(packet)[0].tolist() == [1, *(5 * VALUES[1:])]


def equal_to_all() -> Any:
    return type("Any", (), {"__ne__": lambda *_: False})()


def vouched(r: Round, o: Opening) -> Opening:
    """``o`` as the members vouch for it if it is the first that they are asked about."""
    w = r.w
    for s in w.names:
        w.stores[s].erase(w.sites[s]._session.name("fingerprint", 1))
    request = Packet({**r.asked[w.names[0]].header, "sum": o.total, "answers": answers_digest(o.answers)})
    told = {s: w.sites[s].fingerprint(request).header for s in w.names}
    found = {s: fingerprints.from_bytes(bytes.fromhex(h["fingerprint"])) for s, h in told.items()}
    return replace(o, members={s: Vouched(o.members[s].digest, found[s], told[s]["signature"]) for s in w.names})


@pytest.mark.parametrize("judged", [True, False])
def test_a_sum_of_keys_that_a_helper_moved_with_an_x_that_fits_is_refused_for_its_errors(
    new_world, monkeypatch, judged
):
    """Σc, the hash, the fingerprints and all signatures are right. With free errors (negative control) it is taken."""
    r = Round(new_world)
    w, o = r.w, r.opening()
    total, helper = r.sum(o), list(o.answers)[2]
    row = np.frombuffer(o.answers[helper].shares, "<u2").astype(np.int64)
    row[7] = (row[7] + 1) % shamir.P  # the weight of the third of three points at zero is 1
    data = row.astype("<u2").tobytes()
    header = messages.answer_header(w.spec, 1, helper, o.digest(w.spec), sha256(data))
    answer = Answer(data, messages.sign_header(w.keys[helper], header)["signature"])
    o = replace(o, answers={**o.answers, helper: answer})
    p, a = choose(w.spec), lattice.PublicPolynomials(w.spec.session, 1, "n").take(1)
    product = _seal.engine(p.plain_bits).multiply(a, verification._key(w.spec, o))
    o = vouched(r, replace(o, phases=lattice.to_bytes(lattice.reduce((total + product).view(np.int64)))))
    if judged:
        with pytest.raises(UnverifiedOpening, match="honest sites"):
            w.sites[w.names[0]].opened(o.packet(w.spec))
        return
    monkeypatch.setattr(residuals, "EXCESS", np.inf)
    monkeypatch.setattr(residuals.lattice, "unpack_values", lambda m, p, out: out.fill(0))
    w.sites[w.names[0]].opened(o.packet(w.spec))


def test_a_member_that_colludes_can_choose_the_sum_afterwards(new_world):
    """The limit that docs/threat-model.md states: its fingerprint is only its word."""
    r = Round(new_world)
    w, colluder = r.w, r.w.names[4]
    o = vouched(r, x_and_hash(r, r.opening()))
    with pytest.raises(UnverifiedOpening, match="do not add up"):
        w.sites[w.names[0]].opened(o.packet(w.spec))
    challenge = o.challenge(w.spec)
    whole = fingerprints.of(challenge, lattice.to_bytes(r.sum(o)))
    honest = fingerprints.added([m.fingerprint for s, m in o.members.items() if s != colluder])
    rest = tuple((x - y) % Q for x, y in zip(whole, honest, strict=True))
    header = messages.fingerprint_header(w.spec, 1, colluder, o.digest(w.spec), challenge, rest)
    row = Vouched(o.members[colluder].digest, rest, messages.sign_header(w.keys[colluder], header)["signature"])
    o = replace(o, members={**o.members, colluder: row})
    assert w.sites[w.names[0]].opened(o.packet(w.spec))[0].tolist() == [1, *(5 * VALUES[1:])]


class TestTheMember:
    """Whom it vouches for, and how often."""

    def asked(self, r: Round, **changes: Any) -> Packet:
        return Packet({**r.asked[r.w.names[0]].header, **changes})

    def test_the_same_request_gets_the_same_bytes_after_a_restart_too(self, new_world):
        r = Round(new_world)
        again = [r.w.fresh(s).fingerprint(r.asked[s]) for s in r.w.names]
        assert again == list(r.told.values())

    @pytest.mark.parametrize("what", [{"sum": "0" * 64}, {"answers": "0" * 64}])
    def test_a_second_challenge_is_refused_after_a_restart_too(self, new_world, what):
        r, name = Round(new_world), new_world(2, 0, 2, 2).names[0]
        for site in (r.w.sites[name], r.w.fresh(name)):
            with pytest.raises(HelperRefusal, match="another opening of round 1"):
                site.fingerprint(self.asked(r, **what))
            assert site.fingerprint(r.asked[name]) == r.told[name]

    def test_it_vouches_for_nothing_that_it_did_not_contribute_to(self, new_world):
        r = Round(new_world, members=4)
        left_out, member = r.w.sites[r.w.names[4]], r.w.sites[r.w.names[0]]
        with pytest.raises(HelperRefusal, match="not among the members"):
            left_out.fingerprint(self.asked(r))
        rows = r.asked[r.w.names[0]].header["members"]
        for store in r.w.stores.values():
            store.erase(member._session.name("agreed", 1))
        member._store.erase(member._session.name("fingerprint", 1))
        with pytest.raises(HelperRefusal, match="not among the members"):
            member.fingerprint(self.asked(r, members=[[rows[0][0], "0" * 64], *rows[1:]]))
        with pytest.raises(HelperRefusal, match="another nonce"):
            member.fingerprint(self.asked(r, nonce="m"))
        r.w.sites[r.w.names[0]].contribute(2, "n", VALUES)  # the one of round 1 is erased
        with pytest.raises(HelperRefusal, match="not among the members"):
            member.fingerprint(self.asked(r))

    def test_a_helper_vouches_for_no_set_but_the_one_that_it_signed(self, new_world):
        r = Round(new_world)
        site = r.w.sites[r.w.names[0]]
        site._store.erase(site._session.name("fingerprint", 1))
        with pytest.raises(HelperRefusal, match="other members"):
            site.fingerprint(self.asked(r, members=r.asked[r.w.names[0]].header["members"][:4]))

    @pytest.mark.parametrize("change", [
        {"members": None}, {"members": []}, {"members": [1, 2, 3]}, {"members": [["s0", "0" * 64]] * 3},
        {"members": [["s0", 1], ["s1", 1], ["s2", 1]]}, {"members": [[[], "0" * 64]] * 3}, {"sum": 1}, {"answers": "x"},
        {"nonce": 1}, {"nonce": ""}, {"round": "1"}, {"round": -1}, {"session": "0" * 64}, {"kind": "keysum/members"},
        {"members": [["s1", "0" * 64], ["s0", "0" * 64], ["s2", "0" * 64]]},
    ])  # fmt: skip
    def test_a_malformed_request_is_refused(self, new_world, change):
        r = Round(new_world)
        with pytest.raises(HelperRefusal):
            r.w.sites[r.w.names[0]].fingerprint(self.asked(r, **change))


class TestTheServer:
    """It sends nothing that not every member vouched for, and names who did not."""

    def test_a_missing_fingerprint_is_named(self, new_world):
        r = Round(new_world)
        for s in r.w.names[1:]:
            r.w.server.add_fingerprint(s, r.told[s])
        with pytest.raises(UnverifiedOpening, match="no fingerprint from s0"):
            r.w.server.opened()
        assert r.w.server.unvouched == (r.w.names[0],)
        r.w.server.add_fingerprint(r.w.names[0], r.told[r.w.names[0]])
        assert r.w.sites[r.w.names[0]].opened(r.w.server.opened())[0].tolist() == (5 * VALUES).tolist()

    @pytest.mark.parametrize("kept", [False, True])
    def test_a_wrong_fingerprint_is_found_and_named_where_ciphertexts_are_kept(self, new_world, tmp_path, kept):
        r = Round.__new__(Round)
        r.w = new_world(5, 0, 3, 3)
        joins = {s: site.join_fields() for s, site in r.w.sites.items()}
        r.w.server = server_sum(r.w.spec, tmp_path / "kept" if kept else None)
        r.w.server.begin(joins, {s: site.begin(joins) for s, site in r.w.sites.items()})
        r.go()
        liar, header = r.w.names[2], dict(r.told[r.w.names[2]].header)
        del header["signature"]
        header["fingerprint"] = "0" * 2 * fingerprints.BYTES
        r.told[liar] = Packet(messages.sign_header(r.w.keys[liar], header))
        for s, p in r.told.items():
            r.w.server.add_fingerprint(s, p)
        with pytest.raises(UnverifiedOpening, match="of s2 is wrong" if kept else "one of the members is wrong, or"):
            r.w.server.opened()
        assert r.w.server.unvouched == ((liar,) if kept else ())
        if kept:
            names = sorted(p.name for p in (tmp_path / "kept").iterdir())
            assert names == [f"1-{i}" for i in range(1, 6)]
            assert {p.stat().st_mode & 0o777 for p in (tmp_path / "kept").iterdir()} == {0o600}
            sealed = r.w.packets[liar].buffers["shares"][:64]
            assert not any(sealed in p.read_bytes() for p in (tmp_path / "kept").iterdir())

    def test_a_forged_or_second_fingerprint_is_refused(self, new_world):
        r, (a, b) = Round(new_world), new_world(2, 0, 2, 2).names
        for site, packet in ((a, r.told[b]), (a, Packet({**r.told[a].header, "challenge": "0" * 64}))):
            with pytest.raises(SecureSumError):
                r.w.server.add_fingerprint(site, packet)
        for bad in ("", "0" * 68, None, 5, "f" * 70):
            with pytest.raises((SecureSumError, messages.WireError)):
                r.w.server.add_fingerprint(a, Packet({**r.told[a].header, "fingerprint": bad}))
        r.w.server.add_fingerprint(a, r.told[a])
        with pytest.raises(SecureSumError, match="answered before"):
            r.w.server.add_fingerprint(a, r.told[a])
        r.w.server.start_round(2, "n")
        with pytest.raises(SecureSumError, match="no member was asked"):
            r.w.server.opened()
