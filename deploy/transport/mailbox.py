"""Messages between the server's app and the sites' streams: who is connected, what is owed, what has come.

No I/O: the app's thread puts messages and waits, the streams' threads take messages and hand in replies. A message
is owed from :meth:`Mailbox.put` until it is answered, withdrawn or expired; each new session of its site is given
it again. Waiting is by conditions under one lock, never by polling.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Generator, Iterable
from dataclasses import dataclass, field

from flwr.app import Message

from fedveil.common import flwr_adapter as flower
from fedveil.common.errors import FedveilError, TransportError
from fedveil.common.units import SiteId
from fedveil.deploy.transport.codec import encode


@dataclass(eq=False)
class Session:
    """One open stream of a site's process; ``current`` is the id of the message it was given last."""

    instance: str
    alive: bool = True
    current: str = ""


@dataclass(frozen=True)
class Parcel:
    """An encoded message on its way to a site."""

    message: Message
    pieces: list[bytes]


@dataclass
class _Link:
    site: SiteId
    wake: threading.Condition
    gone_since: float
    session: Session | None = None
    owed: dict[str, Parcel] = field(default_factory=dict)
    replying: bool = False


class Mailbox:
    """The queues of all sites of a run.

    Args:
        sites: whoever may connect; each has its queue from the start.
        grace: seconds after which :meth:`collect` gives up a site that is not connected, counted from when it
            left (from the start if it never came): a site that is gone costs one wait, not one in every round.
    """

    def __init__(self, sites: Iterable[SiteId], grace: float) -> None:
        self._grace = grace
        self._lock = threading.Lock()
        self._arrived = threading.Condition(self._lock)
        now = time.monotonic()
        self._links = {s: _Link(s, threading.Condition(self._lock), now) for s in sites}
        self._owner: dict[str, _Link] = {}
        self._replies: dict[str, Message] = {}
        self._ended = ""

    # The app's side

    def connected(self) -> list[SiteId]:
        """The sites that have a live session, in the order given at the start."""
        with self._lock:
            return self._connected()

    def wait_connected(self, count: int, timeout: float) -> int:
        """Wait until ``count`` sites are connected or ``timeout`` seconds are over; returns how many are."""
        with self._lock:
            self._arrived.wait_for(lambda: len(self._connected()) >= count, timeout)
            return len(self._connected())

    def put(self, site: SiteId, message: Message) -> str:
        """Encode ``message``, queue it and return its fresh id.

        Raises:
            WireError: the message cannot be encoded within the stream's bounds.
        """
        message_id = flower.stamp(message)
        parcel = Parcel(message, encode(message))
        with self._lock:
            link = self._links[site]
            link.owed[message_id] = parcel
            self._owner[message_id] = link
            link.wake.notify_all()
        return message_id

    def take(self, message_ids: Iterable[str]) -> list[Message]:
        """The replies that have come, in the order of ``message_ids``; each is given once."""
        with self._lock:
            return [self._replies.pop(i) for i in list(message_ids) if i in self._replies]

    def replies(self, message_ids: Iterable[str], timeout: float | None) -> Generator[Message, None, None]:
        """The replies as they come, waited for at most ``timeout`` seconds; what was not answered is then withdrawn.

        The wait ends early when every site that still owes a reply has been away for ``grace`` seconds. A reply is
        given away: the mailbox keeps no reference to it. Closing the iterator withdraws the rest.
        """
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        left = dict.fromkeys(message_ids)
        try:
            while (message_id := self._next_reply(left, deadline)) is not None:
                del left[message_id]
                with self._lock:
                    reply = [self._replies.pop(message_id)]
                yield reply.pop()
        finally:
            with self._lock:
                for message_id in left:
                    self._forget(message_id)
                    self._replies.pop(message_id, None)

    def collect(self, message_ids: list[str], timeout: float | None) -> list[Message]:
        """:meth:`replies`, all of them, in the order of ``message_ids``."""
        found = {m.metadata.reply_to_message_id: m for m in self.replies(message_ids, timeout)}
        return [found[i] for i in message_ids if i in found]

    def end(self, status: str, timeout: float) -> None:
        """Withdraw everything, let every session end with ``status``, wait for that at most ``timeout`` seconds."""
        with self._lock:
            self._ended = status
            for message_id in list(self._owner):
                self._forget(message_id)
            for link in self._links.values():
                link.wake.notify_all()
            self._arrived.wait_for(lambda: not self._connected(), timeout)

    # The streams' side

    def attach(self, site: SiteId, instance: str) -> Session:
        """Begin a session of the site's process ``instance``, which replaces its own earlier one.

        Raises:
            TransportError: another process under the same identity is connected and alive.
        """
        with self._lock:
            link = self._links[site]
            if link.session is not None:
                if link.session.instance != instance:
                    raise TransportError(
                        f"another process is connected as {site!r}",
                        hint="stop it; two machines never share an identity",
                    )
                link.session.alive = False
            link.session = Session(instance)
            link.wake.notify_all()
            self._arrived.notify_all()
            return link.session

    def detach(self, site: SiteId, session: Session) -> None:
        """End ``session``; a session that has replaced it goes on."""
        with self._lock:
            link = self._links[site]
            session.alive = False
            if link.session is session:
                link.session = None
                link.gone_since = time.monotonic()
            link.wake.notify_all()
            self._arrived.notify_all()

    def next_parcel(self, site: SiteId, session: Session) -> Parcel | str:
        """Wait for what to send next; a string means the end: the run's status, or '' if only the session is over.

        One at a time: the next message is given when the last one is answered or withdrawn.
        """
        with self._lock:
            link = self._links[site]
            while session.alive:
                if session.current not in link.owed:
                    session.current = self._first(link)
                    if session.current:
                        return link.owed[session.current]
                    if self._ended:
                        return self._ended
                link.wake.wait()
            return ""

    def begin_reply(self, site: SiteId, instance: str) -> None:
        """Admit one reply at a time, from the process whose session is alive; :class:`TransportError` otherwise."""
        with self._lock:
            link = self._links[site]
            if link.session is None or link.session.instance != instance:
                raise TransportError("this process has no session", hint="connect again")
            if link.replying:
                raise TransportError("a reply of this site is under way already", hint="connect again")
            link.replying = True

    def end_reply(self, site: SiteId) -> None:
        """The reply's stream is over, however it ended."""
        with self._lock:
            self._links[site].replying = False

    def owes(self, site: SiteId, message_id: str) -> bool:
        """Whether ``site`` owes an answer to ``message_id``."""
        with self._lock:
            return message_id in self._links[site].owed

    def accept(self, site: SiteId, message_id: str, reply: Message | FedveilError) -> bool:
        """Take the answer to ``message_id``; False when it is not, or no longer, owed by ``site``.

        What a reply says of its sender, run and round is replaced by what the request said. An error stands for
        a reply that could not be read.
        """
        with self._lock:
            parcel = self._links[site].owed.get(message_id)
            if parcel is None:
                return False
            if isinstance(reply, FedveilError):
                reply = flower.error_reply(reply, parcel.message)
                flower.stamp(reply)
            self._replies[message_id] = flower.readdressed(reply, parcel.message)
            self._forget(message_id)
            self._arrived.notify_all()
            return True

    def _next_reply(self, message_ids: Iterable[str], deadline: float) -> str | None:
        """Wait until one of ``message_ids`` has its reply; None when no more is to be waited for."""
        with self._lock:
            while True:
                if time.monotonic() >= deadline:
                    for message_id in message_ids:
                        self._forget(message_id)
                if (came := next((i for i in message_ids if i in self._replies), None)) is not None:
                    return came
                if (rest := min(self._patience(message_ids), deadline - time.monotonic())) <= 0:
                    return None
                self._arrived.wait(None if math.isinf(rest) else rest)

    # Under the lock

    def _connected(self) -> list[SiteId]:
        return [s for s, link in self._links.items() if link.session is not None]

    def _patience(self, message_ids: Iterable[str]) -> float:
        """Seconds for which waiting makes sense: 0 when nothing is owed, infinite while a debtor is connected."""
        now, rest = time.monotonic(), 0.0
        for message_id in message_ids:
            link = self._owner.get(message_id)
            if link is None:
                continue
            if link.session is not None:
                return math.inf
            rest = max(rest, link.gone_since + self._grace - now)
        return rest

    def _first(self, link: _Link) -> str:
        now = time.time()
        for message_id, parcel in list(link.owed.items()):
            metadata = parcel.message.metadata
            if metadata.created_at + metadata.ttl > now:
                return message_id
            self._forget(message_id)
            self._arrived.notify_all()
        return ""

    def _forget(self, message_id: str) -> None:
        link = self._owner.pop(message_id, None)
        if link is not None:
            link.owed.pop(message_id, None)
            link.wake.notify_all()
