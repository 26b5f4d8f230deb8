"""The secure sum, seen from outside: one session per run, one sum per round, two halves that never share a secret.

A site and the server meet in fixed steps; every step's message is a :class:`~fedveil.common.wire.Packet`::

    SiteSum.join_fields -> (the caller signs and spreads them) -> SiteSum.begin, ServerSum.begin, SiteSum.receive
    each round:  ServerSum.start_round -> SiteSum.contribute -> ServerSum.add
                 -> ServerSum.agree_requests -> SiteSum.agree -> ServerSum.add_agreement
                 -> ServerSum.open_requests  -> SiteSum.open  -> ServerSum.add_answer
                 -> ServerSum.fingerprint_requests -> SiteSum.fingerprint -> ServerSum.add_fingerprint
                 -> ServerSum.result, ServerSum.opened -> SiteSum.opened
    SiteSum.end

Every implementation is an exact homomorphism: the opened vector equals the integer sum of the members'
vectors, whatever their signs and sizes, as long as that *sum* stays within ``SumSpec.bound``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedveil.common.errors import HelperRefusal, IdentityError, SecureSumError, StateMismatch, WireError
from fedveil.common.identity import Roster
from fedveil.common.journal import Copy
from fedveil.common.units import SiteId
from fedveil.common.wire import Packet

PROTOCOLS = ("keysum", "sharedkey", "plain", "none")
REVEAL_TO = ("server", "sites")
MAX_LENGTH = 1 << 30
MAX_NONCE = 128
READY = "sum/ready"

Integers = NDArray[np.int64 | np.int32]
Head = Copy  # where a site's journal stands, signed by the site
Witness = Callable[[Mapping[SiteId, Head]], None]


@dataclass(frozen=True)
class SumSpec:
    """What both halves of one session know; public.

    Attributes:
        protocol: ``keysum``, ``sharedkey``, ``plain`` or ``none``.
        session: 64 hexadecimal digits, unique per run.
        plan_hash: hash of the signed privacy plan, 64 hexadecimal digits.
        roster: the members; all signatures are checked against it.
        threshold: T, the number of answers that open a sum.
        min_members: n - d; a sum of fewer sites is never opened.
        length: D, the number of integers in a vector.
        bound: largest absolute value of any coordinate of any opened sum; the caller guarantees it except
            with negligible probability. One site's values may exceed it.
        rounds: the number of planned rounds, aborted ones included; rounds are numbered within 0..rounds.
        colluders: c, how many sites may collude with the server; T must exceed half of helpers and colluders.
        helpers: the committee that receives shares and opens sums, in roster order; empty for all sites. It must
            have been drawn at random, by nobody's choice, from sites whose collusion does not depend on it.
        reveal_to: who learns the sum: the ``server``, or only the ``sites`` (``keysum`` alone; see ``blinding``).
    """

    protocol: str
    session: str
    plan_hash: str
    roster: Roster
    threshold: int
    min_members: int
    length: int
    bound: int
    rounds: int
    colluders: int = 0
    helpers: tuple[SiteId, ...] = ()
    reveal_to: str = "server"

    def __post_init__(self) -> None:
        n = len(self.roster.sites)
        if self.protocol not in PROTOCOLS:
            raise SecureSumError(f"unknown protocol {self.protocol[:32]!r}", hint=f"one of {', '.join(PROTOCOLS)}")
        for what, value in (("session", self.session), ("plan hash", self.plan_hash)):
            if not is_hex(value, 64):
                raise SecureSumError(f"the {what} is not 64 lower-case hexadecimal digits")
        for what, value, low, high in (
            ("threshold", self.threshold, 1, len(self.all_helpers)),
            ("number of colluders", self.colluders, 0, n - 1),
            ("smallest number of members", self.min_members, 1, n),
            ("length", self.length, 1, MAX_LENGTH),
            ("bound", self.bound, 0, (1 << 62) - 1),
            ("number of rounds", self.rounds, 1, 1 << 31),
        ):
            if not low <= value <= high:
                raise SecureSumError(f"the {what} of a secure sum, {value}, is outside {low}..{high}")
        order = [self.roster.index(site) for site in self.helpers]
        if any(a >= b for a, b in pairwise(order)):
            raise SecureSumError("the helpers of a secure sum are not distinct sites in roster order")
        if self.helpers and self.protocol != "keysum":
            raise SecureSumError(f"the protocol {self.protocol!r} has no committee", hint="use keysum")
        if self.reveal_to not in REVEAL_TO or (self.reveal_to != "server" and self.protocol != "keysum"):
            raise SecureSumError(
                f"the protocol {self.protocol!r} cannot reveal its sums to {self.reveal_to[:32]!r}",
                hint="'server', or with keysum 'sites'",
            )

    @property
    def all_helpers(self) -> tuple[SiteId, ...]:
        """Who receives shares: the committee, or all sites; their order gives the Shamir indices 1..m."""
        return self.helpers or tuple(m.site for m in self.roster.sites)

    @property
    def quorum(self) -> int:
        """t + d + 1: what so many distinct sites have signed, at least one honest site has signed."""
        return self.colluders + len(self.roster.sites) - self.min_members + 1

    @property
    def figures(self) -> dict[str, Any]:
        """What two sites must have in common beside session, plan and roster; bound into every contribution."""
        return {
            "protocol": self.protocol,
            "threshold": self.threshold,
            "min_members": self.min_members,
            "length": self.length,
            "bound": self.bound,
            "rounds": self.rounds,
            "colluders": self.colluders,
            "helpers": list(self.helpers),
            "reveal_to": self.reveal_to,
        }

    def check_round(self, round: int, nonce: str) -> None:
        """Raise :class:`SecureSumError` unless ``round`` is planned and ``nonce`` is 1 to 128 ASCII characters."""
        if not 0 <= round <= self.rounds:
            raise SecureSumError(f"round {round} is outside the planned 0..{self.rounds}")
        if not (0 < len(nonce) <= MAX_NONCE and nonce.isascii() and nonce.isprintable()):
            raise SecureSumError(f"the nonce of round {round} is not 1 to {MAX_NONCE} printable ASCII characters")

    def members(self, names: Any) -> tuple[SiteId, ...]:
        """The members that an opened sum or a challenge names.

        Raises:
            WireError, SecureSumError: no list of names; fewer than ``min_members``; one twice, out of roster order or
                not on the roster.
        """
        if not isinstance(names, list) or len(names) > len(self.roster.sites):
            raise WireError("the members of a sum are malformed")
        try:
            order = [self.roster.index(SiteId(m)) if isinstance(m, str) else -1 for m in names]
        except IdentityError as e:
            raise SecureSumError("a sum names a member that is not on the roster") from e
        if len(order) < self.min_members or any(a >= b for a, b in pairwise([-1, *order])):
            raise SecureSumError("the members of a sum are too few, out of order, or named twice")
        return tuple(SiteId(m) for m in names)

    def vector(self, values: Integers) -> Integers:
        """``values``, if it is a (D,) array of int64 or int32; a contiguous copy where it is not contiguous."""
        if values.dtype not in (np.int64, np.int32) or values.shape != (self.length,):
            raise SecureSumError(
                f"a vector of shape {values.shape} and type {values.dtype}, not ({self.length},) int64 or int32",
                hint="quantise to integers first",
            )
        return np.ascontiguousarray(values)


class SiteSum(ABC):
    """One site's half of one session."""

    @abstractmethod
    def join_fields(self) -> dict[str, Any]:
        """Public fields for the site's signed join statement, e.g. ``{"x25519": hex}``; the same on every call."""

    @abstractmethod
    def begin(self, joins: Mapping[SiteId, Mapping[str, Any]]) -> Packet:
        """Take all sites' join fields (their signatures verified by the caller); returns the reply to the server.

        Raises:
            SecureSumError: this site is missing, a site is not on the roster, or another set was given before.
        """

    @abstractmethod
    def receive(self, packet: Packet) -> None:
        """Take what the server relays after all replies came; :class:`SecureSumError` if nothing was expected."""

    @abstractmethod
    def contribute(self, round: int, nonce: str, values: Integers, head: Head | None = None, state: str = "") -> Packet:
        """This site's contribution: (D,) integers of any sign, noise included; on stable storage on return.

        int32 takes half of the memory of int64 and gives the same contribution; the vector is only read.

        Args:
            head: where this site's journal stands; protocols with an agreement show it to the helpers.
            state: SHA-256 (hex) of the model state that the values were computed from. The contribution names it, and
                the server adds up only contributions that name one and the same.

        A second call for the same round and nonce returns the same bytes and ignores ``values``.

        Raises:
            SecureSumError: another nonce for a round that was contributed to, a wrong shape, an ended session.
        """

    @abstractmethod
    def replay(self, round: int) -> Packet | None:
        """The complete contribution of ``round`` if it is the latest one made, bit for bit; else None."""

    @abstractmethod
    def agree(self, request: Packet, witness: Witness | None = None) -> Packet:
        """Check the announced members of a sum and sign them; :class:`HelperRefusal` otherwise.

        The members' contributions must name one model state, and the one that this site's own contribution names.
        ``witness`` is given the members' signed journal heads before anything is promised, and may refuse.
        """

    @abstractmethod
    def open(self, request: Packet) -> Packet:
        """Help to open the agreed sum; :class:`HelperRefusal` otherwise."""

    def fingerprint(self, request: Packet) -> Packet:
        """Vouch for an opening: the signed fingerprint of this member's own ciphertext, under one challenge a round.

        A repeated request gets the same bytes. Raises :class:`HelperRefusal`, always where the protocol has no such
        step.
        """
        raise HelperRefusal(f"this sum has no fingerprints ({request.kind[:64]!r})")

    @abstractmethod
    def opened(self, packet: Packet) -> tuple[NDArray[np.int64], tuple[SiteId, ...]]:
        """The sum in :meth:`ServerSum.opened`'s packet, (D,) int64, and its members.

        ``keysum`` verifies that it is the sum of the members' signed contributions, against the server alone. Under
        every other protocol it is the server's word.

        Raises:
            UnverifiedOpening: it does not verify.
            SecureSumError, WireError: the packet does not hold.
        """

    def named(self, value: Any) -> tuple[int, str]:
        """The round and the model state that its members named, from what the server shows: see :mod:`.named_state`.

        Raises:
            SecureSumError, WireError: it does not hold, or the protocol has no signed contributions.
        """
        raise SecureSumError("a model state as a whole, in a protocol whose contributions are not signed")

    @abstractmethod
    def end(self) -> None:
        """Destroy the session's secrets. Calling it again does nothing."""


