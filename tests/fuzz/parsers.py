"""Every parser of what a peer, a file or an auditor's bundle says, each with a document that it accepts.

A parser takes the JSON value and may raise a :class:`FedveilError`, nothing else. Where a signature stands before it,
the document is signed here after it was changed, as a hostile member would.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedveil.common import canonical, flwr_adapter, identity, journal
from fedveil.common.contract import DataContract
from fedveil.common.contract.signing import DOMAIN as CONTRACT
from fedveil.common.contract.signing import VERSION, open_contract
from fedveil.common.errors import VerificationError, WireError
from fedveil.common.identity import SERVER, Member, Revocations, Roster, new_signing_key, public_hex
from fedveil.common.journal import Copy, Head, Row
from fedveil.common.units import SiteId
from fedveil.common.wire import Limits, Packet
from fedveil.common.workload.model import ModelSpec
from fedveil.common.workload.statistics import ColumnStats, MetricSpec, StatsSpec
from fedveil.deploy.transport import codec, grpc_site
from fedveil.privacy import plan as plans
from fedveil.privacy.audit import attach
from fedveil.privacy.audit.evidence import Conformance, Examined, Finding
from fedveil.privacy.audit.one_run import Guesses, OneRun
from fedveil.privacy.dp import events
from fedveil.privacy.joining import JOIN, check_joins, heads_of
from fedveil.privacy.plan import Optimizer, PrivacyPlan, make_plan
from fedveil.privacy.report import charges, handover, history, ledgers, signatures
from fedveil.privacy.secagg import keysum_common, named_state, opened_sum, sharedkey_common
from fedveil.privacy.secagg.contributions import from_bytes
from fedveil.privacy.secagg.interface import ServerSum, SiteSum, SumSpec
from fedveil.privacy.secagg.sealed import Joins
from fedveil.privacy.secagg.server import server_sum
from fedveil.privacy.secagg.site import site_sum
from fedveil.privacy.secagg.store import MemoryStore
from fedveil.privacy.tally import Tally

HEX, SESSION = "c" * 64, "5" * 64
_KEYS = {SiteId(name): new_signing_key() for name in ("east", "north", "south", "west", "yard")}
_CONSORTIUM = new_signing_key()
ROSTER = Roster("c", Member(SERVER, "a" * 64), tuple(Member(s, public_hex(k)) for s, k in _KEYS.items()))
_LIMITS = Limits(header=1 << 20, buffers=1 << 20)


class Parser(NamedTuple):
    """A document that is accepted, and what takes it."""

    document: Any
    parse: Callable[[Any], object]


@cache
def parsers() -> dict[str, Parser]:
    """All of them, by name."""
    return made()


def made() -> dict[str, Parser]:
    """:func:`parsers`, with sessions of the secure sum that nothing was said in yet."""
    return {**_plans(), **_identities(), **_messages(), **_sums(), **_rows(), **_files()}


# --- plans -----------------------------------------------------------------------------------------------------------


def derive(plan: PrivacyPlan) -> None:
    """Everything that is computed from an accepted plan."""
    for name in (
        "unit", "task", "honest", "members", "threshold", "sensitivity", "inflation", "share_std", "bound", "divisor",
        "event", "fallback_event", "claim", "claim_replace_one", "fallback", "hash",
    ):  # fmt: skip
        getattr(plan, name)
    plan.filter_epsilon()
    plan.realised_noise_multiplier(plan.members)
    plan.regrid()


def plan(model: ModelSpec | StatsSpec, **more: Any) -> PrivacyPlan:
    """A small plan of five sites."""
    shape: dict[str, Any] = {"steps": 20, "sample_rate": 0.1, "clip": 1.0}
    if isinstance(model, StatsSpec):
        shape = {"steps": 1, "sample_rate": 1.0, "clip": 10.0}
    values = {"sites": 5, "records": 1000, "noise_multiplier": 4.0, "delta": 1e-5, "contract_hash": HEX} | shape
    return make_plan(model=model, optimizer=Optimizer(learning_rate=0.1), **(values | more))


def _network(name: Any, inputs: int, *hidden: int, base: str = "") -> ModelSpec:
    return ModelSpec(name=name, inputs=inputs, classes=2, hidden=hidden, base=base)


def statistics() -> StatsSpec:
    """One column of each kind, and a metric."""
    number = ColumnStats(
        column="a", source="number", at=0, low=0.0, high=10.0, missing=True, moments=2, histogram=True, cuts=(1.0, 5.0)
    )
    coded = ColumnStats(column="b", source="coded", at=2, labels=("x", "y"), histogram=True)
    target = ColumnStats(column="t", source="target", at=0, labels=("p", "q"), histogram=True)
    metric = MetricSpec(network=_network("mlp", 5, 3), model_hash=HEX, confusion=True)
    return StatsSpec(inputs=5, classes=2, columns=(number, coded, target), metric=metric, quantiles=(0.5,))


def _plans() -> dict[str, Parser]:
    """Plans as a site takes them, and all that follows from one."""

    def taken(value: Any) -> None:
        derive(plans.from_json(value))

    def model(value: Any) -> None:
        try:
            named = canonical.digest(value)
        except WireError:
            named = HEX
        plans.from_json(small | {"model": value, "workload_hash": named})

    small = plan(_network("logistic", 5)).to_json()
    networks = [
        _network("mlp", 5, 3), _network("cnn", 64, 2, 3), _network("resnet", 64, 1, 4, 8),
        _network("transformer", 8, 20, 8, 2, 1), _network("lstm", 8, 20, 4, 4), _network("lora-mlp", 5, 2, 4),
        _network("lora-transformer", 8, 2, 20, 8, 2, 1, base=HEX),
    ]  # fmt: skip
    whole = {"plan": plan(_network("logistic", 5)), "plan of statistics": plan(statistics())}
    return {
        **{name: Parser(p.to_json(), taken) for name, p in whole.items()},
        **{f"model {n.name}": Parser(n.model_dump(mode="json"), model) for n in networks},
    }


# --- identities and statements ---------------------------------------------------------------------------------------


def _identities() -> dict[str, Parser]:
    public = public_hex(_CONSORTIUM)

    def by_consortium(domain: str, take: Callable[[Any], object]) -> Callable[[Any], object]:
        return lambda payload: take(identity.signed(_CONSORTIUM, domain, payload))

    contract = DataContract.model_validate(_CONTRACT)
    payload = {"v": VERSION, "contract": contract.payload, "hash": contract.hash}

    revoked = Revocations(3, frozenset({"west"}), frozenset({HEX}))
    return {
        "roster": Parser(ROSTER.payload, identity.roster_from_payload),
        "signed roster": Parser(identity.sign_roster(ROSTER, _CONSORTIUM), lambda d: identity.open_roster(d, public)),
        "revocations": Parser(
            identity.sign_revocations(revoked, _CONSORTIUM)["payload"],
            by_consortium("fedveil/revoked/1", lambda d: identity.open_revocations(d, public)),
        ),
        "signed contract": Parser(payload, by_consortium(CONTRACT, lambda d: open_contract(d, public))),
        "contract": Parser(contract.payload, DataContract.model_validate),
        "statements": Parser({s: _statement(s) for s in _KEYS}, _joined),
        "journal heads": Parser({"west": [[3, HEX, HEX], [4, HEX, "d" * 64, HEX, HEX * 2]]}, heads_of),
        "countersignature": Parser(
            signatures.statement("west", SESSION, HEX),
            lambda p: signatures.require(
                "west", public_hex(_KEYS[SiteId("west")]), SESSION, HEX,
                identity.signed(_KEYS[SiteId("west")], signatures.DOMAIN, p),
            ),
        ),
    }  # fmt: skip


_CONTRACT = {
    "name": "c", "version": "1", "purpose": "care", "unit": "record", "k": 2, "l": 2, "sensitive_target": True,
    "expires": "2999-01-01",
    "columns": [
        {"name": "patient", "role": "identifier"},
        {"name": "age", "role": "quasi", "type": "number", "low": 0, "high": 100, "levels": [50]},
        {"name": "job", "role": "quasi", "type": "category", "values": ["a", "b", "c"], "levels": [["a", "b"], ["c"]]},
        {"name": "dose", "role": "feature", "type": "number", "low": -1, "high": 3, "missing": "indicator"},
        {"name": "y", "role": "target", "type": "number", "low": 0, "high": 10, "threshold": 5},
    ],
}  # fmt: skip


def _head(site: SiteId) -> Copy:
    return Copy(Head(3, HEX), HEX, HEX).by(site, _KEYS[site])


def _statement(site: SiteId) -> dict[str, Any]:
    return {
        "v": 1, "session": SESSION, "site": site, "plan_hash": HEX, "roster_hash": ROSTER.hash, "contract_hash": HEX,
        "fields": {"x25519": canonical.sha256_hex(site.encode())}, "head": [3, HEX], "ledger": HEX, "data_set": HEX,
        "head_signature": _head(site).signature, "imports": [["d" * 64, 3]],
        "peers": {"east": [[3, HEX, HEX]]},
    }  # fmt: skip


def _joined(payloads: Any) -> None:
    """What every site does with all statements: each is signed anew, then checked, then its keys are taken."""
    signed = {
        s: identity.signed(_KEYS[s], JOIN, p) if s in _KEYS else p
        for s, p in (payloads.items() if isinstance(payloads, dict) else ())
    }
    Joins(_spec("keysum"), check_joins(signed or payloads, SESSION, HEX, ROSTER))


# --- messages --------------------------------------------------------------------------------------------------------


def _messages() -> dict[str, Parser]:
    message = flwr_adapter.request(Packet({"kind": "x", "n": [1, None]}, {"a": b"abc"}), to=5, action="query", round=1)
    flwr_adapter.stamp(message)
    stream = b"".join(codec.encode(message))
    length = int.from_bytes(stream[4:8], "big")
    header, rest = canonical.loads(stream[8 : 8 + length]), stream[8 + length :]

    failed = {"metadata": header["metadata"], "error": [70, "x"], "buffers": []}

    def decoded(value: Any, rest: bytes = rest) -> None:
        raw = canonical.dumps(value)
        decoder = codec.Decoder(_LIMITS)
        decoder.feed(b"FVM1" + len(raw).to_bytes(4, "big") + raw + rest)
        got = decoder.result()
        if not got.has_error():
            flwr_adapter.from_record(got.content, _LIMITS)

    def told(value: Any) -> None:
        flwr_adapter.parse_error(canonical.dumps(value).decode())

    def control(value: Any) -> None:
        frame = grpc_site._control(canonical.dumps(value))
        grpc_site._offset(frame, "from")
        grpc_site._offset(frame, "got")

    def handed(value: Any) -> None:
        handover.unpacked(_packet(value, {handover.BUFFER: b"a" * 6}), ROSTER)

    names = ("report.json", "plan.json", "roster.json", "joins.json", "consortium.pub", "journal.jsonl")
    fault = {"code": "WireError", "message": "cut", "hint": "again"}
    return {
        "stream": Parser(header, decoded),
        "stream of an error": Parser(failed, lambda v: decoded(v, b"")),
        "error": Parser(fault, told),
        "control frame": Parser({"t": "message", "from": 0, "got": 5}, control),
        "packet": Parser({"kind": "x", "a": [1, {"b": 2.5}]}, lambda v: _packet(v, {})),
        "report handed over": Parser({"kind": "report", "files": [[n, 1] for n in names]}, handed),
        "privacy event": Parser(events.SampledGaussian(0.1, 1.0).to_json(), events.from_json),
    }


# --- the secure sum --------------------------------------------------------------------------------------------------


def _spec(protocol: str) -> SumSpec:
    return SumSpec(protocol, SESSION, HEX, ROSTER, 4, 4, 6, 1000, 50, 1)


class _Session:
    """All sites of one sum, joined; :meth:`from_site` changes a message of one of them, signed as the site would."""

    def __init__(self, protocol: str) -> None:
        self.spec = _spec(protocol)
        self.sites: dict[SiteId, SiteSum] = {s: site_sum(self.spec, s, k, MemoryStore()) for s, k in _KEYS.items()}
        self.server: ServerSum = server_sum(self.spec)
        joins = {s: site.join_fields() for s, site in self.sites.items()}
        for s, packet in self.server.begin(joins, {s: x.begin(joins) for s, x in self.sites.items()}).items():
            self.sites[s].receive(packet)
        self.server.start_round(1, "n", HEX)
        self.packets = {
            s: site.contribute(1, "n", np.arange(6), _head(s) if protocol == "keysum" else None, HEX)
            for s, site in self.sites.items()
        }

    def from_site(self, packet: Packet, take: Callable[[SiteId, Packet], object]) -> Parser:
        site = SiteId("east")

        def parse(value: Any) -> None:
            if (
                isinstance(value, dict)
                and value.get("kind") == packet.kind
                and {"signature"} <= packet.header.keys() & value
            ):
                bare = {k: v for k, v in value.items() if k != "signature"}
                value = keysum_common.sign_header(_KEYS[site], bare)
            take(site, _packet(value, packet.buffers))

        return Parser(packet.header, parse)


def _packet(header: Any, buffers: dict[str, bytes]) -> Packet:
    """As it would arrive; a header that is no object never does."""
    record = flwr_adapter.to_record(Packet(header, buffers))
    return flwr_adapter.from_record(record, _LIMITS)


def _sums() -> dict[str, Parser]:
    """The messages of a round in the order in which they come: each parser's session stands right before its own."""
    out: dict[str, Parser] = {}
    for protocol in ("keysum", "sharedkey", "plain"):
        adding = _Session(protocol)
        out[f"{protocol} contribution"] = adding.from_site(adding.packets[SiteId("east")], adding.server.add)
    for protocol in ("keysum", "sharedkey"):
        naming = _Session(protocol)
        named = named_state.pack(1, "n", [p.header for p in naming.packets.values()])
        out[f"{protocol} state named"] = Parser(named, naming.sites[SiteId("east")].named)
    spec = _spec("plain")
    opened = opened_sum.pack(spec, 1, list(_KEYS), np.arange(6))
    out["opened sum"] = Parser(opened.header, lambda v: opened_sum.unpack(spec, _packet(v, opened.buffers)))
    brought = opened_sum.with_sums({"kind": "apply", "session": SESSION, "state": HEX}, {}, [opened])
    out["sums of a message"] = Parser(brought.header, lambda v: opened_sum.sums_in(_packet(v, brought.buffers)))
    agreeing, opening = _Session("keysum"), _Session("keysum")
    for session in (agreeing, opening):
        for s, p in session.packets.items():
            session.server.add(s, p)
    east = SiteId("east")
    announced = agreeing.server.agree_requests()[east]
    out["keysum members"] = Parser(announced.header, lambda v: agreeing.sites[east].agree(_packet(v, {})))
    agreed = {s: opening.sites[s].agree(p) for s, p in opening.server.agree_requests().items()}
    out["keysum agreement"] = opening.from_site(agreed[east], opening.server.add_agreement)
    for s, p in agreed.items():
        opening.server.add_agreement(s, p)
    asked = opening.server.open_requests()
    out["keysum open"] = Parser(
        asked[east].header, lambda v: opening.sites[east].open(_packet(v, dict(asked[east].buffers)))
    )
    answer = opening.sites[east].open(asked[east])
    out["keysum answer"] = opening.from_site(answer, opening.server.add_answer)
    out |= _vouching()
    out["sharedkey pieces"] = Parser(
        {"kind": "x", "lengths": [3]},
        lambda v: [*sharedkey_common.pieces(_spec("sharedkey"), _packet(v, {"ciphertexts": b"abc"}))],
    )
    return out


