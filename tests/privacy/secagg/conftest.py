"""A whole session in memory: the server, n sites, and every message between them at hand."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Mapping

import numpy as np
import pytest
from numpy.typing import NDArray

from fedveil.common.identity import SERVER, Member, Roster, new_signing_key, public_hex
from fedveil.common.units import SiteId
from fedveil.common.wire import Packet
from fedveil.privacy.secagg.interface import SumSpec
from fedveil.privacy.secagg.server import server_sum
from fedveil.privacy.secagg.site import site_sum
from fedveil.privacy.secagg.store import MemoryStore, Store

KEYS = [new_signing_key() for _ in range(101)]
NAMES = [SiteId(f"site-{i}") for i in range(100)]


class Session:
    """One joined session; ``restart`` makes every site anew from its store before each of its steps."""

    def __init__(
        self,
        protocol: str = "keysum",
        n: int = 3,
        *,
        threshold: int | None = None,
        min_members: int = 2,
        length: int = 10,
        bound: int = 1000,
        rounds: int = 100,
        colluders: int = 0,
        helpers: Iterable[int] = (),
        reveal_to: str = "server",
        stores: Mapping[SiteId, Store] | None = None,
        restart: bool = False,
    ) -> None:
        sites = tuple(Member(NAMES[i], public_hex(KEYS[i])) for i in range(n))
        roster = Roster("test", Member(SERVER, public_hex(KEYS[-1])), sites)
        committee = tuple(NAMES[i] for i in helpers)
        self.spec = SumSpec(
            protocol,
            secrets.token_hex(32),
            "b" * 64,
            roster,
            threshold or (len(committee) or n) // 2 + 1,
            min_members,
            length,
            bound,
            rounds,
            colluders,
            committee,
            reveal_to,
        )
        self.names = NAMES[:n]
        self.stores = stores or {s: MemoryStore() for s in self.names}
        self.restart = restart
        self._sites = {s: self.fresh(s) for s in self.names}
        self.server = server_sum(self.spec)
        joins = {s: self.site(s).join_fields() for s in self.names}
        replies = {s: self.site(s).begin(joins) for s in self.names}
        for s, packet in self.server.begin(joins, replies).items():
            self.site(s).receive(packet)

    def fresh(self, name: SiteId):
        return site_sum(self.spec, name, KEYS[NAMES.index(name)], self.stores[name])

    def site(self, name: SiteId):
        if self.restart:
            self._sites[name] = self.fresh(name)
        return self._sites[name]

    def collect(self, round: int, vectors: Mapping[SiteId, NDArray[np.int64]]) -> None:
        """A round up to its last contribution."""
        self.server.start_round(round, f"nonce-{round}")
        for s, v in vectors.items():
            self.server.add(s, self.site(s).contribute(round, f"nonce-{round}", v))

    def answers(self, helpers: Iterable[SiteId] | None = None) -> dict[SiteId, Packet]:
        """The helpers' answers, not yet given to the server."""
        chosen = set(self.names if helpers is None else helpers)
        for s, request in self.server.agree_requests().items():
            if s in chosen:
                self.server.add_agreement(s, self.site(s).agree(request))
        return {s: self.site(s).open(r) for s, r in self.server.open_requests().items() if s in chosen}

    def vouch(self) -> None:
        """Every member's fingerprint."""
        for s, request in self.server.fingerprint_requests().items():
            self.server.add_fingerprint(s, self.site(s).fingerprint(request))

    def sum(
        self, round: int, vectors: Mapping[SiteId, NDArray[np.int64]], helpers: Iterable[SiteId] | None = None
    ) -> tuple[NDArray[np.int64], tuple[SiteId, ...]]:
        self.collect(round, vectors)
        for s, packet in self.answers(helpers).items():
            self.server.add_answer(s, packet)
        self.vouch()
        if self.spec.reveal_to == "sites":
            return self.site(self.names[-1]).opened(self.server.opened())
        return self.server.result()


@pytest.fixture
def session() -> Callable[..., Session]:
    return Session
