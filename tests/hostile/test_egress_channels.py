"""An enumerated list of ways in which one record's value could leave a site by mistake; each is tried and fails.

Every channel is a handler that was changed to give the value away. It is tried with two values; what the server gets
must be the same for both, and must hold no spelling of either. The negative control opens the gate: then each channel
does leak, so each test could fail. The list proves nothing about channels that are not on it.
"""

from __future__ import annotations

import base64
import logging
import os
import secrets
import struct
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, RecordDict

from fedveil.client import app as client_app
from fedveil.client import round as line
from fedveil.client.egress import gate as egress
from fedveil.client.egress.gate import HELD, Cleared, Gate, spoken
from fedveil.client.session import Site
from fedveil.common import canonical, errors, flwr_adapter, identity
from fedveil.common.identity import SERVER, Member, Roster
from fedveil.common.settings import LimitsSection
from fedveil.common.units import Delta, Epsilon, SiteId
from fedveil.common.wire import Limits, Packet
from fedveil.common.workload.model import ModelSpec
from fedveil.privacy.ledger import Ledger
from fedveil.privacy.plan import Optimizer, make_plan
from fedveil.privacy.secagg import keysum_common as keysum
from fedveil.privacy.secagg.keysum_site import KeysumSite
from fedveil.privacy.secagg.store import DirectoryStore, MemoryStore
from fedveil.privacy.start import start

CONTRACT, VALUES = "c" * 64, (0.8714562177658081, 0.3321099877357483)  # both exact in float32


def spellings(value: float) -> list[bytes]:
    """The value as somebody might write it."""
    raw = [struct.pack(f, value) for f in ("<f", ">f", "<d", ">d")]
    words = [repr(value), f"{value:.6f}", f"{value:.5e}", str(round(value * 1e6))]
    return [*raw, *(w.encode() for w in words), *(r.hex().encode() for r in raw), *map(base64.b64encode, raw)]


class World:
    """Four sites; the first one's record 3 holds the value."""

    def __init__(self, folder: Path, value: float, reveal_to: str = "server") -> None:
        self.value, self.session = value, secrets.token_hex(32)
        self.plan = make_plan(
            sites=4, records=40, epsilon=2.0, steps=4, clip=1.0, contract_hash=CONTRACT,
            model=ModelSpec(name="logistic", inputs=3, classes=2), optimizer=Optimizer(learning_rate=0.5),
            reveal_to=reveal_to,  # type: ignore[arg-type]
        )  # fmt: skip
        keys = [identity.new_signing_key() for _ in range(4)]
        members = tuple(Member(SiteId(f"site-{i}"), identity.public_hex(k)) for i, k in enumerate(keys))
        self.roster = Roster("small", Member(SERVER, "a" * 64), members)
        self.sites = [self._site(folder / f"{i}-{secrets.token_hex(4)}", i, k) for i, k in enumerate(keys)]
        self.sites[0].X[3, 1] = value
        self.state = start(self.plan).hash if reveal_to == "sites" else start(self.plan).digest
        self.lies: dict[str, Callable[..., Packet]] = {}
        self.now = 100.0

    def _site(self, folder: Path, index: int, key: Any) -> Site:
        rng = np.random.default_rng(index)
        member = self.roster.sites[index]
        ledger = Ledger.open(
            folder / "ledger.jsonl", member.site, key, lineage="small", cap=Epsilon(3.0), delta=Delta(1e-5),
            durable=False,
        )  # fmt: skip
        stores: dict[str, MemoryStore] = {}
        return Site(
            id=member.site, key=key, roster=self.roster, contract_hash=CONTRACT, width=3, classes=2,
            limits=LimitsSection(max_epsilon=3.0), X=rng.standard_normal((10, 3)).astype(np.float32),
            y=rng.integers(0, 2, 10), evidence={}, ledger=ledger, engine="closed", capacity=12,
            store_for=lambda session: stores.setdefault(session, MemoryStore()),
        )  # fmt: skip

    def packet(self, action: str) -> Packet:
        """An honest server's request."""
        header: dict[str, Any] = {"kind": action, "session": self.session}
        if action == "join":
            header |= {"plan": self.plan.to_json(), "roster_hash": self.roster.hash, "contract_hash": CONTRACT}
        elif action == "begin":
            header["joins"] = {s.id: line.join(s, self.packet("join")).header["statement"] for s in self.sites}
        elif action == "contribute":
            header |= {"round": 1, "nonce": "n", "plan_hash": self.plan.hash, "state": self.state}
        elif action == "agree":
            made = [line.contribute(s, self.packet("contribute")) for s in self.sites]
            header |= {"kind": keysum.MEMBERS, "round": 1, "nonce": "n", "members": [p.header for p in made]}
        elif action == "fingerprint":
            made = [line.contribute(s, self.packet("contribute")) for s in self.sites]
            rows = [[p.header["site"], canonical.digest(p.header)] for p in made]
            header |= {"kind": keysum.CHALLENGE, "round": 1, "nonce": "n", "members": rows}
            header |= {"sum": "0" * 64, "answers": "0" * 64}
        elif action == "finish":
            header |= {"status": "COMPLETED", "round": 1, "model_hash": start(self.plan).hash, "state": self.state}
        return Packet(header)

    def ready(self, action: str) -> World:
        """Everything that comes before ``action``, honestly."""
        if action != "join":
            begin = self.packet("begin")
            if action != "begin":
                for s in self.sites:
                    line.begin(s, begin)
        return self

    def ask(self, action: str, gate: Gate | None = None) -> tuple[bytes, float]:
        """What the server gets to see: the reply, all of it, and how long it took."""
        request = self.packet(action)
        gate = gate or Gate(1.0, clock=lambda: self.now, sleep=self._sleep)

        @contextmanager
        def resolve(_: Context):
            yield self.sites[0]

        group = "train" if action in ("contribute", "agree", "open", "fingerprint") else "query"
        message = flwr_adapter.request(request, to=2, action=f"{group}.{action}", round=1)
        flwr_adapter.stamp(message)
        before = self.now
        reply = flwr_adapter.answer(client_app.make_app(resolve, gate), message, Context(1, 2, {}, RecordDict(), {}))
        if reply.has_error():
            return (reply.error.reason or "").encode(), self.now - before
        found = flwr_adapter.from_record(reply.content, Limits())
        return canonical.dumps(found.header) + b"".join(found.buffers.values()), self.now - before

    def _sleep(self, seconds: float) -> None:
        self.now += seconds


