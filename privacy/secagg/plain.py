"""No secure sum: vectors travel in the clear and the server adds them.

``plain`` stands in for encryption in the simulator, where all sites share one process anyway; ``none`` is for mode
``local``, where every vector is private by itself. **The server sees every site's vector**. The plan and every site's
policy decide who may choose these protocols.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedveil.common.errors import FedveilError, HelperRefusal, SecureSumError
from fedveil.common.units import SiteId
from fedveil.common.wire import Packet
from fedveil.privacy.secagg import opened_sum
from fedveil.privacy.secagg.interface import (
    READY,
    Head,
    Integers,
    ServerSum,
    SiteSum,
    SumSpec,
    Witness,
    another_state,
)
from fedveil.privacy.secagg.store import Store


class PlainSite(SiteSum):
    """Sends its vector as it is, (D,) little-endian int64, unsigned."""

    def __init__(self, spec: SumSpec, site: SiteId, store: Store) -> None:
        self._spec, self._site, self._store = spec, site, store
        self._index = spec.roster.index(site)
        # Nothing real is protected in the simulator, and thousands of sites share one process.
        self._durable = spec.protocol == "none"
        self._first_kept, self._latest = 0, ("", "", b"")

    def join_fields(self) -> dict[str, Any]:
        """Nothing: there are no keys."""
        return {}

    def begin(self, joins: Mapping[SiteId, Mapping[str, Any]]) -> Packet:
        """See :meth:`SiteSum.begin`."""
        if self._site not in joins:
            raise SecureSumError(f"site {self._site!r} is not among the joined sites")
        return Packet({"kind": READY})

    def receive(self, packet: Packet) -> None:
        """Nothing is relayed in this protocol."""
        raise SecureSumError(f"an unexpected message in the protocol {self._spec.protocol!r}")

    def contribute(self, round: int, nonce: str, values: Integers, head: Head | None = None, state: str = "") -> Packet:
        """See :meth:`SiteSum.contribute`."""
        self._spec.check_round(round, nonce)
        held = self._held(round)
        if held is not None:
            if held[0] != nonce:
                raise SecureSumError(f"round {round} was contributed to under another nonce")
            return self._packet(round, *held)
        if round < self._first_kept or self._store.get(self._name("nonce", round)) is not None:
            raise SecureSumError(f"round {round} was contributed to and is over")
        data = self._spec.vector(values).astype("<i8", copy=False).tobytes()
        if self._durable:
            self._store.put(self._name("contribution", round), f"{nonce}\n{state}\n".encode() + data)
            self._store.put(self._name("nonce", round), nonce.encode())
            for old in range(self._first_kept, round):
                self._store.erase(self._name("contribution", old))
        self._first_kept, self._latest = round, (nonce, state, data)
        return self._packet(round, nonce, state, data)

    def replay(self, round: int) -> Packet | None:
        """See :meth:`SiteSum.replay`."""
        held = self._held(round)
        return None if held is None else self._packet(round, *held)

    def agree(self, request: Packet, witness: Witness | None = None) -> Packet:
        """This protocol has no agreement: always refused."""
        raise HelperRefusal(f"the protocol {self._spec.protocol!r} has no agreement step")

    def open(self, request: Packet) -> Packet:
        """This protocol opens nothing: always refused."""
        raise HelperRefusal(f"the protocol {self._spec.protocol!r} has no opening step")

    def opened(self, packet: Packet) -> tuple[NDArray[np.int64], tuple[SiteId, ...]]:
        """See :meth:`SiteSum.opened`: the server's word."""
        return opened_sum.unpack(self._spec, packet)

    def end(self) -> None:
        """Nothing to destroy."""

    def _name(self, what: str, round: int) -> str:
        return f"{self._spec.session}-{self._index}-{what}-{round}"

    def _held(self, round: int) -> tuple[str, str, bytes] | None:
        if round == self._first_kept and self._latest[0]:
            return self._latest
        stored = self._store.get(self._name("contribution", round))
        if stored is None:
            return None
        nonce, state, data = stored.split(b"\n", 2)
        return nonce.decode(), state.decode(), data

    def _packet(self, round: int, nonce: str, state: str, data: bytes) -> Packet:
        said = header(self._spec.protocol, self._spec.session, round, nonce, self._site, state)
        return Packet(said, {"values": data})


def header(protocol: str, session: str, round: int, nonce: str, site: SiteId, state: str) -> dict[str, Any]:
    """What a contribution says beside its values."""
    return {
        "kind": f"{protocol}/contribution",
        "session": session,
        "round": round,
        "nonce": nonce,
        "site": site,
        **({"state": state} if state else {}),
    }


