"""A site and its part in one run: what was signed, what was charged, what may still happen. It only goes forward."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray

from fedveil.client import plan_fit, policy, witness
from fedveil.client.approval import Approvals
from fedveil.client.own_model import OwnModel
from fedveil.client.peers import PeerHeads
from fedveil.client.train import clipper
from fedveil.common import canonical, identity
from fedveil.common.contract import DataContract
from fedveil.common.errors import BudgetExhausted, PolicyRefusal, ProtocolError
from fedveil.common.identity import Revocations, Roster
from fedveil.common.journal import Copy, Row
from fedveil.common.settings import LimitsSection
from fedveil.common.units import SiteId
from fedveil.common.wire import Packet
from fedveil.privacy import plan as plans
from fedveil.privacy.dp.clipping import Clipper, Precision
from fedveil.privacy.joining import JOIN, check_joins, data_set, heads_in, sum_spec
from fedveil.privacy.ledger import Ledger
from fedveil.privacy.optimiser import ModelState
from fedveil.privacy.plan import PrivacyPlan
from fedveil.privacy.secagg.interface import SiteSum, is_hex
from fedveil.privacy.secagg.site import site_sum
from fedveil.privacy.secagg.store import Store
from fedveil.privacy.start import start

_DAY_S = 86400.0


@dataclass
class Session:
    """One run at one site, after its plan was accepted.

    Attributes:
        id: 64 hexadecimal digits.
        plan: what this site signed.
        sum: this site's half of the secure sum.
        begun: this site has every site's statement. A sum with keys needs that before its first round.
        exhausted: the budget refused a step: nothing of this session is charged any more.
        ended: the server ended the session: nothing is charged any more.
        precision: of the gradients of single records: what was noted when the plan was accepted.
        model: this site's own model, once it was asked for.
        within: the limits that the plan was checked against, and keeps.
        barred: sites that joined with another ledger than they may: no sum that one of them is in is opened.
        clipper: the engine that computed its last step.
    """

    id: str
    plan: PrivacyPlan
    sum: SiteSum
    begun: bool = False
    exhausted: bool = False
    ended: bool = False
    precision: Precision = "float32"
    model: OwnModel | None = None
    within: LimitsSection | None = None
    barred: frozenset[SiteId] = frozenset()
    clipper: Clipper | None = None

    def __post_init__(self) -> None:
        self.plan_hash = self.plan.hash  # kept, because it is needed twice a round

    def release(self) -> None:
        """Give back the memory that steps keep from one to the next: at the end of the session, not of a round."""
        if self.clipper is not None:
            self.clipper.release()


@dataclass
class Site:
    """Everything a site needs to answer; made from ``site.toml``, or by the simulator.

    Attributes:
        id: its name on the roster.
        key: its Ed25519 key.
        roster: the pinned roster.
        contract_hash: hash of the contract its data were checked against.
        width, classes: number of features and classes, from the contract.
        limits: the site's own limits, which no server can lift.
        X: ``(n, features)`` encoded records. y: ``(n,)`` class indices. Neither ever leaves.
        evidence: pass/fail and salted commitments of ingestion; may leave.
        ledger: the budget of the data's lineage.
        store_for: durable storage of one session.
        capacity: the most records (or persons) that this data set may ever hold: it decides the shape of a step.
        persons: ``(n', m)`` the rows of each person, where the contract protects persons; None where it protects rows.
        engine, device, microbatch: how gradients are computed (:func:`fedveil.client.train.clipper`).
        peers: what this site remembers of the others' journals.
        revoked: gives the newest list of revoked members that reached this site; None in the simulator.
        precision: in which gradients of single records are computed. Anything but float64 is noted in the ledger.
        models: folder for models that only the sites know; None keeps none.
        contract: the contract itself; None in simulations without one.
        approvals: where persons' approvals are found, for limits that ask for them.
        reports: folder for the federation's reports that this site has verified; None signs none.
        consortium: the consortium's public key as this site has pinned it, under which reports are verified.
        start: where training starts; an examination of this program may choose it, nothing else does.
    """

    id: SiteId
    key: Ed25519PrivateKey
    roster: Roster
    contract_hash: str
    width: int
    classes: int
    limits: LimitsSection
    X: NDArray[np.float32]
    y: NDArray[np.int64]
    evidence: dict[str, Any]
    ledger: Ledger
    store_for: Callable[[str], Store]
    capacity: int
    persons: NDArray[np.int64] | None = None
    engine: str = "auto"
    precision: Precision = "float32"
    microbatch: int = 0
    device: str = "cpu"
    models: Path | None = None
    peers: PeerHeads = field(default_factory=PeerHeads)
    revoked: Callable[[], Revocations] | None = None
    contract: DataContract | None = None
    approvals: Approvals | None = None
    reports: Path | None = None
    consortium: str = ""
    start: Callable[[PrivacyPlan], ModelState] = start
    _sessions: dict[str, Session] = field(default_factory=dict)

    def accept(self, session: str, plan_json: Any, roster_hash: str, contract_hash: str) -> Session:
        """Check a proposed plan against everything this site holds, and take part.

        Raises:
            PlanError, PolicyRefusal, ProtocolError, BudgetExhausted: the site does not take part.
        """
        _check_name(session)
        if roster_hash != self.roster.hash:
            raise ProtocolError("the server uses another roster than the one this site has pinned")
        if contract_hash != self.contract_hash:
            raise ProtocolError("the server uses another data contract than the one this site's data were checked by")
        plan = plans.from_json(plan_json)
        plan_fit.check(plan, self)
        self._permitted(session, plan)
        approvals = {} if self._noted("plan.accepted", session) else self._admitted(session, plan)
        known = self._open(session, plan)
        if known.plan.hash != plan.hash:
            raise ProtocolError("another plan was signed for this session")
        if not self._noted("plan.accepted", session):
            self.ledger.note("data.released", **self.evidence)
            if approvals:
                self.ledger.note(
                    "plan.approved",
                    session=session, plan_hash=plan.hash,
                    approvals=sorted(approvals.values()), approvers=sorted(approvals),
                )  # fmt: skip
                if self.approvals is not None:
                    self.approvals.remove(plan)
            self.ledger.note(
                "plan.accepted",
                session=session, plan_hash=plan.hash, roster_hash=roster_hash, contract_hash=contract_hash,
                **({} if known.precision == "float64" else {"precision": known.precision}),
            )  # fmt: skip
            policy.tell_of_a_short_budget(plan, self.ledger.affords(plan.event))
        return known

    def permit(self, session: Session) -> None:
        """Before a round is charged, check the plan against the site's limits as they are now, and the working hours.

        Raises:
            PolicyRefusal: they do not allow it. One row of the ledger notes that.
        """
        try:
            self.fits(session)
            policy.check_hours(self.limits)
        except PolicyRefusal as e:
            self.refused(session.id, e.code)
            raise

    def fits(self, session: Session) -> None:
        """Raise :class:`PolicyRefusal` unless the session's plan keeps the site's limits as they are now."""
        if session.within is not self.limits:  # plan and limits are frozen, so one check of these two is enough
            policy.check(session.plan, self.limits)
            session.within = self.limits

    def _permitted(self, session: str, plan: PrivacyPlan) -> None:
        try:
            policy.check(plan, self.limits)
            policy.check_hours(self.limits)
        except PolicyRefusal as e:
            self.refused(session, e.code)
            raise

    def _admitted(self, session: str, plan: PrivacyPlan) -> dict[str, str]:
        """Check what a new session needs beside a fitting plan; returns the approvals that it uses up, by their keys.

        Raises:
            PolicyRefusal, BudgetExhausted: nothing was written for it, except that this was refused.
            IdentityError: a member of the roster was revoked.
        """
        if self.revoked is not None:
            self.not_revoked({m.site for m in (self.roster.server, *self.roster.sites)})
        spent, since = {s for s, _ in self.ledger.tally.by_round}, time.time() - _DAY_S
        accepted = (r for r in self.ledger.journal.of_kind("plan.accepted") if r.at >= since)
        if sum(r.body["session"] not in spent for r in accepted) >= self.limits.max_unused_sessions:
            # No row is written: a peer that asks for new sessions again and again must not fill the ledger.
            raise PolicyRefusal(
                f"{self.limits.max_unused_sessions} sessions in which nothing was charged began here within 24 hours",
                hint="resume one that began, or wait; the owner can raise max_unused_sessions in [limits] of site.toml",
            )
        if self.ledger.affords(plan.event) < 1:
            self.refused(session, BudgetExhausted.__name__)
            raise BudgetExhausted("the budget of this site's data set does not pay for one step of the plan")
        if not self.limits.approvals:
            return {}
        if self.approvals is None:
            raise PolicyRefusal(
                "this site asks for approvals but keeps none", hint="start it with 'fedveil client run'"
            )
        used = [d for r in self.ledger.journal.of_kind("plan.approved") for d in r.body["approvals"]]
        try:
            return self.approvals.require(plan, self._ledger_id, used)
        except PolicyRefusal as e:
            self.refused(session, e.code)
            raise

    def refused(self, session: Any, reason: str) -> None:
        """Note a refusal, unless the refusals at the end of the ledger hold its reason: that would only fill it."""
        for row in reversed(self.ledger.journal.rows):
            if row.kind != "refused":
                break
            if row.body["reason"] == reason:
                return
        if isinstance(session, str) and is_hex(session, 64):
            self.ledger.note("refused", session=session, reason=reason)

    def _open(self, session: str, plan: PrivacyPlan) -> Session:
        """The session, from memory or newly made. Its plan is on disk before anything is signed."""
        if session not in self._sessions:
            store = self.store_for(session)
            held = store.get("plan")
            if held is not None:
                plan = plans.from_json(canonical.loads(held))
            else:
                store.put("plan", canonical.dumps(plan.to_json()))
            spec = sum_spec(plan, session, self.roster)
            refused = any(r.body.get("reason") == BudgetExhausted.__name__ for r in self._noted("refused", session))
            ended = bool(self._noted("session.end", session))
            if self._noted("plan.accepted", session) and not ended:
                self._same_data()  # before the session is kept, so that a second request gets the same refusal
            self._sessions[session] = Session(
                session, plan, site_sum(spec, self.id, self.key, store), begun=plan.sum in ("plain", "none"),
                exhausted=refused, ended=ended, precision=self._precision(session, plan),
            )  # fmt: skip
        return self._sessions[session]

    def _precision(self, session: str, plan: PrivacyPlan) -> Precision:
        """A session keeps the precision that was noted when its plan was accepted, even if the settings change."""
        if plan.task != "train":
            return "float64"
        for row in self._noted("plan.accepted", session):
            return "float32" if row.body.get("precision") == "float32" else "float64"
        return self.precision

    def clipper(self, session: Session) -> Clipper:
        """The engine that computes a session's clipped sums; :class:`ModelError` if there is none for its network."""
        plan = session.plan
        session.clipper = clipper(
            plan.network, self.engine, self.device, session.precision, plan.places(self.capacity), plan.rows_per_person,
            self.microbatch,
        )  # fmt: skip
        return session.clipper

    def _noted(self, kind: str, session: str) -> list[Row]:
        """This ledger's rows of one kind about one session."""
        return [r for r in self.ledger.journal.of_kind(kind) if r.body.get("session") == session]

    def session(self, session: Any) -> Session:
        """A session that this site has joined, also after a restart.

        Raises:
            ProtocolError: the site has not joined it.
        """
        if isinstance(session, str) and session in self._sessions:
            return self._sessions[session]
        name = _check_name(session)
        # The ledger is read first, so that no folder is made for a name that was never accepted.
        held = self.store_for(name).get("plan") if self._noted("plan.accepted", name) else None
        if held is None:
            raise ProtocolError("this site has not joined that session", hint="start the run again")
        found = self._open(name, plans.from_json(canonical.loads(held)))
        if not found.ended and (joins := self.store_for(name).get("joins")) is not None:
            found.sum.begin(canonical.loads(joins))
            found.barred = frozenset(canonical.loads(self.store_for(name).get("barred") or b"[]"))
            found.begun = True
        return found

    def _same_data(self) -> None:
        """After a restart within a session, the table must be the one that the ledger's evidence is about."""
        noted = [r.body for r in self.ledger.journal.of_kind("data.released")][-1:]
        for body in noted:
            before, now = (x.get("commitments", {}) for x in (body, self.evidence))
            if before.get("source") != now.get("source"):
                raise ProtocolError("this site's table is not the one it joined with", hint="start a new run")
            if body != self.evidence:  # the same table, but released in a new order
                self.ledger.note("data.released", **self.evidence)

    def tidy(self) -> None:
        """Destroy what a crash left of sessions that have ended. Called when a site starts."""
        for row in self.ledger.journal.of_kind("session.end"):
            name = _check_name(row.body.get("session"))
            if self.store_for(name).get("plan") is not None:
                self.session(name).sum.end()

    def begin(self, session: Any, joins: Any) -> Packet:
        """Take all sites' statements, each checked against the pinned roster; returns the reply to the server.

        Raises:
            ProtocolError, IdentityError, SecureSumError: a statement is not valid, or others were given before.
        """
        found = self.session(session)
        fields = check_joins(joins, found.id, found.plan.hash, self.roster)
        if self.store_for(found.id).get("joins") is None:  # a run that has begun goes on without revoked members
            self.not_revoked(set(fields))
        self._compare_heads(found, joins)
        self.store_for(found.id).put("joins", canonical.dumps({s: dict(f) for s, f in fields.items()}))
        reply = found.sum.begin(fields)
        found.begun = True
        return reply

    def _compare_heads(self, found: Session, joins: dict[SiteId, Any]) -> None:
        """Refuse to help when a copy that this site has signed is of a later ledger, or of another of its data set."""
        told = heads_in(joins, self.roster)
        witness.check_own(self.id, self.ledger, told)
        store = self.store_for(found.id)
        if store.get("barred") is None:
            store.put("barred", canonical.dumps(witness.barred(self.id, self.data_set, self.peers, told)))
        found.barred = frozenset(canonical.loads(store.get("barred") or b"[]"))
        if found.plan.sum != "keysum":  # without agreements, a set cannot be refused
            witness.refuse_barred(told, found.barred)
        self.peers.keep({s: said.own for s, said in told.items() if s != self.id and s not in found.barred})

    def not_revoked(self, sites: Collection[str]) -> None:
        """Raise :class:`IdentityError` if the newest list at this site says that one of these members was revoked.

        The server looks at its own list. This check is for a server that has no list, or ignores it on purpose.
        """
        if self.revoked is None:
            return
        listed = self.revoked()
        for member in (self.roster.server, *self.roster.sites):
            if member.site in sites:
                listed.refuse(member.site, member.tls_key)

    @property
    def _ledger_id(self) -> str:
        """Which ledger this is: the hash of its first row, which names the lineage."""
        return self.ledger.journal.rows[0].hash

    @property
    def data_set(self) -> str:
        """The data set whose budget the ledger counts, by hash: the contract's name for it, or the lineage's."""
        name = self.contract.name if self.contract is not None else self.ledger.tally.lineage
        return self.ledger.tally.data_set or data_set(name, self.ledger.tally.unit)

    @property
    def head(self) -> Copy:
        """Where this site's journal stands, and which journal it is, signed for the others to keep."""
        return self.ledger.journal.copy(self.data_set)

    def witness(self, heads: Mapping[SiteId, Copy]) -> None:
        """Remember the heads of the members' journals; :class:`HelperRefusal` if one of them went back in time.

        So peers notice a site whose disk was restored within a run: it does not know what it charged, nor which keys it
        used.
        """
        for site, head in heads.items():
            witness.check_data_set(site, head, self.data_set)
        self.peers.follow({s: head for s, head in heads.items() if s != self.id})

    def model(self, session: Session) -> OwnModel:
        """This site's own model of a session."""
        if session.model is None:
            start = self.start(session.plan)
            session.model = OwnModel(session.plan, session.sum, self.store_for(session.id), start)
        return session.model

    def keep(self, session: str, weights: bytes) -> None:
        """Write a final model as little-endian float32, readable by the owner only. It stays at the site."""
        if self.models is not None and not (path := self.models / f"{session}.f32").exists():
            identity.write_secret(path, weights)

    def statement(self, session: Session) -> dict[str, Any]:
        """The signed join statement: this site takes part under exactly this plan, roster and contract."""
        return identity.signed(
            self.key,
            JOIN,
            {
                "v": 1,
                "session": session.id,
                "site": self.id,
                "plan_hash": session.plan.hash,
                "roster_hash": self.roster.hash,
                "contract_hash": self.contract_hash,
                "fields": session.sum.join_fields(),
                **witness.told(self.ledger, self.data_set, self.peers),
            },
        )


def _check_name(session: Any) -> str:
    """Refuse a session's name that is not hexadecimal digits only: it becomes the name of a folder."""
    if not isinstance(session, str) or not is_hex(session, 64):
        raise ProtocolError("a session's name is not 64 lower-case hexadecimal digits")
    return session
