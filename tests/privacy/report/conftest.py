"""A run's folder made by hand: real keys, real ledgers, a real server journal; no model and no network."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedveil.common import canonical, identity
from fedveil.common.contract import DataContract, sign_contract
from fedveil.common.errors import BudgetExhausted, VerificationError
from fedveil.common.identity import Member, Roster
from fedveil.common.journal import Copy, Head, Journal
from fedveil.common.units import Delta, Epsilon, SiteId
from fedveil.common.workload.model import ModelSpec
from fedveil.privacy.dp.accounting import epsilon_pld
from fedveil.privacy.dp.events import SampledGaussian
from fedveil.privacy.joining import data_set, names_of
from fedveil.privacy.ledger import Ledger
from fedveil.privacy.plan import Optimizer, PrivacyPlan, make_plan
from fedveil.privacy.report.build import build_report
from fedveil.privacy.report.progress import priced

SITES = ("alba", "berg", "cava", "dorn")
SESSION = "5e" * 32


def contract_of(**changes: Any) -> DataContract:
    """k = 5, l = 2, fixed levels; not the columns that the plan's model would need, which no auditor looks at."""
    values = {
        "name": "heart", "version": "1", "purpose": "a test", "unit": "one patient", "k": 5, "l": 2,
        "sensitive_target": True,
        "columns": [
            {"name": "age", "role": "quasi", "type": "number", "low": 18, "high": 90, "levels": [50]},
            {"name": "bmi", "role": "feature", "type": "number", "low": 10, "high": 60},
            {"name": "sick", "role": "target", "type": "category", "values": ["no", "yes"]},
        ],
    }  # fmt: skip
    return DataContract.model_validate({**values, **changes})


AGREED = contract_of()


def plan_of(**changes: Any) -> PrivacyPlan:
    values: dict[str, Any] = {
        "sites": 4, "records": 800, "epsilon": 2.0, "steps": 4, "clip": 1.0, "contract_hash": AGREED.hash,
        "model": ModelSpec(name="logistic", inputs=12, classes=2), "optimizer": Optimizer(learning_rate=0.5),
    }  # fmt: skip
    return make_plan(**{**values, **changes})


def model(n: int) -> str:
    return canonical.sha256_hex(f"model {n}".encode())