class Together(NamedTuple):
    """What the sites of one process, a simulation's, contribute to a round: added up already.

    Attributes:
        sites: whose vectors are in it, each once.
        state: the model state that all of them were computed from.
        values: ``(D,)`` int64, the sum.
        refusals: why the other sites that were asked do not contribute.
    """

    sites: tuple[SiteId, ...]
    state: str
    values: NDArray[np.int64]
    refusals: Mapping[SiteId, FedveilError]

    @classmethod
    def nothing(cls, refusals: Mapping[SiteId, FedveilError]) -> Together:
        """No site contributes."""
        return cls((), "", np.zeros(0, np.int64), refusals)


class PlainServer(ServerSum):
    """Adds vectors as they come. Exact: int64 addition modulo 2^64, the sum being below 2^62 by the spec."""

    def __init__(self, spec: SumSpec) -> None:
        self._spec = spec
        self._kind = f"{spec.protocol}/contribution"
        self._round: tuple[int, str, str] | None = None
        self._sum = np.zeros(spec.length, np.int64)
        self._members: set[SiteId] = set()

    def begin(
        self, joins: Mapping[SiteId, Mapping[str, Any]], replies: Mapping[SiteId, Packet]
    ) -> dict[SiteId, Packet]:
        """See :meth:`ServerSum.begin`; nothing is relayed."""
        for site in (*joins, *replies):
            self._spec.roster.index(site)
        return {}

    def start_round(self, round: int, nonce: str, state: str = "") -> None:
        """See :meth:`ServerSum.start_round`."""
        self._spec.check_round(round, nonce)
        self._round = (round, nonce, state)
        self._sum = np.zeros(self._spec.length, np.int64)
        self._members = set()

    def add(self, site: SiteId, packet: Packet) -> None:
        """See :meth:`ServerSum.add`."""
        if self._round is None:
            raise SecureSumError("no round is open")
        self._spec.roster.index(site)
        header = packet.expect(self._kind).header
        round, nonce, state = self._round
        if (header.get("round"), header.get("nonce")) != (round, nonce) or header.get("session") != self._spec.session:
            raise SecureSumError(f"a contribution of {site!r} for another session, round or nonce")
        if header.get("site") != site:
            raise SecureSumError(f"a contribution in another site's name came from {site!r}")
        if header.get("state", "") != state:
            raise another_state(site)
        if site in self._members:
            raise SecureSumError(f"{site!r} contributed to round {round} before")
        data = packet.buffer("values", 8 * self._spec.length)
        self._sum += np.frombuffer(data, "<i8")
        self._members.add(site)

    def add_together(self, given: Together) -> None:
        """As :meth:`add`, for all sites of ``given``; only sums that nothing protects can take vectors so."""
        if self._round is None:
            raise SecureSumError("no round is open")
        if not given.sites:
            return
        for site in given.sites:
            self._spec.roster.index(site)
            if given.state != self._round[2]:
                raise another_state(site)
        if not self._members.isdisjoint(given.sites) or len(set(given.sites)) != len(given.sites):
            raise SecureSumError(f"a site contributed to round {self._round[0]} before")
        self._sum += self._spec.vector(given.values)  # which may refuse
        self._members.update(given.sites)

    @property
    def members(self) -> tuple[SiteId, ...]:
        """See :attr:`ServerSum.members`."""
        return tuple(sorted(self._members, key=self._spec.roster.index))

    def agree_requests(self) -> dict[SiteId, Packet]:
        """None: there is nothing to agree on."""
        self._check_members()
        return {}

    def add_agreement(self, site: SiteId, packet: Packet) -> None:
        """This protocol has no agreement."""
        raise SecureSumError(f"an unexpected agreement of {site!r}")

    def open_requests(self) -> dict[SiteId, Packet]:
        """None: the sum is open."""
        return {}

    def add_answer(self, site: SiteId, packet: Packet) -> None:
        """This protocol has no answers."""
        raise SecureSumError(f"an unexpected answer of {site!r}")

    def result(self) -> tuple[NDArray[np.int64], tuple[SiteId, ...]]:
        """See :meth:`ServerSum.result`; the bound is checked."""
        self._check_members()
        if self._sum.max() > self._spec.bound or self._sum.min() < -self._spec.bound:
            raise SecureSumError("the sum left the bound declared in the plan", hint="the plan's range is too small")
        return self._sum.copy(), self.members

    def opened(self) -> Packet:
        """See :meth:`ServerSum.opened`."""
        if self._round is None:
            raise SecureSumError("no round is open")
        values, members = self.result()
        return opened_sum.pack(self._spec, self._round[0], members, values)

    def _check_members(self) -> None:
        if len(self._members) < self._spec.min_members:
            raise SecureSumError(
                f"{len(self._members)} sites contributed; a sum of fewer than {self._spec.min_members} is never opened"
            )
