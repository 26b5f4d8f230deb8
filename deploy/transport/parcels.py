"""What the mailbox keeps: sessions, messages on their way out, replies on their way in."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from flwr.app import Message

from fedveil.common.units import SiteId
from fedveil.deploy.transport.codec import Decoder
from fedveil.deploy.transport.guard import Pace, Strikes


def nothing() -> None:
    """For a stream that nobody can break off."""


@dataclass(eq=False)
class Session:
    """One open stream of a site's process.

    Attributes:
        instance: the process's own name for itself.
        cancel: breaks the stream off, from any thread.
        certificate: what the process showed, PEM.
        current: the id of the message that it was given last.
        pace: how fast that message goes out, while it does.
    """

    instance: str
    cancel: Callable[[], object] = nothing
    certificate: bytes = b""
    alive: bool = True
    current: str = ""
    pace: Pace | None = None


@dataclass(eq=False)
class Parcel:
    """An encoded message on its way to a site.

    Attributes:
        moved: when a byte of it or of its answer last moved, on the monotonic clock.
        expires: when it is not worth delivering any more, on the same clock, because the wall clock may jump.
    """

    message: Message
    pieces: list[bytes]
    moved: float
    expires: float

    @property
    def size(self) -> int:
        """Bytes of the whole stream."""
        return sum(map(len, self.pieces))


@dataclass(eq=False)
class Incoming:
    """A reply that is arriving, or of which a part has come before its stream broke (``parked``)."""

    instance: str
    decoder: Decoder
    cancel: Callable[[], object] = nothing
    pace: Pace | None = None
    message_id: str = ""
    parked: bool = False


@dataclass(eq=False)
class Link:
    """One site: its session, what it owes, and the answer that is arriving."""

    site: SiteId
    wake: threading.Condition
    gone_since: float
    strikes: Strikes
    owed: dict[str, Parcel] = field(default_factory=dict)
    session: Session | None = None
    incoming: Incoming | None = None