Change = Callable[[World, Packet], Packet]
CHANNELS: dict[str, tuple[str, Change]] = {}


def channel(name: str, action: str) -> Callable[[Change], Change]:
    def add(change: Change) -> Change:
        CHANNELS[name] = (action, change)
        return change

    return add


def _header(**more: Callable[[World], Any]) -> Change:
    return lambda w, p: Packet({**p.header, **{k: f(w) for k, f in more.items()}}, p.buffers)


def _as_hash(w: World) -> str:
    return canonical.sha256_hex(repr(w.value).encode())


for _name, _action, _change in [
    ("a metric beside the update", "contribute", _header(loss=lambda w: w.value)),
    ("num_examples", "contribute", _header(num_examples=lambda w: int(w.value * 1000))),
    ("a count in the join statement's envelope", "join", _header(records=lambda w: int(w.value * 1000))),
    ("the configuration echoed", "begin", _header(config=lambda w: {"seed": w.value})),
    ("a log line sent along", "begin", _header(log=lambda w: f"record 3 is {w.value}")),
    ("a remark on a relayed key", "contribute", _header(warning=lambda w: f"{w.value}")),
    ("the round's number", "contribute", _header(round=lambda w: int(w.value * 1000))),
    ("the round as another type", "contribute", _header(round=lambda w: 1.0 if w.value > 0.5 else True)),
    ("the nonce", "contribute", _header(nonce=lambda w: repr(w.value))),
    ("the site's name", "contribute", _header(site=lambda w: f"site-{w.value}")),
    ("a plain hash in place of the ciphertext's", "contribute", _header(ciphertext=_as_hash)),
    ("a plain hash in place of the signature", "contribute", _header(signature=lambda w: 2 * _as_hash(w))),
    ("a forged journal head", "contribute", _header(head=lambda w: [1, _as_hash(w), _as_hash(w)])),
    ("a made-up number of rows", "contribute", _header(head=lambda w: [int(w.value * 1000), "0" * 64, "0" * 64])),
    ("a plain hash as the members' digest", "agree", _header(digest=_as_hash)),
    ("a plain hash as the challenge", "fingerprint", _header(challenge=_as_hash)),
    ("a fingerprint of other lengths", "fingerprint", _header(fingerprint=lambda w: "0" * int(w.value * 1000))),
    ("a metric beside the fingerprint", "fingerprint", _header(loss=lambda w: w.value)),
    ("the message's kind", "contribute", _header(kind=lambda w: f"keysum/{w.value}")),
    ("the ledger's head at the end", "finish", _header(head=lambda w: [int(w.value * 1000), _as_hash(w)])),
    ("a header's name", "contribute", lambda w, p: Packet({**p.header, f"m{w.value}": 0}, p.buffers)),
    ("a buffer of its own", "contribute",
     lambda w, p: Packet(p.header, {**p.buffers, "metrics": spellings(w.value)[0]})),
    ("a buffer's name", "contribute", lambda w, p: Packet(p.header, {**p.buffers, f"x{round(w.value * 1e6)}": b""})),
    ("a longer ciphertext", "contribute",
     lambda w, p: Packet(p.header, {**p.buffers, "ciphertext": p.buffers["ciphertext"] + spellings(w.value)[2]})),
    ("records in place of the ciphertext", "contribute",
     lambda w, p: Packet(p.header, {
         **p.buffers, "ciphertext": spellings(w.value)[2].ljust(len(p.buffers["ciphertext"])),
     })),
    ("the size alone", "contribute",
     lambda w, p: Packet(p.header, {**p.buffers, "shares": p.buffers["shares"] + bytes(int(w.value * 1000))})),
    ("a row appended to the journal handed over", "finish",
     lambda w, p: Packet(p.header, {"journal": p.buffers["journal"] + f'{{"mean":{w.value}}}\n'.encode()})),
]:  # fmt: skip
    CHANNELS[_name] = (_action, _change)


