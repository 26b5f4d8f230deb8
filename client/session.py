"""A site and its part in one run: what was signed, what was charged, what may still happen. Forward only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray

from fedveil.client import policy
from fedveil.common import canonical, identity
from fedveil.common.errors import BudgetExhausted, PolicyRefusal, ProtocolError
from fedveil.common.identity import Roster
from fedveil.common.settings import LimitsSection
from fedveil.common.units import SiteId
from fedveil.privacy import plan as plans
from fedveil.privacy.joining import JOIN, sum_spec
from fedveil.privacy.ledger import Ledger
from fedveil.privacy.plan import PrivacyPlan
from fedveil.privacy.secagg.interface import SiteSum
from fedveil.privacy.secagg.site import site_sum
from fedveil.privacy.secagg.store import Store


@dataclass
class Session:
    """One run at one site, after its plan was accepted.

    Attributes:
        id: 64 hexadecimal digits.
        plan: what this site signed.
        sum: this site's half of the secure sum.
    """

    id: str
    plan: PrivacyPlan
    sum: SiteSum


@dataclass
class Site:
    """Everything a site needs to answer; made from ``site.toml``, or by the simulator.

    Attributes:
        id: its name on the roster.
        key: its Ed25519 key.
        roster: the pinned roster.
        contract_hash: hash of the contract its data were checked against.
        width, classes: number of features and classes, from the contract.
        limits: what no server can lift.
        X: ``(n, features)`` encoded records. y: ``(n,)`` class indices. Neither ever leaves.
        evidence: pass/fail and salted commitments of ingestion; may leave.
        ledger: the budget of the data's lineage.
        store_for: durable storage of one session.
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
    engine: str = "auto"
    device: str = "cpu"
    _sessions: dict[str, Session] = field(default_factory=dict)

    def accept(self, session: str, plan_json: Any, roster_hash: str, contract_hash: str) -> Session:
        """Check a proposed plan against everything this site holds, and take part.

        Raises:
            PlanError, PolicyRefusal, ProtocolError, BudgetExhausted: the site does not take part.
        """
        if not (isinstance(session, str) and len(session) == 64 and session == session.lower()):
            raise ProtocolError("a session's name is not 64 lower-case hexadecimal digits")
        if roster_hash != self.roster.hash:
            raise ProtocolError("the server uses another roster than the one this site has pinned")
        if contract_hash != self.contract_hash:
            raise ProtocolError("the server uses another data contract than the one this site's data were checked by")
        plan = plans.from_json(plan_json)
        if plan.contract_hash != contract_hash:
            raise ProtocolError("the plan was made for another data contract")
        if plan.sites != len(self.roster.sites):
            raise ProtocolError(f"the plan speaks of {plan.sites} sites, the roster of {len(self.roster.sites)}")
        if (plan.model.inputs, plan.model.classes) != (self.width, self.classes):
            raise ProtocolError("the plan's model does not fit the contract's features and classes")
        if self.ledger.tally.unit != plan.unit:
            raise PolicyRefusal(f"this site's ledger counts each {self.ledger.tally.unit}, the plan each {plan.unit}")
        policy.check(plan, self.limits)
        known = self._open(session, plan)
        if known.plan.hash != plan.hash:
            raise ProtocolError("another plan was signed for this session")
        accepted = {r.body.get("session") for r in self.ledger.journal.of_kind("plan.accepted")}
        if session not in accepted:
            if self.ledger.affords(plan.event) < 1:
                self.ledger.note("refused", session=session, reason=BudgetExhausted.__name__)
                raise BudgetExhausted("the budget of this site's data set does not carry one step of the plan")
            self.ledger.note("data.released", **self.evidence)
            self.ledger.note(
                "plan.accepted",
                session=session, plan_hash=plan.hash, roster_hash=roster_hash, contract_hash=contract_hash,
            )  # fmt: skip
        return known

    def _open(self, session: str, plan: PrivacyPlan) -> Session:
        """The session, from memory or made anew; its plan is on disk before anything is signed."""
        if session not in self._sessions:
            store = self.store_for(session)
            held = store.get("plan")
            if held is not None:
                plan = plans.from_json(canonical.loads(held))
            else:
                store.put("plan", canonical.dumps(plan.to_json()))
            spec = sum_spec(plan, session, self.roster)
            self._sessions[session] = Session(session, plan, site_sum(spec, self.id, self.key, store))
        return self._sessions[session]

    def session(self, session: Any) -> Session:
        """A session this site has joined, also after a restart.

        Raises:
            ProtocolError: it has not.
        """
        if isinstance(session, str) and session in self._sessions:
            return self._sessions[session]
        if not (isinstance(session, str) and len(session) == 64 and session.isalnum()):
            raise ProtocolError("a session's name is not 64 lower-case hexadecimal digits")
        held = self.store_for(session).get("plan")
        if held is None:
            raise ProtocolError("this site has not joined that session", hint="start the run again")
        found = self._open(session, plans.from_json(canonical.loads(held)))
        if (joins := self.store_for(session).get("joins")) is not None:
            found.sum.begin(canonical.loads(joins))
        return found

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
                "head": list(self.ledger.head),
            },
        )