class ServerSum(ABC):
    """The server's half of one session."""

    @abstractmethod
    def begin(
        self, joins: Mapping[SiteId, Mapping[str, Any]], replies: Mapping[SiteId, Packet]
    ) -> dict[SiteId, Packet]:
        """Take the sites' join fields and replies; returns packets to relay to sites (often none)."""

    @abstractmethod
    def start_round(self, round: int, nonce: str, state: str = "") -> None:
        """Forget the round before and begin ``round``.

        Args:
            nonce: what the sites contribute under.
            state: the model state that they compute from; a contribution that names another one is refused.
        """

    @abstractmethod
    def add(self, site: SiteId, packet: Packet) -> None:
        """Verify a contribution completely, then add it.

        Raises:
            SecureSumError, WireError: the packet is refused; the sum is as it was before.
        """

    @property
    @abstractmethod
    def members(self) -> tuple[SiteId, ...]:
        """The sites whose contributions are in the sum, in roster order."""

    @property
    def headers(self) -> tuple[dict[str, Any], ...]:
        """The members' signed headers, in roster order; none where contributions are not signed."""
        return ()

    @abstractmethod
    def agree_requests(self) -> dict[SiteId, Packet]:
        """Close the sum and ask all sites to sign its members; empty if the protocol needs no agreement.

        Raises:
            SecureSumError: fewer than ``min_members`` contributed.
        """

    @abstractmethod
    def add_agreement(self, site: SiteId, packet: Packet) -> None:
        """Take one site's signature; :class:`SecureSumError` or :class:`WireError` if it does not hold."""

    @abstractmethod
    def open_requests(self) -> dict[SiteId, Packet]:
        """Requests to open the sum; empty if none is needed. :class:`SecureSumError` below T agreements."""

    @abstractmethod
    def add_answer(self, site: SiteId, packet: Packet) -> None:
        """Take one site's answer; :class:`SecureSumError` or :class:`WireError` if it does not hold."""

    def fingerprint_requests(self) -> dict[SiteId, Packet]:
        """Open the sum and ask every member to vouch for it; empty if the protocol has no fingerprints.

        Raises:
            SecureSumError: it cannot be opened.
        """
        return {}

    def add_fingerprint(self, site: SiteId, packet: Packet) -> None:
        """Take one member's fingerprint; :class:`SecureSumError` or :class:`WireError` if it does not hold."""
        raise SecureSumError(f"{site!r} was asked for no fingerprint")

    @abstractmethod
    def result(self) -> tuple[NDArray[np.int64], tuple[SiteId, ...]]:
        """The opened sum, (D,) int64, and its members; :class:`SecureSumError` says why there is none."""

    @abstractmethod
    def opened(self) -> Packet:
        """The opened sum for all sites: in the clear, or as only they can read it (``reveal_to = "sites"``).

        Raises:
            UnverifiedOpening: a member's fingerprint is missing or wrong: see :attr:`unvouched`.
            SecureSumError: it says why there is none.
        """

    @property
    def unvouched(self) -> tuple[SiteId, ...]:
        """Members of a sum that :meth:`opened` refused whose fingerprints are missing or known to be wrong."""
        return ()

    @property
    def suspects(self) -> tuple[SiteId, ...]:
        """Sites whose answers were wrong in the last opened round, in roster order.

        A member that dealt a helper a wrong share makes that helper's answer wrong. So this is no proof, only a reason
        to ask others instead (:class:`~fedveil.privacy.secagg.round_outcomes.Conduct`).
        """
        return ()


def another_state(site: SiteId) -> StateMismatch:
    """What the server says of a contribution that it leaves out."""
    return StateMismatch(
        f"{site!r} computed its contribution from another model state than this round's",
        hint="the site lacks a sum, or was given another one; it gets the sums that it lacks before the next round",
    )


def is_hex(value: object, digits: int) -> bool:
    """True for a string of exactly ``digits`` lower-case hexadecimal digits."""
    return isinstance(value, str) and len(value) == digits and not value.strip("0123456789abcdef")
