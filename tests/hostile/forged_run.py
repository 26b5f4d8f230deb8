"""A small run by the product itself, and whoever forges its report with some of its members' keys.

Four sites, one of which may collude and one drop out; the secure sum is ``keysum``. It is the second run of these
sites: their ledgers hold an earlier session, and each remembers how far the others' ledgers had got. The last site's
cap refuses the last step. The second site has a ledger of another data set, which the others know. An empirical audit
is attached and signed. Every site has verified and signed the report.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedveil.client.app import make_app as client_app
from fedveil.client.peers import PeerHeads
from fedveil.client.records.release.pipeline import evidence_of
from fedveil.client.session import Site
from fedveil.common import canonical, flwr_adapter, identity
from fedveil.common.contract import DataContract, sign_contract
from fedveil.common.errors import FedveilError, VerificationError
from fedveil.common.journal import Copy, Head, Journal
from fedveil.common.units import Delta, Epsilon, SiteId
from fedveil.common.wire import Packet, sha256
from fedveil.common.workload.model import ModelSpec
from fedveil.deploy.lab import virtual_sites
from fedveil.deploy.transport.inprocess import run_inprocess
from fedveil.privacy.audit import attach
from fedveil.privacy.audit.one_run import Guesses, OneRun, corrected, detectable
from fedveil.privacy.audit.slab import price
from fedveil.privacy.dp.accounting import Filter, best_order, rdp
from fedveil.privacy.joining import JOIN, chained, data_set, sum_spec
from fedveil.privacy.ledger import Ledger
from fedveil.privacy.optimiser import ModelState
from fedveil.privacy.plan import Optimizer, PrivacyPlan, make_plan
from fedveil.privacy.report import results, signatures
from fedveil.privacy.report.build import DOMAIN, build_report
from fedveil.privacy.report.countersign import countersign, see, sign
from fedveil.privacy.secagg import lattice
from fedveil.privacy.secagg.interface import SumSpec
from fedveil.privacy.secagg.keysum_opening import Opening
from fedveil.privacy.secagg.opened_sum import BUFFERS, KEYSUM
from fedveil.privacy.secagg.params import N, choose
from fedveil.privacy.secagg.residuals import Reader
from fedveil.server import job as jobs
from fedveil.server.app import make_app as server_app
from fedveil.server.evaluate import Evaluator

SITES = 4
SERVER, LIAR, OTHER, CAPPED = "server", "site-0003", "site-0002", "site-0004"
NAMES = tuple(f"site-{i + 1:04d}" for i in range(SITES))
CONTRACT = DataContract.model_validate(
    {
        "name": "visits", "version": "1", "purpose": "test", "unit": "one visit", "k": 2,
        "columns": [
            {"name": "dose", "role": "feature", "type": "number", "low": 0, "high": 10},
            {"name": "sick", "role": "target", "type": "category", "values": ["no", "yes"]},
        ],
    }
)  # fmt: skip
RELEASED = evidence_of(CONTRACT, "c" * 64, "d" * 64)
Items = list[tuple[str, dict[str, Any]]]


def plan_of(**changes: Any) -> PrivacyPlan:
    """Half of the records in each of three steps; t = d = 1."""
    values: dict[str, Any] = {
        "sites": SITES, "records": 160, "epsilon": 2.0, "steps": 3, "clip": 1.0, "sample_rate": 0.5,
        "contract_hash": CONTRACT.hash, "model": ModelSpec(name="logistic", inputs=CONTRACT.width, classes=2),
        "optimizer": Optimizer(learning_rate=0.5),
    }  # fmt: skip
    return make_plan(**{**values, **changes})


FIRST, PLAN = plan_of(epsilon=1.0, steps=2), plan_of()


def _cap() -> float:
    """Carries the first run, and two of the second one's three steps."""
    e, b = FIRST.event, PLAN.event
    for cap in (n / 20 for n in range(10, 400)):
        f = Filter(Epsilon(cap), Delta(PLAN.delta), best_order(Epsilon(cap), Delta(PLAN.delta)))
        if f.affords(b, FIRST.steps * rdp(e, f.order), FIRST.steps * e.overflow) == PLAN.steps - 1:
            return cap
    raise LookupError("no such cap")


