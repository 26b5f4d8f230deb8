"""A joined session of the sum of keys in memory whose server and some of whose sites are the adversary's."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping

import numpy as np
import pytest

from fedveil.common.identity import SERVER, Member, Roster, new_signing_key, public_hex
from fedveil.common.units import SiteId
from fedveil.common.wire import Packet
from fedveil.privacy.secagg import keysum_common as messages
from fedveil.privacy.secagg.interface import SumSpec
from fedveil.privacy.secagg.keysum_server import KeysumServer
from fedveil.privacy.secagg.keysum_site import KeysumSite
from fedveil.privacy.secagg.store import MemoryStore, Store

NINE = [SiteId(f"s{i}") for i in range(9)]
KEYS = {name: new_signing_key() for name in NINE}
SERVER_KEY = new_signing_key()


class World:
    """``n`` joined sites of which the last ``c`` are the adversary's, as is the server.

    Attributes:
        keys: every site's signing key, the honest ones' too.
    """

    keys = KEYS

    def __init__(self, n: int, c: int, threshold: int, min_members: int, length: int = 6) -> None:
        self.names = NINE[:n]
        members = tuple(Member(s, public_hex(KEYS[s])) for s in self.names)
        roster = Roster("hostile", Member(SERVER, public_hex(SERVER_KEY)), members)
        self.spec = SumSpec(
            "keysum", secrets.token_hex(32), "b" * 64, roster, threshold, min_members, length, 1000, 10, c
        )
        self.stores: dict[SiteId, Store] = {s: MemoryStore() for s in self.names}
        self.sites = {s: self.fresh(s) for s in self.names}
        self.server = KeysumServer(self.spec)
        joins = {s: site.join_fields() for s, site in self.sites.items()}
        self.server.begin(joins, {s: site.begin(joins) for s, site in self.sites.items()})
        self.honest, self.colluders = self.names[: n - c], self.names[n - c :]
        self.packets: dict[SiteId, Packet] = {}

    def fresh(self, name: SiteId) -> KeysumSite:
        return KeysumSite(self.spec, name, KEYS[name], self.stores[name])

    def contribute(self, round: int = 1) -> None:
        self.packets = {s: site.contribute(round, "n", np.arange(6)) for s, site in self.sites.items()}

    def announce(self, members: Iterable[SiteId], round: int = 1) -> Packet:
        """An announcement of any set, as a lying server writes it."""
        chosen = [s for s in self.names if s in set(members)]
        header = {"kind": messages.MEMBERS, "session": self.spec.session, "round": round, "nonce": "n"}
        return Packet({**header, "members": [self.packets[s].header for s in chosen]})

    def digest(self, members: Iterable[SiteId], round: int = 1) -> str:
        chosen = {s: messages.canonical.digest(self.packets[s].header) for s in set(members)}
        return messages.members_digest(self.spec, round, chosen)

    def forge(self, colluder: SiteId, digest: str, round: int = 1) -> str:
        """A colluder signs whatever is asked."""
        header = messages.agreement_header(self.spec, round, colluder, digest)
        return messages.sign_header(KEYS[colluder], header)["signature"]

    def ask(self, helper: SiteId, members: Iterable[SiteId], agreements: Mapping[SiteId, str]) -> Packet:
        at = self.names.index(helper) * messages.BOX_BYTES
        chosen = [s for s in self.names if s in set(members)]
        boxes = [self.packets[s].buffers["shares"][at : at + messages.BOX_BYTES] for s in chosen]
        header = {"kind": messages.OPEN, "session": self.spec.session, "round": 1}
        header |= {"digest": self.digest(members), "agreements": dict(agreements)}
        return Packet(header, {"shares": b"".join(boxes)})

    def share_of(self, dealer: SiteId, helper: SiteId) -> np.ndarray:
        """What ``helper`` was dealt: the adversary reads it for its own sites."""
        said = self.packets[dealer].header
        at = self.names.index(helper) * messages.BOX_BYTES
        box = self.packets[dealer].buffers["shares"][at : at + messages.BOX_BYTES]
        data = self.sites[helper]._session.unseal(dealer, messages.box_context(1, "n", said["ciphertext"]), box)
        return np.frombuffer(data, "<u2").astype(np.int64)


@pytest.fixture
def new_world() -> type[World]:
    """:class:`World`, to be made with the numbers of sites and colluders, threshold and smallest number of members."""
    return World