@dataclass
class World:
    """Everybody's keys and one run; change a field before :meth:`write` to make a different run."""

    folder: Path
    plan: PrivacyPlan
    contract: DataContract = AGREED
    session: str = SESSION
    cap: float = 8.0
    delta: float = 0.0  # of the ledgers; 0: the plan's
    earlier_steps: int = 0
    earlier_events: tuple[SampledGaussian, ...] = ()
    simulated: bool = False
    precision: str = ""
    approvals: dict[str, Any] = field(default_factory=dict)  # by site: what a row plan.approved says beside the plan
    absent: dict[int, set[str]] = field(default_factory=dict)
    aborted: set[int] = field(default_factory=set)
    lost: set[str] = field(default_factory=set)
    restart_in: int = 0
    stop_after: int | None = None
    peers: dict[str, Any] = field(default_factory=dict)  # by site: what its join statement says of the others
    witnesses: bool = False  # ledgers name their data set, and the sets that were signed
    before: dict[str, Ledger] = field(default_factory=dict)  # by site: the ledger that its ledger imports
    gone: dict[str, Copy] = field(
        default_factory=dict
    )  # by site: a lost ledger, charged at the cap, which then doubles
    released: dict[str, Any] = field(
        default_factory=lambda: {
            "v": 1, "contract": AGREED.hash, "recoding": "fixed",
            "criteria": {
                "k-anonymity": {"required": 5, "met": True},
                "distinct l-diversity": {"required": 2, "met": True},
            },
            "stability": [{"stage": "recoding", "factor": 1, "why": "fixed"}, {"stage": "x", "factor": 1, "why": "y"}],
            "stability_factor": 1, "unit": "one patient", "commitments": {"source": "c" * 64},
        }
    )  # fmt: skip
    consortium: Ed25519PrivateKey = field(default_factory=identity.new_signing_key)
    server: Ed25519PrivateKey = field(default_factory=identity.new_signing_key)
    sites: dict[str, Ed25519PrivateKey] = field(default_factory=lambda: {s: identity.new_signing_key() for s in SITES})

    @property
    def roster(self) -> Roster:
        members = tuple(Member(SiteId(s), identity.public_hex(k)) for s, k in self.sites.items())
        return Roster("the four", Member(identity.SERVER, identity.public_hex(self.server)), members)

    @property
    def public(self) -> str:
        return identity.public_hex(self.consortium)

    @property
    def report(self) -> Path:
        return self.folder / "report.json"

    def json(self, name: str, value: Any) -> None:
        (self.folder / name).write_bytes(canonical.dumps(value))

    @property
    def data_set(self) -> str:
        return data_set(self.contract.name, self.plan.unit)

    def members(self, round_: int) -> list[str]:
        return [s for s in self.sites if s not in self.absent.get(round_, ())]

    def write(self) -> World:
        """Carry the run out and write its folder, report included."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.json("plan.json", self.plan.to_json())
        self.json("roster.json", identity.sign_roster(self.roster, self.consortium))
        self.json("contract.json", sign_contract(self.contract, self.consortium))
        (self.folder / "consortium.pub").write_text(self.public + "\n")
        ledgers = {s: self.open_ledger(s) for s in self.sites}
        joins = {s: self.join(s, ledger) for s, ledger in ledgers.items()}
        self.json("joins.json", joins)
        journal = Journal.open(self.folder / "journal.jsonl", "server", self.server, durable=False, clock=lambda: 1e9)
        self.serve(journal, joins, ledgers)
        journal.close()
        build_report(self.folder, self.server)
        return self

    def open_ledger(self, site: str) -> Ledger:
        opened = lambda cap: Ledger.open(  # noqa: E731
            self.folder / "journals" / f"{site}.jsonl", site, self.sites[site], lineage=f"{site}-patients",
            cap=Epsilon(cap), delta=Delta(self.delta or self.plan.delta), unit=self.plan.unit, durable=False,
            clock=lambda: 1e9, data_set=self.data_set if self.witnesses else "",
        )  # fmt: skip
        ledger = opened(self.cap)
        if site in self.gone:
            public = identity.public_hex(self.sites[site])
            ledger.charge_lost(self.gone[site], site, public, Epsilon(self.cap), Delta(self.plan.delta))
            ledger.close()
            ledger = opened(2 * self.cap)
        if site in self.before:
            ledger.adopt(self.before[site].journal.rows, identity.public_hex(self.sites[site]))
        events = self.earlier_events or (self.plan.event,)
        for n in range(self.earlier_steps):
            ledger.reserve("earlier", n + 1, "e" * 64, events[n % len(events)])
        ledger.note("data.released", **self.released)
        hashes = {
            "plan_hash": self.plan.hash,
            "roster_hash": self.roster.hash,
            "contract_hash": self.plan.contract_hash,
        }
        if site in self.approvals:
            named = {"session": self.session, "plan_hash": self.plan.hash}
            ledger.note("plan.approved", **named, **self.approvals[site])
        said = {"precision": self.precision} if self.precision else {}
        ledger.note("plan.accepted", session=self.session, **hashes, **said)
        return ledger

    def join(self, site: str, ledger: Ledger) -> dict[str, Any]:
        own, covers = ledger.journal.copy(self.data_set), ledger.tally.covers
        told = {"data_set": own.data_set, "head_signature": own.signature, "imports": [list(c) for c in covers.items()]}
        payload = told | {
            "v": 1, "session": self.session, "site": site, "plan_hash": self.plan.hash,
            "roster_hash": self.roster.hash, "contract_hash": self.plan.contract_hash, "fields": {},
            "head": list(ledger.head), "ledger": ledger.journal.rows[0].hash, "peers": self.peers.get(site, {}),
        }  # fmt: skip
        return identity.signed(self.sites[site], "fedveil/join/1", payload)

    def serve(self, journal: Journal, joins: dict[str, Any], ledgers: dict[str, Ledger]) -> None:
        add = lambda kind, **body: journal.append(kind, {"session": self.session, **body})  # noqa: E731
        add(
            "run.open", plan_hash=self.plan.hash, roster_hash=self.roster.hash, contract_hash=self.plan.contract_hash,
            simulated=self.simulated, model_hash=model(0), engine="grpc",
        )  # fmt: skip
        add("run.joined", joins_digest=canonical.digest(joins), sites=list(joins))
        now, lines, applied, status = 0, [], 0, "COMPLETED"
        results: dict[str, float] = {}
        for r in range(1, self.plan.steps + 1):
            if r - 1 == self.stop_after:
                status = "ABORTED"
                break
            add("round.open", round=r, nonce=f"{r:032x}", model_hash=model(now))
            members = [s for s in self.members(r) if self.charge(ledgers[s], r, add)]
            if len(members) < self.plan.members:
                add("round.aborted", round=r, reason="too few sites")
                status = "BUDGET_EXHAUSTED"
                break
            add("round.set", round=r, members=members)
            for ledger in ledgers.values() if self.witnesses else ():
                said = {"members": names_of(members), "digest": canonical.sha256_hex(f"{r} {members}".encode())}
                ledger.note("agreed", session=self.session, round=r, **said)
            if r == self.restart_in:
                add("run.resumed", round=r)
                add("round.set", round=r, members=members)
            if r in self.aborted:
                add("round.aborted", round=r, reason="too few answers")
            else:
                now, applied = r, applied + 1
                sigma = self.plan.realised_noise_multiplier(len(members))
                facts = {"members": members, "noise_multiplier": sigma, "model_hash": model(r), "checkpoint": "x"}
                add("round.applied", round=r, **facts)
            results = {"accuracy": 0.9 - 0.4 / r} if now == r else results
            spent = epsilon_pld([(self.plan.event, priced(r, self.plan.steps))], self.plan.delta)
            lines.append(
                {"round": r, "epsilon_opened": spent, "members": len(members), "metrics": results if now == r else {},
                 "bytes_sent": 100 * r, "bytes_received": 200 * r, "seconds": 0.25}
            )  # fmt: skip
        heads = {}
        for s, ledger in ledgers.items():
            ledger.note("model", session=self.session, round=applied, model_hash=model(now))
            ledger.note("session.end", session=self.session, status=status)
            ledger.close()
            if s in self.lost:
                ledger.journal.path.unlink()
            else:
                heads[s] = list(ledger.head)
        add("run.end", status=status, steps_done=applied, model_hash=model(now), heads=heads, metrics=results)
        (self.folder / "metrics.jsonl").write_bytes(b"".join(canonical.dumps(x) + b"\n" for x in lines))

    def charge(self, ledger: Ledger, round_: int, add: Callable[..., Any]) -> bool:
        try:
            ledger.reserve(self.session, round_, self.plan.hash, self.plan.event)
        except BudgetExhausted as e:
            add("site.refused", round=round_, site=ledger.journal.owner, code=e.code)
            return False
        ledger.commit(self.session, round_)
        return True

    def copy(self, folder: Path) -> World:
        """The same run elsewhere, to be spoilt."""
        shutil.copytree(self.folder, folder)
        return World(
            folder,
            self.plan,
            contract=self.contract,
            session=self.session,
            consortium=self.consortium,
            server=self.server,
            sites=self.sites,
        )

    def rewrite(
        self, name: str, owner: str, change: Callable[[list[tuple[str, dict[str, Any]]]], Any],
        at: Callable[[int], float] = lambda _: 1e9,
    ) -> None:  # fmt: skip
        """Sign a whole journal anew after ``change`` edited its ``(kind, body)`` list: its owner cheats.

        Args:
            at: gives the time of a row, by its number; times that fall are written, too.
        """
        path, key = self.folder / name, self.server if owner == "server" else self.sites[owner]
        rows = [canonical.loads(line) for line in path.read_bytes().splitlines()]
        items = [(r["kind"], r["body"]) for r in rows]
        change(items)
        path.unlink()
        with Journal.open(path, owner, key, durable=False, clock=lambda: at(journal.head.rows)) as journal:
            for kind, body in items:
                journal.rows.clear()  # a writer that does not look at the time of the row before
                journal.append(kind, body)

    def rows(self, name: str) -> list[dict[str, Any]]:
        """The rows of a journal's file."""
        return [canonical.loads(line) for line in (self.folder / name).read_bytes().splitlines()]

    def forge(
        self,
        *,
        ledgers: dict[str, Callable[[list[Any]], Any]] | None = None,
        peers: dict[str, Any] | None = None,
        server: Callable[[list[Any]], Any] | None = None,
        told: dict[str, dict[str, Any]] | None = None,
        at: dict[str, Callable[[int], float]] | None = None,
    ) -> None:
        """Everybody who is named cheats and signs again, the server too; so only what the others signed is against it.

        Args:
            ledgers: by site, a change of its ``(kind, body)`` list; its join statement then names the new ledger.
            peers: by site, what its join statement says of the other sites' ledgers.
            server: a change of the server's ``(kind, body)`` list.
            told: by site, other fields of its join statement.
            at: by owner, the times of the rows of the journals that are signed again.
        """
        told, times = told or {}, at or {}
        joins = canonical.loads((self.folder / "joins.json").read_bytes())
        for site in {*(ledgers or {}), *(peers or {}), *told}:
            payload = joins[site]["payload"]
            if site in (ledgers or {}):
                self.rewrite(f"journals/{site}.jsonl", site, (ledgers or {})[site], times.get(site, lambda _: 1e9))
                rows = self.rows(f"journals/{site}.jsonl")
                joined = [r["kind"] == "plan.accepted" for r in rows].index(True)
                payload |= {"head": [joined + 1, rows[joined]["hash"]], "ledger": rows[0]["hash"]}
            payload |= told.get(site, {})
            copy = Copy(Head(*payload["head"]), payload["ledger"], payload["data_set"]).by(site, self.sites[site])
            payload["head_signature"] = copy.signature
            payload |= {"peers": peers[site]} if peers and site in peers else {}
            joins[site] = identity.signed(self.sites[site], "fedveil/join/1", payload)
        self.json("joins.json", joins)
        paths = sorted((self.folder / "journals").glob("*.jsonl"))
        heads = {p.stem: [len(rows), rows[-1]["hash"]] for p in paths if (rows := self.rows(f"journals/{p.name}"))}

        def tell(items: list[Any]) -> None:
            next(b for k, b in items if k == "run.joined")["joins_digest"] = canonical.digest(joins)
            items[-1][1]["heads"] = heads
            if server is not None:
                server(items)

        self.rewrite("journal.jsonl", "server", tell, times.get("server", lambda _: 1e9))
        try:
            build_report(self.folder, self.server)
        except VerificationError:  # the builder refuses: the old report by hand, with the new heads
            payload = canonical.loads(self.report.read_bytes())["payload"]
            last = self.rows("journal.jsonl")[-1]
            payload["hashes"]["heads"] = {**heads, "server": [last["n"] + 1, last["hash"]]}
            self.report.write_bytes(canonical.dumps(identity.signed(self.server, "fedveil/report/1", payload)))


@pytest.fixture(scope="session")
def honest(tmp_path_factory: pytest.TempPathFactory) -> World:
    """One honest, finished run; do not change it."""
    return World(
        tmp_path_factory.mktemp("honest") / "run", plan_of(), earlier_steps=2, absent={2: {"dorn"}}, aborted={3}
    ).write()


@pytest.fixture
def spoilt(honest: World, tmp_path: Path) -> World:
    """A copy of the honest run, to be changed."""
    return honest.copy(tmp_path / "run")


@pytest.fixture(scope="session")
def planned() -> Callable[..., PrivacyPlan]:
    """``planned(...)``: the honest run's plan with other values."""
    return plan_of


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., World]:
    """``make(plan=..., ...)``: another run, finished."""

    def build(plan: PrivacyPlan | None = None, **changes: Any) -> World:
        return World(tmp_path / "made", plan or plan_of(), **changes).write()

    return build