def _vouching() -> dict[str, Parser]:
    """What follows the answers: a challenge, a fingerprint, the opened sum."""
    (asked, requests), (whole, more), east = _answered(), _answered(), SiteId("east")
    told = asked.sites[east].fingerprint(requests[east])
    for s, p in more.items():
        whole.server.add_fingerprint(s, whole.sites[s].fingerprint(p))
    opened = whole.server.opened()
    return {
        "keysum challenge": Parser(requests[east].header, lambda v: asked.sites[east].fingerprint(_packet(v, {}))),
        "keysum fingerprint": asked.from_site(told, asked.server.add_fingerprint),
        "keysum opened": Parser(opened.header, lambda v: whole.sites[east].opened(_packet(v, opened.buffers))),
    }


def _answered() -> tuple[_Session, dict[SiteId, Packet]]:
    """A session whose sum is open, and what its members are asked."""
    session = _Session("keysum")
    for s, p in session.packets.items():
        session.server.add(s, p)
    for s, p in session.server.agree_requests().items():
        session.server.add_agreement(s, session.sites[s].agree(p))
    for s, p in session.server.open_requests().items():
        session.server.add_answer(s, session.sites[s].open(p))
    return session, session.server.fingerprint_requests()


# --- journals and files ----------------------------------------------------------------------------------------------