@dataclass
class Base:
    """The honest run: its folder and everybody's keys."""

    home: Path
    world: virtual_sites.World
    auditor: Ed25519PrivateKey = field(default_factory=identity.new_signing_key)
    peers: dict[str, PeerHeads] = field(default_factory=lambda: {n: PeerHeads() for n in NAMES})

    @property
    def folder(self) -> Path:
        return self.home / "second"

    @property
    def pin(self) -> str:
        return identity.public_hex(self.world.consortium)

    @property
    def fingerprint(self) -> str:
        """Of the auditor's key, as ``--auditor`` takes it."""
        return sha256(bytes.fromhex(identity.public_hex(self.auditor)))

    @property
    def keys(self) -> dict[str, Ed25519PrivateKey]:
        return {SERVER: self.world.server, **dict(zip(NAMES, self.world.keys, strict=True))}

    def site(self, i: int, plan: PrivacyPlan) -> Site:
        name, key = NAMES[i], self.world.keys[i]
        cap = _cap() if name == CAPPED else 50.0
        Ledger.open(
            self.home / virtual_sites.LEDGERS / f"{name}.jsonl", name, key, lineage=virtual_sites.LINEAGE,
            cap=Epsilon(cap), delta=Delta(plan.delta), unit=plan.unit, data_set=data_set(CONTRACT.name, plan.unit),
            durable=False,
        ).close()  # fmt: skip
        rng = np.random.default_rng(i)  # noqa: TID251
        X = rng.uniform(-1, 1, (40, CONTRACT.width)).astype(np.float32)
        y = (X[:, 0] > 0).astype(np.int64)
        site = virtual_sites.make_site(self.world.roster, i, key, plan, X, y, self.home, cap=cap, engine="closed")
        site.contract, site.evidence, site.peers = CONTRACT, RELEASED, self.peers[name]
        site.reports, site.consortium = self.home / "kept" / name, self.pin
        site.reports.mkdir(parents=True, exist_ok=True)
        return site

    def run(self, plan: PrivacyPlan, name: str) -> None:
        """A whole run, in process; its journal says that it was a real one."""
        rng = np.random.default_rng(9)  # noqa: TID251
        X = rng.uniform(-1, 1, (50, CONTRACT.width)).astype(np.float32)
        documents = {**self.world.documents(), "contract.json": sign_contract(CONTRACT, self.world.consortium)}
        job = jobs.create(
            self.home / name, plan, self.world.roster, self.world.server, documents=documents, durable=False,
            engine="grpc", countersigned=True, evaluate=Evaluator(plan.network, X, (X[:, 0] > 0).astype(np.int64)),
        )  # fmt: skip
        sites = virtual_sites.Kept(lambda i: self.site(i, plan))
        try:
            run_inprocess(server_app(job)[0], client_app(sites.resolve), self.world.sites, lambda _: {})
        finally:
            sites.close()
            job.journal.close()

    def audited(self) -> None:
        """An auditor's signed result beside the report, and the sites' signatures under that report."""
        evidence = attach.evidence_of(PLAN.hash, one_run(PLAN), self.auditor)
        path = self.home / "audit-result.json"
        path.write_bytes(canonical.dumps(evidence.to_json()))
        results.attach(self.folder, [path])
        build_report(self.folder, self.world.server)
        for name in NAMES:
            countersign(self.folder / "report.json", self.keys[name], self.pin, self.ledger(name))

    def ledger(self, site: str) -> bytes:
        """The ledger as its site has it, whatever the server shows."""
        return (self.home / virtual_sites.LEDGERS / f"{site}.jsonl").read_bytes()


def one_run(plan: PrivacyPlan, right: int = 70) -> OneRun:
    """What an audit by canaries found under ``plan``: nothing against the claim."""
    guesses = Guesses(1000, 100, right)
    least = detectable(1000, price(plan), plan.steps, plan.claim, plan.delta, 0.95, "gaussian")
    found = corrected(guesses, plan.delta, 0.95, "gaussian")
    return OneRun(found, 0.95, plan.delta, "gaussian", guesses, plan.claim, least)


def make(home: Path) -> Base:
    """Both runs; takes a few seconds."""
    flwr_adapter.quiet_flower()
    base = Base(home, virtual_sites.World.make(SITES))
    elsewhere = Copy(Head(7, "ab" * 32), "cd" * 32, data_set("another table", PLAN.unit))
    for name in NAMES:
        base.peers[name].keep({SiteId(OTHER): elsewhere.by(OTHER, base.keys[OTHER])})
    base.run(FIRST, "first")
    base.run(PLAN, "second")
    base.audited()
    return base