@channel("a signed count in the statement", "join")
def _signed_count(w: World, p: Packet) -> Packet:
    payload = {**p.header["statement"]["payload"], "records": w.value}
    return Packet({**p.header, "statement": identity.signed(w.sites[0].key, "fedveil/join/1", payload)})


@channel("a peer that does not exist in the statement", "join")
def _peer(w: World, p: Packet) -> Packet:
    payload = dict(p.header["statement"]["payload"])
    payload["peers"] = {"site-9": [int(w.value * 1e6), _as_hash(w), _as_hash(w)]}
    return Packet({**p.header, "statement": identity.signed(w.sites[0].key, "fedveil/join/1", payload)})


@channel("a value in place of the ephemeral key", "join")
def _key(w: World, p: Packet) -> Packet:
    payload = {**p.header["statement"]["payload"], "fields": {"x25519": _as_hash(w)}}
    return Packet({**p.header, "statement": identity.signed(w.sites[0].key, "fedveil/join/1", payload)})


def _noting(kind: str, body: Callable[[World], dict[str, Any]]) -> Change:
    def change(w: World, _: Packet) -> Packet:
        ledger = w.sites[0].ledger
        ledger.note(kind, **body(w))
        lines = b"".join(row.line() for row in ledger.journal.rows)
        return Packet({"kind": "finished", "head": list(ledger.head)}, {"journal": lines})

    return change


for _name, _kind, _body in [
    ("a row of a kind of its own", "data.quality", lambda w: {"mean": w.value}),
    ("a count in the evidence", "data.released", lambda w: {"unit": "one row", "rows": int(w.value * 1000)}),
    ("information loss among the criteria", "data.released",
     lambda w: {"criteria": {"k-anonymity": {"required": 5, "met": True, "worst": w.value}}}),
    ("detail in a refusal", "refused", lambda w: {"session": w.session, "reason": f"record 3 is {w.value}"}),
    ("a comment on the model", "model",
     lambda w: {"session": w.session, "round": 1, "model_hash": "d" * 64, "accuracy": w.value}),
    ("the ending's status", "session.end", lambda w: {"session": w.session, "status": f"loss {w.value:.6f}"}),
    ("the model's name", "model", lambda w: {"session": w.session, "round": 1, "model_hash": f"best-{w.value}"}),
]:  # fmt: skip
    CHANNELS[f"journal: {_name}"] = ("finish", _noting(_kind, _body))