def _rows() -> dict[str, Parser]:
    """Rows of a site's ledger and of the server's journal, and what a ledger and a report make of them."""
    key = _KEYS[SiteId("west")]

    core = {"v": 1, "n": 0, "owner": "west", "at": 5, "kind": "spend", "body": {"a": 1}, "prev": journal.GENESIS}
    digest = canonical.digest(core)
    written = {**core, "hash": digest, "sig": identity.sign(key, journal.DOMAIN, digest.encode()).hex()}

    def row(value: Any) -> None:
        journal.verify_rows(journal.parse(canonical.dumps(value) + b"\n"), public_hex(key), owner="west")

    def chain(known: dict[str, Any], value: Any) -> list[Row]:
        """The bodies of ``value`` as rows that hold: their owner can sign whatever it likes."""
        bodies = canonical.loads(canonical.dumps(value))
        if not isinstance(bodies, list) or not all(isinstance(b, dict) for b in bodies):
            raise VerificationError("journal.parse takes no such row")
        pairs = zip(known, bodies, strict=False)
        return [Row(n, "west", 5, kind, body, HEX, HEX, "") for n, (kind, body) in enumerate(pairs)]

    def ledger(value: Any) -> None:
        rows = chain(_LEDGER, value)
        tally = Tally()
        for r in rows:
            tally.feed(r)
        ledgers.at_caps(rows, charges.compose(rows, SESSION))

    def run(value: Any) -> None:
        history.replay(chain(_RUN, value))

    return {
        "journal row": Parser(written, row),
        "ledger": Parser([*_LEDGER.values()], ledger),
        "server's journal": Parser([*_RUN.values()], run),
    }


