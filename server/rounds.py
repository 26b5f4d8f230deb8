"""One round of the secure sum as a state machine that only goes forward. It does no I/O and keeps no clock.

The caller (the strategy) moves messages. The class decides what each message may do in the round's present state
(docs/protocol.md, section 3.3)::

    COLLECTING   contributions are admitted and added, one per site
    AGREEING     the set U is fixed; helpers sign it
    OPENING      helpers that saw enough signatures answer with sums of shares
    VERIFYING    the sum of U is open; its members vouch for it
    DONE         the sum of U is open, and verified where the protocol can
    ABORTED      too few members, signatures or answers, or no proof: the round is charged and gives nothing
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from fedveil.common.errors import FedveilError, ProtocolError, RunAborted, SecureSumError, SumTooLong, UnverifiedOpening
from fedveil.common.units import SiteId
from fedveil.common.wire import Packet
from fedveil.privacy import norm_cap
from fedveil.privacy.plan import PrivacyPlan
from fedveil.privacy.secagg.interface import ServerSum
from fedveil.privacy.secagg.plain import PlainServer, Together


class Phase(IntEnum):
    """Where a round stands; it only ever grows."""

    COLLECTING = 1
    AGREEING = 2
    OPENING = 3
    VERIFYING = 4
    DONE = 5
    ABORTED = 6


class Round:
    """Round ``number`` over one :class:`ServerSum`.

    Args:
        state: the model state that every contribution must name.

    Attributes:
        refusals: by site, the error that its message caused. They are counted and reported, never dropped silently.
    """

    def __init__(self, plan: PrivacyPlan, server_sum: ServerSum, number: int, nonce: str, state: str = "") -> None:
        if not 1 <= number <= plan.steps:
            raise ProtocolError(f"round {number} is outside the plan's 1..{plan.steps}")
        self.plan, self.number, self.nonce = plan, number, nonce
        self.phase = Phase.COLLECTING
        self.refusals: dict[SiteId, FedveilError] = {}
        self._sum = server_sum
        self._sum.start_round(number, nonce, state)

    def collect(self, site: SiteId, packet: Packet) -> None:
        """Admit one contribution (signature, roster, session, round, sizes, no second one) and add it."""
        self._require(Phase.COLLECTING)
        self._try(site, lambda: self._sum.add(site, packet))

    def collect_together(self, given: Together) -> None:
        """Admit what the sites of one process contribute in one go: a simulation of a sum in the clear.

        Raises:
            ProtocolError: this sum takes one contribution after the other.
        """
        self._require(Phase.COLLECTING)
        if not isinstance(self._sum, PlainServer):
            raise ProtocolError(f"a {self.plan.sum} sum takes one contribution after the other")
        self._sum.add_together(given)
        self.refusals.update(given.refusals)

    def refuse(self, site: SiteId, error: FedveilError) -> None:
        """Record that ``site`` answered with an error, in any phase."""
        self.refusals[site] = error

    @property
    def members(self) -> tuple[SiteId, ...]:
        """U: the sites whose contributions are in the sum."""
        return self._sum.members

    @property
    def suspects(self) -> tuple[SiteId, ...]:
        """Helpers whose answers were wrong and corrected."""
        return self._sum.suspects

    def close(self) -> dict[SiteId, Packet]:
        """Fix U; returns the requests that ask every helper to sign it (none for sums without keys).

        Raises:
            RunAborted: fewer than n - d members; the round is over.
        """
        self._require(Phase.COLLECTING)
        if len(self.members) < self.plan.members:
            raise self._abort(f"{len(self.members)} of at least {self.plan.members} sites contributed")
        self.phase = Phase.AGREEING
        return self._sum.agree_requests()

    def agree(self, site: SiteId, packet: Packet) -> None:
        """Take one helper's signature of U."""
        self._require(Phase.AGREEING)
        self._try(site, lambda: self._sum.add_agreement(site, packet))

    def ask(self) -> dict[SiteId, Packet]:
        """The requests for sums of shares; :class:`RunAborted` if too few helpers signed U."""
        self._require(Phase.AGREEING)
        self.phase = Phase.OPENING
        try:
            return self._sum.open_requests()
        except SecureSumError as e:
            raise self._abort(e.message) from e

    def answer(self, site: SiteId, packet: Packet) -> None:
        """Take one helper's sum of shares."""
        self._require(Phase.OPENING)
        self._try(site, lambda: self._sum.add_answer(site, packet))

    def verify(self) -> dict[SiteId, Packet]:
        """Open the sum; the requests that ask its members to vouch for it (none for sums that cannot be verified).

        Raises:
            RunAborted: it cannot be opened.
        """
        self._require(Phase.OPENING)
        self.phase = Phase.VERIFYING
        try:
            return self._sum.fingerprint_requests()
        except SecureSumError as e:
            raise self._abort(e.message) from e

    def fingerprint(self, site: SiteId, packet: Packet) -> None:
        """Take one member's fingerprint."""
        self._require(Phase.VERIFYING)
        self._try(site, lambda: self._sum.add_fingerprint(site, packet))

    def opened(self) -> tuple[Packet, NDArray[np.int64] | None]:
        """The opened sum as the sites get it, and its ``(D,)`` integers where the server reads it.

        Raises:
            RunAborted: it cannot be opened, is longer than records and noise can make it, or not every member vouched
                for it.
        """
        self._require(Phase.VERIFYING)
        try:
            values = None
            if self.plan.reveal_to == "server":
                values, members = self._sum.result()
                if len(members) < self.plan.members:
                    raise self._abort(f"the sum holds {len(members)} sites, fewer than {self.plan.members}")
                norm_cap.check(self.plan, values, len(members))
            packet = self._sum.opened()
        except (SecureSumError, SumTooLong) as e:
            for site in self._sum.unvouched:
                self.refusals.setdefault(site, UnverifiedOpening("it did not vouch for the sum: the round is lost"))
            raise self._abort(e.message) from e
        self._done()
        return packet, values

    def _done(self) -> None:
        for site in self.suspects:
            self.refuse(site, SecureSumError("a wrong sum of shares, corrected", hint="or it was dealt a wrong share"))
        self.phase = Phase.DONE

    def _try(self, site: SiteId, step: Callable[[], None]) -> None:
        try:
            step()
        except FedveilError as e:
            self.refuse(site, e)

    def _require(self, phase: Phase) -> None:
        if self.phase is not phase:
            raise ProtocolError(f"round {self.number} is {self.phase.name}, not {phase.name}")

    def _abort(self, why: str) -> RunAborted:
        self.phase = Phase.ABORTED
        return RunAborted(f"round {self.number}: {why}", hint="the round is charged; the run goes on with the next")