def leaking(w: World, action: str, change: Change, monkeypatch: pytest.MonkeyPatch) -> World:
    """The site answers ``action`` through ``change``."""
    honest = getattr(line, action)
    own = w.ready(action).packet  # the other sites' answers are made by the honest handlers
    made = own(action)
    monkeypatch.setattr(w, "packet", lambda a: made if a == action else own(a))
    monkeypatch.setattr(line, action, lambda site, request: change(w, honest(site, request)))
    return w


def attempt(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch, gate: type[Gate] = Gate
) -> list[tuple[bytes, float]]:
    """What the server gets for each of the two values."""
    action, change = CHANNELS[name]
    out = []
    for value in VALUES:
        with monkeypatch.context() as patch:
            w = leaking(World(folder, value), action, change, patch)
            out.append(w.ask(action, gate(1.0, clock=lambda w=w: w.now, sleep=w._sleep)))
    return out


class Open(Gate):
    """The negative control: a gate that holds nothing back."""

    def cleared(self, packet: Packet, action: str, request: Packet, site: Site) -> Cleared:
        return Cleared(packet)


@pytest.mark.parametrize("name", CHANNELS)
def test_a_changed_answer_does_not_leave(name, tmp_path, monkeypatch):
    (a, when_a), (b, when_b) = attempt(tmp_path, name, monkeypatch)
    assert a == b
    assert HELD.encode() in a
    assert when_a == when_b == 1.0
    for value in VALUES:
        assert not any(s in a for s in spellings(value))


@pytest.mark.parametrize("name", CHANNELS)
def test_without_the_gate_it_does(name, tmp_path, monkeypatch):
    (a, _), (b, _) = attempt(tmp_path, name, monkeypatch, Open)
    assert a != b
    assert HELD.encode() not in a


@pytest.mark.parametrize("action", ["join", "begin", "contribute", "agree", "fingerprint", "finish"])
def test_honest_answers_leave_and_hold_no_spelling(action, tmp_path):
    for value in VALUES:
        w = World(tmp_path, value).ready(action)
        w.now = 100.0
        said, took = w.ask(action)
        assert HELD.encode() not in said
        assert b'"kind"' in said
        assert not any(s in said for s in spellings(value) if len(s) > 4)
        assert took == (1.0 if action == "contribute" else 0.0)


def test_a_contribution_that_was_never_charged_does_not_leave(tmp_path, monkeypatch):
    w = World(tmp_path, VALUES[0]).ready("contribute")
    site = w.sites[0]
    packet = w.packet("contribute")
    made = site.session(w.session).sum.contribute(1, "n", np.zeros(8, np.int64))
    monkeypatch.setattr(line, "contribute", lambda *_: made)
    assert HELD.encode() in w.ask("contribute")[0]
    site.ledger.reserve(w.session, 1, w.plan.hash, w.plan.event)
    assert HELD.encode() in w.ask("contribute")[0]  # charged, but not yet handed on
    site.ledger.commit(w.session, 1)
    assert HELD.encode() not in w.ask("contribute")[0]
    site.limits = LimitsSection(max_epsilon=3.0, min_noise_multiplier=1000.0)
    assert HELD.encode() in w.ask("contribute")[0]  # the owner's limits changed meanwhile
    assert packet.header["round"] == 1


def test_a_round_charged_for_less_than_the_plan_says_does_not_leave(tmp_path, monkeypatch):
    w = World(tmp_path, VALUES[0]).ready("contribute")
    site = w.sites[0]
    made = site.session(w.session).sum.contribute(1, "n", np.zeros(8, np.int64))
    cheap = type(w.plan.event)(w.plan.event.sample_rate, 10 * w.plan.event.noise_multiplier)
    site.ledger.reserve(w.session, 1, w.plan.hash, cheap)
    site.ledger.commit(w.session, 1)
    monkeypatch.setattr(line, "contribute", lambda *_: made)
    assert HELD.encode() in w.ask("contribute")[0]


ERRORS = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.FedveilError)]