_EVENT = events.SampledGaussian(0.1, 1.0).to_json()
_LOST = Copy(Head(3, HEX), "e" * 64, HEX).by("west", _KEYS[SiteId("west")])
_LEDGER: dict[str, Any] = {
    "ledger.open": {"lineage": "l", "cap_epsilon": 5.0, "delta": 1e-5, "order": 8.0, "unit": "record"},
    "ledger.import": {"ledger": HEX, "carries": ["d" * 64], "events": [[_EVENT, 2]], "head": [3, HEX],
                      "covers": [[2, "d" * 64]], "lost": [["d" * 64, 5.0, 1e-5]]},
    "ledger.lost": {"ledger": "e" * 64, "owner": "west", "public": public_hex(_KEYS[SiteId("west")]),
                    "head": list(_LOST.head), "data_set": HEX, "signature": _LOST.signature,
                    "cap_epsilon": 5.0, "delta": 1e-5},
    "ledger.cap": {"cap_epsilon": 16.0},
    "data.released": {
        "contract_hash": HEX, "criteria": {"k": {"required": 5, "met": True}}, "stability_factor": 1,
        "commitments": {"source": HEX},
    },
    "plan.accepted": {"session": SESSION, "plan_hash": HEX, "roster_hash": HEX, "contract_hash": HEX},
    "spend": {"session": SESSION, "round": 1, "plan_hash": HEX, "event": _EVENT},
    "commit": {"session": SESSION, "round": 1},
    "agreed": {"session": SESSION, "round": 1, "members": HEX, "digest": HEX},
    "refused": {"session": SESSION, "reason": "PlanError"},
    "model": {"session": SESSION, "round": 1, "model_hash": HEX},
    "session.end": {"session": SESSION, "status": "COMPLETED"},
    "ledger.closed": {"ledger": HEX},
}  # fmt: skip
_RUN: dict[str, Any] = {
    "run.open": {"session": SESSION, "plan_hash": HEX, "roster_hash": HEX, "contract_hash": HEX, "model_hash": HEX,
                 "simulated": False},
    "run.joined": {"session": SESSION, "joins_digest": HEX, "sites": ["east", "west"]},
    "round.open": {"session": SESSION, "round": 1, "nonce": "n", "model_hash": HEX},
    "site.refused": {"session": SESSION, "site": "west", "code": "WireError"},
    "round.set": {"session": SESSION, "round": 1, "members": ["east", "west"]},
    "round.applied": {
        "session": SESSION, "round": 1, "members": ["east", "west"], "noise_multiplier": 1.0, "model_hash": HEX,
    },
    "run.end": {
        "session": SESSION, "status": "COMPLETED", "steps_done": 1, "model_hash": HEX, "heads": {"west": [3, HEX]},
        "metrics": {"accuracy": 0.5},
    },
}  # fmt: skip


def _files() -> dict[str, Parser]:
    finding = Finding("a", "b", 0.5, 1e-5, 1.0, 1.0, 9, "c", (0.5, 2.0))
    path = Examined("train", "local", "plain", "server", 0, "mlp", 9, "auto", "float64")
    key = Ed25519PrivateKey.from_private_bytes(bytes(32))
    looked_at = Conformance(HEX, "plain", 1.0, 1.0, 0.5, 2.0, 0.9, 9, (finding,), path)
    one = OneRun(0.1, 0.95, 1e-5, "f-dp", Guesses(100, 50, 30), 1.0, 0.5)
    audit = attach.evidence_of(HEX, looked_at, key).beside(attach.evidence_of(HEX, one)).to_json()

    def kept(value: Any) -> None:
        raw = canonical.dumps(value)
        from_bytes(len(raw).to_bytes(4, "little") + raw + b"abc")

    return {
        "audit": Parser(audit, lambda v: attach.parse(canonical.dumps(v), HEX)),
        "kept message": Parser({"header": {"kind": "x"}, "buffers": [["a", 3]]}, kept),
    }
