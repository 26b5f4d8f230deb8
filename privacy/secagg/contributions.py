"""What a site contributed: one contribution a round, the same bytes for ever, rounds only go forward."""

from __future__ import annotations

import struct

from fedveil.common import canonical
from fedveil.common.errors import MALFORMED, SecureSumError, WireError
from fedveil.common.wire import Packet
from fedveil.privacy.secagg.sealed import SessionKey
from fedveil.privacy.secagg.store import Store


class Contributions:
    """One site's contributions to one session, in its store. The latest complete packet is kept; older are marked.

    Of a session that has ended none is kept: a new object drops what a crash left.
    """

    def __init__(self, session: SessionKey, store: Store) -> None:
        self._session, self._store = session, store
        self._said = (-1, "", "")
        prefix = f"{session.name('contribution')}-"
        kept = sorted(int(name.removeprefix(prefix)) for name in store.names(prefix))
        self._latest = kept.pop() if kept else -1
        for old in kept:  # a crash came between keeping the latest and dropping the one before
            self._forget(old)
        if session.ended:
            self.drop()

    def replay(self, round: int) -> Packet | None:
        """The complete contribution of ``round``, bit for bit, if it is kept."""
        data = self._store.get(self._session.name("contribution", round))
        return None if data is None else from_bytes(data)

    def said(self, round: int) -> tuple[str, str] | None:
        """Of the contribution that is kept of ``round``: its header's digest, and the model state that it names.

        The contribution is read at most once.
        """
        if self._said[0] != round:
            packet = self.replay(round)
            if packet is None:
                return None
            self._said = _said(round, packet)
        return self._said[1:]

    def held(self, round: int, nonce: str) -> Packet | None:
        """What was contributed to ``round`` under ``nonce``, or None if a contribution may be made.

        Raises:
            SecureSumError: the round was contributed to under another nonce, or is over.
        """
        packet = self.replay(round)
        if packet is not None:
            if packet.header["nonce"] != nonce:
                raise SecureSumError(
                    f"round {round} was contributed to under another nonce",
                    hint="a second contribution under the same key would reveal the difference: start a new round",
                )
            return packet
        if round < self._latest or self._store.get(self._session.name("spent", round)) is not None:
            raise SecureSumError(f"round {round} was contributed to and is over", hint="rounds only go forward")
        return None

    def keep(self, round: int, packet: Packet) -> Packet:
        """Store ``packet``, mark the round, and drop the packets of earlier rounds, which nobody may ask for."""
        name = self._session.name
        self._store.put(name("contribution", round), *to_parts(packet))
        self._store.put(name("spent", round), b"spent")
        if 0 <= self._latest < round:
            self._forget(self._latest)
        self._latest, self._said = round, _said(round, packet)
        return packet

    def drop(self) -> None:
        """Drop what is still kept: the session is over."""
        if self._latest >= 0:
            self._forget(self._latest)
        self._said = (-1, "", "")

    def _forget(self, round: int) -> None:
        """Erase the contribution of ``round``, whose mark stays."""
        self._store.put(self._session.name("spent", round), b"spent")
        self._store.erase(self._session.name("contribution", round))


def _said(round: int, packet: Packet) -> tuple[int, str, str]:
    return round, canonical.digest(packet.header), str(packet.header.get("state", ""))


def to_parts(packet: Packet) -> list[bytes]:
    """A packet as byte strings to be stored one after the other."""
    head = canonical.dumps(
        {"header": packet.header, "buffers": [[name, len(data)] for name, data in packet.buffers.items()]}
    )
    return [struct.pack("<I", len(head)), head, *packet.buffers.values()]


def from_bytes(data: bytes) -> Packet:
    """The packet of :func:`to_parts`; the store is trusted, yet a damaged file is a :class:`SecureSumError`."""
    try:
        (size,) = struct.unpack_from("<I", data)
        head = canonical.loads(data[4 : 4 + size])
        at, buffers = 4 + size, dict[str, bytes]()
        for name, length in head["buffers"]:
            buffers[name] = data[at : at + length]
            at += length
        if at != len(data):
            raise ValueError
        return Packet(head["header"], buffers)
    except (*MALFORMED, struct.error, WireError) as e:
        raise SecureSumError("a stored message is damaged", hint="the site sits this round out") from e