class TestErrors:
    """What goes wrong: exceptions of any class, their words, their chains."""

    @pytest.mark.parametrize("cls", [ValueError, KeyError, RuntimeError, MemoryError, OSError, AssertionError])
    def test_a_foreign_exception_says_nothing(self, cls, tmp_path, monkeypatch):
        self.same(tmp_path, monkeypatch, lambda v: cls(f"record 3 is {v}"))

    @pytest.mark.parametrize("cls", [c for c in ERRORS if not issubclass(c, egress.SPOKEN)], ids=lambda c: c.__name__)
    def test_ours_say_their_class(self, cls, tmp_path, monkeypatch):
        self.same(tmp_path, monkeypatch, lambda v: cls(f"record 3 is {v}", hint=f"{v}"))

    def test_a_cause_is_not_told(self, tmp_path, monkeypatch):
        def chained(v: float) -> Exception:
            error = errors.PolicyRefusal("no")
            error.__cause__, error.__context__ = ValueError(f"{v}"), KeyError(f"{v}")
            error.add_note(f"{v}")
            return error

        self.same(tmp_path, monkeypatch, chained)

    @pytest.mark.parametrize(("module", "function"), [
        ("fedveil.client.train", "site_sum"), ("fedveil.client.statistics", "predictions"),
        ("fedveil.client.records.release.encode", "encode"), ("fedveil.privacy.anonymization.fixed", "recode"),
        ("fedveil.privacy.dp.statistics", "clipped_sum"),
    ])  # fmt: skip
    @pytest.mark.parametrize("cls", egress.SPOKEN, ids=lambda c: c.__name__)
    def test_words_from_where_records_are_held_stay(self, module, function, cls):
        """Whatever its class: an error that passed through such a function has no words."""
        space: dict[str, Any] = {"__name__": module, "fail": self.fail}
        exec(f"def {function}(e):\n    fail(e)", space)
        error = cls(f"record 3 is {VALUES[0]}")
        with pytest.raises(cls):
            space[function](error)
        assert str(VALUES[0]) not in str(spoken(error))
        assert type(spoken(error)) is cls

    @pytest.mark.parametrize("refused", ["link", "open", "read_bytes"])
    def test_a_full_or_broken_disk_does_not_name_the_folder(self, refused, tmp_path, monkeypatch):
        """Folders are named after people: a session's store says where it is in the site's own log only."""
        said = []
        for person in ("Dr-Mueller", "Dr-Ngata"):
            w = World(tmp_path, VALUES[0])
            w.sites[0].store_for = lambda s, p=person: DirectoryStore(tmp_path / p / "sessions" / s)
            w.ready("contribute")
            made = w.packet("contribute")
            monkeypatch.setattr(w, "packet", lambda _, made=made: made)

            def full(*_: Any, **__: Any) -> None:
                raise OSError(28, "No space left on device")

            with monkeypatch.context() as patch:
                patch.setattr(Path if refused == "read_bytes" else os, refused, full)
                said.append(w.ask("contribute")[0])
        assert said[0] == said[1]
        assert b"StoreError" in said[0]
        assert b"space" not in said[0]

    @pytest.mark.parametrize(
        "where",
        [
            "/srv/ward 7/x",
            "'/srv/ward'",
            "C:\\ward\\x",
            "(~/ward)",
            "path=/srv",
            "[/srv",
            "`/srv`",
            "a,/srv",
            "~anna/x",
            "\\\\\\\\host\\\\ward",
            "<C:\\\\x>",
        ],
    )
    def test_no_words_name_a_place_on_this_machine(self, where):
        for error in (errors.PolicyRefusal(f"no: {where}"), errors.PlanError("no", hint=f"see {where}")):
            assert where not in str(spoken(error))
        plain = errors.PolicyRefusal("12 h/day and 1/2 are no places")
        assert spoken(plain) is plain

    @staticmethod
    def fail(error: Exception) -> None:
        raise error

    def same(self, folder: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[float], Exception]) -> None:
        said = []
        for value in VALUES:
            w = World(folder, value).ready("contribute")
            monkeypatch.setattr(line, "contribute", lambda *_, v=value: self.fail(make(v)))
            said.append(w.ask("contribute"))
        assert said[0] == said[1]
        assert not any(s in said[0][0] for v in VALUES for s in spellings(v))