class Forger:
    """A copy of the run in the hands of whoever holds the keys named by ``holds``, and no other."""

    def __init__(self, base: Base, folder: Path, holds: tuple[str, ...]) -> None:
        shutil.copytree(base.folder, folder)
        self.base, self.folder, self.holds = base, folder, holds
        self.report = folder / "report.json"

    def key(self, owner: str) -> Ed25519PrivateKey:
        """A key that the forger has.

        Raises:
            PermissionError: it has not.
        """
        if owner not in self.holds:
            raise PermissionError(f"the forger does not hold the key of {owner}")
        return self.base.keys[owner]

    def json(self, name: str) -> Any:
        return canonical.loads((self.folder / name).read_bytes())

    def put(self, name: str, value: Any) -> None:
        (self.folder / name).write_bytes(canonical.dumps(value))

    def edit(self, name: str, change: Callable[[Any], Any]) -> None:
        """Change a JSON file in place; what signs it stays as it was."""
        value = self.json(name)
        change(value)
        self.put(name, value)

    @staticmethod
    def file(owner: str) -> str:
        return "journal.jsonl" if owner == SERVER else f"journals/{owner}.jsonl"

    def rows(self, owner: str) -> list[dict[str, Any]]:
        return [canonical.loads(line) for line in (self.folder / self.file(owner)).read_bytes().splitlines()]

    def rewrite(self, owner: str, change: Callable[[Items], Any], at: Callable[[int, float], float] | None = None):
        """A whole journal anew, by its owner's key, after ``change`` of its ``(kind, body)`` list.

        Args:
            at: the time of a row, by its number and the time it had.
        """
        path, key, old = self.folder / self.file(owner), self.key(owner), self.rows(owner)
        items = [(r["kind"], r["body"]) for r in old]
        times = {id(body): r["at"] for (_, body), r in zip(items, old, strict=True)}
        change(items)
        path.unlink()
        now = 0.0
        with Journal.open(path, owner, key, durable=False, clock=lambda: now) as journal:
            for n, (kind, body) in enumerate(items):
                now = times.get(id(body), now)
                now, kept = (at(n, now) if at else now), now
                journal.rows.clear()  # a writer that does not look at the time of the row before
                journal.append(kind, body)
                now = kept

    def cut(self, owner: str, rows: int) -> None:
        """Without its last rows: every row that is left is genuine."""
        path = self.folder / self.file(owner)
        path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-rows]))

    def join(self, site: str, change: Callable[[dict[str, Any]], Any], *, ledger: bool = False) -> None:
        """A join statement signed anew by its site.

        Args:
            ledger: it names the ledger that lies there now, as it was when the session was accepted.
        """
        documents = self.json("joins.json")
        payload = documents[site]["payload"]
        if ledger:
            rows = self.rows(site)
            session = payload["session"]
            n = next(r["n"] for r in rows if r["kind"] == "plan.accepted" and r["body"]["session"] == session) + 1
            payload |= {"head": [n, rows[n - 1]["hash"]], "ledger": rows[0]["hash"]}
            covers = [[b["ledger"], b["head"][0]] for r in rows if r["kind"] == "ledger.import" for b in [r["body"]]]
            payload["imports"] = covers
            self.own_head(payload, payload["data_set"])
        change(payload)
        documents[site] = identity.signed(self.key(site), JOIN, payload)
        self.put("joins.json", documents)

    def own_head(self, payload: dict[str, Any], of: str) -> None:
        """A statement's copy of its site's own head, signed; it names the data set ``of``."""
        site = payload["site"]
        copy = Copy(Head(*payload["head"]), payload["ledger"], of).by(site, self.key(site))
        payload |= {"data_set": of, "head_signature": copy.signature}

    def never_met(self, site: str) -> None:
        """The honest run itself as it had been without any copy of one site's ledgers: no forgery yet."""
        documents = self.json("joins.json")
        for name, document in documents.items():
            document["payload"]["peers"].pop(site, None)
            documents[name] = identity.signed(self.base.keys[name], JOIN, document["payload"])
        self.put("joins.json", documents)

    def honest_server(self) -> None:
        """The server, which does not forge, writes journal and report from the ledgers and statements that it got."""
        held, self.holds = self.holds, (*self.holds, SERVER)
        try:
            self.tell()
        finally:
            self.holds = held

    def sign(self, site: str) -> None:
        """A site's signature under the report that lies there, verified or not."""
        document = self.json("report.json")
        said = signatures.statement(site, document["payload"]["session"], canonical.digest(document))
        signatures.keep(self.folder, {site: identity.signed(self.key(site), signatures.DOMAIN, said)})

    def tell(self, change: Callable[[Items], Any] = lambda _: None, at: Any = None) -> None:
        """The server's journal anew: statements and ledgers as they lie there, and ``change``; then the report."""
        heads = {
            n: [len(r), r[-1]["hash"]] for n in NAMES if (self.folder / self.file(n)).exists() and (r := self.rows(n))
        }

        def told(items: Items) -> None:
            body(items, "run.joined")["joins_digest"] = canonical.digest(self.json("joins.json"))
            body(items, "run.end")["heads"] = heads
            change(items)

        self.rewrite(SERVER, told, at)
        self.rebuild()

    def rebuild(self) -> None:
        """The report by the product's own builder; where that refuses, the old one with the new heads."""
        try:
            build_report(self.folder, self.key(SERVER))
        except FedveilError:
            heads = {n: [len(r), r[-1]["hash"]] for n in (SERVER, *NAMES) if (r := self._there(n))}
            self.state(lambda p: p["hashes"]["heads"].update(heads))

    def _there(self, owner: str) -> list[dict[str, Any]]:
        return self.rows(owner) if (self.folder / self.file(owner)).exists() else []

    def state(self, change: Callable[[dict[str, Any]], Any]) -> None:
        """Another report's text, signed by the server."""
        payload = self.json("report.json")["payload"]
        change(payload)
        self.put("report.json", identity.signed(self.key(SERVER), DOMAIN, payload))
        (self.folder / "signatures.json").unlink(missing_ok=True)

    def steps(self, sums: Mapping[int, np.ndarray]) -> dict[int, ModelState]:
        """The model's states after each round if the server opens other sums."""
        state = ModelState.start(np.frombuffer((self.folder / "start.f32").read_bytes(), "<f4"), PLAN.optimizer)
        out = {}
        for r in range(1, PLAN.steps + 1):
            out[r] = state = state.after(PLAN, sums[r] if r in sums else self.values(r))
        return out

    @property
    def spec(self) -> SumSpec:
        """The secure sum of the run."""
        return sum_spec(PLAN, self.json("report.json")["payload"]["session"], self.base.world.roster)

    def opening(self, round_: int) -> Opening:
        """The opened sum of a round, as the folder holds it."""
        data = (self.folder / f"sums/{round_}.bin").read_bytes()
        return Opening.parse(self.spec, Packet(self.json(f"sums/{round_}.json"), {BUFFERS[KEYSUM]: data}))

    def put_opening(self, round_: int, opening: Opening) -> str:
        """Another one in its place; returns what the journal calls it."""
        packet = opening.packet(self.spec)
        (self.folder / f"sums/{round_}.json").write_bytes(canonical.dumps(packet.header))
        (self.folder / f"sums/{round_}.bin").write_bytes(packet.buffers[BUFFERS[KEYSUM]])
        return chained("", packet)

    def values(self, round_: int) -> np.ndarray:
        """What the opened sum of a round says."""
        opening, spec = self.opening(round_), self.spec
        reader = Reader(choose(spec), len(opening.members), spec.length, spec.bound)
        assert reader.take_all(opening.phases)
        return reader.values.copy()

    def phases(self, values: np.ndarray) -> bytes:
        """What a sum of these values looks like, without errors."""
        p = choose(self.spec)
        filled = np.zeros(p.blocks * p.per_coefficient * N, np.int64)
        filled[: values.size] = values
        return lattice.to_bytes(lattice.reduce(lattice.encode(filled.reshape(p.blocks, p.per_coefficient, N), p)))

    def signed_by(self) -> list[str]:
        """The honest sites that sign the report as it lies there: each verifies it, and compares its own ledger."""
        try:
            seen = see(self.report, self.base.pin)
        except VerificationError:
            return []
        found = []
        for name in (n for n in NAMES if n not in self.holds):
            with suppress(VerificationError):
                found.append(sign(seen, self.base.keys[name], self.base.ledger(name))[0])
        return found


def body(items: Items, kind: str, nth: int = 0) -> dict[str, Any]:
    """The body of a row of that kind."""
    return [b for k, b in items if k == kind][nth]