class TestTime:
    """How long an answer or a refusal takes."""

    @pytest.mark.parametrize(("one", "other"), [(0.0, 0.99), (0.2, 0.7), (1.01, 1.99)])
    @pytest.mark.parametrize("refused", [False, True])
    def test_two_durations_within_one_slot_cannot_be_told_apart(self, one, other, refused, tmp_path, monkeypatch):
        took = []
        honest = line.contribute
        for seconds in (one, other):
            w = World(tmp_path, VALUES[0]).ready("contribute")

            def slow(site: Site, request: Packet, w: World = w, seconds: float = seconds) -> Packet:
                w.now += seconds
                if refused:
                    raise errors.DataError("no")
                return honest(site, request)

            monkeypatch.setattr(line, "contribute", slow)
            took.append(w.ask("contribute")[1])
        assert took[0] == pytest.approx(took[1], abs=1e-9)
        assert took[0] == pytest.approx(round(took[0]), abs=1e-9)

    def test_a_refusal_of_any_request_waits_for_its_slot(self, tmp_path):
        w = World(tmp_path, VALUES[0])
        said, took = w.ask("finish")
        assert b"not joined" in said
        assert took == 1.0

    def test_the_ledger_does_not_date_what_the_slot_hides(self, tmp_path, monkeypatch):
        """It is handed over at the end: every row says when its request came, however long the step took."""
        dates = []
        honest = line.contribute
        for seconds in (0.0, 40.0):
            w = World(tmp_path, VALUES[0]).ready("contribute")
            clock = [4_000_000_000.3]
            monkeypatch.setattr(w.sites[0].ledger.journal, "_clock", lambda c=clock: c[0])

            def slow(site: Site, request: Packet, c: list[float] = clock, seconds: float = seconds) -> Packet:
                c[0] += seconds
                return honest(site, request)

            monkeypatch.setattr(line, "contribute", slow)
            assert HELD.encode() not in w.ask("contribute")[0]
            rows = w.sites[0].ledger.journal.rows
            dates.append([r.at for r in rows if r.kind in ("spend", "commit")])
        assert dates == [[4_000_000_000] * 2] * 2

    def test_without_slots_nothing_waits(self, tmp_path):
        w = World(tmp_path, VALUES[0]).ready("contribute")
        assert w.ask("contribute", Gate(0.0, clock=lambda: w.now, sleep=w._sleep))[1] == 0.0


def test_what_was_held_back_is_in_the_sites_own_log_and_ledger(tmp_path, monkeypatch, caplog):
    action, change = CHANNELS["a metric beside the update"]
    w = leaking(World(tmp_path, VALUES[0]), action, change, monkeypatch)
    with caplog.at_level(logging.ERROR):
        w.ask(action)
    assert "missing or unknown fields" in caplog.text
    assert not any(s.decode() in caplog.text for s in spellings(VALUES[0])[4:8])  # nor does the log hold the value
    assert [r.body["reason"] for r in w.sites[0].ledger.journal.of_kind("refused")] == ["PolicyRefusal"]


def test_the_model_that_only_sites_know_is_named_by_its_chain(tmp_path, monkeypatch):
    replies = []
    for value in VALUES:
        w = World(tmp_path, value, reveal_to="sites")
        joins = {s.id: line.join(s, w.packet("join")).header["statement"] for s in w.sites}
        begin = Packet({"kind": "begin", "session": w.session, "joins": joins})
        dealt = [line.begin(s, begin) for s in w.sites]
        assert any(p.kind == keysum.DEAL for p in dealt)
        monkeypatch.setattr(line, "apply", lambda *_, v=value: Packet(
            {"kind": "applied", "round": 0, "state": canonical.sha256_hex(repr(v).encode())}
        ))  # fmt: skip
        replies.append(w.ask("apply")[0])
    assert replies[0] == replies[1]
    assert HELD.encode() in replies[0]


def test_a_helpers_answer_has_one_size(tmp_path, monkeypatch):
    w = World(tmp_path, VALUES[0]).ready("contribute")
    monkeypatch.setattr(KeysumSite, "open", lambda *_: Packet({"kind": keysum.ANSWER}, {"answer": bytes(7)}))
    assert HELD.encode() in w.ask("open")[0]
